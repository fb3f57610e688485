"""What the compressor and the decoder read, as token ids: the one place that lays prompts out.

Inference and training both call `render`; a training row is the asking row plus the answer. It
knows nothing of tensors or models.
"""

from __future__ import annotations

import copy
import re
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, TypeVar

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from softrag.config import SoftRAGConfig
from softrag.errors import EmptyDocumentError
from softrag.text import memory_length
from softrag.verbatim import VerbatimEncoder

MEMORY_TOKEN = "<MEM>"
AUTO_ENCODING_TOKEN = "<AE>"
RERANK_TOKEN = "<RR>"

# Stand-ins for the parts of a chat that are tokenized apart. Private-use characters: no template
# or text has a reason to hold them.
_DOCUMENTS, _QUESTION, _ANSWER = "\ue0d0", "\ue0d1", "\ue0d2"

# Whether special tokens mean something is a switch of the tokenizer, not of the call: a thread that
# reads a template must not have it thrown by one that reads a question, nor the other way round.
_READING = threading.Lock()


class _Text(str):
    """What a user wrote: special tokens in it are letters."""


# Prompt text, user text, or a number of soft tokens.
_Part = str | int


class DocumentRow(NamedTuple):
    """What the compressor reads for one document.

    Attributes:
        input_ids: Prompt and document, then one memory token per soft token, and an `<RR>` for
            models that rerank.
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


def add_special_tokens(
    tokenizer: PreTrainedTokenizerBase, config: SoftRAGConfig | None = None
) -> None:
    """Add memory tokens, `<AE>` and the config's extra tokens, in this order, behind every other.

    Adding them twice changes nothing. Without a config there is one memory token, `<MEM>`.
    """
    config = config or SoftRAGConfig()
    tokenizer.add_tokens(
        [*config.memory_token_names, AUTO_ENCODING_TOKEN, *config.extra_tokens],
        special_tokens=True,
    )


def add_rerank_token(tokenizer: PreTrainedTokenizerBase) -> None:
    """Add `<RR>`, for the compressor of a model that reranks."""
    tokenizer.add_tokens([RERANK_TOKEN], special_tokens=True)


def token_id(tokenizer: PreTrainedTokenizerBase, token: str) -> int:
    """Return the id of one token."""
    return int(tokenizer.convert_tokens_to_ids(token))  # type: ignore[arg-type]


Token = TypeVar("Token", int, str)


def memory_row(tokens: Sequence[Token], length: int) -> list[Token]:
    """Return so many memory tokens, in turn.

    >>> memory_row([5], 3), memory_row([5, 6], 2)
    ([5, 5, 5], [5, 6])
    """
    return [tokens[index % len(tokens)] for index in range(length)]


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Tokenize user text: special tokens written in it, `<MEM>` included, stay plain text."""
    with _READING:
        return list(tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True))


def encode_with_offsets(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]
) -> list[tuple[list[int], list[tuple[int, int]]]]:
    """Tokenize user texts as `encode_text` does; return ids and where in its text each stands.

    Raises:
        TypeError: The tokenizer is a slow one, which does not know.
    """
    if not tokenizer.is_fast:
        raise TypeError(
            f"Where tokens stand in a text only a fast tokenizer says, found "
            f"{type(tokenizer).__name__}. Its folder needs a tokenizer.json."
        )
    if not texts:
        return []
    with _READING:
        encoded = tokenizer(
            list(texts),
            add_special_tokens=False,
            split_special_tokens=True,
            return_offsets_mapping=True,
        )
    return list(zip(encoded["input_ids"], encoded["offset_mapping"], strict=True))


