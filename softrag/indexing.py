"""Documents into the store: split, compress what is new, upsert, drop what is gone.

Every batch is stored before the next one is compressed, and nothing of a source is deleted before
its new chunks are stored: stopped at any point, the store holds whole chunks, and running again
continues where it stopped. It knows nothing of files and questions.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from tqdm import tqdm

from softrag.answer import AddError
from softrag.checks import check_count
from softrag.compressor import Compressor
from softrag.documents import Chunk, Document, chunk_id, document_text
from softrag.embedder import Embedder
from softrag.errors import EmptyDocumentError
from softrag.memory import Memory
from softrag.store import MemoryStore
from softrag.text import TextSpan, clean_text, split_text

CHUNK_TOKENS = 128
"""Longest chunk in compressor tokens, as in the papers."""


def choose_chunk_tokens(asked: int | None, *, limit: int) -> int:
    """Return the longest chunk in compressor tokens.

    Args:
        asked: By the user; None for `CHUNK_TOKENS`, or the compressor's limit where it is lower.
        limit: Tokens that the compressor reads.
    """
    chunk_tokens = min(CHUNK_TOKENS, limit) if asked is None else asked
    if not 1 <= chunk_tokens <= limit:
        raise ValueError(
            f"chunk_tokens must be between 1 and the {limit} tokens this compressor reads, "
            f"found {asked}."
        )
    return chunk_tokens


class ChunkSink(Protocol):
    """Where an indexer puts chunks: a `MemoryStore`, or the way to one in another process."""

    def missing(self, chunks: Sequence[Chunk], /) -> list[Chunk]:
        """Return those of `chunks` that are not stored as they are."""
        ...

    def upsert(
        self, chunks: Sequence[Chunk], embeddings: np.ndarray, memories: Sequence[Memory | None], /
    ) -> None:
        """Store chunks; when it returns, they survive the death of every process."""
        ...


@dataclass(kw_only=True)
class Tally:
    """What indexing did so far.

    Attributes:
        documents: Documents read, without those in `errors`.
        added: Chunks compressed and stored.
        unchanged: Chunks that the store had already.
        errors: Documents that were left out.
        failed: Sources of which a document was left out.
        ids: Ids of the chunks that each source has now.
    """

    documents: int = 0
    added: int = 0
    unchanged: int = 0
    errors: list[AddError] = field(default_factory=list)
    failed: set[str] = field(default_factory=set)
    ids: defaultdict[str, set[str]] = field(default_factory=lambda: defaultdict(set))

    def merge(self, other: Tally) -> None:
        """Add what another indexer did."""
        self.documents += other.documents
        self.added += other.added
        self.unchanged += other.unchanged
        self.errors += other.errors
        self.failed |= other.failed
        for source, ids in other.ids.items():
            self.ids[source] |= ids


def delete_gone(store: MemoryStore, tally: Tally) -> int:
    """Delete what the sources in a tally no longer have. Return how many chunks that were."""
    # A source that could not be read whole may still have what seems to be gone.
    whole = [source for source in tally.ids if source not in tally.failed]
    stored = store.ids_of_sources(whole)
    return store.delete({id_ for s in whole for id_ in stored[s] - tally.ids[s]})


@dataclass(frozen=True, kw_only=True)
class Indexer:
    """Splits documents and stores what is new of them.

    Attributes:
        store: Where chunks go.
        embedder: Makes the vectors they are found by.
        compressor: Makes their memories.
        chunk_tokens: Longest chunk with its title, in compressor tokens.
    """

    store: ChunkSink
    embedder: Embedder
    compressor: Compressor
    chunk_tokens: int

    def run(
        self,
        documents: Iterable[Document | str],
        *,
        batch_size: int,
        show_progress: bool = False,
    ) -> Tally:
        """Store documents, `batch_size` chunks at a time; see `SoftRAG.add`."""
        check_count("batch_size", batch_size)
        tally = Tally()
        batch: dict[str, Chunk] = {}
        for chunk in self._chunks(documents, tally, show_progress=show_progress):
            batch[chunk.id] = chunk
            if len(batch) == batch_size:
                self._store(batch, tally)
                batch = {}
        if batch:
            self._store(batch, tally)
        return tally

    def split(self, document: Document) -> list[Chunk]:
        """Split a document into chunks that the compressor reads whole.

        Raises:
            EmptyDocumentError: The document has no text.
        """
        if not isinstance(document, Document):
            raise TypeError(
                f"Expected a softrag.Document or a text, found {document!r:.80}. Make one of "
                "it: Document(text=…, source=…, title=…, metadata=…)."
            )
        title, room = self._fit_title(document.title)
        text = clean_text(document.text)
        if self.compressor.cut:
            n_tokens = len(self.compressor.prompt.tokenize(text))
            pieces = [TextSpan(text, 0, len(text), n_tokens)] if text else []
        else:
            pieces = split_text(text, self.compressor.prompt.tokenizer, room)
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
        self, documents: Iterable[Document | str], tally: Tally, *, show_progress: bool
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

    def _store(self, batch: dict[str, Chunk], tally: Tally) -> None:
        new = self.store.missing(list(batch.values()))
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
