"""What cannot be answered about is refused: one line that says what was found, expected and what to do."""

import os
from pathlib import Path

import av
import numpy as np
import pytest

from runtime.errors import VideoError
from runtime.video import open_source
from tests.videos import number_of, write_audio, write_video

SECONDS = 20
RATE = 10


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the same 20 s video in several containers."""
    folder = tmp_path_factory.mktemp("whole")
    noise = {"frames": SECONDS * RATE, "rate": RATE, "size": (320, 240), "options": {"qp": "4"}}
    write_video(folder / "index-last.mp4", **noise)
    write_video(folder / "index-first.mp4", **noise, muxer={"movflags": "faststart"})
    write_video(folder / "sound.mp4", **noise, muxer={"movflags": "faststart"}, audio_seconds=SECONDS)
    write_video(folder / "clip.mkv", **noise)
    write_video(folder / "sound.mkv", **noise, audio_seconds=SECONDS + 3)
    write_video(folder / "clip.webm", "libvpx-vp9", **noise | {"options": {"deadline": "realtime"}})
    write_video(folder / "clip.avi", "mjpeg", **noise | {"pixels": "yuvj420p"})
    return folder


def refusal(source: object) -> str:
    """The message with which entering or reading the middle frame is refused."""
    with pytest.raises(VideoError) as caught, open_source(source) as opened:  # type: ignore[arg-type]
        list(opened.frames(np.array([opened.timestamps.size // 2])))
    message = str(caught.value)
    assert "\n" not in message and len(message) < 300
    return message


NAMES = ["index-last.mp4", "index-first.mp4", "sound.mp4", "clip.mkv", "sound.mkv", "clip.webm", "clip.avi"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("share", [0.3, 0.5, 0.9])
def test_a_file_cut_short_says_so(whole: Path, tmp_path: Path, name: str, share: float) -> None:
    data = (whole / name).read_bytes()
    path = tmp_path / name
    path.write_bytes(data[: int(len(data) * share)])
    message = refusal(path)
    assert message.startswith(name) and "ends early" in message and "copy it again" in message
    assert "ends early" in refusal(path.read_bytes())


def test_how_much_is_there_is_told(whole: Path, tmp_path: Path) -> None:
    data = (whole / "clip.mkv").read_bytes()
    (tmp_path / "half.mkv").write_bytes(data[: len(data) // 2])
    assert "s of 20.00 s is there" in refusal(tmp_path / "half.mkv")


@pytest.mark.parametrize("name", NAMES)
def test_the_whole_file_raises_no_alarm(whole: Path, name: str) -> None:
    with open_source(whole / name) as source:
        assert source.timestamps.size == SECONDS * RATE


def test_damage_is_reported_only_by_the_frame_it_hit(tmp_path: Path) -> None:
    path = write_video(tmp_path / "clip.mp4", frames=40, gop=1, b_frames=0)
    with av.open(str(path)) as container:
        packet = list(container.demux(video=0))[25]
    data = path.read_bytes()
    damaged = data[: packet.pos] + b"\xff" * packet.size + data[packet.pos + packet.size :]
    with open_source(damaged) as source:
        assert [number_of(frame) for frame in source.frames(np.array([3, 24, 26, 39]))] == [3, 24, 26, 39]
        with pytest.raises(VideoError, match=r"the frame at 2\.500 s cannot be decoded"):
            list(source.frames(np.array([24, 25, 26])))


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts", "avi"])
def test_damaged_bytes_never_raise_anything_else(whole: Path, tmp_path: Path, suffix: str) -> None:
    rng = np.random.default_rng()
    path = write_video(tmp_path / f"clip.{suffix}", frames=30)
    data = np.frombuffer(path.read_bytes(), np.uint8)
    for _ in range(15):
        broken = data.copy()
        broken[rng.integers(0, data.size, 20)] = rng.integers(0, 256, 20)
        try:
            with open_source(broken.tobytes()) as source:
                list(source.frames(np.arange(source.timestamps.size)))
        except VideoError as error:
            assert "\n" not in str(error)


def test_an_empty_file(tmp_path: Path) -> None:
    (tmp_path / "empty.mp4").touch()
    assert "is empty (0 bytes)" in refusal(tmp_path / "empty.mp4")
    assert "is empty (0 bytes)" in refusal(b"")


def test_text_with_a_videos_name(tmp_path: Path) -> None:
    (tmp_path / "notes.mp4").write_text("This is no video.\n" * 50)
    assert "notes.mp4: is not a video" in refusal(tmp_path / "notes.mp4")
    assert "is not a video" in refusal(os.urandom(5000))


@pytest.mark.parametrize(("name", "codec"), [("sound.wav", "pcm_s16le"), ("sound.mp4", "aac"), ("a.mkv", "aac")])
def test_sound_alone(tmp_path: Path, name: str, codec: str) -> None:
    assert "holds no video, only audio" in refusal(write_audio(tmp_path / name, codec))


@pytest.mark.skipif(not hasattr(av.stream, "Disposition"), reason="PyAV before 14.2 does not mark cover pictures")
def test_a_cover_picture_is_not_a_video(tmp_path: Path) -> None:
    path = write_audio(tmp_path / "song.flac", "flac")
    data = path.read_bytes()
    picture = _png()
    block = b"".join(
        part.to_bytes(4, "big") if isinstance(part, int) else part
        for part in (3, 9, b"image/png", 0, 8, 8, 24, 0, len(picture), picture)
    )
    head = 4 + 4 + 34  # "fLaC", header and body of STREAMINFO; a PICTURE block (type 6) follows
    path.write_bytes(data[:head] + b"\x06" + len(block).to_bytes(3, "big") + block + data[head:])
    assert "holds no video" in refusal(path)


def test_a_codec_without_a_decoder(tmp_path: Path) -> None:
    path = write_video(tmp_path / "clip.mp4", frames=5)
    path.write_bytes(path.read_bytes().replace(b"avc1", b"xxxx"))
    assert "no decoder" in refusal(path)


@pytest.mark.parametrize("name", ["nowhere.mp4", "nowhere/", "http://127.0.0.1:9/clip.mp4", "a\0b.mp4", "x" * 5000])
def test_a_path_that_leads_nowhere(tmp_path: Path, name: str) -> None:
    assert "check the path" in refusal(f"{tmp_path}/{name}")


@pytest.mark.parametrize("source", ["", None, 7, ["a.mp4"]])
def test_what_is_no_source_at_all(source: object) -> None:
    assert "expected the path of a video" in refusal(source)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.mp4")
    assert "not a regular file" in refusal(tmp_path / "pipe.mp4")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_without_read_permission(tmp_path: Path) -> None:
    path = write_video(tmp_path / "clip.mp4", frames=2)
    path.chmod(0)
    assert "permissions" in refusal(path)


@pytest.mark.parametrize("name", ["list.m3u8", "list.ffconcat", "list.txt"])
def test_a_playlist_cannot_open_other_files(tmp_path: Path, name: str) -> None:
    clip = write_video(tmp_path / "clip.ts", frames=5)
    lists = {
        "m3u8": f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{clip}\n#EXT-X-ENDLIST\n",
        "ffconcat": "ffconcat version 1.0\nfile clip.ts\n",
        "txt": f"ffconcat version 1.0\nfile '{clip}'\n",
    }
    path = tmp_path / name
    path.write_text(lists[name.split(".")[1]])
    refusal(path)
    refusal(path.read_bytes())


def test_nothing_is_written_to_the_terminal(whole: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    data = (whole / "clip.mkv").read_bytes()
    (tmp_path / "half.mkv").write_bytes(data[: len(data) // 2])
    capfd.readouterr()
    refusal(tmp_path / "half.mkv")
    refusal(b"\0\0\0\x18ftypmp42" + bytes(500))
    assert capfd.readouterr() == ("", "")


def test_a_frame_too_large_is_refused_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch, whole: Path) -> None:
    monkeypatch.setattr("runtime.video.source.MAX_PIXELS", 320 * 240 - 1)
    assert "320 x 240" in refusal(whole / "clip.mkv")


def _png() -> bytes:
    import io

    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (255, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("suffix", [".txt", ".nfo", ".ans", ".mp4", ".log"])
def test_text_is_no_video_whatever_its_name(tmp_path: Path, suffix: str) -> None:
    """Of some names, ffmpeg itself draws text files as pictures."""
    path = tmp_path / f"notes{suffix}"
    path.write_text("Which digit is red?\n" * 60)
    with pytest.raises(VideoError, match="is not a video"), open_source(path):
        pass
