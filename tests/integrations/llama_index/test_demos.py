"""The demos, and the demo model through LlamaIndex."""

from __future__ import annotations

import re

from llama_index_softrag import SoftRAGLLM, SoftRAGPostprocessor, SoftRAGQueryEngine, index_of
from tests.integrations.demos import run_demo


def test_the_query_engine_demo_prints_a_table(demo_questions):
    printed = run_demo("llama_index_query_engine.py")

    assert all(question in printed for question in demo_questions)
    (stock, ours) = re.findall(r"(\d+) prompt tokens", printed)
    assert int(ours) * 5 < int(stock)


def test_the_chat_demo_answers_from_memories():
    printed = run_demo("llama_index_chat.py")

    assert re.search(r"2 articles are \d+ memories", printed)
    assert printed.count("\n> ") == 2
    assert len(re.findall(r"from \w+\.md <\|softmem:[0-9a-f]{32}\|>", printed)) == 6


def test_both_frameworks_answer_from_memories_made_online():
    printed = run_demo("online_compression.py")

    (langchain,) = re.findall(r"LangChain: (.+)", printed)
    (llama_index,) = re.findall(r"LlamaIndex: (.+)", printed)
    assert langchain == llama_index


def test_the_demo_model_answers_as_softrag_does(demo, demo_questions):
    questions = demo_questions[:4]
    expected = [answer.text for answer in (demo.ask(q, k=3, max_new_tokens=12) for q in questions)]
    query_engine = SoftRAGQueryEngine.from_store(demo, k=3, max_new_tokens=12)
    chat_engine = index_of(demo).as_query_engine(
        llm=SoftRAGLLM(demo, max_new_tokens=12),
        node_postprocessors=[SoftRAGPostprocessor(demo)],
        similarity_top_k=3,
    )

    assert [str(query_engine.query(question)) for question in questions] == expected
    assert str(chat_engine.query(questions[0])) == expected[0]
    assert len(set(expected)) > 1
