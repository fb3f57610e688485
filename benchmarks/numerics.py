"""Whether the decoder's engine answers as Hugging Face `generate` does, on real questions.

    python benchmarks/numerics.py --out RESULTS.json --questions 500 FILE.jsonl.zst [FILE …]

Both read the same prompt embeddings and choose greedily. Float32 must agree token for token;
bfloat16 rounds, so its answers are compared with those of float32 and scored.
"""

from __future__ import annotations

import argparse
from itertools import chain, islice
from pathlib import Path
from time import perf_counter

import numpy as np
import torch

from softrag import evaluation
from softrag.asking import split_for
from softrag.bench.decode import generate_naively, prompt_inputs
from softrag.bench.measure import Recorder
from softrag.comparison.intervals import Bootstrap
from softrag.compressor import Compressor
from softrag.decoder import DecodeRequest, TorchDecoder
from softrag.documents import document_text
from softrag.memory import Memory
from softrag.model import SoftRAGModel


def main() -> None:
    """Answer, compare, write the result file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="softrag-demo")
    parser.add_argument("--questions", type=int, default=500)
    parser.add_argument("--compared", type=int, default=100, help="answered by generate, too")
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    device = torch.device(options.device)
    recorder = Recorder(device=device, say=print, path=options.out)
    share = -(-options.questions // len(options.files))
    files = (evaluation.read_questions(path, limit=share) for path in options.files)
    # In turn from all files, so that the first ones are of all kinds.
    questions = list(chain.from_iterable(zip(*files, strict=False)))[: options.questions]
    answers = [question.answers for question in questions]

    memories = _compress(options.model, device, questions)
    model = SoftRAGModel.from_pretrained(
        options.model, device=device, dtype=torch.float32, load_compressor=False
    )
    requests = [
        DecodeRequest(
            question=question.question, documents=read, max_new_tokens=options.max_new_tokens
        )
        for question, read in zip(questions, memories, strict=True)
    ]
    few = requests[: options.compared]
    exact = _answer(recorder, model, requests)
    expected = _answer_naively(recorder, model, few)
    for mine, theirs in zip(exact, expected, strict=False):
        if mine != theirs:
            print(f"  differ: {mine!r} | {theirs!r}")
    _compare(recorder, "float32", exact, "float32 generate", expected)

    model.decoder.to(torch.bfloat16)
    model.auto_encoding_embedding.data = model.auto_encoding_embedding.data.bfloat16()
    rounded = _answer(recorder, model, requests)
    theirs = _answer_naively(recorder, model, few)
    _compare(recorder, "bfloat16", rounded, "float32", exact)
    _compare(recorder, "bfloat16 generate", theirs, "float32", exact)
    scores = [
        np.array([evaluation.f1(*pair) for pair in zip(found, answers, strict=True)])
        for found in (exact, rounded)
    ]
    for name, each in zip(("float32", "bfloat16"), scores, strict=True):
        recorder.add(f"{name}: F1", each.mean(), "points")
    mean, low, high = Bootstrap(len(answers)).interval(scores[1] - scores[0])
    recorder.add(f"bfloat16 minus float32: F1 of {len(answers)}", mean, "points")
    print(f"  95 % interval: {low:.2f} to {high:.2f}")
    recorder.add("bfloat16 minus float32: F1, low end of the 95 % interval", low, "points")
    recorder.add("bfloat16 minus float32: F1, high end", high, "points")


def _compress(
    checkpoint: str, device: torch.device, questions: list[evaluation.Question]
) -> list[list[Memory]]:
    """Return the memories of each question's first five documents."""
    compressor = Compressor(
        SoftRAGModel.from_pretrained(checkpoint, device=device, load_decoder=False)
    )
    texts = [
        [
            piece
            for document in question.documents[:5]
            for piece in split_for(compressor, document_text(document.title, document.text))
        ]
        for question in questions
    ]
    memories = iter(compressor.compress(list(chain.from_iterable(texts))))
    return [list(islice(memories, len(pieces))) for pieces in texts]


def _answer(recorder: Recorder, model: SoftRAGModel, requests: list[DecodeRequest]) -> list[str]:
    decoder = TorchDecoder(model)
    decoder.generate(requests[:4])
    started = perf_counter()
    results = decoder.generate(requests)
    name = f"{_dtype(model)}: engine, {len(requests)} questions at once"
    recorder.add(name, len(requests) / (perf_counter() - started), "answers/s")
    return [result.text for result in results]


def _answer_naively(
    recorder: Recorder, model: SoftRAGModel, requests: list[DecodeRequest]
) -> list[str]:
    assert model.decoder_tokenizer is not None
    texts = []
    started = perf_counter()
    for request in requests:
        ids = generate_naively(model, prompt_inputs(model, request), request.max_new_tokens)
        texts.append(model.decoder_tokenizer.decode(ids[0], skip_special_tokens=True))
    name = f"{_dtype(model)}: generate, one question after the other"
    recorder.add(name, len(requests) / (perf_counter() - started), "answers/s")
    return texts


def _dtype(model: SoftRAGModel) -> str:
    assert model.decoder is not None
    return str(model.decoder.dtype).removeprefix("torch.")


def _compare(
    recorder: Recorder, name: str, found: list[str], other: str, expected: list[str]
) -> None:
    count = min(len(found), len(expected))
    same = sum(a == b for a, b in zip(found, expected, strict=False))
    recorder.add(f"{name}: answers equal to {other}'s, of {count}", same, "answers", count)


if __name__ == "__main__":
    main()
