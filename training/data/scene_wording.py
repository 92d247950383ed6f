"""The words of generated scenes: English forms, and what one question is."""

from dataclasses import dataclass
from random import Random
from typing import Literal

QuestionKind = Literal["colour", "shape", "position", "count", "size", "word", "digits", "chart", "yes_no"]
NUMBER_WORDS = ("no", "one", "two", "three", "four", "five")
PLACE_PHRASES = {"left": "on the left", "right": "on the right", "top": "at the top", "bottom": "at the bottom"}
PLACE_PHRASES |= {"middle": "in the middle"}
OPPOSITES = {"left": "right", "right": "left", "top": "bottom", "bottom": "top"}
RELATIONS = {"left": "to the left of", "right": "to the right of", "top": "above", "bottom": "below"}


@dataclass(frozen=True)
class Question:
    """One question with its one right answer, in lower case; `choices` are the answers that its wording offers.

    `kind` is one of colour, shape, position, count, size, word, digits, chart and yes_no.
    """

    kind: str
    question: str
    answer: str
    choices: tuple[str, ...] = ()


def plural(noun: str) -> str:
    """The plural of a regular noun."""
    return noun + ("es" if noun.endswith("s") else "s")


def with_article(phrase: str) -> str:
    """A or an, by the first letter, and the phrase."""
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def yes_or_no(random: Random, when_true: str, when_false: str) -> Question:
    """Asks the true or the false wording with equal chance, so that yes and no tell nothing by themselves."""
    truth = random.random() < 0.5
    return Question("yes_no", when_true if truth else when_false, "yes" if truth else "no", ("yes", "no"))


def one_of_two(kind: str, random: Random, wording: str, right: str, wrong: str) -> Question:
    """Offers a right and a wrong answer in either order; `wording` holds {} twice."""
    offered = [right, wrong]
    random.shuffle(offered)
    return Question(kind, wording.format(*offered), right, tuple(offered))
