"""Frames become pixel_values exactly as the published preprocessing makes them."""

import time
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional

from runtime.errors import VideoError
from runtime.preprocess import Preprocess, pixel_values_from_frames, vision_feeds

GOLDEN = Path(__file__).parent / "golden"
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
LETTERBOX = {"fit": "letterbox", "resample": "bilinear"}
SIZES = [
    (60, 100),
    (1080, 1920),
    (10, 900),
    (900, 60),
    (1, 1),
    (3, 2),
    (56, 56),
    (55, 56),
    (57, 113),
    (719, 1279),
    (7, 500),
]


def spec(height: int = 56, width: int = 56, **changes: object) -> Preprocess:
    return Preprocess(**{"size": (height, width), **IMAGENET, **changes})  # type: ignore[arg-type]


def random_frames(*shape: int) -> np.ndarray:
    return np.random.default_rng().integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize("name", ["linvt-internvl2-a", "internvl2-qwen2-a"])
def test_golden_frames_give_the_original_codes_pixel_values(name: str) -> None:
    golden = np.load(GOLDEN / name / "expected.npz")
    values = pixel_values_from_frames(golden["frames_u8"], spec())
    difference = float(np.abs(values - golden["pixel_values"]).max())
    print(f"{name}: largest difference {difference}")
    assert values.dtype == np.float32
    np.testing.assert_array_equal(values, golden["pixel_values"])


def test_equals_the_textbook_formula_at_any_size() -> None:
    frames = random_frames(2, 91, 33, 3)
    values = pixel_values_from_frames(frames, spec(40, 64))
    for frame, value in zip(frames, values, strict=True):
        small = np.asarray(Image.fromarray(frame).resize((64, 40), Image.Resampling.BICUBIC), np.float32)
        expected = (small / 255 - np.float32(IMAGENET["mean"])) / np.float32(IMAGENET["std"])
        np.testing.assert_array_equal(value, expected.transpose(2, 0, 1))


@pytest.mark.parametrize("shape", [(90, 33), (33, 92), (50, 50), (1, 8)])
@pytest.mark.parametrize("resample", ["bicubic", "bilinear"])
def test_pad_centres_the_frame_in_a_square_of_the_fill(shape: tuple[int, int], resample: str) -> None:
    frame, fill, side = random_frames(*shape, 3), (1, 20, 255), max(shape)
    square = np.empty((side, side, 3), np.uint8)
    square[:] = fill
    top, left = (side - shape[0]) // 2, (side - shape[1]) // 2
    square[top : top + shape[0], left : left + shape[1]] = frame
    padded = pixel_values_from_frames([frame], spec(fit="pad", fill=fill, resample=resample))
    np.testing.assert_array_equal(padded, pixel_values_from_frames([square], spec(resample=resample)))


