"""Checkpoint to bundle: PyTorch reference, tracing, comparison. Needs the extra ``[export]``."""
