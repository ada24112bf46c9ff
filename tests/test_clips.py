"""Which clips a folder, a video or a list file gives, and in which order."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from calibration.clips import VIDEO_SUFFIXES, clips_from, distinct
from runtime.errors import CalibrationError
from runtime.video import open_source
from runtime.video.source import IMAGE_SUFFIXES

Fill = Callable[..., Path]


@pytest.fixture
def fill(random: np.random.Generator, tmp_path: Path) -> Fill:
    """Write files of random bytes below the test's folder; their folders appear."""

    def write(*names: str, root: Path = tmp_path) -> Path:
        for name in names:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(random.bytes(int(random.integers(1, 400))))
        return root

    return write


def names(path: str | Path) -> list[str]:
    return [clip.name for clip in clips_from(path)]


def refused(path: str | Path, *parts: str) -> str:
    with pytest.raises(CalibrationError) as caught:
        clips_from(path)
    text = str(caught.value)
    assert "\n" not in text and len(text) < 500, text
    assert all(part in text for part in parts), text
    return text


def test_a_folder_gives_its_videos_recursively_in_natural_order(fill: Fill) -> None:
    folder = fill("v10.mp4", "v2.MKV", "a/2.webm", "a/10.mov", "a/b/1.avi", "z.gif", "part10/x.ts", "part9/x.ts")
    expected = ["a/2.webm", "a/10.mov", "a/b/1.avi", "part9/x.ts", "part10/x.ts", "v2.MKV", "v10.mp4", "z.gif"]
    assert names(folder) == names(str(folder)) == expected
    assert [clip.path for clip in clips_from(folder)] == [folder / name for name in expected]


