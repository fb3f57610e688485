"""Answers from vLLM: in a server, reached by its URL, or in this process.

What is asked and how an answer is read stands here once; the engines only carry prompts to vLLM
and tokens back (`vllm_server.py`, `vllm_plugin.py`, `vllm_local.py`).
"""

from __future__ import annotations

import os
import threading
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple, Protocol

import torch

from softrag.checks import check_count
from softrag.decoder.base import DecodeRequest, DecodeResult
from softrag.decoder.checks import check_fits
from softrag.decoder.detokenizer import Detokenizer
from softrag.decoder.prompts import BuiltPrompt, PromptBuilder
from softrag.errors import DecoderError
from softrag.export import cached_export, served_name
from softrag.memory import Memory

# Tokens per message of an answer that nobody reads as it comes: each message costs the server and
# us more than a token, but silence for long must mean that the server hangs.
_TOKENS_PER_MESSAGE = 16


class Piece(NamedTuple):
    """Some tokens of an answer.

    Attributes:
        token_ids: New ones; the one that ends the answer included.
        logprobs: Natural logarithms of their probabilities at temperature 1; empty if not known.
        finish_reason: "stop" or "length" with the last piece.
    """

    token_ids: list[int]
    logprobs: list[float]
    finish_reason: str | None


class Engine(Protocol):
    """Carries prompts to vLLM and tokens back. Safe to use from several threads."""

    def limit(self) -> int | None:
        """Return the most tokens of a prompt and its answer; None when the engine does not say."""
        ...

    def run(self, built: BuiltPrompt, sampling: dict[str, Any]) -> Generator[Piece, None, None]:
        """Answer one prompt; closing the generator stops the engine.

        Args:
            built: The prompt.
            sampling: Fields of vLLM's `SamplingParams`.
        """
        ...

    def close(self) -> None:
        """Free connections or the engine."""
        ...


