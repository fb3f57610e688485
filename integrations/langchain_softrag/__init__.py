"""softrag in LangChain apps."""

__all__: list[str] = []
