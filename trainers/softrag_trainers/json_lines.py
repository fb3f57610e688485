"""JSON lines on disk, plain or zstd-compressed. It knows nothing of what the lines hold."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType
from typing import IO

from softrag.errors import UnreadableFileError
from softrag.extras import load_extra

SUFFIXES = (".jsonl", ".jsonl.zst")

# The longest window that every zstd reader accepts without being asked: 128 MiB.
_WINDOW_LOG = 27
_READ_BYTES = 2**18


def read_json_lines(path: Path) -> Iterator[tuple[int, object]]:
    """Yield every line's number, counted from 1, and its value; blank lines are passed over.

    Raises:
        UnreadableFileError: A line is not JSON, or the file is not UTF-8 or zstd.
    """
    failures: tuple[type[Exception], ...] = (UnicodeDecodeError, json.JSONDecodeError)
    if path.suffix == ".zst":
        failures += (_zstandard().ZstdError,)
    number = 0
    with path.open("rb") as file:
        try:
            for line in _zst_lines(file) if path.suffix == ".zst" else file:
                number += 1
                if line.strip():
                    yield number, json.loads(line)
        except failures as error:
            raise UnreadableFileError(
                f"{path}, at line {number}: {error}. Expected one JSON value a line, in UTF-8."
            ) from error


def write_json_lines(path: Path, values: Iterable[object], *, level: int = 19) -> None:
    """Write one value a line; a crash leaves the old file or the new one, never half of one.

    Args:
        path: Ends in `.jsonl` or `.jsonl.zst`.
        values: What `json.dumps` takes.
        level: zstd level, 1 (fast) to 22 (small); unused for plain files.

    Raises:
        ValueError: `path` has another suffix.
    """
    if not path.name.endswith(SUFFIXES):
        raise ValueError(f"{path} should end in one of {', '.join(SUFFIXES)}.")
    path.parent.mkdir(parents=True, exist_ok=True)
    half_written = path.with_name(path.name + ".part")
    with ExitStack() as stack:
        file: IO[bytes] = stack.enter_context(half_written.open("wb"))
        if path.suffix == ".zst":
            zstd = _zstandard()
            parameters = zstd.ZstdCompressionParameters.from_level(
                level, window_log=_WINDOW_LOG, enable_ldm=True
            )
            compressor = zstd.ZstdCompressor(compression_params=parameters)
            file = stack.enter_context(compressor.stream_writer(file))
        for value in values:
            line = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
            file.write(line.encode() + b"\n")
    half_written.replace(path)


def _zst_lines(file: IO[bytes]) -> Iterator[bytes]:
    """Yield the lines of a compressed file.

    zstandard's own reader takes a file that is cut short for one that ends there, so the frames
    are followed by hand.
    """
    zstd = _zstandard()
    # Files written with a long window are refused unless the reader allows it.
    decompressor = zstd.ZstdDecompressor(max_window_size=2**31)
    frame = decompressor.decompressobj()
    begun = b""
    while data := file.read(_READ_BYTES):
        while data:
            if frame.eof:
                frame = decompressor.decompressobj()
            *lines, begun = (begun + frame.decompress(data)).split(b"\n")
            yield from lines
            data = frame.unused_data
    if begun:
        yield begun
    if not frame.eof:
        raise zstd.ZstdError("the compressed data is cut short; copy the file again")


def _zstandard() -> ModuleType:
    return load_extra("zstandard", extra="train", purpose="Reading .zst files")
