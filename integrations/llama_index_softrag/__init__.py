"""softrag in LlamaIndex apps."""

__all__: list[str] = []
