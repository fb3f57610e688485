"""python demos/llama_index_query_engine.py: ten questions, LlamaIndex on text and on memories.

Both have the same embedder, chunks and decoder. The stock `RetrieverQueryEngine` stuffs the text of
five chunks into the prompt, ours their memories.
"""

import json
from pathlib import Path
from time import perf_counter

from llama_index.core import Document
from llama_index.core.callbacks import CallbackManager, TokenCountingHandler
from llama_index.core.query_engine import RetrieverQueryEngine
from rich.console import Console
from rich.table import Table

import softrag
from llama_index_softrag import SoftRAGLLM, SoftRAGQueryEngine, index_of
from softrag import SoftRAG

DEMO = Path(softrag.__file__).parent / "demo"


def ask(query_engine: RetrieverQueryEngine, question: str) -> tuple[str, int, float]:
    """Return the answer, the prompt's tokens and the seconds it took."""
    counter = TokenCountingHandler()
    query_engine.callback_manager.set_handlers([counter])
    started = perf_counter()
    answer = str(query_engine.query(question))
    return answer, counter.prompt_llm_token_count, perf_counter() - started


questions = json.loads((DEMO / "questions.json").read_text(encoding="utf-8"))
articles = [
    Document(id_=name, text=(DEMO / "corpus" / name).read_text(encoding="utf-8"))
    for name in sorted({each["file"] for each in questions})
]
with SoftRAG.from_pretrained("softrag-demo") as engine:
    manager = CallbackManager()
    ours = SoftRAGQueryEngine.from_documents(
        articles, engine, k=5, max_new_tokens=24, callback_manager=manager
    )
    stock = index_of(engine, manager).as_query_engine(
        llm=SoftRAGLLM(engine, mode="text", max_new_tokens=24), similarity_top_k=5
    )
    table = Table("Question", "Stock, on text", "Ours, on memories")
    totals = [[0, 0.0], [0, 0.0]]
    for each in questions:
        cells = []
        for total, query_engine in zip(totals, (stock, ours), strict=True):
            answer, tokens, seconds = ask(query_engine, each["question"])
            total[:] = total[0] + tokens, total[1] + seconds
            cells.append(f"{answer}\n{tokens} tokens, {seconds:.2f} s")
        table.add_row(each["question"], *cells)
    table.add_row("All", *(f"{tokens} prompt tokens, {s:.2f} s" for tokens, s in totals))
    Console().print(table)
