"""python demos/online_compression.py [CHECKPOINT]: answer from documents that no store has seen.

Their memories are made when the question is asked, as for the results of a web search, and, with an
OSCAR checkpoint such as the default, for the question.
"""

import sys

from softrag import SoftRAG

FOUND = [
    "The Pont Neuf, opened in 1607, is the oldest bridge across the Seine in Paris.",
    "Bread is made of flour, water and yeast, and baked after an hour.",
]
QUESTION = "When was the Pont Neuf opened?"


def with_langchain(engine: SoftRAG) -> str:
    """Compress in any chain: the compressor is a `BaseDocumentCompressor`."""
    from langchain_core.documents import Document

    from langchain_softrag import ChatSoftRAG, SoftRAGCompressor, format_memories

    documents = [Document(page_content=text) for text in FOUND]
    compressed = SoftRAGCompressor(engine=engine).compress_documents(documents, QUESTION)
    llm = ChatSoftRAG(engine=engine, max_tokens=24)
    return llm.invoke([*format_memories(compressed), ("human", QUESTION)]).text


def with_llama_index(engine: SoftRAG) -> str:
    """Compress between any retriever and any synthesizer: a `BaseNodePostprocessor`."""
    from llama_index.core import VectorStoreIndex
    from llama_index.core.schema import TextNode

    from llama_index_softrag import SoftRAGEmbedding, SoftRAGLLM, SoftRAGPostprocessor

    # LlamaIndex's own index in memory, which knows no memories.
    index = VectorStoreIndex(
        [TextNode(text=text) for text in FOUND], embed_model=SoftRAGEmbedding(engine)
    )
    query_engine = index.as_query_engine(
        llm=SoftRAGLLM(engine, max_new_tokens=24),
        node_postprocessors=[SoftRAGPostprocessor(engine)],
    )
    return str(query_engine.query(QUESTION))


if __name__ == "__main__":
    checkpoint = sys.argv[1] if len(sys.argv) > 1 else "softrag-demo-oscar"
    with SoftRAG.from_pretrained(checkpoint) as engine:
        print("LangChain:", with_langchain(engine))
        print("LlamaIndex:", with_llama_index(engine))
