"""The `softrag` command. It knows nothing that the library does not offer everybody."""

from softrag.cli.app import app, main

__all__ = ["app", "main"]
