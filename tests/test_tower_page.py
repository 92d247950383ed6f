"""The page of a measured tower: whole in itself, harmless whatever labels say, and true to the answers it shows."""

import json
import re
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from xml.etree.ElementTree import Element, tostring

import numpy as np
import pytest
import torch
from PIL import Image
from playwright.sync_api import Browser, Request
from torch import Tensor
from torch.nn import functional

from assistant.images import decode_data_url, open_picture
from training.evaluation.features import Features
from training.evaluation.markup import document, element
from training.evaluation.measures import PICTURE_TO_TEXT, TEXT_TO_PICTURE, Measured, Measurement, Retrieved
from training.evaluation.page_labels import said_of_labels
from training.evaluation.page_retrieval import said_of_retrieval
from training.evaluation.picks import confusions, label_shares_right, spread, surest
from training.evaluation.picture_data import open_data
from training.evaluation.scores import score_labels, score_of
from training.evaluation.tower_page import tower_page
from training.evaluation.tower_report import TowerFindings
from training.evaluation.zero_shot import ranks

EVIL = "<script>document.title = 'owned'<⁄script>"  # a slash of another kind: it is a folder's name
LABELS = sorted(["cat & dog", 'a "fox"', EVIL])
EVIL_TEXT = "<img src=x onerror=\"document.title='owned'\"></p><script>document.title = 'owned'</script>"


def test_confusions_are_counted() -> None:
    """Against a plain loop over all pairs; the commonest first."""
    generator = np.random.default_rng(0)
    expected, given = generator.integers(0, 6, 300).tolist(), generator.integers(0, 6, 300).tolist()
    found = confusions(given, expected, 100)
    assert len(found) == 30
    for one in found:
        assert one.places == [n for n in range(300) if (expected[n], given[n]) == (one.expected, one.given)]
        assert one.of == sum(true == one.expected for true in expected)
        assert one.expected != one.given
    assert [len(one.places) for one in found] == sorted((len(one.places) for one in found), reverse=True)
    assert confusions(given, expected, 4) == found[:4]
    assert confusions(expected, expected, 4) == []


def test_what_is_shown_is_spread_or_surest() -> None:
    assert spread([3, 5, 9], 5) == [3, 5, 9]
    assert spread(range(100), 3) == [0, 50, 99]
    assert spread(range(100), 1) == [0]
    shares = torch.tensor([[0.5, 0.5], [0.9, 0.1], [0.3, 0.7], [0.0, 1.0]])
    assert surest([0, 1, 2], shares, 2) == [1, 2]
    assert label_shares_right([0, 0, 1, 1], [0, 0, 0, 1], 3) == [2 / 3, 1.0, None]


def test_texts_of_elements_are_escaped_and_stay_in_order() -> None:
    made = element("p", "a <b> ", element("b", "&"), " tail", " more", class_="x", aria_label='say "hi"')
    assert tostring(made, "unicode", "html") == (
        '<p class="x" aria-label="say &quot;hi&quot;">a &lt;b&gt; <b>&amp;</b> tail more</p>'
    )
    assert document(element("html", element("br"))) == "<!doctype html>\n<html><br></html>\n"


@pytest.fixture(scope="module")
def findings(tmp_path_factory: pytest.TempPathFactory) -> TowerFindings:
    """Random answers of a tower over pictures whose labels, names and texts try to break out of the page."""
    folder = tmp_path_factory.mktemp("data")
    generator = np.random.default_rng(1)

    def draw(file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (30, 20, 3), dtype=np.uint8)).save(file)

    for part, count in (("train", 4), ("test", 8)):
        for label in LABELS:
            for number in range(count):
                draw(folder / part / label / f"{number}.png")
    lines = []
    for number in range(9):
        draw(folder / f"{number}.png")
        lines.append(json.dumps({"image": f"{number}.png", "captions": [f"text {number}", f"{EVIL_TEXT} {number}"]}))
    (folder / "pairs.jsonl").write_text("\n".join(lines))
    data = {
        "train": open_data(str(folder / "train"), "labels", Path),
        "test": open_data(str(folder / "test"), "labels", Path),
        "pairs": open_data(str(folder / "pairs.jsonl"), "captions", Path),
    }
    torch.manual_seed(0)
    features = {part: made_features(len(pictures.chosen)) for part, pictures in data.items()}
    measurement = made_measurement(data["test"].labels(), [text for said in data["pairs"].texts() for text in said])
    scores = [
        {"measure": m.measure, "features": m.features, **vars(m.score), **m.details} for m in measurement.measured
    ]
    report = {
        "tower": {"source": f"towers/{EVIL}", "kind": "vit", "text_half": True, "sha256": {"a.safetensors": "0" * 64}},
        "data": {part: {"name": p.name, "pictures": len(p.chosen), "sha256": "1" * 64} for part, p in data.items()},
        "settings": {"features": "pooled", "templates": [EVIL_TEXT]},
        "scores": scores,
        "versions": {"torch": "2"},
        "device": "cpu",
        "notes": [EVIL_TEXT],
        "seconds": 1.0,
    }
    return TowerFindings(report, data, features, measurement)


