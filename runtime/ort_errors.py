"""ONNX Runtime's errors become ``BackendError`` here, and nowhere else."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors

from runtime.errors import BackendError

__all__ = ["ORT_ERRORS", "ort_errors", "reason_of", "translated"]

ORT_ERRORS: tuple[type[Exception], ...] = (  # its own share no base class, its bindings raise Python's
    RuntimeError,
    ValueError,
    *(error for error in vars(ort_errors).values() if isinstance(error, type) and issubclass(error, Exception)),
)
MESSAGE_PREFIX = re.compile(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ")
MESSAGE_LENGTH = 300  # characters; ONNX Runtime names C++ functions at length


@contextmanager
def translated(what: str, advice: str) -> Iterator[None]:
    """Turn ONNX Runtime's errors, and a memory that does not suffice, into ``BackendError``."""
    try:
        yield
    except MemoryError as error:
        raise BackendError(f"not enough memory to {what}; use fewer frames or tokens") from error
    except ORT_ERRORS as error:
        raise BackendError(f"ONNX Runtime failed to {what}: {reason_of(error)}; {advice}") from error


def reason_of(error: Exception) -> str:
    """What one of its errors says, one line, shortened."""
    return f"{' '.join(MESSAGE_PREFIX.sub('', str(error)).split()):.{MESSAGE_LENGTH}}"
