"""``quantized_bundle``: the whole way from a float bundle and clips to a quantised bundle with its loss inside.

Clips are played once; then every stage is planned, written and measured, one after the other. The target is held or
nothing is written. Parses no command line; ``calibration.__main__`` does.
"""

from __future__ import annotations

import hashlib
import platform
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from calibration.accuracy import answerable, right_answers
from calibration.checks import check_options, check_questions, check_source
from calibration.clips import Clip, clips_from, distinct
from calibration.collect import Collected, collected
from calibration.embedding import write_narrow_embedding
from calibration.given import given_entries
from calibration.measure import floored
from calibration.options import QuantizeOptions
from calibration.plan import Plan, planned
from calibration.questions import Labelled, Questions, questions_from
from calibration.report import REPORT, SCALES, Accuracy, Report, StageReport, encode_report, versions
from calibration.scales import (
    ScaleTable,
    StageScales,
    TensorScale,
    check_weights,
    encode_table,
    read_table,
    weights_hash,
)
from calibration.sensitivity import Target, TargetMissedError
from calibration.write import bundle_draft, file_specs, replace_file, written
from calibration.write_stage import StageWriter
from runtime.backend import open_backend
from runtime.bundle import EVIDENCE, MANIFEST, Bundle
from runtime.engine import VideoQA
from runtime.errors import CalibrationError
from runtime.manifest import FORMAT_VERSION, Manifest, StageSpec, encode_manifest

__all__ = ["quantized_bundle"]

Progress = Callable[[str], None]
Written = Mapping[str, tuple[StageSpec, StageReport]]
Given = Mapping[str, Mapping[str, TensorScale]]  # entries of a scale table, by stage and activation

EMBEDDING = "embedding.safetensors"
ORDER = ("vision", "refine", "aggregate", "decode")  # in which stages are quantised
MARGINS = (1.0, 0.3, 0.1, 0.03, 0.01)  # of the allowed distance from a cosine of 1, while answers drop too much
ADVISED = 32  # clips
WORTH = 10  # times its distance from 1 that a selection may lose of its worth: a hundredth beside a cosine of 0.999
LLM_DISTANCE = 0.01  # of the LLM's cosine from 1 that such tightening starts from, where none was asked for


def quantized_bundle(
    source: Path | str,
    clips: Path | str,
    output: Path,
    options: QuantizeOptions,
    progress: Progress = lambda step: None,
    note: Progress = lambda line: None,
    *,
    called: Path | str | None = None,
) -> Path:
    """Quantise a bundle; returns the new bundle's folder.

    Args:
        source: a float bundle.
        clips: folder of videos, a video, or a list of paths.
        output: the folder to write.
        options: what to quantise, and what has to be kept.
        progress: told the name of each step as it begins, and behind a colon how far it is.
        note: told what the user should know.
        called: what errors call the float bundle, where that is not ``source``.

    Raises:
        CalibrationError, BundleError, OptionError, OutputError: one line each; the output is as it was.
    """
    bundle, called = Bundle.open(source), called or source
    check_options(options)
    check_source(bundle, called)
    table = read_table(options.scales) if options.scales else None
    if options.scales and table:
        check_weights(options.scales, table, bundle, called)
    given, questions = clips_from(clips), questions_from(options.questions)
    check_questions(questions, given, options)
    with bundle_draft(output, force=options.force) as draft:
        found, copies = distinct(given)
        for name, first in copies.items():
            note(f"skipped {name}: {copy_of(first)}")
        Run(bundle, draft, options, found, questions.about(copies), progress, note, copies).quantize(table)
    return output


def copy_of(first: str) -> str:
    """Why a copy of a clip is left out."""
    return f"it has the content of {first}, which counts once"


