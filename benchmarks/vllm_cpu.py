"""vLLM as decoder against the decoder in this process, on a CPU, with the demo model.

    python -m benchmarks.vllm_cpu --python .venv-vllm/bin/python --out benchmarks/results/….json

`make test-vllm` sets up that other Python. Rates are measured by `benchmarks.vllm_rates`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path

import httpx
import torch

from softrag import DecodeRequest, DecoderError, DecodeResult, TorchDecoder, VLLMDecoder
from softrag.bench.measure import commit
from softrag.codec import decode, encode
from softrag.export import cached_export
from softrag.model import SoftRAGModel
from tests.vllm.questions import ask_demo
from tests.vllm.server import VLLMProcess

CONCURRENT = 32
PACKAGES = ("torch", "transformers", "softrag-memory")
EMBEDS = ("--enable-prompt-embeds",)
Note = Callable[..., None]


def main() -> None:
    """Measure, print a line each, write the result file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python", required=True, help="of the environment with vLLM")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--in-process", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--store", default=":memory:", help="folder to keep the index in")
    options = parser.parse_args()
    if options.in_process:
        answer_in_process(options.in_process, options.out)
        return
    note = noter(options.out, options.python)
    requests = ask_demo(store=options.store)
    torch_fp32 = load_torch(torch.float32)
    expected = torch_fp32.generate(requests)
    exported = cached_export("softrag-demo", dtype=torch.float32)

    with serve(exported, EMBEDS, "float32", options.python) as server:
        with open_url(server) as decoder:
            equal(note, "HTTP, float32", expected, decoder.generate(requests))
            bytes_per_question(note, "complete embeddings", decoder, requests)
            killed(note, decoder, server, requests)
            further(note, decoder, torch_fp32, requests)
    with serve(exported, VLLMProcess.PLUGIN_FLAGS, "float32", options.python) as server:
        with open_url(server, send_once=True) as decoder:
            bytes_per_question(note, "plugin, memories new", decoder, requests)
            bytes_per_question(note, "plugin, memories known", decoder, requests)
            equal(note, "plugin, float32", expected, decoder.generate(requests))
    equal(note, "in process, float32", expected, run_in_process(options.python, requests))
    bf16(note, options.python, requests)


def noter(out: Path, python: str, module: str = "benchmarks.vllm_cpu") -> Note:
    """Return a function that prints a figure and adds it to the result file."""
    results: list[dict] = []
    code = "import vllm, transformers as t; print(vllm.__version__, t.__version__)"
    printed = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    theirs = printed.stdout.split()[-2:]
    versions = {package: version(package) for package in PACKAGES}
    versions |= {"vllm": theirs[0], "transformers beside vllm": theirs[1]}

    def note(name: str, value: float, unit: str, floor: float | None = None) -> None:
        results.append(
            {
                "name": name,
                "value": round(value, 4),
                "unit": unit,
                "floor": floor,
                "device": f"{platform.machine()}, {torch.get_num_threads()} threads, "
                f"load {os.getloadavg()[0]:.1f}",
                "versions": versions,
                "commit": commit(),
                "command": " ".join(["python", "-m", module, *sys.argv[1:]]),
                "seed": 0,
            }
        )
        print(f"{name}: {value:.4g} {unit}", flush=True)
        out.write_text(json.dumps(results, indent=1) + "\n")

    return note


def load_torch(dtype: torch.dtype, *, fused: bool = True) -> TorchDecoder:
    """Load the decoder in this process: continuous batches, or not `fused` static ones."""
    model = SoftRAGModel.from_pretrained(
        "softrag-demo", load_compressor=False, dtype=dtype, device="cpu"
    )
    return TorchDecoder(model, fused=fused)


def serve(exported: Path, flags: Sequence[str], dtype: str, python: str) -> VLLMProcess:
    """Start a server."""
    return VLLMProcess(exported, flags=flags, dtype=dtype, python=python)


@contextmanager
def open_url(server: VLLMProcess, *, send_once: bool = False) -> Iterator[VLLMDecoder]:
    """Open a decoder and let vLLM prepare what it prepares at the first request."""
    decoder = VLLMDecoder.from_url(
        "softrag-demo", server.url, send_once=send_once, max_concurrent=CONCURRENT, timeout_s=300
    )
    with closing(decoder):
        decoder.generate([DecodeRequest(question="Warm?", max_new_tokens=4)])
        yield decoder


def same(results: Sequence[DecodeResult], others: Sequence[DecodeResult]) -> int:
    """Count equal answers."""
    return sum(
        (a.text, a.completion_tokens) == (b.text, b.completion_tokens)
        for a, b in zip(results, others, strict=True)
    )


def equal(
    note: Note, name: str, expected: Sequence[DecodeResult], results: Sequence[DecodeResult]
) -> None:
    """Note how many answers are equal."""
    note(f"{name}: answers equal to the decoder in process", same(results, expected),
         f"of {len(expected)}", len(expected))  # fmt: skip


