"""The parts of a tower's page that tell of labels: right by label, confusions, nearest neighbours, zero-shot."""

from collections.abc import Iterator, Sequence
from xml.etree.ElementTree import Element

from torch import Tensor

from training.evaluation.markup import element, thumbnail
from training.evaluation.measures import Measured, Measurement
from training.evaluation.picks import Confusion, confusions, label_shares_right, spread, surest
from training.evaluation.picture_data import PictureData
from training.evaluation.probes import nearest

LABELS_AT_ONCE = 15  # rows that are seen before one asks for the rest
CONFUSIONS, PICTURES_EACH = 8, 4
QUERIES, NEIGHBOURS = 8, 5
NAMED = 6  # hits, and as many misses
LIKELIEST = 3


def percent(share: float) -> str:
    """A share from 0 to 1 in whole percent."""
    return f"{share:.0%}"


def shown(data: PictureData, place: int, said: str, *caption: Element | str, mark: str = "") -> Element:
    """The chosen picture at `place` with its caption; `mark` (right, wrong) is drawn around it."""
    picture = thumbnail(data.encoded.content(data.chosen[place]), said)
    under = element("figcaption", *caption) if caption else ""
    return element("figure", picture, under, class_=f"mark {mark}".strip())


def marked(right: bool, text: str) -> Element:
    """`text` behind a tick or a cross, in its colour."""
    return element("span", element("b", "✓ " if right else "✗ "), text, class_="right" if right else "wrong")


def said_of_labels(
    data: PictureData, train: PictureData | None, features: dict[str, Tensor], measurement: Measurement
) -> Iterator[Element]:
    """The sections, as far as there is something to tell.

    `data` are the test pictures; `features` are one kind (B, D) of each part that there is.
    """
    number = {label: place for place, label in enumerate(measurement.labels)}
    expected = [number[label] for label in data.labels()]
    namers = [measured for measured in measurement.measured if measured.answers is not None]
    yield _by_label(namers, expected, measurement.labels)
    best = max(namers, key=lambda measured: measured.score.right)
    yield _confused(best, expected, measurement.labels, data)
    if train:
        yield _neighbours(data, train, features, namers[0], expected, measurement.labels)
    for measured in namers:
        if measured.shares is not None:
            yield _named(measured, expected, measurement.labels, data)


def _name(measured: Measured) -> str:
    return measured.measure if measured.features == "shared" else f"{measured.measure}, {measured.features}"


def _by_label(namers: Sequence[Measured], expected: Sequence[int], labels: Sequence[str]) -> Element:
    shares = [label_shares_right(_given(measured), expected, len(labels)) for measured in namers]
    asked = [label for label in range(len(labels)) if shares[0][label] is not None]
    asked.sort(key=lambda label: sum(column[label] or 0.0 for column in shares))
    head = element("tr", element("th", "label"), element("th", "pictures", class_="number"))
    for measured in namers:
        head.append(element("th", _name(measured)))

    def table(some: Sequence[int]) -> Element:
        rows = [
            element(
                "tr",
                element("td", labels[label]),
                element("td", str(expected.count(label)), class_="number"),
                *(element("td", *_small_bar(column[label] or 0.0)) for column in shares),
            )
            for label in some
        ]
        return element("div", element("table", element("thead", head), element("tbody", *rows)), class_="wide")

    section = element(
        "section",
        element("h2", "Label by label"),
        element(
            "p", "The share of each label's test pictures that was named right, hardest labels first.", class_="soft"
        ),
        table(asked[:LABELS_AT_ONCE]),
    )
    if asked[LABELS_AT_ONCE:]:
        rest = element("summary", f"The other {len(asked) - LABELS_AT_ONCE} labels")
        section.append(element("details", rest, table(asked[LABELS_AT_ONCE:])))
    return section


def _small_bar(share: float) -> tuple[Element, Element]:
    fill = element("span", class_="fill", style=f"width:{100 * share:.1f}%")
    return element("small", percent(share)), element("div", fill, class_="bar thin")


def _given(measured: Measured) -> list[int]:
    assert measured.answers is not None
    return measured.answers.tolist()


def _confused(best: Measured, expected: Sequence[int], labels: Sequence[str], data: PictureData) -> Element:
    found = confusions(_given(best), expected, CONFUSIONS)
    cards = [_confusion(confusion, labels, data) for confusion in found]
    said = f"What {_name(best)}, the best of them, takes for something else most often."
    if not found:
        said = f"{_name(best)} confuses nothing: every test picture was named right."
    return element(
        "section",
        element("h2", "Taken for another"),
        element("p", said, class_="soft"),
        element("div", *cards, class_="cards"),
    )


