"""Whether the decoder's engine answers as Hugging Face `generate` does, on real questions.

    python benchmarks/numerics.py --out RESULTS.json --questions 100 FILE.jsonl.zst [FILE …]

Both read the same prompt embeddings and choose greedily. Float32 must agree token for token;
bfloat16 rounds, so its answers are compared with those of float32 and scored.
"""

from __future__ import annotations

import argparse
from itertools import chain
from pathlib import Path

import torch

from softrag import evaluation
from softrag.asking import split_for
from softrag.bench.decode import generate_naively, prompt_inputs
from softrag.bench.measure import Recorder
from softrag.compressor import Compressor
from softrag.decoder import DecodeRequest, TorchDecoder
from softrag.documents import document_text
from softrag.model import SoftRAGModel


def main() -> None:
    """Answer, compare, write the result file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="softrag-demo")
    parser.add_argument("--questions", type=int, default=100)
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    device = torch.device(options.device)
    recorder = Recorder(device=device, say=print, path=options.out)
    share = -(-options.questions // len(options.files))
    questions = list(
        chain.from_iterable(evaluation.read_questions(path, limit=share) for path in options.files)
    )[: options.questions]
    answers = [question.answers for question in questions]

    model = SoftRAGModel.from_pretrained(options.model, device=device, dtype=torch.float32)
    compressor = Compressor(model)
    requests = []
    for question in questions:
        texts = [
            piece
            for document in question.documents[:5]
            for piece in split_for(compressor, document_text(document.title, document.text))
        ]
        requests.append(
            DecodeRequest(
                question=question.question,
                documents=compressor.compress(texts),
                max_new_tokens=options.max_new_tokens,
            )
        )
    decoder = TorchDecoder(model)
    exact = [result.text for result in decoder.generate(requests)]
    expected = []
    for request in requests:
        ids = generate_naively(model, prompt_inputs(model, request), options.max_new_tokens)
        expected.append(model.decoder_tokenizer.decode(ids[0], skip_special_tokens=True))
    count = len(questions)
    same = sum(a == b for a, b in zip(exact, expected, strict=True))
    recorder.add(f"float32: answers equal to generate's, of {count}", same, "answers", count)
    for mine, theirs in zip(exact, expected, strict=True):
        if mine != theirs:
            print(f"  differ: {mine!r} | {theirs!r}")

    model.decoder.to(torch.bfloat16)
    model.auto_encoding_embedding.data = model.auto_encoding_embedding.data.bfloat16()
    rounded = [result.text for result in TorchDecoder(model).generate(requests)]
    theirs = []
    for request in requests:
        ids = generate_naively(model, prompt_inputs(model, request), options.max_new_tokens)
        theirs.append(model.decoder_tokenizer.decode(ids[0], skip_special_tokens=True))
    same = sum(a == b for a, b in zip(rounded, exact, strict=True))
    recorder.add(f"bfloat16: answers equal to float32's, of {count}", same, "answers", count)
    same = sum(a == b for a, b in zip(theirs, exact, strict=True))
    recorder.add(f"bfloat16, generate: answers equal to float32's, of {count}", same, "answers")
    scores = {
        name: 100 * evaluation.score_answers(found, answers)["f1"]
        for name, found in (("float32", exact), ("bfloat16", rounded), ("generate", theirs))
    }
    for name, value in scores.items():
        recorder.add(f"{name}: F1", value, "points")
    recorder.add("bfloat16 minus float32: F1", scores["bfloat16"] - scores["float32"], "points")


if __name__ == "__main__":
    main()
