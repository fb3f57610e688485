"""Which tokens go on as a document does: what a copy bias favours.

Memories tell what a document says, and blur how its names and numbers are spelled; the text they
were made from lies beside them. An answer may copy from any word on, and from any other word once
one is done. It knows no model.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from softrag.prompt import encode_with_offsets

_WORD = re.compile(r"\w+|[^\w\s]")
# Not what closes a sentence or a bracket.
_OPENS_AN_ANSWER = re.compile(r"[\w\"'\u201c\u2018(\[$€£-]")
_END = -1


class CopySource:
    """A text that answers may copy, as tokens.

    Args:
        tokenizer: The decoder's, a fast one.
        text: What may be copied.

    Attributes:
        ids: Its tokens; -1 behind them.
        begins: Of each token, whether a word begins there, or what stands between words.
        openings: Where an answer may begin, by its first token.
        jumps: Where a copy may go on from another word, by that word's first token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, text: str) -> None:
        self.ids: list[int] = []
        self.begins: list[bool] = []
        self.openings: dict[int, list[_Cursor]] = defaultdict(list)
        self.jumps: dict[int, list[_Cursor]] = defaultdict(list)
        line = " ".join(text.split())  # An answer is one line.
        words = list(self._words(line, *encode_with_offsets(tokenizer, [line])[0]))
        first = list({word for word, _ in words if _OPENS_AN_ANSWER.match(word)})
        alone = dict(zip(first, encode_with_offsets(tokenizer, first), strict=True))
        for word, behind in words:
            ids, _ = alone.get(word, ([], []))
            if ids:
                self.openings[ids[0]].append(_Cursor(self, tuple(ids[1:]), behind))

    def _words(
        self, line: str, ids: Sequence[int], offsets: Sequence[tuple[int, int]]
    ) -> Iterator[tuple[str, int]]:
        """Take the tokens of the line; yield its words with the place behind each."""
        starts = {found.start() for found in _WORD.finditer(line)}
        borders: list[tuple[int, int]] = []  # characters before a word, tokens before it
        for token, (start, end) in zip(ids, offsets, strict=True):
            # Some tokenizers count the space in front of a word, others do not.
            start += line[start:end].startswith(" ")
            # A space may be a token by itself; the word behind it begins there.
            begins = start in starts
            starts.discard(start)
            if begins:
                borders.append((start, len(self.ids)))
                if start and line[start - 1] == " ":
                    self.jumps[token].append(_Cursor(self, (), len(self.ids) + 1))
            self.ids.append(token)
            self.begins.append(begins)
        borders.append((len(line), len(self.ids)))
        self.ids.append(_END)
        self.begins.append(True)
        for (start, _), (end, behind) in pairwise(borders):
            yield line[start:end].strip(), behind


class _Cursor(NamedTuple):
    """Where a copy has come to.

    Attributes:
        source: What it copies.
        rest: Tokens that come before `place`: those of an answer's first word, which has no space
            in front of it and so may have other tokens than in its text.
        place: Of the next token in the source's `ids`.
    """

    source: CopySource
    rest: tuple[int, ...]
    place: int

    @property
    def next(self) -> int:
        """The token to come, -1 at the text's end."""
        return self.rest[0] if self.rest else self.source.ids[self.place]

    @property
    def is_between_words(self) -> bool:
        """Whether a word is done."""
        return not self.rest and self.source.begins[self.place]

    def moved(self) -> _Cursor:
        """Return where it is behind the token to come."""
        if self.rest:
            return self._replace(rest=self.rest[1:])
        return self._replace(place=self.place + 1)


class Copier:
    """An answer on its way, and the places it may be copied from.

    Args:
        sources: What may be copied.
        end_ids: Tokens that end an answer.
    """

    def __init__(self, sources: Sequence[CopySource], end_ids: set[int]) -> None:
        self._sources = sources
        self._cursors: list[_Cursor] | None = None  # None: nothing is written yet
        # Made once: they are many, and wanted behind every word.
        self._elsewhere = np.array(
            [*end_ids, *(token for source in sources for token in source.jumps)], dtype=np.int64
        )

    def favoured(self) -> np.ndarray:
        """Return the tokens that go on as the texts do, `(n,)` and some of them more than once.

        None behind words of the model's own. Behind a whole word also those of the words
        elsewhere, and the end.
        """
        if self._cursors is None:
            found = [token for source in self._sources for token in source.openings]
        else:
            found = [token for cursor in self._cursors if (token := cursor.next) != _END]
        favoured = np.array(found, dtype=np.int64)
        if self._is_between_words():
            favoured = np.concatenate([favoured, self._elsewhere])
        return favoured

    def push(self, token: int) -> None:
        """Take the token that was chosen."""
        if self._cursors is None:
            self._cursors = self._at(token, [source.openings for source in self._sources])
            return
        followed = [cursor.moved() for cursor in self._cursors if cursor.next == token]
        # Words begin alike: which one it is may be known a token later.
        if not self._cursors or self._is_between_words():
            followed += self._at(token, [source.jumps for source in self._sources])
        self._cursors = list(dict.fromkeys(followed))

    def _is_between_words(self) -> bool:
        return any(cursor.is_between_words for cursor in self._cursors or ())

    @staticmethod
    def _at(token: int, places: Sequence[dict[int, list[_Cursor]]]) -> list[_Cursor]:
        return [cursor for by_token in places for cursor in by_token.get(token, ())]
