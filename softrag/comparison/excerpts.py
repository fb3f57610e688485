"""What cutting the text would do: the nearest sentences, no longer than the memories."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from softrag.asking import split_for
from softrag.compressor import Compressor
from softrag.documents import Document
from softrag.embedder import Embedder
from softrag.evaluation import Question
from softrag.question_set import texts_of
from softrag.text import TextSpan, split_text

PIECE_TOKENS = 32
"""Most tokens of what is chosen or left out: a sentence, or a part of a long one."""


def excerpt(
    questions: Sequence[Question], embedder: Embedder, compressor: Compressor
) -> list[Question]:
    """Return questions whose documents are cut to what is nearest to the question.

    A question keeps as many tokens of text as its documents' memories have soft tokens: the pieces
    that the embedder finds nearest, as long as they fit, and at least one. They stand where they
    stood; a document of which nothing is left is left out.

    Args:
        questions: The questions with their documents.
        embedder: Finds the pieces.
        compressor: What the memories would be made by; its tokenizer measures the pieces.
    """
    tokenizer = compressor.prompt.tokenizer
    texts = dict.fromkeys(text for question in questions for text in texts_of(question))
    pieces = {text: split_text(text, tokenizer, PIECE_TOKENS) for text in texts}
    distinct = list(dict.fromkeys(piece.text for split in pieces.values() for piece in split))
    vectors = dict(zip(distinct, embedder.embed_documents(distinct), strict=True))

    def cut(question: Question) -> Question:
        asked = embedder.embed_query(question.question)
        found = [
            (place, piece)
            for place, text in enumerate(texts_of(question))
            for piece in pieces[text]
        ]
        found.sort(key=lambda each: -float(vectors[each[1].text] @ asked))
        left = _soft_tokens(question, compressor)
        kept: dict[int, list[TextSpan]] = {}
        for place, piece in found:
            if piece.n_tokens <= left or not kept:
                kept.setdefault(place, []).append(piece)
                left -= piece.n_tokens
        return replace(
            question,
            documents=tuple(Document(text=_in_order(kept[place])) for place in sorted(kept)),
            gold=tuple(question.gold[place] for place in sorted(kept)),
        )

    return [cut(question) for question in questions]


def _in_order(pieces: Sequence[TextSpan]) -> str:
    return " ".join(piece.text for piece in sorted(pieces, key=lambda piece: piece.start))


def _soft_tokens(question: Question, compressor: Compressor) -> int:
    """Return how many soft tokens the memories of a question's documents have."""
    asked = question.question if compressor.query_dependent else None
    return sum(
        compressor.prompt.render(piece, asked).n_memory
        for text in texts_of(question)
        for piece in split_for(compressor, text)
    )