class VLLMDecoder:
    """Answers with vLLM, which decodes requests together as they come.

    Args:
        prompts: Lays prompts out.
        engine: Where vLLM is.
        max_concurrent: Most requests under way; further ones wait here, not in vLLM's memory.
    """

    def __init__(self, prompts: PromptBuilder, engine: Engine, *, max_concurrent: int = 64) -> None:
        check_count("max_concurrent", max_concurrent)
        self.prompts = prompts
        self.engine = engine
        self._end_ids = sorted(prompts.prompt.end_ids)
        self._slots = threading.BoundedSemaphore(max_concurrent)
        self._threads = ThreadPoolExecutor(max_concurrent, thread_name_prefix="softrag-vllm")

    @classmethod
    def open(
        cls, where: str, checkpoint: str | Path, *, base_model: str | Path | None = None
    ) -> VLLMDecoder:
        """Use the vLLM server at a URL, or for "vllm" one in this process, with all defaults.

        The server's key, if it has one, is read from the environment variable `VLLM_API_KEY`.

        Raises:
            CheckpointError: The checkpoint is damaged or of another kind.
            MissingExtraError: vLLM is wanted in this process and not installed.
            ValueError: `where` is neither.
        """
        if where.startswith(("http://", "https://")):
            key = os.environ.get("VLLM_API_KEY")
            return cls.from_url(checkpoint, where, api_key=key, base_model=base_model)
        if where == "vllm":
            return cls.in_process(checkpoint, base_model=base_model)
        raise ValueError(
            f"decoder is {where!r}; expected 'torch', 'vllm' or the URL of a vLLM server."
        )

    @classmethod
    def from_url(
        cls,
        checkpoint: str | Path,
        url: str,
        *,
        model: str | None = None,
        api_key: str | None = None,
        base_model: str | Path | None = None,
        send_once: bool = False,
        canonical_order: bool = False,
        max_concurrent: int = 64,
        timeout_s: float = 60.0,
        retries: int = 3,
    ) -> VLLMDecoder:
        """Use a vLLM server that serves the checkpoint's exported decoder.

        Nothing is asked of the server before the first question. Of the decoder only the token
        embeddings are loaded.

        Args:
            checkpoint: The checkpoint whose memories are read.
            url: Such as `http://host:8000`.
            model: As the server calls it; None when it serves one model only, or under the name
                that `softrag export` gives.
            api_key: Of the server.
            base_model: Where the token embeddings are: the exported decoder or its base model;
                None for the base model that the checkpoint names.
            send_once: Send each memory once and its hash afterwards; the server needs softrag's
                plugin (`integrations/vllm_softrag`). Without, all embeddings travel each time.
            canonical_order: As in `PromptBuilder`.
            max_concurrent: As in the class.
            timeout_s: Longest silence of the server.
            retries: How often a request is sent again when the server is not there or busy.

        Raises:
            CheckpointError: The checkpoint is damaged or of another kind.
            MissingExtraError: `send_once` is wanted and msgpack is not installed.
        """
        from softrag.decoder.vllm_plugin import HashesEngine
        from softrag.decoder.vllm_server import EmbeddingsEngine, VLLMServer

        prompts = PromptBuilder.from_pretrained(checkpoint, canonical_order=canonical_order)
        server = VLLMServer(
            url,
            decoder=served_name(checkpoint),
            model=model,
            api_key=api_key,
            timeout_s=timeout_s,
            retries=retries,
            connections=max_concurrent,
        )
        engine: Engine = (
            HashesEngine(server, memory_ids=prompts.prompt.memory_ids)
            if send_once
            else EmbeddingsEngine(server, prompts.load_embeddings(base_model))
        )
        return cls(prompts, engine, max_concurrent=max_concurrent)

    @classmethod
    def in_process(
        cls,
        checkpoint: str | Path,
        *,
        exported: str | Path | None = None,
        base_model: str | Path | None = None,
        canonical_order: bool = False,
        max_concurrent: int = 64,
        options: Mapping[str, Any] | None = None,
    ) -> VLLMDecoder:
        """Run vLLM in this process, where it is installed.

        It starts a process of its own: a script that calls this needs the usual
        `if __name__ == "__main__":`.

        Args:
            checkpoint: The checkpoint whose memories are read.
            exported: Folder of its exported decoder; None to export it once into the cache, in
                bfloat16 on a GPU and else in float32.
            base_model: Where the checkpoint's base model is, if not where the checkpoint says.
            canonical_order: As in `PromptBuilder`.
            max_concurrent: As in the class.
            options: Further fields of vLLM's `AsyncEngineArgs`, such as `max_model_len`.

        Raises:
            CheckpointError: The checkpoint is damaged or of another kind.
            MissingExtraError: vLLM is not installed.
        """
        from softrag.decoder.vllm_local import LocalEngine

        prompts = PromptBuilder.from_pretrained(checkpoint, canonical_order=canonical_order)
        if exported is None:
            dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
            exported = cached_export(checkpoint, dtype=dtype, base_model=base_model)
        engine = LocalEngine(
            Path(exported), prompts.load_embeddings(base_model), options=options or {}
        )
        return cls(prompts, engine, max_concurrent=max_concurrent)

    @property
    def fingerprint(self) -> str:
        """Of the compressor whose memories this decoder reads."""
        return self.prompts.fingerprint

    @property
    def joins_requests(self) -> bool:
        """True: vLLM decodes requests of separate calls together as they come."""
        return True

    @property
    def copy_bias(self) -> float:
        """Zero: vLLM cannot be told at every token what to favour."""
        return 0.0

    def prompt_tokens(self, question: str, documents: Sequence[Memory | str]) -> int:
        """Count the prompt's tokens without asking vLLM."""
        return len(self.prompts.lay_out(question, documents).input_ids)

    def generate(self, requests: Sequence[DecodeRequest]) -> list[DecodeResult]:
        """Answer requests together; see `Decoder.generate`."""
        # All are checked before any is sent.
        answers = [self._begin(request) for request in requests]
        if len(answers) == 1:
            return [self._finish(answers[0])]
        futures = [self._threads.submit(self._finish, answer) for answer in answers]
        try:
            return [future.result() for future in futures]
        finally:
            for future in futures:  # After an error, those not yet sent need not be.
                future.cancel()

    def stream(self, request: DecodeRequest) -> Generator[str, None, DecodeResult]:
        """Answer in pieces of text, and return the result; see `Decoder.stream`."""
        answer = self._begin(request)
        yield from self._run(answer, tokens_per_message=1)
        return answer.result()

    def close(self) -> None:
        """Let running answers end, then free the engine."""
        self._threads.shutdown()
        self.engine.close()

    def _begin(self, request: DecodeRequest) -> _Answer:
        if request.copy_bias:
            raise ValueError(
                f"vLLM cannot be told at every token what to favour, found copy_bias "
                f"{request.copy_bias}. Set it to 0, or answer with decoder='torch'."
            )
        built = self.prompts.build(request.question, request.documents)
        check_fits(request, prompt_tokens=len(built.input_ids), limit=self.engine.limit())
        detokenizer = Detokenizer(self.prompts.prompt.tokenizer, request.stop)
        return _Answer(request, built, detokenizer, self._end_ids)

    def _finish(self, answer: _Answer) -> DecodeResult:
        for _ in self._run(answer, tokens_per_message=_TOKENS_PER_MESSAGE):
            pass
        return answer.result()

    def _run(self, answer: _Answer, *, tokens_per_message: int) -> Generator[str, None, None]:
        sampling = self._sampling(answer.request, tokens_per_message)
        with self._slots, closing(self.engine.run(answer.built, sampling)) as pieces:
            for piece in pieces:
                delta = answer.push(piece)
                if delta:
                    yield delta
                if answer.finish_reason and not piece.finish_reason:
                    return  # We see an end that vLLM does not.
        if not answer.finish_reason:
            raise DecoderError("vLLM ended an answer without saying why. Ask again.")

    def _sampling(self, request: DecodeRequest, tokens_per_message: int) -> dict[str, Any]:
        return {
            # numpy's numbers do not travel.
            "max_tokens": int(request.max_new_tokens),
            "temperature": float(request.temperature),
            "seed": None if request.seed is None else int(request.seed),
            "stop": list(request.stop),
            # What ends an answer is the checkpoint's matter, not the exported model's.
            "stop_token_ids": self._end_ids,
            "ignore_eos": True,
            # Said in full: a server takes what is missing from the model's generation config.
            "top_p": 1.0,
            "top_k": 0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "logprobs": 0,  # of the written token alone
            "stream_interval": tokens_per_message,
        }


