"""Decoding measured: time to first token, time per token, batches, streams of requests."""

from __future__ import annotations

import random
import statistics
import threading
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from time import perf_counter, sleep
from typing import Any

import torch

from softrag.batch import collate_prompts
from softrag.bench.measure import Hardware, Recorder, median_seconds, peak_memory
from softrag.bench.presets import random_texts
from softrag.decoder import DecodeRequest, TorchDecoder
from softrag.decoder.copying import CopySource
from softrag.memory import Memory
from softrag.model import SoftRAGModel
from softrag.prompt import RagPrompt

DOCUMENTS = 5
DOCUMENT_TOKENS = 128
# With it a preset's prompt of five memories has about 100 tokens, as with real templates.
QUESTION_TOKENS = 48


def make_requests(
    model: SoftRAGModel,
    count: int,
    mode: str,
    *,
    documents: int = DOCUMENTS,
    max_new_tokens: int = 64,
    seed: int = 0,
) -> list[DecodeRequest]:
    """Return requests of a mode, `"text"` or `"memory"`, with random documents and questions."""
    generator = torch.Generator().manual_seed(seed)
    decoder: Any = model.decoder
    width = decoder.config.hidden_size
    n_soft = -(-DOCUMENT_TOKENS // model.config.rate)
    requests = []
    tokenizer = model.decoder_tokenizer
    assert tokenizer is not None
    questions = random_texts(tokenizer, count, QUESTION_TOKENS, seed=seed)
    for number, question in enumerate(questions):
        read: Sequence[Memory | str]
        if mode == "text":
            read = random_texts(tokenizer, documents, DOCUMENT_TOKENS, seed=seed + number + 1)
        else:
            read = [
                Memory(
                    values=(torch.randn(n_soft, width, generator=generator) * 0.02).bfloat16(),
                    key=f"{number:016x}{document:016x}",
                    fingerprint=model.fingerprint,
                    n_document_tokens=DOCUMENT_TOKENS,
                )
                for document in range(documents)
            ]
        requests.append(
            DecodeRequest(question=question, documents=read, max_new_tokens=max_new_tokens)
        )
    return requests


class Floors:
    """Least times of a decoder's work on some hardware."""

    def __init__(self, model: SoftRAGModel, hardware: Hardware) -> None:
        decoder: Any = model.decoder
        config = decoder.config
        self._hardware = hardware
        size = model.dtype.itemsize
        layers = sum(
            p.numel() for n, p in decoder.base_model.layers.named_parameters() if "lora" not in n
        )
        head = decoder.get_output_embeddings().weight.numel()
        self._layers, self._head, self._size = layers, head, size
        dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self._kv = 2 * config.num_hidden_layers * config.num_key_value_heads * dim * size
        self._attention = 4 * config.num_hidden_layers * config.num_attention_heads * dim

    def prefill(self, rows: int, tokens: int) -> float:
        """Read `rows` prompts of `tokens` each and choose their first tokens."""
        flops = 2 * self._layers * rows * tokens + 2 * self._head * rows
        flops += self._attention * rows * tokens * tokens / 2
        return self._hardware.seconds(
            nbytes=(self._layers + self._head) * self._size + rows * tokens * self._kv, flops=flops
        )

    def step(self, rows: int, context: float) -> float:
        """Choose one more token for `rows` rows that have read `context` tokens."""
        flops = 2 * (self._layers + self._head) * rows + self._attention * rows * context
        nbytes = (self._layers + self._head) * self._size + rows * context * self._kv
        return self._hardware.seconds(nbytes=nbytes, flops=flops)

    def answers(self, rows: int, tokens: int, new_tokens: int) -> float:
        """Answer `rows` prompts of `tokens` each in full."""
        steps = sum(self.step(rows, tokens + n) for n in range(1, new_tokens))
        return self.prefill(rows, tokens) + steps


def bench_naive(
    model: SoftRAGModel, recorder: Recorder, floors: Floors, *, new_tokens: int = 64
) -> None:
    """Measure Hugging Face `generate` with unmerged adapters, one request at a time."""
    for mode in ("memory", "text"):
        request = make_requests(model, 1, mode, max_new_tokens=new_tokens)[0]
        inputs = prompt_inputs(model, request)
        tokens = inputs["inputs_embeds"].shape[1]
        generate_naively(model, inputs, 4)
        first = median_seconds(
            partial(generate_naively, model, inputs, 1),
            recorder.device, repeat=3, warmup=1,
        )  # fmt: skip
        whole = median_seconds(
            partial(generate_naively, model, inputs, new_tokens),
            recorder.device, repeat=1, warmup=0,
        )  # fmt: skip
        recorder.add(f"naive, {mode}, batch 1: first token", first, "s", floors.prefill(1, tokens))
        recorder.add(
            f"naive, {mode}, batch 1: {new_tokens} tokens", whole, "s",
            floors.answers(1, tokens, new_tokens),
        )  # fmt: skip


def prompt_inputs(model: SoftRAGModel, request: DecodeRequest) -> dict[str, torch.Tensor]:
    """Return a request's prompt as Hugging Face `generate` takes it."""
    assert model.decoder_tokenizer is not None
    prompt = RagPrompt.from_config(model.config, model.decoder_tokenizer)
    row = prompt.render(
        request.question, [d if isinstance(d, str) else len(d) for d in request.documents]
    )
    batch = collate_prompts([row], 0, side="left")
    ids, mask = batch.input_ids.to(model.device), batch.attention_mask.to(model.device)
    values = [d.values for d in request.documents if isinstance(d, Memory)]
    soft = torch.cat(values) if values else torch.zeros(0, model.decoder.config.hidden_size)  # type: ignore[union-attr]
    with torch.no_grad():
        embeddings = model.embed_prompt(ids, mask, soft.to(model.device))
    return {"inputs_embeds": embeddings, "attention_mask": mask}


def generate_naively(
    model: SoftRAGModel, inputs: dict[str, torch.Tensor], new_tokens: int
) -> torch.Tensor:
    """Run Hugging Face `generate` greedily and return the new ids, `(1, tokens)`."""
    assert model.decoder is not None
    assert model.decoder_tokenizer is not None
    prompt = RagPrompt.from_config(model.config, model.decoder_tokenizer)
    with torch.no_grad():
        return model.decoder.generate(
            **inputs,
            max_new_tokens=new_tokens,
            do_sample=False,
            eos_token_id=sorted(prompt.end_ids),
            pad_token_id=0,
        )


def bench_single(
    decoder: TorchDecoder,
    recorder: Recorder,
    floors: Floors,
    *,
    documents: int = DOCUMENTS,
    new_tokens: int = 64,
) -> None:
    """Measure one request at a time: to the first token, and per token after it."""
    for mode in ("memory", "text"):
        requests = make_requests(
            decoder.model, 8, mode, documents=documents, max_new_tokens=new_tokens
        )
        tokens = decoder.prompt_tokens(requests[0].question, requests[0].documents)
        firsts, steps = [], []
        for turn, request in enumerate(requests):
            started = perf_counter()
            times = []
            for _ in decoder.stream(request):
                times.append(perf_counter() - started)
            if turn >= 2:
                firsts.append(times[0])
                if len(times) > 1:  # a trained model may end an answer after its first token
                    steps.append((times[-1] - times[0]) / (len(times) - 1))
        name = f"{mode}, {documents} documents, batch 1"
        recorder.add(f"{name}: prompt", tokens, "tokens")
        recorder.add(
            f"{name}: first token", statistics.median(firsts), "s", floors.prefill(1, tokens)
        )
        if steps:
            recorder.add(
                f"{name}: each further token", statistics.median(steps), "s",
                floors.step(1, tokens + new_tokens / 2),
            )  # fmt: skip


def bench_batch(
    decoder: TorchDecoder,
    recorder: Recorder,
    floors: Floors,
    *,
    batch: int = 64,
    new_tokens: int = 64,
) -> None:
    """Measure a static batch in both modes, end to end."""
    seconds = {}
    for mode in ("memory", "text"):
        requests = make_requests(decoder.model, batch, mode, max_new_tokens=new_tokens)
        tokens = decoder.prompt_tokens(requests[0].question, requests[0].documents)
        with peak_memory(recorder.device) as peak:
            seconds[mode] = median_seconds(
                partial(decoder.generate, requests), recorder.device,
                repeat=3, warmup=2,
            )  # fmt: skip
        floor = floors.answers(batch, tokens, new_tokens)
        name = f"{mode}, {DOCUMENTS} documents, batch {batch}"
        recorder.add(f"{name}: {new_tokens} tokens each", seconds[mode], "s", floor)
        recorder.add(f"{name}: answers", batch / seconds[mode], "answers/s", batch / floor)
        short = [replace(request, max_new_tokens=1) for request in requests]
        first = median_seconds(
            partial(decoder.generate, short), recorder.device, repeat=3, warmup=1
        )
        recorder.add(f"{name}: first token", first, "s", floors.prefill(batch, tokens))
        if peak():
            recorder.add(f"{name}: peak GPU memory", peak() / 2**30, "GiB")
    recorder.add(f"batch {batch}: text over memory", seconds["text"] / seconds["memory"], "times")


def bench_copying(
    decoder: TorchDecoder, recorder: Recorder, *, batch: int = 64, new_tokens: int = 64
) -> None:
    """Measure a static batch from memories without and with a copy bias.

    Its texts are new the first time, which is not counted, and known afterwards.
    """
    tokenizer = decoder.model.decoder_tokenizer
    assert tokenizer is not None
    texts = random_texts(tokenizer, batch * DOCUMENTS, DOCUMENT_TOKENS, seed=recorder.seed)
    plain = make_requests(decoder.model, batch, "memory", max_new_tokens=new_tokens)
    copying = [
        replace(each, copy_from=texts[number * DOCUMENTS :][:DOCUMENTS], copy_bias=4.0)
        for number, each in enumerate(plain)
    ]
    for name, requests in (("without", plain), ("with", copying)):
        # Answers may end early: the end is favoured behind every word.
        tokens = sum(result.completion_tokens for result in decoder.generate(requests))
        seconds = median_seconds(
            partial(decoder.generate, requests), recorder.device, repeat=3, warmup=1
        )
        recorder.add(f"memory, batch {batch}, {name} copy bias", tokens / seconds, "tokens/s")
    one = median_seconds(
        lambda: [CopySource(tokenizer, text) for text in texts], recorder.device, repeat=3
    )
    recorder.add(f"text of {DOCUMENT_TOKENS} tokens, read to be copied", one / len(texts), "s")


def bench_arrivals(
    decoder: TorchDecoder, recorder: Recorder, *, count: int = 64, load: float = 4.0
) -> None:
    """Measure requests of mixed sizes that arrive at random against the same ones at once.

    Args:
        decoder: Answers.
        recorder: Takes the results.
        count: Requests.
        load: Arrival rate, in multiples of the rate at which the static batch is answered.
    """
    chance = random.Random(recorder.seed)
    requests = [
        make_requests(
            decoder.model, 1, "memory", documents=chance.choice([1, 3, 5, 10]),
            max_new_tokens=chance.choice([16, 32, 64]), seed=number,
        )[0]
        for number in range(count)
    ]  # fmt: skip
    tokens = sum(request.max_new_tokens for request in requests)
    static = median_seconds(lambda: decoder.generate(requests), recorder.device, repeat=3)
    arrivals, at = [], 0.0
    for _ in requests:
        at += chance.expovariate(load * count / static)
        arrivals.append(at)
    # The first runs meet shapes that are captured then and there.
    times = [_run_arrivals(decoder, requests, arrivals) for _ in range(9)][4:]
    streamed = statistics.median(times)
    recorder.add(f"{count} mixed answers, at once", tokens / static, "tokens/s")
    recorder.add(
        f"{count} mixed answers, arriving at {load:g} times that rate", tokens / streamed,
        "tokens/s", tokens / static,
    )  # fmt: skip


def _run_arrivals(
    decoder: TorchDecoder, requests: Sequence[DecodeRequest], arrivals: Sequence[float]
) -> float:
    """Return the seconds from the first arrival to the last answer; each caller is a thread."""
    started = perf_counter()

    def ask(request: DecodeRequest, arrival: float) -> None:
        sleep(max(0.0, arrival - arrivals[0] - (perf_counter() - started)))
        decoder.generate([request])

    threads = [
        threading.Thread(target=ask, args=pair) for pair in zip(requests, arrivals, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return perf_counter() - started
