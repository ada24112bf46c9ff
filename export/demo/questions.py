"""Questions about a scene, in many wordings, with the one answer that is true.

Every kind of question is a table of wordings and a function from the scene to what is asked and answered.
Yes/no questions are balanced. Does not look at pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from export.demo.scenes import COLOURS, DIRECTIONS, Digit, Scene

__all__ = ["KINDS", "Question", "all_texts", "ask", "describe"]

STILL = "it does not move"
NOBODY = "none"


@dataclass(frozen=True)
class Question:
    """A question, its kind and its true answer."""

    kind: str
    text: str
    answer: str


WORDINGS: dict[str, tuple[str, ...]] = {
    "colour": (
        "What colour is the {value}?",
        "What color is the {value}?",
        "What is the colour of the digit {value}?",
        "What is the color of the {value}?",
        "Which colour does the number {value} have?",
        "Which color is the digit {value}?",
        "What colour is the number {value}?",
    ),
    "digit": (
        "Which digit is {colour}?",
        "What digit is {colour}?",
        "Which number is {colour}?",
        "What is the {colour} digit?",
        "What is the {colour} number?",
        "Which digit is the {colour} one?",
    ),
    "has colour": (
        "Is there a {colour} digit?",
        "Is there a {colour} number in the video?",
        "Is any digit {colour}?",
        "Can you see a {colour} digit?",
        "Does a {colour} digit appear?",
    ),
    "has digit": (
        "Is there a {value}?",
        "Is there a {value} in the video?",
        "Is there a digit {value}?",
        "Can you see the number {value}?",
        "Does the digit {value} appear?",
        "Do you see a {value}?",
    ),
    "count": (
        "How many digits are there?",
        "How many digits do you see?",
        "How many numbers are in the video?",
        "How many digits appear in the video?",
        "Count the digits.",
        "What is the number of digits?",
    ),
    "motion": (
        "Which way does {subject} move?",
        "Which way is {subject} moving?",
        "In which direction does {subject} move?",
        "In what direction is {subject} moving?",
        "What direction does {subject} move in?",
        "Where does {subject} go?",
        "Where is {subject} going?",
        "How does {subject} move?",
    ),
    "moves": (
        "Does {subject} move?",
        "Is {subject} moving?",
        "Is {subject} in motion?",
    ),
    "last": (
        "Which digit appears last?",
        "Which number appears last?",
        "What digit comes last?",
        "Which digit appears later?",
        "Which digit shows up last?",
    ),
    "leaves": (
        "Which digit disappears?",
        "Which number disappears?",
        "What digit vanishes?",
        "Which digit leaves?",
        "Which digit goes away?",
    ),
    "describe": (
        "What happens in the video?",
        "What happens?",
        "What is happening in this video?",
        "What do you see?",
        "What is in the video?",
        "Describe the video.",
        "Describe what you see.",
    ),
}
SUBJECTS = (
    "the {colour} digit",
    "the {colour} number",
    "the {colour} one",
    "the {value}",
    "the digit {value}",
    "the number {value}",
)
KINDS = tuple(WORDINGS)


def ask(scene: Scene, kind: str, rng: np.random.Generator, *, plain: bool = False) -> Question | None:
    """A question of a kind in a random wording; None when the scene does not allow it.

    ``plain`` keeps the wording's capital letter and question mark; else some lose them.
    """
    filled = FILL[kind](scene, rng)
    if filled is None:
        return None
    words, answer = filled
    text = str(rng.choice(WORDINGS[kind])).format(**words)
    return Question(kind, text if plain else roughen(text, rng), answer)


def roughen(text: str, rng: np.random.Generator) -> str:
    """Drop the final mark or the capital letter sometimes, as people do."""
    if rng.random() < 0.25:
        text = text[:-1]
    if rng.random() < 0.25:
        text = text[0].lower() + text[1:]
    return text


Filled = tuple[dict[str, object], str] | None


def about_colour(scene: Scene, rng: np.random.Generator) -> Filled:
    digit = any_digit(scene, rng)
    return {"value": digit.value}, digit.colour


def about_digit(scene: Scene, rng: np.random.Generator) -> Filled:
    digit = any_digit(scene, rng)
    return {"colour": digit.colour}, str(digit.value)


def about_has_colour(scene: Scene, rng: np.random.Generator) -> Filled:
    present = [digit.colour for digit in scene.digits]
    yes = rng.random() < 0.5
    return {"colour": rng.choice([c for c in COLOURS if (c in present) == yes])}, "yes" if yes else "no"


def about_has_digit(scene: Scene, rng: np.random.Generator) -> Filled:
    present = [digit.value for digit in scene.digits]
    yes = rng.random() < 0.5
    return {"value": rng.choice([v for v in range(10) if (v in present) == yes])}, "yes" if yes else "no"


def about_count(scene: Scene, rng: np.random.Generator) -> Filled:
    return {}, str(len(scene.digits))


def about_motion(scene: Scene, rng: np.random.Generator) -> Filled:
    digit = any_digit(scene, rng)
    return {"subject": subject(digit, rng)}, STILL if digit.direction == "still" else digit.direction


def about_moves(scene: Scene, rng: np.random.Generator) -> Filled:
    moves = rng.random() < 0.5
    fitting = [digit for digit in scene.digits if (digit.direction != "still") == moves]
    if not fitting:
        return None
    digit = fitting[int(rng.integers(len(fitting)))]
    return {"subject": subject(digit, rng)}, "yes" if moves else "no"


def about_last(scene: Scene, rng: np.random.Generator) -> Filled:
    return named([digit for digit in scene.digits if digit.late], rng)


def about_leaves(scene: Scene, rng: np.random.Generator) -> Filled:
    return named([digit for digit in scene.digits if digit.gone], rng)


def about_describe(scene: Scene, rng: np.random.Generator) -> Filled:
    return {}, describe(scene)


FILL: dict[str, Callable[[Scene, np.random.Generator], Filled]] = {
    "colour": about_colour,
    "digit": about_digit,
    "has colour": about_has_colour,
    "has digit": about_has_digit,
    "count": about_count,
    "motion": about_motion,
    "moves": about_moves,
    "last": about_last,
    "leaves": about_leaves,
    "describe": about_describe,
}


def named(digits: list[Digit], rng: np.random.Generator) -> Filled:
    """The one digit that did it; where none did, "none" is asked for in a third of the cases."""
    if digits:
        return {}, str(digits[0].value)
    return ({}, NOBODY) if rng.random() < 0.33 else None


def describe(scene: Scene) -> str:
    """One clause per digit, smallest digit first."""
    return ", ".join(clause(digit) for digit in sorted(scene.digits, key=lambda digit: digit.value))


def clause(digit: Digit) -> str:
    """Such as "a red 3 moves left"."""
    action = "stays still" if digit.direction == "still" else f"moves {digit.direction}"
    return f"a {digit.colour} {digit.value} {action}"


def any_digit(scene: Scene, rng: np.random.Generator) -> Digit:
    """A random digit of the scene."""
    return scene.digits[int(rng.integers(len(scene.digits)))]


def subject(digit: Digit, rng: np.random.Generator) -> str:
    """A way to refer to a digit."""
    return str(rng.choice(SUBJECTS)).format(colour=digit.colour, value=digit.value)


def all_texts() -> Iterator[str]:
    """Every wording with every filling, and every short answer: what the tokenizer is trained on."""
    for wording in (wording for wordings in WORDINGS.values() for wording in wordings):
        for colour in COLOURS:
            for value in range(10):
                subjects = SUBJECTS if "{subject}" in wording else ("",)
                for name in subjects:
                    filled = name.format(colour=colour, value=value)
                    text = wording.format(colour=colour, value=value, subject=filled)
                    yield text
                    yield text[0].lower() + text[1:]
    for direction in DIRECTIONS:
        for colour in COLOURS:
            yield from (colour, direction, STILL, NOBODY, "yes", "no")
            yield f"a {colour} 3 moves {direction}, a {colour} 5 stays still"
