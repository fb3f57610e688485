"""Training of softrag models."""

__all__: list[str] = []
