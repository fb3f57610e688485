"""Question in; question, answer and sources out. It knows no engine."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from langchain_core.documents import Document
from langchain_core.language_models import LanguageModelInput
from langchain_core.messages import BaseMessage, HumanMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.runnables import Runnable, RunnableLambda, RunnablePassthrough, RunnablePick

# Pydantic makes the chain's schemas, and before Python 3.12 it takes this one only.
from typing_extensions import TypedDict

from langchain_softrag.messages import ReadMode, format_memories


class SoftRAGInput(TypedDict):
    """What the chain takes; the bare question will do."""

    question: str


class SoftRAGOutput(TypedDict):
    """What the chain gives.

    Attributes:
        question: As it was asked.
        answer: Made from the memories of the sources.
        sources: The retrieved documents, best first.
    """

    question: str
    answer: str
    sources: list[Document]


def create_softrag_chain(
    retriever: Runnable[str, list[Document]],
    llm: Runnable[LanguageModelInput, BaseMessage],
    *,
    mode: ReadMode = "memory",
) -> Runnable[SoftRAGInput | str, SoftRAGOutput]:
    """Return a chain that answers questions from the memories of retrieved documents.

    Its greedy answers are those of `SoftRAG.ask` on the same store. When streamed, the question
    and the sources come first, then the answer in pieces.

    Args:
        retriever: Documents without handles are compressed when they are found.
        llm: A `ChatSoftRAG`, bound or configured as you like.
        mode: "memory", or "mixed": the best document is read as text, the others from memories.
    """
    retrieve = RunnablePick("question") | retriever

    def to_messages(found: Mapping[str, Any]) -> list[BaseMessage]:
        question = HumanMessage(content=found["question"])
        return [*format_memories(found["sources"], mode=mode), question]

    # Without async twins LangChain would run these few microseconds in a thread of its own.
    # Waiting for nothing lets the event loop turn between the questions of one moment.
    async def ato_messages(found: Mapping[str, Any]) -> list[BaseMessage]:
        await asyncio.sleep(0)
        return to_messages(found)

    answer = RunnableLambda(to_messages, ato_messages) | llm | StrOutputParser()
    chain: Runnable[Any, Any] = (
        RunnableLambda(_to_input, _ato_input)
        | RunnablePassthrough.assign(sources=retrieve)
        | RunnablePassthrough.assign(answer=answer)
    )
    return chain.with_types(
        input_type=SoftRAGInput | str,  # type: ignore[arg-type]
        output_type=SoftRAGOutput,
    ).with_config(run_name="softrag")


def _to_input(given: str | Mapping[str, Any]) -> dict[str, str]:
    if isinstance(given, str):
        return {"question": given}
    if "question" not in given:
        raise ValueError(
            f"The chain takes a question, or a dict with one under 'question'; found the keys "
            f"{', '.join(map(str, given)) or '(none)'}."
        )
    return {"question": given["question"]}


async def _ato_input(given: str | Mapping[str, Any]) -> dict[str, str]:
    await asyncio.sleep(0)
    return _to_input(given)
