"""Asks about the facts of a scene: only what the picture alone answers, in one way."""

from collections.abc import Callable
from random import Random

from training.data.scene_facts import COLOURS, SMALL_WORDS, WORDS, Facts
from training.data.scene_object_questions import ask_count, ask_position, ask_shapes, ask_size
from training.data.scene_wording import Question, one_of_two, with_article, yes_or_no


def ask(facts: Facts, random: Random) -> tuple[Question, ...]:
    """Four to eight questions. The first is what this kind of scene is for; no wording occurs twice."""
    askers: dict[str, Callable[[Facts, Random], list[Question]]] = {
        "shapes": ask_shapes,
        "small shape": ask_shapes,
        "count": ask_count,
        "position": ask_position,
        "size": ask_size,
        "word": _ask_word,
        "small word": _ask_word,
        "page": _ask_page,
        "digits": _ask_digits,
        "chart": _ask_chart,
    }
    # The first question of an asker states the point of its scene and stays; the others are drawn.
    main, *others = askers[facts.kind](facts, random)
    others += _ask_background(facts, random)
    random.shuffle(others)
    unlike: dict[str, Question] = {}
    for question in [main, *others]:
        unlike.setdefault(question.question, question)
    return tuple(list(unlike.values())[: random.randint(4, 8)])


def _ask_word(facts: Facts, random: Random) -> list[Question]:
    word = facts.text
    wording = random.choice(("What word is this?", "What word is written here?", "What does it say?", "Read the word."))
    known = SMALL_WORDS if facts.text_height else WORDS
    wrong = random.choice([other for other in known if other != word])
    return [
        Question("word", wording, word),
        yes_or_no(random, f"Does it say {word}?", f"Does it say {wrong}?"),
        one_of_two("word", random, "Is the word {} or {}?", word, wrong),
        Question(
            "word", random.choice(("What is the first letter?", "With which letter does the word begin?")), word[0]
        ),
        *_text_colour(facts, random, "letters"),
    ]


def _ask_page(facts: Facts, random: Random) -> list[Question]:
    """For each word by its place; none of them tells another one."""
    wordings = ("What word is at the {}?", "Which word is written at the {}?", "Read the word at the {}.")
    questions = []
    for written in random.sample(facts.page, len(facts.page)):
        wording = random.choice(wordings)
        questions.append(Question("word", wording.format(written.place), written.word))
    return questions


def _text_colour(facts: Facts, random: Random, noun: str) -> list[Question]:
    colour = facts.text_colour
    wrong = random.choice([other for other in COLOURS if other != colour])
    return [
        Question("colour", random.choice((f"What colour are the {noun}?", "What colour is the writing?")), colour),
        yes_or_no(random, f"Are the {noun} {colour}?", f"Are the {noun} {wrong}?"),
        one_of_two("colour", random, f"Are the {noun} {{}} or {{}}?", colour, wrong),
    ]


def _ask_digits(facts: Facts, random: Random) -> list[Question]:
    number = facts.text
    wording = random.choice(
        ("What number is this?", "Which number is shown?", "What number do you see?", "Read the number.")
    )
    position = random.randrange(len(number))
    digit = random.choice([other for other in "123456789" if other != number[position]])
    wrong = number[:position] + digit + number[position + 1 :]
    return [
        Question("digits", wording, number),
        yes_or_no(random, f"Is this the number {number}?", f"Is this the number {wrong}?"),
        one_of_two("digits", random, "Is the number {} or {}?", number, wrong),
        Question("digits", "What is the last digit?", number[-1]),
        Question("digits", "What is the first digit?", number[0]),
        *_text_colour(facts, random, "digits" if len(number) > 1 else "digit")[: 3 if len(number) > 1 else 0],
    ]


def _ask_chart(facts: Facts, random: Random) -> list[Question]:
    ranked = sorted(facts.bars, key=lambda bar: bar[1])
    shortest, tallest = ranked[0], ranked[-1]
    questions = [
        Question("chart", random.choice(("Which bar is the tallest?", "What colour is the tallest bar?")), tallest[0]),
        Question(
            "chart", random.choice(("Which bar is the shortest?", "What colour is the shortest bar?")), shortest[0]
        ),
        Question("chart", "Which colour has the highest value?", tallest[0]),
        Question("chart", "How many bars are there?", str(len(ranked))),
    ]
    for colour, height in random.sample(ranked, 2):
        wording = random.choice(
            ("What is the value of the {} bar?", "How high is the {} bar?", "Which value does the {} bar have?")
        )
        questions.append(Question("chart", wording.format(colour), str(height)))
    random.shuffle(questions)
    (colour, height), (other, other_height) = random.sample(ranked, 2)
    right, wrong = ("taller", "shorter") if height > other_height else ("shorter", "taller")
    questions.append(
        yes_or_no(
            random,
            f"Is the {colour} bar {right} than the {other} bar?",
            f"Is the {colour} bar {wrong} than the {other} bar?",
        )
    )
    absent = random.choice([name for name in COLOURS if name not in {bar[0] for bar in ranked}])
    questions.append(
        yes_or_no(random, f"Is there {with_article(colour)} bar?", f"Is there {with_article(absent)} bar?")
    )
    return questions


def _ask_background(facts: Facts, random: Random) -> list[Question]:
    if random.random() < 0.6:
        return []
    wording = random.choice(("What colour is the background?", "Which colour is the background?"))
    return [Question("colour", wording, facts.background)]
