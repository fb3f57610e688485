"""`softrag serve`: an HTTP server in front of a store and a model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from softrag.cli.options import EngineOptions, Grpc, Json, with_engine_options


@with_engine_options
def serve(
    engine_options: EngineOptions,
    grpc: Grpc = False,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    keys: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="File of API keys, `KEY` or `TENANT KEY` per line. Or set SOFTRAG_API_KEYS.",
        ),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Name of the model in requests; its checkpoint's if not set.")
    ] = None,
    max_running: Annotated[int, typer.Option(help="Answers written at the same time.")] = 32,
    max_waiting: Annotated[int, typer.Option(help="Requests that may wait; more get 429.")] = 128,
    timeout: Annotated[float, typer.Option(help="Seconds a request may take.")] = 120.0,
    max_body_mb: Annotated[float, typer.Option(max=1024, help="Largest request, in MiB.")] = 4.0,
    api_keys: Annotated[str | None, typer.Option(envvar="SOFTRAG_API_KEYS", hidden=True)] = None,
    metrics_key: Annotated[
        str | None, typer.Option(envvar="SOFTRAG_METRICS_KEY", hidden=True)
    ] = None,
    json: Json = False,
) -> None:
    """Answer over HTTP, in the shape of OpenAI's API; see docs/serve.md.

    SOFTRAG_API_KEYS and SOFTRAG_METRICS_KEY hold keys, so that they need not stand in a command.
    """
    from softrag.cli.show import print_json
    from softrag.extras import load_extra

    load_extra("fastapi", extra="serve", purpose="softrag serve")
    load_extra("prometheus_client", extra="serve", purpose="softrag serve")
    load_extra("uvicorn", extra="serve", purpose="softrag serve")
    from softrag.serve import Keys, ServeSettings, build_server, check_address, open_tenants, run

    allowed = None
    if keys is not None:
        allowed = Keys.read(keys)
    elif api_keys is not None:
        allowed = Keys.parse(api_keys)
    settings = ServeSettings(
        model=name or Path(engine_options.model).name,
        host=host,
        port=port,
        keys=allowed,
        metrics_key=metrics_key,
        max_running=max_running,
        max_waiting=max_waiting,
        timeout_s=timeout,
        max_body_bytes=int(max_body_mb * 2**20),
    )

    def announce(address: str) -> None:
        if json:
            print_json({"address": address, "model": settings.model})
        else:
            Console().print(
                f"{settings.model} answers at {address}/v1", markup=False, highlight=False
            )

    check_address(host, port)
    # Every tenant has a store of its own; this one only holds the model.
    with replace(engine_options, store=":memory:").open(create=True) as engine:
        tenants = open_tenants(
            engine,
            engine_options.store,
            allowed.tenants if allowed else [""],
            collection=engine_options.collection,
            prefer_grpc=grpc,
        )
        run(build_server(tenants, settings, on_start=announce, quiet=json))
