"""What the fallback promises: doubtful questions are answered from text, and it says so."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from softrag.decoder import DecodeRequest, DecodeResult
from softrag.documents import Document
from softrag.engine import SoftRAG
from softrag.errors import MemoryMismatchError, UnreadableFileError
from softrag.router import Router, features, grounding, matching
from tests.checkpoints import build_checkpoint
from tests.embedders import HashingEmbedder
from tests.families import SENTENCES

DOCUMENTS = [Document(text=text, source=str(n)) for n, text in enumerate(SENTENCES)]
QUESTIONS = ["Who wrote Hamlet?", "Where is Paris?", "When does water boil?", "Why the Amazon?"]
OPTIONS = {"k": 2, "max_new_tokens": 10}


@pytest.fixture(scope="module")
def engine():
    with SoftRAG.from_pretrained(
        build_checkpoint(), embedder=HashingEmbedder(), device="cpu"
    ) as engine:
        engine.add(DOCUMENTS)
        yield engine


@pytest.fixture
def with_router(engine):
    """Give the engine a router for one test."""

    def use(router: Router) -> SoftRAG:
        engine.fallback = router
        return engine

    yield use
    engine.fallback = None


def router(engine: SoftRAG, *, threshold: float = 0.5, lookahead: int = 3) -> Router:
    """Return a router with weights as a calibration could find them."""
    width = engine.compressor.model.decoder.config.hidden_size
    state = np.random.default_rng(0).normal(size=width) / width
    return Router(
        fingerprint=engine.decoder.fingerprint,
        threshold=threshold,
        lookahead=lookahead,
        weights=[-0.2, -0.1, 0.0, 0.1, 0.0, 0.0, 0.0, 0.0, 0.0, *state.tolist()],
        bias=0.0,
        with_state=True,
    )


@pytest.fixture
def halving(engine, with_router) -> SoftRAG:
    """The engine with a router that answers half of the questions from text."""
    with_router(router(engine))
    scores = sorted(answer.fallback_score for answer in engine.ask_many(QUESTIONS, **OPTIONS))
    assert scores[2] - scores[1] > 1e-4
    # Between two scores: alone and in a batch they differ in the last digits.
    return with_router(router(engine, threshold=(scores[1] + scores[2]) / 2))


def test_it_is_off_unless_asked_for(engine):
    answer = engine.ask(QUESTIONS[0], **OPTIONS)

    assert engine.fallback is None
    assert (answer.mode, answer.fallback_score) == ("memory", None)


def test_doubtful_questions_are_answered_from_text(halving):
    routed = halving.ask_many(QUESTIONS, **OPTIONS)
    halving_router, halving.fallback = halving.fallback, None
    memory = halving.ask_many(QUESTIONS, **OPTIONS)
    text = halving.ask_many(QUESTIONS, mode="text", **OPTIONS)

    assert sorted(answer.mode for answer in routed) == ["memory", "memory", "text", "text"]
    for answer, from_memory, from_text in zip(routed, memory, text, strict=True):
        doubted = answer.fallback_score >= halving_router.threshold
        assert answer.mode == ("text" if doubted else "memory")
        assert answer.text == (from_text if doubted else from_memory).text
        # Both readings are paid for.
        both = from_text.usage.prompt_tokens + from_memory.usage.prompt_tokens
        assert answer.usage.prompt_tokens == (both if doubted else from_memory.usage.prompt_tokens)
        assert answer.usage.soft_tokens == from_memory.usage.soft_tokens
        written = from_memory.usage.completion_tokens
        assert answer.usage.completion_tokens == (
            written + from_text.usage.completion_tokens if doubted else written
        )
        assert answer.timings.first_token_s < answer.timings.total_s


async def test_alone_streamed_and_async_decide_the_same(halving):
    together = halving.ask_many(QUESTIONS, **OPTIONS)

    for question, expected in zip(QUESTIONS, together, strict=True):
        alone = halving.ask(question, **OPTIONS)
        later = await halving.aask(question, **OPTIONS)
        stream = halving.stream(question, **OPTIONS)
        pieces = list(stream)
        async_stream = halving.astream(question, **OPTIONS)
        async_pieces = [piece async for piece in async_stream]
        for answer in (alone, later, stream.answer, async_stream.answer):
            assert (answer.text, answer.mode) == (expected.text, expected.mode)
            assert answer.fallback_score == pytest.approx(expected.fallback_score, abs=1e-4)
        assert "".join(pieces) == "".join(async_pieces) == expected.text
        assert alone.usage == expected.usage
        # A stream looks at the first tokens, then reads memories again for the whole answer.
        read = 2 * alone.usage.soft_tokens if expected.mode == "memory" else alone.usage.soft_tokens
        assert stream.answer.usage.soft_tokens == read


def test_an_answer_that_ends_within_the_lookahead_is_read_once(engine, with_router):
    with_router(router(engine, threshold=99.0, lookahead=50))

    stream = engine.stream(QUESTIONS[0], **OPTIONS)

    assert "".join(stream) == engine.ask(QUESTIONS[0], **OPTIONS).text
    assert stream.answer.usage == engine.ask(QUESTIONS[0], **OPTIONS).usage


@pytest.mark.parametrize("mode", ["text", "closed"])
def test_other_modes_are_left_alone(engine, with_router, mode):
    with_router(router(engine, threshold=-99.0))

    answer = engine.ask(QUESTIONS[0], mode=mode, **OPTIONS)

    assert (answer.mode, answer.fallback_score) == (mode, None)


def test_memories_without_their_text_stay_memories(engine, with_router):
    with_router(router(engine, threshold=-99.0))
    hits = engine.retrieve(QUESTIONS[0], k=2)

    bare = [replace(hit.memory, text=None) for hit in hits]
    answer = engine.answer_from(QUESTIONS[0], bare, max_new_tokens=4)

    assert (answer.mode, answer.fallback_score) == ("memory", None)
    for whole in (hits, [hit.memory for hit in hits]):
        answer = engine.answer_from(QUESTIONS[0], whole, max_new_tokens=4)
        assert answer.mode == "text"
        assert answer.fallback_score is not None


def test_a_text_that_does_not_fit_the_decoder_stays_a_memory(engine, with_router):
    with_router(router(engine, threshold=-99.0))
    long = [" ".join(SENTENCES * 3)] * 4
    with pytest.raises(ValueError, match="the decoder reads 2048"):
        engine.answer_from(QUESTIONS[0], long, mode="text", max_new_tokens=4)

    answer = engine.answer_from(QUESTIONS[0], long, max_new_tokens=4)
    stream = engine.stream_from(QUESTIONS[0], long, max_new_tokens=4)

    assert answer.mode == "memory"
    assert answer.fallback_score is not None
    assert "".join(stream) == answer.text
    assert stream.answer.mode == "memory"


def test_a_router_of_another_model_is_refused(engine, tmp_path):
    file = tmp_path / "router.json"
    replace(router(engine), fingerprint="another").save(file)

    with pytest.raises(MemoryMismatchError, match="calibrated on memories of the model another"):
        SoftRAG.from_pretrained(
            build_checkpoint(), embedder=HashingEmbedder(), device="cpu", fallback=file
        )


def test_a_saved_router_decides_as_before(engine, tmp_path):
    file = tmp_path / "router.json"
    router(engine).save(file)

    with SoftRAG.from_pretrained(
        build_checkpoint(), embedder=HashingEmbedder(), device="cpu", fallback=file
    ) as loaded:
        assert loaded.fallback == router(engine)
    for content in ("", "[]", '{"format": 3}', '{"format": 2}'):
        file.write_text(content)
        with pytest.raises(UnreadableFileError, match="is no router"):
            Router.load(file)


def test_features_are_confidence_grounding_and_matching_then_the_state():
    result = DecodeResult(
        text="x",
        prompt_tokens=3,
        soft_tokens=0,
        completion_tokens=3,
        first_token_s=0.0,
        finish_reason="stop",
        token_logprobs=(-1.0, -2.0, -6.0),
        prompt_state=torch.tensor([7.0, 8.0]),
        opening="The Nile",
    )

    def look(result, lookahead, *, with_state):
        asked = "Which is the longest?", ["Amazon is long.", "So is the Nile"]
        return features(result, *asked, lookahead=lookahead, with_state=with_state).tolist()

    assert look(result, 2, with_state=False) == [-1.0, -1.5, -2.0, 1.0, 1.0, 1.0, 1.0, 0.5, 0.25]
    assert look(result, 6, with_state=True) == [-1, -3, -6, 0.5, 1, 1, 1, 0.5, 0.25, 7, 8]
    with pytest.raises(ValueError, match="no prompt state"):
        look(replace(result, prompt_state=None), 2, with_state=True)
    with pytest.raises(ValueError, match="no token log-probabilities"):
        look(replace(result, token_logprobs=()), 2, with_state=False)
    with pytest.raises(ValueError, match="no opening"):
        look(replace(result, opening=None), 2, with_state=False)


@pytest.mark.parametrize(
    ("opening", "all_words", "new_words", "names"),
    [
        ("Thomas Parnell began it", 0.75, 1.0, 1.0),
        ("thomas parnell", 1.0, 1.0, 1.0),
        ("John Mainstone in 1927", 0.5, 1 / 3, 1 / 3),
        ("it", 1.0, 0.5, 1.0),
        ("…", 1.0, 0.5, 1.0),
    ],
)
def test_grounding_is_how_much_of_an_opening_stands_in_the_texts(
    opening, all_words, new_words, names
):
    texts = ["Professor Thomas Parnell in Queensland", "The pitch drop experiment: it ran in 1927."]

    found = grounding(opening, "Who began it in Queensland?", texts)

    assert found == pytest.approx([all_words, new_words, names])


@pytest.mark.parametrize(
    ("texts", "best_sentence", "first_text"),
    [
        (["Who? He began in 1927.", "Who began it, in Rome"], 0.8, 0.6),
        (["Who began it in QUEENSLAND."], 1.0, 1.0),
        (["Who began. It, in Queensland"], 0.6, 1.0),
        ([""], 0.0, 0.0),
        ([], 0.0, 0.0),
    ],
)
def test_matching_is_how_much_of_a_question_stands_in_a_sentence_and_in_the_first_text(
    texts, best_sentence, first_text
):
    assert matching("Who began it in Queensland?", texts) == [best_sentence, first_text]
    assert matching("…", ["A text."]) == [1.0, 1.0]


@pytest.mark.parametrize("lookahead", [1, 3, 40])
def test_an_opening_is_what_the_first_tokens_spell_alone_and_in_a_longer_answer(engine, lookahead):
    request = DecodeRequest(question=QUESTIONS[0], max_new_tokens=12, lookahead=lookahead)
    short = replace(request, max_new_tokens=min(lookahead, 12))

    whole, opened = (engine.decoder.generate([each])[0] for each in (request, short))

    assert whole.opening == opened.opening == opened.text
    assert whole.text.startswith(opened.text)
    assert engine.decoder.generate([replace(request, lookahead=0)])[0].opening is None


def test_a_router_that_looks_at_words_alone_doubts_what_no_text_says(engine, with_router):
    words = replace(
        router(engine, threshold=-0.5), weights=[0, 0, 0, 0, -1.0, 0, 0, 0, 0], with_state=False
    )
    with_router(words)

    for answer in engine.ask_many(QUESTIONS, **OPTIONS):
        assert -1.0 <= answer.fallback_score <= 0.0
        assert answer.mode == ("text" if answer.fallback_score >= -0.5 else "memory")
