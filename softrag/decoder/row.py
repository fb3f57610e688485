"""One request on its way from prompt to answer. It knows no model."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from time import perf_counter

import torch

from softrag.decoder.base import DecodeRequest, DecodeResult
from softrag.decoder.copying import Copier
from softrag.decoder.detokenizer import Detokenizer
from softrag.decoder.sampling import NO_BIASES, Biases
from softrag.memory import Memory
from softrag.prompt import PromptRow


class Row:
    """A request, its prompt and what has been answered so far.

    Attributes:
        request: What was asked.
        prompt: Its layout.
        copier: Says which tokens its copy bias favours; None without one.
        finish_reason: Why the answer ended; None while it goes on.
        error: What broke it, to be raised to its caller.
        cancelled: Whether its caller is gone.
        prompt_state: As in `DecodeResult`.
        n_started: Steps it takes or took part in; the tokens of the last may not be here yet.
        wake: Wakes the caller, when there is something new for it.
    """

    def __init__(
        self,
        request: DecodeRequest,
        prompt: PromptRow,
        detokenizer: Detokenizer,
        *,
        copier: Copier | None = None,
        streamed: bool = False,
    ) -> None:
        self.request = request
        self.prompt = prompt
        self.copier = copier
        self.finish_reason: str | None = None
        self.error: BaseException | None = None
        self.cancelled = False
        self.n_started = 0
        self.prompt_state: torch.Tensor | None = None
        self.wake: Callable[[], None] = lambda: None
        self._detokenizer = detokenizer
        # Nobody looks at the text before the end: put all tokens in words at once then.
        self._at_once = not streamed and not request.stop
        self._pending: list[int] = []
        self._deltas: deque[str] = deque()
        self._logprobs: list[float] = []
        self._first_token_s = 0.0
        self._started = perf_counter()
        self._random = torch.Generator()
        if request.seed is None:
            self._random.seed()
        else:
            self._random.manual_seed(int(request.seed))

    @property
    def done(self) -> bool:
        """Whether no more tokens come."""
        return self.finish_reason is not None or self.error is not None

    @property
    def memories(self) -> list[Memory]:
        """The memories it reads, in order."""
        return [document for document in self.request.documents if isinstance(document, Memory)]

    def seed(self) -> int:
        """Return the number its sampling starts from."""
        return self._random.initial_seed() & (2**62 - 1)

    def sample(self, logits: torch.Tensor) -> int:
        """Return a token drawn from `(vocabulary,)` logits at the request's temperature."""
        # On the CPU and with a generator of its own, so that neighbours in the batch and the
        # device change nothing.
        weights = (logits.float().cpu() / self.request.temperature).softmax(-1)
        return int(torch.multinomial(weights, 1, generator=self._random))

    def push(self, token: int, logprob: float, end_ids: set[int]) -> None:
        """Take the chosen token; sets `finish_reason` when it was the last."""
        if not self._logprobs:
            self._first_token_s = perf_counter() - self._started
        self._logprobs.append(logprob)
        if self.copier is not None:
            self.copier.push(token)
        ended = token in end_ids
        delta = ""
        if not ended and self._at_once:
            self._pending.append(token)
        elif not ended:
            delta = self._detokenizer.push(token)
        reason = None
        if ended or self._detokenizer.stopped:
            reason = "stop"
        elif len(self._logprobs) == self.request.max_new_tokens:
            reason = "length"
        if reason:
            if self._pending:
                self._detokenizer.extend(self._pending)
            delta += self._detokenizer.finish()
        if delta:
            self._deltas.append(delta)
        # Last: another thread reads the whole answer as soon as this is set.
        self.finish_reason = reason

    @property
    def has_delta(self) -> bool:
        """Whether text became certain since it was last taken."""
        return bool(self._deltas)

    def take_delta(self) -> str:
        """Return the text that became certain since the last call, from any thread."""
        return "".join(self._deltas.popleft() for _ in range(len(self._deltas)))

    def result(self) -> DecodeResult:
        """Return the answer so far."""
        return DecodeResult(
            text=self._detokenizer.text,
            prompt_tokens=len(self.prompt.input_ids),
            soft_tokens=sum(len(memory) for memory in self.memories),
            completion_tokens=len(self._logprobs),
            first_token_s=self._first_token_s,
            finish_reason="stop" if self.finish_reason == "stop" else "length",
            token_logprobs=tuple(self._logprobs),
            prompt_state=self.prompt_state,
            opening=self._detokenizer.opening(self.request.lookahead),
        )


def biases_of(rows: Sequence[Row]) -> Biases:
    """Return what the rows' copy biases add to the logits of their next tokens, row by row."""
    favoured = [
        (place, tokens, row.request.copy_bias)
        for place, row in enumerate(rows)
        if row.copier is not None and len(tokens := row.copier.favoured())
    ]
    return Biases(*zip(*favoured, strict=True)) if favoured else NO_BIASES
