"""Documents in and out, and a search without an answer."""

from __future__ import annotations

from functools import partial
from typing import Annotated

from fastapi import APIRouter, Query, Request

from softrag.answer import AddReport
from softrag.serve.errors import ApiError
from softrag.serve.schemas import (
    AddRequest,
    Deleted,
    RetrieveRequest,
    Source,
    SourceList,
    Text,
)
from softrag.serve.service import service_of

Names = Annotated[list[Text], Query(max_length=1000)]

router = APIRouter(prefix="/v1", tags=["Documents"])


@router.post("/documents")
async def add(request: Request, asked: AddRequest) -> AddReport:
    """Split, compress and store documents; the answer comes when they can be found.

    A document replaces what is stored under its source. Sending one again costs nothing.
    """
    service = service_of(request)
    documents = [each.document() for each in asked.documents]
    return await service.run(
        service.writes,
        partial(service.engine(request).aadd, documents),
        late="Adding takes longer than a request may. It goes on; send the same documents again "
        "later to see when it is done.",
    )


@router.delete("/documents")
async def delete(request: Request, id: Names = [], source: Names = []) -> Deleted:  # noqa: B006
    """Delete chunks by id, and all chunks of sources; what is not there is ignored."""
    if not id and not source:
        raise ApiError(400, "Nothing to delete was named; expected ?id=... or ?source=...")
    service = service_of(request)
    engine = service.engine(request)

    async def work() -> int:
        deleted = await engine.adelete(id) if id else 0
        for each in source:
            deleted += await engine.adelete_source(each)
        return deleted

    late = "Deleting takes longer than a request may. It goes on."
    return Deleted(deleted=await service.run(service.writes, work, late=late))


@router.post("/retrieve")
async def retrieve(request: Request, asked: RetrieveRequest) -> SourceList:
    """Find the chunks nearest to a question."""
    service = service_of(request)
    search = partial(service.engine(request).aretrieve, asked.query, k=asked.k, where=asked.where)
    late = "The search took longer than a request may."
    hits = await service.run(service.searches, search, late=late)
    return SourceList(data=[Source.of(hit) for hit in hits])
