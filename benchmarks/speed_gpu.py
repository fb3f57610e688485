"""What the fused paths do on a GPU: correct first, then how near the hardware's limit.

    python benchmarks/speed_gpu.py --out DIR [--parts naive,single/compress]

Every part is guarded: an error is printed with its traceback and the next part runs. Groups of
parts, separated by `/`, run in processes of their own.
"""

# Work is timed inside the loop that makes it.
# ruff: noqa: B023

from __future__ import annotations

import argparse
import functools
import logging
import statistics
import subprocess
import sys
import time
import traceback
from pathlib import Path

import torch
from torch import nn

from softrag.bench import compress as bench_compress
from softrag.bench import decode as bench_decode
from softrag.bench.measure import Hardware, Recorder, median_seconds
from softrag.bench.presets import PRESETS, SHAPES, build_model, random_texts
from softrag.compressor import Compressor
from softrag.decoder import TorchDecoder
from softrag.fused import FusedBackbone, PackedRunner, reference

print = functools.partial(print, flush=True)
CHECKS = "check:llama:float32,check:llama:bfloat16,check:qwen3:bfloat16,check:mistral:bfloat16"
# Groups of parts; each group is a process of its own.
ALL = (
    f"{CHECKS}/naive,single,batch,copying,arrivals,profile,growth/compress,naive_compress/"
    "check_kernels,kernels"
)
SMALL = {
    "vocab_size": 2048,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "initializer_range": 0.1,
}
FAMILIES = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {"head_dim": 64, "tie_word_embeddings": True},
    "gemma3_text": {"head_dim": 64},
}


