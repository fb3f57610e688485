"""Documents into the store: split, compress what is new, upsert, drop what is gone.

Every batch is stored before the next one is compressed, and nothing of a source is deleted before
its new chunks are stored: stopped at any point, the store holds whole chunks, and running again
continues where it stopped. It knows nothing of files and questions.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from time import perf_counter

from tqdm import tqdm

from softrag.answer import AddError, AddReport
from softrag.compressor import Compressor
from softrag.documents import Chunk, Document, chunk_id, document_text
from softrag.embedder import Embedder
from softrag.errors import EmptyDocumentError
from softrag.memory import Memory
from softrag.store import MemoryStore
from softrag.text import clean_text, split_text

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Indexer:
    """Adds documents to a store.

    Attributes:
        store: Where chunks go.
        embedder: Makes the vectors they are found by.
        compressor: Makes their memories.
        chunk_tokens: Longest chunk with its title, in compressor tokens.
    """

    store: MemoryStore
    embedder: Embedder
    compressor: Compressor
    chunk_tokens: int

    def add(
        self, documents: Iterable[Document | str], *, batch_size: int, show_progress: bool
    ) -> AddReport:
        """Add documents; see `SoftRAG.add`."""
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, found {batch_size}.")
        started = perf_counter()
        tally = _Tally()
        batch: dict[str, Chunk] = {}
        for chunk in self._chunks(documents, tally, show_progress=show_progress):
            batch[chunk.id] = chunk
            if len(batch) == batch_size:
                self._store(batch, tally)
                batch = {}
        if batch:
            self._store(batch, tally)
        deleted = self._delete_gone(tally)
        report = AddReport(
            documents=tally.documents,
            chunks_added=tally.added,
            chunks_unchanged=tally.unchanged,
            chunks_deleted=deleted,
            seconds=perf_counter() - started,
            errors=tally.errors,
        )
        logger.info("added %d chunks of %d documents", report.chunks_added, report.documents)
        return report

    def split(self, document: Document) -> list[Chunk]:
        """Split a document into chunks that the compressor reads whole.

        Raises:
            EmptyDocumentError: The document has no text.
        """
        title, room = self._fit_title(document.title)
        pieces = split_text(clean_text(document.text), self.compressor.prompt.tokenizer, room)
        if not pieces:
            raise EmptyDocumentError(
                f"{document.source or 'A document'} has no text, so there is nothing to compress."
            )
        return [
            Chunk(
                id=chunk_id(document.source, piece.text),
                text=piece.text,
                source=document.source,
                title=title,
                metadata=document.metadata,
                n_tokens=piece.n_tokens,
                start=piece.start,
            )
            for piece in pieces
        ]

    def _fit_title(self, title: str | None) -> tuple[str | None, int]:
        """Return a title that leaves half of every chunk to the text, and the text's tokens."""
        title = " ".join(clean_text(title).split()) if title else None
        if not title:
            return None, self.chunk_tokens
        tokenizer = self.compressor.prompt.tokenizer
        n_tokens = len(self.compressor.prompt.tokenize(document_text(title, "")))
        if n_tokens > self.chunk_tokens // 2:
            title = split_text(title, tokenizer, max(1, self.chunk_tokens // 2 - 1))[0].text
            n_tokens = self.chunk_tokens // 2
        # In steps, because each length of chunk needs a splitter, which takes long to build.
        step = max(1, self.chunk_tokens // 8)
        return title, max(1, self.chunk_tokens - -(-n_tokens // step) * step)

    def _chunks(
        self, documents: Iterable[Document | str], tally: _Tally, *, show_progress: bool
    ) -> Iterator[Chunk]:
        for document in tqdm(documents, unit=" documents", disable=not show_progress):
            if isinstance(document, str):
                document = Document(text=document)
            try:
                chunks = self.split(document)
            except EmptyDocumentError as error:
                tally.errors.append(AddError(source=document.source, message=str(error)))
                if document.source is not None:
                    tally.failed.add(document.source)
                continue
            tally.documents += 1
            if document.source is not None:
                tally.ids[document.source].update(chunk.id for chunk in chunks)
            yield from chunks

    def _store(self, batch: dict[str, Chunk], tally: _Tally) -> None:
        stored = {hit.id: hit for hit in self.store.get(list(batch), with_memories=False)}
        new = [
            chunk
            for chunk in batch.values()
            if chunk.id not in stored
            or stored[chunk.id].title != chunk.title
            or dict(stored[chunk.id].metadata) != dict(chunk.metadata)
        ]
        tally.unchanged += len(batch) - len(new)
        if not new:
            return
        texts = [document_text(chunk.title, chunk.text) for chunk in new]
        # Memories for a question are made when it is asked.
        memories: Sequence[Memory | None] = (
            [None] * len(new)
            if self.compressor.query_dependent
            else self.compressor.compress(texts)
        )
        self.store.upsert(new, self.embedder.embed_documents(texts), memories)
        tally.added += len(new)

    def _delete_gone(self, tally: _Tally) -> int:
        # A source that could not be read whole may still have what seems to be gone.
        whole = [source for source in tally.ids if source not in tally.failed]
        stored = self.store.ids_of_sources(whole)
        return self.store.delete({id_ for s in whole for id_ in stored[s] - tally.ids[s]})


class _Tally:
    """What happened so far in one call of `add`."""

    def __init__(self) -> None:
        self.documents = 0
        self.added = 0
        self.unchanged = 0
        self.errors: list[AddError] = []
        self.failed: set[str] = set()
        self.ids: defaultdict[str, set[str]] = defaultdict(set)
