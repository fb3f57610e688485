"""`softrag bench`: speed on this machine, beside the naive way and the hardware's limit."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from softrag.cli.options import DEFAULT_MODEL, Device, Json, MaxNewTokens, Model, hush_transformers

if TYPE_CHECKING:
    import torch

    from softrag.bench.measure import Recorder
    from softrag.model import SoftRAGModel

app = typer.Typer(
    help="Measure speed on this machine, beside the naive way and the hardware's limit.",
    no_args_is_help=True,
)

RandomWeights = Annotated[
    str | None,
    typer.Option(
        metavar="PRESET",
        help="Random weights of a shape instead of a checkpoint: qwen3-0.6b, qwen3-8b, "
        "mistral-7b or tiny.",
    ),
]
Seed = Annotated[int, typer.Option(help="Of random weights and inputs.")]


@app.command("compress")
def compress(
    model: Model = DEFAULT_MODEL,
    random_weights: RandomWeights = None,
    device: Device = None,
    documents: Annotated[int, typer.Option(min=1, help="How many documents.")] = 256,
    batch_tokens: Annotated[int | None, typer.Option(min=1, help="Tokens of a batch.")] = None,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Measure texts to memories: documents of 128 tokens, of real lengths, and the naive way."""
    from softrag.bench.compress import bench_compress, bench_naive_compress
    from softrag.bench.measure import Hardware

    recorder = _recorder(device, seed, json=json)
    loaded = _load(model, random_weights, recorder, load_decoder=False)
    hardware = Hardware.measure(recorder.device, loaded.dtype)
    bench_compress(loaded, recorder, hardware, documents=documents, batch_tokens=batch_tokens)
    bench_naive_compress(loaded, recorder, hardware, documents=documents, batch=256)
    _end(recorder, json=json)


@app.command("decode")
def decode(
    model: Model = DEFAULT_MODEL,
    random_weights: RandomWeights = None,
    device: Device = None,
    documents: Annotated[
        str, typer.Option(help="Documents in a prompt, with commas between.")
    ] = "1,5,10",
    batches: Annotated[
        str, typer.Option(help="Requests answered together, with commas between.")
    ] = "1,8,64",
    arrivals: Annotated[
        int, typer.Option(min=0, help="Requests that arrive at random; 0 leaves this out.")
    ] = 64,
    naive: Annotated[bool, typer.Option(help="Measure Hugging Face generate too.")] = True,
    max_new_tokens: MaxNewTokens = 64,
    plot: Annotated[Path | None, typer.Option(help="Save a picture (needs matplotlib).")] = None,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Measure answering from memories and from text: alone, in batches, as requests arrive."""
    from softrag.bench.decode import Floors, bench_arrivals, bench_batch, bench_naive, bench_single
    from softrag.bench.measure import Hardware
    from softrag.decoder import TorchDecoder
    from softrag.extras import load_extra

    counts = [_numbers(documents, "documents"), _numbers(batches, "batches")]
    if plot is not None:
        load_extra("matplotlib", extra="eval", purpose="--plot")
    recorder = _recorder(device, seed, json=json)
    loaded = _load(model, random_weights, recorder)
    floors = Floors(loaded, Hardware.measure(recorder.device, loaded.dtype))
    if naive:
        bench_naive(loaded, recorder, floors, new_tokens=max_new_tokens)
    decoder = TorchDecoder(loaded)
    for count in counts[0]:
        bench_single(decoder, recorder, floors, documents=count, new_tokens=max_new_tokens)
    for count in counts[1]:
        bench_batch(decoder, recorder, floors, batch=count, new_tokens=max_new_tokens)
    if arrivals:
        bench_arrivals(decoder, recorder, count=arrivals)
    if plot is not None:
        from softrag.bench.plot import save_plot

        save_plot(recorder.results, plot)
    _end(recorder, json=json)


@app.command("store")
def store(
    chunks: Annotated[int, typer.Option(min=1, help="How many chunks.")] = 2000,
    hidden: Annotated[int, typer.Option(min=1, help="Width of a soft token.")] = 576,
    location: Annotated[
        str | None, typer.Option(help="Folder or URL of a Qdrant server; else a temporary folder.")
    ] = None,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Measure writing chunks with memories, and finding them again."""
    from softrag.bench.store import bench_store

    recorder = _recorder("cpu", seed, json=json)
    bench_store(recorder, chunks=chunks, hidden=hidden, location=location)
    _end(recorder, json=json)


@app.command("end-to-end")
def end_to_end(
    model: Model = DEFAULT_MODEL,
    random_weights: RandomWeights = None,
    device: Device = None,
    chunks: Annotated[int, typer.Option(min=5, help="Documents to index.")] = 200,
    questions: Annotated[int, typer.Option(min=1, help="Questions asked at once.")] = 64,
    max_new_tokens: MaxNewTokens = 20,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Measure indexing and answering from a store, beside a loop over Hugging Face generate."""
    from softrag.bench.end_to_end import bench_end_to_end
    from softrag.embedder import default_embedder

    recorder = _recorder(device, seed, json=json)
    loaded = _load(model, random_weights, recorder)
    bench_end_to_end(
        loaded, recorder, default_embedder(), chunks=chunks, questions=questions,
        new_tokens=max_new_tokens,
    )  # fmt: skip
    _end(recorder, json=json)


def _recorder(device: str | None, seed: int, *, json: bool) -> Recorder:
    from softrag.backbones import choose_device
    from softrag.bench.measure import Recorder

    hush_transformers()
    chosen = choose_device(device)
    console = Console()
    recorder = Recorder(device=chosen, seed=seed)
    if not json:
        recorder.say = lambda line: console.print(
            line, markup=False, highlight=False, soft_wrap=True
        )
    return recorder


def _load(
    model: str, preset: str | None, recorder: Recorder, *, load_decoder: bool = True
) -> SoftRAGModel:
    if preset is not None:
        from softrag.bench.presets import build_model

        return build_model(
            preset, device=recorder.device, dtype=_dtype(recorder.device), seed=recorder.seed,
            load_decoder=load_decoder,
        )  # fmt: skip
    from softrag.model import SoftRAGModel

    return SoftRAGModel.from_pretrained(model, device=recorder.device, load_decoder=load_decoder)


def _dtype(device: torch.device) -> torch.dtype:
    import torch

    return torch.bfloat16 if device.type == "cuda" else torch.float32


def _numbers(text: str, name: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise typer.BadParameter(f"found {text!r}; expected numbers, as in 1,5", param_hint=name)
    return numbers


def _end(recorder: Recorder, *, json: bool) -> None:
    from softrag.cli.show import print_json

    if json:
        print_json([asdict(result) for result in recorder.results])