def test_the_order_does_not_depend_on_the_file_system(fill: Fill, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = fill("3.mp4", "1.mp4", "b/1.png", "a/1.mp4", "a/c/1.mp4", "20.mp4")
    (folder / "link").symlink_to("a/c")
    expected, listing = names(folder), Path.iterdir
    monkeypatch.setattr(Path, "iterdir", lambda self: sorted(listing(self), reverse=True))
    assert names(folder) == expected == ["1.mp4", "3.mp4", "20.mp4", "a/1.mp4", "a/c/1.mp4", "b"]


def test_a_subfolder_of_images_is_one_clip(fill: Fill) -> None:
    folder = fill("day/1.png", "day/2.JPG", "night/a.webp", "night/more/b.bmp", "night/x.mp4", "one.mp4")
    assert names(folder) == ["day", "night", "night/more", "night/x.mp4", "one.mp4"]


def test_the_folder_itself_is_a_clip_where_it_holds_images_and_no_videos(fill: Fill, tmp_path: Path) -> None:
    folder = fill("1.png", "2.png", root=tmp_path / "frames")
    assert [(clip.name, clip.path) for clip in clips_from(folder)] == [("frames", folder)]
    fill("sub/a.mp4", root=folder)
    assert names(folder) == ["frames", "sub/a.mp4"]
    fill("b.mp4", root=folder)  # now the pictures beside it are taken for thumbnails
    assert names(folder) == ["b.mp4", "sub/a.mp4"]


def test_a_clip_of_images_plays(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    for name in ("1.png", "2.jpg", "3.bmp"):
        Image.new("RGB", (8, 8), "red").save(tmp_path / "set" / name)
    (clip,) = clips_from(tmp_path)
    with open_source(clip.path) as source:
        assert source.timestamps.tolist() == [0, 1, 2]


def test_other_and_hidden_files_are_passed_over(fill: Fill) -> None:
    others = ("notes.txt", "labels.json", "README.md", "sound.wav", "noname", ".hidden.mp4", ".git/a.mp4", "d/.x.png")
    folder = fill("clip.mp4", *others)
    (folder / "folder.mp4").mkdir()
    (folder / "folder.png").mkdir()
    os.mkfifo(folder / "pipe.mp4")
    assert names(folder) == ["clip.mp4"]


def test_suffixes_of_videos_and_images_are_apart() -> None:
    assert not VIDEO_SUFFIXES & IMAGE_SUFFIXES
    assert all(suffix.startswith(".") and suffix == suffix.lower() for suffix in VIDEO_SUFFIXES)


def test_a_single_video(fill: Fill) -> None:
    path = fill("deep/one.MP4") / "deep" / "one.MP4"
    (clip,) = clips_from(path)
    assert (clip.name, clip.path) == ("one.MP4", path)


def test_links_are_followed_and_loops_end(fill: Fill, tmp_path: Path) -> None:
    outside = fill("far.mp4", root=tmp_path / "outside")
    folder = fill("a/1.mp4", "b/2.mp4", root=tmp_path / "clips")
    (folder / "a" / "self").symlink_to(".")
    (folder / "a" / "up").symlink_to("..")
    (folder / "b" / "root").symlink_to("/")
    (folder / "b" / "other").symlink_to(folder / "a")
    (folder / "0").symlink_to(folder / "b")
    (folder / "linked").symlink_to(outside)
    (outside / "back").symlink_to(folder)
    (folder / "ping").symlink_to(folder / "pong")
    (folder / "pong").symlink_to(folder / "ping")
    (folder / "z.mp4").symlink_to(outside / "far.mp4")
    assert names(folder) == ["a/1.mp4", "b/2.mp4", "linked/far.mp4", "z.mp4"]


def test_a_folder_given_by_a_link(fill: Fill, tmp_path: Path) -> None:
    fill("a.mp4", "s/1.png", root=tmp_path / "real")
    (tmp_path / "link").symlink_to("real")
    assert names(tmp_path / "link") == ["a.mp4", "s"]


def write_list(folder: Path, text: str | bytes) -> Path:
    path = folder / "list.txt"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_a_list_keeps_its_order_and_drops_comments_blanks_and_duplicates(fill: Fill) -> None:
    folder = fill("z.mp4", "b/a.mkv", "#1.mp4", "s/1.png", "s/2.png", "ü 1.mp4")
    (folder / "same.mp4").symlink_to("z.mp4")
    text = (
        "\ufeff# header\r\nz.mp4\r\n\r\n  ./b//a.mkv  \n#b.mp4\n./#1.mp4\n"
        f"same.mp4\nb/../z.mp4\ns\n{folder}/b/a.mkv\nü 1.mp4"
    )
    assert names(write_list(folder, text)) == ["z.mp4", "b/a.mkv", "#1.mp4", "s", "ü 1.mp4"]


def test_a_list_is_relative_to_its_folder(fill: Fill, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fill("a.mp4", "lists/b.mp4")
    write_list(tmp_path / "lists", "../a.mp4\nb.mp4\n")
    monkeypatch.chdir(tmp_path)
    clips = clips_from("lists/list.txt")
    assert [clip.name for clip in clips] == ["../a.mp4", "b.mp4"] and all(clip.path.is_file() for clip in clips)


def test_a_listed_folder_gives_all_its_clips(fill: Fill) -> None:
    folder = fill("x/2.mp4", "x/10.mp4", "x/s/1.png", "y.mp4")
    assert names(write_list(folder, "y.mp4\nx/10.mp4\nx\n")) == ["y.mp4", "x/10.mp4", "x/2.mp4", "x/s"]


def test_paths_that_are_no_clips(fill: Fill, tmp_path: Path) -> None:
    folder = fill("notes.md", "a.png", "sound.wav", root=tmp_path / "f")
    (tmp_path / "empty").mkdir()
    os.mkfifo(tmp_path / "pipe.mp4")
    refused(tmp_path / "absent", "absent: there is no such file", "videos (.mp4", ".png")
    refused(tmp_path / "absent.txt", "there is no such file", "a list of clips")
    refused(tmp_path / "empty", "no clips in this folder", "videos (.mp4", ".png")
    refused(folder / "a.png", "a single picture", "folders of images")
    refused(folder / "notes.md", "does not end like a video")
    refused(tmp_path / "pipe.mp4", "not a regular file")
    refused(tmp_path / ("x" * 5000 + ".mp4"), "cannot be opened", "too long")
    refused(tmp_path / "a\0b.mp4", "there is no such file")
    refused("", "is empty")


def test_a_link_to_a_video_that_is_not_there_is_named(fill: Fill) -> None:
    folder = fill("a.mp4")
    (folder / "b.mp4").symlink_to("gone.mp4")
    refused(folder, "b.mp4: is a link that leads nowhere")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("a.mp4\n\n# x\nb.mp4\n", ["line 4", "b.mp4: there is no such file"]),
        ("a.mp4\na.png", ["line 2", "a single picture"]),
        ("a.mp4\nlist.txt", ["line 2", "does not end like a video"]),
        ("a.mp4\nempty", ["line 2", "no clips in this folder"]),
        ("a.mp4\n" + "x" * 5000, ["line 2", "too long"]),
        ("# nothing\n\n", ["lists no clips"]),
        (b"", ["lists no clips"]),
        (b"a.mp4\n\xff\xfe", ["is not UTF-8"]),
        ("a.mp4\n".encode("utf-16"), ["is not UTF-8"]),
        (b"a.mp4\n\0\0", ["binary data"]),
        (b"a" * (16 * 2**20 + 1), ["16777217 bytes"]),
    ],
    ids=range(11),
)
def test_lists_that_are_refused(fill: Fill, text: str | bytes, parts: Sequence[str]) -> None:
    folder = fill("a.mp4", "a.png")
    (folder / "empty").mkdir()
    refused(write_list(folder, text), "list.txt", *parts)


def test_what_may_not_be_read_is_named(fill: Fill, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(path: Path, *_: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    folder = fill("a.mp4")
    (clip,) = clips_from(folder)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", denied)
        with pytest.raises(CalibrationError, match=r"a\.mp4 cannot be opened \(Permission denied\)"):
            clip.sha256()
    listed = write_list(folder, "a.mp4\n.")
    monkeypatch.setattr(Path, "iterdir", denied)
    refused(folder, f"{folder} cannot be opened (Permission denied)")
    refused(listed, f"line 2: {folder} cannot be opened (Permission denied)")


def test_the_hash_of_a_video_is_that_of_its_bytes(random: np.random.Generator, tmp_path: Path) -> None:
    data = random.bytes(2**21 + 17)
    (tmp_path / "a.mp4").write_bytes(data)
    (clip,) = clips_from(tmp_path)
    assert clip.sha256() == hashlib.sha256(data).hexdigest()


def test_the_hash_of_a_folder_follows_names_and_bytes_of_its_images_alone(fill: Fill, tmp_path: Path) -> None:
    folder = fill("s/1.png", "s/10.png", "s/2.png")
    (clip,) = clips_from(folder)
    seen = [clip.sha256()]
    fill("s/notes.txt", "s/.hidden.png", "s/more/3.png")
    assert clip.sha256() == seen[0]
    moved = tmp_path / "elsewhere"
    (folder / "s").rename(moved)
    (folder / "s").symlink_to(moved)
    assert clip.sha256() == seen[0]
    (moved / "2.png").rename(moved / "3.png")
    seen.append(clip.sha256())
    (moved / "1.png").write_bytes((moved / "1.png").read_bytes() + b"x")
    seen.append(clip.sha256())
    (moved / "10.png").unlink()
    assert len({*seen, clip.sha256()}) == 4


def test_copies_and_links_are_told_with_the_first_of_their_content(fill: Fill) -> None:
    folder = fill("a0.mp4", "a1.mp4", "s/1.png", "s/2.png")
    (folder / "a2.mp4").symlink_to("a0.mp4")
    (folder / "a10.mkv").write_bytes((folder / "a1.mp4").read_bytes())
    (folder / "same").mkdir()
    for image in (folder / "s").iterdir():
        (folder / "same" / image.name).write_bytes(image.read_bytes())
    found, copies = distinct(clips_from(folder))
    assert [clip.name for clip in found] == ["a0.mp4", "a1.mp4", "s"]
    assert copies == {"a2.mp4": "a0.mp4", "a10.mkv": "a1.mp4", "same": "s"}


def test_clips_of_one_size_and_of_different_content_are_no_copies(fill: Fill, random: np.random.Generator) -> None:
    folder = fill()
    for name in "ab":
        (folder / f"{name}.mp4").write_bytes(random.bytes(300))
    found, copies = distinct(clips_from(folder))
    assert len(found) == 2 and copies == {}


def test_clips_that_are_alone_in_their_size_are_not_read(
    random: np.random.Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for size in (100, 101, 102):
        (tmp_path / f"{size}.mp4").write_bytes(random.bytes(size))
    monkeypatch.delattr(Path, "open")
    assert len(distinct(clips_from(tmp_path))[0]) == 3


def test_clips_that_cannot_be_read_are_no_copies(fill: Fill, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = fill("a.mp4")
    (folder / "b.mp4").write_bytes((folder / "a.mp4").read_bytes())

    def denied(path: Path, *_: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    clips = clips_from(folder)
    monkeypatch.setattr(Path, "open", denied)
    assert distinct(clips) == (clips, {})


def test_a_clip_that_has_gone_cannot_be_hashed(fill: Fill) -> None:
    folder = fill("a.mp4")
    (clip,) = clips_from(folder)
    clip.path.unlink()
    with pytest.raises(CalibrationError, match=r"a\.mp4.*No such file"):
        clip.sha256()


def test_a_name_that_is_not_utf_8_is_escaped_and_its_file_is_found(tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"\xff\xfe.mp4")
    path.write_bytes(b"video")
    (clip,) = clips_from(tmp_path)
    assert clip.name == "\\xff\\xfe.mp4"
    assert clip.path == path and clip.sha256() == hashlib.sha256(b"video").hexdigest()


def test_a_clip_that_vanished_is_like_no_other(fill: Fill) -> None:
    clips = clips_from(fill("a.mp4", "b.mp4"))
    clips[1].path.unlink()
    assert distinct(clips) == (clips, {})
