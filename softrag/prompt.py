"""What the compressor and the decoder read, as token ids: the one place that lays prompts out.

Inference and training both call `render`; a training row is the asking row plus the answer. It
knows nothing of tensors or models.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from softrag.config import SoftRAGConfig
from softrag.errors import EmptyDocumentError
from softrag.text import memory_length

MEMORY_TOKEN = "<MEM>"
AUTO_ENCODING_TOKEN = "<AE>"
RERANK_TOKEN = "<RR>"

# Stand-ins for the parts of a chat that are tokenized apart. Private-use characters: no template
# or text has a reason to hold them.
_DOCUMENTS, _QUESTION, _ANSWER = "\ue0d0", "\ue0d1", "\ue0d2"


class DocumentRow(NamedTuple):
    """What the compressor reads for one document.

    Attributes:
        input_ids: Prompt and document, then one `<MEM>` per soft token, and an `<RR>` for models
            that rerank.
        n_memory: Number of `<MEM>` in it.
        n_document_tokens: Document tokens that are read.
        truncated: Whether the document was longer than that.
    """

    input_ids: list[int]
    n_memory: int
    n_document_tokens: int
    truncated: bool


class PromptRow(NamedTuple):
    """What the decoder reads for one question.

    Attributes:
        input_ids: The prompt, and the answer when one is taught.
        answer_start: Index of the first answer token; the length of the prompt.
    """

    input_ids: list[int]
    answer_start: int


def add_special_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    """Add `<MEM>` and `<AE>` behind every existing token; adding them twice changes nothing."""
    tokenizer.add_tokens([MEMORY_TOKEN, AUTO_ENCODING_TOKEN], special_tokens=True)


def add_rerank_token(tokenizer: PreTrainedTokenizerBase) -> None:
    """Add `<RR>`, for the compressor of a model that reranks."""
    tokenizer.add_tokens([RERANK_TOKEN], special_tokens=True)


def token_id(tokenizer: PreTrainedTokenizerBase, token: str) -> int:
    """Return the id of one token."""
    return int(tokenizer.convert_tokens_to_ids(token))  # type: ignore[arg-type]


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Tokenize user text: special tokens written in it, `<MEM>` included, stay plain text."""
    return list(tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True))


@dataclass(frozen=True)
class DocumentPrompt:
    """What the compressor reads: a document (PISCO), or a question and a document (OSCAR).

    Attributes:
        tokenizer: The compressor's, with `<MEM>` (and `<RR>`) added.
        config: Gives the texts, the rate and the length limit.
        rate: Document tokens per soft token; None: the config's.
    """

    tokenizer: PreTrainedTokenizerBase
    config: SoftRAGConfig
    rate: int | None = None

    @classmethod
    def from_config(
        cls, config: SoftRAGConfig, tokenizer: PreTrainedTokenizerBase
    ) -> DocumentPrompt:
        """Build the prompt that a checkpoint was trained with."""
        return cls(tokenizer, config)

    def tokenize(self, text: str) -> list[int]:
        """Return the compressor's token ids of a text, without any prompt."""
        return encode_text(self.tokenizer, text)

    def memory_length(self, n_document_tokens: int) -> int:
        """Return how many soft tokens a document of so many tokens becomes."""
        if self.config.memory_tokens is not None:
            return self.config.memory_tokens
        return memory_length(n_document_tokens, self.rate or self.config.rate)

    def render(self, document: str | Sequence[int], question: str | None = None) -> DocumentRow:
        """Lay out one document for the compressor.

        Args:
            document: The text, or its token ids as `tokenize` gives them.
            question: What the memory is for; required by query-dependent checkpoints, refused by
                the others.

        Raises:
            EmptyDocumentError: The document has no tokens.
            ValueError: A question is missing or out of place.
        """
        if self.config.query_dependent != (question is not None):
            raise ValueError(
                "This checkpoint is query-dependent: give the question with the document."
                if question is None
                else "This checkpoint compresses documents alone: don't give a question."
            )
        ids = self.tokenize(document) if isinstance(document, str) else list(document)
        if not ids:
            raise EmptyDocumentError("The document is empty; there is nothing to compress.")
        # Cut the document, never the layout: every placeholder below stays whole.
        kept = ids[: self.config.max_document_tokens]
        texts = self.config.document_prompt
        template = texts["document" if question is None else "document_with_question"]
        before, after = template.split("{document}")
        n_memory = self.memory_length(len(kept))
        memory_id = token_id(self.tokenizer, MEMORY_TOKEN)
        bos = [] if self.tokenizer.bos_token_id is None else [self.tokenizer.bos_token_id]
        row = [
            *bos,
            *self._fill(before, question),
            *kept,
            *self._fill(after, question),
            *[memory_id] * n_memory,
            *([token_id(self.tokenizer, RERANK_TOKEN)] if self.config.rerank else []),
        ]
        return DocumentRow(row, n_memory, len(kept), len(kept) < len(ids))

    def _fill(self, template: str, question: str | None) -> list[int]:
        if not template:
            return []
        if question is None:
            return self.tokenize(template)
        return self.tokenize(template.replace("{question}", question))


