"""Shares: what one worker reads at a time. It knows files, and no models and stores."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from softrag.errors import UnreadableFileError
from softrag.files import FileResult, is_json_lines, read_file, read_lines


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A file, or a run of lines of a JSON lines file.

    Attributes:
        path: The file, absolute.
        start: Offset of the first byte.
        end: Offset after the last byte; None reads the whole file.
        first_line: Number of the first line, counted from 1.
    """

    path: str
    start: int = 0
    end: int | None = None
    first_line: int = 1

    def read(self) -> FileResult:
        """Return the piece's documents, or why there are none."""
        path = Path(self.path)
        try:
            if self.end is None:
                return FileResult(path, read_file(path), None)
            documents = read_lines(path, start=self.start, end=self.end, first_line=self.first_line)
            return FileResult(path, documents, None)
        except UnreadableFileError as error:
            return FileResult(path, [], error)


@dataclass(frozen=True, kw_only=True)
class Share:
    """Pieces that one worker reads.

    Attributes:
        number: Counted from 0.
        pieces: What to read.
        nbytes: Size of the pieces.
    """

    number: int
    pieces: Sequence[Piece]
    nbytes: int


def cut_shares(files: Iterable[Path], *, share_bytes: int) -> Iterator[Share]:
    """Yield shares of about `share_bytes`, as they are asked for.

    Small files go together; a JSON lines file is cut between lines. Other files stay whole, since
    only their readers know where they may be cut.
    """
    pieces: list[Piece] = []
    nbytes = number = 0
    for file in files:
        for piece, size in _pieces(file, share_bytes):
            pieces.append(piece)
            nbytes += size
            if nbytes >= share_bytes:
                yield Share(number=number, pieces=pieces, nbytes=nbytes)
                pieces, nbytes, number = [], 0, number + 1
    if pieces:
        yield Share(number=number, pieces=pieces, nbytes=nbytes)


def _pieces(file: Path, piece_bytes: int) -> Iterator[tuple[Piece, int]]:
    """Yield the pieces of a file, with their sizes in bytes."""
    path = str(file)
    try:
        size = file.stat().st_size
        if not is_json_lines(file) or size <= piece_bytes:
            yield Piece(path=path), size
            return
        start, first_line = 0, 1
        with file.open("rb") as lines:
            while data := lines.read(piece_bytes):
                data += lines.readline()  # to the end of the line
                end = start + len(data)
                yield Piece(path=path, start=start, end=end, first_line=first_line), len(data)
                start, first_line = end, first_line + data.count(b"\n")
    except OSError:
        # The worker that reads it says what is wrong.
        yield Piece(path=path), 0
