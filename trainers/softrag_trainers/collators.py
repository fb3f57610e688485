"""Training rows to tensors. All token ids come from the core's prompts; none are made here.

Subclass `MemoryCollator` and write `lesson` to teach something else: it says what is compressed
and what the decoder reads.
"""

from __future__ import annotations

import math
import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import pairwise, takewhile
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from softrag.batch import IGNORED, collate_documents, collate_prompts
from softrag.config import SoftRAGConfig
from softrag.prompt import DocumentPrompt, DocumentRow, PromptRow, RagPrompt
from softrag_trainers.curriculum import Curriculum

_SHORTEST_WINDOW = 6


class Lesson(NamedTuple):
    """One training example before padding.

    Attributes:
        documents: What is compressed, in the order of the prompt's placeholders.
        prompt: What the decoder reads; it learns from `answer_start` on.
        relevance: Of each document to the question, from 0 to 1, for models with a rerank head;
            empty when nobody said.
        teacher: What a teacher reads in place of `prompt`, up to the same answer; None: no teacher.
        read: What the decoder sees in place of `prompt`, with noise in it; None: the prompt.
        holds: Whether each document holds the answer, which a query-dependent model's soft tokens
            can learn to say; empty when nobody said.
    """

    documents: Sequence[DocumentRow]
    prompt: PromptRow
    relevance: Sequence[float] = ()
    teacher: PromptRow | None = None
    read: PromptRow | None = None
    holds: Sequence[bool] = ()


