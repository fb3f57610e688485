"""Training rows to tensors. All token ids come from the core's prompts; none are made here.

Subclass `MemoryCollator` and write `lesson` to teach something else: it says what is compressed
and what the decoder reads.
"""

from __future__ import annotations

import math
import random
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from softrag.batch import collate_documents, collate_prompts
from softrag.config import SoftRAGConfig
from softrag.prompt import (
    AUTO_ENCODING_TOKEN,
    DocumentPrompt,
    DocumentRow,
    PromptRow,
    RagPrompt,
    encode_text,
    token_id,
)
from softrag_trainers.examples import QuestionRow


class Lesson(NamedTuple):
    """One training example before padding.

    Attributes:
        documents: What is compressed, in the order of the prompt's placeholders.
        prompt: What the decoder reads; it learns from `answer_start` on.
        relevance: Of each document to the question, from 0 to 1, for models with a rerank head;
            empty when nobody said.
        teacher: What a teacher reads in place of `prompt`, up to the same answer; None: no teacher.
    """

    documents: Sequence[DocumentRow]
    prompt: PromptRow
    relevance: Sequence[float] = ()
    teacher: PromptRow | None = None


class MemoryCollator(ABC):
    """Turn rows into the tensors of `SoftRAGModel.forward`.

    Subclasses write `lesson`. Equal documents of a batch are compressed once.

    Args:
        config: The model's.
        compressor_tokenizer: The model's.
        decoder_tokenizer: The model's.
        noise: Share of answer tokens that the decoder sees replaced by random ones while learning
            the right ones, so that it reads the memories instead of its own last words.
        seed: Of every random choice.

    Attributes:
        document_prompt: Lays out what the compressor reads; each lesson's has a rate of its own
            where the config has several.
        epoch: The pass over the data; the trainer counts it.
        random: For the random choices of the row that is being collated. They follow from seed,
            epoch and the row alone: neither the batch it is in, nor the process that collates it,
            nor a resumed run changes them.
    """

    epoch = 0
    random: random.Random

    def __init__(
        self,
        config: SoftRAGConfig,
        compressor_tokenizer: PreTrainedTokenizerBase,
        decoder_tokenizer: PreTrainedTokenizerBase,
        *,
        noise: float = 0.0,
        seed: int = 0,
    ) -> None:
        self.config = config
        self.decoder_tokenizer = decoder_tokenizer
        self.document_prompt = DocumentPrompt.from_config(config, compressor_tokenizer)
        self.rag_prompt = RagPrompt.from_config(config, decoder_tokenizer)
        self.noise = noise
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
            lessons with a teacher what it reads, as `TextTeacher.compare` takes it.

        Raises:
            ValueError: A prompt's placeholders are not as many as its documents' soft tokens.
        """
        lessons, read = [], []
        for row in rows:
            self.random = random.Random(f"{self.seed}-{self.epoch}-{row!r}")
            if self.config.rates:
                rate = self.random.choice(self.config.rates)
                self.document_prompt = self.document_prompt.at_rate(rate)
            lesson = self._checked(row)
            lessons.append(lesson)
            read.append(self._with_noise(lesson.prompt))
        prompts = [lesson.prompt for lesson in lessons]
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
        return tensors

    def _checked(self, row: Any) -> Lesson:  # noqa: ANN401
        lesson = self.lesson(row)
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

    def _with_noise(self, prompt: PromptRow) -> PromptRow:
        if not self.noise:
            return prompt
        # <MEM> and <AE> are the last two; they would call for soft tokens.
        words = len(self.decoder_tokenizer) - 2
        read = [
            self.random.randrange(words) if self.random.random() < self.noise else token
            for token in _answer(prompt)
        ]
        return PromptRow(prompt.input_ids[: prompt.answer_start] + read, prompt.answer_start)


def _answer(prompt: PromptRow) -> list[int]:
    return prompt.input_ids[prompt.answer_start :]


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
        teacher: Whether every lesson comes with the text that a `TextTeacher` reads.
        seed: Of every random choice.
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
        teacher: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(config, compressor_tokenizer, decoder_tokenizer, seed=seed)
        self.min_documents = min_documents
        self.max_documents = max_documents
        self.text_share = text_share
        self.teacher = teacher

    def lesson(self, row: QuestionRow) -> Lesson:
        """Compress a question's documents; teach its first answer."""
        if not row.answers:
            raise ValueError(
                f"Question {row.id!r} has no answer to teach. Give it one, or have a teacher give "
                "it: python -m softrag_trainers label."
            )
        chosen = self._choose(row)
        documents = [row.documents[index] for index in chosen]
        question, answer = row.question, row.answers[0]
        for_question = question if self.config.query_dependent else None
        rendered = [self.document_prompt.render(text, for_question) for text in documents]
        as_text, from_text = self.random.random() < self.text_share, None
        if as_text or self.teacher:
            # Cut where the compressor would cut, so that both read the same.
            texts = [
                cut_text(self.document_prompt, text, document)
                for text, document in zip(documents, rendered, strict=True)
            ]
            from_text = self.rag_prompt.render(question, texts, answer)
        teacher = from_text if self.teacher else None
        if as_text and from_text is not None:
            return Lesson([], from_text, teacher=teacher)
        lengths = [document.n_memory for document in rendered]
        prompt = self.rag_prompt.render(question, lengths, answer)
        relevance = row.relevance or (row.gold if any(row.gold) else ())
        said = [float(relevance[index]) for index in chosen if relevance]
        return Lesson(rendered, prompt, said, teacher)

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


