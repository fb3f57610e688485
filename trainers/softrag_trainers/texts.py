"""Mix pre-training texts from several sources. It knows nothing of tokens or models.

Long documents are cut between paragraphs into pieces of a few hundred words, long enough for
several consecutive chunks each; short ones are dropped; each source gives its share of a word
budget. From the command line::

    python -m softrag_trainers.texts wiki.jsonl.zst books.parquet --out texts.jsonl.zst \
        --words 45000000 --weight wiki=3
"""

from __future__ import annotations

import argparse
import logging
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from softrag_trainers.examples import TextRow, load_texts, save_texts

logger = logging.getLogger(__name__)

_SENTENCE_END = re.compile(r"(?:(?<=[.!?])|(?<=[.!?][\"')\]]))\s+")


def split_paragraphs(text: str, max_words: int) -> list[str]:
    r"""Cut a text into pieces of at most `max_words` words, between paragraphs where possible.

    A paragraph that is too long is cut between sentences, and a sentence that is too long
    between words. Lines stay lines; the words and their order do not change.

    >>> split_paragraphs("One two.\nThree four.\nFive.", max_words=4)
    ['One two.\nThree four.', 'Five.']
    """
    if max_words < 1:
        raise ValueError(f"max_words is {max_words}; a piece needs at least 1 word.")
    pieces: list[str] = []
    room = 0
    for paragraph in text.splitlines():
        for n_words, part, opens_line in _parts(paragraph, max_words):
            if n_words <= room:
                pieces[-1] += ("\n" if opens_line else " ") + part
                room -= n_words
            else:
                pieces.append(part)
                room = max_words - n_words
    return pieces


def mix_texts(
    rows: Sequence[TextRow],
    words: int,
    *,
    weights: Mapping[str, float] | None = None,
    seed: int = 0,
) -> list[TextRow]:
    """Take random rows of every source up to a budget of words, and shuffle them.

    A source's share grows with its size times its weight; what a source is too small to give,
    the others share. No row is taken twice, so fewer words than asked for may come back.

    Args:
        rows: Texts of any number of sources.
        words: The budget.
        weights: Source to weight, 1 where absent; a row of weight 3 is three times as likely to
            be taken as one of weight 1, and one of weight 0 never is.
        seed: Of the choice and the order.

    Raises:
        ValueError: A weight is negative or names a source that no row has.
    """
    weights = weights or {}
    by_source: dict[str, list[TextRow]] = {}
    for row in rows:
        by_source.setdefault(row.source, []).append(row)
    for source, weight in weights.items():
        if source not in by_source:
            raise ValueError(
                f"A weight names the source {source!r}, but the rows have {sorted(by_source)}."
            )
        if weight < 0:
            raise ValueError(f"The weight of {source!r} is {weight}; expected 0 or more.")

    rng = random.Random(seed)
    sizes = {source: sum(map(_n_words, members)) for source, members in by_source.items()}
    quotas = _quotas(sizes, {source: weights.get(source, 1.0) for source in sizes}, words)
    taken: list[TextRow] = []
    for source, members in by_source.items():
        rng.shuffle(members)
        left = quotas[source]
        for row in members:
            if left <= 0:
                break
            left -= _n_words(row)
            taken.append(row)
    rng.shuffle(taken)
    return taken


def _n_words(row: TextRow) -> int:
    return len(row.text.split())


def _quotas(
    sizes: Mapping[str, int], weights: Mapping[str, float], words: float
) -> dict[str, float]:
    """Share a budget by size times weight, giving no source more than it has."""
    quotas = dict.fromkeys(sizes, 0.0)
    open_sources = {source for source in sizes if sizes[source] * weights[source] > 0}
    while open_sources:
        scale = words / sum(sizes[source] * weights[source] for source in open_sources)
        full = {source for source in open_sources if weights[source] * scale >= 1}
        for source in full or open_sources:
            quotas[source] = min(sizes[source], sizes[source] * weights[source] * scale)
        if not full:
            break
        words -= sum(sizes[source] for source in full)
        open_sources -= full
    return quotas


def _parts(paragraph: str, max_words: int) -> Iterator[tuple[int, str, bool]]:
    """Yield a paragraph whole, or its sentences: number of words, text, whether a line begins."""
    n_words = len(paragraph.split())
    if n_words == 0:
        return
    if n_words <= max_words:
        yield n_words, paragraph.strip(), True
        return
    opens_line = True
    for sentence in _SENTENCE_END.split(paragraph):
        words = sentence.split()
        for start in range(0, len(words), max_words):
            part = words[start : start + max_words]
            yield len(part), " ".join(part), opens_line
            opens_line = False


def _parse_weight(value: str) -> tuple[str, float]:
    # The last sign: a source's name may hold one too.
    source, _, weight = value.rpartition("=")
    try:
        return source, float(weight)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected SOURCE=NUMBER, found {value!r}") from None


def main(arguments: Sequence[str] | None = None) -> None:
    """Write a pre-training file; the module's docstring shows a command."""
    parser = argparse.ArgumentParser(
        prog="python -m softrag_trainers.texts",
        description="Mix texts into one pre-training file with a budget of words.",
    )
    parser.add_argument("inputs", nargs="+", type=Path, metavar="IN", help="text files")
    parser.add_argument("--out", required=True, type=Path, help=".jsonl or .jsonl.zst to write")
    parser.add_argument("--words", required=True, type=int, help="budget of words in all")
    parser.add_argument("--piece-words", type=int, default=400, help="longest piece (default: 400)")
    parser.add_argument("--min-words", type=int, default=30, help="shortest piece (default: 30)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--weight",
        action="append",
        default=[],
        type=_parse_weight,
        metavar="SOURCE=W",
        help="take a source W times as often as its size says; may be repeated",
    )
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    pieces = [
        TextRow(piece, row.source)
        for row in load_texts(options.inputs)
        for piece in split_paragraphs(row.text, options.piece_words)
        if len(piece.split()) >= options.min_words
    ]
    rows = mix_texts(pieces, options.words, weights=dict(options.weight), seed=options.seed)
    save_texts(options.out, rows)
    for source in sorted({row.source for row in pieces}):
        mine = [_n_words(row) for row in rows if row.source == source]
        logger.info("%s: %d pieces, %d words", source, len(mine), sum(mine))
    logger.info("%d pieces, %d words in %s", len(rows), sum(map(_n_words, rows)), options.out)


if __name__ == "__main__":
    main()
