"""Labels from a teacher: answers to questions from their documents' full text, and questions.

`python -m softrag_trainers label` appends a line to its output for every label, so that a run that
was stopped goes on where it ended. It knows nothing of tensors.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from hashlib import blake2b
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from softrag import checkpoint
from softrag.config import RAG_PROMPT
from softrag.documents import Document, document_text
from softrag.errors import EndpointError
from softrag.evaluation import normalize_answer
from softrag.files import read_files
from softrag.text import clean_text, split_text
from softrag_trainers.examples import QuestionRow, load_questions
from softrag_trainers.json_lines import read_json_lines
from softrag_trainers.options import Label
from softrag_trainers.teachers import Teacher, open_teacher

logger = logging.getLogger(__name__)

ANSWER_PROMPT = f"{RAG_PROMPT['system']}\n\n{RAG_PROMPT['user']}"
"""What a teacher is asked is what its pupil will be asked, with texts for memories."""

QUESTIONS_PROMPT = (
    "Text:\n{document}\n\n"
    "Write {count} different questions that can be answered from this text alone, each with its "
    "answer. An answer is a few words copied from the text. A question names what it asks about, "
    "so that it can be understood without the text. Use this form, two lines for each:\n"
    "Question: ...\nAnswer: ..."
)
MAX_ANSWER_WORDS = 12
"""Longest answer of a question that is made up; longer ones are rarely copied from the text."""

_PAIR = re.compile(
    r"Question(?: \d+)?:\s*(?P<question>[^\n]+\?)\s*Answer(?: \d+)?:\s*(?P<answer>[^\n]+)"
)


@dataclass(frozen=True, slots=True)
class _Item:
    """One thing to ask the teacher.

    Attributes:
        key: Content address of what is labelled; in the output it says that this is done.
        prompt: What the teacher reads.
        rows: Makes the output's rows of its reply; none when the reply is of no use.
    """

    key: str
    prompt: str
    rows: Callable[[str], list[dict[str, Any]]]


def label(options: Label) -> int:
    """Label what is not labelled yet; return how many rows were added.

    Raises:
        EndpointError: The teacher's server can't be reached or refuses everything.
        UnreadableFileError: A file of `options.data` can't be used.
        ValueError: `options.out` holds labels of another teacher, prompt or task.
    """
    out = Path(options.out)
    if not out.name.endswith(".jsonl"):
        raise ValueError(f"out is {out}; labels are appended line by line to a .jsonl file.")
    if options.task not in _TASKS:
        raise ValueError(f"task is {options.task!r}; expected one of {', '.join(_TASKS)}.")
    template = options.prompt or (ANSWER_PROMPT if options.task == "answers" else QUESTIONS_PROMPT)
    items = {item.key: item for item in _TASKS[options.task](options, template)}
    teacher = open_teacher(options.teacher, model=options.teacher_model, threads=options.threads)
    provenance = {
        "task": options.task,
        "teacher": teacher.model_name,
        "prompt": _hash(template, str(options.max_tokens), str(options.questions)),
        "date": date.today().isoformat(),
    }
    done = _read_done(out, provenance)
    waiting = [item for key, item in items.items() if key not in done.keys]
    logger.info("%d to label, %d done before", len(waiting), len(items) - len(waiting))
    out.parent.mkdir(parents=True, exist_ok=True)
    added = useless = 0
    with out.open("a", encoding="utf-8") as file, tqdm(total=len(waiting), disable=None) as bar:
        for first in range(0, len(waiting), options.batch_size):
            batch = waiting[first : first + options.batch_size]
            for item, reply in zip(batch, _ask(teacher, batch, options.max_tokens), strict=True):
                rows = [] if reply is None else item.rows(reply)
                rows = [row for row in rows if done.is_new(row)]
                useless += not rows
                added += len(rows)
                for row in rows:
                    about = {**provenance, **row.pop("about", {}), "key": item.key}
                    line = json.dumps({**row, "label": about}, ensure_ascii=False)
                    file.write(line + "\n")
            # What is paid for is kept.
            file.flush()
            bar.update(len(batch))
    logger.info("%d rows added to %s; %d replies were of no use", added, out, useless)
    return added


def _ask(teacher: Teacher, items: Sequence[_Item], max_tokens: int) -> list[str | None]:
    """Return a reply to every item; None where the teacher refuses this one only."""
    prompts = [item.prompt for item in items]
    try:
        return list(teacher.complete(prompts, max_tokens=max_tokens))
    except EndpointError as error:
        replies: list[str | None] = []
        for prompt in prompts:
            try:
                replies += teacher.complete([prompt], max_tokens=max_tokens)
            except EndpointError as own:
                logger.warning("left out: %s", own)
                replies.append(None)
        if all(reply is None for reply in replies):
            raise error from None
        return replies


# ---------------------------------------------------------------------- tasks


def _answers(options: Label, template: str) -> Iterator[_Item]:
    """Yield every question of the data, to be answered from the text of all its documents."""
    for row in load_questions(options.data, options.samples, answered=False):
        text = RAG_PROMPT["document_separator"].join(row.documents)
        prompt = _fill(template, documents=text, question=row.question)
        yield _Item(_hash(row.question, *row.documents), prompt, _answer_rows(row))


def _answer_rows(row: QuestionRow) -> Callable[[str], list[dict[str, Any]]]:
    def rows(reply: str) -> list[dict[str, Any]]:
        if not reply.strip():
            return []
        return [
            {
                "id": row.id,
                "question": row.question,
                "answers": [reply.strip()],
                **({"gold_answers": row.answers} if row.answers else {}),
                "docs": [
                    {"text": text, "gold": gold}
                    for text, gold in zip(row.documents, row.gold, strict=True)
                ],
                **({"relevance": row.relevance} if row.relevance else {}),
                "source": row.source,
            }
        ]

    return rows


def _questions(options: Label, template: str) -> Iterator[_Item]:
    """Yield every chunk of the documents, to be asked about."""
    tokenizer = checkpoint.read_tokenizer(checkpoint.locate(options.model), "compressor_tokenizer")
    count = 0
    for document in _documents(options):
        for title, text in _split(document, tokenizer, options.chunk_tokens):
            if count == options.samples:
                return
            count += 1
            whole = document_text(title, text)
            prompt = _fill(template, document=whole, count=str(options.questions))
            rows = _question_rows(whole, document.source or "")
            yield _Item(_hash(whole), prompt, rows)


def _question_rows(document: str, source: str) -> Callable[[str], list[dict[str, Any]]]:
    def rows(reply: str) -> list[dict[str, Any]]:
        return [
            {
                "id": _hash(question, document),
                "question": question,
                "answers": [answer],
                "docs": [{"text": document, "gold": True}],
                "source": "documents",
                "about": {"document": source},
            }
            for question, answer in read_pairs(reply, document)
        ]

    return rows


_TASKS: dict[str, Callable[[Label, str], Iterator[_Item]]] = {
    "answers": _answers,
    "questions": _questions,
}


def read_pairs(reply: str, document: str) -> list[tuple[str, str]]:
    r"""Return the questions and answers of a reply, without those not answered from the document.

    >>> read_pairs("Question: Who wrote it?\nAnswer: Ada.\nQuestion: When?\nAnswer: 1840",
    ...            "Ada wrote it.")
    [('Who wrote it?', 'Ada')]
    """
    text = f" {normalize_answer(document)} "
    pairs = []
    for found in _PAIR.finditer(reply):
        question, answer = found["question"].strip(), found["answer"].strip().strip(".\"'* ")
        words = normalize_answer(answer)
        if words and len(words.split()) <= MAX_ANSWER_WORDS and f" {words} " in text:
            pairs.append((question, answer))
    return pairs


def _documents(options: Label) -> Iterator[Document]:
    for result in read_files(options.data):
        if result.error is not None:
            logger.warning("left out: %s", result.error)
        yield from result.documents


def _split(
    document: Document, tokenizer: PreTrainedTokenizerBase, chunk_tokens: int
) -> Iterator[tuple[str | None, str]]:
    """Yield a document's chunks, at most `chunk_tokens` long with the title."""
    title = document.title
    taken = 0 if not title else len(tokenizer.encode(title + "\n", add_special_tokens=False))
    if taken > chunk_tokens // 2:
        title, taken = None, 0
    pieces = split_text(clean_text(document.text), tokenizer, chunk_tokens - taken)
    yield from ((title, piece.text) for piece in pieces)


