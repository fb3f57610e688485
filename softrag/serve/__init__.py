"""An HTTP server in front of store and decoder, in the shape of OpenAI's API. Extra: `serve`."""

from softrag.serve.app import create_app
from softrag.serve.auth import Keys
from softrag.serve.server import build_server, check_address, open_tenants, run
from softrag.serve.settings import ServeSettings

__all__ = [
    "Keys",
    "ServeSettings",
    "build_server",
    "check_address",
    "create_app",
    "open_tenants",
    "run",
]
