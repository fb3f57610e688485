"""The documentation's Python runs, section by section, as a reader would type it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# The LangChain page is one story from its first block to its last; its own test runs it whole.
PAGES = [
    ROOT / "README.md",
    *(page for page in sorted((ROOT / "docs").glob("**/*.md")) if page.stem != "langchain"),
]
CHECKPOINT = ROOT / "softrag" / "demo" / "checkpoint"
# `<!-- not run: why -->` before a block leaves it out, e.g. where it needs a GPU or a server.
BLOCK = re.compile(r"(<!-- not run: .+? -->\n+)?^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def sections() -> list[object]:
    """Return `(name, code)` for every section with Python in it; its blocks share their names."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        # Comments in code start like headings do.
        headings = [
            m.start() for m in re.finditer(r"^## ", re.sub(r"(?s)```.*?```", _blank, text), re.M)
        ]
        for start, end in zip([0, *headings], [*headings, len(text)], strict=True):
            section = text[start:end]
            code = [block for not_run, block in BLOCK.findall(section) if not not_run]
            if code:
                name = section.split("\n", 1)[0].strip("# ")
                found.append(pytest.param("\n".join(code), id=f"{page.stem}: {name}"))
    return found


def _blank(match: re.Match[str]) -> str:
    return re.sub(r"[^\n]", " ", match[0])


@pytest.mark.skipif(not CHECKPOINT.exists(), reason="the demo checkpoint is not in this tree")
@pytest.mark.parametrize("code", sections())
def test_the_code_of_the_documentation_runs(code, tmp_path, monkeypatch):
    # Readers start in an empty folder.
    monkeypatch.chdir(tmp_path)

    exec(compile(code, "<documentation>", "exec"), {"__name__": "__main__"})