@dataclass(frozen=True, slots=True)
class TextPiece:
    """Consecutive chunks of one text, as token ids of the compressor.

    Attributes:
        chunks: What is compressed, one memory each.
        following: The tokens behind the last chunk; empty at the end of a text.
    """

    chunks: tuple[list[int], ...]
    following: list[int] = field(default_factory=list)


_SENTENCE = re.compile(r"[^.!?\n]{20,400}[.!?]")
# Names (runs of capitalised words) and numbers: what questions most often ask for.
_ASKED_FOR = re.compile(
    r"(?<=[a-z,;:(] )(?:[A-Z][\w'\u2019-]+(?: (?:of |the |de |von |and )?[A-Z][\w'\u2019-]+){0,3}"
    r"|\d[\d,.]*\d|\d)\b"
)
_BLANK = "____"


class PretrainingCollator(MemoryCollator):
    """Texts reconstructed, continued, quoted or asked about from memories.

    Auto-encoding and text continuation are the papers' two tasks (PISCO section 3, OSCAR section
    3.3). Two are ours, and teach the decoder to find a passage among several memories, as questions
    will ask it to; some of the batch's other chunks stand around the right one. Quoting: given a
    few words, say what follows them. Cloze: in the prompt of a question, given a part of a sentence
    with a name or number left out, say what is missing (salient spans, after REALM, arXiv
    2002.08909, section 3.4).

    Args:
        config: The model's.
        compressor_tokenizer: The model's.
        decoder_tokenizer: The model's.
        continuation: Share of lessons that continue the text.
        quotation: Share of lessons that quote one chunk among several.
        cloze: Share of lessons that ask for a name or number of one chunk among several; a chunk
            without any is quoted.
        among: Chunks that a quotation or a missing word is to be found among.
        noise: As in `MemoryCollator`, for auto-encoding and quoting.
        seed: Of every random choice.
    """

    cue_tokens = 8
    quotation_tokens = 32

    def __init__(
        self,
        config: SoftRAGConfig,
        compressor_tokenizer: PreTrainedTokenizerBase,
        decoder_tokenizer: PreTrainedTokenizerBase,
        *,
        continuation: float = 0.15,
        quotation: float = 0.0,
        cloze: float = 0.0,
        among: int = 5,
        noise: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__(config, compressor_tokenizer, decoder_tokenizer, noise=noise, seed=seed)
        if continuation + quotation + cloze > 1:
            raise ValueError(
                f"continuation ({continuation}), quotation ({quotation}) and cloze ({cloze}) add "
                "up to more than 1; auto-encoding gets what they leave."
            )
        self.continuation = continuation
        self.quotation = quotation
        self.cloze = cloze
        self.among = among
        self._same_tokens = compressor_tokenizer.get_vocab() == decoder_tokenizer.get_vocab()
        self._auto_encoding_id = token_id(decoder_tokenizer, AUTO_ENCODING_TOKEN)
        self._around: list[list[int]] = []

    def __call__(self, rows: Sequence[TextPiece]) -> dict[str, torch.Tensor]:
        """Collate rows; quotations and gaps are hidden among the batch's own chunks."""
        self._around = [chunk for row in rows for chunk in row.chunks]
        return super().__call__(rows)

    def lesson(self, row: TextPiece) -> Lesson:
        """Draw a task for a piece of text."""
        draw = self.random.random()
        if draw < self.continuation and row.following:
            return self._lay_out(row.chunks, [], row.following, reconstruct=False)
        draw -= self.continuation
        if 0 <= draw < self.quotation + self.cloze:
            chunk = self.random.choice(row.chunks)
            gap = self._gap(chunk) if draw >= self.quotation else None
            return self._quote(chunk) if gap is None else self._ask(chunk, *gap)
        whole = [token for chunk in row.chunks for token in chunk]
        return self._lay_out(row.chunks, [], whole, reconstruct=True)

    def _hide(self, chunk: list[int]) -> list[list[int]]:
        """Return a chunk among others of the batch, at a random place."""
        others = [other for other in self._around if other is not chunk]
        chunks = self.random.sample(others, min(self.among - 1, len(others)))
        chunks.insert(self.random.randint(0, len(chunks)), chunk)
        return chunks

    def _quote(self, chunk: list[int]) -> Lesson:
        start = self.random.randint(0, max(0, len(chunk) - 2 * self.cue_tokens))
        quoted = chunk[start : start + self.cue_tokens + self.quotation_tokens]
        cue = min(self.cue_tokens, len(quoted) // 2)
        return self._lay_out(self._hide(chunk), quoted[:cue], quoted[cue:], reconstruct=True)

    def _gap(self, chunk: list[int]) -> tuple[str, str] | None:
        """Return a part of a sentence with a gap, and what fills it; None: nothing to leave out."""
        text = str(self.document_prompt.tokenizer.decode(chunk))
        sentences = (sentence.strip() for sentence in _SENTENCE.findall(text))
        found = [(each, match) for each in sentences for match in _ASKED_FOR.finditer(each)]
        if not found:
            return None
        sentence, match = self.random.choice(found)
        # A part of the sentence: the fewer words it shares, the more it must be understood.
        before = sentence[: match.start()].split(" ")[-self.random.randint(4, 17) :]
        after = sentence[match.end() :].split(" ")[: self.random.randint(2, 12)]
        return " ".join(before) + _BLANK + " ".join(after), match.group()

    def _ask(self, chunk: list[int], question: str, answer: str) -> Lesson:
        documents = [self.document_prompt.render(each) for each in self._hide(chunk)]
        lengths = [document.n_memory for document in documents]
        return Lesson(documents, self.rag_prompt.render(question, lengths, answer))

    def _lay_out(
        self, chunks: Sequence[list[int]], cue: list[int], learned: list[int], *, reconstruct: bool
    ) -> Lesson:
        documents = [self.document_prompt.render(chunk) for chunk in chunks]
        memories = self.rag_prompt.render_memories([document.n_memory for document in documents])
        task = [self._auto_encoding_id] if reconstruct else []
        before = [*memories, *task, *self._for_decoder(cue)]
        prompt = PromptRow(before + self._for_decoder(learned), len(before))
        return Lesson(documents, prompt)

    def _for_decoder(self, ids: list[int]) -> list[int]:
        if self._same_tokens or not ids:
            return ids
        return encode_text(self.decoder_tokenizer, str(self.document_prompt.tokenizer.decode(ids)))
