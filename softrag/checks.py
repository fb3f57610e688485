"""Arguments, refused by name where they are given, before anything is made of them."""

from __future__ import annotations

from collections.abc import Collection
from numbers import Integral, Real
from typing import cast


def check_number(
    name: str, value: object, *, least: float, most: float | None = None, whole: bool = False
) -> None:
    """Refuse what is no number, or too small or too large a one; NaN is neither.

    Args:
        name: Of the argument.
        value: What was given for it; numpy's numbers are numbers too, True and False are not.
        least: The smallest it may be.
        most: The largest it may be; None: no limit.
        whole: Whether it says how many, or which.

    Raises:
        TypeError: It is no number, or not the kind that is wanted.
        ValueError: It is outside the limits.
    """
    if isinstance(value, bool) or not isinstance(value, Integral if whole else Real):
        wanted, fix = ("a whole number", "an int") if whole else ("a number", "a float")
        raise TypeError(f"{name} must be {wanted}, found {value!r:.80}. Give {fix}.")
    number = cast("float", value)
    if not (number >= least and (most is None or number <= most)):
        wanted = f"at least {least}" if most is None else f"from {least} to {most}"
        raise ValueError(f"{name} must be {wanted}, found {value}.")


def check_count(name: str, value: object) -> None:
    """Refuse what does not say how many, at least one; arguments and errors as `check_number`."""
    check_number(name, value, least=1, whole=True)


def check_copy_bias(value: object) -> None:
    """Refuse what is no copy bias (`softrag.SoftRAG`); errors as `check_number`."""
    check_number("copy_bias", value, least=0.0, most=100.0)


def check_text(name: str, value: object) -> None:
    """Refuse what no tokenizer reads.

    Args:
        name: Of the argument.
        value: What was given for it.

    Raises:
        TypeError: It is no string.
        ValueError: It holds half of a surrogate pair.
    """
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a string, found {value!r:.80}.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} is no valid Unicode: found half of a surrogate pair, "
            f"{value[error.start]!a}, at character {error.start}. Clean it with softrag.clean_text."
        ) from None


def check_texts(name: str, values: object, *, or_else: tuple[type, ...] = ()) -> None:
    """Refuse what are not several texts, each as `check_text` wants it.

    Args:
        name: Of the argument.
        values: What was given for it.
        or_else: What may stand among the texts.

    Raises:
        TypeError: It is one text, can be read only once, or holds something else.
        ValueError: A text holds half of a surrogate pair.
    """
    # A string is a collection of strings too, and would be taken letter by letter.
    if isinstance(values, str) or not isinstance(values, Collection):
        raise TypeError(
            f"{name} must be a list, found {values!r:.80}. Put one in []; make a list of an "
            "iterator."
        )
    for place, value in enumerate(values):
        if isinstance(value, str):
            check_text(f"{name}[{place}]", value)
        elif not isinstance(value, or_else):
            wanted = " or ".join(kind.__name__ for kind in (str, *or_else))
            raise TypeError(f"{name}[{place}] must be of type {wanted}, found {value!r:.80}.")
