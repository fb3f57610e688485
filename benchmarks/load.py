"""What loading a 7B model costs: host memory, seconds, device memory.

    python benchmarks/load.py --folder /scratch/pisco-7b --json load.json

Writes a checkpoint in PISCO's layout with random bfloat16 weights of Mistral-7B's shape to the
folder (15 GB, kept for the next run), reads its files once so that the disk cache is warm, and
loads it in a process of its own. Host memory is counted as the system does, files mapped into the
process included, above what the process had before.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import threading
import time
from pathlib import Path

HIDDEN, INTERMEDIATE, KEYS, RANK = 4096, 14336, 1024, 16
WORDS, ADDED = 32000, 11
BAR_HOST_BYTES_ABOVE_WEIGHTS, BAR_SECONDS = 1_000_000_000, 60.0


def build(folder: Path, layers: int) -> Path:
    """Write base model and checkpoint; random blocks are drawn once per shape and reused."""
    import torch
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import MistralConfig, PreTrainedTokenizerFast

    base, pisco = folder / f"base-{layers}", folder / f"pisco-{layers}"
    if (pisco / "config.json").is_file():
        return pisco
    base.mkdir(parents=True, exist_ok=True)
    pisco.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def draw(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, device=device) * 0.02).to(torch.bfloat16).cpu()

    shapes = {
        "self_attn.q_proj": (HIDDEN, HIDDEN),
        "self_attn.k_proj": (KEYS, HIDDEN),
        "self_attn.v_proj": (KEYS, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HIDDEN),
        "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
        "mlp.up_proj": (INTERMEDIATE, HIDDEN),
        "mlp.down_proj": (HIDDEN, INTERMEDIATE),
    }
    norm = torch.ones(HIDDEN, dtype=torch.bfloat16)
    layer = {f"{name}.weight": draw(*shape) for name, shape in shapes.items()}
    layer |= {"input_layernorm.weight": norm, "post_attention_layernorm.weight": norm.clone()}
    weight_map = {}
    for index in range(layers):
        file = f"model-{index:05}.safetensors"
        tensors = {f"model.layers.{index}.{name}": tensor for name, tensor in layer.items()}
        save_file(tensors, base / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    words = draw(WORDS, HIDDEN)
    ends = {
        "model.embed_tokens.weight": words,
        "lm_head.weight": words.clone(),
        "model.norm.weight": norm.clone(),
    }
    save_file(ends, base / "model-ends.safetensors", metadata={"format": "pt"})
    weight_map |= dict.fromkeys(ends, "model-ends.safetensors")
    (base / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    config = MistralConfig(
        vocab_size=WORDS,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        sliding_window=None,
        architectures=["MistralForCausalLM"],
        dtype="bfloat16",
    )
    config.save_pretrained(base)
    known = ["<unk>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    known += [f"<word {index}>" for index in range(WORDS - len(known))]
    backend = Tokenizer(models.BPE(vocab={word: id_ for id_, word in enumerate(known)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    tokenizer.save_pretrained(base)

    adapter = {}
    for index in range(layers):
        for name, (out, into) in shapes.items():
            prefix = f"model.layers.{index}.{name}"
            adapter[f"{prefix}.lora_A.weight"] = draw(RANK, into)
            adapter[f"{prefix}.lora_B.weight"] = draw(out, RANK)
    torch.save({"decoder_adapter": adapter, "encoder_adapter": adapter}, pisco / "adapters.pth")
    added = torch.cat([words, draw(ADDED, HIDDEN)])
    torch.save(
        {"model.embed_tokens.weight": added, "lm_head.weight": added.clone()},
        pisco / "decoder_first_last_layers.pth",
    )
    values = {
        "model_type": "COCOM",
        "decoder_model_name": str(base.resolve()),
        "compr_model_name": None,
        "compr_rate": 16,
        "doc_max_length": 128,
        "different_mem_tokens": True,
        "lora": True,
        "lora_r": RANK,
        "sep": True,
        "training_form": "both_separately",
    }
    (pisco / "config.json").write_text(json.dumps(values))
    return pisco


def load(checkpoint: Path, device: str) -> dict[str, object]:
    """Load in this process and measure."""
    import torch
    import transformers

    from softrag.model import SoftRAGModel

    if device.startswith("cuda"):
        torch.zeros(1, device=device)  # The driver's own memory is none of ours.
    peak = Peak()
    started = time.perf_counter()
    model = SoftRAGModel.from_pretrained(checkpoint, device=device, dtype=torch.bfloat16)
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    host, anonymous = peak.stop()
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    return {
        "seconds": round(seconds, 2),
        "weights_bytes": weights,
        "host_peak_bytes": host,
        "host_peak_bytes_without_mapped_files": anonymous,
        "device_bytes": torch.cuda.memory_allocated() if device.startswith("cuda") else None,
        "device_peak_bytes": (
            torch.cuda.max_memory_allocated() if device.startswith("cuda") else None
        ),
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else platform.machine(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


class Peak:
    """The most host memory this process has while it runs, above what it starts with.

    Sampled every 10 ms: not every kernel lets a process reset its own high-water mark.
    """

    def __init__(self) -> None:
        self._start = _host_memory()
        self._most = self._start
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> tuple[int, int | None]:
        """Return the peaks with and without mapped files, in bytes."""
        self._done.set()
        self._thread.join()
        above = [most - start for most, start in zip(self._most, self._start, strict=True)]
        return above[0], above[1] if self._start[1] else None

    def _watch(self) -> None:
        while not self._done.wait(0.01):
            now = _host_memory()
            self._most = max(self._most[0], now[0]), max(self._most[1], now[1])


def _host_memory() -> tuple[int, int]:
    """Return this process's memory with and without mapped files; 0 where the kernel won't say."""
    lines = [line.split() for line in Path("/proc/self/status").read_text().splitlines()]
    found = {words[0]: int(words[1]) * 1024 for words in lines if words and words[-1] == "kB"}
    return found.get("VmRSS:", 0), found.get("RssAnon:", 0)


def main() -> None:
    """Build, warm the disk cache, load, report."""
    import torch

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, required=True, help="scratch space, 16 GB")
    parser.add_argument("--layers", type=int, default=32, help="32 is a 7B model")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--load", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.load:
        print(json.dumps(load(options.load, options.device)))
        return
    started = time.perf_counter()
    pisco = build(options.folder, options.layers)
    print(f"checkpoint ready after {time.perf_counter() - started:.0f} s", file=sys.stderr)
    files = [*options.folder.glob(f"base-{options.layers}/*"), *pisco.glob("*")]
    for file in files:
        with file.open("rb") as stream:
            while stream.read(1 << 24):
                pass
    words = ["--folder", str(options.folder), "--load", str(pisco), "--device", options.device]
    done = subprocess.run(
        [sys.executable, __file__, *words], stdout=subprocess.PIPE, text=True, check=True
    )
    figures = json.loads(done.stdout.splitlines()[-1])
    figures["within_host_bar"] = (
        figures["host_peak_bytes"] <= figures["weights_bytes"] + BAR_HOST_BYTES_ABOVE_WEIGHTS
    )
    figures["within_time_bar"] = figures["seconds"] < BAR_SECONDS
    text = json.dumps(figures, indent=2)
    print(text)
    if options.json:
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