@contextmanager
def endless(*decoders: TorchDecoder | VLLMDecoder) -> Iterator[None]:
    """Let no token end an answer."""
    holders = [each if isinstance(each, VLLMDecoder) else each._engine for each in decoders]
    kept = [holder._end_ids for holder in holders]
    for holder, ends in zip(holders, kept, strict=True):
        holder._end_ids = type(ends)()
    yield
    for holder, ends in zip(holders, kept, strict=True):
        holder._end_ids = ends


def timed(run: Callable[[], object]) -> float:
    """Return seconds."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def bytes_per_question(
    note: Note, name: str, decoder: VLLMDecoder, requests: Sequence[DecodeRequest]
) -> None:
    """Note the mean size of a request's body."""
    sizes: list[int] = []

    def count(request: httpx.Request) -> None:
        sizes.append(int(request.headers["content-length"]))

    hooks = decoder.engine.server._http.event_hooks
    decoder.engine.server._http.event_hooks = {**hooks, "request": [count]}
    decoder.generate([replace(each, max_new_tokens=1) for each in requests])
    decoder.engine.server._http.event_hooks = hooks
    note(f"sent per question, {name}", statistics.mean(sizes), "bytes")


def further(
    note: Note, decoder: VLLMDecoder, in_process: TorchDecoder, requests: Sequence[DecodeRequest]
) -> None:
    """Offer what must be refused, then count right answers among a thousand further ones."""
    memory = requests[0].documents[0]
    nan, infinite = memory.values.clone(), memory.values.clone()
    nan[0, 0], infinite[0, 0] = float("nan"), float("inf")
    refused = 0
    for spoilt in (
        replace(memory, values=nan),
        replace(memory, values=infinite),
        replace(memory, values=memory.values[:, 1:]),
        replace(memory, fingerprint="0" * 32),
    ):
        try:
            decoder.generate([replace(requests[0], documents=[spoilt])])
        except Exception:
            refused += 1
    note("NaN, infinity, wrong width, foreign fingerprint: refused before sending", refused,
         "of 4", 4)  # fmt: skip
    short = [replace(each, max_new_tokens=2) for each in requests]
    right = in_process.generate(short)
    note("right answers after them", same(decoder.generate(short * 20), right * 20),
         "of 1000", 1000)  # fmt: skip


def killed(
    note: Note, decoder: VLLMDecoder, server: VLLMProcess, requests: Sequence[DecodeRequest]
) -> None:
    """Kill the server in the middle of an answer, and note how long errors take."""
    expected = decoder.generate(requests[:4])
    with endless(decoder):
        stream = decoder.stream(replace(requests[0], max_new_tokens=2000))
        next(stream)
    server.kill()
    note("killed in an answer: until its error", timed(lambda: fails(lambda: list(stream))),
         "s", 5)  # fmt: skip
    note("killed: until the error of 4 new questions",
         timed(lambda: fails(lambda: decoder.generate(requests[:4]))), "s", 5)  # fmt: skip
    server.start()
    note("right answers when it is back", same(decoder.generate(requests[:4]), expected),
         "of 4", 4)  # fmt: skip


def fails(run: Callable[[], object]) -> None:
    """Run what must end in a `DecoderError`."""
    try:
        run()
    except DecoderError as error:
        print(f"  {error}")
        return
    raise AssertionError("expected a DecoderError")


def run_in_process(python: str, requests: Sequence[DecodeRequest]) -> list[DecodeResult]:
    """Answer with vLLM in another Python's process."""
    folder = Path(os.environ.get("TMPDIR", "/tmp"))
    asked, answered = folder / "softrag-asked.json", folder / "softrag-answered.json"
    rows = [
        {
            "question": each.question,
            "max_new_tokens": each.max_new_tokens,
            "documents": [encode(memory).hex() for memory in each.documents],
        }
        for each in requests
    ]
    asked.write_text(json.dumps(rows))
    subprocess.run(
        [
            *(python, "-m", "benchmarks.vllm_cpu", "--python", python),
            *("--in-process", str(asked), "--out", str(answered)),
        ],
        check=True,
        env={k: v for k, v in os.environ.items() if k not in ("OMP_NUM_THREADS", "PYTHONPATH")}
        | {"VLLM_NO_USAGE_STATS": "1", "PYTHONPATH": "."},
    )
    return [DecodeResult(**each) for each in json.loads(answered.read_text())]