class RagPrompt:
    """What the decoder reads: instructions, documents as memories or as text, and the question."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: SoftRAGConfig) -> None:
        """Render the chat template once; `render` only fills the gaps."""
        self.tokenizer = tokenizer
        self.config = config
        self.memory_id = token_id(tokenizer, MEMORY_TOKEN)
        texts = config.rag_prompt
        self._with_documents = self._pieces(
            texts["user"].format(documents=_DOCUMENTS, question=_QUESTION)
        )
        self._without_documents = self._pieces(
            texts["user_without_documents"].format(question=_QUESTION)
        )
        self._separator = self._encode_template(texts["document_separator"])
        self._end = self._answer_end()

    @classmethod
    def from_config(cls, config: SoftRAGConfig, tokenizer: PreTrainedTokenizerBase) -> RagPrompt:
        """Build the prompt that a checkpoint was trained with."""
        return cls(tokenizer, config)

    @property
    def end_id(self) -> int:
        """The token that a taught answer ends with."""
        return self._end

    @property
    def end_ids(self) -> set[int]:
        """The tokens that end a generated answer."""
        return {self._end, self.tokenizer.eos_token_id} - {None}

    def render(
        self,
        question: str,
        documents: Sequence[int | str],
        answer: str | None = None,
    ) -> PromptRow:
        """Lay out one question for the decoder.

        Args:
            question: The question, as the user wrote it.
            documents: For each document the number of its soft tokens, or its text. Empty: the
                question is asked without documents (closed book).
            answer: What to teach; None asks.
        """
        pieces = self._with_documents if documents else self._without_documents
        ids: list[int] = []
        for piece in pieces:
            if piece == _DOCUMENTS:
                ids += self._render_documents(documents)
            elif piece == _QUESTION:
                ids += encode_text(self.tokenizer, question.strip())
            else:
                ids += piece
        answer_start = len(ids)
        if answer is not None:
            # Tokenized apart from the prompt, because generation begins at exactly this border.
            ids += [*encode_text(self.tokenizer, answer.strip()), self._end]
        return PromptRow(ids, answer_start)

    def render_memories(self, lengths: Sequence[int]) -> list[int]:
        """Lay out memories alone, without a question: what pre-training reads."""
        bos = [] if self.tokenizer.bos_token_id is None else [self.tokenizer.bos_token_id]
        return bos + self._render_documents(lengths)

    def _render_documents(self, documents: Sequence[int | str]) -> list[int]:
        ids: list[int] = []
        for index, document in enumerate(documents):
            if index:
                ids += self._separator
            if isinstance(document, str):
                ids += encode_text(self.tokenizer, document)
            else:
                ids += [self.memory_id] * document
        return ids

    def _pieces(self, user: str) -> list[Any]:
        """Return token ids of the fixed text, with the stand-ins between them."""
        parts = re.split(f"([{_DOCUMENTS}{_QUESTION}])", self._chat(user))
        return [
            part if part in (_DOCUMENTS, _QUESTION) else self._encode_template(part)
            for part in parts
            if part
        ]

    def _chat(self, user: str, answer: str | None = None) -> str:
        """Render system and user text with the chat template, thinking switched off."""
        system = self.config.rag_prompt["system"]
        if self.tokenizer.chat_template is None:
            bos = self.tokenizer.bos_token or ""
            return f"{bos}{system}\n\n{user}\nAnswer:" + ("" if answer is None else f" {answer}")
        turns = [{"role": "user", "content": user}]
        if answer is not None:
            turns.append({"role": "assistant", "content": answer})
        try:
            return self._apply_template([{"role": "system", "content": system}, *turns], answer)
        except TemplateError:
            # No system role in this template (Mistral, Gemma): say it in the user's turn.
            turns[0] = {"role": "user", "content": f"{system}\n\n{user}"}
            return self._apply_template(turns, answer)

    def _apply_template(self, messages: list[dict[str, str]], answer: str | None) -> str:
        rendered = self.tokenizer.apply_chat_template(
            messages,
            tokenize=False,
            add_generation_prompt=answer is None,
            enable_thinking=False,
        )
        return str(rendered)

    def _encode_template(self, text: str) -> list[int]:
        # Templates write their special tokens, bos included, as text.
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def _answer_end(self) -> int:
        """Return the token that the chat template puts behind an answer, else eos."""
        after = self._chat(_QUESTION, _ANSWER).split(_ANSWER)[-1]
        ids = self._encode_template(after.strip())
        if ids:
            return ids[0]
        if self.tokenizer.eos_token_id is None:
            raise ValueError(
                "The tokenizer has neither an eos token nor a chat template that ends answers; "
                "set tokenizer.eos_token."
            )
        return int(self.tokenizer.eos_token_id)


def prompt_signature(config: SoftRAGConfig) -> str:
    """Return the document prompt's settings in one canonical string, for the fingerprint.

    Not `rerank`: what stands behind the `<MEM>` tokens decides no memory.
    """
    settings = {
        "document_prompt": config.document_prompt,
        "rate": config.rate,
        "memory_tokens": config.memory_tokens,
        "max_document_tokens": config.max_document_tokens,
        "query_dependent": config.query_dependent,
        "readout": config.readout,
    }
    return json.dumps(settings, sort_keys=True)