@dataclass(frozen=True)
class Run:
    """One calibration run."""

    bundle: Bundle
    draft: Path
    options: QuantizeOptions
    clips: Sequence[Clip]
    questions: Questions
    progress: Progress
    note: Progress
    copies: Mapping[str, str] = field(default_factory=dict)  # names of clips that were left out for another's

    @property
    def stages(self) -> list[str]:
        """Stages to quantise."""
        present = [name for name in ORDER if name in self.bundle.manifest.stages]
        return [name for name in present if name != "decode" or self.options.decode != "float"]

    def quantize(self, table: ScaleTable | None) -> None:
        """Everything between the checked input and the finished draft."""
        options = self.options
        if options.decode == "int8" and any(options.narrow_options.values()):
            self.note("decode: --rounding and --block-size are about weights of 4 bits, of which there are none")
        given: Given = {}
        if table:
            wide = [stage for stage in self.stages if not self.narrow(stage)]
            given = given_entries(str(options.scales), table, self.bundle, wide, self.note)
        embedding = self.narrow_embedding() if options.embedding == "int8" else None
        found = collected(
            self.bundle,
            self.clips,
            self.questions,
            self.stages,
            frames=options.frames,
            threads=options.threads,
            progress=self.progress,
            note=self.note,
        )
        self.note_few(found)
        labelled = answerable(self.questions.labelled, found.skipped, required=options.max_drop is not None)
        if gone := len(self.questions.labelled) - len(labelled):
            self.note(
                f"labelled answers: {gone} of {gone + len(labelled)} questions are about clips that could not be read; "
                "they are not asked"
            )
        plans = {stage: self.plan(stage, found, given.get(stage, {})) for stage in self.stages}
        replace_file(self.draft / SCALES, encode_table(self.table(plans, found)))
        self.progress("copy")
        self.copy_rest()
        stages, accuracy = self.within_drop(plans, found, labelled)
        self.progress("write")
        for stage, (_, report) in stages.items():
            self.note(f"{stage}: {report}")
        replace_file(self.draft / REPORT, encode_report(self.report(stages, found, accuracy, embedding)))
        self.write_manifest(stages)

    def note_few(self, found: Collected) -> None:
        """Say where scales or losses rest on little."""
        if len(found.clips) < ADVISED:
            self.note(
                f"scales rest on {len(found.clips)} clips; {ADVISED} or more of the kind you will ask about are better"
            )
        if not found.held_out:
            self.note("losses are measured on clips that calibrated too: there were too few to hold some out")

    def narrow(self, stage: str) -> bool:
        """Whether a stage gets 4-bit weights, in place of W8A8."""
        return stage == "decode" and self.options.decode == "int4"

    def plan(self, stage: str, found: Collected, given: Mapping[str, TensorScale]) -> Plan:
        """Scales of one stage, from the given entries where there are some."""
        spec = self.bundle.manifest.stages[stage]
        return planned(
            self.bundle.path(spec.file),
            spec,
            found.observers[stage],
            self.options,
            narrow=self.narrow(stage),
            given=given,
            progress=lambda number, count: self.progress(f"choose {stage}: {number}/{count}"),
        )

    def table(self, plans: Mapping[str, Plan], found: Collected) -> ScaleTable:
        """The scale table of this run."""
        stages = {
            stage: StageScales(weights_hash(self.bundle, stage), dict(plan.scales)) for stage, plan in plans.items()
        }
        return ScaleTable(
            method=self.options.method,
            clips=tuple(found.clips),
            questions=tuple(found.asked),
            versions=versions(),
            stages=stages,
        )

    def within_drop(
        self, plans: Mapping[str, Plan], found: Collected, labelled: Sequence[Labelled]
    ) -> tuple[Written, Accuracy | None]:
        """Write all stages; where too many labelled answers are lost, again with tighter targets.

        Raises:
            CalibrationError: a target does not hold.
        """
        right = sum(self.answered(self.bundle, labelled, "float")) if labelled else 0
        calibrated = {clip.name for clip in found.clips}
        about_held_out = sum(question.clip not in calibrated for question in labelled)
        writer = StageWriter(self.draft, self.bundle.manifest, found.examples, self.options.threads, self.progress)
        accuracy: Accuracy | None = None
        tried: dict[str, list[str]] | None = None
        held = dict.fromkeys(plans, MARGINS[0])  # the tightest margin that each stage held
        for margin in MARGINS:
            stages = {}
            for stage, plan in plans.items():
                try:
                    stages[stage] = writer.write(stage, plan, self.target(stage, margin))
                    held[stage] = margin
                except TargetMissedError:
                    if accuracy is None:  # the user's own target
                        raise
                    stages[stage] = writer.write(stage, plan, self.target(stage, held[stage]))
            if not labelled:
                return stages, None
            floats = {stage: [*report.floats] for stage, (_, report) in stages.items()}
            if floats == tried:  # the same bundle was asked before
                continue
            tried = floats
            self.write_manifest(stages)
            told = self.answered(opened(self.draft), labelled, "quantised")
            accuracy = Accuracy(
                asked=len(told), about_held_out=about_held_out, right_float=right, right_quantized=sum(told)
            )
            self.note(str(accuracy))
            if self.options.max_drop is None or accuracy.drop <= self.options.max_drop:
                return stages, accuracy
            self.note(f"more than --max-drop {self.options.max_drop:g}: asking more of every stage")
        assert accuracy is not None, "the first margin raises or asks"
        raise CalibrationError(
            f"{accuracy.drop:.2f} percentage points of {accuracy.asked} labelled answers are lost, more than "
            f"--max-drop {self.options.max_drop:g}, with as much in floating point as was tried; allow more, use "
            f"--llm {'int8 or --llm ' if self.options.decode == 'int4' else ''}float, or give more clips"
        )

    def target(self, stage: str, margin: float) -> Target:
        """What a stage has to hold; a margin below 1 asks for more than the options do."""
        least = self.options.min_cosine_llm if stage == "decode" else self.options.min_cosine
        if least is None:
            return Target(0.0 if margin == 1 else 1 - LLM_DISTANCE * margin)
        distance = (1 - least) * margin
        return Target(1 - distance, worth=1 - WORTH * distance)

    def answered(self, bundle: Bundle, labelled: Sequence[Labelled], which: str) -> list[bool]:
        """Whether each labelled question is answered rightly by one of the two bundles."""
        paths = {clip.name: clip.path for clip in self.clips}
        with VideoQA.over(bundle, open_backend(bundle, "cpu", threads=self.options.threads)) as qa:
            return right_answers(
                qa, paths, labelled, self.options.frames, lambda step: self.progress(f"answer {which}: {step}")
            )

    def copy_rest(self) -> None:
        """Everything that is not quantised, as it is; a token embedding table in 8 bits is there already."""
        gone = {EVIDENCE, REPORT, SCALES, *(file for stage in self.stages for file in self.files_of(stage))}
        narrow = self.options.embedding == "int8"
        for name in self.bundle.manifest.files:
            if name in gone or (narrow and name == EMBEDDING):
                continue
            source, target = self.bundle.path(name), self.draft / name
            with written(self.draft):
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, target)

    def narrow_embedding(self) -> float:
        """Write the token embedding table in 8 bits; the cosine of its worst row, which has to be what stages keep."""
        cosine = write_narrow_embedding(self.bundle.path(EMBEDDING), self.draft / EMBEDDING)
        self.note(f"embedding: int8, cosine of the worst row {floored(cosine, 5)}")
        if cosine < self.options.min_cosine:
            raise CalibrationError(
                f"the token embedding table keeps a cosine of {floored(cosine, 5)} only in 8 bits (its worst row), "
                f"expected {self.options.min_cosine:g}; leave out --embedding int8, or ask for less with --min-cosine"
            )
        return cosine

    def files_of(self, stage: str) -> Collection[str]:
        """Files that a float stage consists of."""
        spec = self.bundle.manifest.stages[stage]
        return {name for graph in (spec.file, *spec.older) for name in (graph, f"{graph}.data")}

    def write_manifest(self, stages: Written) -> None:
        """The manifest over what the draft holds now."""
        with written(self.draft):
            (self.draft / MANIFEST).unlink(missing_ok=True)
        source = self.bundle.manifest
        made_with = ", ".join(f"{name} {version}" for name, version in versions().items())
        manifest = msgspec.structs.replace(
            source,
            format_version=FORMAT_VERSION,
            stages={**source.stages, **{stage: spec for stage, (spec, _) in stages.items()}},
            files=file_specs(self.draft),
            provenance={**source.provenance, "quantized_from": self.bundle.identity, "quantized_with": made_with},
        )
        replace_file(self.draft / MANIFEST, encode_manifest(manifest))

    def report(self, stages: Written, found: Collected, accuracy: Accuracy | None, embedding: float | None) -> Report:
        """What ``quantization.json`` says."""
        given = {name: str(value) for name in ("questions", "scales") if (value := getattr(self.options, name))}
        chosen = (
            "precision",
            "decode",
            "embedding",
            "method",
            "rounding",
            "block",
            "min_cosine",
            "min_cosine_llm",
            "max_drop",
        )
        return Report(
            source=self.bundle.identity,
            calibrated_on=len(found.clips),
            measured_on=tuple(found.measured),
            held_out=found.held_out,
            skipped={**found.skipped, **{name: copy_of(first) for name, first in self.copies.items()}},
            options={
                **{name: getattr(self.options, name) for name in chosen},
                **{k: Path(v).name for k, v in given.items()},
            },
            stages={stage: report for stage, (_, report) in stages.items()},
            accuracy=accuracy,
            versions=versions(),
            machine=f"{platform.system()} {platform.machine()}",
            embedding=embedding,
        )


def opened(folder: Path) -> Bundle:
    """A bundle that was just written: nothing is hashed again."""
    data = (folder / MANIFEST).read_bytes()
    return Bundle(folder, msgspec.json.decode(data, type=Manifest), hashlib.sha256(data).hexdigest())
