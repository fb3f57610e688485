"""Give every question the same number of documents. It knows nothing of tokens or models.

A reader that is only ever shown the right passage never learns to choose. So a question's own
documents are joined by distractors: passages of other questions of the same data set, most of
them lexical neighbours of the question, some at random. From the command line, a mixture ready
for fine-tuning::

    python -m softrag_trainers.distractors squad.jsonl boolq.parquet --out train.jsonl.zst \
        --k 5 --cap boolq=2500
"""

from __future__ import annotations

import argparse
import logging
import random
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import numpy as np

from softrag.extras import load_extra
from softrag_trainers.examples import QuestionRow, load_questions, save_questions

logger = logging.getLogger(__name__)

# Neighbours looked up for a question: enough to pass over those that hold its answer.
_CANDIDATES = 40
# Random draws from a pool before it counts as empty.
_DRAWS = 200
# These words stand in most passages without answering anything.
_SAID_EVERYWHERE = frozenset({"yes", "no", "true", "false"})

_ARTICLES_AND_PUNCTUATION = re.compile(r"\b(?:a|an|the)\b|[\W_]+")


def add_distractors(
    rows: Sequence[QuestionRow], k: int, *, seed: int = 0, random_share: float = 0.25
) -> list[QuestionRow]:
    """Return the rows with exactly k documents each, in an order that gives nothing away.

    A row keeps its own documents, gold ones first, up to k. What is missing comes from the other
    rows of its source: lexical neighbours of the question (BM25, best first) mixed with random
    passages, never one that holds an answer or that the row has already. A source too small to
    fill its rows borrows from the others.

    Args:
        rows: Questions with any number of documents.
        k: Documents a question has afterwards, at least 1.
        seed: Of the random passages and the order; same rows and seed, same result.
        random_share: Probability that a distractor is a random passage, 0 to 1.

    Raises:
        ValueError: A row cannot be filled, for want of passages without its answer.
    """
    if k < 1:
        raise ValueError(f"k is {k}; a question needs at least 1 document.")
    rng = random.Random(seed)
    everything = _Pool(rows)
    by_source: dict[str, list[int]] = {}
    for index, row in enumerate(rows):
        by_source.setdefault(row.source, []).append(index)

    filled: dict[int, QuestionRow] = {}
    for source, indices in by_source.items():
        members = [rows[index] for index in indices]
        pool = _Pool(members)
        logger.info("%s: %d questions, %d passages", source, len(members), len(pool.passages))
        for index, row, neighbours in zip(indices, members, pool.neighbours(members), strict=True):
            filled[index] = _fill(
                row, k, neighbours, (pool, everything), rng=rng, random_share=random_share
            )
    return [filled[index] for index in range(len(rows))]


def drop_repeated_questions(rows: Sequence[QuestionRow]) -> list[QuestionRow]:
    """Keep the first row of every question; case and outer spaces make no difference."""
    first: dict[str, QuestionRow] = {}
    for row in rows:
        first.setdefault(row.question.strip().casefold(), row)
    return list(first.values())


def cap_sources(rows: Sequence[QuestionRow], caps: Mapping[str, int]) -> list[QuestionRow]:
    """Keep the first `caps[source]` rows of every source that has a cap.

    Raises:
        ValueError: A cap names a source that no row has.
    """
    sources = {row.source for row in rows}
    for source in caps:
        if source not in sources:
            raise ValueError(
                f"A cap names the source {source!r}, but the rows have {sorted(sources)}."
            )
    seen: Counter[str] = Counter()
    kept = []
    for row in rows:
        seen[row.source] += 1
        if row.source not in caps or seen[row.source] <= caps[row.source]:
            kept.append(row)
    return kept


def holds_answer(text: str, answers: Sequence[str]) -> bool:
    """Whether a text contains an answer, whatever its case, punctuation and articles.

    Yes and no are found nowhere: the words say nothing about a passage.

    >>> holds_answer("It was built by the Romans.", ["Romans"])
    True
    >>> holds_answer("A Romanesque church.", ["Roman"])
    False
    """
    words = _words(text)
    return any(answer in words for answer in _wanted(answers))


class _Pool:
    """The distinct passages of some rows, to draw distractors from."""

    def __init__(self, rows: Sequence[QuestionRow]) -> None:
        self.passages = list(dict.fromkeys(doc for row in rows for doc in row.documents))
        self._words: dict[int, str] = {}

    def words(self, number: int) -> str:
        """Return a passage for comparison, prepared when first asked for."""
        if number not in self._words:
            self._words[number] = _words(self.passages[number])
        return self._words[number]

    def neighbours(self, rows: Sequence[QuestionRow]) -> Iterator[Sequence[int]]:
        """Yield for each question the numbers of its lexical neighbours, best first."""
        bm25s = load_extra("bm25s", extra="train", purpose="Finding distractors")

        def tokenize(texts: list[str]) -> list[list[str]]:
            return bm25s.tokenize(texts, stopwords="en", return_ids=False, show_progress=False)

        passages = tokenize(self.passages)
        known = any(passages)  # false for an empty pool, or one of stop words and signs
        index = bm25s.BM25()
        if known:
            index.index(passages, show_progress=False)
        for words in tokenize([row.question for row in rows]):
            ids = index.get_tokens_ids(words) if known else []
            if not ids:
                yield []
                continue
            scores = index.get_scores(ids)  # (passages,)
            # Most passages share no word with the question; sorting only the others is what makes
            # this fast, and a stable sort gives the same order everywhere.
            found = np.flatnonzero(scores > 0)
            best = np.argsort(-scores[found], kind="stable")[:_CANDIDATES]
            yield found[best].tolist()

    def draw(self, rng: random.Random) -> Iterator[int]:
        """Yield numbers of random passages; a small pool is gone through completely."""
        if len(self.passages) <= _DRAWS:
            yield from rng.sample(range(len(self.passages)), len(self.passages))
        else:
            yield from (rng.randrange(len(self.passages)) for _ in range(_DRAWS))


