"""Describes the facts of a scene in two true sentences of differing wording."""

from collections import Counter
from random import Random

from training.data.scene_facts import Facts, Item
from training.data.scene_wording import NUMBER_WORDS, PLACE_PHRASES, RELATIONS, plural, with_article


def describe(facts: Facts, random: Random) -> tuple[str, str]:
    """Two captions, in lower case and without a full stop."""
    if facts.kind in ("word", "small word"):
        subject, tint = f"the word {facts.text}", f"in {facts.text_colour} letters"
    elif facts.kind == "digits":
        subject, tint = f"the number {facts.text}", f"in {facts.text_colour}"
    elif facts.kind == "page":
        subject, tint = f"the words {joined([written.word for written in facts.page])}", "in small letters"
    else:
        wordings = _chart(facts, random) if facts.kind == "chart" else _objects(facts, random)
        first, second = random.sample(wordings, 2)
        return first, second
    ground = f"on {with_article(facts.background)} background"
    first, second = random.sample(
        [f"{subject} {tint} {ground}", f"{subject} {tint}", f"{subject} {ground}", f"a picture of {subject} {tint}"], 2
    )
    return first, second


def _chart(facts: Facts, random: Random) -> list[str]:
    ranked = sorted(facts.bars, key=lambda bar: bar[1])
    tallest, shortest = ranked[-1][0], ranked[0][0]
    number = NUMBER_WORDS[len(ranked)]
    bars = joined([f"{with_article(colour)} bar" for colour, _ in facts.bars])
    return [
        f"a bar chart with {number} bars; the {tallest} bar is the tallest",
        f"a bar chart with {number} bars; the {shortest} bar is the shortest",
        f"a bar chart with {bars}",
        f"a bar chart with {bars}; the {tallest} bar is the tallest",
    ]


def _objects(facts: Facts, random: Random) -> list[str]:
    items = facts.items
    ground = f"on {with_article(facts.background)} background"
    listed = _listed(items)
    verb = "is" if len(items) == 1 else "are"
    wordings = [listed, f"{listed} {ground}", f"a picture of {listed}"]
    if facts.kind != "size":
        wordings.append(f"there {verb} {listed} {ground}")
    related = _related(items)
    if related:
        wordings = [related, f"{related} {ground}", wordings[1]]
    return wordings


def _listed(items: tuple[Item, ...]) -> str:
    """Groups what is alike: two red circles and a blue square."""
    names = Counter(f"{item.size} {item.colour} {item.shape}".strip() for item in items)
    return joined(
        [
            with_article(name) if number == 1 else f"{NUMBER_WORDS[number]} {plural(name)}"
            for name, number in names.items()
        ]
    )


def _related(items: tuple[Item, ...]) -> str | None:
    """Says where things are, if that is clear in this scene."""
    names: dict[str, str] = {item.place: with_article(f"{item.colour} {item.shape}") for item in items if item.place}
    if not names:
        return None
    if len(items) == 2:
        first, second = items
        return f"{names[first.place]} {RELATIONS[first.place]} {names[second.place]}"
    if " " in items[0].place:
        return f"{names[items[0].place]} in the {items[0].place} corner"
    return joined([f"{name} {PLACE_PHRASES[place]}" for place, name in names.items()])


def joined(phrases: list[str]) -> str:
    """Joins phrases as English does: a, b and c."""
    return " and ".join(filter(None, [", ".join(phrases[:-1]), phrases[-1]]))
