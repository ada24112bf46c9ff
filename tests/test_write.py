"""A bundle appears whole or not at all, and replaces nothing but a bundle."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from calibration import write
from calibration.write import bundle_draft, file_specs, replace_file, written
from runtime.errors import OutputError

ROOT = Path(__file__).parents[1]
MANIFEST = json.dumps({"format": "linvt-bundle", "format_version": 1})
NO_PROCESS = 2**22 + 1  # above Linux's largest process number


def fill(draft: Path, content: str = "new") -> None:
    (draft / "bundle.json").write_text(MANIFEST)
    (draft / "content").write_text(content)


def bundle_at(target: Path, content: str = "old") -> Path:
    with bundle_draft(target, force=False) as draft:
        fill(draft, content)
    return target


def content_of(target: Path) -> str:
    return (target / "content").read_text()


def refusal(target: Path, *, force: bool = False) -> str:
    with pytest.raises(OutputError) as caught, bundle_draft(target, force=force) as draft:
        fill(draft)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- where it may be written


@pytest.mark.parametrize("name", ["bundle", "with space", "mit-Ümläut-和-🎬", "a[1]*?", "-dash", ".hidden"])
def test_a_bundle_takes_its_name_and_leaves_nothing_else(tmp_path: Path, name: str) -> None:
    bundle_at(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert content_of(tmp_path / name) == "old"


def test_relative_paths_and_trailing_slashes_are_the_same_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    bundle_at(Path("one"))
    bundle_at(Path("./deep/er/two/"))
    (tmp_path / "inside").mkdir()
    monkeypatch.chdir(tmp_path / "inside")
    bundle_at(Path("../three"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deep", "inside", "one", "three"]
    assert content_of(tmp_path / "deep" / "er" / "two") == "old"


def test_everybody_may_read_a_bundle_as_the_umask_allows(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with bundle_draft(tmp_path / "bundle", force=False) as draft:
            fill(draft)
            (draft / "content").chmod(0o600)
    finally:
        os.umask(before)
    assert (tmp_path / "bundle").stat().st_mode & 0o777 == 0o750
    assert (tmp_path / "bundle" / "content").stat().st_mode & 0o777 == 0o640


def test_what_exists_is_left_alone_without_force(tmp_path: Path) -> None:
    target = bundle_at(tmp_path / "bundle")
    assert "exists; choose another --output or give --force" in refusal(target)
    assert content_of(target) == "old"
    for name, make in {"empty": Path.mkdir, "file": Path.touch}.items():
        make(tmp_path / name)
        assert "exists" in refusal(tmp_path / name)


def test_the_working_folder_exists_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in (".", "", "./", "..", "/"):
        assert "exists" in refusal(Path(name))


def test_force_replaces_a_bundle_and_an_empty_folder(tmp_path: Path) -> None:
    target = bundle_at(tmp_path / "bundle")
    (tmp_path / "empty").mkdir()
    for path in (target, tmp_path / "empty", tmp_path / "new"):
        with bundle_draft(path, force=True) as draft:
            fill(draft)
            assert not path.exists() or path != target or content_of(path) == "old"
        assert content_of(path) == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "empty", "new"]


def test_force_replaces_nothing_but_a_bundle(tmp_path: Path) -> None:
    for name, manifest in {"none": None, "other": '{"format": "webpack"}', "broken": '{"format": "li'}.items():
        folder = tmp_path / name
        folder.mkdir()
        (folder / "thesis.tex").write_text("years of work")
        if manifest:
            (folder / "bundle.json").write_text(manifest)
        assert "is not a bundle; --force replaces bundles only" in refusal(folder, force=True)
        assert (folder / "thesis.tex").read_text() == "years of work"
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(bundle_at(tmp_path / "bundle"))
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for name in ("file", "link", "dangling"):
        assert "is not a bundle" in refusal(tmp_path / name, force=True)
    assert content_of(tmp_path / "bundle") == "old"
    for name in ("/", ".."):
        assert "is not a bundle" in refusal(Path(name), force=True)


def test_a_parent_that_is_a_file_or_closed_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("x")
    for target in (tmp_path / "file" / "bundle", tmp_path / "file" / "deep" / "bundle"):
        line = refusal(target)
        assert f"cannot write {target}: " in line and "a folder above it is a file, choose another place" in line
    assert "cannot write" in refusal(tmp_path / ("n" * 300))
    closed = Path("/proc/self/bundle")  # no one, not even root, makes a folder there
    assert "cannot write" in refusal(closed) and "choose" in refusal(closed)


def test_somebody_who_was_faster_is_not_overwritten(tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    with pytest.raises(OutputError, match="exists"), bundle_draft(target, force=False) as draft:
        fill(draft)
        bundle_at(target, "faster")
    assert content_of(target) == "faster"
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


# --- what ends it early


def test_what_is_no_full_disk_is_not_called_one(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    with pytest.raises(OutputError, match="are the same file; choose another place"), written(tmp_path):
        shutil.copy(tmp_path / "a", tmp_path / "a")


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), OSError("10 requested, 3 written")]
)
def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path, error: OSError) -> None:
    with (
        pytest.raises(OutputError, match=r"cannot write .*(No space left.*|3 written); free some of the disk"),
        bundle_draft(tmp_path / "deep" / "bundle", force=False) as draft,
    ):
        fill(draft)
        raise error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(143), MemoryError(), OutputError("x")])
@pytest.mark.parametrize("force", [False, True])
def test_whatever_ends_it_the_target_is_as_it_was(tmp_path: Path, error: BaseException, force: bool) -> None:
    target = tmp_path / "new" / "bundle"
    if force:
        bundle_at(target)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(type(error)), bundle_draft(target, force=force) as draft:
        fill(draft)
        raise error
    assert sorted(tmp_path.rglob("*")) == before


def test_where_two_paths_cannot_change_places_the_old_bundle_leaves_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(write, "exchanged", lambda first, second: False)
    target = bundle_at(tmp_path / "bundle")
    with bundle_draft(target, force=True) as draft:
        fill(draft)
    assert content_of(target) == "new"
    rename = Path.rename

    def failing(path: Path, to: Path) -> Path:
        if to == target and "-old" not in path.name:
            raise OSError(errno.EIO, "I/O error")
        return rename(path, to)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OutputError, match="I/O error"), bundle_draft(target, force=True) as draft:
        fill(draft, "never")
    assert content_of(target) == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


WRITER = """
import sys, time
from pathlib import Path
from calibration.write import bundle_draft
from runtime.cli import guarded

