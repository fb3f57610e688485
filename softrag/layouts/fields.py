"""Fields of a foreign config.json, checked one by one; those that nobody asks for are ignored."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from softrag.errors import CheckpointError


class FieldReader:
    """Gets fields of one type, or says which one has another."""

    def __init__(self, path: Path, values: Mapping[str, Any]) -> None:
        """Read fields of `values`; `path` is named in errors."""
        self.path = path
        self.values = values

    def __call__(self, name: str, default: Any, kind: type) -> Any:  # noqa: ANN401
        """Return a field, or its default where it is absent.

        Raises:
            CheckpointError: It is of another kind.
        """
        value = self.values.get(name, default)
        # A bool is an int to Python, and a wrong number to everyone else.
        wrong_bool = isinstance(value, bool) and kind is not bool
        if value is not None and (wrong_bool or not isinstance(value, kind)):
            raise CheckpointError(
                f"{self.path} says {name}: {value!r}; expected {kind.__name__}. Restore the file."
            )
        return value

    def required(self, name: str, kind: type) -> Any:  # noqa: ANN401
        """Return a field that must be there.

        Raises:
            CheckpointError: It is absent or of another kind.
        """
        value = self(name, None, kind)
        if value is None:
            raise CheckpointError(f"{self.path} lacks {name}. Restore the file.")
        return value
