"""What a comparison promises: the same questions, honest costs, and the same result every time."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from softrag.codec import encode
from softrag.comparison import (
    ChatEndpoint,
    Comparison,
    FolderChunks,
    LoadedModel,
    Row,
    StoredChunks,
    answer_rows,
    calibrate,
    decoder_writer,
    endpoint_writer,
    excerpts,
    fall_back,
    judge_answers,
    retrieve_for,
    summarize,
    write_questions,
    write_report,
)
from softrag.comparison.excerpts import excerpt
from softrag.compressor import Compressor
from softrag.decoder import DecodeResult, TorchDecoder
from softrag.documents import Document
from softrag.engine import SoftRAG
from softrag.errors import EndpointError, MemoryMismatchError, StoreError
from softrag.evaluation import Question, read_questions
from softrag.question_set import nearest_first, texts_of
from softrag.router import Router
from tests.chat_server import serve_chat
from tests.checkpoints import build_checkpoint, build_model
from tests.embedders import HashingEmbedder, NotingEmbedder
from tests.families import SENTENCES


def question(number: int, *texts: str) -> Question:
    documents = tuple(Document(text=text) for text in texts)
    return Question(
        id=f"q{number}",
        question=f"What is said in {number}?",
        answers=("Paris",),
        documents=documents,
        gold=(False,) * len(documents),
        source="a" if number % 2 else "b",
    )


def result(text: str = "", *, logprob: float = -1.0, prompt: int = 10) -> DecodeResult:
    return DecodeResult(
        text=text,
        prompt_tokens=prompt,
        soft_tokens=0,
        completion_tokens=1,
        first_token_s=0.1,
        finish_reason="stop",
        token_logprobs=(logprob,),
    )


def row(mode, right: list[int], *, results=None, **changes) -> Row:
    scores = 100.0 * np.array(right)
    values = {
        "name": mode,
        "model": "",
        "mode": mode,
        "results": results or [result(f"{mode} {place}") for place in range(len(right))],
        "scores": {"f1": scores, "match": scores},
        "compress_s": 0.0,
        "decode_s": 0.5,
        "stored_bytes": 10.0,
    }
    return Row(**values | changes)


@pytest.fixture(scope="module")
def loaded():
    model = build_model()
    return LoadedModel(name="", decoder=TorchDecoder(model), compressor=Compressor(model))


# Rows


def test_every_mode_and_codec_is_a_row_with_its_costs(loaded):
    questions = [question(n, SENTENCES[n], SENTENCES[0]) for n in range(1, 4)]

    rows = list(
        answer_rows(
            questions,
            loaded,
            modes=["closed", "text", "memory"],
            codecs=["bf16", "int4"],
            max_new_tokens=4,
            batch_size=2,
        )
    )

    assert [each.name for each in rows] == ["closed", "text", "memory bf16", "memory int4"]
    closed, text, exact, coarse = rows
    assert closed.prompt_tokens.max() < exact.prompt_tokens.min()
    assert (exact.prompt_tokens < text.prompt_tokens).all()
    assert (exact.prompt_tokens == coarse.prompt_tokens).all()
    # Four distinct documents are stored, however often they are read.
    memories = loaded.compressor.compress(SENTENCES[:4])
    assert closed.stored_bytes == 0
    assert text.stored_bytes == sum(len(each.encode()) for each in SENTENCES[:4]) / 4
    assert exact.stored_bytes == sum(len(encode(each, "bf16")) for each in memories) / 4
    assert coarse.stored_bytes == sum(len(encode(each, "int4")) for each in memories) / 4
    assert text.compress_s == 0 < exact.compress_s
    assert exact.results[0].token_logprobs != coarse.results[0].token_logprobs


def test_mixed_reads_the_first_document_as_text_whatever_is_nearest(loaded):
    near = "What is said in 1? Nothing that is of any use."
    questions = [question(1, SENTENCES[1], near, SENTENCES[0])]

    def tokens(questions: list[Question]) -> float:
        (row,) = answer_rows(questions, loaded, modes=["mixed"], embedder=HashingEmbedder())
        assert row.stored_bytes > sum(map(len, [*SENTENCES[:2], near])) / 3
        return row.prompt_tokens[0]

    def read(text: str, *others: str) -> int:
        memories = loaded.compressor.compress(others)
        return loaded.decoder.prompt_tokens(questions[0].question, [text, *memories])

    given, ranked = tokens(questions), tokens(nearest_first(questions, HashingEmbedder()))
    assert given == read(SENTENCES[1], near, SENTENCES[0])
    assert ranked == read(near, SENTENCES[1], SENTENCES[0])
    assert given != ranked


def test_documents_that_are_ranked_are_found_as_a_store_finds_them_with_their_gold_flags(tmp_path):
    near, nearer = "What is said in Paris?", "What is said in 1?"
    texts = [SENTENCES[1], near, SENTENCES[5], nearer]
    asked = replace(question(1, *texts), gold=(False, True, False, False))
    with SoftRAG.from_pretrained(
        build_checkpoint(), store=tmp_path, embedder=HashingEmbedder(), device="cpu"
    ) as engine:
        engine.add(texts)

    (ranked,) = nearest_first([asked], HashingEmbedder())

    with StoredChunks(tmp_path, HashingEmbedder()) as chunks:
        assert ranked.documents == retrieve_for([asked], chunks, 4)[0].documents
    assert texts_of(ranked)[:2] == [nearer, near]
    assert ranked.gold == (False, True, False, False)
    assert replace(ranked, documents=asked.documents, gold=asked.gold) == asked


def test_only_documents_that_have_an_order_are_embedded_and_each_text_once():
    alone = [question(1, SENTENCES[1]), question(2)]
    several = [question(3, *SENTENCES[2:4]), question(4, *SENTENCES[3:5])]
    embedder = NotingEmbedder()

    assert nearest_first(alone, embedder) == alone
    assert embedder.embedded == []
    assert nearest_first(alone + several, embedder)[:2] == alone
    assert embedder.embedded == [SENTENCES[2:5]]


def test_excerpts_are_the_nearest_sentences_no_longer_than_the_memories(loaded):
    told, near = "The cat sat down.", "What is said in 1? Nothing of use."
    questions = [question(1, f"{told} {near} {told}", *[SENTENCES[0]] * 7)]

    def length(text: str) -> int:
        return len(loaded.compressor.prompt.tokenize(text))

    (cut,) = excerpt(questions, HashingEmbedder(), loaded.compressor)

    soft_tokens = sum(
        loaded.compressor.prompt.render(text).n_memory for text in texts_of(questions[0])
    )
    assert sum(length(text) for text in texts_of(cut)) <= soft_tokens
    (row, memory, text) = answer_rows(
        questions, loaded, modes=["excerpts", "memory", "text"], embedder=HashingEmbedder()
    )
    assert (row.name, row.mode) == ("excerpts", "excerpts")
    read = loaded.decoder.prompt_tokens(questions[0].question, texts_of(cut))
    assert row.prompt_tokens.tolist() == [read]
    assert row.prompt_tokens < text.prompt_tokens
    assert row.stored_bytes == text.stored_bytes
    assert row.compress_s > 0 == text.compress_s
    assert Comparison(questions=questions, rows=[row, memory, text]).text_of(row) is text


def test_an_excerpt_keeps_the_order_of_the_text_and_at_least_one_sentence(loaded, monkeypatch):
    first, last = "What is said in 1?", "What is said in 1 in the end?"
    far = "A sentence about cats that sat down somewhere on a large mat, for a long time."
    questions = [question(1, far, f"{first}\n\n{far}\n\n{last}")]

    def cut(soft_tokens: int) -> list[str]:
        monkeypatch.setattr(excerpts, "_soft_tokens", lambda *_: soft_tokens)
        (each,) = excerpt(questions, HashingEmbedder(), loaded.compressor)
        assert len(each.gold) == len(each.documents)
        return texts_of(each)

    both = len(loaded.compressor.prompt.tokenize(f"{first} {last}"))
    assert cut(both) == [f"{first} {last}"]
    assert cut(1) == [first]
    assert texts_of(questions[0])[0] in cut(1000)


def test_excerpts_without_an_embedder_are_refused(loaded):
    with pytest.raises(ValueError, match="Mode 'excerpts' needs an embedder"):
        next(answer_rows([question(1, SENTENCES[0])], loaded, modes=["excerpts"]))


def test_a_query_dependent_model_stores_nothing(tmp_path):
    model = build_model(query_dependent=True)
    loaded = LoadedModel(name="online", decoder=TorchDecoder(model), compressor=Compressor(model))

    rows = list(
        answer_rows(
            [question(1, SENTENCES[1])],
            loaded,
            modes=["memory"],
            codecs=["bf16", "int8"],
            max_new_tokens=2,
        )
    )

    assert [(each.name, each.stored_bytes) for each in rows] == [("online: memory", 0)]
    assert rows[0].compress_s > 0


def test_differences_are_to_the_text_of_the_same_model():
    text = row("text", [1, 1, 0, 1], name="a: text", model="a")
    memory = row("memory", [1, 0, 0, 0], name="a: memory", model="a")
    other = row("memory", [1, 1, 1, 1], name="b: memory", model="b")
    questions = [question(n) for n in range(4)]
    comparison = Comparison(questions=questions, rows=[text, memory, other])

    assert comparison.interval(text, "f1").mean == 75.0
    assert comparison.against_text(memory, "f1").mean == -50.0
    assert comparison.against_text(text, "f1") is None
    assert comparison.against_text(other, "f1") is None
    assert comparison.lost(memory).tolist() == [1, 3]
    assert comparison.lost(other).tolist() == []
    # A judge, where there is one, decides what is right.
    judged = replace(memory, scores={**memory.scores, "judge": np.array([0.0, 0.0, 0.0, 100.0])})
    assert judged.is_right().tolist() == [False, False, False, True]
    summary = summarize(comparison)
    assert summary["modes"]["a: memory"]["lost"] == {"share": 0.5, "ids": ["q1", "q3"]}
    assert summary["answers"][2]["a: text"] == "text 2"
    assert json.loads(json.dumps(summary)) == summary
    assert summarize(Comparison(questions=questions, rows=[text, memory, other])) == summary


def test_a_fallback_takes_texts_answers_and_pays_for_both():
    sure, doubtful = (
        replace(result(text, logprob=logprob), opening="x")
        for text, logprob in (("sure", -0.1), ("doubtful", -9.0))
    )
    memory = row("memory", [1, 0, 1, 0], results=[sure, doubtful, sure, doubtful])
    text = row("text", [1, 1, 0, 0], results=[result(f"text {n}", prompt=90) for n in range(4)])
    router = Router(
        fingerprint="f",
        threshold=5.0,
        lookahead=1,
        weights=[-1.0, *[0.0] * 8],
        bias=0.0,
        with_state=False,
    )

    routed = fall_back(memory, text, router, [question(n) for n in range(4)])

    assert [each.text for each in routed.results] == ["sure", "text 1", "sure", "text 3"]
    assert routed.scores["f1"].tolist() == [100.0, 100.0, 100.0, 0.0]
    assert routed.prompt_tokens.tolist() == [10, 100, 10, 100]
    assert (routed.text_share, routed.decode_s, routed.stored_bytes) == (0.5, 0.75, 20.0)


# Calibration


def answered(n: int, *, told: bool) -> tuple[list[DecodeResult], np.ndarray, np.ndarray]:
    """Memory fails on a fifth of the questions; its confidence tells which, or tells nothing."""
    generator = np.random.default_rng(0)
    fails = generator.random(n) < 0.2
    results = [
        replace(
            result(logprob=float(-2 * (fail if told else generator.random()) - generator.random())),
            prompt_state=torch.from_numpy(generator.normal(size=5)),
            opening="x",
        )
        for fail in fails
    ]
    return results, 100.0 * ~fails, np.full(n, 100.0)


def of(results: list[DecodeResult]) -> dict:
    """What `calibrate` is told of questions that are all the same."""
    return {
        "questions": ["Who?"] * len(results),
        "texts": [["He."]] * len(results),
        "fingerprint": "f",
    }


def test_a_router_finds_what_confidence_tells(loaded):
    results, memory, text = answered(400, told=True)

    found = calibrate(results, memory=memory, text=text, budget=0.2, **of(results))

    assert found.recovered.mean > 0.9
    assert found.routed.mean == pytest.approx(
        found.memory.mean + found.recovered.mean * (found.text.mean - found.memory.mean)
    )
    assert 0.15 < found.from_text.mean() < 0.25
    scores = [found.router.score(each, "Who?", ["He."]) for each in results]
    assert np.mean([found.router.prefers_text(score) for score in scores]) == pytest.approx(
        0.2, abs=0.01
    )
    shares, quality = found.curve()
    assert (shares[0], shares[-1]) == (0.0, 1.0)
    assert quality[0] == found.memory.mean
    assert quality[-1] == pytest.approx(found.text.mean)


def test_what_a_router_is_worth_is_measured_on_questions_it_has_not_seen():
    # Many features and no signal: a router tested on what it was fitted on would look good.
    results, memory, text = answered(120, told=False)
    noise = np.random.default_rng(1).normal(size=(120, 200))
    results = [
        replace(each, prompt_state=torch.from_numpy(state))
        for each, state in zip(results, noise, strict=True)
    ]

    found = calibrate(results, memory=memory, text=text, budget=0.2, **of(results))

    assert found.recovered.low < 0.2


def test_a_router_finds_what_the_texts_tell():
    results, memory, text = answered(400, told=False)
    results = [
        replace(each, opening="Ada" if right else "Bob")
        for each, right in zip(results, memory, strict=True)
    ]
    options = of(results) | {"texts": [["Ada wrote it."]] * 400}

    found = calibrate(results, memory=memory, text=text, budget=0.2, **options)

    assert found.recovered.mean > 0.8


def test_calibration_is_repeatable_and_needs_questions_to_learn_from():
    results, memory, text = answered(100, told=True)
    options = {"memory": memory, "text": text, "with_state": False, **of(results)}

    assert calibrate(results, **options).router == calibrate(results, **options).router
    assert calibrate(results, **options).router.weights != (
        calibrate(results, **{**options, "text": memory[::-1].copy()}).router.weights
    )
    with pytest.raises(ValueError, match="text answers 0 better than memory"):
        calibrate(results, **{**options, "text": memory})
    with pytest.raises(ValueError, match="budget must be between 0 and 1"):
        calibrate(results, **options, budget=1.0)


# The user's chunks


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    for number, text in enumerate(SENTENCES):
        (folder / f"{number}.txt").write_text(text)
    return folder


def test_a_store_and_its_folder_give_the_same_chunks(tmp_path, folder, loaded):
    store = tmp_path / "store"
    with SoftRAG.from_pretrained(
        build_checkpoint(), store=store, embedder=HashingEmbedder(), codec="int8", device="cpu"
    ) as engine:
        engine.add(
            Document(text=text, source=str(folder / f"{number}.txt"), title=str(number))
            for number, text in enumerate(SENTENCES)
        )
    asked = [replace(question(1, "left out"), question="Who wrote Hamlet and Macbeth?")]
    of_folder = FolderChunks(folder, HashingEmbedder(), loaded.compressor)

    with StoredChunks(store, HashingEmbedder()) as of_store:
        found = [retrieve_for(asked, chunks, 3)[0] for chunks in (of_store, of_folder)]
        drawn = [chunks.sample(5, seed=0) for chunks in (of_store, of_folder)]
        assert len(of_store.sample(99, seed=0)) == len(SENTENCES)

    texts = [[document.text for document in each.documents] for each in found]
    assert of_store.codec == "int8"
    assert texts[0] == texts[1]
    assert texts[0][0] == SENTENCES[2]
    assert all(len({chunk.text for chunk in each}) == 5 for each in drawn)


def test_chunks_of_another_embedder_or_of_nothing_are_refused(tmp_path, loaded):
    with SoftRAG.from_pretrained(
        build_checkpoint(), store=tmp_path / "store", embedder=HashingEmbedder(), device="cpu"
    ):
        pass
    other = HashingEmbedder()
    other.name = "another"

    with pytest.raises(MemoryMismatchError, match="indexed with the embedder hashing-64"):
        StoredChunks(tmp_path / "store", other)
    with pytest.raises(StoreError, match="is empty"):
        StoredChunks(tmp_path / "store", HashingEmbedder())
    (tmp_path / "nothing").mkdir()
    with pytest.raises(StoreError, match="holds no text"):
        FolderChunks(tmp_path / "nothing", HashingEmbedder(), loaded.compressor)


# Other models


def test_a_judge_is_asked_about_every_answer_that_says_something():
    def reply(prompt: str) -> str:
        return "Yes." if "answer: Paris" in prompt else "NO" if "answer: Rome" in prompt else "Hm?"

    with serve_chat(reply) as server:
        endpoint = ChatEndpoint(url=server.url, api_key="secret")
        verdicts, unclear = judge_answers(
            endpoint, [question(n) for n in range(4)], ["Paris", "Rome", " ", "Oslo"]
        )

    assert verdicts.tolist() == [100.0, 0.0, 0.0, 0.0]
    assert unclear == 1
    assert len(server.prompts) == 3
    assert all("Accepted answers: Paris" in prompt for prompt in server.prompts)
    assert server.keys == {"Bearer secret"}
    assert {request["model"] for request in server.requests} == {"listed-model"}
    assert "secret" not in repr(endpoint)


def test_an_endpoint_is_tried_again_where_that_can_help():
    with serve_chat(str.upper, failures=[503, 429]) as server:
        endpoint = ChatEndpoint(
            url=f"{server.url}/chat/completions", model="named", threads=1, pause_s=0
        )
        assert endpoint.complete(["a", "b"], max_tokens=3) == ["A", "B"]
        assert server.requests[0]["model"] == "named"
        server.failures[:] = [401, 401]
        with pytest.raises(EndpointError, match="401"):
            endpoint.complete(["c"], max_tokens=3)
        assert server.failures == [401]

    with pytest.raises(EndpointError, match="Check the URL"):
        endpoint.complete(["a"], max_tokens=3)
    with pytest.raises(ValueError, match="http:// or https://"):
        ChatEndpoint(url="localhost:8000")


def test_written_questions_stand_in_their_chunk_and_are_written_once(tmp_path):
    replies = {
        SENTENCES[1]: "Question: What is the capital of France?\nAnswer: Paris.",
        SENTENCES[2]: "Question: Who wrote Macbeth?\nAnswer: Christopher Marlowe",
        SENTENCES[3]: "At what temperature does water boil?\nAnswer: 100 degrees Celsius",
        SENTENCES[4]: "What is the capital of France?\nAnswer: London",
        SENTENCES[5]: "I cannot do that.",
    }
    chunks = [Document(text=text, title="T") for text in SENTENCES[1:6]]
    file = tmp_path / "written.jsonl"

    def reply(prompt: str) -> str:
        return next(text for chunk, text in replies.items() if chunk in prompt)

    with serve_chat(reply) as server:
        writer = endpoint_writer(ChatEndpoint(url=server.url))
        assert write_questions(chunks, 4, writer, file) == 2

    first, second = read_questions(file)
    assert (first.question, first.answers) == ("What is the capital of France?", ("Paris",))
    assert (second.answers, second.gold) == (("100 degrees Celsius",), (True,))
    assert first.documents[0].text == SENTENCES[1]


def test_the_loaded_decoder_can_write(loaded):
    written = decoder_writer(loaded.decoder)([SENTENCES[1], SENTENCES[2]])

    assert len(written) == 2
    assert written[0] != written[1]


# The page


def test_the_page_holds_table_plots_and_examples(tmp_path):
    pytest.importorskip("matplotlib")
    results, _, _ = answered(60, told=True)
    right = [int(each.token_logprobs[0] > -2) for each in results]
    results = [replace(each, text="<b>wrong</b>") for each in results]
    text = row("text", [1] * 60)
    memory = row("memory", right, results=results, stored_bytes=500.0)
    comparison = Comparison(questions=[question(n) for n in range(60)], rows=[text, memory])
    calibration = calibrate(
        results, memory=memory.scores["f1"], text=text.scores["f1"], **of(results)
    )

    write_report(comparison, tmp_path / "r.html", title="mine", calibration=calibration)

    page = (tmp_path / "r.html").read_text()
    lost = right.count(0)
    assert f"Where text is right and memory wrong: {lost} of 60" in page
    assert "&lt;b&gt;wrong&lt;/b&gt;" in page
    assert "<b>wrong</b>" not in page
    assert len(re.findall("data:image/png;base64,iVBOR", page)) == 4
    assert not re.search(r"""(src|href)=["']http""", page)