class _Answer:
    """One answer on its way."""

    def __init__(
        self,
        request: DecodeRequest,
        built: BuiltPrompt,
        detokenizer: Detokenizer,
        end_ids: Sequence[int],
    ) -> None:
        self.request = request
        self.built = built
        self.finish_reason: str | None = None
        self._detokenizer = detokenizer
        self._end_ids = end_ids
        self._n_tokens = 0
        self._logprobs: list[float] = []
        self._started = perf_counter()
        self._first_token_s = 0.0

    def push(self, piece: Piece) -> str:
        """Take a piece and return the text that became certain; sets `finish_reason` at the end."""
        if not self._n_tokens and piece.token_ids:
            self._first_token_s = perf_counter() - self._started
        delta = ""
        for place, token in enumerate(piece.token_ids):
            self._n_tokens += 1
            self._logprobs += piece.logprobs[place : place + 1]
            ended = token in self._end_ids
            if not ended:
                delta += self._detokenizer.push(token)
            if ended or self._detokenizer.stopped:
                self.finish_reason = "stop"
                break
        else:
            self.finish_reason = piece.finish_reason
        if self.finish_reason:
            delta += self._detokenizer.finish()
        return delta

    def result(self) -> DecodeResult:
        """Return the whole answer."""
        return DecodeResult(
            text=self._detokenizer.text,
            prompt_tokens=len(self.built.input_ids),
            soft_tokens=self.built.soft_tokens,
            completion_tokens=self._n_tokens,
            first_token_s=self._first_token_s,
            finish_reason="stop" if self.finish_reason == "stop" else "length",
            token_logprobs=tuple(self._logprobs),
            opening=self._detokenizer.opening(self.request.lookahead),
        )
