"""What users filter on, as a Qdrant filter. It knows no client."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, TypeAlias

from softrag.store.connection import qdrant

if TYPE_CHECKING:
    from qdrant_client import models

    FilterValue: TypeAlias = str | int | float | bool | None
    Where: TypeAlias = Mapping[str, FilterValue | Sequence[FilterValue]] | models.Filter | None

# Payload fields beside the user's metadata that can be filtered on by their plain name.
TOP_LEVEL = ("source", "title")


def to_filter(where: Where) -> models.Filter | None:
    """Return the Qdrant filter of `where`.

    Args:
        where: Metadata keys (or `source`, `title`) with the value a chunk must have, or a list of
            values of which it must have one; None stands for "has no value". All keys must match;
            a chunk whose own value is a list matches with any of it. A Qdrant filter is returned
            as it is.

    Raises:
        TypeError: It is neither a mapping nor a filter.
        ValueError: A key or value cannot be filtered on.
    """
    models = qdrant().models
    if where is None or isinstance(where, models.Filter):
        return where
    if not isinstance(where, Mapping):
        raise TypeError(
            f"where must be a mapping such as {{'lang': 'en'}}, or a qdrant_client.models.Filter; "
            f"found {where!r:.80}."
        )
    return models.Filter(must=[_condition(_path(key), value) for key, value in where.items()])


def _path(key: str) -> str:
    """Return the JSON path of a key."""
    if key in TOP_LEVEL:
        return key
    if not isinstance(key, str) or '"' in key or not key:
        raise ValueError(
            f"Metadata key {key!r:.80} cannot be filtered on: it must be a string, not empty and "
            "without quotation marks."
        )
    # Quoted, because a dot or bracket in a key would otherwise lead into nested values.
    return f'metadata."{key}"'


def _condition(path: str, value: object) -> models.Condition:
    models = qdrant().models
    if value is None:
        return models.IsEmptyCondition(is_empty=models.PayloadField(key=path))
    if isinstance(value, (str, int)):  # bool is an int
        return models.FieldCondition(key=path, match=models.MatchValue(value=value))
    if isinstance(value, float):  # Qdrant matches no floats, but has ranges of them
        return models.FieldCondition(key=path, range=models.Range(gte=value, lte=value))
    if isinstance(value, (list, tuple, set, frozenset)):
        values = list(value)
        kinds = {type(each) for each in values}
        if kinds in ({str}, {int}, set()):
            return models.FieldCondition(key=path, match=models.MatchAny(any=values))
        return models.Filter(should=[_condition(path, each) for each in values])
    raise ValueError(
        f"{path} cannot be compared with {value!r} of type {type(value).__name__}. Give a string, "
        "number, bool or None, a list of them, or a qdrant_client.models.Filter."
    )
