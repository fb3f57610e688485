"""The shipped models: small enough to be shipped, whole, and able to do what they are for."""

from __future__ import annotations

import pytest

from softrag.checkpoint import DEMO_MODELS, locate, read_config
from softrag.compressor import Compressor
from softrag.model import SoftRAGModel

DOCUMENTS = [
    "The Pont Neuf, opened in 1607, is the oldest bridge across the Seine in Paris.",
    "Bread is made of flour, water and yeast, and baked after an hour.",
    "The Eiffel Tower was completed in 1889 and is 330 metres tall.",
]
QUESTIONS = ["When was the Pont Neuf opened?", "What is bread made of?", "How tall is the tower?"]


@pytest.mark.parametrize("name", DEMO_MODELS)
def test_a_demo_model_is_small_and_its_files_are_those_of_its_config(name):
    folder = locate(name)
    files = {file.name: file.stat().st_size for file in folder.glob("*.safetensors")}

    assert set(read_config(folder).checksums) == set(files)
    assert max(files.values()) < 15e6
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) < 60e6
    assert (folder / "README.md").is_file()


@pytest.mark.parametrize("name", DEMO_MODELS)
def test_demo_models_answer_in_the_words_of_the_chunks(name):
    assert read_config(locate(name)).copy_bias == 4.0


@pytest.mark.parametrize(("rate", "length"), [(None, 4), (16, 4), (4, 16)])
def test_the_demo_model_compresses_at_two_rates(rate, length):
    model = SoftRAGModel.from_pretrained(
        "softrag-demo", load_decoder=False, device="cpu", rate=rate
    )

    (memory,) = Compressor(model).compress([" ".join(DOCUMENTS)])

    assert memory.n_document_tokens == 61
    assert len(memory) == length


def test_the_query_dependent_demo_model_ranks_the_document_that_answers_first():
    model = SoftRAGModel.from_pretrained("softrag-demo-oscar", load_decoder=False, device="cpu")
    compressor = Compressor(model)

    for place, question in enumerate(QUESTIONS):
        memories = compressor.compress(DOCUMENTS, [question] * len(DOCUMENTS))
        scores = [memory.relevance for memory in memories]
        assert max(scores) == scores[place], question
