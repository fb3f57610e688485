"""Options that several commands share, and the engine they ask for."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

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
    Literal["memory", "text", "closed"],
    typer.Option(help="What is read of the chunks: memories, texts, or nothing."),
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
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")]
Temperature = Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token.")]


def load_engine(
    model: str,
    store: str,
    *,
    device: str | None,
    decoder: str = "torch",
    collection: str = "softrag",
    codec: str | None = None,
    prefer_grpc: bool = False,
    load_decoder: bool = True,
    chunk_tokens: int | None = None,
    create: bool = False,
    fallback: Path | None = None,
    rate: int | None = None,
) -> SoftRAG:
    """Load the engine for a command.

    Args:
        model: Checkpoint.
        store: Folder or URL.
        device: As the option.
        decoder: As the option.
        collection: Of the store.
        codec: Of a new store.
        prefer_grpc: Talk gRPC to a server.
        load_decoder: False to index only.
        chunk_tokens: Longest chunk.
        create: Whether a store folder that does not exist is made.
        fallback: A router's file.
        rate: As the option.

    Raises:
        StoreError: The folder does not exist and `create` is false.
    """
    if not create and "://" not in store and not Path(store).exists():
        raise StoreError(
            f"There is no store at {store}. Make one first: softrag index PATH --store {store}"
        )
    # Imported here: `softrag --help` should not wait for the models' libraries.
    from softrag.engine import SoftRAG

    hush_transformers()
    return SoftRAG.from_pretrained(
        model,
        store=store,
        device=device,
        decoder=decoder,
        collection=collection,
        codec=codec,
        prefer_grpc=prefer_grpc,
        load_decoder=load_decoder,
        chunk_tokens=chunk_tokens,
        fallback=fallback,
        rate=rate,
    )


def hush_transformers() -> None:
    """Keep bars and reports about loading weights out of a command's output."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity(logging.ERROR)
