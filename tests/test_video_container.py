"""Video files: the frames that come back are the ones asked for, whatever the container, codec or way of
seeking."""

import io
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from runtime.video import FrameChoice, choose, open_source
from runtime.video import container as container_module
from runtime.video.decode import FrameReader
from runtime.video.opening import packets_from
from tests.videos import decode_all, number_of, numbered, trimmed, turned, write_video

MANY = 120
KINDS = {
    "h264-b.mp4": {"frames": MANY},
    "long-gop.mp4": {"frames": MANY, "gop": 1000},
    "short-gop.mp4": {"frames": MANY, "gop": 10, "options": {"sc_threshold": "0"}},
    "open-gop.mp4": {
        "frames": MANY,
        "gop": 20,
        "options": {"x264-params": "open-gop=1:scenecut=0:bframes=3"},
    },
    "intra-refresh.mp4": {"frames": MANY, "gop": 20, "options": {"x264-params": "intra-refresh=1"}},
    "h265.mp4": {"codec": "libx265", "frames": 60, "options": {"x265-params": "log-level=none"}},
    "fragmented.mp4": {"frames": MANY, "muxer": {"movflags": "frag_keyframe+empty_moov"}},
    "faststart.mov": {"frames": MANY, "muxer": {"movflags": "faststart"}},
    "h264.mkv": {"frames": MANY},
    "vp9.webm": {"codec": "libvpx-vp9", "frames": 60, "options": {"deadline": "realtime", "cpu-used": "8"}},
    "h264.ts": {"frames": MANY},
    "mpeg2.ts": {"codec": "mpeg2video", "frames": MANY, "rate": 25},
    "mpeg2.mpg": {"codec": "mpeg2video", "frames": MANY, "rate": 25},
    "h264.flv": {"frames": MANY},
    "wmv2.wmv": {"codec": "wmv2", "frames": MANY},
    "mpeg4.avi": {"codec": "mpeg4", "frames": MANY},
    "h264.avi": {"frames": MANY},
    "mjpeg.avi": {"codec": "mjpeg", "frames": 60, "pixels": "yuvj420p"},
    "raw.h264": {"frames": 60},
    "ffv1-10bit.mkv": {"codec": "ffv1", "frames": 60, "pixels": "yuv420p10le"},
    "animated.gif": {"codec": "gif", "frames": 60, "pixels": "rgb8"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("videos")


@pytest.fixture(scope="module", params=KINDS)
def video(request: pytest.FixtureRequest, folder: Path) -> Path:
    options = dict(KINDS[request.param])
    codec = options.pop("codec", "libx264")
    if codec not in av.codecs_available:
        pytest.skip(f"this PyAV has no encoder {codec}")
    return write_video(folder / request.param, codec, **options)


def frames_of(path: Path, indices: list[int]) -> list[np.ndarray]:
    with open_source(path) as source:
        return [frame.copy() for frame in source.frames(np.array(indices, np.int64))]


def test_random_frames_are_those_a_sequential_decode_gives(video: Path) -> None:
    oracle = decode_all(video)
    seed = int(np.random.SeedSequence().generate_state(1)[0])
    rng = np.random.default_rng(seed)
    with open_source(video) as source:
        assert source.timestamps.size == len(oracle)
        for count in (1, 2, 3, 5, 9, 30):
            indices = np.sort(rng.integers(0, len(oracle), count))
            frames = list(source.frames(indices))
            for index, frame in zip(indices, frames, strict=True):
                assert number_of(frame) == number_of(oracle[index]) == index, f"seed {seed}, {indices}"
                np.testing.assert_array_equal(frame, oracle[index])


def test_every_frame_in_order(video: Path) -> None:
    with open_source(video) as source:
        everything = np.arange(source.timestamps.size)
        assert [number_of(frame) for frame in source.frames(everything)] == everything.tolist()


def test_the_last_frame_alone(video: Path) -> None:
    with open_source(video) as source:
        last = source.timestamps.size - 1
        (frame,) = source.frames(np.array([last]))
    assert number_of(frame) == last


def test_timestamps_start_at_zero_and_tick_at_the_frame_rate(video: Path) -> None:
    rate = KINDS[video.name].get("rate", 10)
    with open_source(video) as source:
        assert source.timestamps.dtype == np.float64
        np.testing.assert_allclose(source.timestamps, np.arange(source.timestamps.size) / rate, atol=1e-3)


def test_the_files_bytes_give_the_same_frames(video: Path) -> None:
    if video.suffix == ".h264":
        pytest.skip("a raw stream is known by its name only")
    with open_source(video.read_bytes()) as source:
        frames = list(source.frames(np.array([3, 30])))
    for frame, other in zip(frames, frames_of(video, [3, 30]), strict=True):
        np.testing.assert_array_equal(frame, other)


def test_variable_frame_rate_keeps_its_times(tmp_path: Path) -> None:
    gaps = np.random.default_rng().integers(10, 900, 49)
    pts = np.concatenate([[0], np.cumsum(gaps)])
    path = write_video(tmp_path / "vfr.mp4", frames=50, pts=pts.tolist())
    with open_source(path) as source:
        np.testing.assert_allclose(source.timestamps, pts / 1000, atol=1e-6)
        indices = choose(source.timestamps, FrameChoice(fps=2.0), minimum=1, default=8, maximum=200)
        shown = [number_of(frame) for frame in source.frames(indices)]
    expected = [int(np.searchsorted(pts, 500 * tick, side="right")) - 1 for tick in range(len(shown))]
    assert shown == expected


@pytest.mark.parametrize("name", ["late.mp4", "late.mkv", "late.ts"])
def test_a_late_start_counts_from_the_first_frame(tmp_path: Path, name: str) -> None:
    path = write_video(tmp_path / name, frames=40, pts=[5000 + 100 * i for i in range(40)])
    with open_source(path) as source:
        np.testing.assert_allclose(source.timestamps, np.arange(40) / 10, atol=1e-3)
        assert [number_of(frame) for frame in source.frames(np.array([0, 17, 39]))] == [0, 17, 39]


@pytest.mark.parametrize("start", [2048 + 50 * 1024, 2048 + 24 * 1024, 2048])
def test_an_edit_list_hides_what_it_cuts_away(tmp_path: Path, start: int) -> None:
    whole = write_video(tmp_path / "whole.mp4", frames=MANY)
    path = tmp_path / "trimmed.mp4"
    path.write_bytes(trimmed(whole.read_bytes(), start, 3000))
    first = (start - 2048) // 1024
    with open_source(path) as source:
        assert source.timestamps.size == 30
        shown = [number_of(frame) for frame in source.frames(np.array([0, 11, 29]))]
    assert shown == [first, first + 11, first + 29]


def test_a_single_frame_video(tmp_path: Path) -> None:
    path = write_video(tmp_path / "one.mp4", frames=1)
    with open_source(path) as source:
        indices = choose(source.timestamps, FrameChoice(), minimum=4, default=4, maximum=8)
        assert [number_of(frame) for frame in source.frames(indices)] == [0] * 4


def test_audio_longer_than_the_video_is_no_alarm(tmp_path: Path) -> None:
    for suffix in ("mp4", "mkv", "ts", "avi"):
        path = write_video(tmp_path / f"sound.{suffix}", frames=20, audio_seconds=6.0)
        assert [number_of(frame) for frame in frames_of(path, [0, 19])] == [0, 19]


def test_frames_cut_from_a_broadcast_before_a_keyframe_are_left_out(tmp_path: Path) -> None:
    whole = write_video(tmp_path / "whole.ts", frames=60, muxer={"mpegts_flags": "resend_headers"})
    path = tmp_path / "joined.ts"
    data = whole.read_bytes()
    path.write_bytes(data[len(data) // 188 // 3 * 188 :])
    oracle = [number_of(frame) for frame in decode_all(path)]
    with open_source(path) as source:
        everything = np.arange(source.timestamps.size)
        assert [number_of(frame) for frame in source.frames(everything)] == oracle


@pytest.mark.parametrize("pixels", ["yuv420p10le", "gray", "yuv444p", "yuva420p", "rgba64le", "gray16le", "bgra"])
def test_pixel_formats_become_rgb(tmp_path: Path, pixels: str) -> None:
    path = write_video(tmp_path / "pixels.mkv", "ffv1", frames=12, pixels=pixels)
    for index, frame in zip((2, 11), frames_of(path, [2, 11]), strict=True):
        assert frame.dtype == np.uint8 and number_of(frame) == index


@pytest.mark.parametrize("size", [(65, 49), (127, 33), (1, 1), (642, 362)])
def test_odd_sizes(tmp_path: Path, size: tuple[int, int]) -> None:
    path = write_video(tmp_path / "odd.mkv", "ffv1", frames=3, pixels="yuv444p", size=size)
    assert [frame.shape for frame in frames_of(path, [0, 2])] == [(size[1], size[0], 3)] * 2


TURNS = {
    "upright": ((1, 0, 0, 1), lambda frame: frame),
    "clockwise": ((0, 1, -1, 0), lambda frame: np.rot90(frame, -1)),
    "upside down": ((-1, 0, 0, -1), lambda frame: np.rot90(frame, 2)),
    "counterclockwise": ((0, -1, 1, 0), lambda frame: np.rot90(frame, 1)),
    "mirrored": ((-1, 0, 0, 1), lambda frame: frame[:, ::-1]),
    "flipped": ((1, 0, 0, -1), lambda frame: frame[::-1]),
    "transposed": ((0, 1, 1, 0), lambda frame: frame.transpose(1, 0, 2)),
    "anti-transposed": ((0, -1, -1, 0), lambda frame: np.rot90(frame, 2).transpose(1, 0, 2)),
}


@pytest.mark.parametrize("turn", TURNS)
def test_the_display_matrix_is_applied_as_players_do(tmp_path: Path, turn: str) -> None:
    whole = write_video(tmp_path / "whole.mp4", frames=20)
    matrix, expected = TURNS[turn]
    path = tmp_path / "turned.mp4"
    path.write_bytes(turned(whole.read_bytes(), *matrix))
    (plain,), (frame,) = frames_of(whole, [13]), frames_of(path, [13])
    np.testing.assert_array_equal(frame, expected(plain))
    with av.open(str(path)) as container:
        rotation = getattr(next(container.decode(video=0)), "rotation", None)  # since PyAV 14.2
    if rotation is not None and turn in ("clockwise", "counterclockwise"):
        np.testing.assert_array_equal(frame, np.rot90(plain, rotation // 90))


def test_repeats_yield_the_same_array_without_decoding_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_video(tmp_path / "clip.mp4", frames=30)
    calls = []
    convert = container_module.rgb_from_frame
    monkeypatch.setattr(container_module, "rgb_from_frame", lambda *given: calls.append(1) or convert(*given))
    with open_source(path) as source:
        frames = list(source.frames(np.array([4, 4, 4, 9, 9])))
    assert len(calls) == 2 and frames[0] is frames[1] is frames[2] and frames[3] is frames[4]
    assert not frames[0].flags.writeable


def test_only_the_frames_asked_for_are_converted_and_one_is_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_video(tmp_path / "clip.mp4", frames=MANY, gop=1000)
    held = []
    walk = FrameReader._walk

    def counting(self: FrameReader, key: int) -> object:
        found = walk(self, key)
        held.append(sum(frame is not None for frame in (self._shown, self._ahead)))
        return found

    monkeypatch.setattr(FrameReader, "_walk", counting)
    with open_source(path) as source:
        assert [number_of(frame) for frame in source.frames(np.array([5, 60, 119]))] == [5, 60, 119]
    assert held == [1, 1, 1]


def test_a_far_frame_is_reached_by_seeking_not_by_decoding_everything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_video(tmp_path / "clip.mp4", frames=240, gop=12)
    decoded = []
    original = FrameReader._decoded

    def counting(self: FrameReader, packets: object) -> object:
        for item in original(self, packets):
            decoded.append(item[0])
            yield item

    monkeypatch.setattr(FrameReader, "_decoded", counting)
    with open_source(path) as source:
        assert [number_of(frame) for frame in source.frames(np.array([100, 230]))] == [100, 230]
    assert len(decoded) < 40


def test_a_stream_that_appears_while_reading_is_passed_over() -> None:
    """PyAV's ``demux`` may raise IndexError then; a fresh one goes on where it stopped."""

    class Demuxing:
        def __init__(self, answers: list[list[object]]) -> None:
            self.answers = answers

        def demux(self, *streams: object) -> object:
            for packet in self.answers.pop(0):
                if packet is IndexError:
                    raise IndexError("list index out of range")
                yield packet

    container = Demuxing([["a", IndexError], [IndexError], ["b", "c"]])
    assert list(packets_from(container)) == ["a", "b", "c"]


def test_a_container_that_cannot_seek_is_walked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_video(tmp_path / "clip.mp4", frames=MANY)
    monkeypatch.setattr(FrameReader, "_land", lambda *args: None)
    starts = []
    restart = FrameReader._restart
    monkeypatch.setattr(FrameReader, "_restart", lambda self: starts.append(1) or restart(self))
    indices = [30, 60, 90, 110]
    assert [number_of(frame) for frame in frames_of(path, indices)] == indices
    assert len(starts) == 2


def test_a_file_on_disk_is_closed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_video(tmp_path / "clip.mp4", frames=20)
    opened: list[io.BufferedReader] = []
    original = Path.open
    monkeypatch.setattr(Path, "open", lambda *args: opened.append(original(*args)) or opened[-1])
    with open_source(path) as source:
        frames = source.frames(np.array([1, 2, 3]))
        next(frames)
        del frames
    assert len(opened) == 2 and all(file.closed for file in opened)


def test_names_that_look_like_protocols_or_patterns_are_plain_names(tmp_path: Path) -> None:
    for name in ("http:clip.mp4", "a:b.mp4", "frame%03d.mp4", "concat:a|b.mp4", "ünï ☃.mp4", "-"):
        path = write_video(tmp_path / "clip.mp4", frames=5).rename(tmp_path / name)
        assert number_of(frames_of(path, [4])[0]) == 4


def test_colours_survive(tmp_path: Path) -> None:
    path = tmp_path / "red.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(10))
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), (200, 40, 90), np.uint8), format="rgb24")
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    (frame,) = frames_of(path, [0])
    np.testing.assert_allclose(frame.mean((0, 1)), (200, 40, 90), atol=6)


def test_the_helper_reads_back_what_it_writes() -> None:
    assert [number_of(numbered(number, 37, 21)) for number in range(256)] == list(range(256))