def made_features(count: int) -> Features:
    return Features(torch.randn(count, 8), torch.randn(count, 8), None, "", 0.0)


def unit(count: int) -> Tensor:
    return functional.normalize(torch.randn(count, 6), dim=-1)


def made_measurement(expected: list[str], said: list[str]) -> Measurement:
    shares = torch.rand(len(expected), len(LABELS)).softmax(-1)
    measured = [
        Measured("kNN", "pooled", score_of(0.4, 24, 1 / 3, 1 / 3), {}, torch.randint(3, (len(expected),))),
        Measured(
            "zero-shot", "shared", score_of(0.0, 24, 1 / 3), {"templates": [EVIL_TEXT]}, shares.argmax(-1), shares
        ),
        Measured("5-shot probe", "pooled", score_of(0.3, 24, 1 / 3, 1 / 3), {"converged": False}),
        Measured("picture to text R@1", "shared", score_of(0.3, 9, 1 / 9)),
    ]
    right = torch.eye(9, dtype=torch.bool).repeat_interleave(2, dim=1)
    pictures, texts = unit(9), unit(18)
    found = {PICTURE_TO_TEXT: ranks(pictures, texts, right), TEXT_TO_PICTURE: ranks(texts, pictures, right.T)}
    return Measurement(LABELS, measured, Retrieved(said, right, pictures, texts, found))


