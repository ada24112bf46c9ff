"""The names a backend is asked for by; apart from ``backend`` so that a command line is parsed without NumPy."""

from __future__ import annotations

from typing import Literal

__all__ = ["BACKENDS", "BackendName"]

BackendName = Literal["auto", "cpu", "cuda", "tensorrt"]
BACKENDS: tuple[BackendName, ...] = ("auto", "cpu", "cuda", "tensorrt")
