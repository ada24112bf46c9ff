"""Command lines: answers on stdout, one line on stderr for every refusal, documented exit codes, never a traceback."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

import runtime.inspect
import runtime.run
from runtime import VideoQA
from runtime.cli import guarded, printable
from runtime.errors import VideoError
from tests.bundles import forge, replaced
from tests.commands import Captured, refused
from tests.videos import write_audio, write_video

QUESTION = "What happens?"
REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Four seconds."""
    return str(write_video(tmp_path_factory.mktemp("clip") / "clip.mp4"))


@pytest.fixture(scope="module")
def asked(linvt_bundle: Path, clip: str) -> list[str]:
    """A command line that answers."""
    return [str(linvt_bundle), clip, QUESTION, "--max-new-tokens", "5"]


@pytest.fixture(scope="module")
def short_context(linvt_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A bundle whose LLM holds 120 tokens."""
    return str(forge(linvt_bundle, tmp_path_factory.mktemp("short") / "bundle", edit=replaced("context", 120)))


# Answers


def test_the_answer_goes_to_stdout_and_the_timings_to_stderr(asked: list[str], capfd: Captured) -> None:
    assert runtime.run.main(asked) == 0
    output, timings = capfd.readouterr()
    assert output.strip() and output.count("\n") == 1
    assert timings.count("\n") == 1 and timings.startswith("[16 frames | decode_video ")
    assert "| first token " in timings and "| 5 tokens, " in timings


def test_json_is_one_object_and_nothing_else(asked: list[str], capfd: Captured) -> None:
    assert runtime.run.main(asked) == 0
    text = capfd.readouterr().out
    assert runtime.run.main([*asked, "--json"]) == 0
    output, errors = capfd.readouterr()
    assert errors == "" and output.isascii() and output.count("\n") == 1
    content = json.loads(output)
    assert content["answer"] == text.strip()
    assert len(content["token_ids"]) == 5
    assert len(content["frame_timestamps"]) == 16
    assert content["finish_reason"] == "length"
    assert content["backend"] == "cpu"
    assert content["tokens_per_second"] > 0
    stages = ["decode_video", "preprocess", "load", "vision", "refine", "prompt", "aggregate", "prefill", "decode"]
    assert list(content["milliseconds"]) == stages
    assert content["first_token_ms"] == pytest.approx(
        sum(content["milliseconds"].values()) - content["milliseconds"]["decode"], abs=0.1
    )


def test_times_of_the_video_and_the_question_are_added(asked: list[str]) -> None:
    with VideoQA.open(asked[0]) as qa:
        video = qa.video(asked[1])
        answer = qa.ask(video, QUESTION)
    total = runtime.run.all_milliseconds(answer, video)
    assert total["load"] == video.milliseconds["load"] + answer.milliseconds["load"]
    assert total.keys() == video.milliseconds.keys() | answer.milliseconds.keys()


def test_verbose_says_what_is_used(asked: list[str], capfd: Captured) -> None:
    assert runtime.run.main([*asked, "-v", "--top-k", "3", "--seed", "1", "--json"]) == 0
    output, notes = capfd.readouterr()
    assert json.loads(output)
    assert "internvl2, backend cpu" in notes
    assert "max_new_tokens=5" in notes
    assert "without --do-sample these have no effect: top_k, seed" in notes


def test_a_question_stays_utf8_in_any_locale(asked: list[str], capfd: Captured) -> None:
    bundle, clip, _, *rest = asked
    assert runtime.run.main([bundle, clip, "Was geschieht? 什么", *rest, "--json"]) == 0
    expected = json.loads(capfd.readouterr().out)["token_ids"]
    garbled = "Was geschieht? 什么".encode().decode("ascii", "surrogateescape")  # as a C locale delivers it
    assert runtime.run.main([bundle, clip, garbled, *rest, "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["token_ids"] == expected


def test_options_choose_frames_and_generation(asked: list[str], capfd: Captured) -> None:
    chosen = ["--frames", "3", "--start", "1", "--end", "3", "--do-sample", "--seed", "3", "--temperature", "2.5"]
    answers = []
    for _ in range(2):
        assert runtime.run.main([*asked, *chosen, "--json", "--threads", "1", "--verify", "--backend", "cpu"]) == 0
        answers.append(json.loads(capfd.readouterr().out))
    assert len(answers[0]["frame_timestamps"]) == 3
    assert all(1 <= second < 3 for second in answers[0]["frame_timestamps"])
    assert answers[0]["token_ids"] == answers[1]["token_ids"]
    assert runtime.run.main([*asked, "--fps", "2", "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["frame_timestamps"] == [0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5]


# Refusals

OPTIONS = [
    ("--frames 0", 1, "0 frames asked for, the bundle takes 3 to 512"),
    ("--frames -1", 1, "-1 frames asked for"),
    ("--frames 1000000", 1, "1000000 frames asked for"),
    ("--frames abc", 2, "argument --frames: invalid int value: 'abc'"),
    ("--frames 4 --fps 1", 1, "give one of them"),
    ("--fps nan", 1, "fps is nan"),
    ("--fps 0", 1, "fps is 0"),
    ("--fps 1000", 1, "the bundle takes at most 512"),
    ("--start 99", 1, "start is 99 s but the video's last frame is at 3.900 s"),
    ("--start -1", 1, "start is -1"),
    ("--start 2 --end 1", 1, "is not before end"),
    ("--temperature 0", 1, "temperature is 0.0; expected a finite number above 0"),
    ("--temperature inf", 1, "temperature is inf"),
    ("--top-p 2", 1, "top_p is 2.0; expected a number above 0 and at most 1"),
    ("--top-k -1", 1, "top_k is -1"),
    ("--seed -1", 1, "seed is -1"),
    ("--repetition-penalty 0", 1, "repetition_penalty is 0.0"),
    ("--max-new-tokens 0", 1, "max_new_tokens is 0"),
    ("--threads 0", 1, "threads is 0, expected 1 to 1024"),
    ("--threads -3", 1, "threads is -3"),
    ("--threads 1000000", 1, "threads is 1000000"),
    ("--backend tpu", 2, "invalid choice: 'tpu'"),
    ("--nonsense", 2, "unrecognized arguments: --nonsense"),
    ("extra", 2, "unrecognized arguments: extra"),
]


@pytest.mark.parametrize(("options", "code", "said"), OPTIONS)
def test_an_option_out_of_range(asked: list[str], capfd: Captured, options: str, code: int, said: str) -> None:
    assert said in refused(capfd, [*asked, *options.split(" ")], code)


def test_cuda_where_there_is_none(asked: list[str], capfd: Captured) -> None:
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this ONNX Runtime has CUDA")
    line = refused(capfd, [*asked, "--backend", "cuda"])
    assert "needs ONNX Runtime's CUDAExecutionProvider, found" in line and "use --backend cpu" in line


def test_wrong_usage(linvt_bundle: Path, clip: str, capfd: Captured) -> None:
    assert "a VIDEO needs a QUESTION" in refused(capfd, [str(linvt_bundle), clip], 2)
    assert "a BUNDLE needs a VIDEO and a QUESTION" in refused(capfd, [str(linvt_bundle)], 2)
    assert "extra\\nline" in refused(capfd, [str(linvt_bundle), clip, QUESTION, "extra\nline"], 2)


@pytest.mark.parametrize(
    ("question", "said"),
    [
        ("", "the question is empty"),
        (" \n\t", "the question is empty"),
        ("who <|im_end|>", "holds the control token '<|im_end|>'"),
        ("<IMG_CONTEXT>", "holds the control token '<IMG_CONTEXT>'"),
        ("x" * 200_000, "200000 characters, expected at most"),
        ("Why? " * 60, "the model's context holds 120 with the answer; shorten the question"),
        (os.fsdecode(b"what \xff"), "lone surrogate"),
        ("what \ud800", "lone surrogate"),
    ],
    ids=range(8),
)
def test_a_question_that_cannot_be_asked(
    short_context: str, clip: str, capfd: Captured, question: str, said: str
) -> None:
    assert said in refused(capfd, [short_context, clip, question])


def test_videos_that_are_none(linvt_bundle: Path, tmp_path: Path, capfd: Captured) -> None:
    whole = write_video(tmp_path / "whole.mp4", frames=100).read_bytes()
    (tmp_path / "half.mp4").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "notes.mp4").write_text("no video " * 100)
    (tmp_path / "folder").mkdir()
    write_audio(tmp_path / "sound.wav", "pcm_s16le")
    expected = {
        "nowhere.mp4": "there is no such file",
        "half.mp4": "ends early",
        "empty.mp4": "is empty (0 bytes)",
        "notes.mp4": "is not a video",
        "folder": "no images in this folder",
        "sound.wav": "holds no video, only audio",
        os.fsdecode(b"\xff.mp4"): "there is no such file",
        "line\nbreak\x1b[31m.mp4": "there is no such file",
    }
    for name, said in expected.items():
        assert said in refused(capfd, [str(linvt_bundle), str(tmp_path / name), QUESTION])
    assert "the video is ''" in refused(capfd, [str(linvt_bundle), "", QUESTION])


def test_bundles_that_are_none(linvt_bundle: Path, tmp_path: Path, clip: str, capfd: Captured) -> None:
    assert "is not a bundle" in refused(capfd, [str(tmp_path), clip, QUESTION])
    damaged = forge(linvt_bundle, tmp_path / "damaged")
    data = bytearray((damaged / "vision.onnx.data").read_bytes())
    data[1000] ^= 1
    (damaged / "vision.onnx.data").write_bytes(data)
    for main, arguments in ((runtime.run.main, [clip, QUESTION]), (runtime.inspect.main, [])):
        assert "vision.onnx.data is altered" in refused(capfd, [str(damaged), *arguments], main=main)
    garbage = forge(linvt_bundle, tmp_path / "garbage", decode__onnx=b"")
    assert "failed to load decode.onnx" in refused(capfd, [str(garbage), clip, QUESTION])


# Exit codes and the terminal


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (VideoError("two\n lines"), 1, "p: two lines\n"),
        (VideoError("\x1b[31mred"), 1, "p: \\x1b[31mred\n"),
        (KeyboardInterrupt(), 130, "p: interrupted\n"),
        (MemoryError(), 1, "p: out of memory; use fewer frames or tokens\n"),
        (RecursionError(), 1, "p: out of recursion; use fewer frames or tokens\n"),
        (OSError(28, "No space left on device"), 1, "p: No space left on device; check where the output goes\n"),
        (BrokenPipeError(), 1, ""),
    ],
    ids=range(7),
)
def test_errors_become_a_line_and_a_code(
    capsys: Captured, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, line: str
) -> None:
    def command() -> int:
        raise error

    monkeypatch.setattr("runtime.cli.silence_stdout", lambda: None)
    assert guarded("p", command) == code
    assert capsys.readouterr() == ("", line)


def test_our_own_bugs_are_not_hidden() -> None:
    with pytest.raises(ZeroDivisionError):
        guarded("p", lambda: 1 // 0)


def test_a_command_leaves_signals_as_they_were_and_runs_in_any_thread() -> None:
    before = signal.getsignal(signal.SIGTERM)
    codes = [guarded("p", lambda: 0)]
    thread = threading.Thread(target=lambda: codes.append(guarded("p", lambda: 0)))
    thread.start()
    thread.join()
    assert codes == [0, 0]
    assert signal.getsignal(signal.SIGTERM) == before


def test_printable_is_one_line_without_control_characters() -> None:
    assert printable("a\nb\x1b[0m\udcff é 什么") == "a\\nb\\x1b[0m\\udcff é 什么"


def test_help_fits_a_terminal(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as done:
        runtime.run.main(["--help"])
    text = capsys.readouterr().out
    assert done.value.code == 0
    assert max(map(len, text.splitlines())) <= 80 and text.count("\n") <= 60


# A process of its own


def command(*arguments: str | bytes) -> list[str | bytes]:
    """``python -m runtime.run`` with arguments."""
    return [sys.executable, "-m", "runtime.run", *arguments]


def finished(
    arguments: list[str], environment: dict[str, str] | None = None, **options: Any
) -> subprocess.CompletedProcess[bytes]:
    """The finished process, its output as bytes."""
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "timeout": 120, "cwd": REPOSITORY} | options
    done: subprocess.CompletedProcess[bytes] = subprocess.run(
        command(*arguments), env=os.environ | (environment or {}), check=False, **options
    )
    assert b"Traceback" not in (done.stderr or b""), done.stderr.decode()
    return done


def test_a_process_answers(asked: list[str]) -> None:
    done = finished(asked)
    assert done.returncode == 0 and done.stdout.strip()
    assert done.stderr.count(b"\n") == 1


def test_a_process_refuses(asked: list[str]) -> None:
    done = finished([asked[0], asked[1], ""])
    assert (done.returncode, done.stdout) == (1, b"")
    assert done.stderr == b"linvt-run: the question is empty; ask something about the video\n"


def test_a_locale_without_the_answers_characters(asked: list[str]) -> None:
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}
    expected = finished(asked).stdout.decode("utf-8")
    assert not expected.isascii()
    assert finished(asked, plain).stdout.decode("ascii") == "".join(c if c.isascii() else "?" for c in expected)
    assert json.loads(finished([*asked, "--json"], plain).stdout)["answer"] == expected.strip()


def test_a_reader_that_leaves_early(asked: list[str]) -> None:
    with subprocess.Popen(
        command(*asked[:3], "--max-new-tokens", "2000", "--ignore-eos"),
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.read(1)
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no full device here")
@pytest.mark.parametrize("form", [[], ["--json"]])
def test_a_full_disk(asked: list[str], form: list[str]) -> None:
    with Path("/dev/full").open("wb") as full:
        done = finished([*asked, *form], stdout=full)
    assert (done.returncode, done.stderr.count(b"\n")) == (1, 1)
    assert b"No space left on device" in done.stderr


@pytest.mark.parametrize("closed", [1, 2])
def test_a_closed_output(asked: list[str], closed: int) -> None:
    words = [sys.executable, "-m", "runtime.run", *asked]
    shell = ["sh", "-c", f'exec "$@" {closed}>&-', "sh", *words]
    done = subprocess.run(shell, cwd=REPOSITORY, capture_output=True, timeout=120, check=False)
    assert done.returncode == 0
    assert b"Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("number", "code", "line"),
    [(signal.SIGINT, 130, b"linvt-run: interrupted\n"), (signal.SIGTERM, 143, b"")],
)
def test_a_signal_ends_it_quietly(asked: list[str], number: int, code: int, line: bytes) -> None:
    with subprocess.Popen(
        command(*asked[:3], "--max-new-tokens", "30000", "--ignore-eos"),
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        process.stdout.read(1)
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (code, line)
