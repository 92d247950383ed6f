"""What is true of a scene, one fact each: short statements of the whole, and words for each of its objects."""

from training.data.scene_facts import Facts, Item
from training.data.scene_wording import NUMBER_WORDS, PLACE_PHRASES, plural, with_article


def state(facts: Facts) -> tuple[tuple[str, ...], ...]:
    """Every statement of our small vocabulary that is true of `facts`, a tuple for each sort of fact, none empty.

    A statement that is not among them is false of the scene, so that any two scenes can be compared by them.
    """
    if facts.kind in ("word", "small word"):
        return ((f"the word {facts.text}",), (f"{facts.text_colour} letters",), ("a word",))
    if facts.kind == "page":
        return (tuple(sorted({f"the word {written.word}" for written in facts.page})), ("a page of words",))
    if facts.kind == "digits":
        return ((f"the number {facts.text}",), (f"{facts.text_colour} digits",), ("a number",))
    if facts.kind == "chart":
        ranked = sorted(facts.bars, key=lambda bar: bar[1])
        ends = (f"the {ranked[-1][0]} bar is the tallest", f"the {ranked[0][0]} bar is the shortest")
        return ((f"a chart with {NUMBER_WORDS[len(ranked)]} bars",), ends, ("a bar chart",))
    return tuple(texts for texts in _about_objects(facts.items) if texts)


def _about_objects(items: tuple[Item, ...]) -> list[tuple[str, ...]]:
    shapes = sorted({item.shape for item in items})
    number = len(items)
    count = NUMBER_WORDS[number]
    counts = [f"{count} {'object' if number == 1 else 'objects'}"]
    if len(shapes) == 1 and number > 1:
        counts.append(f"{count} {plural(shapes[0])}")
    return [
        tuple(with_article(shape) for shape in shapes),
        tuple(sorted({f"something {item.colour}" for item in items})),
        tuple(sorted({with_article(f"{item.colour} {item.shape}") for item in items})),
        tuple(counts),
        tuple(sorted(f"{with_article(item.shape)} {_where(item)}" for item in items if item.place)),
        tuple(sorted(f"{with_article(item.size + ' ' + item.shape)}" for item in items if item.size)),
    ]


def _where(item: Item) -> str:
    return PLACE_PHRASES.get(item.place, f"in the {item.place} corner")


def name(item: Item, items: tuple[Item, ...]) -> tuple[str, ...]:
    """A word for each thing that is true of one of `items`: its shape and colour, where it stands, its size.

    The last two count: how many objects there are, in letters, and how many of them are just like it, as a digit.
    """
    alike = sum((other.shape, other.colour) == (item.shape, item.colour) for other in items)
    size = (item.size,) if item.size else ()
    return (item.shape, item.colour, *_thirds(item), *size, NUMBER_WORDS[len(items)], str(alike))


def _thirds(item: Item) -> tuple[str, ...]:
    """Left or right, top or bottom, one word each where the centre leaves the middle; else that it is there."""
    across = "left" if item.x < 0.4 else "right" if item.x > 0.6 else ""
    down = "top" if item.y < 0.4 else "bottom" if item.y > 0.6 else ""
    return tuple(filter(None, (across, down))) or ("middle",)