class DocumentPrompt:
    """What the compressor reads: a document (PISCO), or a question and a document (OSCAR).

    Attributes:
        tokenizer: The compressor's, with memory tokens (and `<RR>`) added.
        config: Gives the texts, the rate and the length limit.
        rate: Document tokens per soft token; None: the config's.
        query_dependent: Whether a question is read with the document.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        config: SoftRAGConfig,
        rate: int | None = None,
    ) -> None:
        """Look up the memory tokens."""
        self.tokenizer = tokenizer
        self.config = config
        self.rate = rate
        self.query_dependent = config.query_dependent
        self.memory_ids = [token_id(tokenizer, name) for name in config.memory_token_names]
        self._verbatim = VerbatimEncoder(tokenizer) if config.prompt_encoding == "whole" else None

    @classmethod
    def from_config(
        cls, config: SoftRAGConfig, tokenizer: PreTrainedTokenizerBase
    ) -> DocumentPrompt:
        """Build the prompt that a checkpoint was trained with."""
        return cls(tokenizer, config)

    def at_rate(self, rate: int) -> DocumentPrompt:
        """Return the same prompt at another rate."""
        other = copy.copy(self)
        other.rate = rate
        return other

    def without_question(self) -> DocumentPrompt:
        """Return the same prompt for documents alone: what query-dependent models learn first."""
        other = copy.copy(self)
        other.query_dependent = False
        return other

    def tokenize(self, text: str) -> list[int]:
        """Return the compressor's token ids of a text, without any prompt."""
        return encode_text(self.tokenizer, text)

    def tokenize_many(self, texts: Sequence[str]) -> list[list[int]]:
        """Return what `tokenize` does for each text, on all cores where the tokenizer can."""
        encoded = self.tokenizer(
            list(texts),
            add_special_tokens=False,
            split_special_tokens=True,
            return_attention_mask=False,
            return_token_type_ids=False,
        )
        return list(encoded["input_ids"])

    def render_many(
        self, documents: Sequence[str], questions: Sequence[str | None]
    ) -> list[DocumentRow]:
        """Lay out documents as `render` does, on all cores where the tokenizer can."""
        # As a string with its prompt, or else apart from it.
        read: Sequence[str | list[int]] = (
            documents if self._verbatim is not None else self.tokenize_many(documents)
        )
        return [self.render(text, asked) for text, asked in zip(read, questions, strict=True)]

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
        if self.query_dependent != (question is not None):
            raise ValueError(
                "This checkpoint is query-dependent: give the question with the document."
                if question is None
                else "This checkpoint compresses documents alone: don't give a question."
            )
        ids = self.tokenize(document) if isinstance(document, str) else list(document)
        if not ids:
            raise EmptyDocumentError("The document is empty; there is nothing to compress.")
        texts = self.config.document_prompt
        template = texts["document" if question is None else "document_with_question"]
        before, after = (self._fill(part, question) for part in template.split("{document}"))
        n_read = min(len(ids), self.config.max_document_tokens)
        truncated = n_read < len(ids)
        if self._verbatim is None:
            document = ids
        if not truncated:
            row = self._lay_out(before, document, after)
        elif self.config.max_row_tokens is None:
            # Cut the document, never the layout.
            row = self._lay_out(before, ids[:n_read], after)
        else:
            row = self._lay_out(before, document, after)[: self.config.max_row_tokens]
            n_read = min(len(ids), len(row) - len(self._lay_out(before, [], "")))
        n_memory = self.memory_length(n_read, len(row))
        row += memory_row(self.memory_ids, n_memory)
        if self.config.rerank:
            row.append(token_id(self.tokenizer, RERANK_TOKEN))
        return DocumentRow(row, n_memory, n_read, truncated)

    def memory_length(self, n_document_tokens: int, n_row_tokens: int) -> int:
        """Return how many soft tokens a document of so many tokens in such a row becomes."""
        if self.config.memory_tokens is not None:
            return self.config.memory_tokens
        if self.config.memory_count == "row":
            return n_row_tokens // (self.rate or self.config.rate) + 1
        return memory_length(n_document_tokens, self.rate or self.config.rate)

    def _lay_out(self, before: str, document: str | Sequence[int], after: str) -> list[int]:
        if self._verbatim is not None:
            if isinstance(document, str):
                return self._verbatim.encode(before + self._verbatim.plain(document) + after)
            return [*self._verbatim.encode(before), *document, *self._verbatim.encode(after)]
        assert not isinstance(document, str)
        bos = [] if self.tokenizer.bos_token_id is None else [self.tokenizer.bos_token_id]
        # An empty text costs a tokenizer as much as a short one.
        ids = [self.tokenize(part) if part else [] for part in (before, after)]
        return [*bos, *ids[0], *document, *ids[1]]

    def _fill(self, template: str, question: str | None) -> str:
        """Return a part of the template with the question in it, ready for `_lay_out`."""
        question = question or ""
        if self._verbatim is None:
            return template.replace("{question}", question)
        marked = self._verbatim.mark(template)
        return marked.replace("{question}", self._verbatim.plain(question))


