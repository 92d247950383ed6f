"""Asks about the objects of a scene: colour, shape, number, position, size.

A thing is only named by what no other thing in the picture shares, so every reference has one meaning.
"""

from collections import Counter
from random import Random

from training.data.scene_facts import COLOURS, LOOKALIKE, SHAPES, Facts, Item
from training.data.scene_wording import (
    NUMBER_WORDS,
    OPPOSITES,
    PLACE_PHRASES,
    RELATIONS,
    Question,
    one_of_two,
    plural,
    with_article,
    yes_or_no,
)


def ask_shapes(facts: Facts, random: Random) -> list[Question]:
    """Questions of a scene of a few different objects; a plain one for a colour or a shape comes first."""
    items = facts.items
    questions = []
    for item in items:
        questions += _colour_questions(item, items, random) + _shape_questions(item, items, random)
    plain = [question for question in questions if not question.choices]
    first = random.choice(plain)
    questions.remove(first)
    return [first, *questions, *_total(items, random), _is_there(items, random), _is_there(items, random)]


def ask_count(facts: Facts, random: Random) -> list[Question]:
    """Questions of a scene of one to five objects, a number first; none at all is seldom asked for."""
    items = facts.items
    questions = []
    for name, number in _countable(items):
        wording = random.choice(
            ("How many {} are there?", "How many {} do you see?", "How many {} are in the picture?", "Count the {}.")
        )
        questions.append(Question("count", wording.format(name), str(number)))
    random.shuffle(questions)
    # Mixed scenes hold many single things; without this, one would be the answer to half of all counting.
    ones = [question for question in questions if question.answer == "1"]
    if len(ones) < len(questions):
        questions = [question for question in questions if question not in ones[1:]]
        questions.sort(key=lambda question: question.answer == "1")
    name, number = random.choice(_countable(items))
    wrong = random.choice([other for other in (number - 1, number + 1) if 1 <= other <= 5])
    questions.append(yes_or_no(random, _are_there(name, number), _are_there(name, wrong)))
    questions += [*_total(items, random), _is_there(items, random)]
    if random.random() < 0.15:
        colour, shape = _absent_pair(items, random)
        questions.append(Question("count", f"How many {colour} {plural(shape)} are there?", "0"))
    questions += _shared_traits(items, random)
    return questions + _compare_counts(items, random)


def ask_position(facts: Facts, random: Random) -> list[Question]:
    """Questions of a scene of one object in a clear place, or of two or three in a line; a place comes first."""
    items = facts.items
    questions = _ask_corner(items[0], random) if " " in items[0].place else _ask_places(items, random)
    if len(items) == 2:
        questions += _ask_relation(items, random)
    random.shuffle(questions)
    questions.sort(key=lambda question: question.kind == "yes_no")  # a yes or no must not come first
    item = random.choice(items)
    plain = _colour_questions(item, items, random)[:1] + _shape_questions(item, items, random)[:1]
    return [*questions, *plain, *_total(items, random), _is_there(items, random)]


def ask_size(facts: Facts, random: Random) -> list[Question]:
    """Questions of a scene of one large and one small object; a size comes first."""
    items = facts.items
    large, small = sorted(items, key=lambda item: -item.diameter)
    asked, other = random.sample(items, 2)
    name, other_name = reference(asked, items, random), reference(other, items, random)
    more, less = ("larger", "smaller") if random.random() < 0.5 else ("bigger", "smaller")
    questions = [one_of_two("size", random, f"Is the {name} {{}} or {{}}?", asked.size, other.size)]
    for item, word in ((large, more), (small, less)):
        questions.append(Question("size", f"What colour is the {word} shape?", item.colour))
        if large.shape != small.shape:
            questions.append(Question("size", f"Which shape is {word}?", item.shape))
            wrong = small if item is large else large
            questions.append(
                one_of_two("size", random, f"Which is {word}, the {{}} or the {{}}?", item.shape, wrong.shape)
            )
    random.shuffle(questions)
    right, wrong_word = (more, less) if asked is large else (less, more)
    questions += [
        yes_or_no(
            random,
            f"Is the {name} {right} than the {other_name}?",
            f"Is the {name} {wrong_word} than the {other_name}?",
        ),
        yes_or_no(random, f"Is the {name} {asked.size}?", f"Is the {name} {other.size}?"),
        _is_there(items, random),
    ]
    return questions + _colour_questions(large, items, random)[:1] + _shape_questions(small, items, random)[:1]


def reference(item: Item, items: tuple[Item, ...], random: Random) -> str | None:
    """A phrase without article that fits `item` and no other of `items`; None where there is none."""
    others = [other for other in items if other is not item]
    phrases = []
    if all(other.shape != item.shape for other in others):
        phrases.append(item.shape)
    if all(other.colour != item.colour for other in others):
        phrases.append(f"{item.colour} {random.choice(('shape', 'object'))}")
    if all((other.shape, other.colour) != (item.shape, item.colour) for other in others):
        phrases.append(f"{item.colour} {item.shape}")
    return random.choice(phrases) if phrases else None


