"""The errors of the project, one tree.

    LinvtError                 everything this project raises on purpose
    ├── OptionError            an option or argument is outside what is accepted
    ├── BundleError            the bundle is missing, damaged, unsafe or of another format
    ├── VideoError             the video cannot be opened, decoded or sampled
    ├── QuestionError          the question is empty, too long or holds reserved tokens
    ├── BackendError           a device or library is absent, an engine does not fit, or a graph failed to run or build
    ├── CheckpointError        the checkpoint is of an unknown family or its tensors do not fit
    ├── CalibrationError       clips, scales or activations a bundle cannot be quantised with, or a target missed
    ├── OutputError            the target exists, cannot be written or the disk is full
    └── DependencyError        a package of an optional extra is needed and absent

Every message is one line and says what was found, what was expected and what to do next.
Errors of other libraries are translated once, where that library is called, with ``from``.

This module does not print and does not choose exit codes: ``runtime.cli`` does.
"""

from __future__ import annotations


class LinvtError(Exception):
    """Root of the tree; ``str(error)`` is one line for the user."""

    def __str__(self) -> str:
        return " ".join(super().__str__().split())


class OptionError(LinvtError):
    """An option or argument is outside what is accepted."""


class BundleError(LinvtError):
    """The bundle is missing, damaged, unsafe or of another format."""


class VideoError(LinvtError):
    """The video cannot be opened, decoded or sampled."""


class QuestionError(LinvtError):
    """The question is empty, too long or holds reserved tokens."""


class BackendError(LinvtError):
    """A device or library is absent, an engine does not fit, or a graph failed to run or to be built."""


class CheckpointError(LinvtError):
    """The checkpoint is of an unknown family or its tensors do not fit."""


class CalibrationError(LinvtError):
    """Clips, scales or activations a bundle cannot be quantised with, or an accuracy target that was missed."""


class OutputError(LinvtError):
    """The target exists, cannot be written or the disk is full."""


class DependencyError(LinvtError):
    """A package of an optional extra is needed and absent."""
