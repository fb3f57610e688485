"""What SoftRAG promises: documents in, answers out, nothing lost and nothing mixed up."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from softrag.answer import AnswerStream
from softrag.asynchronous import AsyncAnswerStream
from softrag.batching import MicroBatcher
from softrag.compressor import Compressor
from softrag.decoder import DecodeRequest, TorchDecoder
from softrag.documents import Document, document_text
from softrag.engine import SoftRAG
from softrag.errors import (
    EmptyDocumentError,
    MemoryMismatchError,
    NonFiniteMemoryError,
    StoreError,
)
from softrag.model import Compressed
from softrag.store import MemoryStore
from tests.checkpoints import build_checkpoint, build_model
from tests.embedders import HashingEmbedder
from tests.families import SENTENCES

DOCUMENTS = [
    Document(text=text, source=f"notes/{number}.txt", title=f"Note {number}")
    for number, text in enumerate(SENTENCES)
]
QUESTION = "Who wrote Hamlet and Macbeth?"


def open_engine(store=":memory:", **options) -> SoftRAG:
    return SoftRAG.from_pretrained(
        build_checkpoint(), store=store, embedder=HashingEmbedder(), device="cpu", **options
    )


@pytest.fixture(scope="module")
def engine():
    with open_engine() as engine:
        engine.add(DOCUMENTS)
        yield engine


@pytest.fixture
def empty_engine():
    with open_engine() as engine:
        yield engine


# Asking


def test_an_answer_comes_with_sources_usage_and_timings(engine):
    answer = engine.ask(QUESTION, k=3, max_new_tokens=8)

    assert answer.sources[0].source == "notes/2.txt"
    assert [hit.score for hit in answer.sources] == sorted(
        (hit.score for hit in answer.sources), reverse=True
    )
    assert len(answer.sources) == 3
    soft = sum(len(hit.memory) for hit in answer.sources)
    texts = [document_text(hit.title, hit.text) for hit in answer.sources]
    assert answer.usage.soft_tokens == soft
    assert answer.usage.text_prompt_tokens == engine.decoder.prompt_tokens(QUESTION, texts)
    assert answer.usage.prompt_tokens < answer.usage.text_prompt_tokens
    assert 1 <= answer.usage.completion_tokens <= 8
    timings = answer.timings
    assert timings.retrieve_s > 0
    assert timings.total_s >= timings.retrieve_s + timings.first_token_s


def test_the_three_modes_read_memories_texts_and_nothing(engine):
    memory, text, closed = (
        engine.ask(QUESTION, k=2, mode=mode, max_new_tokens=4)
        for mode in ("memory", "text", "closed")
    )

    assert [hit.id for hit in text.sources] == [hit.id for hit in memory.sources]
    assert text.usage.soft_tokens == closed.usage.soft_tokens == 0
    assert text.usage.prompt_tokens == text.usage.text_prompt_tokens
    assert memory.usage.text_prompt_tokens == text.usage.prompt_tokens
    assert closed.sources == []
    assert closed.usage.prompt_tokens < memory.usage.prompt_tokens < text.usage.prompt_tokens
    with pytest.raises(ValueError, match="mode must be one of memory, mixed, text, closed"):
        engine.ask(QUESTION, mode="magic")


def test_mixed_reads_the_text_of_the_best_chunk_and_the_memories_of_the_others(engine):
    first, *others = engine.retrieve(QUESTION, 3)
    documents = (document_text(first.title, first.text), *(hit.memory for hit in others))
    request = DecodeRequest(question=QUESTION, documents=documents, max_new_tokens=6)
    (expected,) = engine.decoder.generate([request])

    answer = engine.ask(QUESTION, k=3, mode="mixed", max_new_tokens=6)

    assert (answer.text, answer.mode) == (expected.text, "mixed")
    assert [hit.id for hit in answer.sources] == [first.id, *(hit.id for hit in others)]
    assert answer.usage.prompt_tokens == engine.decoder.prompt_tokens(QUESTION, documents)
    assert answer.usage.soft_tokens == sum(len(hit.memory) for hit in others)
    memory, text = (
        engine.ask(QUESTION, k=3, mode=mode, max_new_tokens=1).usage for mode in ("memory", "text")
    )
    assert memory.prompt_tokens < answer.usage.prompt_tokens < text.prompt_tokens
    assert answer.usage.text_prompt_tokens == text.prompt_tokens
    (many,) = engine.ask_many([QUESTION], k=3, mode="mixed", max_new_tokens=6)
    assert many.text == "".join(engine.stream(QUESTION, k=3, mode="mixed", max_new_tokens=6))
    assert many.text == answer.text
    assert engine.answer_from(QUESTION, [], mode="mixed", max_new_tokens=1).sources == []
    with pytest.raises(ValueError, match="came without its text"):
        engine.answer_from(QUESTION, [replace(first.memory, text=None)], mode="mixed")


def test_mixed_makes_no_memory_of_what_it_reads_as_text(engine, monkeypatch):
    compressed = []
    compress = engine.compressor.compress

    def noted(documents, questions=None):
        compressed.extend(documents)
        return compress(documents, questions)

    monkeypatch.setattr(engine.compressor, "compress", noted)
    texts = SENTENCES[:3]

    answer = engine.answer_from(QUESTION, texts, mode="mixed", max_new_tokens=2)

    assert compressed == texts[1:]
    assert answer.timings.compress_s > 0
    engine.answer_from(QUESTION, texts[:1], mode="mixed", max_new_tokens=2)
    assert compressed == texts[1:]


def test_a_stream_is_the_answer_in_pieces(engine):
    expected = engine.ask(QUESTION, max_new_tokens=12)

    stream = engine.stream(QUESTION, max_new_tokens=12)
    assert isinstance(stream, AnswerStream)
    assert [hit.id for hit in stream.sources] == [hit.id for hit in expected.sources]
    with pytest.raises(RuntimeError, match="read the stream to its end"):
        _ = stream.answer
    text = "".join(stream)

    assert text == expected.text == stream.answer.text
    assert stream.answer.usage == expected.usage


def test_leaving_a_stream_early_stops_it(engine):
    with engine.stream(QUESTION, max_new_tokens=200) as stream:
        next(stream)

    assert list(stream) == []
    with pytest.raises(RuntimeError):
        _ = stream.answer


def test_many_questions_get_the_answers_of_one(engine):
    questions = [QUESTION, "Where is Paris?", "Where does water boil?"]

    together = engine.ask_many(questions, k=2, max_new_tokens=6)

    alone = [engine.ask(question, k=2, max_new_tokens=6) for question in questions]
    assert [answer.text for answer in together] == [answer.text for answer in alone]
    assert [answer.usage for answer in together] == [answer.usage for answer in alone]


def test_questions_asked_at_once_are_decoded_together():
    with open_engine() as engine:
        engine.add(DOCUMENTS)
        expected = engine.ask(QUESTION, max_new_tokens=6).text
        sizes = []
        generate = engine.decoder.generate

        def run(requests):
            sizes.append(len(requests))
            deadline = time.monotonic() + 20
            while sum(sizes) + len(batcher._waiting) < 8 and time.monotonic() < deadline:
                time.sleep(0.001)
            return generate(requests)

        engine._batcher = batcher = MicroBatcher(run)

        async def ask_all():
            return await asyncio.gather(
                *(engine.aask(QUESTION, max_new_tokens=6) for _ in range(8))
            )

        answers = asyncio.run(ask_all())

    assert {answer.text for answer in answers} == {expected}
    assert sum(sizes) == 8
    assert len(sizes) <= 2


async def test_the_async_twins_answer_the_same(engine):
    expected = engine.ask(QUESTION, max_new_tokens=6).text

    assert (await engine.aask(QUESTION, max_new_tokens=6)).text == expected
    many = await engine.aask_many([QUESTION, QUESTION], max_new_tokens=6)
    assert [answer.text for answer in many] == [expected] * 2
    stream = engine.astream(QUESTION, max_new_tokens=6)
    assert isinstance(stream, AsyncAnswerStream)
    assert "".join([piece async for piece in stream]) == expected == stream.answer.text
    async with engine.astream(QUESTION, max_new_tokens=200) as early:
        assert await anext(early)


def test_streams_and_questions_share_the_model(engine):
    expected = engine.ask(QUESTION, max_new_tokens=10).text
    texts = []

    def ask():
        texts.append(engine.ask(QUESTION, max_new_tokens=10).text)

    stream = engine.stream(QUESTION, max_new_tokens=10)
    pieces = [next(stream)]
    # The stream is half read: it holds nothing that others wait for.
    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    pieces += stream

    assert texts == [expected] * 4
    assert "".join(pieces) == expected


def test_one_bad_question_fails_alone(engine):
    results = {}

    def ask(question):
        try:
            results[question] = engine.ask(question, mode="closed", max_new_tokens=4).text
        except ValueError as error:
            results[question] = str(error)

    questions = ["Why?", "Too long " * 2000, "How?"]
    threads = [threading.Thread(target=ask, args=(question,)) for question in questions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)

    assert "the decoder reads 2048" in results[questions[1]]
    assert results["Why?"] == engine.ask("Why?", mode="closed", max_new_tokens=4).text


def test_more_chunks_than_the_store_holds_are_all_of_them(engine):
    assert len(engine.ask(QUESTION, k=100, max_new_tokens=1).sources) == len(DOCUMENTS)


def test_an_empty_store_is_an_error_that_names_the_fix(empty_engine):
    with pytest.raises(StoreError, match=r"store is empty.*softrag index PATH"):
        empty_engine.ask(QUESTION)
    with pytest.raises(StoreError):
        empty_engine.stream(QUESTION)
    assert empty_engine.ask(QUESTION, mode="closed", max_new_tokens=2).sources == []


@pytest.mark.parametrize(
    ("options", "message"), [({"k": 0}, "k must be"), ({"stop": [""]}, "stop")]
)
def test_senseless_arguments_are_refused(engine, options, message):
    with pytest.raises(ValueError, match=message):
        engine.ask(QUESTION, **options)


def test_a_blank_question_is_refused(engine):
    for mode in ("memory", "closed"):
        with pytest.raises(ValueError, match="question is blank"):
            engine.ask(" \n", mode=mode)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda engine: engine.ask(["Why?"]), "must be a string, found ['Why?']. Ask several"),
        (lambda engine: engine.ask(None, mode="closed"), "must be a string, found None"),
        (lambda engine: engine.ask_many("Why?"), "questions must be a list, found 'Why?'"),
        (lambda engine: engine.ask(QUESTION, where="lang=en"), "where must be a mapping"),
        (lambda engine: engine.add([{"text": "Rome"}]), "Expected a softrag.Document or a text"),
        (
            lambda engine: Document(text=b"Rome"),
            "text must be a string, found b'Rome'",
        ),
        (lambda engine: Document(text="a", source=Path("a.txt")), "source must be a string"),
        (lambda engine: Document(text="a", metadata=None), "metadata must be a mapping"),
        (lambda engine: MemoryStore.open(None), "A store is a folder, a Qdrant URL"),
        (lambda engine: engine.retrieve(QUESTION, k=None), "k must be a whole number, found None"),
        (lambda engine: engine.add(Path("a.txt")), "Expected a softrag.Document or a text, found"),
        (lambda engine: engine.split("Rome"), "Expected a softrag.Document or a text"),
        (lambda engine: engine.add("Rome", batch_size=2.5), "batch_size must be a whole number"),
        (lambda engine: Document(text="a", metadata={"a": b"b"}), "found {'a': b'b'} (Object of"),
        (
            lambda engine: engine.answer_from(QUESTION, "Rome"),
            "sources must be a list, found 'Rome'",
        ),
        (lambda engine: engine.answer_from(QUESTION, iter("Rome")), "make a list of an iterator"),
        (
            lambda engine: engine.answer_from(QUESTION, [Document(text="Rome")]),
            "sources[0] must be of type str or Hit or Memory, found Document(text='Rome'",
        ),
        (lambda engine: engine.compressor.compress(["Rome", None]), "documents[1] must be of type"),
        (
            lambda engine: engine.ask(QUESTION, candidates=6.0),
            "candidates must be a whole number, found 6.0. Give an int.",
        ),
    ],
)
def test_arguments_of_another_kind_are_named(engine, call, message):
    with pytest.raises(TypeError, match=re.escape(message)):
        call(engine)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": "3"}, "k must be a whole number, found '3'. Give an int."),
        ({"k": 2.5, "mode": "closed"}, "k must be a whole number, found 2.5. Give an int."),
        (
            {"max_new_tokens": 2.5},
            "max_new_tokens must be a whole number, found 2.5. Give an int.",
        ),
        ({"k": True}, "k must be a whole number, found True. Give an int."),
        ({"temperature": "0.5"}, "temperature must be a number, found '0.5'. Give a float."),
        ({"temperature": None}, "temperature must be a number, found None. Give a float."),
        ({"seed": 1.5}, "seed must be a whole number, found 1.5. Give an int."),
        ({"stop": 5}, "stop must be a list, found 5. Put one in []; make a list of an iterator."),
        (
            {"stop": "x"},
            "stop must be a list, found 'x'. Put one in []; make a list of an iterator.",
        ),
        ({"stop": ["a", 5]}, "stop[1] must be of type str, found 5."),
    ],
)
@pytest.mark.parametrize(
    "ask",
    [
        SoftRAG.ask,
        SoftRAG.stream,
        lambda engine, question, **options: engine.ask_many([question], **options),
    ],
)
def test_every_way_to_ask_names_what_is_of_another_kind(engine, ask, options, message):
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        ask(engine, QUESTION, **options)


def test_numbers_may_be_numpys(engine):
    plain = engine.ask(QUESTION, k=2, max_new_tokens=2, temperature=0.5, seed=3)

    numpys = engine.ask(
        QUESTION,
        k=np.int64(2),
        max_new_tokens=np.int32(2),
        temperature=np.float32(0.5),
        seed=np.int64(3),
    )

    assert (numpys.text, len(numpys.sources)) == (plain.text, 2)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda engine, text: engine.ask(text), "The question"),
        (lambda engine, text: engine.retrieve(text), "The question"),
        (lambda engine, text: engine.answer_from(QUESTION, [text]), r"sources\[0\]"),
        (lambda engine, text: engine.compressor.compress([text]), r"documents\[0\]"),
    ],
)
def test_half_a_surrogate_pair_is_named(engine, call, name):
    with pytest.raises(
        ValueError, match=rf"^{name} is no valid Unicode: .* '\\ud83d', at character 2"
    ):
        call(engine, "a \ud83d")


class WordVectors:
    """Has what LangChain asks of an embedder, and no name or dimension."""

    embed_documents = HashingEmbedder.embed_documents
    embed_query = HashingEmbedder.embed_query


@pytest.mark.parametrize(
    ("embedder", "message"),
    [
        ("all-MiniLM-L6-v2", "found 'all-MiniLM-L6-v2' without name, dimension, embed_documents, "),
        (WordVectors(), "WordVectors object at 0x"),
        (WordVectors(), " without name, dimension. Wrap a model of another library"),
        (HashingEmbedder, "found the class HashingEmbedder. Make one: HashingEmbedder(...)"),
    ],
)
def test_an_embedder_of_another_kind_is_named_before_a_model_is_loaded(embedder, message, engine):
    with pytest.raises(TypeError, match=re.escape(message)):
        SoftRAG.from_pretrained("no such checkpoint", embedder=embedder)
    with pytest.raises(TypeError, match=re.escape(message)):
        SoftRAG(store=engine.store, embedder=embedder)


def test_filters_choose_by_metadata(empty_engine):
    empty_engine.add(
        Document(text=text, source=str(n), metadata={"even": n % 2 == 0, "n": n})
        for n, text in enumerate(SENTENCES)
    )

    hits = empty_engine.retrieve(QUESTION, k=10, where={"even": True})
    assert {hit.metadata["n"] for hit in hits} == {0, 2, 4, 6}
    answer = empty_engine.ask(QUESTION, k=10, where={"n": [1, 3]}, max_new_tokens=1)
    assert {hit.metadata["n"] for hit in answer.sources} == {1, 3}
    assert empty_engine.ask(QUESTION, where={"n": 99}, max_new_tokens=1).sources == []


def test_memory_tokens_and_handles_in_documents_and_questions_are_text(empty_engine):
    key = "0123456789abcdef" * 2
    text = f"The <MEM> token and <|softmem:{key}|> are written here."
    empty_engine.add([Document(text=text, source="a")])

    answer = empty_engine.ask(f"What is <MEM><MEM> or <|softmem:{key}|>?", max_new_tokens=4)

    (hit,) = answer.sources
    assert hit.text == text
    assert answer.usage.soft_tokens == len(hit.memory)


# Answering from what is given


def test_answering_from_hits_is_asking(engine):
    hits = engine.retrieve(QUESTION, 3)
    expected = engine.ask(QUESTION, k=3, max_new_tokens=6)

    assert engine.answer_from(QUESTION, hits, max_new_tokens=6).text == expected.text
    assert "".join(engine.stream_from(QUESTION, hits, max_new_tokens=6)) == expected.text
    assert engine.answer_from(QUESTION, [], max_new_tokens=6).usage.soft_tokens == 0


@pytest.mark.parametrize("mode", ["memory", "mixed", "text"])
def test_answering_from_memories_is_answering_from_hits_as_long_as_their_texts_are_known(
    engine, mode
):
    hits = engine.retrieve(QUESTION, 3)
    expected = engine.answer_from(QUESTION, hits, mode=mode, max_new_tokens=6)
    memories = [hit.memory for hit in hits]

    answer = engine.answer_from(QUESTION, memories, mode=mode, max_new_tokens=6)

    assert answer.text == expected.text
    assert answer.usage == expected.usage
    assert answer.sources == []


def test_memories_without_their_texts_are_read_and_their_texts_are_not_counted(engine):
    hits = engine.retrieve(QUESTION, 3)
    expected = engine.answer_from(QUESTION, hits, max_new_tokens=6)
    memories = [replace(hit.memory, text=None) for hit in hits]

    answer = engine.answer_from(QUESTION, memories, max_new_tokens=6)

    assert answer.text == expected.text
    assert answer.usage.text_prompt_tokens is None
    with pytest.raises(ValueError, match=rf"Memory {memories[0].key} came without its text"):
        engine.answer_from(QUESTION, memories, mode="text")


def test_a_copy_bias_gives_answers_in_the_words_of_what_was_read(tmp_path):
    with open_engine(tmp_path) as engine:
        engine.add(DOCUMENTS)
        plain = {
            mode: engine.ask(QUESTION, k=2, mode=mode, max_new_tokens=8).text
            for mode in ("memory", "text", "closed")
        }
    with open_engine(tmp_path, copy_bias=100.0) as engine:
        hits = engine.retrieve(QUESTION, 2)
        copied = engine.ask(QUESTION, k=2, max_new_tokens=8).text

        texts = [document_text(hit.title, hit.text) for hit in hits]
        words = set(re.findall(r"\w+", " ".join(texts)))
        *whole, _ = re.findall(r"\w+", copied)  # the last may be cut off
        assert copied != plain["memory"]
        assert len(whole) > 1
        assert set(whole) <= words
        # Memories bring their texts along, from the store and from the compressor.
        memories = [hit.memory for hit in hits]
        assert [memory.text for memory in memories] == texts
        assert [each.text for each in engine.resolve([m.key for m in memories])] == texts
        for sources in (hits, memories, texts, engine.compressor.compress(texts)):
            assert engine.answer_from(QUESTION, sources, max_new_tokens=8).text == copied
        assert engine.ask_many([QUESTION], k=2, max_new_tokens=8)[0].text == copied
        assert "".join(engine.stream(QUESTION, k=2, max_new_tokens=8)) == copied
        for mode in ("text", "closed"):
            assert engine.ask(QUESTION, k=2, mode=mode, max_new_tokens=8).text == plain[mode]
        assert engine.ask(QUESTION, k=2, mode="mixed", max_new_tokens=8).text
        unknown = [replace(memory, text=None) for memory in memories]
        assert engine.answer_from(QUESTION, unknown, max_new_tokens=8).text == plain["memory"]


def test_answers_are_biased_as_the_checkpoint_says_unless_the_user_says_otherwise(tmp_path):
    folder = tmp_path / "checkpoint"
    shutil.copytree(build_checkpoint(), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"copy_bias": 100.0}))

    def answer(checkpoint, **options):
        with SoftRAG.from_pretrained(
            checkpoint, embedder=HashingEmbedder(), device="cpu", **options
        ) as engine:
            engine.add(DOCUMENTS)
            return engine.copy_bias, engine.ask(QUESTION, k=2, max_new_tokens=8).text

    assert answer(folder) == answer(build_checkpoint(), copy_bias=100.0)
    assert answer(folder, copy_bias=0.0) == answer(build_checkpoint())
    assert answer(folder) != answer(folder, copy_bias=0.0)
    with SoftRAG.from_pretrained(folder, embedder=HashingEmbedder(), load_decoder=False) as engine:
        assert engine.copy_bias == 0.0


@pytest.mark.parametrize("bias", [-1.0, 1e3, float("nan"), "4", True])
def test_a_senseless_copy_bias_is_refused(bias):
    with pytest.raises((TypeError, ValueError), match="copy_bias must be"):
        open_engine(copy_bias=bias)


def test_memories_that_are_missing_are_made(engine):
    hits = engine.retrieve(QUESTION, 3)
    expected = engine.ask(QUESTION, k=3, max_new_tokens=6)

    bare = [replace(hit, memory=None) for hit in hits]
    texts = [document_text(hit.title, hit.text) for hit in hits]

    for sources in (bare, texts):
        answer = engine.answer_from(QUESTION, sources, max_new_tokens=6)
        assert answer.text == expected.text
        assert answer.timings.compress_s > 0


def test_a_long_text_is_compressed_in_pieces_and_nothing_is_dropped(engine):
    text = " ".join(SENTENCES * 5)

    answer = engine.answer_from(QUESTION, [text], max_new_tokens=1)

    tokens = len(engine.compressor.prompt.tokenize(text))
    assert tokens > 64
    assert answer.usage.soft_tokens >= tokens // 4 - 10


def test_memories_of_another_model_are_refused(engine):
    foreign = Compressor(build_model(seed=1)).compress(["Paris."])

    with pytest.raises(MemoryMismatchError):
        engine.answer_from(QUESTION, foreign)


def test_a_source_without_text_is_refused(engine):
    with pytest.raises(EmptyDocumentError):
        engine.answer_from(QUESTION, [" "])


def test_without_a_compressor_stored_memories_still_answer(tmp_path):
    with open_engine(tmp_path) as engine:
        engine.add(DOCUMENTS)
        expected = engine.ask(QUESTION, max_new_tokens=6).text

    with open_engine(tmp_path, load_compressor=False) as engine:
        assert engine.ask(QUESTION, max_new_tokens=6).text == expected
        with pytest.raises(ValueError, match="load_compressor=True"):
            engine.answer_from(QUESTION, ["a text"])
        with pytest.raises(ValueError, match="load_compressor=True"):
            engine.add(["a text"])
    with open_engine(tmp_path, load_decoder=False) as engine:
        assert engine.retrieve(QUESTION, 1)
        with pytest.raises(ValueError, match="load_decoder=True"):
            engine.ask(QUESTION)


# Adding


def test_adding_reports_what_it_did(empty_engine):
    report = empty_engine.add(DOCUMENTS)

    assert (report.documents, report.chunks_added, report.chunks_unchanged) == (8, 8, 0)
    assert report.errors == []
    assert empty_engine.store.count() == 8
    (hit,) = empty_engine.retrieve(QUESTION, 1)
    expected = Compressor(empty_engine.compressor.model).compress(
        [document_text(hit.title, hit.text)]
    )[0]
    assert hit.memory.key == expected.key
    torch.testing.assert_close(
        hit.memory.values.float(), expected.values.float(), rtol=0.02, atol=0.01
    )


def test_a_text_or_a_document_may_be_added_alone(empty_engine):
    empty_engine.add("Paris is a city.")
    empty_engine.add(Document(text="Rome is a city."))

    assert empty_engine.store.count() == 2


def test_unchanged_chunks_are_not_compressed_again(empty_engine, monkeypatch):
    empty_engine.add(DOCUMENTS)
    compressed = []
    compress = empty_engine.compressor.compress
    monkeypatch.setattr(
        empty_engine.compressor,
        "compress",
        lambda texts: (compressed.extend(texts), compress(texts))[1],
    )

    changed = [replace(DOCUMENTS[0], text="Something else entirely."), *DOCUMENTS[1:]]
    report = empty_engine.add(changed)

    assert compressed == ["Note 0\nSomething else entirely."]
    assert (report.chunks_added, report.chunks_unchanged, report.chunks_deleted) == (1, 7, 1)
    assert empty_engine.store.count() == 8
    again = empty_engine.add(changed)
    assert (again.chunks_added, again.chunks_unchanged, again.chunks_deleted) == (0, 8, 0)


def test_changed_metadata_is_stored(empty_engine):
    empty_engine.add([replace(DOCUMENTS[0], metadata={"year": 1})])
    report = empty_engine.add([replace(DOCUMENTS[0], metadata={"year": 2})])

    assert report.chunks_added == 1
    assert [hit.metadata for hit in empty_engine.store.scroll()] == [{"year": 2}]


def test_documents_that_share_a_source_replace_it_together(empty_engine):
    pages = [Document(text=text, source="book.pdf") for text in SENTENCES[:3]]

    empty_engine.add(pages)
    report = empty_engine.add(pages[:2])

    assert report.chunks_deleted == 1
    assert {hit.text for hit in empty_engine.store.scroll()} == set(SENTENCES[:2])


def test_empty_documents_are_reported_and_the_rest_is_stored(empty_engine):
    empty_engine.add([Document(text="Old but good.", source="b")])

    report = empty_engine.add(
        [Document(text=" ", source="a"), Document(text="", source="b"), DOCUMENTS[0], ""]
    )

    assert [error.source for error in report.errors] == ["a", "b", None]
    assert "a has no text" in report.errors[0].message
    assert report.documents == 1
    # What was stored of a source that could not be read stays.
    assert empty_engine.store.sources() == {"b": 1, "notes/0.txt": 1}


def test_a_long_document_is_split_and_nothing_is_dropped(empty_engine):
    text = "\n\n".join(SENTENCES * 6)

    report = empty_engine.add([Document(text=text, source="long", title="A long one")])

    hits = sorted(empty_engine.store.scroll(), key=lambda hit: hit.start)
    assert len(hits) > 1
    words = " ".join(hit.text for hit in hits).split()
    # Equal pieces of one source are one chunk, so compare the words, not their number.
    assert set(words) == set(text.split())
    assert report.chunks_added + report.chunks_unchanged >= len(hits)
    tokenize = empty_engine.compressor.prompt.tokenize
    for hit in hits:
        assert hit.title == "A long one"
        assert len(tokenize(document_text(hit.title, hit.text))) <= empty_engine.chunk_tokens


def test_a_title_longer_than_half_a_chunk_is_cut(empty_engine):
    empty_engine.add([Document(text=SENTENCES[0] * 4, source="a", title="word " * 200)])

    tokenize = empty_engine.compressor.prompt.tokenize
    for hit in empty_engine.store.scroll():
        assert hit.title.startswith("word word")
        assert len(tokenize(document_text(hit.title, hit.text))) <= empty_engine.chunk_tokens


def test_chunk_tokens_are_bounded_by_the_compressor():
    with open_engine(chunk_tokens=16) as engine:
        engine.add([Document(text=" ".join(SENTENCES), source="a")])
        assert all(hit.n_tokens <= 16 for hit in engine.store.scroll())
    with pytest.raises(ValueError, match="between 1 and the 64 tokens"):
        open_engine(chunk_tokens=65)


def test_what_fails_to_load_leaves_the_store_closed(tmp_path):
    with pytest.raises(ValueError, match="between 1 and the 64 tokens"):
        open_engine(tmp_path, chunk_tokens=65)
    open_engine(tmp_path).close()


@pytest.mark.parametrize("device", ["gpu", "cuda:99"])
def test_a_device_that_is_not_there_is_refused_with_those_there_are(device):
    with pytest.raises(ValueError, match=rf"'{device}' cannot be used here. Choose one of cpu"):
        SoftRAG.from_pretrained(build_checkpoint(), embedder=HashingEmbedder(), device=device)


def test_what_is_not_finite_is_never_stored(empty_engine, monkeypatch):
    empty_engine.add(DOCUMENTS[:2])
    compress = empty_engine.compressor.model.compress_packed
    monkeypatch.setattr(
        empty_engine.compressor.model,
        "compress_packed",
        lambda ids, packed: Compressed(compress(ids, packed).soft_tokens * float("nan"), None),
    )

    with pytest.raises(NonFiniteMemoryError, match="Note 2"):
        empty_engine.add(DOCUMENTS[2:])

    assert empty_engine.store.count() == 2


def test_what_was_stored_before_an_interruption_stays(empty_engine):
    def interrupted():
        yield from DOCUMENTS[:5]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        empty_engine.add(interrupted(), batch_size=2)

    assert empty_engine.store.count() == 4
    report = empty_engine.add(DOCUMENTS, batch_size=2)
    assert (report.chunks_unchanged, report.chunks_added) == (4, 4)


def test_documents_are_deleted_by_id_and_by_source(empty_engine):
    empty_engine.add(DOCUMENTS)
    hit = empty_engine.retrieve(QUESTION, 1)[0]

    assert empty_engine.delete([hit.id]) == 1
    assert empty_engine.delete_source("notes/0.txt") == 1
    assert empty_engine.delete_source("nowhere") == 0
    assert empty_engine.store.count() == 6


def test_a_store_of_another_model_is_refused(tmp_path):
    with open_engine(tmp_path) as engine:
        engine.add(DOCUMENTS[:1])

    with pytest.raises(MemoryMismatchError):
        SoftRAG.from_pretrained(
            build_checkpoint(seed=1), store=tmp_path, embedder=HashingEmbedder(), device="cpu"
        )
    other = HashingEmbedder()
    other.name = "another"
    with pytest.raises(MemoryMismatchError):
        SoftRAG.from_pretrained(build_checkpoint(), store=tmp_path, embedder=other, device="cpu")


def test_an_open_store_of_another_model_is_refused():
    with MemoryStore.open(
        ":memory:", fingerprint="0" * 32, embedder="hashing-64", dimension=64
    ) as store:
        with pytest.raises(MemoryMismatchError, match="index the documents again into a new store"):
            open_engine(store)


# Query-dependent checkpoints


def test_query_dependent_memories_are_made_for_each_question(tmp_path):
    with SoftRAG.from_pretrained(
        build_checkpoint(query_dependent=True),
        store=tmp_path,
        embedder=HashingEmbedder(),
        device="cpu",
    ) as engine:
        report = engine.add(DOCUMENTS)
        answer = engine.ask(QUESTION, k=2, max_new_tokens=6)

        assert report.chunks_added == 8
        assert all(hit.memory is None for hit in engine.store.scroll())
        assert answer.usage.soft_tokens > 0
        assert answer.timings.compress_s > 0
        assert "".join(engine.stream(QUESTION, k=2, max_new_tokens=6)) == answer.text
        many = engine.ask_many([QUESTION, "Where is Paris?"], k=2, max_new_tokens=6)
        assert many[0].text == answer.text


def test_a_rerank_head_chooses_what_is_read_among_more_candidates():
    with SoftRAG.from_pretrained(
        build_checkpoint(query_dependent=True, rerank=True),
        embedder=HashingEmbedder(),
        device="cpu",
    ) as engine:
        engine.add(DOCUMENTS)
        found = engine.retrieve(QUESTION, k=8)
        memories = engine.compressor.compress(
            [document_text(hit.title, hit.text) for hit in found], [QUESTION] * 8
        )
        relevance = {hit.id: memory.relevance for hit, memory in zip(found, memories, strict=True)}

        def best(candidates: int) -> list[str]:
            return sorted((hit.id for hit in found[:candidates]), key=lambda i: -relevance[i])[:3]

        chosen = engine.ask(QUESTION, k=3, candidates=8, max_new_tokens=4)
        usual = engine.ask(QUESTION, k=3, max_new_tokens=4)

        assert [hit.id for hit in chosen.sources] == best(8) != [hit.id for hit in found[:3]]
        assert [hit.id for hit in usual.sources] == best(6)
        for hit in chosen.sources:
            assert hit.relevance == pytest.approx(relevance[hit.id], rel=1e-3)
        # Fewer soft tokens are read than were made.
        read = [m for hit, m in zip(found, memories, strict=True) if hit.id in best(8)]
        assert chosen.usage.soft_tokens == sum(map(len, read))
        (many,) = engine.ask_many([QUESTION], k=3, candidates=8, max_new_tokens=4)
        stream = engine.stream(QUESTION, k=3, candidates=8, max_new_tokens=4)
        assert many.text == chosen.text == "".join(stream)
        assert [hit.id for hit in stream.sources] == best(8)
        mixed = engine.ask(QUESTION, k=3, candidates=8, mode="mixed", max_new_tokens=4)
        assert [hit.id for hit in mixed.sources] == best(8)
        assert mixed.usage.soft_tokens == chosen.usage.soft_tokens - len(
            next(m for hit, m in zip(found, memories, strict=True) if hit.id == best(8)[0])
        )
        # Given sources keep their order, and text is read as it was found.
        given = engine.answer_from(QUESTION, found[:3], max_new_tokens=4)
        assert [hit.id for hit in given.sources] == [hit.id for hit in found[:3]]
        assert given.sources[0].relevance == pytest.approx(relevance[found[0].id], rel=1e-3)
        text = engine.ask(QUESTION, k=3, mode="text", max_new_tokens=4)
        assert [(hit.id, hit.relevance) for hit in text.sources] == [
            (hit.id, None) for hit in found[:3]
        ]
        with pytest.raises(ValueError, match=r"candidates must be at least k \(3\), found 2"):
            engine.ask(QUESTION, k=3, candidates=2)


def test_candidates_are_refused_without_a_rerank_head(engine):
    with pytest.raises(ValueError, match=r"no rerank head .* rerank=true"):
        engine.ask(QUESTION, candidates=10)
    assert all(hit.relevance is None for hit in engine.ask(QUESTION, max_new_tokens=1).sources)


# Rates


def test_stores_of_different_rates_are_kept_apart(tmp_path):
    checkpoint = tmp_path / "checkpoint"
    build_model(rates=[2, 4, 8]).save_pretrained(checkpoint)

    def at_rate(rate: int | None, **options) -> SoftRAG:
        return SoftRAG.from_pretrained(
            checkpoint,
            store=tmp_path / "store",
            embedder=HashingEmbedder(),
            device="cpu",
            rate=rate,
            **options,
        )

    with at_rate(8) as engine:
        engine.add(DOCUMENTS)
        answer = engine.ask(QUESTION, k=2, max_new_tokens=4)
        tokens = [hit.memory.n_document_tokens for hit in answer.sources]
        assert answer.usage.soft_tokens == sum(-(-length // 8) for length in tokens)
    for other in (None, 4, 2):
        with pytest.raises(MemoryMismatchError, match="at the same rate"):
            at_rate(other)
    with at_rate(8, load_compressor=False) as engine:
        assert engine.ask(QUESTION, k=2, max_new_tokens=4).text == answer.text


# Parts


def test_an_engine_can_be_put_together_by_hand():
    model = build_model()
    embedder = HashingEmbedder()
    store = MemoryStore.open(
        ":memory:", fingerprint=model.fingerprint, embedder=embedder.name, dimension=64
    )
    with SoftRAG(
        store=store,
        embedder=embedder,
        compressor=Compressor(model),
        decoder=TorchDecoder(model),
    ) as engine:
        engine.add(DOCUMENTS)
        assert engine.ask(QUESTION, max_new_tokens=3).sources


def test_a_batch_holds_what_arrives_while_another_runs():
    sizes = []
    gate = threading.Event()

    def run(items):
        sizes.append(len(items))
        if len(sizes) == 1:
            gate.wait(10)
        return [item * 2 for item in items]

    batcher = MicroBatcher(run, window_s=0.0)
    results = {}
    threads = [
        threading.Thread(target=lambda n=n: results.update({n: batcher(n)})) for n in range(6)
    ]
    threads[0].start()
    while not sizes:
        pass
    for thread in threads[1:]:
        thread.start()
    while len(batcher._waiting) < 5:
        pass
    gate.set()
    for thread in threads:
        thread.join()
    batcher.close()

    assert results == {n: 2 * n for n in range(6)}
    assert sizes == [1, 5]


def test_weights_are_loaded_in_the_dtype_asked_for_by_name():
    def dtypes(dtype):
        with open_engine(dtype=dtype) as engine:
            engine.add(DOCUMENTS)
            assert engine.ask(QUESTION, max_new_tokens=4).usage.completion_tokens >= 1
            model = engine.decoder.model
            return model.decoder.dtype, model.compressor.dtype

    assert dtypes("bfloat16") == dtypes(torch.bfloat16) == (torch.bfloat16, torch.bfloat16)
    assert dtypes("float32") == (torch.float32, torch.float32)
    with pytest.raises(ValueError, match="'bf16'; expected auto, float32, bfloat16, float16"):
        dtypes("bf16")
