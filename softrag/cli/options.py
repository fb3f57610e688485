"""Options that several commands share, and the engine they ask for."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_type_hints

import typer

from softrag.errors import StoreError

if TYPE_CHECKING:
    from softrag.engine import SoftRAG

DEMO = Path(__file__).parent.parent / "demo"
"""What ships for trying out: `checkpoint/`, `corpus/`, `questions.json`."""

DEFAULT_STORE = "softrag_store"
# The same folder as DEMO / "checkpoint"; importing its name from the core would load torch.
DEFAULT_MODEL = "softrag-demo"

Store = Annotated[
    str,
    typer.Option(
        envvar="SOFTRAG_STORE", help="Folder of the store, or the URL of a Qdrant server."
    ),
]
Model = Annotated[
    str,
    typer.Option(
        envvar="SOFTRAG_MODEL",
        help="Checkpoint: a folder or a hub name. The demo model unless given.",
    ),
]
Device = Annotated[
    str | None,
    typer.Option(envvar="SOFTRAG_DEVICE", help="Where the model runs, such as cpu or cuda:0."),
]
Dtype = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"],
    typer.Option(
        envvar="SOFTRAG_DTYPE",
        help="Of the weights. auto: bfloat16 on a GPU, float32 for a decoder on a CPU, where "
        "bfloat16 is faster if the CPU computes in it.",
    ),
]
Rate = Annotated[
    int | None,
    typer.Option(
        min=1,
        envvar="SOFTRAG_RATE",
        help="Document tokens per soft token, for checkpoints of several rates.",
    ),
]
Decoder = Annotated[
    str,
    typer.Option(
        envvar="SOFTRAG_DECODER",
        help="What writes answers: torch, the URL of a vLLM server, or vllm in this process.",
    ),
]
Collection = Annotated[
    str, typer.Option(envvar="SOFTRAG_COLLECTION", help="Qdrant collection in the store.")
]
Codec = Annotated[
    Literal["bf16", "fp16", "int8", "fp8", "int4"] | None,
    typer.Option(help="How a new store keeps memories; bf16 unless given."),
]
Grpc = Annotated[
    bool, typer.Option("--grpc", envvar="SOFTRAG_GRPC", help="Talk gRPC to a Qdrant server.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]
TopK = Annotated[int, typer.Option("--top-k", "-k", min=1, help="How many chunks to answer from.")]
ModeName = Annotated[
    Literal["memory", "mixed", "text", "closed"],
    typer.Option(
        help="What is read of the chunks: memories, the best as text and the others' memories, "
        "texts, or nothing."
    ),
]
Fallback = Annotated[
    Path | None,
    typer.Option(
        exists=True,
        dir_okay=False,
        envvar="SOFTRAG_FALLBACK",
        help="A router that answers doubtful questions from text; see softrag eval --calibrate.",
    ),
]
CopyBias = Annotated[
    float | None,
    typer.Option(
        min=0.0,
        max=100.0,
        envvar="SOFTRAG_COPY_BIAS",
        help="Added, where memories are read, to the logits of tokens that go on as the chunks' "
        "texts do; as the model says unless given, 0 for none.",
    ),
]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")]
Temperature = Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token.")]


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """What a command that answers questions is told about its engine, each field an option."""

    store: Store = DEFAULT_STORE
    model: Model = DEFAULT_MODEL
    device: Device = None
    dtype: Dtype = "auto"
    collection: Collection = "softrag"
    rate: Rate = None
    decoder: Decoder = "torch"
    fallback: Fallback = None
    copy_bias: CopyBias = None

    def open(self, *, create: bool = False) -> SoftRAG:
        """Load the engine.

        Args:
            create: Whether a store or collection that does not exist is made.

        Raises:
            StoreError: The store or its collection does not exist and `create` is false.
        """
        if not create:
            check_store(self.store)
        # Imported here: `softrag --help` should not wait for the models' libraries.
        from softrag.engine import SoftRAG
        from softrag.store import MemoryStore

        hush_transformers()
        # Opened by itself, because who only looks makes no collection.
        opened = None if create else MemoryStore.open(self.store, collection=self.collection)
        try:
            return SoftRAG.from_pretrained(
                self.model,
                store=opened or self.store,
                device=self.device,
                dtype=self.dtype,
                collection=self.collection,
                rate=self.rate,
                decoder=self.decoder,
                fallback=self.fallback,
                copy_bias=self.copy_bias,
            )
        except BaseException:
            if opened is not None:
                opened.close()
            raise


def with_engine_options(command: Callable[..., None]) -> Callable[..., None]:
    """Show a command that takes `EngineOptions` to typer as one that takes each of them."""
    hints = get_type_hints(EngineOptions, include_extras=True)
    options = [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=field.default,
            annotation=hints[field.name],
        )
        for field in fields(EngineOptions)
    ]
    signature = inspect.signature(command, eval_str=True)
    shown: list[inspect.Parameter] = []
    for name, parameter in signature.parameters.items():
        if parameter.annotation is EngineOptions:
            taken = name
            shown += options
        else:
            shown.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))

    @functools.wraps(command)
    def run(**values: Any) -> None:
        engine = EngineOptions(**{option.name: values.pop(option.name) for option in options})
        command(**{taken: engine}, **values)

    run.__signature__ = signature.replace(parameters=shown)  # type: ignore[attr-defined]
    return run


def has_store(place: str) -> bool:
    """Tell whether a store's folder is there; a server is asked when it is opened."""
    return "://" in place or Path(place).exists()


def check_store(place: str) -> None:
    """Refuse a folder that is not there, before anything is loaded.

    Raises:
        StoreError: It is not there.
    """
    if not has_store(place):
        raise StoreError(
            f"There is no store at {place}. Make one first: softrag index PATH --store {place}"
        )


def hush_transformers() -> None:
    """Keep bars and reports about loading weights out of a command's output."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity(logging.ERROR)
