"""Connectors, one per file: patch features (F, P, E) -> tokens of the LLM's width (F, N, D)."""