class MemoryCollator(ABC):
    """Turn rows into the tensors of `SoftRAGModel.forward`.

    Subclasses write `lesson`. Equal documents of a batch are compressed once.

    Args:
        config: The model's.
        compressor_tokenizer: The model's.
        decoder_tokenizer: The model's.
        noise: Share of answer tokens that the decoder sees replaced by random ones while learning
            the right ones, so that it reads the memories instead of its own last words.
        saying: Whether soft tokens learn to say something by themselves: the answer, or if the
            model is not query-dependent the tokens of their windows.
        seed: Of every random choice.

    Raises:
        ValueError: The tokens of windows are to be said, and the decoder has others.

    Attributes:
        document_prompt: Lays out what the compressor reads; each lesson's has a rate of its own
            where the config, or the curriculum, has several.
        epoch: The pass over the data; the trainer counts it.
        curriculum: Rates that rise with the run, which the trainer follows; None: the config's.
        random: For the random choices of the row that is being collated. They follow from seed,
            epoch and the row alone: neither the batch it is in, nor the process that collates it,
            nor a resumed run changes them. With a curriculum they follow from how much of the run
            was done when the row was collated, too, which is a few batches before it is learned.
    """

    epoch = 0
    curriculum: Curriculum | None = None
    random: random.Random

    def __init__(
        self,
        config: SoftRAGConfig,
        compressor_tokenizer: PreTrainedTokenizerBase,
        decoder_tokenizer: PreTrainedTokenizerBase,
        *,
        noise: float = 0.0,
        saying: bool = False,
        seed: int = 0,
    ) -> None:
        if saying and not config.query_dependent:
            if compressor_tokenizer.get_vocab() != decoder_tokenizer.get_vocab():
                raise ValueError(
                    "Soft tokens are to say the tokens of their documents (optimizer.saying_weight)"
                    " to the decoder, whose vocabulary is not the compressor's. Set "
                    "optimizer.saying_weight=0, or choose base models with one vocabulary."
                )
        self.config = config
        self.decoder_tokenizer = decoder_tokenizer
        self.document_prompt = DocumentPrompt.from_config(config, compressor_tokenizer)
        self.rag_prompt = RagPrompt.from_config(config, decoder_tokenizer)
        self.noise = noise
        self.saying = saying
        self.seed = seed
        # Padding is masked out everywhere; any id will do.
        self._pad = 0

    @abstractmethod
    def lesson(self, row: Any) -> Lesson:  # noqa: ANN401 (subclasses name their row)
        """Say what is compressed for a row, and what the decoder reads and learns."""

    def __call__(self, rows: Sequence[Any]) -> dict[str, torch.Tensor]:
        """Collate rows.

        Returns:
            The arguments of `SoftRAGModel.forward`; the prompts are padded on the right. For
            models with a rerank head also `relevance`, `(documents,)`, NaN where nobody said; for
            lessons with a teacher, which come first, what it reads, as `TextTeacher.exceed` takes
            it; with `saying`, `soft_token_labels`, where it is known what is to be said.

        Raises:
            ValueError: A prompt's placeholders are not as many as its documents' soft tokens.
        """
        lessons = self.lessons(rows)
        # What a teacher compares are then the first labels of the batch.
        lessons.sort(key=lambda lesson: lesson.teacher is None)
        return self._pad_and_number(lessons)

    def lessons(self, rows: Sequence[Any]) -> list[Lesson]:
        """Return a lesson for every row, with its noise."""
        drawn = []
        for row in rows:
            self.random = random.Random(f"{self.seed}-{self.epoch}-{row!r}")
            rates = self._rates()
            rate = self.random.choice(rates) if len(rates) > 1 else rates[0]
            self.document_prompt = self.document_prompt.at_rate(rate)
            drawn.append(self._with_noise(self._checked(self.lesson(row), row)))
        return drawn

    def _rates(self) -> list[int]:
        if self.curriculum is not None:
            return self.curriculum.rates()
        return self.config.rates or [self.config.rate]

    def _pad_and_number(self, lessons: Sequence[Lesson]) -> dict[str, torch.Tensor]:
        prompts = [lesson.prompt for lesson in lessons]
        read = [lesson.read or lesson.prompt for lesson in lessons]
        learned = collate_prompts(prompts, self._pad, side="right", learn=True)
        assert learned.labels is not None
        tensors = {
            "decoder_input_ids": collate_prompts(read, self._pad, side="right").input_ids,
            "decoder_attention_mask": learned.attention_mask,
            "labels": learned.labels,
        }
        taught = [lesson.teacher for lesson in lessons if lesson.teacher is not None]
        if taught:
            teacher = collate_prompts(taught, self._pad, side="right", learn=True)
            assert teacher.labels is not None
            tensors |= {
                "teacher_input_ids": teacher.input_ids,
                "teacher_attention_mask": teacher.attention_mask,
                "teacher_labels": teacher.labels,
                **_what_both_read(lessons, taught, learned.labels.shape, teacher.labels.shape),
            }
        number_of: dict[tuple[int, ...], int] = {}
        distinct: list[DocumentRow] = []
        relevance: list[float] = []
        uses: list[int] = []
        for lesson in lessons:
            said = lesson.relevance or [math.nan] * len(lesson.documents)
            for document, relevant in zip(lesson.documents, said, strict=True):
                number = number_of.setdefault(tuple(document.input_ids), len(distinct))
                if number == len(distinct):
                    distinct.append(document)
                    relevance.append(relevant)
                uses.append(number)
        if uses:
            documents = collate_documents(distinct, self._pad)
            tensors |= {
                "compressor_input_ids": documents.input_ids,
                "compressor_attention_mask": documents.attention_mask,
                "document_index": torch.tensor(uses),
            }
            if self.config.rerank:
                tensors["relevance"] = torch.tensor(relevance)
            if self.saying and (labels := self._soft_token_labels(lessons)) is not None:
                tensors["soft_token_labels"] = labels
        return tensors

    def _soft_token_labels(self, lessons: Sequence[Lesson]) -> torch.Tensor | None:
        """Return the tokens that soft tokens say, `(memory,)` or `(memory, words)`; None: any."""
        if self.config.query_dependent:
            if not any(lesson.holds for lesson in lessons):
                return None
            return torch.tensor([token for lesson in lessons for token in self._said(lesson)])
        windows = [
            words
            for lesson in lessons
            for document in lesson.documents
            for words in _words_of_windows(document)
        ]
        most = max(map(len, windows))
        if not most:
            return None
        return torch.tensor([words + [IGNORED] * (most - len(words)) for words in windows])

    def _said(self, lesson: Lesson) -> list[int]:
        """Return what a lesson's soft tokens say: the answer, or its end where there is none."""
        answer, said = _answer(lesson.prompt), []
        known: Sequence[bool | None] = lesson.holds or [None] * len(lesson.documents)
        for document, holds in zip(lesson.documents, known, strict=True):
            words = [] if holds is None else answer if holds else answer[-1:]
            words = words[: document.n_memory]
            said += words + [IGNORED] * (document.n_memory - len(words))
        return said

    def _checked(self, lesson: Lesson, row: Any) -> Lesson:  # noqa: ANN401
        placeholders = sum(map(lesson.prompt.input_ids.count, self.rag_prompt.memory_ids))
        soft_tokens = sum(document.n_memory for document in lesson.documents)
        if placeholders != soft_tokens:
            raise ValueError(
                f"{type(self).__name__}.lesson made a prompt with {placeholders} <MEM> "
                f"placeholders for documents of {soft_tokens} soft tokens. Give the prompt as many "
                f"as the documents' n_memory add up to. The row: {str(row)[:200]}"
            )
        teacher = lesson.teacher
        if teacher is not None and _answer(teacher) != _answer(lesson.prompt):
            raise ValueError(
                f"{type(self).__name__}.lesson gives the teacher another answer than the decoder; "
                f"token by token, they are compared at the same one. The row: {str(row)[:200]}"
            )
        return lesson

    def _with_noise(self, lesson: Lesson) -> Lesson:
        if not self.noise:
            return lesson
        prompt = lesson.prompt
        # <MEM> and <AE> are the last two; they would call for soft tokens.
        words = len(self.decoder_tokenizer) - 2
        read = [
            self.random.randrange(words) if self.random.random() < self.noise else token
            for token in _answer(prompt)
        ]
        noisy = PromptRow(prompt.input_ids[: prompt.answer_start] + read, prompt.answer_start)
        return lesson._replace(read=noisy)


