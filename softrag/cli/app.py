"""The `softrag` command's parts put together, and how it fails.

Exit codes: 0 done, 1 failed, 2 misused. Errors that softrag raises on purpose are shown as their
message, without a traceback.
"""

from __future__ import annotations

from typing import Any

import typer
from rich.console import Console
from rich.text import Text
from typer.core import TyperGroup

from softrag.cli import ask, bench, chat, convert, demo, evaluate, export, index, info, serve, store
from softrag.errors import SoftRAGError


class _Group(TyperGroup):
    """Turns errors into messages and exit codes."""

    def invoke(self, ctx: Any) -> Any:  # noqa: ANN401 - click's own signature
        """Run the command."""
        try:
            return super().invoke(ctx)
        except (SoftRAGError, ValueError, OSError) as error:
            # soft_wrap: messages hold paths, which must stay whole to be copied.
            Console(stderr=True).print(Text(f"Error: {error}", style="red"), soft_wrap=True)
            raise typer.Exit(1) from None
        except KeyboardInterrupt:
            Console(stderr=True).print(
                Text("Stopped. What is stored stays stored.", style="yellow"), soft_wrap=True
            )
            raise typer.Exit(1) from None


app = typer.Typer(
    name="softrag",
    cls=_Group,
    help="Answer questions about your documents from compressed memories of them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("index")(index.index)
app.command("ask")(ask.ask)
app.command("chat")(chat.chat)
app.command("info")(info.info)
app.command("eval")(evaluate.evaluate)
app.command("convert")(convert.convert)
app.command("serve")(serve.serve)
app.command("export")(export.export)
app.command("demo")(demo.demo)
app.add_typer(store.store, name="store")
app.add_typer(bench.app, name="bench")


def main() -> None:
    """Run the `softrag` command."""
    app()
