"""The decoder as a LlamaIndex LLM."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, NamedTuple, NoReturn

from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    ChatResponseAsyncGen,
    ChatResponseGen,
    CompletionResponse,
    CompletionResponseAsyncGen,
    CompletionResponseGen,
    LLMMetadata,
    MessageRole,
    TextBlock,
)
from llama_index.core.bridge.pydantic import Field, PrivateAttr
from llama_index.core.llms.callbacks import llm_chat_callback, llm_completion_callback
from llama_index.core.llms.custom import CustomLLM
from llama_index.core.prompts import BasePromptTemplate

from llama_index_softrag.memories import in_thread, memories_of
from softrag import (
    Answer,
    AnswerStream,
    Hit,
    Mode,
    SoftRAG,
    SoftRAGError,
    find_handles,
    make_handle,
)

_DECODING = {"max_new_tokens", "max_tokens", "temperature", "stop", "seed"}
# What templates of LlamaIndex call the retrieved context and the question.
_CONTEXT, _QUESTION = "context_str", "query_str"


class PromptError(SoftRAGError):
    """A call of `SoftRAGLLM` that it cannot answer from memories.

    No `ValueError`, because LlamaIndex's own synthesizers log those and give an empty answer.
    """


class _Turn(NamedTuple):
    """One question as the engine takes it."""

    question: str
    sources: list[Hit | str]
    mode: Mode
    decoding: dict[str, Any]


class SoftRAGLLM(CustomLLM):
    """The decoder of an engine, for query engines and chat engines of LlamaIndex.

    The decoder answers one question from memories, in the prompt it was trained with. So of a
    conversation the last user message is the question, memories come from the handles that
    `SoftRAGPostprocessor` and `SoftRAGSynthesizer` put into system messages and `context_str`, and
    the words of LlamaIndex's templates are not used. What a user typed is never read as a handle.

    `response.raw["usage"]` counts `prompt_tokens` (soft tokens included), `soft_tokens`,
    `text_prompt_tokens` and `completion_tokens`.

    Args:
        engine: The engine.
        mode: "memory" answers from memories and refuses anything else; "mixed" does, too, but
            reads the best node as text; "text" reads context as text, for comparison; "closed"
            answers without context and refuses one.
        max_new_tokens: Most tokens of an answer; calls may say otherwise (`max_tokens=`).
        temperature: 0.0 takes the likeliest token; calls may say otherwise.
    """

    mode: Mode = "memory"
    max_new_tokens: int = Field(default=128, ge=1)
    temperature: float = Field(default=0.0, ge=0)
    fingerprint: str

    _engine: SoftRAG = PrivateAttr()

    def __init__(
        self,
        engine: SoftRAG,
        *,
        mode: Mode = "memory",
        max_new_tokens: int = 128,
        temperature: float = 0.0,
    ) -> None:
        if not isinstance(engine, SoftRAG):
            raise TypeError(
                f"Expected a SoftRAG engine, found {engine!r:.80}. Load one: "
                "SoftRAG.from_pretrained(CHECKPOINT, store=FOLDER)."
            )
        if engine.decoder is None:
            raise ValueError("The engine has no decoder; load it with load_decoder=True.")
        super().__init__(
            mode=mode,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            fingerprint=engine.decoder.fingerprint,
        )
        self._engine = engine

    @classmethod
    def class_name(cls) -> str:
        """Return the name LlamaIndex saves."""
        return "SoftRAGLLM"

    @property
    def metadata(self) -> LLMMetadata:
        """What LlamaIndex asks about a model."""
        decoder = getattr(getattr(self._engine.decoder, "model", None), "decoder", None)
        window = getattr(getattr(decoder, "config", None), "max_position_embeddings", None)
        return LLMMetadata(
            context_window=window or 4096,
            num_output=self.max_new_tokens,
            is_chat_model=True,
            model_name=f"softrag-{self.fingerprint}",
        )

    # The eight calls

    @llm_chat_callback()
    def chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """Answer the last user message from the memories of the system messages.

        Raises:
            PromptError: There are no memories, or text in their place.
            UnknownHandleError: The memory of a handle is gone.
        """
        return _chat_response(self._answer(messages, kwargs))

    @llm_chat_callback()
    def stream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseGen:
        """Do as `chat`, in pieces; the last one has the usage."""
        turn = self._turn(messages, kwargs)

        def pieces() -> ChatResponseGen:
            text = ""
            with self._start(turn) as stream:
                for delta in stream:
                    text += delta
                    yield _chat_piece(text, delta)
                yield _chat_response(stream.answer, delta="")

        return pieces()

    @llm_completion_callback()
    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        """Answer a prompt, which is one user message; see `chat`."""
        return _completion(self._answer(_user(prompt), kwargs))

    @llm_completion_callback()
    def stream_complete(
        self, prompt: str, formatted: bool = False, **kwargs: Any
    ) -> CompletionResponseGen:
        """Do as `complete`, in pieces; the last one has the usage."""
        turn = self._turn(_user(prompt), kwargs)

        def pieces() -> CompletionResponseGen:
            text = ""
            with self._start(turn) as stream:
                for delta in stream:
                    text += delta
                    yield CompletionResponse(text=text, delta=delta)
                yield _completion(stream.answer, delta="")

        return pieces()

    @llm_chat_callback()
    async def achat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """Do as `chat`, without blocking the event loop; concurrent calls run together."""
        return _chat_response(await in_thread(self._engine, self._answer, messages, kwargs))

    @llm_chat_callback()
    async def astream_chat(
        self, messages: Sequence[ChatMessage], **kwargs: Any
    ) -> ChatResponseAsyncGen:
        """Do as `stream_chat`, without blocking the event loop."""
        turn = await in_thread(self._engine, self._turn, messages, kwargs)

        async def pieces() -> ChatResponseAsyncGen:
            text = ""
            async with self._engine.astream_from(
                turn.question, turn.sources, mode=turn.mode, **turn.decoding
            ) as stream:
                async for delta in stream:
                    text += delta
                    yield _chat_piece(text, delta)
                yield _chat_response(stream.answer, delta="")

        return pieces()

    @llm_completion_callback()
    async def acomplete(
        self, prompt: str, formatted: bool = False, **kwargs: Any
    ) -> CompletionResponse:
        """Do as `complete`, without blocking the event loop; concurrent calls run together."""
        return _completion(await in_thread(self._engine, self._answer, _user(prompt), kwargs))

    @llm_completion_callback()
    async def astream_complete(
        self, prompt: str, formatted: bool = False, **kwargs: Any
    ) -> CompletionResponseAsyncGen:
        """Do as `stream_complete`, without blocking the event loop."""
        turn = await in_thread(self._engine, self._turn, _user(prompt), kwargs)

        async def pieces() -> CompletionResponseAsyncGen:
            text = ""
            async with self._engine.astream_from(
                turn.question, turn.sources, mode=turn.mode, **turn.decoding
            ) as stream:
                async for delta in stream:
                    text += delta
                    yield CompletionResponse(text=text, delta=delta)
                yield _completion(stream.answer, delta="")

        return pieces()

    # What it cannot do

    def as_structured_llm(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse: the decoder answers in plain text."""
        raise NotImplementedError(
            "SoftRAGLLM answers in plain text. For structured output, give its answer to another "
            "LLM."
        )

    structured_predict = as_structured_llm
    stream_structured_predict = as_structured_llm

    async def astructured_predict(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse: the decoder answers in plain text."""
        self.as_structured_llm()

    astream_structured_predict = astructured_predict

    # Within

    def _get_messages(self, prompt: BasePromptTemplate, **prompt_args: Any) -> list[ChatMessage]:
        """Return a template of LlamaIndex as the decoder's own: context, then question.

        Here context and question still come apart, so that nothing a user typed gets into the
        context.
        """
        values = {**prompt.kwargs, **prompt_args}
        if _CONTEXT not in values or _QUESTION not in values:
            if self.mode == "closed" or (self.mode == "text" and "existing_answer" not in values):
                return super()._get_messages(prompt, **prompt_args)
            raise PromptError(
                f"SoftRAGLLM answers a question ({_QUESTION}) from memories ({_CONTEXT}); it can "
                f"not fill a template of {', '.join(sorted(values)) or 'nothing'}. Use "
                "SoftRAGSynthesizer, or response_mode='compact' or 'simple_summarize' with a "
                "SoftRAGPostprocessor; to rewrite or refine, use another LLM."
            )
        context = values[_CONTEXT]
        # simple_summarize gives a list.
        parts = [context] if isinstance(context, str) else [str(part) for part in context]
        return context_messages(str(values[_QUESTION]), parts)

    def _turn(self, messages: Sequence[ChatMessage], options: dict[str, Any]) -> _Turn:
        decoding = self._decoding(options)
        if not messages or messages[-1].role != MessageRole.USER:
            raise PromptError("The last message must be the user's question.")
        question = _text(messages[-1])
        context = "\n".join(
            _text(message)
            for message in messages
            if message.role in (MessageRole.SYSTEM, MessageRole.DEVELOPER)
        )
        if self.mode in ("memory", "mixed"):
            return _Turn(question, self._hits(context), self.mode, decoding)
        if self.mode == "closed" and context.strip():
            raise PromptError(
                "SoftRAGLLM(mode='closed') reads no context, found a system message. Leave it out, "
                "or use mode='memory' or 'text'."
            )
        if not context.strip():
            return _Turn(question, [], "closed", decoding)
        return _Turn(question, [context], "text", decoding)

    def _hits(self, context: str) -> list[Hit | str]:
        """Return what the handles in a context stand for."""
        # The same one may be repeated by overlapping chunks.
        handles = list(dict.fromkeys(find_handles(context)))
        rest = context
        for handle in handles:
            rest = rest.replace(make_handle(handle), "")
        if rest.strip():
            start = " ".join(rest.split())[:80]
            raise PromptError(
                f"Found text where memories belong ({start!r}...). SoftRAGLLM answers from "
                "memories: add SoftRAGPostprocessor(engine) to node_postprocessors, or answer "
                "with SoftRAGSynthesizer(engine). System prompts are not read; "
                "SoftRAGLLM(mode='text') reads text."
            )
        if not handles:
            raise PromptError(
                "SoftRAGLLM answers from memories, and this call brings none. Ask through a query "
                "engine with SoftRAGSynthesizer, or a chat engine with SoftRAGPostprocessor. To "
                "condense questions use another LLM or skip_condense=True; to answer without "
                "documents use SoftRAGLLM(mode='closed')."
            )
        hits: list[Hit | str] = [*memories_of(self._engine).read(handles)]
        return hits

    def _decoding(self, options: dict[str, Any]) -> dict[str, Any]:
        unknown = options.keys() - _DECODING
        if unknown:
            raise PromptError(
                f"SoftRAGLLM takes {', '.join(sorted(_DECODING))}; found "
                f"{', '.join(sorted(unknown))}."
            )
        options = dict(options)
        limit = options.pop("max_tokens", None) or self.max_new_tokens
        stop = options.pop("stop", None)
        return {
            "max_new_tokens": limit,
            "temperature": self.temperature,
            "stop": [stop] if isinstance(stop, str) else stop,
            **{name: value for name, value in options.items() if value is not None},
        }

    def _answer(self, messages: Sequence[ChatMessage], options: dict[str, Any]) -> Answer:
        turn = self._turn(messages, options)
        with _loud():
            return self._engine.answer_from(
                turn.question, turn.sources, mode=turn.mode, **turn.decoding
            )

    def _start(self, turn: _Turn) -> AnswerStream:
        with _loud():
            return self._engine.stream_from(
                turn.question, turn.sources, mode=turn.mode, **turn.decoding
            )


def context_messages(question: str, context: Sequence[str]) -> list[ChatMessage]:
    """Return the conversation that `SoftRAGLLM` answers: handles, then the question.

    Args:
        question: As the user wrote it; handles in it stay text.
        context: Handles (`MemoryNode.handle`), best first.
    """
    return [
        ChatMessage(role=MessageRole.SYSTEM, content="\n".join(context)),
        ChatMessage(role=MessageRole.USER, content=question),
    ]


@contextmanager
def _loud() -> Iterator[None]:
    """Raise wrong arguments as `PromptError`."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise PromptError(str(error)) from error


def _user(prompt: str) -> list[ChatMessage]:
    return [ChatMessage(role=MessageRole.USER, content=prompt)]


def _text(message: ChatMessage) -> str:
    for block in message.blocks:
        if not isinstance(block, TextBlock):
            raise PromptError(
                f"SoftRAGLLM reads text, found a block of type {block.block_type!r} in a message."
            )
    return message.content or ""


def _raw(answer: Answer) -> dict[str, Any]:
    usage = asdict(answer.usage)
    usage["total_tokens"] = usage["prompt_tokens"] + usage["completion_tokens"]
    return {"usage": usage, "finish_reason": answer.finish_reason, "mode": answer.mode}


def _chat_response(answer: Answer, delta: str | None = None) -> ChatResponse:
    message = ChatMessage(role=MessageRole.ASSISTANT, content=answer.text)
    return ChatResponse(message=message, delta=delta, raw=_raw(answer))


def _chat_piece(text: str, delta: str) -> ChatResponse:
    return ChatResponse(message=ChatMessage(role=MessageRole.ASSISTANT, content=text), delta=delta)


def _completion(answer: Answer, delta: str | None = None) -> CompletionResponse:
    return CompletionResponse(text=answer.text, delta=delta, raw=_raw(answer))