class Parsed(HTMLParser):
    """Tags with their attributes, and all text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_is_whole_in_itself_and_labels_are_harmless(findings: TowerFindings) -> None:
    page = tower_page(findings)
    parsed = Parsed(page)
    assert not {"script", "link", "iframe", "object", "form"} & {tag for tag, _ in parsed.tags}
    pictures = 0
    for tag, attributes in parsed.tags:
        assert not [name for name in attributes if name.startswith("on") or name == "href"]
        if tag == "img":
            opened = open_picture(decode_data_url(str(attributes["src"])))
            assert max(opened.size) <= 144
            assert attributes["alt"]
            pictures += 1
    assert pictures > 40
    assert "url(" not in page and "@import" not in page
    assert parsed.text.count(EVIL) > 5
    assert EVIL_TEXT in parsed.text


def test_the_page_says_every_score_with_interval_and_baseline(findings: TowerFindings) -> None:
    text = Parsed(tower_page(findings)).text
    for score in findings.report["scores"]:
        assert score["measure"] in text
        for part in ("right", "low", "high", "chance"):
            assert f"{100 * score[part]:.1f} %" in text
    assert "not converged" in text


def of_class(root: Element, name: str) -> list[Element]:
    return [found for found in root.iter() if name in found.get("class", "").split()]


def text_of(root: Element) -> str:
    return "".join(root.itertext())


def test_neighbours_and_shares_on_the_page_are_those_of_the_features(findings: TowerFindings) -> None:
    """The cosines of numpy, the labels of the files, marks where they agree; shares, the largest first."""
    features = {part: findings.features[part].pooled for part in ("train", "test")}
    sections = list(said_of_labels(findings.data["test"], findings.data["train"], features, findings.measurement))
    titles = [str(section.findtext("h2")) for section in sections]
    assert titles == ["Label by label", "Taken for another", "Nearest neighbours", "Named untaught: zero-shot"]
    train, test = (functional.normalize(features[part], dim=-1).numpy() for part in ("train", "test"))
    names = findings.data["train"].labels()
    expected = findings.data["test"].labels()
    queries = of_class(sections[2], "query")
    assert len(queries) == 8
    possible = {}
    for place, cosines in enumerate(test @ train.T):
        order = np.argsort(-cosines, kind="stable")[:5]
        line = [f"{'✓' if names[n] == expected[place] else '✗'} {names[n]}{cosines[n]:.2f}" for n in order]
        possible["".join(line)] = [names[n] == expected[place] for n in order]
    for query in queries:
        strip = of_class(query, "strip")[0]
        marks = ["right" in str(figure.get("class")).split() for figure in strip.iter("figure")]
        assert possible[text_of(strip)] == marks
    shares = findings.measurement.measured[1].shares
    assert shares is not None
    told = {text_of(items) for items in sections[3].iter("ul")}
    likeliest = [row.argsort(descending=True).tolist() for row in shares]
    for place in (surest(wrong_places(findings), shares, 6))[:2]:
        shown = "".join(
            f"{'✓ ' if LABELS[label] == expected[place] else ''}{LABELS[label]}{float(shares[place][label]):.0%}"
            for label in likeliest[place]
        )
        assert shown in told


def wrong_places(findings: TowerFindings) -> list[int]:
    answers = findings.measurement.measured[1].answers
    assert answers is not None
    expected = findings.data["test"].labels()
    return [place for place, answer in enumerate(answers.tolist()) if LABELS[answer] != expected[place]]


def test_retrieval_on_the_page_says_where_the_right_one_stands(findings: TowerFindings) -> None:
    found = findings.measurement.retrieved
    assert found is not None
    section = said_of_retrieval(findings.data["pairs"], found)
    text = text_of(section)
    for direction, all_of in ((PICTURE_TO_TEXT, 9), (TEXT_TO_PICTURE, 18)):
        hits = int((found.ranks[direction] == 0).sum())
        assert f"{direction[1:]}: misses, {all_of - hits} of {all_of}" in text
    cosines = found.pictures @ found.texts.T
    misses = spread([query for query in range(9) if found.ranks[PICTURE_TO_TEXT][query]], 4)
    shown = of_class(section, "query")[-len(misses) :]
    for query, part in zip(misses, shown, strict=True):
        items = [text_of(item) for item in part.iter("li")]
        for item, place in zip(items[:3], cosines[query].argsort(descending=True)[:3].tolist(), strict=True):
            mark = "✓" if place // 2 == query else "✗"
            assert item == f"{mark} {found.said[place]} {float(cosines[query, place]):.2f}"
        if found.ranks[PICTURE_TO_TEXT][query] >= 3:
            assert items[3].startswith(f"its own stands at place {int(found.ranks[PICTURE_TO_TEXT][query]) + 1}: ")


def test_a_tower_that_names_all_right_has_nothing_to_confuse(findings: TowerFindings) -> None:
    expected = torch.tensor([LABELS.index(label) for label in findings.data["test"].labels()])
    score = score_labels(expected.tolist(), expected.tolist(), 3)
    measurement = Measurement(LABELS, [Measured("kNN", "pooled", score, {}, expected)], None)
    page = tower_page(TowerFindings(findings.report, findings.data, findings.features, measurement))
    assert "confuses nothing" in page
    assert "Found by one another" not in page


def test_a_browser_shows_it_without_scripts_or_sideways_scrolling(
    browser: Browser, findings: TowerFindings, tmp_path: Path
) -> None:
    """On a phone and wide; nothing is fetched, nothing of the labels runs, every picture is drawn."""
    file = tmp_path / "report.html"
    file.write_text(tower_page(findings), encoding="utf-8")
    for width in (360, 1200):
        shown = browser.new_page(viewport={"width": width, "height": 800})
        fetched: list[str] = []
        shown.on("request", partial(note_address, fetched))
        shown.goto(file.as_uri())
        assert [url for url in fetched if not url.startswith(("file:", "data:"))] == []
        assert shown.title() == f"Measured: towers/{EVIL}"
        assert shown.evaluate("document.documentElement.scrollWidth") <= width
        shown.evaluate("document.querySelectorAll('img').forEach(img => img.loading = 'eager')")
        shown.wait_for_function("[...document.images].every(image => image.complete)")
        assert shown.evaluate("[...document.images].every(image => image.naturalWidth > 0)")
        shown.close()


def test_the_page_is_light_and_dark(browser: Browser, findings: TowerFindings, tmp_path: Path) -> None:
    """Words can be read on their ground in both: a contrast of 4.5 and more, as WCAG 2 wants."""
    file = tmp_path / "report.html"
    file.write_text(tower_page(findings), encoding="utf-8")
    grounds = []
    for scheme in ("light", "dark"):
        shown = browser.new_page(color_scheme="dark" if scheme == "dark" else "light")
        shown.goto(file.as_uri())
        style = "e => [getComputedStyle(e).color, getComputedStyle(document.body).backgroundColor]"
        for selector in ("h1", ".soft", "summary", ".right b"):
            ink, ground = (luminance(colour) for colour in shown.locator(selector).first.evaluate(style))
            assert (max(ink, ground) + 0.05) / (min(ink, ground) + 0.05) >= 4.5, (scheme, selector)
        grounds.append(ground)
        shown.close()
    assert grounds[0] > 0.5 > grounds[1]


def note_address(fetched: list[str], request: Request) -> None:
    fetched.append(request.url)


def luminance(colour: str) -> float:
    """Relative luminance of `rgb(...)`, as WCAG 2 defines it."""
    parts = [int(number) / 255 for number in re.findall(r"\d+", colour)[:3]]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))
