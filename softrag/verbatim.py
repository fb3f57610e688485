"""A prompt and the text in it tokenized as one string, as research code does; text stays text.

Tokens form across the border between prompt and text, so tokenizing the parts gives other ids. But
one string no longer tells a special token of the prompt from the same letters in a document. Here
the prompt's special tokens travel as private characters that no text holds.
"""

from __future__ import annotations

import re

from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerBase

# Supplementary private use area B: unlike the one that icon fonts use, it is empty in practice.
_FIRST = 0x100000
_PRIVATE = re.compile("[\U00100000-\U0010fffd]")


class VerbatimEncoder:
    """Encodes strings of trusted prompt text (`mark`) and user text (`plain`)."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Copy the tokenizer, with a private character for each of its special tokens."""
        if not tokenizer.is_fast:
            raise TypeError(
                f"Prompts tokenized as a whole need a fast tokenizer, found "
                f"{type(tokenizer).__name__}. Its folder needs a tokenizer.json."
            )
        backend = tokenizer.backend_tokenizer
        special = {id_: t for id_, t in backend.get_added_tokens_decoder().items() if t.special}
        self._stand_in = {
            token.content: chr(_FIRST + index) for index, token in enumerate(special.values())
        }
        # The longest first: one token may be the start of another.
        by_length = sorted(self._stand_in, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, by_length)) or r"(?!)")
        self._backend = Tokenizer.from_str(backend.to_str())
        self._backend.no_truncation()
        self._backend.no_padding()
        # Special tokens written in a text are letters; only the stand-ins, which are not special
        # to this copy, are found in it.
        self._backend.encode_special_tokens = True
        self._backend.add_tokens(
            [
                AddedToken(
                    self._stand_in[token.content],
                    single_word=token.single_word,
                    lstrip=token.lstrip,
                    rstrip=token.rstrip,
                    normalized=False,
                    special=False,
                )
                for token in special.values()
            ]
        )
        self._real_id = {
            self._backend.token_to_id(self._stand_in[token.content]): id_
            for id_, token in special.items()
        }

    def mark(self, prompt: str) -> str:
        """Return prompt text in which special tokens mean themselves."""
        return self._special.sub(lambda found: self._stand_in[found[0]], prompt)

    def plain(self, text: str) -> str:
        """Return user text in which nothing means anything."""
        return _PRIVATE.sub("\ufffd", text)

    def encode(self, marked: str) -> list[int]:
        """Return the token ids of marked and plain text put together."""
        ids = self._backend.encode(marked, add_special_tokens=False).ids
        return [self._real_id.get(id_, id_) for id_ in ids]
