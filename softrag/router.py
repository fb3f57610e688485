"""Whether to trust an answer from memories, or to answer from text instead. It knows no model.

A linear probe reads how the decoder began to answer from memories: whether its first words stand
in the texts, which lie beside the memories and need no model to be looked through; how sure it was
of them; whether the question's words stand there, so that the text would answer; and its state at
the prompt's last token, halfway through the layers (where OverflowGuard finds that compression lost
what was asked for). The score is what text is expected to be better by. From the threshold on, text
answers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from softrag.decoder import DecodeResult
from softrag.errors import MemoryMismatchError, UnreadableFileError

FORMAT = 3

N_WITHOUT_STATE = 9
"""Of the `features` so many are there without the state; they come first."""

LOOKAHEAD = 8
"""First tokens of an answer that a router looks at, unless told otherwise."""


@dataclass(frozen=True, kw_only=True)
class Router:
    """Decides per question between memories and text; made by `softrag eval --calibrate`.

    Attributes:
        fingerprint: Of the compressor whose memories it was calibrated on.
        threshold: Scores from here on are answered from text.
        lookahead: How many of the answer's first tokens it looks at; at least 1.
        weights: One per value of `features`.
        bias: Added to the weighted features.
        with_state: Whether it looks at `DecodeResult.prompt_state` too.
        format: Version of the file.
    """

    fingerprint: str
    threshold: float
    lookahead: int
    weights: Sequence[float]
    bias: float
    with_state: bool
    format: int = FORMAT

    def check(self, fingerprint: str) -> None:
        """Refuse a model that the router was not calibrated on.

        Raises:
            MemoryMismatchError: The compressor is another one.
        """
        if fingerprint != self.fingerprint:
            raise MemoryMismatchError(
                f"The router was calibrated on memories of the model {self.fingerprint}, but the "
                f"loaded model is {fingerprint}. Calibrate one for it: softrag eval --calibrate."
            )

    def score(self, result: DecodeResult, question: str, texts: Sequence[str]) -> float:
        """Return what text is expected to be better by than this result of memories, in percent.

        Args:
            result: The answer from memories.
            question: What was asked.
            texts: What the memories were made of.

        Raises:
            ValueError: The decoder did not say what the router looks at.
        """
        values = features(
            result, question, texts, lookahead=self.lookahead, with_state=self.with_state
        )
        if len(values) != len(self.weights):
            raise ValueError(
                f"The router weighs {len(self.weights)} features, the decoder gives {len(values)}. "
                "Calibrate again with this model: softrag eval --calibrate."
            )
        return float(np.dot(values, self.weights)) + self.bias

    def prefers_text(self, score: float) -> bool:
        """Tell whether a score is answered from text."""
        return score >= self.threshold

    def save(self, path: str | Path) -> None:
        """Write a JSON file; a crash leaves the old one or the new one."""
        path = Path(path)
        part = path.with_name(path.name + ".part")
        part.write_text(json.dumps(asdict(self)) + "\n", encoding="utf-8")
        part.replace(path)

    @classmethod
    def load(cls, path: str | Path) -> Router:
        """Read a file that `save` wrote.

        Raises:
            UnreadableFileError: There is no such file, or it holds something else.
        """
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
            if not isinstance(values, dict) or values.get("format") != FORMAT:
                raise ValueError(f"expected a router of format {FORMAT}")
            return cls(**values)
        except (OSError, ValueError, TypeError) as error:
            raise UnreadableFileError(
                f"{path} is no router: {error}. Make one with: softrag eval --calibrate {path}"
            ) from error


def features(
    result: DecodeResult,
    question: str,
    texts: Sequence[str],
    *,
    lookahead: int,
    with_state: bool,
) -> np.ndarray:
    """Return what a router looks at, `(features,)`.

    The first four are the log-probability of the first token; the mean and the least of the first
    `lookahead` tokens; and the share of `lookahead` that the answer fills. Then three shares of the
    opening's words that stand in the texts: of all, of those that the question does not have, and
    of names and numbers (`grounding`); and two of the question's words (`matching`). The state
    follows.

    Raises:
        ValueError: The result has no log-probabilities, no opening, or no state and one is wanted.
    """
    seen = list(result.token_logprobs[:lookahead])
    if not seen:
        raise ValueError(
            "The decoder gave no token log-probabilities, so nobody knows how sure it was. Use one "
            "that does, such as TorchDecoder, or leave the fallback off."
        )
    if result.opening is None:
        raise ValueError(
            "The decoder gave no opening of its answer, which routers look at. Ask with "
            "DecodeRequest(lookahead=...) and a decoder that gives it, such as TorchDecoder."
        )
    confidence = [seen[0], sum(seen) / len(seen), min(seen), len(seen) / lookahead]
    words = grounding(result.opening, question, texts) + matching(question, texts)
    looked_at = np.array(confidence + words)
    if not with_state:
        return looked_at
    if result.prompt_state is None:
        raise ValueError(
            "The decoder gave no prompt state, which this router looks at. Use TorchDecoder, or "
            "calibrate a router without it: softrag eval --calibrate --no-state."
        )
    return np.concatenate([looked_at, result.prompt_state.double().numpy()])


def grounding(opening: str, question: str, texts: Sequence[str]) -> list[float]:
    """Return how much of an answer's opening stands in the texts it was read from.

    Returns:
        Shares between 0 and 1: of all words; of those that are not in the question (0.5 where there
        are none: that says nothing); of names and numbers. An opening without words, or without
        names and numbers, has nothing that is missing from the texts: 1.
    """
    known = {word for text in texts for word in _words(text)}
    asked = set(_words(question))
    words = _words(opening)
    names = [word for word in _WORD.findall(opening) if word[0].isupper() or word[0].isdigit()]
    return [
        _share(words, known, 1.0),
        _share([word for word in words if word not in asked], known, 0.5),
        _share([word.casefold() for word in names], known, 1.0),
    ]


def matching(question: str, texts: Sequence[str]) -> list[float]:
    """Return how much of a question stands in the texts, best first, that could answer it.

    Returns:
        Shares between 0 and 1 of its words: in the sentence that has most of them, and in the first
        text. A question without words has none that is missing.
    """
    asked = _words(question)
    sentences = [sentence for text in texts for sentence in _SENTENCE.findall(text)]
    return [
        max((_share(asked, set(_words(each)), 1.0) for each in sentences), default=0.0),
        _share(asked, set(_words(texts[0] if texts else "")), 1.0),
    ]


_WORD = re.compile(r"\w+")
_SENTENCE = re.compile(r"[^.!?\n]+")


def _words(text: str) -> list[str]:
    return _WORD.findall(text.casefold())


def _share(words: Sequence[str], known: set[str], otherwise: float) -> float:
    return sum(word in known for word in words) / len(words) if words else otherwise
