"""What the compressor promises: one finite memory per document, in order, whatever the batch."""

from __future__ import annotations

import pytest
import torch

from softrag.batch import collate_documents
from softrag.compressor import Compressor
from softrag.errors import EmptyDocumentError, NonFiniteMemoryError
from softrag.memory import is_finite, memory_key
from softrag.model import SoftRAGModel
from tests.checkpoints import build_model
from tests.families import SENTENCES


@pytest.fixture(scope="module")
def model() -> SoftRAGModel:
    return build_model()


def test_memories_come_in_the_documents_order_in_bfloat16_on_the_cpu(model):
    documents = ["Paris.", SENTENCES[2], "Water boils at 100 degrees."]

    memories = Compressor(model).compress(documents)

    lengths = [len(Compressor(model).prompt.tokenize(text)) for text in documents]
    assert [memory.n_document_tokens for memory in memories] == lengths
    assert [len(memory) for memory in memories] == [-(-length // 4) for length in lengths]
    assert [memory.key for memory in memories] == [
        memory_key(model.fingerprint, text) for text in documents
    ]
    for memory in memories:
        assert memory.fingerprint == model.fingerprint
        assert memory.values.dtype == torch.bfloat16
        assert memory.values.device.type == "cpu"
        assert memory.values.shape[1] == 32
        # A slice would keep its whole batch alive.
        assert memory.values.untyped_storage().nbytes() == memory.nbytes


def test_a_memory_does_not_depend_on_its_neighbours(model):
    together = Compressor(model).compress(SENTENCES)
    alone = [Compressor(model).compress([text])[0] for text in SENTENCES]

    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a.values, b.values, rtol=0.02, atol=0.01)


@pytest.mark.parametrize("batch_tokens", [1, 40, 100])
def test_batches_stay_below_their_size(model, batch_tokens, monkeypatch):
    seen = []
    compress = model.compress_packed

    def watch(ids, packed):
        seen.append((len(packed.lengths), len(ids)))
        return compress(ids, packed)

    monkeypatch.setattr(model, "compress_packed", watch)

    memories = Compressor(model, batch_tokens).compress(SENTENCES)

    assert len(memories) == len(SENTENCES)
    assert sum(rows for rows, _ in seen) == len(SENTENCES)
    # A single document that is longer than a batch gets one of its own.
    assert all(rows == 1 or tokens <= batch_tokens for rows, tokens in seen)


def test_equal_documents_are_compressed_once(model, monkeypatch):
    rows = []
    compress = model.compress_packed
    monkeypatch.setattr(
        model,
        "compress_packed",
        lambda ids, packed: (rows.append(len(packed.lengths)), compress(ids, packed))[1],
    )

    first, other, again = Compressor(model).compress(["One.", "Two.", "One."])

    assert sum(rows) == 2
    assert first is again
    assert first.key != other.key


def test_no_documents_make_no_memories(model):
    assert Compressor(model).compress([]) == []


@pytest.mark.parametrize("text", ["", " \n\t"])
def test_an_empty_document_is_refused_by_its_place(model, text):
    with pytest.raises(EmptyDocumentError, match="Document 1 has no text"):
        Compressor(model).compress(["Paris.", text])


def test_a_document_that_is_too_long_is_refused_and_not_cut(model):
    with pytest.raises(ValueError, match=r"longer than the 64 tokens .* Split it first"):
        Compressor(model).compress(["Paris is a city. " * 50])


def test_memory_tokens_written_in_a_document_are_text(model):
    written, plain = Compressor(model).compress(["a <MEM> <MEM> <MEM> b", "a b"])

    compressor = Compressor(model)
    assert len(written) == -(-len(compressor.prompt.tokenize("a <MEM> <MEM> <MEM> b")) // 4)
    assert len(written) > len(plain)


def test_what_is_not_finite_is_never_returned():
    model = build_model()
    with torch.no_grad():
        model.connector.down.bias.fill_(float("nan"))

    with pytest.raises(NonFiniteMemoryError, match=r"document 0 \('Paris\.'\)"):
        Compressor(model).compress(["Paris."])


def test_a_single_spoiled_document_is_named(model, monkeypatch):
    compress = model.compress_packed

    def spoil(ids, packed):
        made = compress(ids, packed)
        made.soft_tokens[-1, 3] = float("inf")  # the shortest document comes last
        return made

    monkeypatch.setattr(model, "compress_packed", spoil)

    with pytest.raises(NonFiniteMemoryError, match="document 1 "):
        Compressor(model).compress([SENTENCES[0], "Paris.", SENTENCES[1]])


def test_query_dependent_memories_need_a_question_each_and_depend_on_it():
    compressor = Compressor(build_model(query_dependent=True))

    first, second = compressor.compress(["Paris."] * 2, ["Where is it?", "What is it?"])

    assert first.key == memory_key(compressor.fingerprint, "Paris.", "Where is it?")
    assert not torch.equal(first.values, second.values)
    with pytest.raises(ValueError, match="give one per document"):
        compressor.compress(["Paris."])
    with pytest.raises(ValueError, match="Found 1 questions for 2 documents"):
        compressor.compress(["Paris.", "Rome."], ["Where?"])


def test_a_rerank_head_tells_how_relevant_each_document_is():
    compressor = Compressor(build_model(query_dependent=True, rerank=True))
    texts, questions = ["Paris.", SENTENCES[2], "Paris."], ["Where?", "Where?", "Who?"]

    memories = compressor.compress(texts, questions)

    relevances = [memory.relevance for memory in memories]
    assert len(set(relevances)) == 3
    assert all(0 < relevance < 1 for relevance in relevances)
    row = compressor.prompt.render("Paris.", "Where?")
    with torch.no_grad():
        scores = compressor.model.compress_and_score(*collate_documents([row], 0)).scores
    assert relevances[0] == pytest.approx(scores.sigmoid().item(), rel=1e-4)
    plain = Compressor(build_model(query_dependent=True)).compress(texts, questions)
    assert [memory.relevance for memory in plain] == [None] * 3


def test_questions_are_refused_where_they_would_be_ignored(model):
    with pytest.raises(ValueError, match="leave questions out"):
        Compressor(model).compress(["Paris."], ["Where?"])


def test_one_text_instead_of_a_list_is_refused(model):
    with pytest.raises(TypeError, match=r"documents must be a list, found 'Paris\.'"):
        Compressor(model).compress("Paris.")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_one_value_that_is_not_finite_is_seen(bad):
    values = torch.randn(8, 64).bfloat16()
    assert is_finite(values)
    # Their sum is infinite, they are not.
    assert is_finite(torch.full((8, 64), 3e38).bfloat16())

    values[5, 3] = bad

    assert not is_finite(values)
