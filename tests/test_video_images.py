"""Pictures and arrays as videos."""

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from runtime.errors import VideoError
from runtime.video import FrameChoice, choose, open_source
from tests.videos import number_of, numbered


def save(path: Path, number: int, **options: object) -> Path:
    Image.fromarray(numbered(number)).save(path, **options)
    return path


def all_frames(source: object) -> list[np.ndarray]:
    with open_source(source) as opened:  # type: ignore[arg-type]
        return list(opened.frames(np.arange(opened.timestamps.size)))


def test_a_folder_plays_in_natural_order(tmp_path: Path) -> None:
    for number in (10, 2, 1, 33, 100):
        save(tmp_path / f"img{number}.png", number)
    assert [number_of(frame) for frame in all_frames(tmp_path)] == [1, 2, 10, 33, 100]


def test_natural_order_of_mixed_names(tmp_path: Path) -> None:
    names = ["1.png", "02.png", "a.png", "a2b1.png", "a2b10.png", "a10b1.png", "B3.png"]
    for number, name in enumerate(names):
        save(tmp_path / name, number)
    assert [number_of(frame) for frame in all_frames(tmp_path)] == list(range(len(names)))


def test_one_image_is_one_second(tmp_path: Path) -> None:
    for number in range(6):
        save(tmp_path / f"{number}.png", number)
    with open_source(tmp_path) as source:
        assert source.timestamps.tolist() == [0, 1, 2, 3, 4, 5]
        indices = choose(source.timestamps, FrameChoice(fps=0.5), minimum=1, default=4, maximum=8)
        assert [number_of(frame) for frame in source.frames(indices)] == [0, 2, 4]


def test_what_is_not_a_picture_is_passed_over(tmp_path: Path) -> None:
    save(tmp_path / "a.PNG", 1)
    save(tmp_path / ".hidden.png", 2)
    (tmp_path / "notes.txt").write_text("text")
    (tmp_path / "folder.png").mkdir()
    assert [number_of(frame) for frame in all_frames(tmp_path)] == [1]


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "webp", "tif", "ppm"])
def test_a_single_picture_by_path_and_by_bytes(tmp_path: Path, suffix: str) -> None:
    path = save(tmp_path / f"one.{suffix}", 77)
    assert [number_of(frame) for frame in all_frames(path)] == [77]
    assert [number_of(frame) for frame in all_frames(path.read_bytes())] == [77]
    assert [number_of(frame) for frame in all_frames(bytearray(path.read_bytes()))] == [77]


def test_sizes_may_differ(tmp_path: Path) -> None:
    Image.new("RGB", (30, 20)).save(tmp_path / "1.png")
    Image.new("RGB", (7, 90)).save(tmp_path / "2.png")
    assert [frame.shape for frame in all_frames(tmp_path)] == [(20, 30, 3), (90, 7, 3)]


@pytest.mark.parametrize(
    ("orientation", "upright"),
    [(1, 0), (3, 2), (6, -1), (8, 1)],
    ids=["as is", "180", "clockwise", "counter"],
)
def test_exif_orientation_is_applied(tmp_path: Path, orientation: int, upright: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(tmp_path / "phone.png", 90, exif=exif)
    (frame,) = all_frames(path)
    np.testing.assert_array_equal(frame, np.rot90(numbered(90), upright))


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "CMYK", "1", "I;16"])
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    image = Image.fromarray(numbered(45))
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    else:
        image = image.convert(mode, dither=Image.Dither.NONE)
    image.save(tmp_path / ("x.tif" if mode == "CMYK" else "x.png"))
    (frame,) = all_frames(tmp_path)
    assert frame.dtype == np.uint8 and frame.shape == (48, 64, 3) and number_of(frame) == 45


def refused(source: object, message: str) -> None:
    with pytest.raises(VideoError, match=message) as caught:
        all_frames(source)
    assert "\n" not in str(caught.value)


def test_a_folder_without_pictures(tmp_path: Path) -> None:
    (tmp_path / "clip.txt").touch()
    refused(tmp_path, "no images in this folder")


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp", "tif"])
def test_a_truncated_picture_names_itself(tmp_path: Path, suffix: str) -> None:
    noise = np.random.default_rng().integers(0, 256, (200, 200, 3), dtype=np.uint8)
    path = tmp_path / f"cut.{suffix}"
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    refused(path, f"cut.{suffix}: ")


def test_a_text_with_a_pictures_name(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("no picture")
    refused(tmp_path / "a.png", "a.png: is not an image")


def test_a_decompression_bomb(tmp_path: Path) -> None:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 50000, 50000, 8, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
    (tmp_path / "bomb.png").write_bytes(data)
    refused(tmp_path / "bomb.png", "too large")
    refused(data, "too large")


@pytest.mark.parametrize("suffix", ["webp", "png"])
def test_an_animation_is_not_cut_down_to_one_frame_in_silence(tmp_path: Path, suffix: str) -> None:
    frames = [Image.fromarray(numbered(number)) for number in range(3)]
    frames[0].save(tmp_path / f"moving.{suffix}", save_all=True, append_images=frames[1:])
    refused(tmp_path / f"moving.{suffix}", "animated")


def test_an_array_is_a_video() -> None:
    array = np.stack([numbered(number) for number in range(5)])
    with open_source(array) as source:
        assert source.timestamps.tolist() == [0, 1, 2, 3, 4]
        frames = list(source.frames(np.array([1, 1, 4])))
    assert [number_of(frame) for frame in frames] == [1, 1, 4]
    assert array.flags.writeable and not frames[0].flags.writeable


@pytest.mark.parametrize(
    ("dtype", "shape"),
    [
        ("float32", (2, 4, 4, 3)),
        ("uint8", (4, 4, 3)),
        ("uint8", (2, 3, 4, 4)),
        ("uint8", (0, 4, 4, 3)),
        ("uint8", (2, 0, 4, 3)),
        ("uint8", (2, 4, 4, 4)),
    ],
)
def test_other_arrays_are_refused(dtype: str, shape: tuple[int, ...]) -> None:
    refused(np.zeros(shape, dtype), r"expected uint8 \(T, H, W, 3\)")
