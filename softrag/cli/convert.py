"""`softrag convert`: another project's checkpoint as softrag's own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.text import Text

from softrag.cli.options import Device, Json, hush_transformers


def convert(
    source: Annotated[str, typer.Argument(help="Checkpoint: a folder or a hub name.")],
    folder: Annotated[Path, typer.Argument(help="Where to write.")],
    merge: Annotated[
        bool,
        typer.Option(
            "--merge", help="Also write the merged decoder, FOLDER/decoder, for other engines."
        ),
    ] = False,
    dtype: Annotated[
        Literal["bfloat16", "float16", "float32"] | None,
        typer.Option(help="Of the written weights; as stored unless given."),
    ] = None,
    base_model: Annotated[
        str | None,
        typer.Option(help="Where the base model is, when not where the checkpoint says."),
    ] = None,
    device: Device = None,
    json: Json = False,
) -> None:
    """Write a checkpoint of PISCO, OSCAR, CLaRa or research code in softrag's layout."""
    import torch

    from softrag.checkpoint import read_config
    from softrag.cli.show import print_json
    from softrag.convert import convert as convert_checkpoint
    from softrag.export import served_name

    hush_transformers()
    written = convert_checkpoint(
        source,
        folder,
        merge=merge,
        dtype=None if dtype is None else getattr(torch, dtype),
        base_model=base_model,
        device=device,
    )
    fingerprint = read_config(written).fingerprint
    decoder = str(written / "decoder") if merge else None
    command = (
        f"vllm serve {decoder} --served-model-name {served_name(written)} --enable-prompt-embeds"
    )
    if json:
        print_json(
            {
                "folder": str(written),
                "fingerprint": fingerprint,
                "decoder": decoder,
                "command": command if merge else None,
            }
        )
        return
    # soft_wrap: paths must stay whole to be copied.
    Console().print(Text(f"Wrote {written}, fingerprint {fingerprint}."), soft_wrap=True)
    if merge:
        Console().print(
            Text(
                f"The merged decoder is in {decoder}; its logits were checked. "
                f"Serve it in vLLM's environment:\n  {command}"
            ),
            soft_wrap=True,
        )
