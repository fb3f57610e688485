"""python demos/llama_index_chat.py: a LlamaIndex chat engine that answers from memories.

`SoftRAGPostprocessor` hands the chat engine handles instead of texts, `SoftRAGLLM` reads them.
"""

from pathlib import Path

from llama_index.core import Document
from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.memory import ChatMemoryBuffer

import softrag
from llama_index_softrag import (
    SoftRAGCompressor,
    SoftRAGEmbedding,
    SoftRAGLLM,
    SoftRAGPostprocessor,
    SoftRAGQdrantVectorStore,
    SoftRAGSplitter,
    index_of,
)
from softrag import SoftRAG

CORPUS = Path(softrag.__file__).parent / "demo" / "corpus"

articles = [
    Document(id_=f"{topic}.md", text=(CORPUS / f"{topic}.md").read_text(encoding="utf-8"))
    for topic in ("enigma_machine", "pitch_drop_experiment")
]
with SoftRAG.from_pretrained("softrag-demo") as engine:
    # Index: any loader and any steps in between; the compressor comes last.
    pipeline = IngestionPipeline(
        transformations=[
            SoftRAGSplitter(engine),
            SoftRAGEmbedding(engine),
            SoftRAGCompressor(engine),
        ],
        vector_store=SoftRAGQdrantVectorStore(engine),
    )
    print(f"{len(articles)} articles are {len(pipeline.run(documents=articles))} memories")

    chat = index_of(engine).as_chat_engine(
        chat_mode="context",
        llm=SoftRAGLLM(engine, max_new_tokens=32),
        node_postprocessors=[SoftRAGPostprocessor(engine)],
        memory=ChatMemoryBuffer.from_defaults(token_limit=2000),
        similarity_top_k=3,
    )
    for question in (
        "Where in the United Kingdom was the centre that decrypted Enigma messages?",
        "Who started the most famous pitch drop experiment in 1927?",
    ):
        print(f"\n> {question}")
        response = chat.stream_chat(question)
        for piece in response.response_gen:
            print(piece, end="", flush=True)
        for each in response.source_nodes:
            print(f"\n   from {each.node.ref_doc_id} {each.metadata['softrag_memory']}", end="")
        print()