# ---------------------------------------------------------------------- what is done


@dataclass
class _Done:
    """What the output holds: keys of what is labelled, and questions, so that none comes twice."""

    keys: set[str]
    questions: set[tuple[str, ...]]

    def is_new(self, row: dict[str, Any]) -> bool:
        """Note a row; tell whether none like it was there."""
        documents = [] if "document" in row.get("about", {}) else [d["text"] for d in row["docs"]]
        # A question that was made up is one question, whatever chunk it was made of.
        asked = (normalize_answer(row["question"]), *documents)
        if asked in self.questions:
            return False
        self.questions.add(asked)
        return True


def _read_done(out: Path, provenance: dict[str, str]) -> _Done:
    """Read what an earlier run wrote; cut off a line that it did not finish."""
    done = _Done(set(), set())
    if not out.exists():
        return done
    data = out.read_bytes()
    if not data.endswith(b"\n"):
        with out.open("r+b") as file:
            file.truncate(data.rfind(b"\n") + 1)
    wanted = {name: provenance[name] for name in ("task", "teacher", "prompt")}
    for number, value in read_json_lines(out):
        row: dict[str, Any] = value if isinstance(value, dict) else {}
        about: dict[str, Any] = row.get("label") or {}
        found = {name: about.get(name) for name in wanted}
        if found != wanted:
            raise ValueError(
                f"{out}, line {number}, was labelled with {found}, not with {wanted}. Labels of "
                "two kinds are kept in two files: choose another out."
            )
        done.keys.add(about["key"])
        done.is_new({**row, "about": about})
    return done


def _fill(template: str, **values: str) -> str:
    """Put values for `{names}`, once: braces in a value are text."""
    return re.sub(r"\{(\w+)\}", lambda found: values.get(found[1], found[0]), template)


def _hash(*parts: str) -> str:
    digest = blake2b(digest_size=16)
    for part in parts:
        data = part.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()
