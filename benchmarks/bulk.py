"""Bulk indexing on GPUs: documents a second with the store written along, and scaling.

    python benchmarks/bulk.py --out benchmarks/results/DATE-bulk.json

The model has random weights in the shape of Qwen3-0.6B (compressor) and of a decoder 4,096 wide;
the embedder random weights in the shape of all-MiniLM-L6-v2. Documents are cut from the demo corpus
and numbered, so that none is like another. A sink stands in for a Qdrant server: a process that
takes every request over HTTP and writes its body to a file. That measures all that workers do, and
nothing of what a server does.

Cases run in the order given, as often as they are given: `--cases 2x3 1x3 2x3 1x3` tells the
difference between two from the spread of each. A case has `--documents` for each of its GPUs: as
many shares for a worker, whatever the number of GPUs.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import platform
import shutil
import statistics
import sys
import tempfile
import threading
import time
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer, BertConfig, BertModel, Qwen3Config, Qwen3ForCausalLM

import softrag
from softrag.bench.measure import commit
from softrag.bulk import Progress, StoreAddress, WorkerSetup, index_files
from softrag.compressor import Compressor
from softrag.config import SoftRAGConfig
from softrag.model import SoftRAGModel
from softrag.text import clean_text

DEMO = Path(softrag.__file__).parent / "demo"
TOKENS = 128
# Of each connection's file in the sink.
SINK_FILE_BYTES = 256 * 2**20


def main() -> None:
    """Build the model, measure each case, write the result file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--documents", type=int, default=30_000, help="For each GPU of a case.")
    parser.add_argument("--tiny", action="store_true", help="A toy model, to try the script.")
    parser.add_argument("--cases", nargs="+", default="1x3 2x3 1x1 2x1 alone folder".split())
    parser.add_argument("--seconds", type=float, help="Begin no case later than this.")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    # The sink is on this machine, whatever proxy leads out of it.
    os.environ["NO_PROXY"] = "127.0.0.1"
    logging.basicConfig(level=logging.INFO, format="%(relativeCreated)d ms %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it tells of every request
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), options)
        for case in options.cases:
            if options.seconds and time.perf_counter() - started > options.seconds:
                say(f"{case}: left out, {options.seconds:.0f} s are over")
                continue
            bench.measure(case)
        bench.say_spread()


