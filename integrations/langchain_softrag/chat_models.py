"""The decoder as a LangChain chat model. It knows no store: handles are resolved by the engine."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import Any
from uuid import uuid4
from weakref import WeakKeyDictionary

from langchain_core.callbacks import (
    AsyncCallbackManagerForLLMRun,
    CallbackManagerForLLMRun,
)
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
from langchain_core.messages.ai import InputTokenDetails, UsageMetadata
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.runnables.config import run_in_executor
from pydantic import ConfigDict, Field, model_validator

from langchain_softrag.messages import HandleSource, ReadMode, TextSource, read_messages
from softrag import Answer, Decoder, Memory, SoftRAG

# One per loaded decoder; see `_identifying_params`.
_IDENTITIES: WeakKeyDictionary[Decoder, str] = WeakKeyDictionary()
_OPTIONS = ("max_tokens", "seed", "temperature")


class ChatSoftRAG(BaseChatModel):
    """Answers questions from memories, as a chat model.

    Memories come as the blocks that `format_memories` makes; a handle in a text stays text. One
    question is what the model was trained on: what was said before it is put in front of it as it
    is. Tools, structured output and images are not supported.

    Example:
        .. code-block:: python

            engine = SoftRAG.from_pretrained("softrag/demo/checkpoint", store="./my_store")
            llm = ChatSoftRAG(engine=engine, max_tokens=64)
            documents = SoftRAGQdrantVectorStore(engine).as_retriever().invoke(question)
            llm.invoke([*format_memories(documents), ("human", question)])

    Args:
        engine: Holds the decoder; resolves handles.
        model_name: In traces and cached answers; `model` for short. None for one made of the
            fingerprint. Answers cached under such a name are not found by another process: give a
            name to share them.
        temperature: 0.0 takes the likeliest token.
        max_tokens: Most tokens of an answer.
        stop: Strings that end an answer; `stop_sequences` for other models' callers.
        seed: Makes sampling repeatable.
        timeout: Taken because every chat model takes it; nothing here waits for a network.
        max_retries: Likewise.
    """

    engine: SoftRAG = Field(exclude=True, repr=False)
    model_name: str | None = Field(default=None, alias="model")
    temperature: float = 0.0
    max_tokens: int = 128
    stop: list[str] | None = Field(default=None, alias="stop_sequences")
    seed: int | None = None
    timeout: float | None = None
    max_retries: int | None = None

    model_config = ConfigDict(arbitrary_types_allowed=True, populate_by_name=True)

    @model_validator(mode="after")
    def _name(self) -> ChatSoftRAG:
        name = _default_name(self._decoder)
        if self.model_name is None:
            self.model_name = name
        return self

    @property
    def _decoder(self) -> Decoder:
        if self.engine.decoder is None:
            raise ValueError("To answer questions, load the engine with load_decoder=True.")
        return self.engine.decoder

    @property
    def _llm_type(self) -> str:
        return "softrag"

    @property
    def _identifying_params(self) -> Mapping[str, Any]:
        # The key of cached answers. A fingerprint tells compressors apart, not decoders: without
        # a name of its own, a decoder shares no answers with others.
        decoder = self._decoder
        named = self.model_name != _default_name(decoder)
        return {
            "model_name": self.model_name,
            "fingerprint": decoder.fingerprint,
            "decoder": None if named else _IDENTITIES.setdefault(decoder, uuid4().hex),
            "temperature": self.temperature,
            "max_tokens": self.max_tokens,
            "stop": self.stop,
            "seed": self.seed,
            "copy_bias": self.engine.copy_bias,
        }

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        decoding = self._decoding(stop, kwargs)
        question, sources, mode = self._read(messages)
        answer = self.engine.answer_from(question, sources, mode=mode, **decoding)
        message = AIMessage(
            content=answer.text,
            usage_metadata=_usage(answer, sources),
            response_metadata=self._response_metadata(answer),
        )
        return ChatResult(generations=[ChatGeneration(message=message)])

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        # The engine's threads: as many questions as are asked at once are decoded together.
        return await run_in_executor(
            self.engine.threads, self._generate, messages, stop, None, **kwargs
        )

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        decoding = self._decoding(stop, kwargs)
        question, sources, mode = self._read(messages)
        with self.engine.stream_from(question, sources, mode=mode, **decoding) as stream:
            for piece in stream:
                yield ChatGenerationChunk(message=AIMessageChunk(content=piece))
            yield self._last_chunk(stream.answer, sources)

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        decoding = self._decoding(stop, kwargs)
        question, sources, mode = await run_in_executor(self.engine.threads, self._read, messages)
        async with self.engine.astream_from(question, sources, mode=mode, **decoding) as stream:
            async for piece in stream:
                yield ChatGenerationChunk(message=AIMessageChunk(content=piece))
            yield self._last_chunk(stream.answer, sources)

    def _read(self, messages: list[BaseMessage]) -> tuple[str, list[Memory | str], ReadMode]:
        """Return the question, its sources with handles resolved, and how they are read."""
        prompt = read_messages(messages)
        keys = [source.key for source in prompt.sources if isinstance(source, HandleSource)]
        memories = iter(self.engine.resolve(keys))
        sources: list[Memory | str] = []
        mode: ReadMode = "memory"
        for source in prompt.sources:
            if isinstance(source, HandleSource):
                sources.append(next(memories))
            elif isinstance(source, TextSource):
                sources.append(source.text)
                mode = "mixed"
            else:
                sources.append(source)
        return prompt.question, sources, mode

    def _decoding(self, stop: list[str] | None, options: Mapping[str, Any]) -> dict[str, Any]:
        """Return the engine's arguments: the call's options, or else the model's."""
        unknown = sorted(set(options) - set(_OPTIONS))
        if unknown:
            raise ValueError(
                f"ChatSoftRAG knows no option {', '.join(unknown)}. A call may set stop, "
                f"{', '.join(_OPTIONS)}."
            )
        return {
            "max_new_tokens": options.get("max_tokens", self.max_tokens),
            "stop": stop if stop is not None else self.stop,
            "temperature": options.get("temperature", self.temperature),
            "seed": options.get("seed", self.seed),
        }

    def _last_chunk(self, answer: Answer, sources: Sequence[Memory | str]) -> ChatGenerationChunk:
        message = AIMessageChunk(
            content="",
            usage_metadata=_usage(answer, sources),
            response_metadata=self._response_metadata(answer),
            chunk_position="last",
        )
        return ChatGenerationChunk(message=message)

    def _response_metadata(self, answer: Answer) -> dict[str, Any]:
        return {
            "model_name": self.model_name,
            "model_provider": "softrag",
            "finish_reason": answer.finish_reason,
        }


def _default_name(decoder: Decoder) -> str:
    return f"softrag-{decoder.fingerprint[:12]}"


def _usage(answer: Answer, sources: Sequence[Memory | str]) -> UsageMetadata:
    """Return an answer's cost; soft tokens are among the input tokens."""
    usage = answer.usage
    details: dict[str, int] = {"softrag_memory_tokens": usage.soft_tokens}
    memories = [source for source in sources if isinstance(source, Memory)]
    if len(memories) == len(sources):
        details["softrag_document_tokens"] = sum(each.n_document_tokens for each in memories)
    return UsageMetadata(
        input_tokens=usage.prompt_tokens,
        output_tokens=usage.completion_tokens,
        total_tokens=usage.prompt_tokens + usage.completion_tokens,
        # LangChain leaves room for providers' own kinds of tokens, but not in the type.
        input_token_details=InputTokenDetails(**details),  # type: ignore[typeddict-item]
    )
