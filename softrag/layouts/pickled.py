"""Files of `torch.save`, read without running anything in them, and checked against damage."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from softrag.errors import CheckpointError


def read_pickled(path: Path) -> dict[str, Any]:
    """Read a dict of tensors, or of dicts of them; tensors stay mapped to the file.

    Raises:
        CheckpointError: The file is missing or damaged, holds code, or something else.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            # torch itself checks no checksum: damaged weights would load in silence.
            damaged = archive.testzip()
        if damaged is not None:
            raise CheckpointError(
                f"{path} is damaged: {damaged} does not match its checksum. Copy or download it "
                "again."
            )
        values = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} holds something other than tensors, which softrag never runs. If you know "
            "where the file comes from, ask there for one that holds weights only; else delete it."
        ) from error
    except CheckpointError:
        raise
    except (
        Exception
    ) as error:  # on damaged files, zip reader and unpickler raise what they run into
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise CheckpointError(
            f"{path} is missing or damaged ({reason}). Copy or download it again."
        ) from error
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise CheckpointError(f"{path} holds no tensors by name. Copy or download it again.")
    return values


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Read a dict of tensors.

    Raises:
        CheckpointError: As `read_pickled`.
    """
    return only_tensors(path, read_pickled(path))


def only_tensors(path: Path, values: object) -> dict[str, torch.Tensor]:
    """Return values that are a dict of tensors.

    Raises:
        CheckpointError: They are not.
    """
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} holds no tensors by name. Copy or download it again.")
    for name, tensor in values.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise CheckpointError(
                f"{path} holds {name!r}, which is no tensor. Copy or download it again."
            )
    return values
