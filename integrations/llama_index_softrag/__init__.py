"""softrag in LlamaIndex apps: answer from memories with LlamaIndex's own parts around."""

from llama_index_softrag.compressor import SoftRAGCompressor
from llama_index_softrag.embedding import LlamaIndexEmbedder, SoftRAGEmbedding
from llama_index_softrag.llm import PromptError, SoftRAGLLM
from llama_index_softrag.memories import MemoryNode
from llama_index_softrag.postprocessor import SoftRAGPostprocessor
from llama_index_softrag.query_engine import SoftRAGQueryEngine, index_of
from llama_index_softrag.splitter import SoftRAGSplitter
from llama_index_softrag.synthesizer import SoftRAGSynthesizer
from llama_index_softrag.vector_store import SoftRAGQdrantVectorStore

__all__ = [
    "LlamaIndexEmbedder",
    "MemoryNode",
    "PromptError",
    "SoftRAGCompressor",
    "SoftRAGEmbedding",
    "SoftRAGLLM",
    "SoftRAGPostprocessor",
    "SoftRAGQdrantVectorStore",
    "SoftRAGQueryEngine",
    "SoftRAGSplitter",
    "SoftRAGSynthesizer",
    "index_of",
]
