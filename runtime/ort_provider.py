"""Where ONNX Runtime runs: on the CPU, or through its CUDA provider if that is there, starts and is new enough.

Opens no graph.
"""

from __future__ import annotations

import re

import numpy as np
import onnxruntime as ort

from runtime.backend_names import BackendName
from runtime.errors import BackendError
from runtime.ort_errors import ORT_ERRORS, reason_of

__all__ = ["PROVIDERS", "attention_note", "choose_provider", "cuda_failure", "why_not_cuda"]

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
# The CUDA provider's first release with kernels for Attention and TensorScatter: onnxruntime-gpu 1.25.0's library has
# the classes, 1.24.4's does not (onnxruntime issue 28025; pull requests 27446 and 27542).
ATTENTION_SINCE = (1, 25)


def choose_provider(name: BackendName) -> str:
    """Resolve "auto" and check that the device is there: "cpu" or "cuda".

    Raises:
        BackendError: it is not.
    """
    if name == "auto":
        return "cpu" if why_not_cuda() else "cuda"
    if name not in PROVIDERS:
        raise BackendError(f"unknown backend {name!r}; choose one of auto, {', '.join(PROVIDERS)}")
    available = ort.get_available_providers()
    if PROVIDERS[name] not in available:
        raise BackendError(
            f"backend {name!r} needs ONNX Runtime's {PROVIDERS[name]}, found {', '.join(available)}; "
            "replace onnxruntime by onnxruntime-gpu as README says, or use --backend cpu"
        )
    if name == "cuda" and (failure := cuda_failure()):
        raise BackendError(
            f"CUDA does not start in ONNX Runtime {ort.__version__}: {failure}; check the NVIDIA driver, CUDA and "
            "cuDNN, or use --backend cpu"
        )
    return name


def why_not_cuda() -> str:
    """What keeps "auto" from CUDA; empty where nothing does."""
    if PROVIDERS["cuda"] not in ort.get_available_providers():
        return "ONNX Runtime has no CUDA here"
    if note := attention_note():
        return note
    failure = cuda_failure()
    return failure and f"CUDA does not start in ONNX Runtime {ort.__version__}: {failure}"


def cuda_failure() -> str:
    """Why no device takes memory; empty where one does, which the list of providers does not tell."""
    try:
        ort.OrtValue.ortvalue_from_numpy(np.zeros(1, np.float32), "cuda", 0)
    except ORT_ERRORS as error:
        return reason_of(error)
    return ""


def attention_note() -> str:
    """What is slow about a CUDA provider without attention, of which ONNX Runtime says nothing; else empty."""
    numbers = tuple(int(part) for part in re.findall(r"\d+", ort.__version__)[:2])
    if numbers >= ATTENTION_SINCE:
        return ""
    since = ".".join(map(str, ATTENTION_SINCE))
    return (
        f"ONNX Runtime {ort.__version__} computes attention on the CPU, and takes the KV cache there for every token; "
        f"install onnxruntime-gpu {since} or newer"
    )