def _confusion(confusion: Confusion, labels: Sequence[str], data: PictureData) -> Element:
    true, given = labels[confusion.expected], labels[confusion.given]
    times = len(confusion.places)
    counted = f"{times} of {confusion.of} pictures, {percent(times / confusion.of)}"
    pictures = (shown(data, place, f"{true}, taken for {given}") for place in spread(confusion.places, PICTURES_EACH))
    return element(
        "div",
        element("p", element("b", true), " taken for ", element("b", given), element("br"), element("small", counted)),
        element("div", *pictures, class_="strip"),
        class_="card",
    )


def _neighbours(
    data: PictureData,
    train: PictureData,
    features: dict[str, Tensor],
    voted: Measured,
    expected: Sequence[int],
    labels: Sequence[str],
) -> Element:
    """Some test pictures that the vote names right, and as many others, with the training pictures next to them."""
    given, train_labels = _given(voted), train.labels()
    hits = [place for place, true in enumerate(expected) if given[place] == true]
    misses = [place for place, true in enumerate(expected) if given[place] != true]
    places = sorted(spread(hits, QUERIES // 2) + spread(misses, QUERIES // 2))
    count = min(NEIGHBOURS, len(train.chosen))
    likeness, index = nearest(features["train"], features["test"][places], count)
    rows = []
    for place, values, neighbours in zip(places, likeness.tolist(), index.tolist(), strict=True):
        true = labels[expected[place]]
        strip = []
        for value, neighbour in zip(values, neighbours, strict=True):
            name = train_labels[neighbour]
            caption = (marked(name == true, name), element("br"), f"{value:.2f}")
            mark = "right" if name == true else "wrong"
            strip.append(shown(train, neighbour, f"neighbour: {name}", *caption, mark=mark))
        vote = marked(given[place] == expected[place], f"vote: {labels[given[place]]}")
        query = shown(data, place, true, element("b", true), element("br"), vote)
        rows.append(element("div", query, element("div", *strip, class_="strip"), class_="query"))
    return element(
        "section",
        element("h2", "Nearest neighbours"),
        element(
            "p",
            f"Test pictures on the left, each with its {count} nearest training pictures and their cosines. Half of "
            f"them are named right by {_name(voted)}, half wrong, as far as there are so many; evenly spread over the "
            "data, not picked by hand.",
            class_="soft",
        ),
        *rows,
    )


def _named(measured: Measured, expected: Sequence[int], labels: Sequence[str], data: PictureData) -> Element:
    """Hits and misses of zero-shot, with the shares of the likeliest labels."""
    assert measured.shares is not None
    given = _given(measured)
    hits = [place for place, true in enumerate(expected) if given[place] == true]
    misses = [place for place, true in enumerate(expected) if given[place] != true]
    groups = [
        (f"Hits, {len(hits)} of {len(expected)}: evenly spread over the data", spread(hits, NAMED)),
        (
            f"Misses, {len(misses)} of {len(expected)}: those it was surest of",
            surest(misses, measured.shares, NAMED),
        ),
    ]
    templates = " · ".join(measured.details["templates"])
    section = element(
        "section",
        element("h2", f"Named untaught: {_name(measured)}"),
        element(
            "p", f"The likeliest labels and their shares among all {len(labels)}. Wordings: {templates}", class_="soft"
        ),
    )
    for title, places in groups:
        if places:
            cards = [_card(place, measured.shares[place], expected[place], labels, data) for place in places]
            section.append(element("h3", title))
            section.append(element("div", *cards, class_="cards"))
    return section


def _card(place: int, shares: Tensor, true: int, labels: Sequence[str], data: PictureData) -> Element:
    likeliest = shares.argsort(descending=True, stable=True)[:LIKELIEST].tolist()
    told = likeliest if true in likeliest else [*likeliest, true]
    items = []
    for label in told:
        share = float(shares[label])
        fill = element("span", class_="fill", style=f"width:{100 * share:.1f}%")
        name = marked(True, labels[label]) if label == true else element("span", labels[label])
        items.append(
            element("li", name, element("span", percent(share)), element("div", fill, class_="bar"), class_="share")
        )
    picture = shown(data, place, labels[true], labels[true])
    return element("div", picture, element("ul", *items), class_="card named")
