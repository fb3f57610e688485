"""A vLLM server with softrag's plugin: memories are sent once and referred to by hash afterwards.

It knows nothing of questions and documents.
"""

from __future__ import annotations

import base64
import threading
from collections import OrderedDict
from collections.abc import Generator, Sequence
from hashlib import blake2b
from typing import Any

import torch

from softrag.decoder.prompts import BuiltPrompt
from softrag.decoder.vllm import Piece
from softrag.decoder.vllm_server import RefusedError, VLLMServer
from softrag.extras import load_extra
from softrag.memory import Memory

# Stands at the soft tokens' places; nobody reads it.
_FILLER_ID = 0
# How many hashes are believed to be known to the server; 40 MB of ours.
_MOST_KNOWN = 500_000
# vLLM's name for bytes of a tensor within a message.
_RAW_VIEW = 3


class HashesEngine:
    """Sends token ids, hashes of memories, and the memories the server has not seen.

    Args:
        server: Started with the plugin (`integrations/vllm_softrag`).
        memory_ids: Token ids of the memory tokens in prompts.

    Raises:
        MissingExtraError: msgpack is not installed.
    """

    def __init__(self, server: VLLMServer, *, memory_ids: Sequence[int]) -> None:
        self.server = server
        self._memory_ids = frozenset(memory_ids)
        self._msgpack = load_extra("msgpack", extra="vllm-client", purpose="Sending memories once")
        self._known: OrderedDict[str, None] = OrderedDict()
        self._lock = threading.Lock()

    def limit(self) -> int | None:
        """Return the most tokens of a prompt and its answer."""
        return self.server.served().limit

    def run(self, built: BuiltPrompt, sampling: dict[str, Any]) -> Generator[Piece, None, None]:
        """Answer one prompt; see `Engine.run`."""
        hashes = [content_hash(memory) for memory in built.memories]
        with self._lock:
            known = {each for each in hashes if each in self._known}
        pieces = self._ask(built, hashes, known, sampling)
        try:
            first = next(pieces, None)
        except RefusedError:
            if not known:
                raise
            # The server forgot a memory (its cache is full, or it was started again). Which one
            # it does not say, so all of them go once more.
            self._forget(known)
            pieces = self._ask(built, hashes, set(), sampling)
            first = next(pieces, None)
        self._remember(hashes)
        if first is not None:
            yield first
            yield from pieces

    def close(self) -> None:
        """Close the connections."""
        self.server.close()

    def _ask(
        self, built: BuiltPrompt, hashes: list[str], known: set[str], sampling: dict[str, Any]
    ) -> Generator[Piece, None, None]:
        ids = built.input_ids
        body: dict[str, Any] = {
            "model": self.server.served().model,
            "token_ids": [_FILLER_ID if each in self._memory_ids else each for each in ids],
            "sampling_params": sampling,
            "stream": True,
        }
        if built.memories:
            sent = set(known)
            data: list[str | None] = []
            for memory, each in zip(built.memories, hashes, strict=True):
                data.append(None if each in sent else self._encode(memory))
                sent.add(each)
            body["features"] = {
                "mm_hashes": {"image": hashes},
                "mm_placeholders": {"image": self._places(built)},
                "kwargs_data": {"image": data},
            }
        for event in self.server.events("/inference/v1/generate", body):
            for choice in event["choices"]:
                content = (choice.get("logprobs") or {}).get("content") or []
                yield Piece(
                    choice.get("token_ids") or [],
                    [each["logprob"] for each in content],
                    choice.get("finish_reason"),
                )

    def _places(self, built: BuiltPrompt) -> list[dict[str, int]]:
        """Return where each memory's soft tokens stand."""
        at_memory = [i for i, each in enumerate(built.input_ids) if each in self._memory_ids]
        places, start = [], 0
        for memory in built.memories:
            # The soft tokens of one memory stand together; two memories may, too.
            places.append({"offset": at_memory[start], "length": len(memory)})
            start += len(memory)
        return places

    def _encode(self, memory: Memory) -> str:
        """Return a memory as vLLM's `MultiModalKwargsItem`: base64 of MessagePack, no pickle."""
        values = memory.values.contiguous()
        dtype = str(values.dtype).removeprefix("torch.")
        tensor = [dtype, list(values.shape), self._msgpack.ExtType(_RAW_VIEW, _raw(values))]
        item = {
            "image_embeds": {"data": tensor, "field": ["batched", {"keep_on_cpu": False}]},
        }
        return base64.b64encode(self._msgpack.packb(item)).decode("ascii")

    def _remember(self, hashes: list[str]) -> None:
        with self._lock:
            for each in hashes:
                self._known[each] = None
                self._known.move_to_end(each)
            while len(self._known) > _MOST_KNOWN:
                self._known.popitem(last=False)

    def _forget(self, hashes: set[str]) -> None:
        with self._lock:
            for each in hashes:
                self._known.pop(each, None)


def content_hash(memory: Memory) -> str:
    """Return a hash of the values: the same document differs by the codec it was stored with."""
    digest = blake2b(f"{memory.values.dtype} {tuple(memory.values.shape)}".encode(), digest_size=16)
    digest.update(_raw(memory.values.contiguous()))
    return digest.hexdigest()


def _raw(values: torch.Tensor) -> bytes:
    return values.view(torch.uint8).numpy().tobytes()
