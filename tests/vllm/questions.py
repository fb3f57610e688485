"""Fifty questions about the demo's corpus, with the memories that answer them."""

from __future__ import annotations

import json
from pathlib import Path

import softrag
from softrag import DecodeRequest, Document, SoftRAG

DEMO = Path(softrag.__file__).parent / "demo"


def ask_demo(
    *, n: int = 50, k: int = 5, max_new_tokens: int = 48, store: str | Path = ":memory:"
) -> list[DecodeRequest]:
    """Index the corpus, and return questions with the memories of the `k` nearest chunks."""
    files = sorted((DEMO / "corpus").glob("*.md"))
    titles = [file.stem.replace("_", " ") for file in files]
    questions = json.loads((DEMO / "questions.json").read_text(encoding="utf-8"))
    wanted = [each["question"] for each in questions]
    wanted += [f"What is {title} known for?" for title in titles]
    with SoftRAG.from_pretrained(
        "softrag-demo", store=store, device="cpu", load_decoder=False
    ) as engine:
        engine.add(
            Document(text=file.read_text(encoding="utf-8"), source=file.name, title=title)
            for file, title in zip(files, titles, strict=True)
        )
        return [
            DecodeRequest(
                question=question,
                documents=[hit.memory for hit in engine.retrieve(question, k) if hit.memory],
                max_new_tokens=max_new_tokens,
            )
            for question in wanted[:n]
        ]
