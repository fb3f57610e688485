"""SoftRAG: documents in, answers out. It wires the other parts together."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import Executor
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

import torch

from softrag.answer import AddReport, Answer, AnswerStream, Mode, reads_memories
from softrag.asking import Asked, Decoding, Prepared, Source, check_mode, check_question, prepare
from softrag.asynchronous import async_stream_twin, async_twin
from softrag.batching import MicroBatcher
from softrag.checks import check_copy_bias, check_count, check_texts
from softrag.compressor import Compressor
from softrag.decoder import Decoder, DecodeRequest, DecodeResult, TorchDecoder, VLLMDecoder
from softrag.documents import Chunk, Document, Hit
from softrag.embedder import Embedder, check_embedder, default_embedder
from softrag.errors import EmptyStoreError
from softrag.fallback import answer_all, stream_answer
from softrag.handles import MemoryCache
from softrag.indexing import CHUNK_TOKENS, Indexer, choose_chunk_tokens, delete_gone
from softrag.memory import Memory
from softrag.model import SoftRAGModel
from softrag.router import Router
from softrag.store import MemoryStore
from softrag.threads import LoopThreads

if TYPE_CHECKING:
    from softrag.store.filters import Where

logger = logging.getLogger(__name__)


class SoftRAG:
    """Answers questions from a store of memories.

    Safe to use from several threads; questions asked at the same time are decoded together.

    Args:
        store: Chunks with their embeddings and memories.
        embedder: Finds chunks; the one the store was built with.
        compressor: Makes memories; None can only answer from stored ones.
        decoder: Writes answers; None can only add and retrieve.
        chunk_tokens: Longest chunk in compressor tokens; None for 128, or the compressor's limit
            where that is lower.
        window_s: How long a question waits for others to be decoded with it.
        fallback: Decides, where memories are asked for, which questions are answered from text
            instead; None for none.
        copy_bias: Where memories are read, the answer's tokens that go on as the chunks' texts do
            get so much added to their logits, 0.0 to 100: names and numbers come out as they are
            spelled there, and no prompt token more is read. 0.0 for none, None for what the
            checkpoint was found to be best with; `docs/evaluation.md` has what it is worth. Of
            this library's own decoder only.

    Raises:
        MemoryMismatchError: The store was built, or the fallback calibrated, with another model
            or embedder.
    """

    def __init__(
        self,
        *,
        store: MemoryStore,
        embedder: Embedder,
        compressor: Compressor | None = None,
        decoder: Decoder | None = None,
        chunk_tokens: int | None = None,
        window_s: float = 0.005,
        fallback: Router | None = None,
        copy_bias: float | None = None,
    ) -> None:
        check_embedder(embedder)
        self.store = store
        self.embedder = embedder
        self.compressor = compressor
        self.decoder = decoder
        limit = compressor.model.config.max_document_tokens if compressor else CHUNK_TOKENS
        self.chunk_tokens = choose_chunk_tokens(chunk_tokens, limit=limit)
        maker = compressor or decoder
        store.record.check(
            place=f"The store {store.location}",
            fingerprint=maker.fingerprint if maker else None,
            embedder=embedder.name,
            dimension=embedder.dimension,
            codec=None,
        )
        if fallback is not None and maker is not None:
            fallback.check(maker.fingerprint)
        self.fallback = fallback
        if copy_bias is None:
            copy_bias = decoder.copy_bias if decoder else 0.0
        check_copy_bias(copy_bias)
        self.copy_bias = copy_bias
        self._batcher: MicroBatcher[DecodeRequest, DecodeResult] | None = (
            MicroBatcher(decoder.generate, window_s=window_s)
            if decoder and not decoder.joins_requests
            else None
        )
        # Memories that travel as handles through other libraries.
        self.cache = MemoryCache()
        # Threads for the async calls: as many as may wait for one batch.
        self.threads: Executor = LoopThreads(64, "softrag")

    @classmethod
    def from_pretrained(
        cls,
        checkpoint: str | Path,
        *,
        store: MemoryStore | str | Path = ":memory:",
        embedder: Embedder | None = None,
        collection: str = "softrag",
        codec: str | None = None,
        prefer_grpc: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | str = "auto",
        load_decoder: bool = True,
        load_compressor: bool = True,
        base_model: str | Path | None = None,
        decoder: Decoder | str = "torch",
        chunk_tokens: int | None = None,
        rate: int | None = None,
        cut: bool = False,
        fallback: Router | str | Path | None = None,
        copy_bias: float | None = None,
    ) -> SoftRAG:
        """Load a checkpoint and open a store.

        Args:
            checkpoint: A folder or hub name, as `SoftRAGModel.from_pretrained` takes it.
            store: An open store, a folder, a Qdrant URL, or ":memory:".
            embedder: None for the default one.
            collection: Of the store, when it is opened here.
            codec: How the store keeps memories (`softrag.codec.CODECS`); None for its own, and
                "bf16" for a new one.
            prefer_grpc: Talk gRPC instead of HTTP to a Qdrant server, when it is opened here.
            device: Where the model runs; None chooses.
            dtype: Of all weights, as `SoftRAGModel.from_pretrained` takes it. "bfloat16" answers
                two to five times as fast on CPUs that compute in it (AVX512-BF16, AMX); "auto"
                keeps float32 there for the decoder, whose answers then do not depend on what is
                answered beside them.
            load_decoder: False to add and retrieve only.
            load_compressor: False to answer from stored memories only.
            base_model: Where the checkpoint's base model is, if not where the checkpoint says.
            decoder: What writes answers: "torch" in this process; the URL of a vLLM server that
                serves the exported decoder (`docs/vllm.md`); "vllm" in this process, where vLLM
                is installed; or a decoder of your own.
            chunk_tokens: As in the class.
            rate: Document tokens per soft token, one of those the checkpoint was trained at; None
                for its own. A store holds memories of one rate.
            cut: Cut documents that are longer than the compressor reads, as research code does,
                instead of splitting them: one chunk each, whose end is not read.
            fallback: A router, or the file that `softrag eval --calibrate` wrote; None for none.
            copy_bias: As in the class.

        Raises:
            CheckpointError: The checkpoint is damaged or of another kind.
            MemoryMismatchError: The store was built, or the fallback calibrated, with another
                model or embedder.
            UnreadableFileError: `fallback` is no file of a router.
            MissingExtraError: `decoder` is "vllm" and vLLM is not installed.
        """
        if fallback is not None and not isinstance(fallback, Router):
            fallback = Router.load(fallback)
        embedder = embedder or default_embedder()
        check_embedder(embedder)  # before the model is loaded, which takes long
        model = SoftRAGModel.from_pretrained(
            checkpoint,
            base_model=base_model,
            load_decoder=load_decoder and decoder == "torch",
            load_compressor=load_compressor,
            device=device,
            dtype=dtype,
            rate=rate,
        )
        # One lock: compressor and decoder may be the same weights.
        lock = threading.Lock()
        if decoder == "torch" and load_decoder:
            decoder = TorchDecoder(model, lock=lock)
        elif isinstance(decoder, str) and load_decoder:
            decoder = VLLMDecoder.open(decoder, checkpoint, base_model=base_model)
            # Of the rate that was asked for.
            decoder.prompts = replace(decoder.prompts, fingerprint=model.fingerprint)
        opened = None
        if not isinstance(store, MemoryStore):
            store = opened = MemoryStore.open(
                store,
                collection=collection,
                prefer_grpc=prefer_grpc,
                fingerprint=model.fingerprint,
                embedder=embedder.name,
                dimension=embedder.dimension,
                codec=codec,
            )
        try:
            return cls(
                store=store,
                embedder=embedder,
                compressor=Compressor(model, cut=cut, lock=lock) if load_compressor else None,
                decoder=None if isinstance(decoder, str) else decoder,
                chunk_tokens=chunk_tokens,
                fallback=fallback,
                copy_bias=copy_bias,
            )
        except Exception:
            if opened is not None:
                opened.close()  # else a second try would find it open
            raise

    # Documents

    def add(
        self,
        documents: Iterable[Document | str],
        *,
        show_progress: bool = False,
        batch_size: int = 64,
    ) -> AddReport:
        """Split, compress and store documents; what the store has already is not made again.

        A document replaces what is stored under its source: chunks that are no longer in it are
        deleted, after the new ones are stored. Stopped at any point, nothing stored is lost, and
        calling again continues.

        Args:
            documents: Documents, or texts without a source. Read one by one.
            show_progress: Show a progress bar.
            batch_size: Chunks per stored batch.
        """
        if isinstance(documents, str | Document) or not isinstance(documents, Iterable):
            documents = [documents]
        started = perf_counter()
        indexer = self._indexer()
        tally = indexer.run(documents, batch_size=batch_size, show_progress=show_progress)
        report = AddReport(
            documents=tally.documents,
            chunks_added=tally.added,
            chunks_unchanged=tally.unchanged,
            chunks_deleted=delete_gone(self.store, tally),
            seconds=perf_counter() - started,
            errors=tally.errors,
        )
        logger.info("added %d chunks of %d documents", report.chunks_added, report.documents)
        return report

    def split(self, document: Document) -> list[Chunk]:
        """Split a document into the chunks that `add` stores.

        Raises:
            EmptyDocumentError: The document has no text.
        """
        return self._indexer().split(document)

    def delete(self, ids: Sequence[str]) -> int:
        """Delete chunks by id and return how many there were."""
        return self.store.delete(ids)

    def delete_source(self, source: str) -> int:
        """Delete all chunks of a source and return how many there were."""
        return self.store.delete_source(source)

    def resolve(self, keys: Sequence[str]) -> list[Memory]:
        """Return memories by key (`softrag.find_handles`), from `cache` or else the store.

        Raises:
            UnknownHandleError: A key is in neither.
        """
        return self.cache.resolve(keys, self.store)

    # Questions

    def retrieve(self, question: str, k: int = 5, where: Where = None) -> list[Hit]:
        """Return the `k` chunks nearest to a question, best first, with their memories.

        Args:
            question: What to look for.
            k: How many; fewer come back from a smaller store.
            where: Metadata that chunks must have: a value, or a list of allowed ones; or a
                Qdrant filter.

        Raises:
            EmptyStoreError: The store is empty.
        """
        check_count("k", k)
        return self._search(question, k, where, with_memories=True)

    def ask(
        self,
        question: str,
        *,
        k: int = 5,
        candidates: int | None = None,
        mode: Mode = "memory",
        max_new_tokens: int = 128,
        stop: Sequence[str] | None = None,
        where: Where = None,
        temperature: float = 0.0,
        seed: int | None = None,
    ) -> Answer:
        """Answer a question from the `k` nearest chunks.

        Args:
            question: The question.
            k: How many chunks to read.
            candidates: With a checkpoint that has a rerank head, how many of the nearest chunks to
                choose the `k` most relevant from, where memories are read; None for twice `k`.
            mode: "memory" reads their memories, "mixed" the best one's text and the others'
                memories, "text" their texts, "closed" nothing.
            max_new_tokens: Most tokens of the answer.
            stop: Strings that end the answer.
            where: As in `retrieve`.
            temperature: 0.0 takes the likeliest token; above it tokens are sampled.
            seed: Makes sampling repeatable.

        Raises:
            EmptyStoreError: The store is empty.
            ValueError: `candidates` are fewer than `k`, or the checkpoint has no rerank head.
        """
        decoding = Decoding(max_new_tokens, stop, temperature, seed)
        found = self._find(question, k, candidates, mode, where)
        return self._finish(self._prepare([found], mode, decoding)[0])

    def stream(
        self,
        question: str,
        *,
        k: int = 5,
        candidates: int | None = None,
        mode: Mode = "memory",
        max_new_tokens: int = 128,
        stop: Sequence[str] | None = None,
        where: Where = None,
        temperature: float = 0.0,
        seed: int | None = None,
    ) -> AnswerStream:
        """Answer in pieces of text; arguments and errors as in `ask`."""
        decoding = Decoding(max_new_tokens, stop, temperature, seed)
        found = self._find(question, k, candidates, mode, where)
        return self._start(self._prepare([found], mode, decoding)[0])

    def ask_many(
        self,
        questions: Sequence[str],
        *,
        k: int = 5,
        candidates: int | None = None,
        mode: Mode = "memory",
        max_new_tokens: int = 128,
        stop: Sequence[str] | None = None,
        where: Where = None,
        temperature: float = 0.0,
        seed: int | None = None,
    ) -> list[Answer]:
        """Answer questions together; the answers are those of `ask`, in order.

        Timings of compressing and the total are those of the whole batch.
        """
        check_texts("questions", questions)
        decoding = Decoding(max_new_tokens, stop, temperature, seed)
        found = [self._find(question, k, candidates, mode, where) for question in questions]
        prepared = self._prepare(found, mode, decoding)
        return answer_all(prepared, self._need_decoder().generate, self.fallback)

    def answer_from(
        self,
        question: str,
        sources: Sequence[Source],
        *,
        mode: Mode = "memory",
        max_new_tokens: int = 128,
        stop: Sequence[str] | None = None,
        temperature: float = 0.0,
        seed: int | None = None,
    ) -> Answer:
        """Answer from given chunks instead of a search; other arguments as in `ask`.

        Args:
            question: The question.
            sources: Hits, memories or texts, best first. Memories that are missing are made.
            mode: As in `ask`.
            max_new_tokens: As in `ask`.
            stop: As in `ask`.
            temperature: As in `ask`.
            seed: As in `ask`.

        Raises:
            MemoryMismatchError: A memory was made by another model.
        """
        decoding = Decoding(max_new_tokens, stop, temperature, seed)
        found = Asked(question, sources, perf_counter())
        return self._finish(self._prepare([found], mode, decoding)[0])

    def stream_from(
        self,
        question: str,
        sources: Sequence[Source],
        *,
        mode: Mode = "memory",
        max_new_tokens: int = 128,
        stop: Sequence[str] | None = None,
        temperature: float = 0.0,
        seed: int | None = None,
    ) -> AnswerStream:
        """Answer from given chunks in pieces of text; arguments and errors as in `answer_from`."""
        decoding = Decoding(max_new_tokens, stop, temperature, seed)
        found = Asked(question, sources, perf_counter())
        return self._start(self._prepare([found], mode, decoding)[0])

    # Sync is written once; the twins keep its signatures.
    aask = async_twin(ask)
    aask_many = async_twin(ask_many)
    aanswer_from = async_twin(answer_from)
    aretrieve = async_twin(retrieve)
    aadd = async_twin(add)
    adelete = async_twin(delete)
    adelete_source = async_twin(delete_source)
    astream = async_stream_twin(stream)
    astream_from = async_stream_twin(stream_from)

    # Ends

    def close(self) -> None:
        """Finish what is running and close the store."""
        self.threads.shutdown()
        if self._batcher is not None:
            self._batcher.close()
        if self.decoder is not None:
            self.decoder.close()
        self.store.close()

    def __enter__(self) -> SoftRAG:
        """Return itself."""
        return self

    def __exit__(self, *error: object) -> None:
        """Close the store."""
        self.close()

    # Steps

    def _search(self, question: str, k: int, where: Where, *, with_memories: bool) -> list[Hit]:
        check_question(question)
        embedding = self.embedder.embed_query(question)
        hits = self.store.search(embedding, k, where=where, with_memories=with_memories)
        if not hits and not self.store.count():
            raise EmptyStoreError(
                "The store is empty, so there is nothing to answer from. Add documents first "
                "(SoftRAG.add, or `softrag index PATH`), or ask in mode 'closed'."
            )
        return hits

    def _find(
        self, question: str, k: int, candidates: int | None, mode: Mode, where: Where
    ) -> Asked:
        check_mode(mode)
        check_count("k", k)
        if candidates is not None:
            check_count("candidates", candidates)
        reranks = self.compressor is not None and self.compressor.reranks
        if candidates is not None and (candidates < k or not reranks):
            raise ValueError(
                f"candidates must be at least k ({k}), found {candidates}."
                if reranks
                else "This checkpoint has no rerank head to choose from candidates with: leave "
                "candidates out, or fine-tune with query_dependent=true rerank=true."
            )
        started = perf_counter()
        if mode == "closed":
            return Asked(question, [], started)
        # Memories for a question are made when it is asked; text needs none.
        stored = reads_memories(mode) and not (self.compressor and self.compressor.query_dependent)
        keep = k if reranks and reads_memories(mode) else None
        found = k if keep is None else candidates or 2 * k
        hits = self._search(question, found, where, with_memories=stored)
        return Asked(question, hits, started, perf_counter() - started, keep)

    def _prepare(self, found: Sequence[Asked], mode: Mode, decoding: Decoding) -> list[Prepared]:
        decoding = decoding._replace(copy_bias=self.copy_bias)
        if self.fallback is not None and mode == "memory":
            decoding = decoding._replace(
                with_state=self.fallback.with_state, lookahead=self.fallback.lookahead
            )
        return prepare(
            found,
            mode=mode,
            decoding=decoding,
            decoder=self._need_decoder(),
            compressor=self.compressor,
        )

    def _finish(self, prepared: Prepared) -> Answer:
        return answer_all([prepared], self._generate, self.fallback)[0]

    def _start(self, prepared: Prepared) -> AnswerStream:
        pieces = stream_answer(prepared, self._need_decoder(), self._generate, self.fallback)
        return AnswerStream(pieces, prepared.hits)

    def _generate(self, requests: Sequence[DecodeRequest]) -> list[DecodeResult]:
        """Answer requests together with those of other threads."""
        if self._batcher is None:
            return self._need_decoder().generate(requests)
        return [self._batcher(request) for request in requests]

    def _indexer(self) -> Indexer:
        return Indexer(
            store=self.store,
            embedder=self.embedder,
            compressor=self._need_compressor("add documents"),
            chunk_tokens=self.chunk_tokens,
        )

    def _need_compressor(self, purpose: str) -> Compressor:
        if self.compressor is None:
            raise ValueError(f"To {purpose}, load with load_compressor=True.")
        return self.compressor

    def _need_decoder(self) -> Decoder:
        if self.decoder is None:
            raise ValueError("To answer questions, load with load_decoder=True.")
        return self.decoder