class Bench:
    """The model and documents in a folder, and the measures taken so far."""

    def __init__(self, folder: Path, options: argparse.Namespace) -> None:
        self.folder = folder
        self.options = options
        self.gpus = torch.cuda.device_count()
        self.results: list[dict] = []
        self.values: dict[str, list[float]] = {}  # of all runs, by what was measured
        started = time.perf_counter()
        self.checkpoint = build_checkpoint(folder, tiny=options.tiny)
        # By the number of GPUs that share them.
        self.documents = {
            gpus: write_documents(folder / f"documents-{gpus}.jsonl", gpus * options.documents)
            for gpus in {gpus_of(case) for case in options.cases}
        }
        say(f"model and documents made in {time.perf_counter() - started:.0f} s")

    def measure(self, case: str) -> None:
        """Measure `alone`, `folder`, or GPUSxWORKERS (workers on each GPU, on the sink)."""
        if case == "alone":
            self.note("compressing alone, one GPU", self.compress_alone(), "documents/s")
            return
        gpus, each = gpus_of(case), 3 if case == "folder" else int(case.split("x")[1])
        if gpus > max(1, self.gpus):
            say(f"{case}: only {self.gpus} GPUs here, left out")
            return
        stop = None
        documents = self.documents[gpus]
        # A store of its own for every run: the next one would find its chunks stored already.
        place = Path(tempfile.mkdtemp(prefix=f"{case}-", dir=self.folder))
        if case == "folder":
            location = str(place / "store")
            documents = write_documents(place / "few.jsonl", self.options.documents // 4)
        else:
            location, stop = start_sink(place)
        setup = WorkerSetup(
            checkpoint=str(self.checkpoint),
            store=StoreAddress(location=location),
            # Turns go through all GPUs, unless only the first is meant.
            device="cuda:0" if gpus == 1 and self.gpus else None,
            embedder=partial(RandomMiniLM, self.checkpoint),
            chunk_tokens=TOKENS,
        )
        marks: list[Progress] = []
        say(f"{case}: store at {location}")
        loading, coordinator_cpu = time.perf_counter(), time.process_time()
        report = index_files(
            [documents], setup=setup, workers=gpus * each,
            on_progress=lambda now, total: marks.append(now),
        )  # fmt: skip
        assert report is not None
        loading = time.perf_counter() - loading - report.seconds
        coordinator_cpu = time.process_time() - coordinator_cpu
        sink_cpu = 0.0 if stop is None else stop()
        shutil.rmtree(place)
        kind = "embedded store, one writer" if case == "folder" else "HTTP sink"
        name = f"bulk indexing, {gpus} GPU, {each} workers each, {kind}"
        self.note(name, steady_rate(marks), "chunks/s")
        say(f"  {report.chunks_added} chunks in {report.seconds:.1f} s after the first began, "
            f"{report.chunks_per_second:.0f}/s over all of it; before it {loading:.0f} s; "
            f"{len(report.errors)} errors, {report.restarts} restarts")  # fmt: skip
        say(f"  the coordinating process computed for {coordinator_cpu:.1f} s, "
            f"the sink for {sink_cpu:.1f} s")  # fmt: skip

    def compress_alone(self) -> float:
        """Return documents a second of the compressor with nothing else to do."""
        device = "cuda:0" if self.gpus else "cpu"
        model = SoftRAGModel.from_pretrained(self.checkpoint, load_decoder=False, device=device)
        compressor = Compressor(model)
        lines = self.documents[1].read_text().splitlines()[: self.options.documents // 3]
        texts = [json.loads(line)["text"] for line in lines]
        compressor.compress(texts[:512])
        started = time.perf_counter()
        for start in range(0, len(texts), 512):
            compressor.compress(texts[start : start + 512])
        return len(texts) / (time.perf_counter() - started)

    def say_spread(self) -> None:
        """Print the lowest, middle and highest value of what was measured several times."""
        for name, values in self.values.items():
            if len(values) > 1:
                say(f"{name}, {len(values)} runs: {min(values):.1f} to {max(values):.1f}, "
                    f"median {statistics.median(values):.1f}")  # fmt: skip

    def note(self, name: str, value: float, unit: str) -> None:
        """Print a measure and write all of them, so that a run cut short leaves its part."""
        values = self.values.setdefault(name, [])
        values.append(value)
        if len(values) > 1:
            name = f"{name}, run {len(values)}"
        device = torch.cuda.get_device_name(0) if self.gpus else platform.machine()
        self.results.append(
            {
                "name": name,
                "value": round(value, 1),
                "unit": unit,
                "floor": None,
                "device": f"{device} x{self.gpus}",
                "versions": {"torch": torch.__version__, "python": platform.python_version()},
                "commit": commit(),
                "command": "python " + " ".join(sys.argv),
                "seed": 0,
            }
        )
        self.options.out.write_text(json.dumps(self.results, indent=1) + "\n")
        say(f"{name}: {value:.0f} {unit}")


def gpus_of(case: str) -> int:
    """Return how many GPUs a case is for."""
    return 1 if case in ("alone", "folder") else int(case.split("x")[0])


def steady_rate(marks: list[Progress]) -> float:
    """Return chunks a second between a third of the work and nine tenths of it.

    Workers begin when their model is loaded, and not at the same moment; at the end some are out
    of work. A line through all marks between: a mark is a share of about a thousand chunks, so that
    the first and the last alone would be wrong by up to one share of every worker.
    """
    marks = sorted(marks, key=lambda mark: mark.seconds)
    inner = [m for m in marks if 0.33 <= m.chunks / marks[-1].chunks <= 0.9]
    if len(inner) < 2:
        return marks[-1].chunks / marks[-1].seconds
    chunks, seconds = [m.chunks for m in inner], [m.seconds for m in inner]
    return 1 / statistics.linear_regression(chunks, seconds).slope


class RandomMiniLM:
    """An embedder with the cost of all-MiniLM-L6-v2."""

    name = "random MiniLM"
    dimension = 384

    def __init__(self, checkpoint: Path, device: str) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(checkpoint.parent / "compressor")
        config = BertConfig(
            vocab_size=len(self.tokenizer), hidden_size=384, num_hidden_layers=6,
            num_attention_heads=12, intermediate_size=1536, max_position_embeddings=512,
        )  # fmt: skip
        torch.manual_seed(0)
        dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
        self.model = BertModel(config, add_pooling_layer=False).to(device, dtype).eval()

    @torch.inference_mode()
    def embed_documents(self, texts: list[str]) -> np.ndarray:
        """Return one vector per text."""
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        batch = self.tokenizer(
            texts, return_tensors="pt", padding=True, truncation=True, max_length=256
        ).to(self.model.device)
        hidden = self.model(batch["input_ids"], batch["attention_mask"]).last_hidden_state
        mask = batch["attention_mask"].unsqueeze(-1)
        mean = (hidden.float() * mask).sum(1) / mask.sum(1)
        return torch.nn.functional.normalize(mean, dim=-1).cpu().numpy()

    def embed_query(self, text: str) -> np.ndarray:
        """Return the vector of a question."""
        return self.embed_documents([text])[0]


def build_checkpoint(folder: Path, *, tiny: bool) -> Path:
    """Save a model with random weights; return its folder."""
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "checkpoint" / "tokenizer")
    heads = {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128}
    shapes = {
        # Qwen3-0.6B, but for the rows of its vocabulary, of which each token reads one.
        "compressor": {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28},
        # Of the decoder only the width counts here.
        "decoder": {"hidden_size": 4096, "intermediate_size": 256, "num_hidden_layers": 1},
    }
    for name, shape in shapes.items():
        if tiny:
            shape |= {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
        torch.manual_seed(0)
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            model = Qwen3ForCausalLM(Qwen3Config(vocab_size=len(tokenizer) + 64, **shape, **heads))
        model.to("cpu", torch.bfloat16).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    config = SoftRAGConfig(
        decoder=str(folder / "decoder"), compressor=str(folder / "compressor"),
        max_document_tokens=256, decoder_lora={"r": 4, "alpha": 8},
    )  # fmt: skip
    SoftRAGModel.from_base(config, dtype=torch.bfloat16).save_pretrained(folder / "checkpoint")
    return folder / "checkpoint"


def write_documents(path: Path, count: int) -> Path:
    """Write a JSON lines file of `count` different texts of about 128 tokens."""
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "checkpoint" / "tokenizer")
    # As they are, markup and all: only their length counts, and no parser is needed.
    articles = sorted((DEMO / "corpus").glob("*.md"))
    whole = "\n\n".join(clean_text(each.read_text(encoding="utf-8")) for each in articles)
    ids = tokenizer(whole, add_special_tokens=False)["input_ids"]
    size = TOKENS - 10  # room for the number
    pieces = tokenizer.batch_decode([ids[at : at + size] for at in range(0, len(ids), size)])
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            record = {"text": f"{number}: {pieces[number % len(pieces)]}", "source": f"s{number}"}
            file.write(json.dumps(record) + "\n")
    return path


def start_sink(folder: Path):  # noqa: ANN201 - (url, stop)
    """Start a process that takes what a Qdrant server is sent; return its URL and how to stop."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=run_sink, args=(folder, theirs), daemon=True)
    process.start()
    theirs.close()  # so that its death is noticed
    port = ours.recv()

    def stop() -> float:
        """End it; return the seconds that it computed."""
        ours.send("stop")
        cpu = ours.recv()
        process.kill()
        process.join()
        return cpu

    return f"http://127.0.0.1:{port}", stop


def run_sink(folder: Path, pipe) -> None:  # noqa: ANN001
    """Acknowledge everything, and write what is to be stored to files, one for each connection."""
    from qdrant_client import QdrantClient, models

    client = QdrantClient(":memory:")
    body_of: dict[str, object] = {"exists": {"exists": False}}
    done = {"operation_id": 0, "status": "completed"}

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        # An answer is sent as a whole, or its second part may wait for the first's receipt.
        wbufsize = -1

        def setup(self) -> None:
            super().setup()
            self.body = bytearray()
            self.file = (folder / f"sink-{self.client_address[1]}").open("wb", buffering=0)

        def finish(self) -> None:
            super().finish()
            self.file.close()

        def receive(self) -> memoryview:
            """Return the whole body. It lies where the last one did: new memory costs time."""
            length = int(self.headers.get("Content-Length", 0))
            if length > len(self.body):
                self.body = bytearray(length)
            body = memoryview(self.body)[:length]
            if self.rfile.readinto(body) < length:
                raise ConnectionError("The client hung up in the middle of a body.")
            return body

        def keep(self, body: memoryview) -> None:
            """Write a body to the file, from the start again when the file is large.

            Else a long run would measure how fast the disk takes what memory cannot hold.
            """
            if self.file.tell() > SINK_FILE_BYTES:
                self.file.seek(0)
            while body:
                body = body[self.file.write(body) :]

        def do_GET(self) -> None:
            data = self.receive()
            parts = self.path.partition("?")[0].split("/")[3:]
            what = "/".join(parts)
            result: object = done
            if self.command == "PUT" and what == "points":
                self.keep(data)
            elif self.command == "PUT" and not what:
                wanted = models.CreateCollection(**json.loads(bytes(data)))
                client.create_collection("x", wanted.vectors, metadata=wanted.metadata)
                body_of["exists"] = {"exists": True}
                body_of[""] = client.get_collection("x").model_dump(mode="json")
                result = True
            elif what == "points/scroll":
                result = {"points": [], "next_page_offset": None}
            elif what == "points":
                result = []
            elif self.command == "GET":
                result = body_of[what]
            answer = json.dumps({"result": result, "status": "ok", "time": 0.0}).encode()
            self.send_response_only(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        do_PUT = do_POST = do_GET

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    started = time.process_time()
    pipe.send(server.server_port)
    pipe.recv()
    pipe.send(time.process_time() - started)


def say(text: str) -> None:
    """Print at once, for a run that is watched."""
    print(text, flush=True)


if __name__ == "__main__":
    main()
