from __future__ import annotations

import json
from pathlib import Path

import pytest
from pypdf import PdfReader, PdfWriter

from softrag.errors import UnreadableFileError
from softrag.files import read_file, read_files


def make_pdf(pages: list[str], *, title: str | None = None) -> bytes:
    """A small PDF, written by hand: one line of Helvetica on each page."""
    kids = " ".join(f"{4 + 2 * n} 0 R" for n in range(len(pages)))
    objects = [
        "<< /Type /Catalog /Pages 2 0 R >>",
        f"<< /Type /Pages /Kids [{kids}] /Count {len(pages)} >>",
        "<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    for n, text in enumerate(pages):
        stream = f"BT /F1 12 Tf 72 720 Td ({text}) Tj ET"
        objects += [
            f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents {5 + 2 * n} 0 R "
            "/Resources << /Font << /F1 3 0 R >> >> >>",
            f"<< /Length {len(stream)} >>\nstream\n{stream}\nendstream",
        ]
    objects.append(f"<< /Title ({title}) >>" if title else "<< >>")
    data, offsets = b"%PDF-1.4\n", []
    for number, body in enumerate(objects, start=1):
        offsets.append(len(data))
        data += f"{number} 0 obj\n{body}\nendobj\n".encode("latin-1")
    table = "".join(f"{offset:010} 00000 n \n" for offset in offsets)
    trailer = f"<< /Size {len(objects) + 1} /Root 1 0 R /Info {len(objects)} 0 R >>"
    return data + (
        f"xref\n0 {len(objects) + 1}\n0000000000 65535 f \n{table}"
        f"trailer\n{trailer}\nstartxref\n{len(data)}\n%%EOF\n"
    ).encode("latin-1")


def encrypted(data: bytes, path: Path, *, user_password: str) -> None:
    path.write_bytes(data)
    writer = PdfWriter(clone_from=PdfReader(path))
    writer.encrypt(user_password, "owner", algorithm="RC4-128")
    writer.write(path)


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_a_text_file_is_one_document(tmp_path):
    path = write(
        tmp_path / "paris.txt", b"\xef\xbb\xbfParis is old.\r\n\r\nThe Seine is older.\r\n"
    )

    (document,) = read_file(path)

    assert document.text == "Paris is old.\n\nThe Seine is older."
    assert (document.source, document.title) == (str(path), "paris")


def test_a_utf16_text_file_with_its_mark_is_read(tmp_path):
    path = write(tmp_path / "cafe.txt", "Café".encode("utf-16"))

    assert read_file(path)[0].text == "Café"


def test_markdown_is_read_as_its_reader_sees_it(tmp_path):
    path = write(
        tmp_path / "tea.md",
        """\
---
date: 2024-01-01
---
# Green *tea*

Tea is [brewed](https://example.org/a_very_long_address) at **80 degrees**,
not hotter &mdash; or it turns bitter. <!-- unsaid -->

- black
- green
  1. sencha

| Tea   | Minutes |
|-------|---------|
| black | 4       |

```python
def brew():
    return "tea"
```

![A kettle](kettle.png)
""",
    )

    (document,) = read_file(path)

    assert document.title == "Green tea"
    assert document.text == (
        "Tea is brewed at 80 degrees, not hotter — or it turns bitter.\n\n"
        "- black\n- green\n\n- sencha\n\n"
        "Tea | Minutes\nblack | 4\n\n"
        'def brew():\n    return "tea"'
    )


def test_markdown_takes_its_title_from_the_front_matter(tmp_path):
    path = write(tmp_path / "a.md", "---\nlayout: post\ntitle: 'On tea'\n---\n# Intro\n\nTea.\n")

    (document,) = read_file(path)

    assert (document.title, document.text) == ("On tea", "Intro\n\nTea.")


def test_html_keeps_what_is_shown(tmp_path):
    path = write(
        tmp_path / "page.html",
        """\
<!doctype html><html><head><title> The
  Seine </title><style>p {color: red}</style></head><body>
<script>alert("no")</script><nav><a href="/">Home</a></nav>
<h1>The Seine</h1>
<p>A river
in <b>Fr</b>ance.<br>777 km &amp; more</p>
<pre>  a
   b</pre>
<ul><li>Paris</li><li>Rouen</li></ul>
<table><tr><th>City</th><th>km</th></tr><tr><td>Paris</td><td>365</td></tr></table>
</body></html>""",
    )

    (document,) = read_file(path)

    assert document.title == "The Seine"
    assert document.text == (
        "Home\n\nThe Seine\n\nA river in France.\n777 km & more\n\n  a\n   b\n\n"
        "- Paris\n- Rouen\n\nCity | km\nParis | 365"
    )


def test_html_is_read_in_the_encoding_it_declares(tmp_path):
    page = '<meta charset="iso-8859-15"><p>10 €, café</p>'

    assert read_file(write(tmp_path / "a.htm", page.encode("iso-8859-15")))[0].text == "10 €, café"


def test_deeply_nested_html_is_read(tmp_path):
    path = write(tmp_path / "deep.html", "<div>" * 1500 + "deep" + "</div>" * 1500)

    assert read_file(path)[0].text == "deep"


def test_a_pdf_gives_a_document_for_each_page_with_text(tmp_path):
    data = make_pdf(["Paris is old.", "", "The Seine is older."], title="Rivers")
    path = write(tmp_path / "rivers.PDF", data)

    documents = read_file(path)

    assert [(d.text, d.metadata["page"]) for d in documents] == [
        ("Paris is old.", 1),
        ("The Seine is older.", 3),
    ]
    assert {(d.source, d.title) for d in documents} == {(str(path), "Rivers")}


def test_a_pdf_locked_against_changes_only_is_read(tmp_path):
    encrypted(make_pdf(["Readable."]), tmp_path / "locked.pdf", user_password="")

    assert read_file(tmp_path / "locked.pdf")[0].text == "Readable."


def test_json_lines_give_a_document_a_line(tmp_path):
    records = [
        {"text": "Paris is old."},
        {
            "text": "The Seine\r\nis older.",
            "title": "Seine",
            "source": "encyclopedia",
            "metadata": {"year": 1911, "tags": ["river"]},
            "id": 7,
        },
    ]
    lines = "\n\n".join(json.dumps(record) for record in records)
    path = write(tmp_path / "facts.jsonl", b"\xef\xbb\xbf" + lines.encode() + b"\r\n")

    first, second = read_file(path)

    assert (first.text, first.source, first.title) == ("Paris is old.", str(path), None)
    assert (second.text, second.source, second.title) == (
        "The Seine\nis older.",
        "encyclopedia",
        "Seine",
    )
    assert second.metadata == {"year": 1911, "tags": ["river"]}


GOOD = '{"text": "Paris"}\n'


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.txt", b"caf\xe9 au lait", r"not UTF-8: byte 4 is 0xe9.*iconv"),
        ("a.txt", b"", "has no text: it is empty"),
        ("a.md", b" \n\n", "has no text: it is empty"),
        ("a.html", b"<script>1</script>", "has no text: it is empty"),
        ("a.jsonl", b"\n", "has no text: it is empty"),
        ("a.pdf", b"", "has no text"),
        ("a.pdf", make_pdf([""]), "has no text: it may be scanned; run OCR"),
        ("a.pdf", b"%PDF-1.4 and nothing more", "damaged or not a PDF"),
        ("a.pdf", b"PK\x03\x04", "damaged or not a PDF"),
        ("a.docx", b"PK\x03\x04", r"kind that softrag does not read. It reads \.txt"),
        ("a.jsonl", GOOD + '{"text": "Par', "line 2: not JSON"),
        ("a.jsonl", GOOD.encode() + b'{"text": "caf\xe9"}', "line 2: not UTF-8"),
        ("a.jsonl", GOOD + "\n" + '["Paris"]', 'line 3: expected an object with a string "text"'),
        ("a.jsonl", '{"title": "Paris"}', 'line 1: expected an object with a string "text"'),
        ("a.jsonl", '{"text": " "}', 'line 1: "text" is empty'),
        ("a.jsonl", '{"text": "a", "title": 3}', 'line 1: expected a string as "title", found 3'),
        ("a.jsonl", '{"text": "a", "metadata": {"b": {}}}', 'line 1: "metadata" may hold'),
        ("a.jsonl", "[" * 100_000, "line 1: not JSON"),
        ("a.jsonl", f'{{"text": "a", "metadata": {{"b": {"9" * 5000}}}}}', "line 1: not JSON"),
    ],
)
def test_an_unreadable_file_is_named_with_the_reason(tmp_path, name, content, reason):
    path = write(tmp_path / name, content)

    with pytest.raises(UnreadableFileError, match=reason) as raised:
        read_file(path)

    assert str(raised.value).startswith(str(path))


