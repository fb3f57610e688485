"""vLLM in this process: prompt embeddings are handed over as they are.

It knows nothing of questions and documents.
"""

from __future__ import annotations

import asyncio
import itertools
import queue
import threading
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

import torch

from softrag.decoder.prompts import BuiltPrompt, PromptEmbeddings
from softrag.decoder.vllm import Piece
from softrag.errors import DecoderError
from softrag.extras import load_extra

# For vLLM's processes to end by themselves.
_SHUTDOWN_S = 10.0
# On a CPU vLLM wants nearly all memory to be free unless it is told how much to keep keys and
# values in; what is never used costs none.
_CPU_CACHE_BYTES = 2**32


class LocalEngine:
    """A vLLM engine with an event loop of its own, in a thread.

    Args:
        folder: The exported decoder.
        embeddings: Its token embeddings.
        options: Further fields of vLLM's `AsyncEngineArgs`. On a CPU, `kv_cache_memory_bytes` is
            4 GiB if not given.

    Raises:
        MissingExtraError: vLLM is not installed.
    """

    def __init__(
        self, folder: Path, embeddings: PromptEmbeddings, *, options: Mapping[str, Any]
    ) -> None:
        self._vllm = load_extra("vllm", extra="vllm", purpose="decoder='vllm' in this process")
        self._embeddings = embeddings
        self._numbers = itertools.count()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="softrag-vllm-loop", daemon=True
        )
        self._thread.start()
        try:
            self._engine = asyncio.run_coroutine_threadsafe(
                self._start(folder, options), self._loop
            ).result()
        except BaseException:
            self._stop_loop()
            raise

    async def _start(self, folder: Path, options: Mapping[str, Any]) -> Any:  # noqa: ANN401
        from vllm.v1.engine.async_llm import AsyncLLM

        defaults = {} if torch.cuda.is_available() else {"kv_cache_memory_bytes": _CPU_CACHE_BYTES}
        arguments = self._vllm.AsyncEngineArgs(
            model=str(folder), enable_prompt_embeds=True, **(defaults | dict(options))
        )
        return AsyncLLM.from_engine_args(arguments)

    def limit(self) -> int | None:
        """Return the most tokens of a prompt and its answer."""
        return int(self._engine.model_config.max_model_len)

    def run(self, built: BuiltPrompt, sampling: dict[str, Any]) -> Generator[Piece, None, None]:
        """Answer one prompt; see `Engine.run`."""
        embeds = self._embeddings.embed(built).to(self._engine.model_config.dtype)
        pieces: queue.SimpleQueue[Piece | Exception | None] = queue.SimpleQueue()
        task = asyncio.run_coroutine_threadsafe(self._feed(embeds, sampling, pieces), self._loop)
        try:
            while (piece := pieces.get()) is not None:
                if isinstance(piece, Exception):
                    raise DecoderError(
                        f"vLLM failed at an answer ({type(piece).__name__}: {piece}). Ask again; "
                        "if its engine is dead, start this process again."
                    ) from piece
                yield piece
        finally:
            task.cancel()  # Aborts the request; nothing happens to one that ended.

    async def _feed(
        self,
        embeds: Any,  # noqa: ANN401 - (tokens, hidden) tensor
        sampling: dict[str, Any],
        pieces: queue.SimpleQueue[Piece | Exception | None],
    ) -> None:
        from vllm.sampling_params import RequestOutputKind

        parameters = self._vllm.SamplingParams(**sampling, output_kind=RequestOutputKind.DELTA)
        try:
            renderer = self._engine.renderer
            (prompt,) = renderer.render_cmpl(
                [{"prompt_embeds": embeds}], renderer.default_cmpl_tok_params
            )
            async for output in self._engine.generate(
                prompt, parameters, f"softrag-{next(self._numbers)}"
            ):
                written = output.outputs[0]
                ids = list(written.token_ids)
                logprobs = [
                    step[token].logprob
                    for token, step in zip(ids, written.logprobs or (), strict=False)
                ]
                pieces.put(Piece(ids, logprobs, written.finish_reason))
        except Exception as error:  # vLLM's errors have no common class; the caller raises ours
            pieces.put(error)
        else:
            pieces.put(None)

    def close(self) -> None:
        """Stop the engine and its loop."""
        if self._thread.is_alive():
            asyncio.run_coroutine_threadsafe(self._end(), self._loop).result()
            self._stop_loop()
            del self._engine  # Its own end reports errors when the interpreter's comes first.

    async def _end(self) -> None:
        self._engine.shutdown(timeout=_SHUTDOWN_S)
        # The engine's own tasks end here, not when the interpreter does.
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _stop_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
