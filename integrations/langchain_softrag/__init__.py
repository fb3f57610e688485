"""softrag in LangChain apps: documents as memories, from the store to the answer."""

from langchain_softrag.chains import SoftRAGInput, SoftRAGOutput, create_softrag_chain
from langchain_softrag.chat_models import ChatSoftRAG
from langchain_softrag.compressor import SoftRAGCompressor
from langchain_softrag.embeddings import LangChainEmbedder, SoftRAGEmbeddings
from langchain_softrag.messages import format_memories
from langchain_softrag.retrievers import SoftRAGRetriever
from langchain_softrag.vectorstores import SoftRAGQdrantVectorStore

__all__ = [
    "ChatSoftRAG",
    "LangChainEmbedder",
    "SoftRAGCompressor",
    "SoftRAGEmbeddings",
    "SoftRAGInput",
    "SoftRAGOutput",
    "SoftRAGQdrantVectorStore",
    "SoftRAGRetriever",
    "create_softrag_chain",
    "format_memories",
]
