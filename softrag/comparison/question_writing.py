"""Questions about the user's own chunks, written by a language model."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from softrag.chat_endpoint import ChatEndpoint
from softrag.decoder import Decoder, DecodeRequest
from softrag.documents import Document, document_text
from softrag.evaluation import normalize_answer

INSTRUCTION = (
    "Write one question that can be answered from this text alone, and its answer. The answer is a "
    "few words copied from the text. The question names what it asks about, so that it can be "
    "understood without the text. Use this form, on two lines:\nQuestion: ...\nAnswer: ..."
)
MAX_ANSWER_WORDS = 12

Writer = Callable[[Sequence[str]], Sequence[str]]
"""Takes texts, returns what a model wrote about each."""

_REPLY = re.compile(r"(?:Question:\s*)?(?P<question>[^\n]+\?)\s*Answer:\s*(?P<answer>[^\n]+)")


def endpoint_writer(endpoint: ChatEndpoint) -> Writer:
    """Write with a model behind a URL."""
    return lambda texts: endpoint.complete(
        [f"Text:\n{text}\n\n{INSTRUCTION}" for text in texts], max_tokens=128
    )


def decoder_writer(decoder: Decoder) -> Writer:
    """Write with the loaded decoder, which reads the chunk as text."""
    return lambda texts: [
        result.text
        for result in decoder.generate(
            [DecodeRequest(question=INSTRUCTION, documents=[text]) for text in texts]
        )
    ]


def write_questions(chunks: Sequence[Document], n: int, writer: Writer, path: str | Path) -> int:
    """Write up to `n` questions about chunks to a question file, and return how many.

    Kept is what has the form asked for, an answer that stands in its chunk, and is not written
    already; so hand over more chunks than questions are wanted.

    Raises:
        EndpointError: The writer cannot be asked.
        ValueError: Nothing it wrote could be kept.
    """
    kept: dict[str, dict[str, object]] = {}
    for first in range(0, len(chunks), n):
        batch = chunks[first : first + n]
        replies = writer([document_text(chunk.title, chunk.text) for chunk in batch])
        for chunk, reply in zip(batch, replies, strict=True):
            pair = parse_reply(reply, chunk.text)
            if pair is not None and len(kept) < n:
                kept.setdefault(
                    pair[0].lower(),
                    {
                        "question": pair[0],
                        "answers": [pair[1]],
                        "docs": [{"title": chunk.title, "text": chunk.text, "gold": True}],
                    },
                )
        if len(kept) == n:
            break
    if not kept:
        raise ValueError(
            f"The writer gave no usable question about {len(chunks)} chunks: none had the form "
            "asked for, with an answer from the text. Ask a stronger model: --writer URL."
        )
    path = Path(path)
    part = path.with_name(path.name + ".part")
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in kept.values()]
    part.write_text("".join(lines), encoding="utf-8")
    part.replace(path)
    return len(kept)


def parse_reply(reply: str, text: str) -> tuple[str, str] | None:
    r"""Return question and answer of a reply; None where it has not the form or is not in the text.

    >>> parse_reply("Question: Who wrote it?\nAnswer: Ada.", "Ada wrote it.")
    ('Who wrote it?', 'Ada')
    """
    found = _REPLY.search(reply)
    if found is None:
        return None
    question, answer = found["question"].strip(), found["answer"].strip().strip(".\"'")
    wanted = normalize_answer(answer)
    stands = f" {wanted} " in f" {normalize_answer(text)} "
    if not wanted or not stands or len(wanted.split()) > MAX_ANSWER_WORDS:
        return None
    return question, answer
