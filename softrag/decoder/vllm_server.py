"""A vLLM server over HTTP: complete prompt embeddings go there, tokens come back.

It knows nothing of questions and documents.
"""

from __future__ import annotations

import base64
import io
import json
import logging
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import httpx
import torch

from softrag.decoder.prompts import BuiltPrompt, PromptEmbeddings
from softrag.decoder.vllm import Piece
from softrag.errors import DecoderError
from softrag.export import SERVED_PREFIX

logger = logging.getLogger(__name__)

_CONNECT_S = 5.0
_FIRST_WAIT_S = 0.25
_LONGEST_WAIT_S = 2.0
# Busy or restarting; a proxy says the latter two.
_TRY_AGAIN = {429, 502, 503, 504}


class _Served(NamedTuple):
    """What a server serves: the model's name and the most tokens of a prompt and its answer."""

    model: str
    limit: int | None


class RefusedError(DecoderError):
    """The server refused a request, or failed at it."""


class _NotNowError(Exception):
    """The server is not there or busy: the same request may succeed later."""

    def __init__(self, message: str, wait_s: float | None = None) -> None:
        super().__init__(message)
        self.wait_s = wait_s


class VLLMServer:
    """Connections to one server, with bounded retries and errors that say what to do.

    Args:
        url: Such as `http://host:8000`.
        model: As the server calls it; None when it serves one model only, or this one.
        decoder: What `softrag.export.served_name` calls the model that is meant.
        api_key: Of the server.
        timeout_s: Longest silence of the server.
        retries: How often a request is sent again when the server is not there or busy, waiting
            0.25, 0.5, 1 … seconds. Never after the first token of an answer.
        connections: Most that stay open between requests.
    """

    def __init__(
        self,
        url: str,
        *,
        decoder: str,
        model: str | None = None,
        api_key: str | None = None,
        timeout_s: float = 60.0,
        retries: int = 3,
        connections: int = 64,
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"url must start with http:// or https://, found {url!r}.")
        self.url = url.rstrip("/").removesuffix("/v1")
        self._model = model
        self._decoder = decoder
        self._timeout_s = timeout_s
        self._retries = retries
        self._served: _Served | None = None
        self._http = httpx.Client(
            base_url=self.url,
            headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
            timeout=httpx.Timeout(timeout_s, connect=_CONNECT_S),
            # The decoder bounds the requests under way.
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=connections),
        )

    def served(self) -> _Served:
        """Return what the server serves, asked once and again after it was gone.

        Raises:
            DecoderError: The server is not there, or does not serve the model.
        """
        served = self._served
        if served is None:
            # No lock: while the server is away, callers must not wait for one another's attempts.
            served = self._served = self._with_retries(self._ask_models)
        return served

    def events(self, path: str, body: dict[str, Any]) -> Generator[dict[str, Any], None, None]:
        """Post a request and yield the server-sent events of its answer.

        Raises:
            DecoderError: The server is not there, refused the request or broke off.
        """
        waits = self._waits()
        while True:
            begun = False
            try:
                for event in self._post(path, body):
                    begun = True
                    yield event
                return
            except _NotNowError as error:
                self._served = None  # It may come back as another.
                if begun:
                    raise DecoderError(
                        f"The vLLM server at {self.url} broke off in the middle of an answer "
                        f"({error}). Ask again; if it stays away, see its log."
                    ) from error
                self._wait(waits, error)

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    # Requests

    def _post(self, path: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        with self._translate(), self._http.stream("POST", path, json=body) as response:
            self._check(response)
            lines = _lines(response)
            for line in lines:
                data = line.removeprefix(b"data:").strip()
                if not data or data == line:
                    continue  # a comment or the border between two events
                if data == b"[DONE]":
                    _drain(lines)
                    return
                event = json.loads(data)
                if "error" in event:
                    said = _message(data.decode())
                    raise RefusedError(
                        f"The vLLM server at {self.url} failed at an answer: {said}. Ask again, "
                        "and see its log."
                    )
                yield event
        # No [DONE]: the server closed the connection in good order but too early.
        raise _NotNowError("the answer has no end")

    def _ask_models(self) -> _Served:
        with self._translate():
            response = self._http.get("/v1/models")
            self._check(response)
        try:
            models = {each["id"]: each for each in response.json()["data"]}
        except (ValueError, KeyError, TypeError) as error:
            raise DecoderError(
                f"{self.url}/v1/models did not answer as a vLLM server does. Check the URL."
            ) from error
        names = list(models)
        name = self._model or (self._decoder if self._decoder in models else None)
        if name is None and len(names) == 1:
            name = names[0]
        if name is None:
            raise DecoderError(
                f"The vLLM server at {self.url} serves {_listed(names)}; say which is the "
                "checkpoint's exported decoder (model=…)."
            )
        if name not in models:
            raise DecoderError(
                f"The vLLM server at {self.url} serves {_listed(names)}, but no model {name!r}. "
                "Start it with --served-model-name, or name the model it serves (model=…)."
            )
        if name.startswith(SERVED_PREFIX) and name != self._decoder:
            raise DecoderError(
                f"The vLLM server at {self.url} serves {name!r}, the decoder of another "
                f"checkpoint; this one's is {self._decoder!r}. Export it and serve that one, or "
                "load the checkpoint that the server is for."
            )
        return _Served(name, models[name].get("max_model_len"))

    @contextmanager
    def _translate(self) -> Iterator[None]:
        """Turn the HTTP client's errors into ours."""
        try:
            yield
        except httpx.ReadTimeout as error:
            # Not tried again: a server that hangs or drowns is not helped by more requests.
            raise DecoderError(
                f"The vLLM server at {self.url} was silent for {self._timeout_s:g} s. It may "
                "hang, or have more work than it can do: see its log, or raise timeout_s."
            ) from error
        except httpx.ConnectTimeout as error:
            raise DecoderError(
                f"Nothing answers at {self.url} within {_CONNECT_S:g} s. Check the URL and the "
                "network between here and the vLLM server."
            ) from error
        except httpx.TransportError as error:
            raise _NotNowError(str(error) or type(error).__name__) from error

    def _check(self, response: httpx.Response) -> None:
        """Raise what a response's status means."""
        if response.is_success:
            return
        said = _message(response.read().decode("utf-8", "replace"))
        status = response.status_code
        if status in _TRY_AGAIN:
            after = response.headers.get("Retry-After", "")
            raise _NotNowError(f"{status}: {said}", float(after) if after.isdigit() else None)
        start = f"The vLLM server at {self.url} refused the request ({status}: {said})."
        if "enable-prompt-embeds" in said:
            fix = "Start it with --enable-prompt-embeds; it then must not be open to strangers."
        elif "hidden_size" in said:
            fix = "It serves another model than the checkpoint's decoder: serve the exported one."
        elif status in (401, 403):
            fix = "Give the key it was started with (api_key=…)."
        elif status == 404:
            fix = "Check the URL and the model's name."
        elif status == 413:
            fix = "Ask with fewer documents, or raise the limit of the proxy in front of it."
        elif status >= 500:
            fix = "See its log; it may have to be started again."
        else:
            fix = "Check that it is a vLLM of the version that the documentation names."
        raise RefusedError(f"{start} {fix}")

    # Retries

    def _with_retries(self, ask: Callable[[], _Served]) -> _Served:
        waits = self._waits()
        while True:
            try:
                return ask()
            except _NotNowError as error:
                self._wait(waits, error)

    def _waits(self) -> Iterator[float]:
        return (min(_FIRST_WAIT_S * 2**n, _LONGEST_WAIT_S) for n in range(self._retries))

    def _wait(self, waits: Iterator[float], error: _NotNowError) -> None:
        """Sleep until the next attempt, or say that there is none."""
        wait_s = next(waits, None)
        if wait_s is None:
            raise DecoderError(
                f"No answer from the vLLM server at {self.url} after {1 + self._retries} attempts "
                f"({error}). Start it, check the URL, or let fewer questions through at a time."
            ) from error
        logger.info("vLLM at %s: %s; trying again", self.url, error)
        time.sleep(min(error.wait_s or wait_s, _LONGEST_WAIT_S))


class EmbeddingsEngine:
    """Sends complete prompt embeddings to `/v1/completions`.

    Args:
        server: Started with `--enable-prompt-embeds`.
        embeddings: Of the decoder it serves.
    """

    def __init__(self, server: VLLMServer, embeddings: PromptEmbeddings) -> None:
        self.server = server
        self.embeddings = embeddings

    def limit(self) -> int | None:
        """Return the most tokens of a prompt and its answer."""
        return self.server.served().limit

    def run(self, built: BuiltPrompt, sampling: dict[str, Any]) -> Generator[Piece, None, None]:
        """Answer one prompt; see `Engine.run`."""
        body = {
            "model": self.server.served().model,
            "prompt_embeds": encode_tensor(self.embeddings.embed(built)),
            "stream": True,
            "return_token_ids": True,
            **sampling,
        }
        for event in self.server.events("/v1/completions", body):
            for choice in event["choices"]:
                yield Piece(
                    choice.get("token_ids") or [],
                    (choice.get("logprobs") or {}).get("token_logprobs") or [],
                    choice.get("finish_reason"),
                )

    def close(self) -> None:
        """Close the connections."""
        self.server.close()


def encode_tensor(tensor: torch.Tensor) -> str:
    """Return a tensor as vLLM reads it: base64 of what `torch.save` writes."""
    if tensor.untyped_storage().nbytes() > tensor.nbytes:
        tensor = tensor.clone()  # torch.save would write all that a view looks into
    file = io.BytesIO()
    torch.save(tensor, file)
    return base64.b64encode(file.getvalue()).decode("ascii")


def _lines(response: httpx.Response) -> Iterator[bytes]:
    """Yield lines; httpx's own end at characters too that JSON may hold, such as U+2028."""
    rest = b""
    for chunk in response.iter_bytes():
        *lines, rest = (rest + chunk).split(b"\n")
        yield from lines


def _drain(lines: Iterator[bytes]) -> None:
    """Read the end of a body: only then is its connection used again."""
    try:
        for _ in lines:
            pass
    except httpx.TransportError:
        pass  # The answer is complete.


def _message(body: str) -> str:
    """Return the message in an error's body, or the start of the body."""
    try:
        error = json.loads(body)["error"]
        return str(error["message"] if isinstance(error, dict) else error)
    except (ValueError, KeyError, TypeError):
        return body[:200]


def _listed(names: list[str]) -> str:
    return ", ".join(map(repr, names)) or "no model"