def _words_of_windows(document: DocumentRow) -> list[list[int]]:
    """Return the distinct tokens of each soft token's window, or none of windows that are short.

    In short windows nearly every token has a soft token of its own.
    """
    n_memory = document.n_memory
    text = document.input_ids[: len(document.input_ids) - n_memory]
    if len(text) < _SHORTEST_WINDOW * n_memory:
        return [[] for _ in range(n_memory)]
    # As `softrag.placeholders.Windows` lays them out.
    borders = [-(-index * len(text) // n_memory) for index in range(n_memory + 1)]
    return [sorted(set(text[start:stop])) for start, stop in pairwise(borders)]


def _what_both_read(
    lessons: Sequence[Lesson],
    taught: Sequence[PromptRow],
    shape: torch.Size,
    teacher_shape: torch.Size,
) -> dict[str, torch.Tensor]:
    """Mark what stands behind the documents in the prompts of a decoder and of its teacher."""
    own, theirs = torch.zeros(shape, dtype=torch.bool), torch.zeros(teacher_shape, dtype=torch.bool)
    for index, (lesson, teacher) in enumerate(zip(lessons, taught, strict=False)):
        if not lesson.documents:
            continue  # Both read the same, and there is nothing to learn.
        ids, ids_of_teacher = lesson.prompt.input_ids, teacher.input_ids
        both = zip(reversed(ids), reversed(ids_of_teacher), strict=False)
        length = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], both))
        own[index, len(ids) - length : len(ids)] = True
        theirs[index, len(ids_of_teacher) - length : len(ids_of_teacher)] = True
    return {"teacher_matched_prompt": own, "teacher_matched": theirs}


def _answer(prompt: PromptRow) -> list[int]:
    return prompt.input_ids[prompt.answer_start :]
