"""What requests and responses look like; softrag's own fields are called `softrag`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from softrag.answer import Answer, Mode, Timings
from softrag.documents import Document, Hit
from softrag.serve.errors import ApiError

MAX_TOP_K = 100


def _encodable(text: str) -> str:
    # JSON may spell half of a surrogate pair, which no tokenizer or file can hold.
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("Text should be valid Unicode, without lone surrogates") from None
    return text


# What models and stores can hold.
Text = Annotated[str, AfterValidator(_encodable)]
Integer = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Scalar = Text | bool | Integer | Number
Where = Annotated[
    dict[Text, Scalar | list[Scalar | None] | None],
    Field(
        description="Metadata (or source, title) that chunks must have: a value, a list of "
        "allowed ones, or null for none.",
    ),
]
TopK = Annotated[int, Field(ge=1, le=MAX_TOP_K, description="How many chunks to answer from.")]

# Parameters of OpenAI's API that ask for what this model cannot do, with the values that ask for
# nothing. Clients send those by default, so they are let through; null always is.
_UNSUPPORTED: dict[str, tuple[object, ...]] = {
    "audio": (),
    "best_of": (1,),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "modalities": (["text"],),
    "n": (1,),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "presence_penalty": (0,),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "store": (False,),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "top_p": (1,),
    "web_search_options": (),
}


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid")


class TextPart(_Request):
    """A piece of a message."""

    type: Literal["text"]
    text: Annotated[Text, Field(max_length=100_000)]


class Message(_Request):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[Text, Field(max_length=100_000)] | list[TextPart] | None = None
    name: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _forget_empty_fields(cls, values: Any) -> Any:  # noqa: ANN401 - anything may be sent
        # Clients send back the messages they got, with what was not used in them.
        if isinstance(values, dict):
            return {name: value for name, value in values.items() if value not in (None, [])}
        return values

    @property
    def text(self) -> str:
        """The words of the message."""
        if isinstance(self.content, list):
            return "\n".join(part.text for part in self.content)
        return self.content or ""


class StreamOptions(_Request):
    """How a stream ends."""

    include_usage: bool | None = False


class RetrievalOptions(_Request):
    """Which chunks an answer is made from, and what is read of them."""

    k: TopK = 5
    mode: Mode = "memory"
    where: Where | None = None


class ChatRequest(_Request):
    """`POST /v1/chat/completions`."""

    model: str
    messages: Annotated[list[Message], Field(min_length=1, max_length=1000)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    stop: Text | Annotated[list[Text], Field(max_length=16)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    user: str | None = None
    metadata: dict[str, str] | None = None
    softrag: RetrievalOptions = RetrievalOptions()

    @model_validator(mode="before")
    @classmethod
    def _refuse_what_is_not_offered(cls, values: Any) -> Any:  # noqa: ANN401 - as above
        if not isinstance(values, dict):
            return values
        for name, neutral in _UNSUPPORTED.items():
            value = values.get(name)
            if value is not None and value not in neutral:
                raise ApiError(
                    400,
                    f"{name} is not offered by this model, found {value!r:.80}. Leave it out.",
                    param=name,
                    code="unsupported_parameter",
                )
        return {name: value for name, value in values.items() if name not in _UNSUPPORTED}


class Source(BaseModel):
    """A chunk that an answer is made from."""

    id: str
    score: float
    source: str | None
    title: str | None
    text: str
    metadata: dict[str, Any]

    @classmethod
    def of(cls, hit: Hit) -> Source:
        """Return a hit without its memory."""
        return cls(
            id=hit.id,
            score=hit.score,
            source=hit.source,
            title=hit.title,
            text=hit.text,
            metadata=dict(hit.metadata),
        )


class SoftRAGFields(BaseModel):
    """What an answer was made from.

    Attributes:
        sources: Best first.
        mode: What was read of them.
        unread_messages: Messages before the question; the model reads the question alone.
        timings: In seconds; None before the end of a stream.
    """

    sources: list[Source]
    mode: Mode
    unread_messages: int
    timings: Timings | None = None


class Usage(BaseModel):
    """Tokens; `prompt_tokens` contains the soft ones, `text_prompt_tokens` is without memories."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    soft_tokens: int
    text_prompt_tokens: int | None

    @classmethod
    def of(cls, answer: Answer) -> Usage:
        """Return what an answer cost."""
        usage = answer.usage
        return cls(
            prompt_tokens=usage.prompt_tokens,
            completion_tokens=usage.completion_tokens,
            total_tokens=usage.prompt_tokens + usage.completion_tokens,
            soft_tokens=usage.soft_tokens,
            text_prompt_tokens=usage.text_prompt_tokens,
        )


class ReplyMessage(BaseModel):
    """The model's turn."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class Choice(BaseModel):
    """The only choice."""

    index: Literal[0] = 0
    message: ReplyMessage
    logprobs: None = None
    finish_reason: Literal["stop", "length"]


class ChatCompletion(BaseModel):
    """A whole answer."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage
    softrag: SoftRAGFields


class Delta(BaseModel):
    """What is new in a piece of an answer."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChunkChoice(BaseModel):
    """The only choice, in pieces."""

    index: Literal[0] = 0
    delta: Delta
    logprobs: None = None
    finish_reason: Literal["stop", "length"] | None = None


class ChatCompletionChunk(BaseModel):
    """A piece of an answer; `softrag` is in the first one, and with timings in the last."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = None
    softrag: SoftRAGFields | None = None


class ModelCard(BaseModel):
    """A model that can be asked."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["softrag"] = "softrag"


class ModelList(BaseModel):
    """`GET /v1/models`."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class NewDocument(_Request):
    """A document to add; one with a source replaces what is stored under it."""

    text: Text
    source: Annotated[Text, Field(max_length=1000)] | None = None
    title: Annotated[Text, Field(max_length=1000)] | None = None
    metadata: dict[Text, Scalar | list[Text]] = {}

    def document(self) -> Document:
        """Return it as the engine takes it."""
        return Document(
            text=self.text, source=self.source, title=self.title, metadata=self.metadata
        )


class AddRequest(_Request):
    """`POST /v1/documents`."""

    documents: Annotated[list[NewDocument], Field(min_length=1, max_length=10_000)]


class Deleted(BaseModel):
    """How many chunks were deleted."""

    deleted: int


class RetrieveRequest(_Request):
    """`POST /v1/retrieve`."""

    query: Annotated[Text, Field(max_length=100_000)]
    k: TopK = 5
    where: Where | None = None


class SourceList(BaseModel):
    """The chunks nearest to a question, best first."""

    object: Literal["list"] = "list"
    data: list[Source]


class Health(BaseModel):
    """`GET /healthz`."""

    status: Literal["ok"] = "ok"
    model: str


class ErrorBody(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(BaseModel):
    """The body of every response that is no success."""

    error: ErrorBody
