"""The decoder in this process. It knows nothing of stores.

Models of known families run fused, in continuous batches, on a GPU as CUDA graphs (`scheduler`);
all others as Hugging Face wrote them, one batch after the other (`eager`).
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Generator, Sequence
from functools import lru_cache, partial

from softrag.decoder.base import DecodeRequest, DecodeResult
from softrag.decoder.checks import check_fits, check_memory
from softrag.decoder.copying import Copier, CopySource
from softrag.decoder.detokenizer import Detokenizer
from softrag.decoder.eager import EagerEngine
from softrag.decoder.row import Row
from softrag.decoder.runner import StepRunner
from softrag.decoder.scheduler import Scheduler, default_cache_tokens
from softrag.fused import FusedBackbone, why_not_fused
from softrag.memory import Memory
from softrag.model import SoftRAGModel
from softrag.prompt import PromptRow, RagPrompt

logger = logging.getLogger(__name__)


class TorchDecoder:
    """Answers with a loaded model; its decoder adapters are merged into the weights.

    Requests from several threads run together: each joins when there is room and leaves when it
    ends.

    Args:
        model: A model loaded with its decoder.
        batch_tokens: Most prompt tokens read together.
        batch_size: Most requests decoded together.
        cache_tokens: Tokens whose keys and values are kept; None: 2,048 per request of a full
            batch, within half of the free memory of a GPU.
        memory_bytes: Of hot memories that stay on a GPU, the one used longest ago replaced first;
            None: 256 MiB, on a CPU none.
        fused: False runs the model as Hugging Face wrote it.
        capture: Whether steps become CUDA graphs; None: on a GPU.
        lock: Held during every forward pass, not between them, so that a slow reader of one
            stream keeps nobody waiting. Whoever else runs the same model shares it; None for a
            lock of its own.
    """

    def __init__(
        self,
        model: SoftRAGModel,
        *,
        batch_tokens: int = 16384,
        batch_size: int = 64,
        cache_tokens: int | None = None,
        memory_bytes: int | None = None,
        fused: bool = True,
        capture: bool | None = None,
        lock: threading.Lock | None = None,
    ) -> None:
        if model.decoder is None or model.decoder_tokenizer is None:
            raise ValueError("The decoder was not loaded; use load_decoder=True.")
        self.model = model
        self.prompt = RagPrompt.from_config(model.config, model.decoder_tokenizer)
        # A text of 140 tokens takes 3 ms to read and 43 KB to keep.
        self._copy_source = lru_cache(1024)(partial(CopySource, model.decoder_tokenizer))
        self._lock = lock or threading.Lock()
        with self._lock:
            model.merge_adapters()
        self._decoder = model.decoder
        self._width: int = model.decoder.config.hidden_size
        reason = why_not_fused(self._decoder.base_model) if fused else "fused=False"
        if reason:
            logger.info("the decoder runs eagerly, one batch after the other: %s", reason)
            self._engine: Scheduler | EagerEngine = EagerEngine(
                model,
                end_ids=self.prompt.end_ids,
                # What padding holds is masked; some tokenizers have no token for it.
                pad_id=self.prompt.tokenizer.pad_token_id or 0,
                batch_size=batch_size,
                batch_tokens=batch_tokens,
                lock=self._lock,
            )
        else:
            self._engine = self._scheduler(
                batch_size, batch_tokens, cache_tokens, memory_bytes, capture
            )

    def _scheduler(
        self,
        batch_size: int,
        batch_tokens: int,
        cache_tokens: int | None,
        memory_bytes: int | None,
        capture: bool | None,
    ) -> Scheduler:
        with self._lock:
            backbone = FusedBackbone(self._decoder.base_model)
            on_gpu = backbone.device.type == "cuda"
            width = len(backbone.layers) * backbone.kv_heads * backbone.head_dim
            runner = StepRunner(
                backbone,
                self._decoder.get_input_embeddings(),
                self._decoder.get_output_embeddings(),
                batch_size=batch_size,
                cache_tokens=cache_tokens
                or default_cache_tokens(
                    backbone.device,
                    batch_size=batch_size,
                    max_length=backbone.max_length,
                    bytes_per_token=2 * width * backbone.dtype.itemsize,
                ),
                memory_bytes=(2**28 if on_gpu else 0) if memory_bytes is None else memory_bytes,
                capture=on_gpu if capture is None else capture,
            )
        return Scheduler(
            runner,
            end_ids=self.prompt.end_ids,
            memory_ids=self.model.decoder_memory_ids,
            batch_tokens=batch_tokens,
            lock=self._lock,
            ahead=on_gpu,
        )

    @property
    def fingerprint(self) -> str:
        """Of the compressor whose memories this decoder reads."""
        return self.model.fingerprint

    @property
    def joins_requests(self) -> bool:
        """True: a request joins those that are running."""
        return True

    @property
    def copy_bias(self) -> float:
        """The checkpoint's."""
        return self.model.config.copy_bias

    def prompt_tokens(self, question: str, documents: Sequence[Memory | str]) -> int:
        """Count the prompt's tokens without running the model."""
        return len(self._render(question, documents).input_ids)

    def generate(self, requests: Sequence[DecodeRequest]) -> list[DecodeResult]:
        """Answer requests together; see `Decoder.generate`."""
        rows = [self._row(request) for request in requests]
        self._engine.finish(rows)
        return [row.result() for row in rows]

    def stream(self, request: DecodeRequest) -> Generator[str, None, DecodeResult]:
        """Answer in pieces of text, and return the result; see `Decoder.stream`."""
        row = self._row(request, streamed=True)
        yield from self._engine.stream(row)
        return row.result()

    def close(self) -> None:
        """Do nothing: the model goes when nobody holds it."""

    def _render(self, question: str, documents: Sequence[Memory | str]) -> PromptRow:
        return self.prompt.render(
            question,
            [len(document) if isinstance(document, Memory) else document for document in documents],
        )

    def _row(self, request: DecodeRequest, *, streamed: bool = False) -> Row:
        for document in request.documents:
            if isinstance(document, Memory):
                check_memory(document, fingerprint=self.fingerprint, width=self._width)
        copier = None
        if request.copy_bias and request.copy_from:
            sources = [self._copy_source(text) for text in request.copy_from]
            copier = Copier(sources, self.prompt.end_ids)
        row = Row(
            request,
            self._render(request.question, request.documents),
            Detokenizer(self.prompt.tokenizer, request.stop),
            copier=copier,
            streamed=streamed,
        )
        limit = getattr(self._decoder.config, "max_position_embeddings", None)
        check_fits(request, prompt_tokens=len(row.prompt.input_ids), limit=limit)
        return row
