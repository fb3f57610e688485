"""What memories hold: how well a decoder says back what its compressor read.

    python benchmarks/fidelity.py CHECKPOINT QUESTIONS.jsonl… --json FILE [--chunks 128] [--rate 4]

Cuts the questions' gold documents into chunks of 128 tokens and measures, for each file, the three
tasks of pre-training that ask for what the text says, without noise: the share of tokens that are
the likeliest given those before (auto-encoding, quoting, cloze), and of clozes that are right
throughout.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path

import torch

from softrag.batch import IGNORED
from softrag.bench.measure import commit
from softrag.checkpoint import locate
from softrag.model import SoftRAGModel, SoftRAGOutput
from softrag_trainers.examples import TextRow, load_questions
from softrag_trainers.options import TextLessons
from softrag_trainers.pretraining import PretrainingCollator, TextPieces

TASKS = {"auto-encoding": {}, "quoting": {"quotation": 1.0}, "cloze": {"cloze": 1.0}}
BATCH = 32

Batch = dict[str, torch.Tensor]


def load(checkpoint: str, rate: int | None, dtype: torch.dtype | str = "auto") -> SoftRAGModel:
    """Load a checkpoint to ask at one rate, its own unless told, also where it has several."""
    model = SoftRAGModel.from_pretrained(locate(checkpoint), dtype=dtype, rate=rate)
    # A collator would draw from them.
    model.config.rates = None
    return model.eval()


def gold_texts(file: Path) -> list[TextRow]:
    """Return the distinct gold documents of a file's questions."""
    rows = load_questions([str(file)])
    pairs = (pair for row in rows for pair in zip(row.documents, row.gold, strict=True))
    return [TextRow(text, file.name) for text in dict.fromkeys(t for t, gold in pairs if gold)]


@torch.no_grad()
def tally(outputs: Iterable[tuple[SoftRAGOutput, Batch]]) -> dict[str, float]:
    """Return loss (nats a token), token accuracy and exactness (percent) of batches of lessons."""
    loss, right, exact = 0.0, [], []
    for output, batch in outputs:
        labels = batch["labels"][:, 1:]
        found = output.logits.argmax(-1).cpu() == labels[labels != IGNORED]
        loss += float(output.loss) * len(found)
        right.append(found)
        lengths = (labels != IGNORED).sum(1).tolist()
        exact += [bool(each.all()) for each in found.split(lengths)]
    tokens = torch.cat(right).float()
    return {
        "loss": round(loss / len(tokens), 3),
        "tokens": round(100 * float(tokens.mean()), 1),
        "exact": round(100 * sum(exact) / len(exact), 1),
        "lessons": len(exact),
    }


@torch.no_grad()
def measure(model: SoftRAGModel, file: Path, chunks: int) -> dict[str, dict[str, float]]:
    """Return what `tally` does, of each task."""
    texts = gold_texts(file)[:chunks]
    measured = {}
    for task, shares in TASKS.items():
        collator = PretrainingCollator(
            model.config,
            model.compressor_tokenizer,
            model.decoder_tokenizer,
            **{"continuation": 0.0, **shares},
        )
        data = TextLessons(min_chunk_tokens=128, max_chunk_tokens=128)
        pieces = TextPieces(texts, collator.document_prompt, data, seed=0).first(chunks)
        starts = range(0, len(pieces), BATCH)
        batches = (
            collator([pieces[place] for place in range(start, min(start + BATCH, len(pieces)))])
            for start in starts
        )
        measured[task] = tally((model(**batch), batch) for batch in batches)
    return measured


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint")
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--chunks", type=int, default=128)
    parser.add_argument("--rate", type=int, help="One of the checkpoint's; its own unless told.")
    options = parser.parse_args()
    model = load(options.checkpoint, options.rate)
    values = {
        "checkpoint": options.checkpoint,
        "rate": model.config.rate,
        "commit": commit(),
        "device": str(model.device),
        "versions": {"torch": torch.__version__},
        "files": {},
    }
    for file in options.files:
        values["files"][file.name] = measure(model, file, options.chunks)
        print(file.name, json.dumps(values["files"][file.name]), flush=True)
        options.json.write_text(json.dumps(values, indent=1) + "\n")


if __name__ == "__main__":
    main()
