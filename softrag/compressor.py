"""The compressor at work: texts in, memories out, in batches. It knows no store."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator, Sequence

import torch

from softrag.checks import check_count, check_texts
from softrag.errors import EmptyDocumentError, NonFiniteMemoryError
from softrag.memory import Memory, is_finite, memory_key
from softrag.model import Compressed, SoftRAGModel
from softrag.packing import pack_lengths, working_on
from softrag.prompt import DocumentPrompt, DocumentRow

TOKENIZED_TOGETHER = 512
"""Documents: enough for all cores, few enough for a GPU not to wait long for the first."""


class Compressor:
    """Turns documents into memories with a loaded model.

    Args:
        model: A model loaded with its compressor.
        batch_tokens: Most compressor tokens in one forward pass. None: 1,024 on a CPU, where what
            a layer writes should stay in its caches (measured: 22 documents/s against 16 with
            4,096); on a GPU 128 for each of its multiprocessors, so that matrix products, cut into
            tiles of 128 rows, end with all of them at work (an H100: 16,896).
        cut: Cut a document that is too long, as research code does, instead of refusing it. What
            is cut off is not read.
        lock: Held during every forward pass. Whoever else runs the same model shares it; None for
            a lock of its own.
    """

    def __init__(
        self,
        model: SoftRAGModel,
        batch_tokens: int | None = None,
        *,
        cut: bool = False,
        lock: threading.Lock | None = None,
    ) -> None:
        if batch_tokens is None:
            batch_tokens = _default_batch_tokens(model.device)
        check_count("batch_tokens", batch_tokens)
        if model.compressor_tokenizer is None:
            raise ValueError("The model has no tokenizer; load it with from_pretrained.")
        self.model = model
        self.batch_tokens = batch_tokens
        self.cut = cut
        self.prompt = DocumentPrompt.from_config(model.config, model.compressor_tokenizer)
        self._lock = lock or threading.Lock()
        self._on_cpu = model.device.type == "cpu"

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
        memories: dict[str, Memory] = {}
        running: deque[_Running] = deque()

        def collect() -> None:
            for place, row, values, relevance in running.popleft().wait():
                if values is None:
                    raise NonFiniteMemoryError(
                        f"The compressor made NaN or infinity of {_name(documents[place], place)}. "
                        "Nothing of this call was kept. Check the checkpoint, or load it in "
                        "float32 (dtype='float32')."
                    )
                memories[keys[place]] = Memory(
                    values=values,
                    key=keys[place],
                    fingerprint=self.fingerprint,
                    n_document_tokens=row.n_document_tokens,
                    relevance=relevance,
                    text=documents[place],
                )

        # While a GPU works on one batch, the next is tokenized and the last one taken apart.
        for batch in self._batches(self._rows(documents, asked, sorted(places.values()))):
            running.append(self._start(batch))
            if len(running) > 2:
                collect()
        while running:
            collect()
        return [memories[key] for key in keys]

    def _check_questions(
        self, documents: Sequence[str], questions: Sequence[str] | None
    ) -> Sequence[str | None]:
        check_texts("documents", documents)
        if self.query_dependent:
            if questions is None:
                raise ValueError(
                    "This checkpoint compresses for a question: give one per document."
                )
            check_texts("questions", questions)
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

    def _rows(
        self, documents: Sequence[str], asked: Sequence[str | None], places: Sequence[int]
    ) -> Iterator[tuple[int, DocumentRow]]:
        """Lay documents out, some at a time."""
        for start in range(0, len(places), TOKENIZED_TOGETHER):
            some = places[start : start + TOKENIZED_TOGETHER]
            for place in some:
                if not documents[place].strip():
                    raise EmptyDocumentError(
                        f"Document {place} has no text, so there is nothing to compress. "
                        "Leave it out."
                    )
            rows = self.prompt.render_many(
                [documents[place] for place in some], [asked[place] for place in some]
            )
            for place, row in zip(some, rows, strict=True):
                if row.truncated and not self.cut:
                    raise ValueError(
                        f"{_name(documents[place], place)} is longer than the "
                        f"{self.model.config.max_document_tokens} tokens this compressor reads. "
                        "Split it first (softrag.split_text; SoftRAGSplitter for LlamaIndex, "
                        "SoftRAGCompressor.split_documents for LangChain), or cut it "
                        "(Compressor(cut=True))."
                    )
                yield place, row

    def _batches(
        self, rows: Iterator[tuple[int, DocumentRow]]
    ) -> Iterator[list[tuple[int, DocumentRow]]]:
        """Yield rows of at most `batch_tokens` together."""
        if self._on_cpu:
            # There equally long rows run together. Longest first: the first batch shows at once
            # whether there is enough memory.
            rows = iter(sorted(rows, key=lambda item: -len(item[1].input_ids)))
        batch: list[tuple[int, DocumentRow]] = []
        tokens = 0
        for item in rows:
            length = len(item[1].input_ids)
            if batch and tokens + length > self.batch_tokens:
                yield batch
                batch, tokens = [], 0
            batch.append(item)
            tokens += length
        if batch:
            yield batch

    def _start(self, batch: list[tuple[int, DocumentRow]]) -> _Running:
        """Give a batch to the device."""
        rows = [row for _, row in batch]
        packed = pack_lengths([len(row.input_ids) for row in rows])
        ids = torch.tensor([i for row in rows for i in row.input_ids])
        with self._lock, torch.no_grad(), working_on(self.model.device):
            if not self._on_cpu:
                self.model.fuse_compressor(self.batch_tokens)
            return _Running(batch, self.model.compress_packed(ids, packed))


class _Running:
    """A batch whose soft tokens are on their way to the host.

    Args:
        batch: Its documents' places and rows.
        compressed: What the model made of them.
    """

    def __init__(self, batch: list[tuple[int, DocumentRow]], compressed: Compressed) -> None:
        self._batch = batch
        soft_tokens, self._scores = compressed
        self._event: torch.cuda.Event | None = None
        if soft_tokens.is_cuda:
            self._values = torch.empty(soft_tokens.shape, dtype=torch.bfloat16, pin_memory=True)
            self._values.copy_(soft_tokens, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._values = soft_tokens.to("cpu", torch.bfloat16)

    def wait(self) -> Iterator[tuple[int, DocumentRow, torch.Tensor | None, float | None]]:
        """Yield places, rows, `(memory, hidden)` values (None: not finite) and relevances."""
        if self._event is not None:
            self._event.synchronize()
        finite = is_finite(self._values)
        parts = self._values.split([row.n_memory for _, row in self._batch])
        scores = self._scores
        relevances = [None] * len(parts) if scores is None else scores.sigmoid().tolist()
        for (place, row), part, relevance in zip(self._batch, parts, relevances, strict=True):
            # A clone each, so that keeping one keeps no other.
            good = finite or is_finite(part)
            yield place, row, part.clone() if good else None, relevance


def _default_batch_tokens(device: torch.device) -> int:
    if device.type == "cuda":
        return 128 * torch.cuda.get_device_properties(device).multi_processor_count
    return 1024 if device.type == "cpu" else 16384


def _name(document: str, place: int) -> str:
    words = " ".join(document.split())
    start = words if len(words) <= 60 else f"{words[:60]}…"
    return f"document {place} ({start!r})"
