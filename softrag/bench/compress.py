"""Compression measured: documents of one length and of real lengths, and the naive way."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from softrag.batch import collate_documents
from softrag.bench.measure import Hardware, Recorder, median_seconds, peak_memory
from softrag.bench.presets import random_texts
from softrag.compressor import Compressor
from softrag.model import SoftRAGModel

# Tokens of 4,005 real chunks, each 50th quantile: introductions of Wikipedia articles, split as
# `add` does into chunks of at most 128 tokens of the demo model's tokenizer.
# fmt: off
REAL_LENGTHS = (
    2, 3, 3, 4, 4, 5, 5, 6, 7, 8, 10, 18, 28, 36, 44, 49, 54, 59, 63, 68, 73, 77, 81, 84, 88,
    91, 93, 95, 98, 100, 102, 103, 105, 107, 109, 110, 112, 113, 114, 116, 117, 118, 120, 121,
    122, 123, 125, 126, 127, 128,
)
# fmt: on


def compute_floor(model: SoftRAGModel, hardware: Hardware, n_tokens: float) -> float:
    """Return documents per second if matrix products were all the work.

    Args:
        model: Gives the compressor.
        hardware: What the device does.
        n_tokens: Compressor tokens of a document, soft ones included.
    """
    compressor: Any = model.compressor
    weights = sum(p.numel() for p in compressor.layers.parameters())
    return hardware.matmul / (2 * weights * n_tokens)


def bench_compress(
    model: SoftRAGModel,
    recorder: Recorder,
    hardware: Hardware,
    *,
    documents: int,
    batch_tokens: int | None = None,
    name: str = "compress",
) -> None:
    """Measure documents of 128 tokens and of real lengths, texts to memories."""
    compressor = Compressor(model, batch_tokens)
    rates = {}
    for kind, sizes in (("128 tokens", 128), ("real lengths", REAL_LENGTHS)):
        texts = random_texts(compressor.prompt.tokenizer, documents, sizes, seed=recorder.seed)
        rows = [compressor.prompt.render(text) for text in texts]
        tokens = sum(len(row.input_ids) for row in rows) / documents
        with peak_memory(recorder.device) as peak:
            seconds = median_seconds(
                partial(compressor.compress, texts), recorder.device,
                repeat=3, warmup=1,
            )  # fmt: skip
        floor = compute_floor(model, hardware, tokens)
        recorder.add(f"{name}, {kind}", documents / seconds, "documents/s", floor)
        rates[kind] = documents * tokens / seconds
        recorder.add(f"{name}, {kind}: tokens", rates[kind], "tokens/s", floor * tokens)
        if peak():
            recorder.add(f"{name}, {kind}: peak GPU memory", peak() / 2**30, "GiB")
    recorder.add(
        f"{name}: tokens/s of real lengths over those of 128",
        rates["real lengths"] / rates["128 tokens"], "times",
    )  # fmt: skip


def bench_naive_compress(
    model: SoftRAGModel, recorder: Recorder, hardware: Hardware, *, documents: int, batch: int
) -> None:
    """Measure padded batches through the whole language model, its head's logits thrown away."""
    compressor: Any = model.compressor
    with torch.device("meta"):
        language_model = AutoModelForCausalLM.from_config(compressor.config)
    language_model.model = compressor
    language_model.lm_head.weight = compressor.get_input_embeddings().weight
    language_model.eval()
    prompt = Compressor(model).prompt
    texts = random_texts(prompt.tokenizer, documents, 128, seed=recorder.seed)
    length = len(prompt.render(texts[0]).input_ids)

    def run() -> None:
        for start in range(0, documents, batch):
            rows = [prompt.render(text) for text in texts[start : start + batch]]
            padded = collate_documents(rows, 0)
            ids, mask = (part.to(model.device) for part in padded)
            is_memory = ids == model.memory_ids[0]
            words = compressor.get_input_embeddings()(torch.where(is_memory, 0, ids))
            embeddings = torch.where(is_memory[..., None], model.memory_embedding, words)
            output = language_model(
                inputs_embeds=embeddings, attention_mask=mask, output_hidden_states=True,
                use_cache=False,
            )  # fmt: skip
            model.connector(output.hidden_states[-1][is_memory]).cpu()

    with torch.no_grad():
        seconds = median_seconds(run, recorder.device, repeat=2, warmup=1)
    recorder.add(
        "compress naively, 128 tokens", documents / seconds, "documents/s",
        compute_floor(model, hardware, length),
    )  # fmt: skip
