"""Handles stand for memories; text that looks like one does not."""

from __future__ import annotations

import threading

import pytest
import torch

from softrag.errors import UnknownHandleError
from softrag.handles import MemoryCache, escape_handles, find_handles, make_handle
from softrag.memory import Memory, memory_key


def make_memory(text: str, *, n_values: int = 4) -> Memory:
    """A memory of `4 * n_values` bytes."""
    return Memory(
        values=torch.full((1, n_values), float(len(text))),
        key=memory_key("model", text),
        fingerprint="model",
        n_document_tokens=len(text),
    )


A, B, C = make_memory("a"), make_memory("b"), make_memory("c")


def test_a_handle_is_short_and_says_what_it_is() -> None:
    assert make_handle("0" * 32) == f"<|softmem:{'0' * 32}|>"


@pytest.mark.parametrize("key", ["", "xyz", "0" * 31, "A" * 32, "0" * 32 + "|>"])
def test_only_keys_make_handles(key: str) -> None:
    with pytest.raises(ValueError, match="32 hex digits"):
        make_handle(key)


def test_handles_are_found_in_order_and_as_often_as_they_occur() -> None:
    text = f"Read {make_handle(B.key)}{make_handle(A.key)} and {make_handle(B.key)}."

    assert find_handles(text) == [B.key, A.key, B.key]
    assert find_handles("<|softmem:|> <|softmem:12|> plain text") == []


@pytest.mark.parametrize(
    "text",
    [
        make_handle(A.key),
        f"<|softmem:{make_handle(A.key)}",
        f"<|<|softmem:softmem:{A.key}|>",
        make_handle(A.key) * 3,
        f"<|softmem:{A.key}",  # the rest may come from the text after it
    ],
)
def test_an_escaped_handle_is_text_whatever_follows(text: str) -> None:
    escaped = escape_handles(text)

    assert find_handles(escaped + "|>") == []
    assert escape_handles(escaped) == escaped


def test_text_without_handles_is_left_alone() -> None:
    text = "softmem: <|im_start|> <| a < b |>"

    assert escape_handles(text) == text


def test_the_cache_returns_what_was_put() -> None:
    cache = MemoryCache()
    cache.put(A)

    assert cache.get(A.key) is A
    assert cache.get(B.key) is None
    assert (len(cache), cache.nbytes) == (1, 16)


def test_the_memory_used_longest_ago_goes_first() -> None:
    cache = MemoryCache(max_bytes=32)
    cache.put(A)
    cache.put(B)
    cache.get(A.key)
    cache.put(C)

    assert cache.get(B.key) is None
    assert cache.get(A.key) is A
    assert cache.get(C.key) is C
    assert cache.nbytes == 32


def test_a_memory_put_twice_counts_once() -> None:
    cache = MemoryCache()
    cache.put(A)
    cache.put(A)

    assert (len(cache), cache.nbytes) == (1, 16)


def test_a_memory_larger_than_the_cache_pushes_nothing_out() -> None:
    cache = MemoryCache(max_bytes=16)
    cache.put(A)
    cache.put(make_memory("large", n_values=5))

    assert cache.get(A.key) is A
    assert cache.nbytes == 16


def test_a_slice_does_not_keep_its_batch_alive() -> None:
    batch = torch.zeros(100, 4)
    cache = MemoryCache()
    cache.put(Memory(values=batch[:2], key=A.key, fingerprint="model", n_document_tokens=1))

    kept = cache.get(A.key)
    assert kept is not None
    assert kept.values.untyped_storage().nbytes() == kept.nbytes == 32


def test_a_cleared_cache_is_empty() -> None:
    cache = MemoryCache()
    cache.put(A)
    cache.clear()

    assert (len(cache), cache.nbytes) == (0, 0)


def test_keys_resolve_in_order_and_the_store_is_asked_once_for_what_is_missing() -> None:
    cache = MemoryCache()
    cache.put(A)
    asked = []

    def load(keys: list[str]) -> dict[str, Memory]:
        asked.append(keys)
        return {B.key: B, C.key: C}

    assert cache.resolve([C.key, A.key, B.key, C.key], load) == [C, A, B, C]
    assert asked == [[C.key, B.key]]
    assert cache.resolve([B.key]) == [B]  # kept since


def test_a_memory_too_large_to_cache_still_resolves() -> None:
    assert MemoryCache(max_bytes=0).resolve([A.key], lambda keys: {A.key: A}) == [A]


def test_a_store_is_asked_through_its_method() -> None:
    class Store:
        def memories(self, keys: list[str]) -> dict[str, Memory]:
            return {A.key: A} if keys == [A.key] else {}

    assert MemoryCache().resolve([A.key], Store()) == [A]


def test_an_unknown_handle_is_named_with_the_fix() -> None:
    cache = MemoryCache()
    cache.put(A)

    with pytest.raises(UnknownHandleError) as error:
        cache.resolve([A.key, B.key], lambda keys: {})
    assert make_handle(B.key) in str(error.value)
    assert make_handle(A.key) not in str(error.value)
    assert "Retrieve the documents again" in str(error.value)
    with pytest.raises(KeyError):
        cache.resolve([B.key])


def test_threads_share_a_cache() -> None:
    memories = [make_memory(f"document {i}") for i in range(40)]
    cache = MemoryCache(max_bytes=10 * 16)
    errors = []

    def use() -> None:
        by_key = {memory.key: memory for memory in memories}
        try:
            for _ in range(20):
                keys = list(by_key)
                found = cache.resolve(keys, lambda missing: {key: by_key[key] for key in missing})
                assert [memory.key for memory in found] == keys
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=use) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert errors == []
    assert (len(cache), cache.nbytes) == (10, 160)