def test_a_file_cut_in_half_is_damaged(tmp_path):
    data = make_pdf(["Paris is old."] * 3)
    path = write(tmp_path / "half.pdf", data[: len(data) // 3])

    with pytest.raises(UnreadableFileError, match=r"half\.pdf is damaged"):
        read_file(path)


def test_an_encrypted_pdf_is_named(tmp_path):
    encrypted(make_pdf(["Secret."]), tmp_path / "secret.pdf", user_password="pass")

    with pytest.raises(UnreadableFileError, match=r"secret\.pdf is encrypted"):
        read_file(tmp_path / "secret.pdf")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UnreadableFileError, match=r"gone does not exist"):
        read_file(tmp_path / "gone")


def test_a_folder_is_read_in_order_and_past_its_unreadable_files(tmp_path):
    (tmp_path / "b" / ".git").mkdir(parents=True)
    write(tmp_path / "c.txt", "c")
    write(tmp_path / "a.txt", "a")
    write(tmp_path / "b" / "bad.txt", b"\xff")
    write(tmp_path / "b" / "good.md", "# good")
    write(tmp_path / "b" / "photo.png", b"\x89PNG")
    write(tmp_path / "b" / ".hidden.txt", "hidden")
    write(tmp_path / "b" / ".git" / "config.txt", "hidden")

    results = list(read_files([tmp_path / "c.txt", tmp_path]))

    assert [result.path.name for result in results] == ["c.txt", "a.txt", "bad.txt", "good.md"]
    assert [[d.text for d in result.documents] for result in results] == [
        ["c"],
        ["a"],
        [],
        ["good"],
    ]
    assert [result.error is None for result in results] == [True, True, False, True]
    assert "bad.txt is not UTF-8" in str(results[2].error)


def test_a_missing_path_is_a_result_of_its_own(tmp_path):
    write(tmp_path / "a.txt", "a")

    missing, found = read_files([tmp_path / "nowhere", str(tmp_path / "a.txt")])

    assert "nowhere does not exist" in str(missing.error)
    assert found.documents[0].text == "a"


def test_a_source_is_the_same_from_every_working_folder(tmp_path, monkeypatch):
    path = write(tmp_path / "a.txt", "a")
    monkeypatch.chdir(tmp_path)

    assert read_file("a.txt")[0].source == read_file(path)[0].source
