"""Model cards: whose licence a checkpoint has, and where a converted one comes from."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import metadata_load, metadata_save

_CARD = "README.md"
_SOURCE_CARD = "SOURCE_README.md"
_NON_COMMERCIAL = re.compile(r"\bCC[- ]BY[- ]NC\b|\bnon-?commercial\b", re.IGNORECASE)


class Licence(NamedTuple):
    """What a model card says about its licence.

    Attributes:
        name: As the hub writes it, such as "apache-2.0"; None where the card names none.
        note: What to know beyond the name.
        fields: The card's metadata about it, to be kept in copies.
    """

    name: str | None
    note: str | None
    fields: dict[str, Any]


def read_licence(folder: Path) -> Licence:
    """Read the licence from a checkpoint's model card.

    Where text and metadata disagree on commercial use, the stricter one counts: PISCO's cards say
    CC BY 4.0 in their metadata and CC BY-NC 4.0 in their text.
    """
    path = folder / _CARD
    if not path.is_file():
        return Licence(None, "There is no model card. Ask the makers before you use it.", {})
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        metadata = metadata_load(path) or {}
    except Exception as error:  # on damaged front matter, the parser raises classes of its own
        return Licence(None, f"The model card's metadata can't be read: {error}", {})
    fields = {key: metadata[key] for key in metadata if str(key).startswith("license")}
    name = fields.get("license")
    name = None if name is None else str(name)
    if _NON_COMMERCIAL.search(text) and "nc" not in re.split(r"\W+", (name or "").lower()):
        note = f"The card's text forbids commercial use, its metadata says {name}."
        return Licence("cc-by-nc-4.0", note, fields | {"license": "cc-by-nc-4.0"})
    if name is None:
        return Licence(None, "The model card names no licence. Ask the makers.", fields)
    return Licence(name, None, fields)


def write_card(
    folder: Path, *, source: Path, source_name: str, base_model: str | None, facts: list[str]
) -> None:
    """Write the card of a converted checkpoint: the source's licence, and where it comes from.

    The source's own card and licence files are copied along.

    Args:
        folder: The converted checkpoint.
        source: Its source.
        source_name: What the source was called by, such as its hub name.
        base_model: The decoder's base model.
        facts: Sentences on what was done.
    """
    licence = read_licence(source)
    fields = dict(licence.fields)
    if licence.name is None:
        fields |= {"license": "other", "license_name": "unknown"}
    for file in source.iterdir():
        kept = file.name.upper().startswith(("LICENSE", "LICENCE", "NOTICE"))
        if file.is_file() and kept and file.resolve() != (folder / file.name).resolve():
            shutil.copyfile(file, folder / file.name)
    if (source / _CARD).is_file() and source.resolve() != folder.resolve():
        shutil.copyfile(source / _CARD, folder / _SOURCE_CARD)
    lines = [
        f"# {Path(source_name).name}, for softrag",
        "",
        f"Converted from `{source_name}` by `softrag convert`. The weights are its makers' work; "
        f"what they say about them is in `{_SOURCE_CARD}`, where they say something.",
        "",
        f"**Licence:** {licence.name or 'unknown'}, as of the source."
        + (f" {licence.note}" if licence.note else "")
        + " The base model's licence applies as well.",
        "",
        *(f"- {fact}" for fact in facts),
        "",
        "```python",
        "from softrag import SoftRAG",
        "",
        'rag = SoftRAG.from_pretrained("THIS_FOLDER")',
        "```",
        "",
    ]
    (folder / _CARD).write_text("\n".join(lines), encoding="utf-8")
    metadata = {**fields, "library_name": "softrag"}
    # A folder of this machine says nothing to others.
    if base_model is not None and not Path(base_model).is_dir():
        metadata["base_model"] = base_model
    metadata_save(folder / _CARD, metadata)