def command():
    with bundle_draft(Path(sys.argv[1]), force=True) as draft:
        (draft / "bundle.json").write_text(sys.argv[2])
        print("ready", flush=True)
        time.sleep(60)
    return 0

sys.exit(guarded("writer", command))
"""


def writer_ended_by(number: signal.Signals, target: Path) -> tuple[int, str]:
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(target), MANIFEST],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stdout and process.stdout.readline() == "ready\n"
    process.send_signal(number)
    _, said = process.communicate(timeout=30)
    return process.returncode, said


def test_signals_leave_the_old_bundle_and_no_draft(tmp_path: Path) -> None:
    target = bundle_at(tmp_path / "bundle")
    assert writer_ended_by(signal.SIGINT, target) == (130, "writer: interrupted\n")
    code, said = writer_ended_by(signal.SIGTERM, target)
    assert code == 143 and "Traceback" not in said
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
    assert content_of(target) == "old"


def test_the_draft_of_a_killed_process_goes_with_the_next_export(tmp_path: Path) -> None:
    target = bundle_at(tmp_path / "bundle")
    assert writer_ended_by(signal.SIGKILL, target)[0] == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 2
    assert content_of(target) == "old"
    with bundle_draft(target, force=True) as draft:
        fill(draft)
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_drafts_of_living_processes_and_of_other_bundles_stay(tmp_path: Path) -> None:
    names = [
        f".bundle.draft-{os.getpid()}-aa",
        ".bundle.draft-1-aa",  # somebody else's process
        f".other.draft-{NO_PROCESS}-aa",
        ".bundle.draft-mine",
    ]
    gone = [f".bundle.draft-{NO_PROCESS}-aa", ".bundle.draft-99999999999999999999-aa"]
    for name in names + gone:
        (tmp_path / name).mkdir()
    bundle_at(tmp_path / "bundle")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*names, "bundle"])


# --- single files


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "evidence.json"
    replace_file(path, b"old")

    def full(path: Path, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OutputError, match="No space left"):
        replace_file(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_every_file_is_listed_with_its_size_and_hash(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b").write_bytes(b"abc")
    (tmp_path / "a").touch()
    specs = file_specs(tmp_path)
    assert {name: spec.size for name, spec in specs.items()} == {"a": 0, "sub/b": 3}
    assert specs["sub/b"].sha256 == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
