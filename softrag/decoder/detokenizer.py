"""From token ids to text, one at a time. It knows nothing of models."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase


class Detokenizer:
    """The text of a growing answer, given out as soon as it cannot change any more.

    A token may end in the middle of a character, and a stop string may be spread over several
    tokens; such tails are held back until they are decided.

    Args:
        tokenizer: The decoder's.
        stop: Strings that end the text; they are not part of it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._ids: list[int] = []
        self.text = ""
        self.stopped = False

    def push(self, token_id: int) -> str:
        """Take one token and return the text that became certain."""
        self._ids.append(token_id)
        text = self._decode()
        found = [at for at in map(text[len(self.text) :].find, self._stop) if at >= 0]
        if found:
            self.stopped = True
            return self._emit(text[: len(self.text) + min(found)])
        # Byte-level vocabularies split characters; "\ufffd" stands for a part of one.
        return self._emit(text[: len(text.rstrip("\ufffd")) - self._undecided(text)])

    def extend(self, token_ids: Sequence[int]) -> None:
        """Take tokens whose text is asked for at the end only (`finish`); no stop strings."""
        self._ids.extend(token_ids)

    def finish(self) -> str:
        """Return what was held back: no more tokens come."""
        return "" if self.stopped else self._emit(self._decode())

    def opening(self, count: int) -> str | None:
        """Return what the first tokens spell, whatever comes after them; None for none."""
        return self._decode(count) if count else None

    def _decode(self, count: int | None = None) -> str:
        # All ids each time: what one token spells depends on its neighbours (leading spaces,
        # bytes of a character), and a few hundred ids take microseconds.
        text = self._tokenizer.decode(
            self._ids[:count], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return str(text)

    def _undecided(self, text: str) -> int:
        """Return the length of the longest end of the certain text that begins a stop string."""
        text = text.rstrip("\ufffd")
        return max(
            (
                length
                for stop in self._stop
                for length in range(1, len(stop))
                if text.endswith(stop[:length])
            ),
            default=0,
        )

    def _emit(self, text: str) -> str:
        new = text[len(self.text) :]
        self.text += new
        return new
