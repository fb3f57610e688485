"""The gRPC side of `qdrant_stub`: the endpoints `MemoryStore` uses, before an in-memory client."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
from qdrant_client import QdrantClient
from qdrant_client import grpc as messages
from qdrant_client.conversions.conversion import GrpcToRest, RestToGrpc
from qdrant_client.grpc import collections_service_pb2_grpc, points_service_pb2_grpc


class QdrantGrpcStub:
    """Serves until `close`; `url` and `port` are where.

    Args:
        certificate: A PEM file with certificate and key: speak TLS.
    """

    def __init__(self, certificate: Path | None = None) -> None:
        self.client = QdrantClient(":memory:")
        self.url = "https://127.0.0.1" if certificate else "http://127.0.0.1"
        self._server = grpc.server(ThreadPoolExecutor(4))
        if certificate is not None:
            pem = certificate.read_bytes()
            credentials = grpc.ssl_server_credentials([(pem, pem)])
            self.port = self._server.add_secure_port("127.0.0.1:0", credentials)
        else:
            self.port = self._server.add_insecure_port("127.0.0.1:0")
        # Requests for new collections.
        self.created: list[Any] = []
        lock = threading.Lock()
        collections_service_pb2_grpc.add_CollectionsServicer_to_server(
            _Collections(self.client, self.created), self._server
        )
        points_service_pb2_grpc.add_PointsServicer_to_server(
            _Points(self.client, lock), self._server
        )
        self._server.start()

    def close(self) -> None:
        self._server.stop(None).wait()
        self.client.close()


class _Collections(collections_service_pb2_grpc.CollectionsServicer):
    def __init__(self, client: QdrantClient, created: list[Any]) -> None:
        self.client = client
        self.created = created

    def CollectionExists(self, request: Any, context: Any) -> Any:
        exists = self.client.collection_exists(request.collection_name)
        return messages.CollectionExistsResponse(result=messages.CollectionExists(exists=exists))

    def Create(self, request: Any, context: Any) -> Any:
        self.created.append(request)
        self.client.create_collection(
            request.collection_name,
            GrpcToRest.convert_vectors_config(request.vectors_config),
            metadata=GrpcToRest.convert_payload(request.metadata),
        )
        return messages.CollectionOperationResponse(result=True)

    def Get(self, request: Any, context: Any) -> Any:
        info = self.client.get_collection(request.collection_name)
        return messages.GetCollectionInfoResponse(result=RestToGrpc.convert_collection_info(info))


class _Points(points_service_pb2_grpc.PointsServicer):
    def __init__(self, client: QdrantClient, lock: threading.Lock) -> None:
        self.client = client
        self.lock = lock

    def CreateFieldIndex(self, request: Any, context: Any) -> Any:
        return _DONE

    def Upsert(self, request: Any, context: Any) -> Any:
        points = [GrpcToRest.convert_point_struct(point) for point in request.points]
        with self.lock:
            self.client.upsert(request.collection_name, points)
        return _DONE

    def Delete(self, request: Any, context: Any) -> Any:
        with self.lock:
            self.client.delete(
                request.collection_name, GrpcToRest.convert_points_selector(request.points)
            )
        return _DONE

    def SetPayload(self, request: Any, context: Any) -> Any:
        with self.lock:
            self.client.set_payload(
                request.collection_name,
                GrpcToRest.convert_payload(request.payload),
                GrpcToRest.convert_points_selector(request.points_selector),
            )
        return _DONE

    def Get(self, request: Any, context: Any) -> Any:
        with self.lock:
            found = self.client.retrieve(
                request.collection_name,
                [GrpcToRest.convert_point_id(each) for each in request.ids],
                GrpcToRest.convert_with_payload_interface(request.with_payload),
            )
        for record in found:
            record.payload = record.payload or {}  # where the conversion takes no None
        return messages.GetResponse(result=[RestToGrpc.convert_record(each) for each in found])

    def Query(self, request: Any, context: Any) -> Any:
        with self.lock:
            found = self.client.query_points(
                request.collection_name,
                query=GrpcToRest.convert_query(request.query),
                query_filter=_filter(request),
                limit=request.limit,
                with_payload=GrpcToRest.convert_with_payload_interface(request.with_payload),
            ).points
        return messages.QueryResponse(
            result=[RestToGrpc.convert_scored_point(each) for each in found]
        )

    def Count(self, request: Any, context: Any) -> Any:
        with self.lock:
            counted = self.client.count(request.collection_name, _filter(request))
        return messages.CountResponse(result=RestToGrpc.convert_count_result(counted))

    def Scroll(self, request: Any, context: Any) -> Any:
        offset = GrpcToRest.convert_point_id(request.offset) if request.HasField("offset") else None
        with self.lock:
            records, following = self.client.scroll(
                request.collection_name,
                scroll_filter=_filter(request),
                limit=request.limit,
                offset=offset,
                with_payload=GrpcToRest.convert_with_payload_interface(request.with_payload),
                with_vectors=request.with_vectors.enable,
            )
        return messages.ScrollResponse(
            result=[RestToGrpc.convert_record(each) for each in records],
            next_page_offset=(
                None if following is None else RestToGrpc.convert_extended_point_id(following)
            ),
        )


_DONE = messages.PointsOperationResponse(
    result=messages.UpdateResult(operation_id=0, status=messages.UpdateStatus.Completed)
)


def _filter(request: Any) -> Any:
    return GrpcToRest.convert_filter(request.filter) if request.HasField("filter") else None