def _absent_colour(colour: str, items: tuple[Item, ...], random: Random) -> str:
    """A colour other than `colour`: half of the time one that another item of the scene has."""
    nearby = sorted({item.colour for item in items} - {colour})
    if nearby and random.random() < 0.5:
        return random.choice(nearby)
    return random.choice([other for other in COLOURS if other != colour])


def _other_shape(shape: str, items: tuple[Item, ...], random: Random) -> str:
    """A shape that nobody takes for `shape`: half of the time one that another item of the scene has."""
    nearby = sorted({item.shape for item in items} - {shape})
    if nearby and random.random() < 0.5:
        return random.choice(nearby)
    return random.choice([other for other in SHAPES if other != shape and LOOKALIKE.get(other) != shape])


def _absent_pair(items: tuple[Item, ...], random: Random) -> tuple[str, str]:
    """A (colour, shape) that no item has, differing from one item in a single trait."""
    present = {(item.colour, item.shape) for item in items}
    while True:
        item = random.choice(items)
        if random.random() < 0.5:
            pair = (_absent_colour(item.colour, items, random), item.shape)
        else:
            pair = (item.colour, _other_shape(item.shape, items, random))
        # A red ring must not make "Is there a red circle?" a matter of opinion.
        if pair not in present and (pair[0], LOOKALIKE.get(pair[1])) not in present:
            return pair


def _is_there(items: tuple[Item, ...], random: Random) -> Question:
    item = random.choice(items)
    present, absent = f"{item.colour} {item.shape}", " ".join(_absent_pair(items, random))
    wording = random.choice(("Is there {} in the picture?", "Do you see {}?", "Is there {}?"))
    return yes_or_no(random, wording.format(with_article(present)), wording.format(with_article(absent)))


def _colour_questions(item: Item, items: tuple[Item, ...], random: Random) -> list[Question]:
    """Questions whose answer is the colour of `item`, which they name by its shape or, if it is alone, not at all."""
    if len(items) == 1:
        name = random.choice((item.shape, "shape", "object"))
    elif all(other.shape != item.shape for other in items if other is not item):
        name = item.shape
    else:
        return []
    wording = random.choice(
        (
            "What colour is the {}?",
            "What is the colour of the {}?",
            "Which colour does the {} have?",
            "What color is the {}?",
        )
    )
    wrong = _absent_colour(item.colour, items, random)
    return [
        Question("colour", wording.format(name), item.colour),
        one_of_two("colour", random, f"Is the {name} {{}} or {{}}?", item.colour, wrong),
        yes_or_no(random, f"Is the {name} {item.colour}?", f"Is the {name} {wrong}?"),
    ]


def _shape_questions(item: Item, items: tuple[Item, ...], random: Random) -> list[Question]:
    """Questions whose answer is the shape of `item`, which they name by its colour or, if it is alone, not at all."""
    if len(items) == 1:
        name = random.choice((f"{item.colour} shape", f"{item.colour} object", "shape", "object"))
        direct = ["What shape is this?", "Which shape is in the picture?", "What shape do you see?"]
    elif all(other.colour != item.colour for other in items if other is not item):
        name, direct = f"{item.colour} {random.choice(('shape', 'object'))}", []
    else:
        return []
    wrong = _other_shape(item.shape, items, random)
    if name != "shape":
        direct += [f"What shape is the {name}?", f"What is the shape of the {name}?"]
    if name == f"{item.colour} shape":
        direct.append(f"Which shape is {item.colour}?")
    right_phrase, wrong_phrase = with_article(item.shape), with_article(wrong)
    offered = [item.shape, wrong]
    random.shuffle(offered)
    either = " or ".join(with_article(shape) for shape in offered)
    return [
        Question("shape", random.choice(direct), item.shape),
        Question("shape", f"Is the {name} {either}?", item.shape, tuple(offered)),
        yes_or_no(random, f"Is the {name} {right_phrase}?", f"Is the {name} {wrong_phrase}?"),
    ]


def _total(items: tuple[Item, ...], random: Random) -> list[Question]:
    wording = random.choice(
        ("How many shapes are there?", "How many objects are in the picture?", "How many objects do you see?")
    )
    return [Question("count", wording, str(len(items)))]


def _countable(items: tuple[Item, ...]) -> list[tuple[str, int]]:
    """Names of groups of items, in the plural, with how many there are of each."""
    shapes = Counter(item.shape for item in items)
    colours = Counter(item.colour for item in items)
    pairs = Counter((item.colour, item.shape) for item in items)
    return [
        *((plural(shape), number) for shape, number in shapes.items()),
        *((f"{colour} shapes", number) for colour, number in colours.items()),
        *((f"{colour} {plural(shape)}", number) for (colour, shape), number in pairs.items()),
    ]


