"""Files: paths in, documents out. It knows nothing of chunks, models and stores."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from softrag.documents import Document, MetadataValue
from softrag.errors import UnreadableFileError
from softrag.text import clean_text

_FRONT_MATTER = re.compile(r"\A---\n(.*?)\n(?:---|\.\.\.)[ \t]*(?:\n|\Z)", re.DOTALL)
_FRONT_TITLE = re.compile(r"^title:[ \t]*(['\"]?)(.+?)\1[ \t]*$", re.MULTILINE)
_BLANKS = re.compile(r"\s+")
_LINE_START = re.compile(r"^ (?! )", re.MULTILINE)
_NOT_READ = ["script", "style", "noscript", "template", "head", "title"]
_PARAGRAPHS = (
    "address article aside blockquote dd details div dl dt fieldset figcaption figure footer form "
    "h1 h2 h3 h4 h5 h6 header hr main nav ol p pre section summary table ul"
).split()


class FileResult(NamedTuple):
    """What became of one file.

    Attributes:
        path: The file, absolute.
        documents: What it holds; empty when it could not be read.
        error: Why it could not be read, else None.
    """

    path: Path
    documents: list[Document]
    error: UnreadableFileError | None


def read_files(paths: Iterable[str | Path]) -> Iterator[FileResult]:
    """Read files and folders, one result per file; an unreadable file does not stop the rest.

    Folders are searched with all their subfolders, in alphabetical order, for the kinds of file in
    `SUFFIXES`; hidden files and folders are left out. A file reached twice is read once.

    Args:
        paths: Files and folders.
    """
    for file in find_files(paths):
        try:
            yield FileResult(file, read_file(file), None)
        except UnreadableFileError as error:
            yield FileResult(file, [], error)


def find_files(paths: Iterable[str | Path]) -> Iterator[Path]:
    """Yield the absolute paths that `read_files` reads, in its order, each once."""
    seen = set()
    for path in paths:
        for file in _files(Path(path).expanduser().resolve()):
            if file not in seen:
                seen.add(file)
                yield file


def is_json_lines(path: Path) -> bool:
    """Tell a file that `read_lines` can read in parts."""
    return path.suffix.lower() == ".jsonl"


def read_lines(path: Path, *, start: int, end: int, first_line: int) -> list[Document]:
    """Read the part of a JSON lines file that is between two byte offsets, both at line starts.

    Args:
        path: The file, absolute.
        start: Offset of the first byte.
        end: Offset after the last byte.
        first_line: Number of the first line, counted from 1.

    Raises:
        UnreadableFileError: The file is missing, or a line of the part is damaged.
    """
    try:
        with path.open("rb") as file:
            file.seek(start)
            data = file.read(end - start)
    except OSError as error:
        raise UnreadableFileError(f"{path} cannot be opened: {error.strerror or error}.") from error
    return _read_json_lines(path, data, first_line=first_line)


def vanished(sources: Iterable[str], paths: Iterable[str | Path]) -> list[str]:
    """Return those of `sources` that are files at or below `paths` and no longer exist."""
    roots = [Path(path).expanduser().resolve() for path in paths]

    def is_gone(source: str) -> bool:
        path = Path(source)
        inside = path.is_absolute() and any(path.is_relative_to(root) for root in roots)
        return inside and not path.exists()

    return [source for source in sources if is_gone(source)]


def read_file(path: str | Path) -> list[Document]:
    """Read one file; all documents of a file have its absolute path as their source.

    A text, Markdown or HTML file is one document. A PDF is one for each page with text
    (`metadata["page"]`, from 1). A JSON lines file is one for each line: `text`, and if wanted
    `title`, `source` (instead of the path) and `metadata` (flat); other fields are not read.

    Raises:
        UnreadableFileError: The file is missing, damaged, encrypted, not UTF-8, of another kind, or
            has no text. Nothing of a file with an error in it is returned: indexing part of it
            would delete the rest from a store that had it.
    """
    path = Path(path).expanduser().resolve()
    read = _READERS.get(path.suffix.lower())
    try:
        if not path.exists():
            raise UnreadableFileError(f"{path} does not exist.")
        if read is None:
            raise UnreadableFileError(
                f"{path} is of a kind that softrag does not read. It reads {', '.join(SUFFIXES)}."
            )
        documents = [document for document in read(path, path.read_bytes()) if document.text]
    except OSError as error:
        raise UnreadableFileError(f"{path} cannot be opened: {error.strerror or error}.") from error
    if not documents:
        reason = "it may be scanned; run OCR on it first" if read is _read_pdf else "it is empty"
        raise UnreadableFileError(f"{path} has no text: {reason}.")
    return documents


def _files(path: Path) -> Iterator[Path]:
    if not path.is_dir():
        yield path
        return
    for file in sorted(path.rglob("*")):
        hidden = any(part.startswith(".") for part in file.relative_to(path).parts)
        if file.suffix.lower() in _READERS and file.is_file() and not hidden:
            yield file


def _read_text(path: Path, data: bytes) -> list[Document]:
    return [Document(text=clean_text(_decode(path, data)), source=str(path), title=path.stem)]


def _read_markdown(path: Path, data: bytes) -> list[Document]:
    from markdown_it import MarkdownIt

    text = clean_text(_decode(path, data))
    title = None
    if front := _FRONT_MATTER.match(text):
        text = text[front.end() :]
        title = _FRONT_TITLE.search(front[1])
    # Markup costs tokens and says little to a model: what a reader of the page sees is kept.
    html = MarkdownIt("commonmark").enable("table").render(text)
    return [_from_html(path, html, title=title[2] if title else None)]


def _read_html(path: Path, data: bytes) -> list[Document]:
    # Bytes: the parser finds the encoding that the page declares.
    return [_from_html(path, data)]


def _from_html(path: Path, markup: str | bytes, *, title: str | None = None) -> Document:
    from bs4 import BeautifulSoup
    from bs4.element import NavigableString

    page = BeautifulSoup(markup, "html.parser")
    named = page.find("title") or page.find("h1")
    title = title or _BLANKS.sub(" ", named.get_text(" ") if named else "").strip() or path.stem
    for element in page.find_all(_NOT_READ):
        element.decompose()
    # A line break in the source is a space on the page, unless the text is preformatted.
    for string in page.find_all(string=True):
        if type(string) is NavigableString and not string.find_parent(["pre", "textarea"]):
            string.replace_with(_BLANKS.sub(" ", string))
    for element in page.find_all(_PARAGRAPHS):
        element.insert_before("\n\n")
        element.insert_after("\n\n")
    for element in page.find_all(["br", "tr"]):
        element.insert_before("\n")
    for element in page.find_all("li"):
        element.insert(0, "\n- ")
    for element in page.find_all(["td", "th"]):
        if element.find_next_sibling(["td", "th"]):
            element.append(" | ")
    text = clean_text(_LINE_START.sub("", page.get_text()))
    # A heading that became the title is not said again: chunks are read under their title.
    return Document(text=text.removeprefix(f"{title}\n\n"), source=str(path), title=title)


def _read_pdf(path: Path, data: bytes) -> list[Document]:
    from io import BytesIO

    from pypdf import PdfReader
    from pypdf.errors import DependencyError, FileNotDecryptedError, WrongPasswordError

    if not data:
        return []
    try:
        reader = PdfReader(BytesIO(data))
        # Many files are encrypted against changes only, with an empty password for reading.
        if reader.is_encrypted and not reader.decrypt(""):
            raise WrongPasswordError
        title = clean_text((reader.metadata and reader.metadata.title) or "") or path.stem
        pages = [clean_text(page.extract_text()) for page in reader.pages]
    except (FileNotDecryptedError, WrongPasswordError) as error:
        raise UnreadableFileError(
            f"{path} is encrypted. Save a copy without a password and read that."
        ) from error
    except DependencyError as error:
        raise UnreadableFileError(f"{path} is encrypted: {error}.") from error
    except Exception as error:  # on damaged files, a parser raises whatever it runs into
        raise UnreadableFileError(
            f"{path} is damaged or not a PDF ({type(error).__name__}: {error}). "
            "Opening and saving it with a PDF viewer may repair it."
        ) from error
    return [
        Document(text=text, source=str(path), title=title, metadata={"page": number})
        for number, text in enumerate(pages, start=1)
    ]


def _read_json_lines(path: Path, data: bytes, *, first_line: int = 1) -> list[Document]:
    lines = data.removeprefix(codecs.BOM_UTF8).split(b"\n")
    return [
        _from_record(path, number, line)
        for number, line in enumerate(lines, start=first_line)
        if line.strip()
    ]


_READERS: Mapping[str, Callable[[Path, bytes], list[Document]]] = {
    ".txt": _read_text,
    ".md": _read_markdown,
    ".markdown": _read_markdown,
    ".html": _read_html,
    ".htm": _read_html,
    ".pdf": _read_pdf,
    ".jsonl": _read_json_lines,
}
SUFFIXES = tuple(_READERS)


def _from_record(path: Path, number: int, line: bytes) -> Document:
    def unreadable(reason: str) -> UnreadableFileError:
        return UnreadableFileError(f"{path}, line {number}: {reason}.")

    try:
        record: Any = json.loads(line)
    except UnicodeDecodeError as error:
        raise unreadable(f"not UTF-8 (byte {error.start + 1} of the line)") from error
    except (ValueError, RecursionError) as error:  # numbers may be too long, lists too deep
        raise unreadable(f"not JSON ({error})") from error
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        raise unreadable('expected an object with a string "text"')
    text = clean_text(record["text"])
    if not text:
        raise unreadable('"text" is empty')
    title, source = record.get("title"), record.get("source")
    for name, value in {"title": title, "source": source}.items():
        if not isinstance(value, str | None):
            raise unreadable(f'expected a string as "{name}", found {value!r}')
    metadata = record.get("metadata") or {}
    if not isinstance(metadata, dict) or not all(map(_is_flat, metadata.values())):
        raise unreadable('"metadata" may hold strings, numbers, booleans and lists of strings only')
    return Document(text=text, source=source or str(path), title=title, metadata=metadata)


def _is_flat(value: MetadataValue | object) -> bool:
    if isinstance(value, list):
        return all(isinstance(item, str) for item in value)
    return isinstance(value, str | int | float | bool)


def _decode(path: Path, data: bytes) -> str:
    utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        return data.decode("utf-16" if utf16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise UnreadableFileError(
            f"{path} is not UTF-8: byte {error.start + 1} is 0x{data[error.start]:02x}. "
            "Convert it, for example with: iconv -f windows-1252 -t utf-8"
        ) from error
