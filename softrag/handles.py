"""Handles: short strings that stand for memories, and the cache that resolves them.

Tensors never travel through messages, node metadata, events or caches of other libraries: a handle
does, and the decoder asks the cache for the memory. It knows no model and no framework.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from threading import Lock
from typing import Protocol

from softrag.errors import UnknownHandleError
from softrag.memory import Memory

_PREFIX = "<|softmem:"
_SUFFIX = "|>"
_HANDLE = re.compile(re.escape(_PREFIX) + r"([0-9a-f]{32})" + re.escape(_SUFFIX))


def make_handle(key: str) -> str:
    """Return the handle of the memory with `key`.

    >>> make_handle("0123456789abcdef0123456789abcdef")
    '<|softmem:0123456789abcdef0123456789abcdef|>'
    """
    handle = f"{_PREFIX}{key}{_SUFFIX}"
    if not _HANDLE.fullmatch(handle):
        raise ValueError(f"A memory's key is 32 hex digits, but found {key!r}. Use `memory.key`.")
    return handle


def find_handles(text: str) -> list[str]:
    """Return the keys of all handles in `text`, in order, repeated when they repeat."""
    return _HANDLE.findall(text)


def escape_handles(text: str) -> str:
    """Return `text` with every handle in it made plain text.

    For what users and documents wrote: only softrag's own handles may stand for memories.

    >>> escape_handles("<|softmem:0123456789abcdef0123456789abcdef|>")
    '<| softmem:0123456789abcdef0123456789abcdef|>'
    """
    # The start alone is broken, so that no text after it can complete it to a handle.
    return text.replace(_PREFIX, "<| softmem:")


class MemorySource(Protocol):
    """What can look memories up by key, e.g. a `MemoryStore`."""

    def memories(self, keys: Sequence[str]) -> Mapping[str, Memory]:
        """Return the memories found, by key."""
        ...


class MemoryCache:
    """The memories used last, up to a number of bytes. Safe to share between threads."""

    def __init__(self, max_bytes: int = 256 * 2**20) -> None:
        """Make an empty cache.

        Args:
            max_bytes: Of the memories' values together. The memory used longest ago goes first.
        """
        if max_bytes < 0:
            raise ValueError(f"max_bytes is at least 0, but found {max_bytes}.")
        self.max_bytes = max_bytes
        self._memories: OrderedDict[str, Memory] = OrderedDict()
        self._nbytes = 0
        self._lock = Lock()

    def __len__(self) -> int:
        """Return the number of memories in the cache."""
        return len(self._memories)

    @property
    def nbytes(self) -> int:
        """Size of all values in the cache, in bytes."""
        return self._nbytes

    def put(self, memory: Memory) -> None:
        """Keep a memory. One larger than the whole cache is not kept."""
        if memory.nbytes > self.max_bytes:
            return
        if memory.values.untyped_storage().nbytes() > memory.nbytes:
            # A slice of a batch would keep the whole batch alive.
            memory = replace(memory, values=memory.values.clone())
        with self._lock:
            old = self._memories.pop(memory.key, None)
            self._nbytes += memory.nbytes - (0 if old is None else old.nbytes)
            self._memories[memory.key] = memory
            while self._nbytes > self.max_bytes:
                self._nbytes -= self._memories.popitem(last=False)[1].nbytes

    def get(self, key: str) -> Memory | None:
        """Return a memory, or None when it is not in the cache (any more)."""
        with self._lock:
            memory = self._memories.get(key)
            if memory is not None:
                self._memories.move_to_end(key)
            return memory

    def clear(self) -> None:
        """Drop all memories."""
        with self._lock:
            self._memories.clear()
            self._nbytes = 0

    def resolve(
        self,
        keys: Sequence[str],
        store: MemorySource | Callable[[Sequence[str]], Mapping[str, Memory]] | None = None,
    ) -> list[Memory]:
        """Return the memories of `keys`, in order.

        Args:
            keys: As `find_handles` returns them; the same key may come several times.
            store: Asked once for all keys that are not in the cache: a store, or a function of
                the missing keys. What it returns is kept.

        Raises:
            UnknownHandleError: A key is neither in the cache nor in the store.
        """
        cached = {key: self.get(key) for key in keys}
        found = {key: memory for key, memory in cached.items() if memory is not None}
        missing = [key for key in cached if key not in found]
        if missing and store is not None:
            # Outside the lock, because a store may take its time.
            loaded = store(missing) if callable(store) else store.memories(missing)
            for memory in loaded.values():
                self.put(memory)
            found.update(loaded)
            missing = [key for key in missing if key not in found]
        if missing:
            raise UnknownHandleError(
                f"No memory for {', '.join(map(make_handle, missing))}: "
                f"{'it is' if len(missing) == 1 else 'they are'} not in the cache of "
                f"{self.max_bytes} bytes{' or in the store' if store is not None else ''}. "
                "Retrieve the documents again, enlarge the cache, or resolve with the store "
                "that holds them."
            )
        return [found[key] for key in keys]
