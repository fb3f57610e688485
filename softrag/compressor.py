"""The compressor at work: texts in, memories out, in batches. It knows no store."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence

import torch

from softrag.batch import collate_documents
from softrag.errors import EmptyDocumentError, NonFiniteMemoryError
from softrag.memory import Memory, memory_key
from softrag.model import SoftRAGModel
from softrag.prompt import DocumentPrompt, DocumentRow


class Compressor:
    """Turns documents into memories with a loaded model.

    Args:
        model: A model loaded with its compressor.
        batch_tokens: Most compressor tokens in one forward pass, padding included. None: 1,024 on
            a CPU, where what a layer writes should stay in its caches (measured: 22 documents/s
            against 16 with 4,096), 65,536 elsewhere.
        lock: Held during every forward pass. Whoever else runs the same model shares it; None for
            a lock of its own.
    """

    def __init__(
        self,
        model: SoftRAGModel,
        batch_tokens: int | None = None,
        *,
        lock: threading.Lock | None = None,
    ) -> None:
        if batch_tokens is None:
            batch_tokens = 1024 if model.device.type == "cpu" else 65536
        if batch_tokens < 1:
            raise ValueError(f"batch_tokens must be at least 1, found {batch_tokens}.")
        if model.compressor_tokenizer is None:
            raise ValueError("The model has no tokenizer; load it with from_pretrained.")
        self.model = model
        self.batch_tokens = batch_tokens
        self.prompt = DocumentPrompt.from_config(model.config, model.compressor_tokenizer)
        self._lock = lock or threading.Lock()

    @property
    def fingerprint(self) -> str:
        """Of everything that decides the memories' values."""
        return self.model.fingerprint

    @property
    def query_dependent(self) -> bool:
        """Whether every memory is made for one question."""
        return bool(self.model.config.query_dependent)

    @property
    def reranks(self) -> bool:
        """Whether memories come with their document's relevance to the question."""
        return bool(self.model.config.rerank)

    def key(self, document: str, question: str | None = None) -> str:
        """Return the content address of the memory that `compress` makes of a document."""
        return memory_key(self.fingerprint, document, question)

    def compress(
        self, documents: Sequence[str], questions: Sequence[str] | None = None
    ) -> list[Memory]:
        """Compress documents; equal ones are compressed once.

        Args:
            documents: Texts that fit the compressor (`config.max_document_tokens`).
            questions: One per document, for query-dependent models only.

        Returns:
            One memory per document, in order, in bfloat16 on the CPU.

        Raises:
            EmptyDocumentError: A document has no text.
            NonFiniteMemoryError: The model made NaN or infinity of a document; nothing is returned.
            ValueError: A document is longer than the compressor reads, or questions are missing
                or not wanted.
        """
        asked = self._check_questions(documents, questions)
        keys = [self.key(text, question) for text, question in zip(documents, asked, strict=True)]
        # The first place of each distinct document.
        places = {key: place for place, key in reversed(list(enumerate(keys)))}
        rows = {
            place: self._render(documents[place], asked[place], place) for place in places.values()
        }
        memories: dict[str, Memory] = {}
        for batch in self._batches(rows):
            for place, (values, relevance) in zip(
                batch, self._run([rows[i] for i in batch]), strict=True
            ):
                if not torch.isfinite(values).all():
                    raise NonFiniteMemoryError(
                        f"The compressor made NaN or infinity of {_name(documents[place], place)}. "
                        "Nothing of this call was kept. Check the checkpoint, or load it in "
                        "float32 (dtype='float32')."
                    )
                memories[keys[place]] = Memory(
                    values=values,
                    key=keys[place],
                    fingerprint=self.fingerprint,
                    n_document_tokens=rows[place].n_document_tokens,
                    relevance=relevance,
                )
        return [memories[key] for key in keys]

    def _check_questions(
        self, documents: Sequence[str], questions: Sequence[str] | None
    ) -> Sequence[str | None]:
        if isinstance(documents, str):
            raise TypeError("documents must be a sequence of texts, found one text: wrap it in [].")
        if self.query_dependent:
            if questions is None:
                raise ValueError(
                    "This checkpoint compresses for a question: give one per document."
                )
            if len(questions) != len(documents):
                raise ValueError(
                    f"Found {len(questions)} questions for {len(documents)} documents; "
                    "give one per document."
                )
            return questions
        if questions is not None:
            raise ValueError(
                "This checkpoint compresses documents alone (config.query_dependent is false); "
                "leave questions out."
            )
        return [None] * len(documents)

    def _render(self, document: str, question: str | None, place: int) -> DocumentRow:
        if not document.strip():
            raise EmptyDocumentError(
                f"Document {place} has no text, so there is nothing to compress. Leave it out."
            )
        row = self.prompt.render(document, question)
        if row.truncated:
            raise ValueError(
                f"{_name(document, place)} is longer than the "
                f"{self.model.config.max_document_tokens} tokens this compressor reads. "
                "Split it first (softrag.split_text)."
            )
        return row

    def _batches(self, rows: dict[int, DocumentRow]) -> Iterator[list[int]]:
        """Yield places of rows of like length, at most `batch_tokens` with padding."""
        batch: list[int] = []
        # Longest first: the first batch shows at once whether the device has enough memory.
        for place in sorted(rows, key=lambda place: -len(rows[place].input_ids)):
            width = len(rows[batch[0]].input_ids) if batch else 0
            if batch and width * (len(batch) + 1) > self.batch_tokens:
                yield batch
                batch = []
            batch.append(place)
        if batch:
            yield batch

    def _run(self, rows: list[DocumentRow]) -> list[tuple[torch.Tensor, float | None]]:
        """Return a `(memory, hidden)` bfloat16 tensor on the CPU and the relevance of each row."""
        # What padding holds is masked; some tokenizers have no token for it.
        batch = collate_documents(rows, self.prompt.tokenizer.pad_token_id or 0)
        device = self.model.device
        with self._lock, torch.no_grad():
            soft_tokens, scores = self.model.compress_and_score(
                batch.input_ids.to(device), batch.attention_mask.to(device)
            )
        # One copy for the batch; then a clone each, so that keeping one keeps no other.
        values = soft_tokens.to("cpu", torch.bfloat16)  # (soft tokens of the batch, decoder_hidden)
        parts = [part.clone() for part in values.split([row.n_memory for row in rows])]
        relevance = [None] * len(rows) if scores is None else scores.sigmoid().tolist()
        return list(zip(parts, relevance, strict=True))


def _name(document: str, place: int) -> str:
    words = " ".join(document.split())
    start = words if len(words) <= 60 else f"{words[:60]}…"
    return f"document {place} ({start!r})"
