"""The part of a tower's page that tells of retrieval: what pictures and texts found of each other."""

from collections.abc import Sequence
from xml.etree.ElementTree import Element

from training.evaluation.markup import element
from training.evaluation.measures import PICTURE_TO_TEXT, TEXT_TO_PICTURE, Retrieved
from training.evaluation.page_labels import marked, shown
from training.evaluation.picks import spread
from training.evaluation.picture_data import PictureData

QUERIES = 4  # hits, and as many misses, of each direction
TEXTS, PICTURES = 3, 5  # nearest ones that are shown of each


def said_of_retrieval(data: PictureData, found: Retrieved) -> Element:
    """Hits and misses of both directions."""
    return element(
        "section",
        element("h2", "Found by one another"),
        element(
            "p",
            f"Among {len(found.pictures)} pictures and {len(found.said)} texts. A hit has a right one in the first "
            "place. Evenly spread over the data, not picked by hand.",
            class_="soft",
        ),
        *_direction(data, found, PICTURE_TO_TEXT),
        *_direction(data, found, TEXT_TO_PICTURE),
    )


def _direction(data: PictureData, found: Retrieved, direction: str) -> list[Element]:
    ranks = found.ranks[direction].tolist()
    hits = [query for query, rank in enumerate(ranks) if rank == 0]
    misses = [query for query, rank in enumerate(ranks) if rank]
    show = _picture if direction == PICTURE_TO_TEXT else _text
    parts = []
    for name, queries in (("hits", hits), ("misses", misses)):
        if queries:
            title = f"{direction[0].upper()}{direction[1:]}: {name}, {len(queries)} of {len(ranks)}"
            parts.append(element("h3", title))
            parts.append(element("div", *(show(data, found, query) for query in spread(queries, QUERIES))))
    return parts


def _nearest(likeness: Sequence[float], count: int) -> list[int]:
    return sorted(range(len(likeness)), key=lambda place: -likeness[place])[:count]


def _picture(data: PictureData, found: Retrieved, query: int) -> Element:
    """A picture and its nearest texts; the right one is told where it is not among them."""
    likeness = (found.pictures[query] @ found.texts.T).tolist()
    own = found.right[query]
    items = []
    for text in _nearest(likeness, TEXTS):
        items.append(element("li", marked(bool(own[text]), found.said[text]), f" {likeness[text]:.2f}"))
    rank = int(found.ranks[PICTURE_TO_TEXT][query])
    if rank >= TEXTS:
        said = found.said[max(own.nonzero().flatten().tolist(), key=lambda text: likeness[text])]
        items.append(element("li", f"its own stands at place {rank + 1}: ", element("b", said, class_="right")))
    return element("div", shown(data, query, "the query"), element("ol", *items), class_="query")


def _text(data: PictureData, found: Retrieved, query: int) -> Element:
    """A text and its nearest pictures; where none of them is its own, that one stands behind them."""
    likeness = (found.pictures @ found.texts[query]).tolist()
    own = found.right[:, query]
    strip = []
    for place in _nearest(likeness, PICTURES):
        right = bool(own[place])
        caption = marked(right, f"{likeness[place]:.2f}")
        strip.append(shown(data, place, "found", caption, mark="right" if right else ""))
    rank = int(found.ranks[TEXT_TO_PICTURE][query])
    if rank >= PICTURES:
        place = max(own.nonzero().flatten().tolist(), key=lambda place: likeness[place])
        strip.append(shown(data, place, "its own", f"its own stands at place {rank + 1}"))
    words = element("p", element("b", found.said[query]))
    return element("div", words, element("div", *strip, class_="strip"), class_="words")
