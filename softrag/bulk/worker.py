"""A worker: takes shares, compresses what is new of them, stores it. It knows no other worker."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Client
from typing import NamedTuple

import torch

from softrag.answer import AddError
from softrag.bulk.channel import Channel, HungUp, RemoteStore, read_share_message, tally_message
from softrag.bulk.shares import Share
from softrag.compressor import Compressor
from softrag.documents import Document
from softrag.embedder import Embedder, default_embedder
from softrag.indexing import ChunkSink, Indexer, Tally, choose_chunk_tokens
from softrag.model import SoftRAGModel
from softrag.store import MemoryStore
from softrag.store.connection import GRPC_PORT
from softrag.store.record import StoreRecord


@dataclass(frozen=True, kw_only=True)
class StoreAddress:
    """Where the store is, and how it is opened; arguments as of `MemoryStore.open`."""

    location: str
    collection: str = "softrag"
    codec: str | None = None
    api_key: str | None = field(default=None, repr=False)
    prefer_grpc: bool = False
    grpc_port: int = GRPC_PORT

    def open(self, *, fingerprint: str, embedder: Embedder) -> MemoryStore:
        """Open the store of a model and an embedder, and create it when there is none."""
        return MemoryStore.open(
            self.location,
            collection=self.collection,
            fingerprint=fingerprint,
            embedder=embedder.name,
            dimension=embedder.dimension,
            codec=self.codec,
            api_key=self.api_key,
            prefer_grpc=self.prefer_grpc,
            grpc_port=self.grpc_port,
        )


@dataclass(frozen=True, kw_only=True)
class WorkerSetup:
    """What a worker loads. It is sent to new processes, so everything in it can be pickled.

    Attributes:
        checkpoint: Folder or hub name.
        store: Where memories go.
        base_model: Where the checkpoint's base model is, if not where the checkpoint says.
        device: Of all workers; None gives every worker a GPU in turn, or the CPU.
        threads: That a worker computes with on the CPU; None divides the cores among the workers.
        embedder: Makes the embedder, given its device.
        chunk_tokens: Longest chunk, as of `SoftRAG`.
        batch_size: Chunks compressed and stored together; None for 64 on a CPU, 512 on a GPU.
        rate: Document tokens per soft token, as of `SoftRAG.from_pretrained`.
    """

    checkpoint: str
    store: StoreAddress
    base_model: str | None = None
    device: str | None = None
    threads: int | None = None
    embedder: Callable[[str], Embedder] = default_embedder
    chunk_tokens: int | None = None
    batch_size: int | None = None
    rate: int | None = None

    def device_of(self, worker: int) -> str:
        """Return the device of a worker, counted from 0 on its machine."""
        if self.device is not None:
            return self.device
        gpus = torch.cuda.device_count()
        return f"cuda:{worker % gpus}" if gpus else "cpu"

    @property
    def chunks_per_batch(self) -> int:
        """How many chunks are compressed and stored together."""
        on_cpu = self.device_of(0) == "cpu"
        return self.batch_size or (64 if on_cpu else 512)


class Address(NamedTuple):
    """Where a coordinator listens, and the key that lets a worker in."""

    place: str | tuple[str, int]
    key: bytes


def run_worker(setup: WorkerSetup, address: Address, worker: int) -> None:
    """Be a worker process that `index_files` started, until there is no more to do."""
    # The parent tells what a Ctrl-C means, and ends its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if setup.threads is not None:
        # Also where a GPU does the work: with every core's threads in every worker, tokenizing and
        # copying wait for each other, and a second GPU adds little.
        torch.set_num_threads(setup.threads)
        os.environ.setdefault("RAYON_NUM_THREADS", str(setup.threads))
    hush_loading()
    try:
        work(setup, address, worker)
    except (EOFError, ConnectionError):
        # The coordinator is gone, or has told of an error: there is nobody to tell.
        os._exit(1)


def work(setup: WorkerSetup, address: Address, worker: int) -> None:
    """Take shares and store them until there are no more; errors go to the coordinator.

    Raises:
        EOFError, ConnectionError: The coordinator is gone.
    """
    channel = Channel(Client(address.place, authkey=address.key))
    try:
        record = channel.request({"do": "hello"})["record"]
        indexer = load_indexer(
            setup, worker, channel=channel, record=StoreRecord(**record) if record else None
        )
        channel.send({"do": "next"})
        while (message := channel.receive()).get("share"):
            tally = index_share(
                indexer, read_share_message(message["share"]), setup.chunks_per_batch
            )
            channel.send({"do": "done", "tally": tally_message(tally)})
            channel.send({"do": "next"})
    except HungUp:
        raise
    except Exception as error:
        channel.send({"do": "fail", "kind": type(error).__name__, "message": str(error)})
        raise EOFError from error
    finally:
        channel.close()


def load_indexer(
    setup: WorkerSetup,
    worker: int,
    *,
    channel: Channel | None = None,
    record: StoreRecord | None = None,
) -> Indexer:
    """Load the model, and open the store or the way to it.

    Args:
        setup: What to load.
        worker: Number of the worker on its machine, from 0.
        channel: To the coordinator.
        record: Of the coordinator's store, when only that process may open it.
    """
    device = setup.device_of(worker)
    embedder = setup.embedder(device)
    compressor = Compressor(
        SoftRAGModel.from_pretrained(
            setup.checkpoint,
            base_model=setup.base_model,
            load_decoder=False,
            device=device,
            rate=setup.rate,
        )
    )
    store: ChunkSink
    if channel is None or record is None:
        store = setup.store.open(fingerprint=compressor.fingerprint, embedder=embedder)
    else:
        place = f"The store {setup.store.location}"
        record.check(
            place=place,
            fingerprint=compressor.fingerprint,
            embedder=embedder.name,
            dimension=embedder.dimension,
            codec=setup.store.codec,
        )
        store = RemoteStore(channel, record, place)
    return Indexer(
        store=store,
        embedder=embedder,
        compressor=compressor,
        chunk_tokens=choose_chunk_tokens(
            setup.chunk_tokens, limit=compressor.model.config.max_document_tokens
        ),
    )


def index_share(indexer: Indexer, share: Share, batch_size: int) -> Tally:
    """Store what is new of a share."""
    errors: list[AddError] = []

    def documents() -> Iterator[Document]:
        for piece in share.pieces:
            result = piece.read()
            if result.error is not None:
                errors.append(AddError(source=piece.path, message=str(result.error)))
            yield from result.documents

    tally = indexer.run(documents(), batch_size=batch_size)
    tally.errors += errors
    # Other parts of the file may be well, but what is gone from it cannot be known.
    tally.failed |= {error.source for error in errors if error.source}
    return tally


def hush_loading() -> None:
    """Keep the bars and reports about loading weights of every worker off the terminal."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
