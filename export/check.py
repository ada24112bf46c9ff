"""``python -m export.check BUNDLE``: would TensorRT's parser take every stage? Needs onnx, neither TensorRT nor a GPU.

Lowers a copy of each graph for each version, as ``python -m export.build`` does on a device, and holds every node,
bodies of functions and subgraphs included, against that release's rules (``export.lower.rules``). Reads no weights.
``--write`` keeps the copies, for trtexec: those that could be made, whatever else is wrong with them.

Does not run the graphs and does not build engines: memory, and kernels for a GPU, are the builder's to find out.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.cli import Parser, ascii_json, guarded, require_extra

if TYPE_CHECKING:
    import onnx_ir as ir

    from export.lower import Release
    from runtime.bundle import Bundle

__all__ = ["Report", "StageCheck", "check_bundle", "main"]

PROGRAM = "linvt-check"
REQUIRED = ("onnx", "onnx_ir")


@dataclass(frozen=True)
class StageCheck:
    """One stage for one version; true when nothing would be refused.

    Attributes:
        lowered: what the version needs lowered, e.g. ("Attention", "opset 24 -> 20").
        problems: one line each: node, found, expected.
    """

    stage: str
    version: str
    lowered: tuple[str, ...]
    problems: tuple[str, ...]

    def __bool__(self) -> bool:
        return not self.problems


@dataclass(frozen=True)
class Report:
    """All stages for all versions; true when nothing would be refused.

    Attributes:
        notes: versions for which rules of an older one stand in.
    """

    bundle: str
    checks: tuple[StageCheck, ...]
    notes: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return all(self.checks)

    @property
    def problems(self) -> tuple[str, ...]:
        """One line each: version, stage, node, found, expected."""
        return tuple(f"{check.version} {check.stage}: {line}" for check in self.checks for line in check.problems)


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = Parser(PROGRAM, description="Say for every stage of a bundle whether TensorRT's ONNX parser takes it.")
    parser.add_argument("bundle", help="bundle folder, demo or demo-float")
    parser.add_argument(
        "--tensorrt", nargs="+", metavar="VERSION", help="from 10.3 on; default: those of JetPack and the newest"
    )
    parser.add_argument(
        "--write", metavar="FOLDER", help="write one version's lowered graphs there, beside links to weights"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object")
    arguments = parser.parse_args(argv)
    if arguments.write is not None and len(arguments.tensorrt or ()) != 1:
        parser.error("--write wants one version, as in: --tensorrt 10.3 --write lowered")
    return guarded(PROGRAM, lambda: check(arguments))


def check(arguments: argparse.Namespace) -> int:
    """Check and print; 1 when anything would be refused."""
    require_extra("tensorrt", REQUIRED)
    from calibration.trt_rules import RELEASES
    from runtime.bundle import Bundle

    bundle = Bundle.open(arguments.bundle)
    report = check_bundle(bundle, arguments.tensorrt or list(RELEASES))
    if arguments.write is not None:
        folder = Path(arguments.write)
        print(written(folder, write_graphs(bundle, arguments.tensorrt[0], folder)), file=sys.stderr)  # noqa: T201
    for line in [ascii_json({"ok": bool(report), **vars(report)})] if arguments.json else shown(report):
        print(line)  # noqa: T201  what the command is for
    return 0 if report else 1


def shown(report: Report) -> Iterator[str]:
    """Problems, then a line for every stage and version, then what is to be known about versions."""
    yield from report.problems
    for check in report.checks:
        state = "ok" if check else f"{len(check.problems)} {'problem' if len(check.problems) == 1 else 'problems'}"
        edits = f"lowered: {', '.join(check.lowered)}" if check.lowered else "as written"
        yield f"{check.stage} {check.version}: {state}, {edits}"
    yield from report.notes


def check_bundle(bundle: Bundle, versions: Sequence[str]) -> Report:
    """Lower copies of all stages for all ``versions`` and look what would be refused.

    Raises:
        OptionError: a version without rules.
        BundleError: a graph that cannot be read, or is another than the manifest says.
    """
    from export.lower import release_of

    releases = [release_of(version) for version in dict.fromkeys(versions)]
    checks = [check_stage(bundle, stage, release) for stage in bundle.manifest.stages for release in releases]
    return Report(str(bundle.folder), tuple(checks), tuple(release.note for release in releases if release.note))


def write_graphs(bundle: Bundle, version: str, folder: Path) -> dict[str, bool]:
    """Write every stage's lowered graph, without the plugin, beside links to the weights: all, or no folder.

    Returns:
        For every stage whether it could be lowered and is there.

    Raises:
        OutputError: the folder cannot be written, or holds something.
    """
    from export.lower import release_of
    from export.lower.draft import folder_draft
    from export.lower.write import put_lowered
    from runtime.errors import BundleError

    done = {}
    with folder_draft(folder) as draft:
        for stage, spec in bundle.manifest.stages.items():
            try:
                put_lowered(bundle.path(spec.file), release_of(version), draft / spec.file, plugin=False)
                done[stage] = True
            except BundleError:  # the report says why
                done[stage] = False
    return done


def written(folder: Path, done: dict[str, bool]) -> str:
    """One line about what ``write_graphs`` did."""
    there = ", ".join(stage for stage in done if done[stage]) or "nothing"
    missing = ", ".join(stage for stage in done if not done[stage])
    return f"{PROGRAM}: wrote {there} to {folder}" + (f"; {missing} could not be lowered" if missing else "")


def check_stage(bundle: Bundle, stage: str, release: Release) -> StageCheck:
    """One stage, lowered without the plugin: what stands in for it is checked too."""
    from export.lower import lower, lowerings
    from export.lower.read import read_stage, understood
    from runtime.errors import BundleError

    model = read_stage(bundle, stage)
    edits = lowerings(model, release)
    try:
        with understood():
            lower(model, release, plugin=False)
            found = tuple(problems(model, release))
    except BundleError as error:
        found = (str(error),)
    return StageCheck(stage, release.version, edits, found)


def problems(model: ir.Model, release: Release) -> Iterator[str]:
    """What the release refuses; where it is nothing, what could not be judged because a dtype is not known."""
    from calibration.trt_rules import problem
    from export.lower.infer import infer_types
    from export.lower.rules import graph_problems

    infer_types(model)
    found = list(graph_problems(model, release))
    yield from found
    for node in () if found else model.graph:
        if any(value.dtype is None and value.name for value in node.outputs):
            yield problem(node, "an output of unknown dtype", "one that ONNX infers")


if __name__ == "__main__":
    sys.exit(main())
