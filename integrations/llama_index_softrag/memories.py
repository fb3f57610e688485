"""The memories of one engine as its LlamaIndex parts share them. It knows no prompt and no store.

Tensors stay here; through LlamaIndex travel nodes whose text for a model is a handle. A handle is
made with a secret of this process, so that no text a user or a document brings can name a memory.
"""

from __future__ import annotations

import asyncio
import secrets
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from hashlib import blake2b
from threading import Lock
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from llama_index.core.bridge.pydantic import PrivateAttr
from llama_index.core.schema import MetadataMode, NodeWithScore, TextNode

from llama_index_softrag.convert import (
    MEMORY_FIELD,
    carried_memory,
    drop_memory,
    put_in_metadata,
    to_hit,
)
from softrag import (
    Hit,
    Memory,
    MemoryCache,
    SoftRAG,
    UnknownHandleError,
    document_text,
    find_handles,
    make_handle,
    memory_key,
)

MAX_HANDLES = 16_384
"""Handles that can be read at a time; a node is a few hundred bytes."""

T = TypeVar("T")


class MemoryNode(TextNode):
    """A node whose text for a language model is the handle of its memory.

    For everything else (sources, evaluators, display) it is the node it was made from. Saved and
    loaded it is a plain node again: handles live as long as the process.
    """

    _handle: str = PrivateAttr()

    @classmethod
    def view(cls, node: TextNode, handle: str) -> MemoryNode:
        """Return a node with the content of `node` and this handle."""
        view = cls(**{name: getattr(node, name) for name in TextNode.model_fields})
        view.metadata = dict(node.metadata)
        view._handle = handle
        return view

    @property
    def handle(self) -> str:
        """What a language model reads."""
        return self._handle

    def get_content(self, metadata_mode: MetadataMode = MetadataMode.NONE) -> str:
        """Return the handle for a language model, the text otherwise."""
        if metadata_mode == MetadataMode.LLM:
            return self._handle
        return super().get_content(metadata_mode=metadata_mode)


