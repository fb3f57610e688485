"""Optional imports that name the extra to install. It knows nothing of what they are used for."""

import importlib
from types import ModuleType

from softrag.errors import MissingExtraError

DISTRIBUTION = "softrag-memory"


def load_extra(module: str, *, extra: str, purpose: str) -> ModuleType:
    """Import an optional dependency, or say how to install it.

    Args:
        module: Dotted name of the module, e.g. `"qdrant_client"`.
        extra: Extra of the distribution that brings it, e.g. `"qdrant"`.
        purpose: What needs it, for the message.

    Raises:
        MissingExtraError: `module` is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        # A broken dependency of an installed module must not read as "not installed".
        if error.name is None or not (module == error.name or module.startswith(f"{error.name}.")):
            raise
        raise MissingExtraError(
            f"{purpose} needs `{module}`. Install it with: pip install '{DISTRIBUTION}[{extra}]'"
        ) from error