def answer_in_process(asked: Path, answered: Path) -> None:
    """Answer with vLLM in this process."""
    requests = [
        DecodeRequest(
            question=each["question"],
            max_new_tokens=each["max_new_tokens"],
            documents=[decode(bytes.fromhex(data)) for data in each["documents"]],
        )
        for each in json.loads(asked.read_text())
    ]
    decoder = VLLMDecoder.in_process(
        "softrag-demo", options={"enforce_eager": True, "dtype": "float32"}
    )
    with closing(decoder):
        results = decoder.generate(requests)
    fields = ("text", "prompt_tokens", "soft_tokens", "completion_tokens", "first_token_s",
              "finish_reason")  # fmt: skip
    answered.write_text(json.dumps([{n: getattr(r, n) for n in fields} for r in results]))


def bf16(note: Note, python: str, requests: Sequence[DecodeRequest]) -> None:
    """Note how many answers are equal in bfloat16, and how near to ties the others part."""
    ours = load_torch(torch.bfloat16)
    written = [tokens_in_process(ours, each) for each in requests]
    exported = cached_export("softrag-demo", dtype=torch.bfloat16)
    with serve(exported, EMBEDS, "bfloat16", python) as server, open_url(server) as decoder:
        theirs = run_together(partial(tokens_of_vllm, decoder), requests)
    exact = load_torch(torch.float32, fused=False)
    rounded = load_torch(torch.bfloat16, fused=False)
    others = {
        "vLLM": theirs,
        "Hugging Face's layers in float32": [tokens_in_process(exact, each) for each in requests],
        "Hugging Face's layers in bfloat16": [
            tokens_in_process(rounded, each) for each in requests
        ],
    }
    total = f"of {len(requests)}"
    for other, answers in others.items():
        equal_ones = sum(a == b for a, b in zip(written, answers, strict=True))
        note(f"bfloat16: answers of the decoder in process equal to those of {other}",
             equal_ones, total)  # fmt: skip
    for name, scorer in (("float32", exact), ("bfloat16", rounded)):
        gaps = [
            part_at(scorer, request, a, b)
            for request, a, b in zip(requests, written, theirs, strict=True)
            if a != b
        ]
        if gaps:
            start = f"where an answer parts from vLLM's, the two tokens in {name} apart by"
            note(f"bfloat16: {start}, median", statistics.median(gaps), "nats")
            note(f"bfloat16: {start}, largest", max(gaps), "nats")
    apart = torch.cat([margins(exact, *each) for each in zip(requests, written, strict=True)])
    note("at all places of all answers, the two best tokens in float32 apart by, median",
         float(apart.median()), "nats")  # fmt: skip
    note("places of all answers where they are less than 0.25 nats apart",
         float((apart < 0.25).float().mean()), "share")  # fmt: skip


def tokens_in_process(decoder: TorchDecoder, request: DecodeRequest) -> list[int]:
    """Answer alone, and return the tokens, the one that ends the answer included."""
    row = decoder._row(request)
    decoder._engine.finish([row])
    ended = row.finish_reason == "stop"
    return row._pending + [min(decoder.prompt.end_ids)] * ended


def tokens_of_vllm(decoder: VLLMDecoder, request: DecodeRequest) -> list[int]:
    """Answer, and return the tokens, the one that ends the answer included."""
    built = decoder.prompts.build(request.question, request.documents)
    pieces = decoder.engine.run(built, decoder._sampling(request, 16))
    return [token for piece in pieces for token in piece.token_ids]


def run_together(
    answer: Callable[[DecodeRequest], list[int]], requests: Sequence[DecodeRequest]
) -> list[list[int]]:
    """Answer many at a time."""
    with ThreadPoolExecutor(CONCURRENT) as threads:
        return list(threads.map(answer, requests))


@torch.no_grad()
def log_probabilities(
    decoder: TorchDecoder, request: DecodeRequest, written: Sequence[int]
) -> torch.Tensor:
    """Return `(tokens + 1, vocabulary)` of what follows the prompt and each written token."""
    row = decoder._render(request.question, request.documents)
    ids = torch.tensor([[*row.input_ids, *written]])
    soft_tokens = torch.cat([each.values for each in request.documents])
    embeds = decoder.model.embed_prompt(ids, torch.ones_like(ids), soft_tokens)
    logits = decoder.model.decoder(inputs_embeds=embeds).logits[0, -1 - len(written) :]
    return logits.float().log_softmax(-1)


def part_at(
    decoder: TorchDecoder, request: DecodeRequest, a: Sequence[int], b: Sequence[int]
) -> float:
    """Return how far the log probabilities of two answers' first unequal tokens are apart."""
    shared = next(n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
    after = log_probabilities(decoder, request, a[:shared])[-1]
    return float((after[a[shared]] - after[b[shared]]).abs())


def margins(decoder: TorchDecoder, request: DecodeRequest, written: Sequence[int]) -> torch.Tensor:
    """Return `(tokens,)`: how far the two best tokens are apart at each place of an answer."""
    best = log_probabilities(decoder, request, written[:-1]).topk(2).values
    return best[:, 0] - best[:, 1]


if __name__ == "__main__":
    main()
