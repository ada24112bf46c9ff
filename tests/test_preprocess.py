"""Frames become pixel_values exactly as the published preprocessing makes them."""

from pathlib import Path

import msgspec
import numpy as np
import pytest
from PIL import Image

from runtime.errors import VideoError
from runtime.preprocess import Preprocess, pixel_values_from_frames

GOLDEN = Path(__file__).parent / "golden"
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


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
    assert msgspec.json.decode(msgspec.json.encode(spec()), type=Preprocess) == spec()


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
        ("rescale", 0.0),
    ],
)
def test_a_bad_value_is_named(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=field):
        spec(**{field: value})
    document = {**msgspec.to_builtins(spec()), field: value}
    with pytest.raises(msgspec.ValidationError, match=field):
        msgspec.convert(document, type=Preprocess)


def test_unknown_fields_are_refused() -> None:
    with pytest.raises(msgspec.ValidationError, match="crop"):
        msgspec.convert({**msgspec.to_builtins(spec()), "crop": 1}, type=Preprocess)
