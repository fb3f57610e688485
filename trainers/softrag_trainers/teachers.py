"""Language models that write labels: one in this process, or one behind a URL.

They take prompts and return replies; what is asked, and what becomes of a reply, is not theirs.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from softrag.base_models import fast_dtype, quiet_loading, resolve_base_model
from softrag.chat_endpoint import ChatEndpoint
from softrag.prompt import encode_text

# Stands for the prompt while the chat template is rendered, as in `RagPrompt`.
_PROMPT = "\ue0d3"


class Teacher(Protocol):
    """Replies to prompts, one turn each, taking the likeliest tokens."""

    @property
    def model_name(self) -> str:
        """The model that replies, for the provenance of labels."""
        ...

    def complete(self, prompts: Sequence[str], *, max_tokens: int) -> list[str]:
        """Return one reply per prompt, in order.

        Raises:
            EndpointError: A server cannot be reached or refuses.
        """
        ...


def open_teacher(name: str, *, model: str | None = None, threads: int = 16) -> Teacher:
    """Open a teacher.

    Args:
        name: URL of an OpenAI-compatible server, such as `http://localhost:8000/v1`; or name or
            folder of a base model, to run here.
        model: The model's name on the server; None for the first it lists.
        threads: Prompts on their way to the server together.
    """
    if name.startswith(("http://", "https://")):
        key = os.environ.get("OPENAI_API_KEY")
        return ChatEndpoint(url=name, model=model, api_key=key, threads=threads)
    return LocalTeacher(name)


class LocalTeacher:
    """A causal language model in this process.

    Args:
        name: Name or folder, as `SoftRAGConfig.decoder` takes it.
        batch_tokens: Most prompt tokens read together, padding included.
    """

    def __init__(self, name: str, *, batch_tokens: int = 16384) -> None:
        self.model_name = name
        self.batch_tokens = batch_tokens
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        path = resolve_base_model(name)
        self._tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path)
        with quiet_loading():
            model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=fast_dtype(device))
        self._model = model.to(device).eval()

    @torch.no_grad()
    def complete(self, prompts: Sequence[str], *, max_tokens: int) -> list[str]:
        """Return one reply per prompt, in order."""
        ids = [self._encode(prompt) for prompt in prompts]
        replies = [""] * len(prompts)
        # Longest first: prompts of like length waste little padding.
        waiting = sorted(range(len(ids)), key=lambda place: -len(ids[place]))
        while waiting:
            size = max(1, self.batch_tokens // max(1, len(ids[waiting[0]])))
            batch, waiting = waiting[:size], waiting[size:]
            for place, reply in zip(
                batch, self._generate([ids[place] for place in batch], max_tokens), strict=True
            ):
                replies[place] = reply
        return replies

    def _generate(self, rows: list[list[int]], max_tokens: int) -> list[str]:
        width = max(map(len, rows))
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
        device = self._model.device
        generated = self._model.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            max_new_tokens=max_tokens,
            do_sample=False,
            # What stands behind a reply's end is skipped; any special token will do.
            pad_token_id=self._tokenizer.pad_token_id or self._tokenizer.eos_token_id,
        )
        written = generated[:, width:]
        return [
            str(reply).strip()
            for reply in self._tokenizer.batch_decode(written, skip_special_tokens=True)
        ]

    def _encode(self, prompt: str) -> list[int]:
        """Lay a prompt out as the user's turn; special tokens written in it stay plain text."""
        rendered = f"{self._tokenizer.bos_token or ''}{_PROMPT}\n\n"
        if self._tokenizer.chat_template is not None:
            rendered = str(
                self._tokenizer.apply_chat_template(
                    [{"role": "user", "content": _PROMPT}],
                    tokenize=False,
                    add_generation_prompt=True,
                    enable_thinking=False,
                )
            )
        before, after = (
            list(self._tokenizer.encode(part, add_special_tokens=False))
            for part in rendered.split(_PROMPT)
        )
        return [*before, *encode_text(self._tokenizer, prompt), *after]
