"""One self-contained HTML page of what a tower can do: scores, confusions, and pictures with what it found for them."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element

from training.evaluation.markup import document, element
from training.evaluation.measures import chosen_features
from training.evaluation.page_labels import said_of_labels
from training.evaluation.page_retrieval import said_of_retrieval
from training.evaluation.tower_report import TowerFindings

STYLE = Path(__file__).with_name("page.css")
KEY = {"fill": "right", "interval": "its 95 % interval", "chance": "chance", "constant": "the best constant answer"}
PARTS = {"train": "training pictures", "test": "test pictures", "pairs": "pictures with texts"}


def tower_page(findings: TowerFindings) -> str:
    """HTML with its style and its pictures inside: it asks nothing of any other place, and runs no script."""
    report = findings.report
    name = report["tower"]["source"]
    body = element("body", _heading(report), _scores(report), *_pictures(findings), _made_of(report))
    return document(element("html", page_head(f"Measured: {name}"), body, lang="en"))


def page_head(title: str) -> Element:
    """The head of a page, with its title and the style inside."""
    return element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("title", title),
        element("style", STYLE.read_text(encoding="utf-8")),
    )


def _heading(report: Mapping[str, Any]) -> Element:
    parts = [f"{data['pictures']:,} {PARTS[part]} ({data['name']})" for part, data in report["data"].items()]
    heading = element(
        "header",
        element("h1", f"What {report['tower']['source']} can do"),
        element("p", f"A {report['tower']['kind']}, measured on {'; '.join(parts)}.", class_="soft"),
    )
    if report["notes"]:
        heading.append(element("div", *(element("p", note) for note in report["notes"]), class_="notes"))
    return heading


def _scores(report: Mapping[str, Any]) -> Element:
    key = [element("span", element("i", class_=kind), said) for kind, said in KEY.items()]
    heads = [element("th", name) for name in ("measure", "")]
    heads += [element("th", name, class_="number") for name in ("right", "chance", "constant")]
    table = element(
        "table",
        element("thead", element("tr", *heads)),
        element("tbody", *(_score(score) for score in report["scores"])),
        class_="scores",
    )
    return element("section", element("h2", "Scores"), element("div", *key, class_="key"), table)


def _score(score: Mapping[str, Any]) -> Element:
    right, low, high, chance, constant = (score[part] for part in ("right", "low", "high", "chance", "majority"))
    bar = element(
        "div",
        element("span", class_="fill", style=f"width:{100 * right:.2f}%"),
        element("span", class_="interval", style=f"left:{100 * low:.2f}%;width:{100 * (high - low):.2f}%"),
        element("span", class_="chance", style=f"left:{100 * chance:.2f}%"),
        class_="bar",
    )
    if constant is not None:
        bar.append(element("span", class_="constant", style=f"left:{100 * constant:.2f}%"))
    how = f"{score['features']}, {score['pictures']} pictures"
    if not score.get("converged", True):
        how += ", not converged"
    interval = element("small", f"{_percent(low)} to {_percent(high)}")
    return element(
        "tr",
        element("td", score["measure"], element("small", how)),
        element("td", bar, class_="drawn"),
        element("td", element("b", _percent(right)), interval, class_="number"),
        element("td", _percent(chance), class_="number base", data_name="chance"),
        element("td", "–" if constant is None else _percent(constant), class_="number base", data_name="constant"),
    )


def _pictures(findings: TowerFindings) -> Iterator[Element]:
    data, measurement = findings.data, findings.measurement
    if any(measured.answers is not None for measured in measurement.measured):
        kind = findings.report["settings"]["features"]
        features = {part: next(chosen_features(features, kind))[1] for part, features in findings.features.items()}
        yield from said_of_labels(data["test"], data.get("train"), features, measurement)
    if measurement.retrieved:
        yield said_of_retrieval(data["pairs"], measurement.retrieved)


def _made_of(report: Mapping[str, Any]) -> Element:
    """What stands in the JSON too: enough to measure the same again."""
    facts = {f"sha256 of {name}": value for name, value in report["tower"]["sha256"].items()}
    facts |= {f"sha256 of the {PARTS[part]}": data["sha256"] for part, data in report["data"].items()}
    facts |= {name: str(value) for name, value in report["settings"].items()}
    facts |= report["versions"] | {"device": report["device"], "seconds": str(report["seconds"])}
    listed = [part for name, value in facts.items() for part in (element("dt", name), element("dd", value))]
    return element("footer", element("details", element("summary", "What this was made of"), element("dl", *listed)))


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
