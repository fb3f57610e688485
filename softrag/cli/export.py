"""`softrag export`: the decoder as a plain checkpoint, for vLLM and others to serve."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from softrag.cli.options import DEFAULT_MODEL, Json, Model, hush_transformers


def export(
    folder: Annotated[Path, typer.Argument(help="Where to write; created when missing.")],
    model: Model = DEFAULT_MODEL,
    dtype: Annotated[
        Literal["bfloat16", "float16", "float32"], typer.Option(help="Of the written weights.")
    ] = "bfloat16",
    json: Json = False,
) -> None:
    """Write the decoder, its adapters merged, as any engine loads it; see docs/vllm.md."""
    import torch

    from softrag.cli.show import print_json
    from softrag.export import export_decoder, served_name
    from softrag.model import SoftRAGModel

    hush_transformers()
    wanted = getattr(torch, dtype)
    loaded = SoftRAGModel.from_pretrained(model, load_compressor=False, dtype=wanted, device="cpu")
    written = export_decoder(loaded, folder, dtype=wanted)
    command = (
        f"vllm serve {written} --served-model-name {served_name(model)} --enable-prompt-embeds"
    )
    if json:
        print_json({"folder": str(written), "dtype": dtype, "command": command})
        return
    console = Console()
    console.print(f"The decoder is in {written}. Serve it in vLLM's environment:", markup=False)
    console.print(f"  {command}", markup=False, soft_wrap=True)
