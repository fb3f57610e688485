"""Whether a compressor or its decoder is the limit: memories that are improved by their gradient.

    python benchmarks/limits.py CHECKPOINT QUESTIONS.jsonl --json FILE [--chunks 48] [--steps 6]

Cuts the questions' gold documents into chunks of 128 tokens and moves each chunk's soft tokens by
some steps of Adam towards a lower auto-encoding loss, with all weights fixed. Measured before and
after, each memory alone in its prompt: what the decoder says back (auto-encoding), and the names
and numbers it finds (cloze); and those with the chunk's text in the memory's place.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path

import torch
from fidelity import Batch, gold_texts, load, tally

from softrag.bench.measure import commit
from softrag.model import SoftRAGModel, SoftRAGOutput
from softrag_trainers.collators import Lesson
from softrag_trainers.options import TextLessons
from softrag_trainers.pretraining import PretrainingCollator, TextPieces

BATCH = 16
STEP = 0.03
"""Adam's step, as a share of the soft tokens' root mean square."""


class FromText(PretrainingCollator):
    """Clozes whose chunks are read as text."""

    def _ask(self, chunk: list[int], question: str, answer: str) -> Lesson:
        texts = [str(self.document_prompt.tokenizer.decode(each)) for each in self._hide(chunk)]
        return Lesson([], self.rag_prompt.render(question, texts, answer))


def lessons(
    model: SoftRAGModel,
    file: Path,
    chunks: int,
    *,
    cloze: float,
    kind: type[PretrainingCollator] = PretrainingCollator,
) -> list[Batch]:
    """Return batches of lessons on the same chunks, in the same order, whatever the task."""
    assert model.compressor_tokenizer is not None
    assert model.decoder_tokenizer is not None
    collator = kind(
        model.config, model.compressor_tokenizer, model.decoder_tokenizer,
        continuation=0.0, cloze=cloze, among=1,
    )  # fmt: skip
    data = TextLessons(min_chunk_tokens=128, max_chunk_tokens=128)
    pieces = TextPieces(gold_texts(file), collator.document_prompt, data, seed=0)
    collator.random = random.Random(0)
    chosen = [piece for piece in pieces if _can_be_asked(collator, piece.chunks[0])][:chunks]
    return [collator(chosen[start : start + BATCH]) for start in range(0, len(chosen), BATCH)]


def _can_be_asked(collator: PretrainingCollator, chunk: list[int]) -> bool:
    return len(chunk) == 128 and collator._gap(chunk) is not None


def read(model: SoftRAGModel, batch: Batch, soft_tokens: torch.Tensor | None) -> SoftRAGOutput:
    """Let the decoder read a batch's prompts, from these soft tokens."""
    return model(
        decoder_input_ids=batch["decoder_input_ids"],
        decoder_attention_mask=batch["decoder_attention_mask"],
        labels=batch["labels"],
        soft_tokens=model.line_up_soft_tokens(None, None, None)
        if soft_tokens is None
        else soft_tokens.to(model.dtype),
    )


def measure(
    model: SoftRAGModel, batches: Sequence[Batch], memories: Sequence[torch.Tensor | None]
) -> dict[str, float]:
    """Return loss (nats a token), and tokens and lessons that are right (percent)."""
    pairs = zip(batches, memories, strict=True)
    return tally((read(model, batch, soft_tokens), batch) for batch, soft_tokens in pairs)


def improve(
    model: SoftRAGModel, batch: Batch, soft_tokens: torch.Tensor, steps: int
) -> torch.Tensor:
    """Move soft tokens towards a lower loss of their own reconstruction."""
    size = soft_tokens.pow(2).mean().sqrt().item()
    moved = soft_tokens.clone().requires_grad_()
    optimizer = torch.optim.Adam([moved], lr=STEP * size)
    for _ in range(steps):
        optimizer.zero_grad()
        read(model, batch, moved).loss.backward()
        optimizer.step()
    return moved.detach()


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint")
    parser.add_argument("file", type=Path)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--chunks", type=int, default=48)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rate", type=int, help="One of the checkpoint's; its own unless told.")
    options = parser.parse_args()
    model = load(options.checkpoint, options.rate, torch.bfloat16)
    model.requires_grad_(False)
    reconstructed, asked, from_text = (
        lessons(model, options.file, options.chunks, **kind)
        for kind in ({"cloze": 0.0}, {"cloze": 1.0}, {"cloze": 1.0, "kind": FromText})
    )
    with torch.no_grad():
        memories = [
            model.line_up_soft_tokens(
                batch["compressor_input_ids"], batch["compressor_attention_mask"],
                batch["document_index"],
            ).float()
            for batch in reconstructed
        ]  # fmt: skip
    pairs = list(zip(reconstructed, memories, strict=True))
    improved = [improve(model, batch, soft_tokens, options.steps) for batch, soft_tokens in pairs]
    change = torch.cat(improved) - torch.cat(memories)
    values = {
        "checkpoint": options.checkpoint,
        "rate": model.config.rate,
        "file": options.file.name,
        "steps": options.steps,
        "commit": commit(),
        "device": str(model.device),
        "versions": {"torch": torch.__version__},
        "moved, share of the soft tokens' root mean square": round(
            float(change.pow(2).mean().sqrt() / torch.cat(memories).pow(2).mean().sqrt()), 3
        ),
        "memories": {
            "auto-encoding": measure(model, reconstructed, memories),
            "cloze": measure(model, asked, memories),
        },
        "improved memories": {
            "auto-encoding": measure(model, reconstructed, improved),
            "cloze": measure(model, asked, improved),
        },
        "text": {"cloze": measure(model, from_text, [None] * len(from_text))},
    }
    options.json.write_text(json.dumps(values, indent=1) + "\n")
    print(json.dumps(values, indent=1))


if __name__ == "__main__":
    main()
