"""``--write`` gives a folder whole or not at all: whatever ends it in between, the same command works again."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import onnx
import pytest

from export.check import main, write_graphs
from export.lower.draft import folder_draft
from runtime.bundle import Bundle
from runtime.errors import OutputError
from tests.commands import Captured, refused

ROOT = Path(__file__).parent.parent
FLOAT = ROOT / "runtime" / "demo" / "float"
STAGES = ("aggregate", "decode", "refine", "vision")
WHOLE = sorted([*(f"{stage}.onnx" for stage in STAGES), *(f"{stage}.onnx.data" for stage in STAGES)])


class Trap:
    """Raises in the place of the write with number ``at`` below ``folder``, by Python's own report of each."""

    def __init__(self, folder: Path, at: int, error: BaseException) -> None:
        self.folder, self.at, self.error = str(folder), at, error
        self.seen: list[str] = []

    def hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        """One event of ``sys.audit``."""
        changes = event in ("os.mkdir", "os.symlink", "os.rename", "os.chmod", "os.remove", "shutil.copyfile")
        if event == "open":
            changes = bool(isinstance(arguments[1], str) and set(arguments[1]) & set("wax+"))
        path = arguments[1 if event == "os.symlink" else 0] if changes else None
        if isinstance(path, str | os.PathLike) and os.fspath(path).startswith(self.folder):
            self.seen.append(event)
            if len(self.seen) == self.at + 1:
                raise self.error

    @property
    def sprung(self) -> bool:
        """Whether it has raised."""
        return len(self.seen) > self.at


TRAPS: list[Trap] = []  # a hook cannot be taken out again, so one hears for all


@pytest.fixture(scope="module", autouse=True)
def hook() -> None:
    sys.addaudithook(lambda event, arguments: TRAPS[-1].hear(event, arguments) if TRAPS else None)


@contextmanager
def trap(folder: Path, at: int, error: BaseException) -> Iterator[Trap]:
    """A trap that is set while the block runs."""
    TRAPS.append(Trap(folder, at, error))
    try:
        yield TRAPS[-1]
    finally:
        TRAPS.pop()


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def written(folder: Path) -> list[str]:
    """What a command that must work leaves in ``folder``."""
    assert main([str(FLOAT), "--tensorrt", "10.3", "--write", str(folder)]) == 0
    for stage in STAGES:
        assert onnx.load(folder / f"{stage}.onnx", load_external_data=False).graph.node
        assert (folder / f"{stage}.onnx.data").samefile(FLOAT / f"{stage}.onnx.data")
    return names_in(folder)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")], ids=repr)
@pytest.mark.parametrize("before", ["nothing", "an empty folder"])
def test_whichever_write_is_the_last_the_folder_is_as_it_was(error: BaseException, before: str, tmp_path: Path) -> None:
    target = tmp_path / "lowered" if before == "an empty folder" else tmp_path / "deep" / "lowered"
    if before == "an empty folder":
        target.mkdir()
    found, modes = sorted(tmp_path.rglob("*")), {path: path.stat().st_mode for path in FLOAT.iterdir()}
    bundle, stopped = Bundle.open(FLOAT), 0
    for at in count():
        with trap(tmp_path, at, error) as set_trap:
            try:
                write_graphs(bundle, "11.4", target)
            except (KeyboardInterrupt, OutputError) as caught:
                stopped += 1
                assert caught is error or f"cannot write {target}: No space left on device" in str(caught)
                assert sorted(tmp_path.rglob("*")) == found
                continue
        assert names_in(target) == WHOLE and names_in(target.parent) == ["lowered"]
        if not set_trap.sprung:
            break
        # It went round: a copy for a link, or a folder that was there already.
        assert isinstance(error, OSError) and set_trap.seen[at] in ("os.symlink", "os.mkdir")
        shutil.rmtree(tmp_path)
        (target if before == "an empty folder" else tmp_path).mkdir(parents=True)
    print(f"{stopped} of {at} writes stopped it")
    assert stopped >= len(WHOLE)
    assert {path: path.stat().st_mode for path in FLOAT.iterdir()} == modes


def test_the_same_command_works_after_it_was_interrupted(tmp_path: Path, capfd: Captured) -> None:
    words = [str(FLOAT), "--tensorrt", "10.3", "--write", str(tmp_path / "lowered")]
    with trap(tmp_path, 9, KeyboardInterrupt()) as set_trap:
        assert main(words) == 130
    assert set_trap.sprung and names_in(tmp_path) == []
    assert capfd.readouterr().err == "linvt-check: interrupted\n"
    assert written(tmp_path / "lowered") == WHOLE


KILLED = """
import os, sys
from pathlib import Path
from export.lower.draft import folder_draft
with folder_draft(Path(sys.argv[1])) as draft:
    (draft / "half").write_text("x")
    os.kill(os.getpid(), 9)
"""


def test_what_a_killed_process_left_goes_with_the_next(tmp_path: Path) -> None:
    target = tmp_path / "lowered"
    killed = subprocess.run([sys.executable, "-c", KILLED, str(target)], cwd=ROOT, timeout=60)
    assert killed.returncode == -9 and not target.exists()
    (draft,) = names_in(tmp_path)
    assert draft.startswith(".lowered.draft-")
    assert written(target) == WHOLE and names_in(tmp_path) == ["lowered"]


@pytest.mark.parametrize("name", ["link", "."])
def test_an_empty_folder_is_filled_where_it_is(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be a place to mount at, the working folder, or stand in a folder that is not ours."""
    (tmp_path / "real").mkdir(mode=0o750)
    (tmp_path / "link").symlink_to("real")
    before = (tmp_path / "real").stat()
    if name == ".":
        monkeypatch.chdir(tmp_path / "real")
    assert written(Path(name) if name == "." else tmp_path / name) == WHOLE
    assert names_in(tmp_path) == ["link", "real"] and (tmp_path / "link").is_symlink()
    after = (tmp_path / "real").stat()
    assert (after.st_ino, after.st_mode) == (before.st_ino, before.st_mode)


def test_nothing_that_is_there_is_replaced(tmp_path: Path, capfd: Captured) -> None:
    def refusal(folder: str) -> str:
        return refused(capfd, [str(FLOAT), "--tensorrt", "10.3", "--write", folder], main=main)

    (tmp_path / "file").write_text("kept")
    bundle = Path(shutil.copytree(FLOAT, tmp_path / "bundle"))
    found = sorted(tmp_path.rglob("*"))
    assert "file is a file; give a folder that is empty or not there" in refusal(str(tmp_path / "file"))
    assert "a folder above it is a file" in refusal(str(tmp_path / "file" / "in"))
    assert "bundle holds files; give a folder that is empty or not there" in refusal(str(bundle))
    assert sorted(tmp_path.rglob("*")) == found


def test_a_folder_that_somebody_fills_meanwhile_is_kept(tmp_path: Path) -> None:
    target = tmp_path / "lowered"
    with (
        pytest.raises(OutputError, match=r"cannot write .*lowered: Directory not empty"),
        folder_draft(target) as draft,
    ):
        (draft / "ours").touch()
        target.mkdir()
        (target / "theirs").touch()
    assert names_in(target) == ["theirs"] and names_in(tmp_path) == ["lowered"]
