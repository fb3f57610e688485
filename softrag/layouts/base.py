"""The base models that a checkpoint names: shape and tokenizer, as its research code used them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils.hub import cached_file

from softrag.base_models import resolve_base_model, shape_of
from softrag.config import SoftRAGConfig
from softrag.errors import CheckpointError
from softrag.prompt import add_special_tokens


class BaseModel(NamedTuple):
    """A base model without its weights.

    Attributes:
        name: As `from_pretrained` takes it.
        shape: Its configuration.
        tokenizer: With no token added.
    """

    name: str
    shape: dict[str, Any]
    tokenizer: PreTrainedTokenizerBase


def read_base(name: str, folder: Path) -> BaseModel:
    """Read a base model's configuration and tokenizer.

    Args:
        name: A folder or hub name.
        folder: The checkpoint that names it, for the message.

    Raises:
        CheckpointError: It is neither a folder nor a reachable hub name.
    """
    try:
        place = resolve_base_model(name)
        config = AutoConfig.from_pretrained(place, trust_remote_code=False)
        tokenizer = read_tokenizer(place)
    except (OSError, ValueError) as error:
        raise base_model_error(folder, name, error) from error
    if config.model_type.startswith("gemma"):
        raise CheckpointError(
            f"{folder / 'config.json'} names the base model {name!r}. Gemma scales embeddings "
            "inside the model, and softrag does not read memory tokens' embeddings of such "
            "checkpoints; none is known to be published."
        )
    return BaseModel(name, shape_of(config), tokenizer)


def read_tokenizer(place: str | Path) -> PreTrainedTokenizerBase:
    """Load a tokenizer as its tokenizer.json says.

    Some classes of transformers 5 build their own instead of reading that file, and then split
    text behind a special token differently from the release that a checkpoint was trained with.
    """
    if cached_file(place, "tokenizer.json", _raise_exceptions_for_missing_entries=False) is None:
        return AutoTokenizer.from_pretrained(place, trust_remote_code=False)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(place)
    if not tokenizer.bos_token:
        # Saved as "" by research code, where the base model has none.
        tokenizer.bos_token = None
    return tokenizer


def base_model_error(folder: Path, name: str, error: Exception) -> CheckpointError:
    """Return an error that says which base model is not there, and what to do."""
    reason = str(error).strip().split("\n")[0]
    return CheckpointError(
        f"{folder / 'config.json'} names the base model {name!r}, which is neither a folder on "
        f"this machine nor on a hub that can be reached ({reason}). Say where it is: "
        "SoftRAG.from_pretrained(..., base_model=FOLDER_OR_NAME)."
    )


def with_tokens(
    tokenizer: PreTrainedTokenizerBase, config: SoftRAGConfig
) -> PreTrainedTokenizerBase:
    """Add the config's special tokens to a tokenizer and return it."""
    add_special_tokens(tokenizer, config)
    return tokenizer


def around(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """Return the special tokens that a tokenizer puts before and behind a text."""
    inner = tokenizer.encode("x", add_special_tokens=False)
    whole = tokenizer.encode("x", add_special_tokens=True)
    at = next(i for i in range(len(whole)) if whole[i : i + len(inner)] == inner)
    before, after = whole[:at], whole[at + len(inner) :]
    names = tokenizer.convert_ids_to_tokens
    return "".join(names(before)), "".join(names(after))
