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

from transformers import PreTrainedTokenizerBase

from softrag.prompt import encode_with_offsets

_WORD = re.compile(r"\w+|[^\w\s]")
# Not what closes a sentence or a bracket.
_OPENS_AN_ANSWER = re.compile(r"[\w\"'\u201c\u2018(\[$€£-]")
_END = -1


class _Cursor(NamedTuple):
    """Where a copy has come to.

    Attributes:
        rest: Tokens that come before `place`: those of an answer's first word, which has no space
            in front of it and so may have other tokens than in its text.
        place: Of the next token in `CopySource.ids`.
    """

    rest: tuple[int, ...]
    place: int


class CopySource:
    """Texts that an answer may copy, as tokens.

    Args:
        tokenizer: The decoder's, a fast one.
        texts: What may be copied.

    Attributes:
        ids: The tokens of all texts; -1 behind each.
        begins: Of each token, whether a word begins there, or what stands between words.
        openings: Where an answer may begin, by its first token.
        jumps: Where a copy may go on from another word, by that word's first token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> None:
        self.ids: list[int] = []
        self.begins: list[bool] = []
        self.openings: dict[int, list[_Cursor]] = defaultdict(list)
        self.jumps: dict[int, list[_Cursor]] = defaultdict(list)
        # An answer is one line.
        lines = [" ".join(text.split()) for text in texts]
        words: list[tuple[str, int]] = []
        for line, (ids, offsets) in zip(lines, encode_with_offsets(tokenizer, lines), strict=True):
            words += self._add(line, ids, offsets)
        first = list({word for word, _ in words if _OPENS_AN_ANSWER.match(word)})
        alone = dict(zip(first, encode_with_offsets(tokenizer, first), strict=True))
        for word, behind in words:
            ids, _ = alone.get(word, ([], []))
            if ids:
                self.openings[ids[0]].append(_Cursor(tuple(ids[1:]), behind))

    def _add(
        self, line: str, ids: Sequence[int], offsets: Sequence[tuple[int, int]]
    ) -> Iterator[tuple[str, int]]:
        """Take the tokens of a line; yield its words with the place behind each."""
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
                    self.jumps[token].append(_Cursor((), len(self.ids) + 1))
            self.ids.append(token)
            self.begins.append(begins)
        borders.append((len(line), len(self.ids)))
        self.ids.append(_END)
        self.begins.append(True)
        for (start, _), (end, behind) in pairwise(borders):
            yield line[start:end].strip(), behind


class Copier:
    """An answer on its way, and the places it may be copied from.

    Args:
        source: What may be copied.
        end_ids: Tokens that end an answer.
    """

    def __init__(self, source: CopySource, end_ids: set[int]) -> None:
        self._source = source
        self._end_ids = end_ids
        self._cursors: list[_Cursor] | None = None  # None: nothing is written yet

    def favoured(self) -> set[int]:
        """Return the tokens that go on as the texts do; none behind words of the model's own.

        Behind a whole word these are also the words elsewhere, and the end.
        """
        if self._cursors is None:
            return set(self._source.openings)
        found = {self._next(cursor) for cursor in self._cursors} - {_END}
        if any(map(self._is_between_words, self._cursors)):
            found |= self._source.jumps.keys() | self._end_ids
        return found

    def push(self, token: int) -> None:
        """Take the token that was chosen."""
        if self._cursors is None:
            self._cursors = self._source.openings.get(token, [])
            return
        followed = [
            _Cursor(cursor.rest[1:], cursor.place) if cursor.rest else _Cursor((), cursor.place + 1)
            for cursor in self._cursors
            if self._next(cursor) == token
        ]
        # Words begin alike: which one it is may be known a token later.
        if not self._cursors or any(map(self._is_between_words, self._cursors)):
            followed += self._source.jumps.get(token, [])
        self._cursors = list(dict.fromkeys(followed))

    def _next(self, cursor: _Cursor) -> int:
        return cursor.rest[0] if cursor.rest else self._source.ids[cursor.place]

    def _is_between_words(self, cursor: _Cursor) -> bool:
        return not cursor.rest and self._source.begins[cursor.place]
