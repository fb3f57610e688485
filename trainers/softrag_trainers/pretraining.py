"""Texts as lessons: cut into pieces, then reconstructed, continued, quoted or asked about."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from softrag.config import SoftRAGConfig
from softrag.prompt import (
    AUTO_ENCODING_TOKEN,
    DocumentPrompt,
    PromptRow,
    encode_text,
    token_id,
)
from softrag_trainers.collators import Lesson, MemoryCollator
from softrag_trainers.examples import TextRow
from softrag_trainers.options import TextLessons


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
    2002.08909, section 3.4). A query-dependent compressor reads the question of a cloze; for the
    other tasks, which have none, it reads the text alone.

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
        saying: As in `MemoryCollator`.
        teacher: Whether every cloze comes with the text that a `TextTeacher` reads.
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
        saying: bool = False,
        teacher: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(
            config, compressor_tokenizer, decoder_tokenizer, noise=noise, saying=saying, seed=seed
        )
        if continuation + quotation + cloze > 1:
            raise ValueError(
                f"continuation ({continuation}), quotation ({quotation}) and cloze ({cloze}) add "
                "up to more than 1; auto-encoding gets what they leave."
            )
        self.continuation = continuation
        self.quotation = quotation
        self.cloze = cloze
        self.among = among
        self.teacher = teacher
        self._same_tokens = compressor_tokenizer.get_vocab() == decoder_tokenizer.get_vocab()
        self._auto_encoding_id = token_id(decoder_tokenizer, AUTO_ENCODING_TOKEN)
        self._around: list[list[int]] = []

    def lessons(self, rows: Sequence[TextPiece]) -> list[Lesson]:
        """Return a lesson for every row; what is quoted is hidden among the rows' own chunks."""
        self._around = [chunk for row in rows for chunk in row.chunks]
        return super().lessons(rows)

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
        for_question = question if self.config.query_dependent else None
        around = self._hide(chunk)
        documents = [self.document_prompt.render(each, for_question) for each in around]
        lengths = [document.n_memory for document in documents]
        prompt = self.rag_prompt.render(question, lengths, answer)
        holds = [each is chunk for each in around if self.config.query_dependent]
        relevance = [float(each) for each in holds]
        teacher = None
        if self.teacher:
            texts = [str(self.document_prompt.tokenizer.decode(each)) for each in around]
            teacher = self.rag_prompt.render(question, texts, answer)
        return Lesson(documents, prompt, relevance, teacher, holds=holds)

    def _lay_out(
        self, chunks: Sequence[list[int]], cue: list[int], learned: list[int], *, reconstruct: bool
    ) -> Lesson:
        alone = self.document_prompt.without_question()
        documents = [alone.render(chunk) for chunk in chunks]
        memories = self.rag_prompt.render_memories([document.n_memory for document in documents])
        task = [self._auto_encoding_id] if reconstruct else []
        before = [*memories, *task, *self._for_decoder(cue)]
        prompt = PromptRow(before + self._for_decoder(learned), len(before))
        return Lesson(documents, prompt)

    def _for_decoder(self, ids: list[int]) -> list[int]:
        if self._same_tokens or not ids:
            return ids
        return encode_text(self.decoder_tokenizer, str(self.document_prompt.tokenizer.decode(ids)))


class TextPieces(Dataset[TextPiece]):
    """Texts cut into lessons: some consecutive chunks, and what follows them.

    Chunk lengths and counts are drawn once, so that an epoch is the same on every process.

    Args:
        texts: What to cut.
        prompt: Gives the compressor's tokens.
        data: Chunk lengths and counts.
        seed: Of the lengths.
    """

    def __init__(
        self,
        texts: Sequence[TextRow],
        prompt: DocumentPrompt,
        data: TextLessons,
        seed: int,
    ) -> None:
        draw = random.Random(seed)
        self.tokens: list[torch.Tensor] = []
        self.pieces: list[tuple[int, tuple[int, ...], int]] = []
        # Many texts at once: the tokenizer is parallel only within one call.
        for begin in range(0, len(texts), 1000):
            block = [row.text for row in texts[begin : begin + 1000]]
            encoded = prompt.tokenizer(
                block, add_special_tokens=False, split_special_tokens=True, verbose=False
            )
            for ids in encoded["input_ids"]:
                self._cut(ids, data, draw)
        if not self.pieces:
            raise ValueError(
                f"None of the {len(texts)} texts has {data.min_chunk_tokens} tokens or more; lower "
                "data.min_chunk_tokens or give longer texts."
            )

    def _cut(self, ids: list[int], data: TextLessons, draw: random.Random) -> None:
        position = 0
        while position < len(ids):
            borders = [position]
            for _ in range(draw.randint(1, data.chunks)):
                length = draw.randint(data.min_chunk_tokens, data.max_chunk_tokens)
                if borders[-1] + length > len(ids):
                    break
                borders.append(borders[-1] + length)
            if len(borders) == 1:
                # The rest of a text is a chunk too, unless it is much too short.
                if len(ids) - position < max(1, data.min_chunk_tokens // 2):
                    break
                borders.append(min(len(ids), position + data.max_chunk_tokens))
            after = min(len(ids), borders[-1] + data.max_chunk_tokens)
            self.pieces.append((len(self.tokens), tuple(borders), after))
            position = borders[-1]
        self.tokens.append(torch.tensor(ids, dtype=torch.int32))

    def first(self, count: int) -> TextPieces:
        """Keep only so many pieces."""
        self.pieces = self.pieces[:count]
        return self

    def __len__(self) -> int:
        """Return the number of lessons."""
        return len(self.pieces)

    def __getitem__(self, index: int) -> TextPiece:
        """Return one lesson's tokens."""
        text, borders, after = self.pieces[index]
        tokens = self.tokens[text]
        chunks = tuple(tokens[start:stop].tolist() for start, stop in pairwise(borders))
        return TextPiece(chunks, tokens[borders[-1] : after].tolist())