class Memories:
    """Memories used last, and the handles that stand for them in prompts.

    Args:
        engine: The engine that reads and makes them.
    """

    def __init__(self, engine: SoftRAG) -> None:
        # Not the engine itself: it is this object's key in `_MEMORIES`, and must be free to go.
        self._store = engine.store
        self._compressor = engine.compressor
        self.fingerprint = engine.store.record.fingerprint
        self.cache = MemoryCache()
        self._secret = secrets.token_bytes(32)
        self._hits: OrderedDict[str, tuple[Hit, str]] = OrderedDict()
        self._lock = Lock()

    @property
    def query_dependent(self) -> bool:
        """Whether every memory is made for one question."""
        return self._compressor is not None and self._compressor.query_dependent

    @property
    def reranks(self) -> bool:
        """Whether memories come with their document's relevance to the question."""
        return self._compressor is not None and self._compressor.reranks

    def key(self, hit: Hit, question: str | None = None) -> str:
        """Return the content address of a chunk's memory."""
        return memory_key(self.fingerprint, document_text(hit.title, hit.text), question)

    def view(
        self, scored: Sequence[NodeWithScore], question: str | None = None
    ) -> list[NodeWithScore]:
        """Return nodes as models should see them: the memories' handles instead of texts.

        A memory is taken from the node, the cache or the store, else made now.

        Args:
            scored: Nodes as retrieved.
            question: What memories are made for, by query-dependent models.
        """
        asked = question if self.query_dependent else None
        hits = [to_hit(each) for each in scored]
        keys = [self.key(hit, asked) for hit in hits]
        for each, hit, key in zip(scored, hits, keys, strict=True):
            memory = carried_memory(each.node, fingerprint=self.fingerprint)
            # A text that was changed later has another key: its memory is made again.
            if memory is not None and key == memory.key == self.key(hit):
                self.cache.put(replace(memory, text=document_text(hit.title, hit.text)))
        self._make_missing(hits, keys, asked)
        return [
            NodeWithScore(node=self._view(each, hit, key), score=each.score)
            for each, hit, key in zip(scored, hits, keys, strict=True)
        ]

    def rerank(self, scored: Sequence[NodeWithScore], question: str) -> list[NodeWithScore]:
        """Return nodes by their relevance to the question, which becomes their score.

        For models with a rerank head. Nodes that are longer than one memory come last, in their
        order and with the score they had.
        """
        hits = [to_hit(each) for each in scored]
        keys = [self.key(hit, question) for hit in hits]
        self._make_missing(hits, keys, question)
        memories = self._lookup(keys)
        known, unknown = [], []
        for each, key in zip(scored, keys, strict=True):
            relevance = memories[key].relevance if key in memories else None
            if relevance is None:
                unknown.append(each)
            else:
                known.append(NodeWithScore(node=each.node, score=relevance))
        return sorted(known, key=lambda each: -(each.score or 0.0)) + unknown

    def is_handle(self, text: str) -> bool:
        """Tell a handle of a retrieved node from text that looks like one."""
        keys = find_handles(text)
        with self._lock:
            return len(keys) == 1 and text == make_handle(keys[0]) and keys[0] in self._hits

    def read(self, handles: Sequence[str]) -> list[Hit]:
        """Return the chunks that handles stand for, with their memories.

        A memory that is no longer cached is read from the store. One that is not there either is
        left out of its hit, to be made when it is answered from.

        Args:
            handles: Keys, as `softrag.find_handles` gives them.

        Raises:
            UnknownHandleError: A handle was not made by this process, or too long ago; or its
                memory is gone and there is no compressor.
        """
        with self._lock:
            known = [self._hits.get(handle) for handle in handles]
        unknown = [make_handle(h) for h, found in zip(handles, known, strict=True) if found is None]
        if unknown:
            raise UnknownHandleError(
                f"No memory for {', '.join(unknown)}: only handles of nodes retrieved in this "
                f"process can be read, the last {MAX_HANDLES} of them. Retrieve the documents "
                "again."
            )
        found = [entry for entry in known if entry is not None]
        memories = self._lookup([key for _, key in found])
        return [replace(hit, memory=memories.get(key)) for hit, key in found]

    def _lookup(self, keys: Sequence[str]) -> dict[str, Memory]:
        """Return memories from the cache or the store, by key."""
        found: dict[str, Memory] = {}
        for key in dict.fromkeys(keys):
            memory = self.cache.get(key)
            if memory is not None:
                found[key] = memory
        missing = [key for key in keys if key not in found]
        if missing and self._compressor is None:
            # Nobody can make them, so that a missing one is an error that names it.
            return found | dict(zip(missing, self.cache.resolve(missing, self._store), strict=True))
        if missing and not self.query_dependent:
            loaded = self._store.memories(missing)
            for memory in loaded.values():
                self.cache.put(memory)
            found |= loaded
        return found

    def _make_missing(self, hits: Sequence[Hit], keys: Sequence[str], question: str | None) -> None:
        present = self._lookup(keys)
        compressor = self._compressor
        if compressor is None:
            return
        limit = compressor.model.config.max_document_tokens
        texts = {
            key: document_text(hit.title, hit.text)
            for hit, key in zip(hits, keys, strict=True)
            if key not in present
        }
        # Longer texts become several memories, when they are answered from.
        fitting = [
            text
            for text in texts.values()
            if text.strip() and len(compressor.prompt.tokenize(text)) <= limit
        ]
        asked = None if question is None else [question] * len(fitting)
        for memory in compressor.compress(fitting, asked) if fitting else []:
            self.cache.put(memory)

    def _view(self, scored: NodeWithScore, hit: Hit, key: str) -> MemoryNode:
        node = scored.node
        if not isinstance(node, TextNode):
            # Documents and multimodal nodes: their text is what is compressed.
            node = TextNode(
                id_=node.node_id,
                text=hit.text,
                metadata=dict(node.metadata),
                relationships=node.relationships,
                excluded_embed_metadata_keys=list(node.excluded_embed_metadata_keys),
                excluded_llm_metadata_keys=list(node.excluded_llm_metadata_keys),
            )
        view = MemoryNode.view(node, make_handle(self._mint(hit, key)))
        drop_memory(view)
        put_in_metadata(view, {MEMORY_FIELD: make_handle(key)})
        return view

    def _mint(self, hit: Hit, key: str) -> str:
        """Return what stands for a chunk in a prompt; the same chunk gets the same."""
        digest = blake2b(key=self._secret, digest_size=16)
        digest.update(f"{key}\0{hit.id}".encode("utf-8", "surrogatepass"))
        minted = digest.hexdigest()
        with self._lock:
            self._hits[minted] = (hit, key)
            self._hits.move_to_end(minted)
            while len(self._hits) > MAX_HANDLES:
                self._hits.popitem(last=False)
        return minted


_SHORT = ThreadPoolExecutor(max_workers=2, thread_name_prefix="softrag-llama-index")
_MEMORIES: WeakKeyDictionary[SoftRAG, Memories] = WeakKeyDictionary()
_MEMORIES_LOCK = Lock()


def memories_of(engine: SoftRAG) -> Memories:
    """Return the memories that all LlamaIndex parts of one engine share."""
    with _MEMORIES_LOCK:
        if engine not in _MEMORIES:
            _MEMORIES[engine] = Memories(engine)
        return _MEMORIES[engine]


async def in_thread(engine: SoftRAG, function: Callable[..., T], *args: Any) -> T:
    """Run a function that waits, for a model or a store, in one of the engine's threads."""
    return await asyncio.get_running_loop().run_in_executor(engine.threads, function, *args)


async def in_short_thread(function: Callable[..., T], *args: Any) -> T:
    """Run a step of milliseconds beside the event loop.

    In few threads: each one more that computes keeps the event loop longer from its turn.
    """
    return await asyncio.get_running_loop().run_in_executor(_SHORT, function, *args)