def published(frame: np.ndarray, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Molmo's ``resize_and_pad`` without norm: (H, W, 3) -> (3, height, width) f32 and where pixels are real."""
    given = [np.float32(side) for side in frame.shape[:2]]
    scale = min(np.float32(wanted) / side for wanted, side in zip(size, given, strict=True))
    height, width = (max(1, int(side * scale)) for side in given)
    planes = torch.from_numpy(frame.copy()).permute(2, 0, 1)[None].float() / 255
    small = functional.interpolate(planes, (height, width), mode="bilinear", align_corners=False, antialias=True)
    image, real = np.zeros((3, *size), np.float32), np.zeros(size, bool)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    image[:, top : top + height, left : left + width] = small[0].clip(0, 1).numpy()
    real[top : top + height, left : left + width] = True
    return image, real


@pytest.mark.parametrize("shape", SIZES)
@pytest.mark.parametrize("size", [(56, 56), (336, 336), (42, 70)])
def test_letterbox_is_the_published_resize_at_any_size(shape: tuple[int, int], size: tuple[int, int]) -> None:
    frame = random_frames(*shape, 3)
    expected, real = published(frame, size)
    feeds = vision_feeds([frame], spec(*size, **LETTERBOX, mask_patch=14))
    mean, std = (np.array(IMAGENET[name], np.float32)[:, None, None] for name in ("mean", "std"))
    difference = float(np.abs(feeds["pixel_values"][0] - (expected - mean) / std).max())
    print(f"{shape} -> {size}: largest difference {difference:.1e}")
    assert difference < 1e-5
    patches = real.reshape(size[0] // 14, 14, size[1] // 14, 14).swapaxes(1, 2).reshape(-1, 196)
    np.testing.assert_array_equal(feeds["pixel_mask"][0], patches.astype(np.float32).mean(axis=1))


@pytest.mark.parametrize(("shape", "place"), [((900, 10), np.s_[:, 27:28]), ((10, 900), np.s_[27:28])])
def test_a_side_that_would_vanish_keeps_one_pixel(shape: tuple[int, int], place: tuple[slice, ...]) -> None:
    frame, plain = random_frames(*shape, 3), {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    values = pixel_values_from_frames([frame], spec(**LETTERBOX, **plain))[0]
    for channel in range(3):  # not against PyTorch, whose resize errs where it is one pixel wide
        plane = Image.fromarray(frame[:, :, channel].astype(np.float32))
        expected = np.zeros((56, 56), np.float32)
        expected[place] = np.asarray(plane.resize(expected[place].shape[::-1], Image.Resampling.BILINEAR)) / 255
        np.testing.assert_allclose(values[channel], expected, atol=1e-5)


def test_letterboxed_frames_of_different_sizes_and_layouts_go_together() -> None:
    wide, tall = random_frames(20, 90, 3), random_frames(90, 20, 3)[::-1, ::-1]
    wide.flags.writeable = False
    together = vision_feeds([wide, tall, tall], spec(**LETTERBOX, mask_patch=14))
    alone = vision_feeds([tall.copy()], spec(**LETTERBOX, mask_patch=14))
    for name, values in together.items():
        assert values.dtype == np.float32
        np.testing.assert_array_equal(values[1], alone[name][0])
        np.testing.assert_array_equal(values[2], values[1])
    assert {name: values.shape for name, values in vision_feeds([], spec(**LETTERBOX, mask_patch=14)).items()} == {
        "pixel_values": (0, 3, 56, 56),
        "pixel_mask": (0, 16),
    }


def test_other_fits_have_no_mask() -> None:
    assert spec().mask_patches == 0 and spec(28, 56, **LETTERBOX, mask_patch=14).mask_patches == 8
    assert list(vision_feeds(random_frames(1, 20, 30, 3), spec())) == ["pixel_values"]


def test_letterbox_of_a_full_hd_frame_is_fast() -> None:
    frame, letterbox = random_frames(1080, 1920, 3), spec(336, 336, **LETTERBOX, mask_patch=14)
    vision_feeds([frame], letterbox)
    taken = []
    for _ in range(7):
        start = time.perf_counter()
        vision_feeds([frame], letterbox)
        taken.append(1e3 * (time.perf_counter() - start))
    print(f"letterbox of 1920 x 1080: {min(taken):.1f} ms")
    assert min(taken) < 100  # 7 ms on one quiet core; Pillow's float resize takes 30


def test_frames_of_different_sizes_and_layouts_go_together() -> None:
    wide, tall = random_frames(20, 90, 3), random_frames(90, 20, 3)[::-1, ::-1]
    wide.flags.writeable = False
    values = pixel_values_from_frames([wide, tall], spec())
    np.testing.assert_array_equal(values[1], pixel_values_from_frames([tall.copy()], spec())[0])


def test_an_iterator_is_consumed_one_frame_at_a_time() -> None:
    frames = list(random_frames(4, 30, 30, 3))
    values = pixel_values_from_frames(iter(frames), spec(), count=4)
    np.testing.assert_array_equal(values, pixel_values_from_frames(frames, spec()))


def test_a_repeated_frame_is_resized_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    resize = Image.Image.resize
    monkeypatch.setattr(Image.Image, "resize", lambda *args: calls.append(1) or resize(*args))
    frame = random_frames(30, 30, 3)
    values = pixel_values_from_frames([frame, frame, frame], spec())
    assert len(calls) == 1
    np.testing.assert_array_equal(values[2], values[0])


@pytest.mark.parametrize("shape", [(8, 8), (8, 8, 4), (0, 8, 3)])
def test_what_is_not_a_frame_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(VideoError, match="expected uint8"):
        pixel_values_from_frames([np.zeros(shape, np.uint8)], spec())


def test_survives_the_manifest() -> None:
    for written in (spec(), spec(fit="pad", fill=(1, 2, 3)), spec(**LETTERBOX, mask_patch=14)):
        assert msgspec.json.decode(msgspec.json.encode(written), type=Preprocess) == written


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("size", (0, 56)),
        ("size", (56, 4097)),
        ("mean", (0.5, 0.5)),
        ("std", (0.5, 0.0, 0.5)),
        ("std", (0.5, -1.0, 0.5)),
        ("resample", "nearest"),
        ("fit", "squeeze"),
        ("fill", (0, 0, 256)),
        ("fill", (-1, 0, 0)),
        ("fill", (0, 0)),
        ("mask_patch", 14),
        ("mask_patch", -1),
        ("rescale", 0.0),
    ],
)
def test_a_bad_value_is_named(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=field):
        spec(**{field: value})
    document = {**msgspec.to_builtins(spec()), field: value}
    with pytest.raises(msgspec.ValidationError, match=field):
        msgspec.convert(document, type=Preprocess)


@pytest.mark.parametrize(("field", "value"), [("resample", "bicubic"), ("mask_patch", 15), ("mask_patch", -14)])
def test_a_letterbox_is_bilinear_and_in_whole_patches(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=field):
        spec(**{**LETTERBOX, field: value})


def test_unknown_fields_are_refused() -> None:
    with pytest.raises(msgspec.ValidationError, match="crop"):
        msgspec.convert({**msgspec.to_builtins(spec()), "crop": 1}, type=Preprocess)