class RagPrompt:
    """What the decoder reads: instructions, documents as memories or as text, and the question."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: SoftRAGConfig) -> None:
        """Render the chat template once; `render` only fills the gaps."""
        self.tokenizer = tokenizer
        self.config = config
        self.memory_ids = [token_id(tokenizer, name) for name in config.memory_token_names]
        self._verbatim = VerbatimEncoder(tokenizer) if config.prompt_encoding == "whole" else None
        self._encoded: dict[str, list[int]] = {}
        texts = config.rag_prompt
        self._with_documents = self._pieces(
            texts["user"].format(documents=_DOCUMENTS, question=_QUESTION)
        )
        self._without_documents = self._pieces(
            texts["user_without_documents"].format(question=_QUESTION)
        )
        self._end = self._answer_end()

    @classmethod
    def from_config(cls, config: SoftRAGConfig, tokenizer: PreTrainedTokenizerBase) -> RagPrompt:
        """Build the prompt that a checkpoint was trained with."""
        return cls(tokenizer, config)

    @property
    def memory_id(self) -> int:
        """The memory token, the first where there are several."""
        return self.memory_ids[0]

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
        ids = self._join(
            part
            for piece in (self._with_documents if documents else self._without_documents)
            for part in self._fill(piece, question.strip(), documents)
        )
        answer_start = len(ids)
        if answer is not None:
            # Tokenized apart from the prompt, because generation begins at exactly this border.
            ids += [*encode_text(self.tokenizer, answer.strip()), self._end]
        return PromptRow(ids, answer_start)

    def render_memories(self, lengths: Sequence[int]) -> list[int]:
        """Lay out memories alone, without a question: what pre-training reads."""
        bos = [] if self.tokenizer.bos_token_id is None else [self.tokenizer.bos_token_id]
        return bos + self._join(self._document_parts(lengths))

    def _fill(self, piece: str, question: str, documents: Sequence[int | str]) -> Iterator[_Part]:
        if piece == _DOCUMENTS:
            yield from self._document_parts(documents)
        else:
            yield _Text(question) if piece == _QUESTION else piece

    def _document_parts(self, documents: Sequence[int | str]) -> Iterator[_Part]:
        texts = self.config.rag_prompt
        for index, document in enumerate(documents):
            if index:
                yield texts["document_separator"]
            template = texts["text" if isinstance(document, str) else "memory"]
            before, after = template.replace("{number}", str(index)).split("{document}")
            yield before
            yield _Text(document) if isinstance(document, str) else document
            yield after

    def _join(self, parts: Iterable[_Part]) -> list[int]:
        """Tokenize prompt text, user text and memories: apart, or as one string."""
        if self._verbatim is not None:
            names = self.config.memory_token_names
            return self._verbatim.encode(
                "".join(
                    self._verbatim.plain(part)
                    if isinstance(part, _Text)
                    else self._verbatim.mark(
                        part if isinstance(part, str) else "".join(memory_row(names, part))
                    )
                    for part in parts
                )
            )
        ids: list[int] = []
        for part in parts:
            if isinstance(part, int):
                ids += memory_row(self.memory_ids, part)
            elif isinstance(part, _Text):
                ids += encode_text(self.tokenizer, part)
            elif part:
                ids += self._encode_template(part)
        return ids

    def _pieces(self, user: str) -> list[str]:
        """Return the fixed texts of a conversation, with the stand-ins between them."""
        return [part for part in re.split(f"([{_DOCUMENTS}{_QUESTION}])", self._chat(user)) if part]

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
            folded = self.config.rag_prompt["user_with_system"].format(system=system, user=user)
            turns[0] = {"role": "user", "content": folded}
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
        if text not in self._encoded:
            with _READING:
                self._encoded[text] = list(self.tokenizer.encode(text, add_special_tokens=False))
        return self._encoded[text]

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
