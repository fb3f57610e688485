"""From documents to answers: one engine with a store, beside a loop over Hugging Face generate."""

from __future__ import annotations

import statistics
from time import perf_counter

from softrag.answer import Mode
from softrag.bench.decode import generate_naively, prompt_inputs
from softrag.bench.measure import Recorder, peak_memory, synchronize
from softrag.bench.presets import random_texts
from softrag.compressor import Compressor
from softrag.decoder import DecodeRequest, TorchDecoder
from softrag.documents import Document, Hit
from softrag.embedder import Embedder
from softrag.engine import SoftRAG
from softrag.memory import Memory
from softrag.model import SoftRAGModel
from softrag.store import MemoryStore

TOP_K = 5
"""Documents a question is answered from."""


def bench_end_to_end(
    model: SoftRAGModel,
    recorder: Recorder,
    embedder: Embedder,
    *,
    chunks: int = 200,
    questions: int = 64,
    new_tokens: int = 64,
) -> None:
    """Measure indexing, single questions, many questions at once, and the naive loop over them.

    Args:
        model: Compressor and decoder; its adapters are merged on the way.
        recorder: Takes the results.
        embedder: Of the store.
        chunks: Documents of 128 tokens to index.
        questions: How many are asked at once.
        new_tokens: Most tokens of an answer.
    """
    assert model.compressor_tokenizer is not None
    assert model.decoder_tokenizer is not None
    store = MemoryStore.open(
        ":memory:", fingerprint=model.fingerprint, embedder=embedder.name,
        dimension=embedder.dimension,
    )  # fmt: skip
    asked = random_texts(model.decoder_tokenizer, questions, 12, seed=recorder.seed)
    texts = random_texts(model.compressor_tokenizer, chunks, 120, seed=recorder.seed)
    with SoftRAG(store=store, embedder=embedder, compressor=Compressor(model)) as indexing:
        started = perf_counter()
        report = indexing.add(Document(text=text, source=str(n)) for n, text in enumerate(texts))
        recorder.add("index", report.chunks_added / (perf_counter() - started), "chunks/s")
        found = [indexing.retrieve(question, TOP_K) for question in asked]
        # Before a decoder merges the adapters.
        naive = _answer_naively(model, recorder, asked, found, new_tokens)
        engine = SoftRAG(
            store=store, embedder=embedder, compressor=indexing.compressor,
            decoder=TorchDecoder(model),
        )  # fmt: skip
        modes: tuple[Mode, ...] = ("memory", "text")
        for mode in modes:
            _answer(engine, recorder, asked, mode, new_tokens, naive[mode])


def _answer_naively(
    model: SoftRAGModel,
    recorder: Recorder,
    questions: list[str],
    found: list[list[Hit]],
    new_tokens: int,
) -> dict[str, float]:
    """Return seconds per question of a loop, by mode; measured on eight of them at most."""
    seconds = {}
    for mode in ("memory", "text"):
        times = []
        for number in range(min(9, len(questions))):
            documents: list[Memory | str] = [
                hit.memory if mode == "memory" and hit.memory is not None else hit.text
                for hit in found[number]
            ]
            request = DecodeRequest(question=questions[number], documents=documents)
            started = perf_counter()
            generate_naively(model, prompt_inputs(model, request), new_tokens)
            synchronize(recorder.device)
            times.append(perf_counter() - started)
        seconds[mode] = statistics.mean(times[1:] or times)
        recorder.add(f"naive loop, {mode}: answers", 1 / seconds[mode], "answers/s")
    return seconds


def _answer(
    engine: SoftRAG,
    recorder: Recorder,
    questions: list[str],
    mode: Mode,
    new_tokens: int,
    naive: float,
) -> None:
    for question in questions[:2]:
        engine.ask(question, k=TOP_K, mode=mode, max_new_tokens=new_tokens)
    alone = [
        engine.ask(question, k=TOP_K, mode=mode, max_new_tokens=new_tokens)
        for question in questions[:8]
    ]
    firsts = [answer.timings.first_token_s for answer in alone]
    totals = [answer.timings.total_s for answer in alone]
    recorder.add(f"ask, {mode}: first token", statistics.median(firsts), "s")
    recorder.add(f"ask, {mode}: whole answer", statistics.median(totals), "s")
    with peak_memory(recorder.device) as peak:
        started = perf_counter()
        engine.ask_many(questions, k=TOP_K, mode=mode, max_new_tokens=new_tokens)
        seconds = perf_counter() - started
    name = f"ask_many, {mode}, {len(questions)} questions"
    recorder.add(f"{name}: answers", len(questions) / seconds, "answers/s")
    recorder.add(f"{name}: over the naive loop", naive * len(questions) / seconds, "times")
    if peak():
        recorder.add(f"{name}: peak GPU memory", peak() / 2**30, "GiB")
