"""Text: cleaned, split and measured. It knows nothing of files, prompts and models."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterable
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

from softrag.checks import check_count

if TYPE_CHECKING:
    from semantic_text_splitter import TextSplitter
    from transformers import PreTrainedTokenizerBase

_NEWLINES = re.compile(r"\r\n|[\r\v\f\x1c-\x1e\x85\u2028]")
_SPACES = re.compile(r"[\u00a0\u2000-\u200a\u202f\u205f\u3000]")
# Control characters, and what has no width and no meaning: soft hyphen, zero-width space, byte
# order mark. Joiners stay: Indic scripts and emoji are spelled with them.
_INVISIBLE = re.compile(r"[\x00-\x08\x0e-\x1b\x1f\x7f-\x84\x86-\x9f\u00ad\u200b\ufeff]")
_LONE_SURROGATES = re.compile(r"[\ud800-\udfff]")
_INNER_BLANKS = re.compile(r"(?<=\S)[ \t]+")
# Looking back keeps it linear: else every blank of a long run would look for the line's end.
_BLANK_LINE_ENDS = re.compile(r"(?<![ \t])[ \t]+$", re.MULTILINE)
_SENTENCE_PART = re.compile(r"[^\s.!?\u3002\uff01\uff1f]+")
# Characters; the splitter takes quadratic time over what it sees no border in.
_LONG_WORD = 2000
_MANY_NEWLINES = re.compile(r"\n{3,}")


class TextSpan(NamedTuple):
    """A piece of a text.

    Attributes:
        text: The piece.
        start: Offset of its first character in the whole text.
        end: Offset after its last character.
        n_tokens: Its length in tokens.
    """

    text: str
    start: int
    end: int
    n_tokens: int


def clean_text(text: str) -> str:
    r"""Return the text as it is compressed, embedded and shown.

    Unicode in its composed form, `\n` at line ends, no invisible characters, one space where there
    were several, at most one empty line. Indentation stays. Cleaning twice changes nothing.

    >>> clean_text("Caf\u0065\u0301  au\u00a0lait\r\n\r\n\r\n\r\nfor\u00adever ")
    'Café au lait\n\nforever'
    """
    text = _LONE_SURROGATES.sub("\ufffd", text)
    text = _NEWLINES.sub("\n", text).replace("\u2029", "\n\n")
    text = _INVISIBLE.sub("", _SPACES.sub(" ", text))
    # After the removals, which can bring a letter and its accent together.
    text = unicodedata.normalize("NFC", text)
    text = _INNER_BLANKS.sub(" ", _BLANK_LINE_ENDS.sub("", text))
    return _MANY_NEWLINES.sub("\n\n", text).strip()


def split_text(text: str, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> list[TextSpan]:
    """Split a text where its meaning allows: between paragraphs, else sentences, else words.

    Only whitespace between the pieces is left out. A word of thousands of characters is cut first.

    Args:
        text: What to split, cleaned.
        tokenizer: The compressor's; it measures the pieces.
        max_tokens: Most tokens in a piece. A single character that takes more is a piece by itself.

    Returns:
        The pieces in order; none for a blank text.
    """
    check_count("max_tokens", max_tokens)
    splitter = _splitter(tokenizer, max_tokens)
    found = [
        (start + offset, piece)
        for start, end in _without_long_words(text)
        for offset, piece in splitter.chunk_indices(text[start:end])
    ]
    if not found:
        return []
    token_ids = tokenizer(
        [piece for _, piece in found], add_special_tokens=False, split_special_tokens=True
    )["input_ids"]
    return [
        TextSpan(piece, start, start + len(piece), len(ids))
        for (start, piece), ids in zip(found, token_ids, strict=True)
    ]


def memory_length(n_tokens: int, rate: int) -> int:
    """Return how many soft tokens a document gets: one for every `rate` tokens begun, at least one.

    >>> [memory_length(n, 16) for n in (0, 16, 17, 128)]
    [1, 1, 2, 8]

    Args:
        n_tokens: Length of the document in compressor tokens.
        rate: Document tokens per soft token.
    """
    if n_tokens < 0 or rate < 1:
        raise ValueError(
            "Expected n_tokens of at least 0 and a rate of at least 1, "
            f"found {n_tokens} and {rate}."
        )
    return max(1, -(-n_tokens // rate))


def _without_long_words(text: str) -> Iterable[tuple[int, int]]:
    """Return where the parts of a text are that end where a word becomes too long; mostly one."""
    cuts = (
        at
        for part in _SENTENCE_PART.finditer(text)
        for at in range(part.start() + _LONG_WORD, part.end(), _LONG_WORD)
    )
    return pairwise([0, *cuts, len(text)])


# Building a splitter reads the whole vocabulary (0.1 to 1 s); one model needs one or two.
@lru_cache(maxsize=8)
def _splitter(tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> TextSplitter:
    # Imported here, so that training needs no splitter.
    from semantic_text_splitter import TextSplitter

    if not tokenizer.is_fast:
        raise TypeError(
            f"Splitting needs a fast tokenizer, found {type(tokenizer).__name__}. "
            "Load it with AutoTokenizer.from_pretrained(..., use_fast=True)."
        )
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    # Special tokens in a text are read as plain text, as in `DocumentPrompt`: counted as one token
    # each, a text full of them would get pieces longer than they look, to be cut off later.
    state["added_tokens"] = [token for token in state["added_tokens"] if not token["special"]]
    state |= {"post_processor": None, "truncation": None, "padding": None}
    return TextSplitter.from_huggingface_tokenizer_str(json.dumps(state), max_tokens)
