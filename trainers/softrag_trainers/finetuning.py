"""Questions as lessons, and texts among them. It knows no model."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from softrag.config import SoftRAGConfig
from softrag.prompt import DocumentPrompt, DocumentRow
from softrag_trainers.collators import Lesson, MemoryCollator
from softrag_trainers.examples import QuestionRow
from softrag_trainers.pretraining import PretrainingCollator, TextPiece, TextPieces

# How often a search has a right document first: for 46 to 100 % of the questions of five
# development sets, of five documents each, with the shipped embedder.
_GOLD_FOUND = 0.75


class FineTuningCollator(MemoryCollator):
    """Questions answered from memories.

    Args:
        config: The model's.
        compressor_tokenizer: The model's.
        decoder_tokenizer: The model's.
        min_documents: The fewest documents a question is taught with; the gold ones stay.
        max_documents: The most; None for all that the row has.
        text_share: Share of questions that read their documents as text, so that one decoder
            answers from both; 1 trains the text baseline.
        mixed_share: Share of questions that read one document as text and the others from memories,
            as mode "mixed" does.
        ranked: Whether documents come best first, as a search has them: a gold one in front for
            three questions of four, and for the fourth another. Otherwise in any order.
        teacher: Whether every question comes with the text that a `TextTeacher` reads.
        saying: As in `MemoryCollator`.
        replay: Makes lessons of the pieces of text among the rows; None: all rows are questions.
        seed: Of every random choice.

    Raises:
        ValueError: The shares are none, or more than all.
    """

    def __init__(
        self,
        config: SoftRAGConfig,
        compressor_tokenizer: PreTrainedTokenizerBase,
        decoder_tokenizer: PreTrainedTokenizerBase,
        *,
        min_documents: int = 5,
        max_documents: int | None = None,
        text_share: float = 0.0,
        mixed_share: float = 0.0,
        ranked: bool = False,
        teacher: bool = False,
        saying: bool = False,
        replay: PretrainingCollator | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(config, compressor_tokenizer, decoder_tokenizer, saying=saying, seed=seed)
        if min(text_share, mixed_share) < 0 or text_share + mixed_share > 1:
            raise ValueError(
                f"data.text_share is {text_share} and data.mixed_share {mixed_share}; expected "
                "shares of the questions, from 0 to 1 and together no more than 1."
            )
        self.min_documents = min_documents
        self.max_documents = max_documents
        self.text_share = text_share
        self.mixed_share = mixed_share
        self.ranked = ranked
        self.teacher = teacher
        self.replay = replay

    def lessons(self, rows: Sequence[QuestionRow | TextPiece]) -> list[Lesson]:
        """Return a lesson for every row, the questions' first."""
        if self.replay is None:
            return super().lessons(rows)
        self.replay.epoch, self.replay.curriculum = self.epoch, self.curriculum
        texts = [row for row in rows if isinstance(row, TextPiece)]
        questions = [row for row in rows if not isinstance(row, TextPiece)]
        return super().lessons(questions) + self.replay.lessons(texts)

    def lesson(self, row: QuestionRow) -> Lesson:
        """Compress a question's documents; teach its first answer."""
        if not row.answers:
            raise ValueError(
                f"Question {row.id!r} has no answer to teach. Give it one, or have a teacher give "
                "it: python -m softrag_trainers label."
            )
        chosen = self._choose(row)
        kind = self.random.random()
        mixed = self.text_share <= kind < self.text_share + self.mixed_share
        n_texts = len(chosen) if kind < self.text_share else int(mixed)
        # The text of a mixed prompt is always what a search found best.
        if self.ranked or mixed:
            chosen = self._found_first(chosen, row.gold)
        documents = [row.documents[index] for index in chosen]
        question, answer = row.question, row.answers[0]
        for_question = question if self.config.query_dependent else None
        rendered = [self.document_prompt.render(text, for_question) for text in documents]
        # Cut where the compressor would cut, so that both read the same.
        readable = slice(len(chosen) if self.teacher else n_texts)
        texts = [
            cut_text(self.document_prompt, text, document)
            for text, document in zip(documents[readable], rendered[readable], strict=True)
        ]
        teacher = self.rag_prompt.render(question, texts, answer) if self.teacher else None
        compressed, remembered = rendered[n_texts:], chosen[n_texts:]
        lengths = [document.n_memory for document in compressed]
        prompt = self.rag_prompt.render(question, [*texts[:n_texts], *lengths], answer)
        relevance = row.relevance or (row.gold if any(row.gold) else ())
        said = [float(relevance[index]) for index in remembered if relevance]
        holds = [row.gold[index] for index in remembered if self.config.query_dependent]
        return Lesson(compressed, prompt, said, teacher, holds=holds if any(row.gold) else ())

    def _found_first(self, chosen: list[int], gold: Sequence[bool]) -> list[int]:
        """Return the documents with one in front that a search may have found best."""
        right = [index for index in chosen if gold[index]]
        wrong = [index for index in chosen if not gold[index]]
        found = self.random.random() < _GOLD_FOUND
        first = self.random.choice((right if found else wrong) or chosen)
        return [first, *(index for index in chosen if index != first)]

    def _choose(self, row: QuestionRow) -> list[int]:
        """Return which documents are read, in the order they are read in."""
        most = min(self.max_documents or len(row.documents), len(row.documents))
        count = self.random.randint(min(self.min_documents, most), most)
        order = list(range(len(row.documents)))
        gold = [index for index in order if row.gold[index]]
        rest = [index for index in order if not row.gold[index]]
        self.random.shuffle(rest)
        kept = set((gold + rest)[: max(count, len(gold[:most]))])
        chosen = [index for index in order if index in kept]
        self.random.shuffle(chosen)
        return chosen


def cut_text(prompt: DocumentPrompt, text: str, row: DocumentRow) -> str:
    """Return as much of a text as the compressor read of it."""
    if not row.truncated:
        return text
    return str(prompt.tokenizer.decode(prompt.tokenize(text)[: row.n_document_tokens]))


class Rows(Dataset[Any]):
    """A list as a data set."""

    def __init__(self, rows: Sequence[Any]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:  # noqa: ANN401
        """Return one row."""
        return self.rows[index]


class Replay(Dataset[Any]):
    """Questions, and among them pieces of text: other ones in every epoch, until all were read.

    Args:
        questions: Read once an epoch.
        texts: Read one after the other, in a random order.
        share: Of pieces among all rows, from 0 to less than 1.
        seed: Of the texts' order.

    Attributes:
        epoch: The pass over the questions; the trainer counts it.
    """

    epoch = 0

    def __init__(
        self, questions: Sequence[QuestionRow], texts: TextPieces, *, share: float, seed: int
    ) -> None:
        if not 0 <= share < 1:
            raise ValueError(f"replay.share is {share}; expected 0 or more, and less than 1.")
        self.questions = questions
        self.texts = texts
        self._n_texts = round(len(questions) * share / (1 - share))
        self._order = list(range(len(texts)))
        random.Random(seed).shuffle(self._order)

    def __len__(self) -> int:
        """Return the number of rows of an epoch."""
        return len(self.questions) + self._n_texts

    def __getitem__(self, index: int) -> QuestionRow | TextPiece:
        """Return one row."""
        if index < len(self.questions):
            return self.questions[index]
        number = self.epoch * self._n_texts + index - len(self.questions)
        return self.texts[self._order[number % len(self._order)]]
