"""python demos/langchain_chain.py: index articles and answer from their memories, in LangChain."""

import asyncio
from pathlib import Path

from langchain_core.documents import Document
from langchain_core.runnables import Runnable

import softrag
from langchain_softrag import (
    ChatSoftRAG,
    SoftRAGCompressor,
    SoftRAGQdrantVectorStore,
    create_softrag_chain,
)
from softrag import SoftRAG

CORPUS = Path(softrag.__file__).parent / "demo" / "corpus"


def read(topic: str) -> Document:
    """Return an article; any LangChain loader does the same."""
    text = (CORPUS / f"{topic}.md").read_text(encoding="utf-8")
    return Document(page_content=text, metadata={"source": f"{topic}.md", "topic": topic})


async def stream(answer: Runnable[str, str], question: str) -> None:
    """Print an answer as it is written."""
    print(question, end=" -> ")
    async for piece in answer.astream(question):
        print(piece, end="", flush=True)
    print()


with SoftRAG.from_pretrained("softrag-demo") as engine:
    # Index: every piece becomes one memory, made inside add_documents.
    store = SoftRAGQdrantVectorStore(engine)
    articles = [read(topic) for topic in ("piano", "violin", "chess")]
    pieces = SoftRAGCompressor(engine=engine).split_documents(articles)
    store.add_documents(pieces)
    print(f"{len(articles)} articles are {len(pieces)} memories")

    # Ask: one question, several at once, and one about chess only, streamed.
    llm = ChatSoftRAG(engine=engine, max_tokens=24)
    chain = create_softrag_chain(store.as_retriever(k=3), llm)
    found = chain.invoke("Who invented the piano?")
    print(found["question"], "->", found["answer"])
    for source in found["sources"]:
        print("   from", source.metadata["source"], source.metadata["softrag_memory"])
    for found in chain.batch(["How many strings has a violin?", "Who made the best violins?"]):
        print(found["question"], "->", found["answer"])
    about_chess = store.as_retriever(k=3, search_kwargs={"filter": {"topic": "chess"}})
    asyncio.run(stream(create_softrag_chain(about_chess, llm).pick("answer"), "Who plays chess?"))
