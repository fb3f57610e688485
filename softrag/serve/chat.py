"""Chat completions and models, as OpenAI's clients ask for them.

The last message is the question, and it is answered by itself, as `softrag chat` and
`llama_index_softrag` do: the model was trained on one question with its chunks. Messages before it
are not read; every response says how many there were.
"""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from uuid import uuid4

from fastapi import APIRouter, Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from softrag.answer import Mode, Timings
from softrag.asynchronous import AsyncAnswerStream
from softrag.documents import Hit
from softrag.serve.errors import ApiError, api_error
from softrag.serve.schemas import (
    ChatCompletion,
    ChatCompletionChunk,
    ChatRequest,
    Choice,
    ChunkChoice,
    Delta,
    ModelCard,
    ModelList,
    ReplyMessage,
    SoftRAGFields,
    Source,
    Usage,
)
from softrag.serve.service import RunningAnswer, Service, service_of

DEFAULT_TOKENS = 128

router = APIRouter(prefix="/v1", tags=["OpenAI"])


@router.get("/models")
async def list_models(request: Request) -> ModelList:
    """List the one model."""
    return ModelList(data=[_card(service_of(request))])


@router.get("/models/{model:path}")
async def show_model(request: Request, model: str) -> ModelCard:
    """Describe the model."""
    service = service_of(request)
    _check_model(model, service)
    return _card(service)


@router.post("/chat/completions", response_model=ChatCompletion)
async def complete(request: Request, asked: ChatRequest) -> ChatCompletion | Response:
    """Answer the last message from the memories of the chunks nearest to it."""
    service = service_of(request)
    _check_model(asked.model, service)
    stream = _stream(asked, request, service)
    running = await RunningAnswer.start(service, stream)
    try:
        # What cannot be answered at all has its own status, so look before the response begins.
        first = await running.next()
        reply = _Reply(asked, service.settings.model)
        if asked.stream:
            return _EventStream(reply.events(stream, running, first, service), running)
        piece = first
        while piece is not None:
            piece = await running.next()
            if await request.is_disconnected():
                raise ApiError(400, "The client has left.")  # which frees its place
        running.close()
        return reply.whole(stream)
    except BaseException:
        running.close()
        raise


def _stream(asked: ChatRequest, request: Request, service: Service) -> AsyncAnswerStream:
    """Return the answer to a request; it begins when it is read."""
    question = asked.messages[-1]
    if question.role != "user" or not question.text.strip():
        raise ApiError(
            400,
            "messages: the last one must be the user's question, found one of role "
            f"{question.role!r} with {len(question.text)} characters.",
            param="messages",
        )
    limit = service.settings.max_tokens
    name = "max_tokens" if asked.max_completion_tokens is None else "max_completion_tokens"
    wanted = asked.max_completion_tokens or asked.max_tokens or min(DEFAULT_TOKENS, limit)
    if wanted > limit:
        raise ApiError(400, f"{name} may be at most {limit}, found {wanted}.", param=name)
    return service.engine(request).astream(
        question.text,
        k=asked.softrag.k,
        mode=asked.softrag.mode,
        where=asked.softrag.where,
        max_new_tokens=wanted,
        stop=[asked.stop] if isinstance(asked.stop, str) else asked.stop,
        temperature=asked.temperature or 0.0,
        seed=asked.seed,
    )


class _EventStream(StreamingResponse):
    """Server-sent events of an answer, which stops when the client leaves."""

    def __init__(self, events: AsyncIterator[str], running: RunningAnswer) -> None:
        super().__init__(
            events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"}
        )
        self._running = running

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._running.close()


class _Reply:
    """One answer in OpenAI's words, whole or in pieces."""

    def __init__(self, asked: ChatRequest, model: str) -> None:
        self._asked = asked
        self._id = f"chatcmpl-{uuid4().hex}"
        self._created = int(time.time())
        self._model = model

    def whole(self, stream: AsyncAnswerStream) -> ChatCompletion:
        """Return an answer that was read to its end."""
        answer = stream.answer
        return ChatCompletion(
            id=self._id,
            created=self._created,
            model=self._model,
            choices=[
                Choice(
                    message=ReplyMessage(content=answer.text), finish_reason=answer.finish_reason
                )
            ],
            usage=Usage.of(answer),
            softrag=self._fields(answer.sources, answer.mode, answer.timings),
        )

    async def events(
        self,
        stream: AsyncAnswerStream,
        running: RunningAnswer,
        piece: str | None,
        service: Service,
    ) -> AsyncIterator[str]:
        """Yield an answer as it is written, one event a piece, from its first piece on."""
        try:
            yield self._event(
                [ChunkChoice(delta=Delta(role="assistant", content=""))],
                softrag=self._fields(stream.sources, self._asked.softrag.mode),
            )
            while piece is not None:
                yield self._event([ChunkChoice(delta=Delta(content=piece))])
                piece = await running.next()
            answer = stream.answer
            yield self._event(
                [ChunkChoice(delta=Delta(), finish_reason=answer.finish_reason)],
                softrag=self._fields(answer.sources, answer.mode, answer.timings),
            )
            options = self._asked.stream_options
            if options is not None and options.include_usage:
                yield self._event([], usage=Usage.of(answer))
            yield "data: [DONE]\n\n"
        except Exception as error:
            # The status was sent long ago; clients read errors from the stream, too.
            service.metrics.failed_streams.inc()
            yield f"data: {json.dumps(api_error(error).body)}\n\n"

    def _event(
        self,
        choices: list[ChunkChoice],
        *,
        usage: Usage | None = None,
        softrag: SoftRAGFields | None = None,
    ) -> str:
        chunk = ChatCompletionChunk(
            id=self._id,
            created=self._created,
            model=self._model,
            choices=choices,
            usage=usage,
            softrag=softrag,
        )
        return f"data: {chunk.model_dump_json()}\n\n"

    def _fields(
        self, sources: list[Hit], mode: Mode, timings: Timings | None = None
    ) -> SoftRAGFields:
        return SoftRAGFields(
            sources=[Source.of(hit) for hit in sources],
            mode=mode,
            unread_messages=len(self._asked.messages) - 1,
            timings=timings,
        )


def _check_model(model: str, service: Service) -> None:
    if model != service.settings.model:
        raise ApiError(
            404,
            f"The model {model!r:.80} does not exist; this server has {service.settings.model!r}.",
            param="model",
            code="model_not_found",
        )


def _card(service: Service) -> ModelCard:
    return ModelCard(id=service.settings.model, created=service.created)
