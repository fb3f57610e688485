"""Questions that bring their own documents, answered with a model. It knows no store."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from time import perf_counter

from softrag.answer import Mode
from softrag.asking import Asked, Decoding, Source, prepare, split_for
from softrag.codec import decode, encode
from softrag.compressor import Compressor
from softrag.decoder import Decoder, DecodeResult
from softrag.documents import document_text
from softrag.embedder import Embedder
from softrag.evaluation import Question
from softrag.memory import Memory


@dataclass(frozen=True, kw_only=True)
class AnsweredSet:
    """A question set answered in one mode.

    Attributes:
        results: One per question, in order.
        compress_s: Seconds spent on memories that were made while answering.
        decode_s: Seconds spent on answering.
    """

    results: list[DecodeResult]
    compress_s: float
    decode_s: float


@dataclass(frozen=True, kw_only=True)
class SetMemories:
    """The memories of a question set's documents, as a store would keep them.

    Attributes:
        by_text: Every distinct document's memories: one, or several of a document that was split.
            Empty for query-dependent models, whose memories are made with the question.
        nbytes: Size of all of them, encoded.
        compress_s: Seconds it took to make them.
    """

    by_text: Mapping[str, list[Memory]]
    nbytes: int
    compress_s: float

    def encoded(self, codec: str) -> SetMemories:
        """Return the memories as they come back from a store with this codec (`codec.CODECS`)."""
        data = {text: [encode(each, codec) for each in made] for text, made in self.by_text.items()}
        return SetMemories(
            by_text={
                text: [
                    replace(decode(each), text=whole.text)
                    for each, whole in zip(made, self.by_text[text], strict=True)
                ]
                for text, made in data.items()
            },
            nbytes=sum(len(each) for made in data.values() for each in made),
            compress_s=self.compress_s,
        )


def texts_of(question: Question) -> list[str]:
    """Return a question's documents as they are read."""
    return [document_text(document.title, document.text) for document in question.documents]


def nearest_first(questions: Sequence[Question], embedder: Embedder) -> list[Question]:
    """Return questions with their documents in the order that a search would find them in.

    The embedder sees only what has to be compared: of questions with one document or none, nothing.
    """
    several = [each for each in questions if len(each.documents) > 1]
    if not several:
        return list(questions)
    distinct = list(dict.fromkeys(text for each in several for text in texts_of(each)))
    vectors = dict(zip(distinct, embedder.embed_documents(distinct), strict=True))

    def ranked(question: Question) -> Question:
        if len(question.documents) < 2:
            return question
        asked = embedder.embed_query(question.question)
        nearness = [float(vectors[text] @ asked) for text in texts_of(question)]
        order = sorted(range(len(nearness)), key=lambda place: -nearness[place])
        return replace(
            question,
            documents=tuple(question.documents[place] for place in order),
            gold=tuple(question.gold[place] for place in order),
        )

    return [ranked(question) for question in questions]


def compress_set(questions: Sequence[Question], compressor: Compressor) -> SetMemories:
    """Compress every distinct document of a question set once; nothing for query-dependent models.

    Raises:
        EmptyDocumentError: A document has no text.
    """
    if compressor.query_dependent:
        return SetMemories(by_text={}, nbytes=0, compress_s=0.0)
    started = perf_counter()
    distinct = list(dict.fromkeys(text for each in questions for text in texts_of(each)))
    pieces = [split_for(compressor, text) for text in distinct]
    made = iter(compressor.compress([piece for split in pieces for piece in split]))
    by_text = {
        text: list(islice(made, len(split))) for text, split in zip(distinct, pieces, strict=True)
    }
    return SetMemories(
        by_text=by_text,
        nbytes=sum(memory.nbytes for memories in by_text.values() for memory in memories),
        compress_s=perf_counter() - started,
    )


def answer_set(
    questions: Sequence[Question],
    *,
    mode: Mode,
    decoder: Decoder,
    compressor: Compressor | None = None,
    memories: SetMemories | None = None,
    batch_size: int = 16,
    max_new_tokens: int = 64,
    with_state: bool = False,
    lookahead: int = 0,
    copy_bias: float = 0.0,
    on_answers: Callable[[int], None] | None = None,
) -> AnsweredSet:
    """Answer questions from their own documents.

    Args:
        questions: The questions.
        mode: What is read of the documents.
        decoder: Answers.
        compressor: Makes memories that are missing.
        memories: What modes "memory" and "mixed" read; None makes them batch by batch.
        batch_size: Questions answered together.
        max_new_tokens: Most tokens of an answer.
        with_state: As in `DecodeRequest`.
        lookahead: As in `DecodeRequest`.
        copy_bias: As in `SoftRAG`.
        on_answers: Called with the number of new answers after every batch.
    """
    known = memories.by_text if memories else {}
    texts = [texts_of(question) for question in questions]
    started = perf_counter()
    compress_s = 0.0
    results: list[DecodeResult] = []
    for first in range(0, len(questions), batch_size):
        batch = slice(first, first + batch_size)
        prepared = prepare(
            [
                Asked(question.question, _sources(documents, known, mode), started)
                for question, documents in zip(questions[batch], texts[batch], strict=True)
            ],
            mode=mode,
            decoding=Decoding(max_new_tokens, None, 0.0, None, with_state, lookahead, copy_bias),
            decoder=decoder,
            compressor=compressor,
        )
        compress_s += prepared[0].compress_s
        results += decoder.generate([each.request for each in prepared])
        if on_answers is not None:
            on_answers(len(prepared))
    decode_s = perf_counter() - started - compress_s
    return AnsweredSet(results=results, compress_s=compress_s, decode_s=decode_s)


def _sources(
    documents: Sequence[str], memories: Mapping[str, list[Memory]], mode: Mode
) -> list[Source]:
    n_texts = 1 if mode == "mixed" else 0
    sources: list[Source] = [*documents[:n_texts]]
    for text in documents[n_texts:]:
        sources += memories.get(text) or [text]
    return sources
