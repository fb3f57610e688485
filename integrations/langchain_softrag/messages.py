"""Memories in messages: only their handles travel. It knows no model and no store.

A memory is a structured block, so that a handle which somebody typed stays text.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from langchain_core.documents import Document
from langchain_core.messages import (
    AIMessage,
    BaseMessage,
    HumanMessage,
    SystemMessage,
)

from langchain_softrag.documents import HANDLE_FIELD, text_of
from softrag import find_handles

logger = logging.getLogger(__name__)

MEMORY = "softrag_memory"
DOCUMENT = "softrag_document"
TEXT = "softrag_text"
_SPEAKERS: dict[type[BaseMessage], str] = {
    SystemMessage: "",
    HumanMessage: "User: ",
    AIMessage: "Assistant: ",
}


ReadMode = Literal["memory", "mixed"]


@dataclass(frozen=True, kw_only=True)
class HandleSource:
    """A memory by its key."""

    key: str


@dataclass(frozen=True, kw_only=True)
class TextSource:
    """A text to be read as it is."""

    text: str


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """What messages ask.

    Attributes:
        question: The last human words; what was said before stands in front of them.
        sources: Memories by key, and texts to be compressed, in order; the first may be a text to
            be read as it is.
    """

    question: str
    sources: list[HandleSource | TextSource | str]


def format_memories(
    documents: Iterable[Document], *, mode: ReadMode = "memory"
) -> list[BaseMessage]:
    """Return documents as the message that `ChatSoftRAG` reads them from.

    Takes the place of the usual `format_docs`, in front of a `MessagesPlaceholder`. A document
    without a handle is compressed by the model when it is asked.

    Args:
        documents: Best first.
        mode: "memory": no text is put in the prompt; "mixed": that of the first document is.
    """
    if mode not in get_args(ReadMode):
        raise ValueError(f"mode must be one of {', '.join(get_args(ReadMode))}; found {mode!r}.")
    # The dicts are written out: LangChain's own constructor gives every block a random id, and no
    # cached answer would be found again.
    blocks: list[str | dict[Any, Any]] = [
        {"type": "non_standard", "value": _value(document, as_text=mode == "mixed" and not number)}
        for number, document in enumerate(documents)
    ]
    return [HumanMessage(content=blocks)] if blocks else []


def read_messages(messages: Sequence[BaseMessage]) -> Prompt:
    """Return the question and the sources in messages.

    Raises:
        ValueError: A message is of a kind that softrag cannot read, or none asks anything.
    """
    sources: list[HandleSource | TextSource | str] = []
    turns: list[tuple[str, str]] = []
    for message in messages:
        speaker = next((_SPEAKERS[kind] for kind in _SPEAKERS if isinstance(message, kind)), None)
        if speaker is None or getattr(message, "tool_calls", None):
            raise ValueError(
                f"ChatSoftRAG reads system, human and AI messages without tool calls, found "
                f"{type(message).__name__}. Let another model use tools, with a softrag chain as "
                "one of them."
            )
        text = _read_content(message.content, sources)
        if text.strip():
            turns.append((speaker, text))
    asked: list[str] = []
    while turns and turns[-1][0] == _SPEAKERS[HumanMessage]:
        asked.insert(0, turns.pop()[1])
    if not asked:
        raise ValueError("The last message asks nothing; expected a human message with text.")
    question = "\n".join(asked)
    if any(find_handles(text) for text in (question, *(text for _, text in turns))):
        logger.warning(
            "A message's text holds a handle. It is read as text; to pass memories, put "
            "format_memories(documents) in a MessagesPlaceholder."
        )
    if turns:
        said = "\n".join(speaker + text for speaker, text in turns)
        question = f"{said}\n\n{question}"
    texts = [place for place, each in enumerate(sources) if isinstance(each, TextSource)]
    if texts not in ([], [0]):
        raise ValueError(
            f"Only the first document can be read as text, found texts at the places {texts} of "
            f"{len(sources)}. Make one message of all documents: format_memories(documents, "
            "mode='mixed')."
        )
    return Prompt(question=question, sources=sources)


def _value(document: Document, *, as_text: bool) -> dict[str, str]:
    if as_text:
        return {"type": TEXT, "text": text_of(document)}
    handle = document.metadata.get(HANDLE_FIELD)
    if handle is None:
        return {"type": DOCUMENT, "text": text_of(document)}
    return {"type": MEMORY, "handle": handle}


def _read_content(content: str | list[str | dict[Any, Any]], sources: list[Any]) -> str:
    """Return the text of a message's content, and add its documents to `sources`."""
    if isinstance(content, str):
        return content
    texts = []
    for block in content:
        if isinstance(block, str):
            texts.append(block)
        elif block.get("type") == "text":
            texts.append(block["text"])
        else:
            sources.append(_read_source(block))
    return "\n".join(texts)


def _read_source(block: dict[Any, Any]) -> HandleSource | TextSource | str:
    value = block.get("value") if block.get("type") == "non_standard" else None
    kind = value.get("type") if isinstance(value, dict) else None
    if isinstance(value, dict) and kind == DOCUMENT:
        return str(value["text"])
    if isinstance(value, dict) and kind == TEXT:
        return TextSource(text=str(value["text"]))
    if isinstance(value, dict) and kind == MEMORY:
        keys = find_handles(str(value.get("handle")))
        if len(keys) != 1:
            raise ValueError(
                f"A memory block holds {str(value.get('handle'))[:60]!r} instead of one handle. "
                "Make blocks with format_memories."
            )
        return HandleSource(key=keys[0])
    raise ValueError(
        f"ChatSoftRAG reads text and memories, found a block of type {block.get('type')!r}. Leave "
        "it out; make memory blocks with format_memories."
    )