def _fill(
    row: QuestionRow,
    k: int,
    neighbours: Sequence[int],
    pools: tuple[_Pool, _Pool],
    *,
    rng: random.Random,
    random_share: float,
) -> QuestionRow:
    """Return one row with k documents; `neighbours` are numbers in the first pool."""
    # sorted is stable: gold documents first, the rest in the order they had.
    own = sorted(zip(row.documents, row.gold, strict=True), key=lambda pair: not pair[1])
    documents: dict[str, bool] = {}
    for document, gold in own:
        if len(documents) < k:
            documents.setdefault(document, gold)
    wanted = _wanted(row.answers)

    def suitable(pool: _Pool, numbers: Iterator[int]) -> Iterator[str]:
        for number in numbers:
            passage = pool.passages[number]
            known = passage in documents or passage in row.documents
            if not known and not any(answer in pool.words(number) for answer in wanted):
                yield passage

    pool, everything = pools
    near = suitable(pool, iter(neighbours))
    far = suitable(pool, pool.draw(rng))
    elsewhere = suitable(everything, everything.draw(rng))
    while len(documents) < k:
        kinds = (far, near, elsewhere) if rng.random() < random_share else (near, far, elsewhere)
        passage = next((passage for kind in kinds for passage in kind), None)
        if passage is None:
            raise ValueError(
                f"Question {row.id!r} has {len(documents)} documents and needs {k}, but no other "
                "passage without its answer was found. Add more rows, or ask for a smaller k."
            )
        documents[passage] = False

    order = list(documents.items())
    rng.shuffle(order)
    texts, flags = zip(*order, strict=True)
    return replace(row, documents=texts, gold=flags)


def _words(text: str) -> str:
    """Return a text's words between single spaces, so that `in` compares whole words."""
    return f" {' '.join(_ARTICLES_AND_PUNCTUATION.sub(' ', text.casefold()).split())} "


def _wanted(answers: Sequence[str]) -> list[str]:
    """Return the answers to look for, as `_words`."""
    found = (_words(answer) for answer in answers)
    return [words for words in found if words.strip() and words.strip() not in _SAID_EVERYWHERE]


def _report(rows: Sequence[QuestionRow]) -> Iterator[str]:
    """Yield a line of figures for every source."""
    by_source: dict[str, list[QuestionRow]] = {}
    for row in rows:
        by_source.setdefault(row.source, []).append(row)
    for source, members in sorted(by_source.items(), key=lambda item: -len(item[1])):
        passages = {document for row in members for document in row.documents}
        yield (
            f"{source}: {len(members)} questions, {len(passages)} passages of "
            f"{fmean(len(passage.split()) for passage in passages):.0f} words, "
            f"{fmean(sum(row.gold) for row in members):.2f} gold a question, answers of "
            f"{fmean(len(row.answers[0].split()) for row in members):.1f} words"
        )


def _parse_cap(value: str) -> tuple[str, int]:
    # The last sign: a source's name may hold one too.
    source, sign, count = value.rpartition("=")
    if not sign or not count.isdecimal():
        raise argparse.ArgumentTypeError(f"expected SOURCE=NUMBER, found {value!r}")
    return source, int(count)


def main(arguments: Sequence[str] | None = None) -> None:
    """Write a fine-tuning mixture; the module's docstring shows a command."""
    parser = argparse.ArgumentParser(
        prog="python -m softrag_trainers.distractors",
        description="Mix question sets into one file with k documents a question.",
    )
    parser.add_argument("inputs", nargs="+", type=Path, metavar="IN", help="question files")
    parser.add_argument("--out", required=True, type=Path, help=".jsonl or .jsonl.zst to write")
    parser.add_argument("--k", type=int, default=5, help="documents a question (default: 5)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--cap",
        action="append",
        default=[],
        type=_parse_cap,
        metavar="SOURCE=N",
        help="take at most N random questions of a source; may be repeated",
    )
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("bm25s").setLevel(logging.WARNING)

    rows = load_questions(options.inputs)
    # Shuffled before the cap, so that a capped source keeps a random part of itself.
    random.Random(options.seed).shuffle(rows)
    rows = cap_sources(drop_repeated_questions(rows), dict(options.cap))
    rows = add_distractors(rows, options.k, seed=options.seed)
    save_questions(options.out, rows)
    for line in _report(rows):
        logger.info("%s", line)
    logger.info("%d questions in %s", len(rows), options.out)


if __name__ == "__main__":
    main()