class Bench:
    """Models and hardware that parts share; made when first needed."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.device = torch.device(options.device)
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.capture = self.device.type == "cuda" and not options.no_capture
        options.out.mkdir(parents=True, exist_ok=True)
        self.recorder = Recorder(
            device=self.device, say=print, path=options.out / "speed.json", seed=0
        )

    @functools.cached_property
    def hardware(self) -> Hardware:
        """The measured limits."""
        hardware = Hardware.measure(self.device, self.dtype)
        self.recorder.add("hardware: bandwidth", hardware.bandwidth / 1e12, "TB/s")
        self.recorder.add("hardware: matrix product", hardware.matmul / 1e12, "TFLOP/s")
        return hardware

    @functools.cached_property
    def model(self):  # noqa: ANN201
        """The model, adapters unmerged until there is a decoder."""
        started = time.time()
        model = build_model(self.options.preset, device=self.device, dtype=self.dtype)
        print(f"built {self.options.preset} in {time.time() - started:.1f} s")
        return model

    @functools.cached_property
    def compressor_model(self):  # noqa: ANN201
        """A compressor alone."""
        return build_model(
            self.options.preset, device=self.device, dtype=self.dtype, load_decoder=False
        )

    @functools.cached_property
    def decoder(self) -> TorchDecoder:
        """The decoder; from here on the adapters are merged."""
        started = time.time()
        decoder = TorchDecoder(self.model, capture=self.capture)
        print(f"made the decoder in {time.time() - started:.1f} s")
        return decoder

    @functools.cached_property
    def floors(self) -> bench_decode.Floors:
        """Least times."""
        return bench_decode.Floors(self.model, self.hardware)

    # ------------------------------------------------------------------ parts

    def check(self, name: str, dtype: str) -> None:
        """Compare fused and captured paths of a family with Hugging Face's own."""
        SHAPES[name] = SMALL | FAMILIES[name] | {"model_type": name}
        PRESETS[name] = (name, name)
        self._check_family(name, dtype=getattr(torch, dtype))

    def check_kernels(self) -> None:
        """Compare every kernel with its reference."""
        from softrag.fused import kernels

        def far(a: torch.Tensor, b: torch.Tensor) -> float:
            return ((a.double() - b.double()).norm() / b.double().norm()).item()

        torch.manual_seed(1)
        for dtype, limit in ((torch.float32, 1e-4), (torch.bfloat16, 2e-2)):
            make = functools.partial(torch.randn, device=self.device, dtype=dtype)
            errors = {}
            for hidden in (576, 1024, 4096):
                x, r, w = make(33, hidden), make(33, hidden), make(hidden)
                for one, two in zip(
                    kernels.add_norm(x, r, w, 1e-6), reference.add_norm(x, r, w, 1e-6), strict=True
                ):
                    errors[f"add_norm {hidden}"] = far(one, two)
                both = make(33, 2 * hidden)
                errors[f"silu_mul {hidden}"] = far(kernels.silu_mul(both), reference.silu_mul(both))
            for heads, kv, dim in ((9, 3, 64), (32, 8, 128), (16, 8, 128), (8, 8, 32), (4, 1, 256)):
                tokens = 70
                qkv = make(tokens, (heads + 2 * kv) * dim)
                angles = torch.rand(512, dim // 2, device=self.device) * 6
                table = torch.cat([angles.cos(), angles.sin()], dim=1)
                positions = torch.randint(0, 512, (tokens,), device=self.device)
                slots = torch.randperm(400 * 32, device=self.device)[:tokens]
                for norm in (None, make(dim)):
                    ones = [make(400, kv, 32, dim) for _ in range(2)]
                    twos = [cache.clone() for cache in ones]
                    one, two = qkv.clone(), qkv.clone()
                    arguments = (positions, table, norm, norm, 1e-6, heads, kv)
                    kernels.rotate(one, *arguments, *ones, slots)
                    reference.rotate(two, *arguments, *twos, slots)
                    errors[f"rotate {heads} {dim} {norm is None}"] = max(
                        far(a, b) for a, b in zip([one, *ones], [two, *twos], strict=True)
                    )
                keys, values = ones
                for rows in (1, 3, 64):
                    tables = torch.randint(0, 400, (rows, 24), device=self.device).int()
                    lengths = torch.randint(1, 768, (rows,), device=self.device)
                    arguments = (keys, values, tables, lengths, dim**-0.5, heads)
                    errors[f"decode {heads} {dim} rows {rows}"] = far(
                        kernels.decode_attention(qkv[:rows].contiguous(), *arguments)
                        if rows <= tokens
                        else torch.zeros(()),
                        reference.decode_attention(qkv[:rows].contiguous(), *arguments),
                    )
            worst = max(errors, key=lambda name: errors[name])
            bad = {name: error for name, error in errors.items() if not error < limit}
            print(f"  {dtype}: worst {worst} {errors[worst]:.2e}; bad: {bad or 'none'}")

    def _check_family(self, name: str, *, dtype: torch.dtype) -> None:
        model = build_model(name, device=self.device, dtype=dtype)
        with torch.no_grad():
            for part, tensor in model.named_parameters():
                if "lora_B" in part:
                    tensor.normal_(0, 0.05)
        texts = random_texts(model.decoder_tokenizer, 300, range(2, 129))
        requests = []
        for number in range(12):
            mode = ("memory", "text")[number % 2]
            requests += bench_decode.make_requests(
                model, 1, mode, documents=1 + number % 3, max_new_tokens=6 + 3 * number,
                seed=number,
            )  # fmt: skip
        eager = TorchDecoder(model, fused=False)
        expected = [eager.generate([request])[0].text for request in requests]
        copying = [
            bench_decode.replace(request, copy_from=texts[:9], copy_bias=4.0 * (number % 3 > 0))
            for number, request in enumerate(requests)
        ]
        copies = [eager.generate([request])[0].text for request in copying]
        compressor = Compressor(model)
        compressor._on_cpu = True  # no fused path
        plain = compressor.compress(texts)
        fused = Compressor(model, 4096).compress(texts)
        a = torch.cat([memory.values for memory in plain]).double()
        b = torch.cat([memory.values for memory in fused]).double()
        kind = type(model._fused_compressor).__name__
        print(f"  compressor {kind}: {((a - b).norm() / a.norm()).item():.1e} away")
        uncaptured: list[str] = []
        for capture in (False, True):
            if capture and self.device.type != "cuda":
                continue
            decoder = TorchDecoder(model, capture=capture, cache_tokens=8192)
            together = [result.text for result in decoder.generate(requests)]
            again = [result.text for result in decoder.generate(requests[::-1])][::-1]
            alone = [decoder.generate([request])[0].text for request in requests]
            streamed = ["".join(decoder.stream(request)) for request in requests]
            warm = [
                decoder.generate([bench_decode.replace(r, temperature=1.0, seed=3)])[0].text
                for r in requests
            ]
            warm_together = [
                r.text
                for r in decoder.generate(
                    [bench_decode.replace(r, temperature=1.0, seed=3) for r in requests]
                )
            ]
            copied = [result.text for result in decoder.generate(copying)]
            right = sum(x == y for x, y in zip(copies, copied, strict=True))
            same = [
                sum(x == y for x, y in zip(expected, other, strict=True))
                for other in (together, again, alone, streamed)
            ]
            uncaptured = uncaptured or alone
            captured = sum(x == y for x, y in zip(uncaptured, alone, strict=True))
            sampled = sum(x == y for x, y in zip(warm, warm_together, strict=True))
            print(
                f"  {type(decoder._engine).__name__}, capture {capture}: of {len(requests)} equal "
                f"to eager alone: together {same[0]}, reversed {same[1]}, alone {same[2]}, "
                f"streamed {same[3]}; sampled alone as together {sampled}; as not captured "
                f"{captured}; with a copy bias {right}"
            )

    def kernels(self) -> None:
        """Time single operations against the bytes they move."""
        hardware, device, dtype = self.hardware, self.device, self.dtype
        big = self.device.type == "cuda"
        shapes = {
            "qkv": (6144, 4096), "out": (4096, 4096), "gate_up": (24576, 4096),
            "down": (4096, 12288), "head": (151936, 4096),
        }  # fmt: skip
        if not big:
            shapes = {"qkv": (96, 64)}
        for name, (rows, columns) in shapes.items():
            # Several weights, so that the cache holds none.
            copies = max(1, min(12, int(400e6 // (rows * columns * 2)))) if big else 1
            weights = [torch.randn(rows, columns, device=device).to(dtype) for _ in range(copies)]
            for tokens in (1, 4, 16, 64, 128, 512):
                x = torch.randn(tokens, columns, device=device).to(dtype)
                seconds = graphed(
                    lambda x=x, weights=weights: [nn.functional.linear(x, w) for w in weights],
                    device,
                )
                floor = hardware.seconds(
                    nbytes=rows * columns * 2, flops=2 * tokens * rows * columns
                )
                print(
                    f"  linear {name} {tokens} tokens: {seconds / copies * 1e6:.1f} us, "
                    f"{seconds / copies / floor:.2f} x"
                )
        if not big:
            return
        from softrag.fused import decode_kernel
        from softrag.fused import kernels as triton_kernels

        heads, kv, dim = 32, 8, 128
        for rows, context in ((1, 137), (1, 740), (8, 137), (64, 137), (64, 740)):
            per_row = -(-context // 32)
            copies = max(2, int(200e6 // (rows * context * kv * dim * 4)))
            copies = min(copies, 36)
            pages = rows * per_row
            keys = torch.randn(copies, pages, kv, 32, dim, device=device).to(dtype)
            values = torch.randn(copies, pages, kv, 32, dim, device=device).to(dtype)
            tables = torch.randperm(pages, device=device).view(rows, per_row).int()
            lengths = torch.full((rows,), context, device=device)
            qkv = torch.randn(rows, (heads + 2 * kv) * dim, device=device).to(dtype)
            floor = rows * context * kv * dim * 4 / hardware.bandwidth
            for block in (32, 64, 128):
                decode_kernel.BLOCK_TOKENS = block
                seconds = graphed(
                    lambda: [
                        triton_kernels.decode_attention(
                            qkv, keys[i], values[i], tables, lengths, dim**-0.5, heads
                        )
                        for i in range(copies)
                    ],
                    device,
                )
                print(
                    f"  attention, Triton block {block}, {rows} rows x {context}: "
                    f"{seconds / copies * 1e6:.1f} us, {seconds / copies / floor:.2f} x"
                )
            decode_kernel.BLOCK_TOKENS = 64
            k = keys.transpose(2, 3).reshape(copies, rows, per_row * 32, kv, dim)
            k = k[:, :, :context].transpose(2, 3).contiguous()
            v = torch.randn_like(k)
            q = torch.randn(rows, heads, 1, dim, device=device).to(dtype)
            mask = torch.ones(rows, 1, 1, context, dtype=torch.bool, device=device)
            for label, use in (("no mask", None), ("mask", mask)):
                seconds = graphed(
                    lambda use=use: [
                        nn.functional.scaled_dot_product_attention(
                            q, k[i], v[i], attn_mask=use, enable_gqa=True
                        )
                        for i in range(copies)
                    ],
                    device,
                )
                print(
                    f"  attention, sdpa enable_gqa {label}, {rows} rows x {context}: "
                    f"{seconds / copies * 1e6:.1f} us, {seconds / copies / floor:.2f} x"
                )
        for tokens, hidden in ((1, 4096), (64, 4096), (16384, 1024)):
            x = torch.randn(tokens, hidden, device=device).to(dtype)
            w = torch.randn(hidden, device=device).to(dtype)
            seconds = graphed(lambda: [triton_kernels.add_norm(x, x, w, 1e-6)] * 1, device)
            print(f"  add_norm {tokens}x{hidden}: {seconds * 1e6:.1f} us, floor "
                  f"{4 * tokens * hidden * 2 / hardware.bandwidth * 1e6:.1f}")  # fmt: skip
            both = torch.randn(tokens, 6 * hidden, device=device).to(dtype)
            seconds = graphed(lambda: [triton_kernels.silu_mul(both)], device)
            print(f"  silu_mul {tokens}x{6 * hidden}: {seconds * 1e6:.1f} us, floor "
                  f"{9 * tokens * hidden * 2 / hardware.bandwidth * 1e6:.1f}")  # fmt: skip
            h, g = (32, 8) if hidden == 4096 else (16, 8)
            qkv = torch.randn(tokens, (h + 2 * g) * 128, device=device).to(dtype)
            table = torch.rand(2048, 128, device=device)
            at = torch.zeros(tokens, dtype=torch.long, device=device)
            weight = torch.ones(128, device=device, dtype=dtype)
            seconds = graphed(
                lambda: triton_kernels.rotate(qkv, at, table, weight, weight, 1e-6, h, g), device
            )
            print(f"  rotate {tokens}x{h}: {seconds * 1e6:.1f} us, floor "
                  f"{2 * tokens * (h + g) * 256 / hardware.bandwidth * 1e6:.1f}")  # fmt: skip

    def compress(self) -> None:
        """Compare batch sizes, captured or not."""
        count = self.options.documents
        model = self.compressor_model
        sizes = self.options.batch_tokens if self.device.type == "cuda" else (512,)
        for batch_tokens in sizes:
            for capture in (True, False) if batch_tokens == sizes[0] else (True,):
                model._fused_compressor = PackedRunner(
                    model._fused_compressor.backbone
                    if model._fused_compressor is not None
                    else FusedBackbone(model.compressor),
                    width=batch_tokens,
                    capture=capture and self.capture,
                )
                bench_compress.bench_compress(
                    model, self.recorder, self.hardware, documents=count,
                    batch_tokens=batch_tokens,
                    name=f"compress, batches of {batch_tokens}, {'captured' if capture else 'eager'}",  # noqa: E501
                )  # fmt: skip
        self._device_only()

    def _device_only(self) -> None:
        """Time the backbone alone on batches that are on the device already."""
        if self.device.type != "cuda":
            return
        backbone = self.compressor_model._fused_compressor.backbone
        for tokens in (2048, 4096, 8192, 16384, 32768):
            rows = tokens // 136
            x = torch.randn(rows * 136, backbone.hidden, device=self.device).to(self.dtype)
            borders = torch.arange(rows + 1, device=self.device, dtype=torch.int32) * 136
            positions = torch.arange(rows * 136, device=self.device) % 136
            run = functools.partial(backbone.run_packed, x, borders, 256, positions)
            seconds = graphed(run, self.device)
            rate = rows / seconds
            floor = bench_compress.compute_floor(self.compressor_model, self.hardware, 136)
            print(
                f"  backbone alone, {tokens} tokens: {rate:.0f} documents/s, {floor / rate:.2f} x"
            )

    def naive_compress(self) -> None:
        """Measure the naive way."""
        bench_compress.bench_naive_compress(
            self.compressor_model, self.recorder, self.hardware,
            documents=min(1024, self.options.documents), batch=256,
        )  # fmt: skip

    def naive(self) -> None:
        """Measure Hugging Face generate, before the adapters are merged."""
        # A model of its own, whose adapters stay unmerged.
        model = build_model(self.options.preset, device=self.device, dtype=self.dtype)
        bench_decode.bench_naive(
            model, self.recorder, self.floors, new_tokens=self.options.new_tokens
        )

    def single(self) -> None:
        """Measure batch 1."""
        bench_decode.bench_single(
            self.decoder, self.recorder, self.floors, new_tokens=self.options.new_tokens
        )

    def batch(self) -> None:
        """Measure static batches."""
        for batch in self.options.batches:
            bench_decode.bench_batch(
                self.decoder, self.recorder, self.floors, batch=batch,
                new_tokens=self.options.new_tokens,
            )  # fmt: skip

    def copying(self) -> None:
        """Measure what a copy bias costs."""
        for batch in self.options.batches:
            bench_decode.bench_copying(
                self.decoder, self.recorder, batch=batch, new_tokens=self.options.new_tokens
            )

    def arrivals(self) -> None:
        """Measure requests that arrive at random."""
        for count, load in ((64, 4.0),) if self.device.type == "cuda" else ((8, 4.0),):
            bench_decode.bench_arrivals(self.decoder, self.recorder, count=count, load=load)

    def growth(self) -> None:
        """Answer a thousand questions and look at the memory."""
        count = 1000 if self.device.type == "cuda" else 10
        requests = bench_decode.make_requests(self.model, 64, "memory", max_new_tokens=8)
        used = []
        for turn in range(0, count, 64):
            self.decoder.generate(
                bench_decode.make_requests(
                    self.model, 64, "memory", documents=1 + turn // 64 % 5, max_new_tokens=8,
                    seed=turn,
                )
            )  # fmt: skip
            if self.device.type == "cuda":
                used.append(torch.cuda.memory_allocated(self.device) / 2**20)
        del requests
        if used:
            print(f"  allocated MiB after each 64 questions: {[round(u) for u in used]}")
            self.recorder.add("GPU memory growth over 1,000 questions", used[-1] - used[1], "MiB")

    def profile(self) -> None:
        """Say which kernels take the time."""
        if self.device.type != "cuda":
            return
        from torch.profiler import ProfilerActivity, profile

        cases = {
            "memory, batch 1, 8 tokens": lambda: self.decoder.generate(
                bench_decode.make_requests(self.model, 1, "memory", max_new_tokens=8)
            ),
            "memory, batch 64, 8 tokens": lambda: self.decoder.generate(
                bench_decode.make_requests(self.model, 64, "memory", max_new_tokens=8)
            ),
            "compress 1024": lambda: Compressor(self.compressor_model).compress(
                random_texts(self.compressor_model.compressor_tokenizer, 1024, 128)
            ),
        }
        for name, work in cases.items():
            for _ in range(2):
                work()
            torch.cuda.synchronize()
            with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
                work()
                torch.cuda.synchronize()
            table = profiler.key_averages().table(
                sort_by="cuda_time_total", row_limit=18, max_name_column_width=70
            )
            path = self.options.out / f"profile-{name.split(',')[0].split()[0]}-{len(table)}.txt"
            path.write_text(name + "\n" + table)
            kernels = sorted(
                (event for event in profiler.key_averages() if event.self_device_time_total),
                key=lambda event: -event.self_device_time_total,
            )
            print(f"  {name}:")
            for event in kernels[:16]:
                print(
                    f"    {event.self_device_time_total / 1e3:9.2f} ms {event.count:6d} x "
                    f"{event.self_device_time_total / event.count:8.1f} us  {event.key[:90]}"
                )


def graphed(work, device: torch.device) -> float:  # noqa: ANN001
    """Return the median seconds of some work, replayed as a CUDA graph on a GPU."""
    if device.type != "cuda":
        return median_seconds(work, device)
    for _ in range(2):
        work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    times = []
    for _ in range(12):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times[2:])


def guarded(name: str, work) -> None:  # noqa: ANN001
    """Run some work; print how it ended, whatever happens."""
    started = time.time()
    print(f"== {name}")
    try:
        work()
        print(f"== {name}: OK, {time.time() - started:.1f} s")
    except Exception:
        traceback.print_exc()
        print(f"== {name}: FAILED, {time.time() - started:.1f} s")
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # a dead device ends the process here


def main() -> None:
    """Run the parts asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--parts", default=ALL)
    parser.add_argument("--inside", action="store_true", help="in this very process")
    parser.add_argument("--no-capture", action="store_true")
    parser.add_argument("--batch-tokens", type=int, nargs="+", default=[16896, 16384, 33792])
    parser.add_argument("--preset", default="qwen3-8b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--documents", type=int, default=4096)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--batches", type=int, nargs="+", default=[64])
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    logging.getLogger("softrag.fused.graphs").setLevel(logging.DEBUG)
    for noisy in ("httpx", "transformers"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    if options.inside:
        bench = Bench(options)
        for part in options.parts.split(","):
            name, *arguments = part.split(":")
            work = (lambda: bench.hardware) if part == "floors" else getattr(bench, name)
            guarded(part, functools.partial(work, *arguments))
        return
    for number, group in enumerate(options.parts.split("/")):
        run_group(group.split(","), options.out / f"{number}")
    print("done")


def run_group(parts: list[str], out: Path) -> None:
    """Run parts in one process; after a crash go on in another behind the part that crashed."""
    turn, options = 0, list[str]()
    while parts:
        # The last of an option counts.
        command = [sys.executable, *sys.argv, "--inside", "--parts", ",".join(parts)]
        command += ["--out", str(out / str(turn)), *options]
        started = time.time()
        done = []
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
            for line in child.stdout:
                print(line, end="")
                if line.startswith("== ") and (": OK, " in line or ": FAILED, " in line):
                    done.append(line)
        print(f"-- process ended with {child.returncode} after {time.time() - started:.1f} s")
        if child.returncode == 0:
            return
        parts = parts[len(done) + 1 :]
        turn += 1
        options = ["--no-capture"]


if __name__ == "__main__":
    main()
