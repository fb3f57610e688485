"""The demos and the documentation's page do what they show, on the shipped model."""

from __future__ import annotations

import re

from softrag import SoftRAG
from tests.integrations.demos import ROOT, run_demo


def test_the_chain_demo_answers_from_memories():
    lines = run_demo("langchain_chain.py").splitlines()

    assert re.fullmatch(r"3 articles are \d+ memories", lines[0])
    assert re.fullmatch(r"Who invented the piano\? -> .+", lines[1])
    sources = [re.fullmatch(r" +from (\w+\.md) <\|softmem:[0-9a-f]{32}\|>", x) for x in lines[2:5]]
    assert all(sources)
    assert [line.partition(" -> ")[0] for line in lines[5:]] == [
        "How many strings has a violin?",
        "Who made the best violins?",
        "Who plays chess?",
    ]


def test_the_collator_demo_learns():
    *_, last = run_demo("bring_your_own_collator.py").splitlines()

    losses = [float(loss) for loss in last.removeprefix("losses: ").split()]
    assert losses[-1] < 1 < losses[0]


def test_the_online_demo_answers_from_the_documents(demo_engine, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "demos"))
    import online_compression

    answer = online_compression.with_langchain(demo_engine)

    found = online_compression.FOUND
    expected = demo_engine.answer_from(online_compression.QUESTION, found, max_new_tokens=24)
    assert answer == expected.text


def test_the_documentations_code_runs(tmp_path, monkeypatch):
    page = (ROOT / "docs" / "langchain.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 5
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}

    for block in blocks:
        exec(compile(block, "docs/langchain.md", "exec"), names)

    assert isinstance(names["engine"], SoftRAG)
    names["engine"].close()