def _are_there(name: str, number: int) -> str:
    """Asks for exactly so many, in words; `name` is a plural that `plural` made."""
    if number > 1:
        return f"Are there exactly {NUMBER_WORDS[number]} {name}?"
    return f"Is there exactly one {name.removesuffix('es' if name.endswith('sses') else 's')}?"


def _shared_traits(items: tuple[Item, ...], random: Random) -> list[Question]:
    questions = []
    shapes, colours = {item.shape for item in items}, {item.colour for item in items}
    if len(shapes) == 1 and len(items) > 1:
        questions.append(
            Question("shape", random.choice(("What shapes are these?", "Which shape is shown?")), items[0].shape)
        )
    if len(colours) == 1 and len(items) > 1:
        name = plural(items[0].shape) if len(shapes) == 1 else "shapes"
        questions.append(Question("colour", f"What colour are the {name}?", items[0].colour))
    return questions


def _compare_counts(items: tuple[Item, ...], random: Random) -> list[Question]:
    ranked = Counter(item.shape for item in items).most_common()
    if len(ranked) != 2 or ranked[0][1] == ranked[1][1]:
        return []
    more, fewer = plural(ranked[0][0]), plural(ranked[1][0])
    return [
        yes_or_no(random, f"Are there more {more} than {fewer}?", f"Are there more {fewer} than {more}?"),
        one_of_two("count", random, "Are there more {} or more {}?", more, fewer),
    ]


def _ask_corner(item: Item, random: Random) -> list[Question]:
    """For an object in a corner: never simply where it is, because two words would both be right."""
    name = random.choice(("shape", "object", item.shape, f"{item.colour} {item.shape}"))
    vertical, horizontal = item.place.split(" ")
    questions = []
    for right in (vertical, horizontal):
        wrong = OPPOSITES[right]
        offered = [right, wrong]
        random.shuffle(offered)
        either = " or ".join(PLACE_PHRASES[place] for place in offered)
        questions.append(Question("position", f"Is the {name} {either}?", right, tuple(offered)))
        truth, lie = (f"Is the {name} {PLACE_PHRASES[place]} of the picture?" for place in (right, wrong))
        questions.append(yes_or_no(random, truth, lie))
    questions.append(Question("position", f"In which corner is the {name}?", item.place))
    return questions


def _ask_places(items: tuple[Item, ...], random: Random) -> list[Question]:
    """For objects on the left, on the right, at the top, at the bottom or in the middle."""
    questions = []
    for item in items:
        name = reference(item, items, random) if len(items) > 1 else random.choice(("shape", "object", item.shape))
        where = PLACE_PHRASES[item.place]
        wording = random.choice(
            ("Where is the {}?", "Where in the picture is the {}?", "In which part of the picture is the {}?")
        )
        questions.append(Question("position", wording.format(name), item.place))
        wrong = random.choice([place for place in PLACE_PHRASES if place != item.place])
        if item.place in OPPOSITES and random.random() < 0.5:
            wrong = OPPOSITES[item.place]
        questions.append(yes_or_no(random, f"Is the {name} {where}?", f"Is the {name} {PLACE_PHRASES[wrong]}?"))
        if len(items) > 1:
            questions.append(
                Question("position", random.choice((f"Which shape is {where}?", f"What is {where}?")), item.shape)
            )
            questions.append(Question("position", f"What colour is the shape {where}?", item.colour))
        elif item.place in OPPOSITES:
            offered = [item.place, OPPOSITES[item.place]]
            random.shuffle(offered)
            either = " or ".join(PLACE_PHRASES[place] for place in offered)
            questions.append(Question("position", f"Is the {name} {either}?", item.place, tuple(offered)))
    return questions


def _ask_relation(items: tuple[Item, ...], random: Random) -> list[Question]:
    """For two objects in a row or a column: how the one stands to the other."""
    first, second = items
    name, other_name = reference(first, items, random), reference(second, items, random)
    relation, opposite = RELATIONS[first.place], RELATIONS[OPPOSITES[first.place]]
    answer = {"left": "left", "right": "right", "top": "above", "bottom": "below"}
    offered = [first.place, OPPOSITES[first.place]]
    random.shuffle(offered)
    one, two = (RELATIONS[place] for place in offered)
    return [
        Question(
            "position",
            f"Is the {name} {one.removesuffix(' of') if one.startswith('to') else one} or {two} the {other_name}?",
            answer[first.place],
            tuple(answer[place] for place in offered),
        ),
        Question("position", f"Which shape is {relation} the {other_name}?", first.shape),
        yes_or_no(random, f"Is the {name} {relation} the {other_name}?", f"Is the {name} {opposite} the {other_name}?"),
    ]
