"""A language model behind an OpenAI-compatible URL, asked many prompts at once."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from softrag.errors import EndpointError

TRIES = 3


@dataclass(frozen=True, kw_only=True)
class ChatEndpoint:
    """Chat completions over HTTP; greedy, one turn.

    Attributes:
        url: With or without `/chat/completions`, such as `http://localhost:8000/v1`.
        model: Its name there; None for the first the server lists.
        api_key: Sent as a bearer token; None for none.
        timeout_s: Seconds to wait for one reply.
        threads: Prompts on their way together.
        pause_s: Seconds before a failed prompt is tried again; doubles every time.
    """

    url: str
    model: str | None = None
    api_key: str | None = field(default=None, repr=False)
    timeout_s: float = 120.0
    threads: int = 16
    pause_s: float = 1.0

    def __post_init__(self) -> None:
        """Refuse what is no URL of a web server."""
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(f"Expected an http:// or https:// URL, found {self.url!r}.")

    def complete(self, prompts: Sequence[str], *, max_tokens: int) -> list[str]:
        """Return one reply per prompt, in order.

        Raises:
            EndpointError: The server cannot be reached, refuses, or answers something else.
        """
        model = self.model_name  # asked for once, before there are threads
        with ThreadPoolExecutor(self.threads, thread_name_prefix="softrag-chat") as threads:
            return list(threads.map(lambda prompt: self._reply(model, prompt, max_tokens), prompts))

    @cached_property
    def model_name(self) -> str:
        """The model that replies."""
        if self.model is not None:
            return self.model
        listed = self._request(f"{self._base}/models")
        try:
            return str(listed["data"][0]["id"])
        except (LookupError, TypeError):
            raise EndpointError(
                f"{self._base} lists no model. Name the one to ask (--judge-model, --writer-model, "
                "teacher_model=)."
            ) from None

    @property
    def _base(self) -> str:
        return self.url.rstrip("/").removesuffix("/chat/completions")

    def _reply(self, model: str, prompt: str, max_tokens: int) -> str:
        body = {
            "model": model,
            "messages": [{"role": "user", "content": prompt}],
            "temperature": 0,
            "max_tokens": max_tokens,
        }
        reply = self._request(f"{self._base}/chat/completions", body)
        try:
            return str(reply["choices"][0]["message"]["content"] or "")
        except (LookupError, TypeError):
            raise EndpointError(
                f"{self._base} gave no chat completion but {str(reply)[:200]!r}. Is it an "
                "OpenAI-compatible server?"
            ) from None

    def _request(self, url: str, body: dict[str, Any] | None = None) -> Any:  # noqa: ANN401 - JSON
        headers = {"Content-Type": "application/json"}
        if self.api_key is not None:
            headers["Authorization"] = f"Bearer {self.api_key}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(url, data, headers)
        for attempt in range(TRIES):
            if attempt:
                time.sleep(self.pause_s * 2 ** (attempt - 1))
            try:
                with urllib.request.urlopen(request, timeout=self.timeout_s) as response:
                    return json.loads(response.read())
            except urllib.error.HTTPError as error:
                reason = f"{error.code} {error.read()[:200].decode(errors='replace')}"
                # Only what may pass by itself is tried again.
                if error.code != 429 and error.code < 500:
                    break
            except (OSError, ValueError) as error:  # Unreachable, timed out, or no JSON.
                reason = str(error)
        raise EndpointError(f"{url} failed: {reason}. Check the URL, the model's name and the key.")
