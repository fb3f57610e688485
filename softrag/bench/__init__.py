"""Measuring speed against what the hardware could do. It uses the engine; nothing uses it."""
