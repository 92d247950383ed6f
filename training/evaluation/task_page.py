"""One self-contained HTML page of what an assistant can do: scores, and pictures with its answers and errors."""

from collections.abc import Iterator, Mapping, Sequence
from math import exp
from typing import Any
from xml.etree.ElementTree import Element

from training.evaluation.item_values import item_values
from training.evaluation.likelihood_measures import chosen
from training.evaluation.markup import document, element, thumbnail
from training.evaluation.page_labels import marked
from training.evaluation.picks import spread
from training.evaluation.predictions import Prediction
from training.evaluation.resampling import Unit
from training.evaluation.task_items import Item
from training.evaluation.task_report import written
from training.evaluation.task_run import TaskFindings
from training.evaluation.tower_page import KEY, page_head

SHOWN = 12  # questions of each group
UNANSWERED = 20  # questions that are named
REFERENCES = 3  # people's captions beside a picture
TEXT = 300  # characters of a text


def task_page(report: Mapping[str, Any], findings: Sequence[TaskFindings]) -> str:
    """HTML with its style and its pictures inside: it asks nothing of any other place, and runs no script.

    `report` is the whole one, and `findings` are those of its tasks, in its order.
    """
    name = report["model"]["source"]
    tasks = [
        element("section", element("h2", task["task"]), *_of_task(task, found, report))
        for task, found in zip(report["tasks"], findings, strict=True)
    ]
    body = element("body", _heading(report), *tasks, _made_of(report))
    return document(element("html", page_head(f"Measured: {name}"), body, lang="en"))


def _heading(report: Mapping[str, Any]) -> Element:
    asked = sum(task["questions"] for task in report["tasks"])
    tasks = ", ".join(task["task"] for task in report["tasks"])
    said = f"{report['model']['kind']}, asked {asked:,} questions: {tasks}."
    header = element(
        "header", element("h1", f"What {report['model']['source']} can do"), element("p", said, class_="soft")
    )
    key = [element("span", element("i", class_=kind), said) for kind, said in KEY.items()]
    header.append(element("div", *key, class_="key"))
    return header


def _of_task(task: Mapping[str, Any], found: TaskFindings, report: Mapping[str, Any]) -> Iterator[Element]:
    yield element("p", task["about"], class_="soft")
    if task["notes"]:
        yield element("div", *(element("p", note) for note in task["notes"]), class_="notes")
    heads = [element("th", "score"), element("th", "")]
    heads += [element("th", name, class_="number") for name in ("value", "chance", "constant")]
    rows = [_score(score) for score in task["scores"]]
    yield element("table", element("thead", element("tr", *heads)), element("tbody", *rows), class_="scores")
    if task["compared"]:
        yield _compared(task["compared"], report["against"]["source"])
    if task["unanswered"]:
        named = [element("li", f"{one['id']}: {one['why']}") for one in task["unanswered"][:UNANSWERED]]
        yield element("details", element("summary", "Not answered"), element("ul", *named))
    yield from _shown(found)


def _score(score: Mapping[str, Any]) -> Element:
    unit: Unit = score["unit"]
    bar = _bar(score) if unit == "share" and score["value"] is not None else ""
    interval = element("small", f"{written(score['low'], unit)} to {written(score['high'], unit)}")
    small = f"{score['of']}, " if score["of"] else ""
    cells = [
        element("td", score["score"], element("small", f"{small}{score['questions']:,} questions")),
        element("td", bar, class_="drawn"),
        element("td", element("b", written(score["value"], unit)), interval, class_="number"),
    ]
    for name, base in (("chance", score["chance"]), ("constant", score["majority"])):
        cells.append(element("td", written(base, unit), class_="number base", data_name=name))
    return element("tr", *cells)


def _bar(score: Mapping[str, Any]) -> Element:
    value, low, high = score["value"], score["low"], score["high"]
    bar = element("div", element("span", class_="fill", style=f"width:{100 * value:.2f}%"), class_="bar")
    if low is not None:
        style = f"left:{100 * low:.2f}%;width:{100 * (high - low):.2f}%"
        bar.append(element("span", class_="interval", style=style))
    for kind, base in (("chance", score["chance"]), ("constant", score["majority"])):
        if base is not None:
            bar.append(element("span", class_=kind, style=f"left:{100 * base:.2f}%"))
    return bar


def _compared(differences: Sequence[Mapping[str, Any]], other: str) -> Element:
    rows = []
    for found in differences:
        unit: Unit = found["unit"]
        low, high = (written(found[end], unit, sign=True) for end in ("low", "high"))
        p = "–" if found["p"] is None else f"p = {found['p']:.4f}"
        rows.append(
            element(
                "tr",
                element("td", found["score"], element("small", found["of"] or "")),
                element("td", written(found["difference"], unit, sign=True), class_="number"),
                element("td", f"{low} to {high}", class_="number"),
                element("td", element("b", p) if found["significant"] else p, element("small", found["test"])),
            )
        )
    title = element("h3", f"More or less than {other}, on the same questions")
    return element("div", title, element("div", element("table", element("tbody", *rows)), class_="wide"))


def _shown(found: TaskFindings) -> Iterator[Element]:
    """Groups of questions with their pictures: not picked by hand, but evenly spread or the worst and the best."""
    task = found.asked.task
    values = item_values(task, found.items, found.predictions)
    places = list(range(len(found.items)))
    if task.kind in ("captions", "perplexity"):
        order = sorted(places, key=lambda place: values[place])
        groups = [("Evenly spread over the data", spread(places, SHOWN)), ("The worst", order[:SHOWN])]
        groups.append(("The best", order[::-1][:SHOWN]))
    else:
        wrong, right = ([p for p in places if (values[p] > 0.5) == is_right] for is_right in (False, True))
        groups = [
            (f"Wrong, {len(wrong):,} of {len(places):,}: evenly spread over the data", spread(wrong, SHOWN)),
            (f"Right, {len(right):,} of {len(places):,}: evenly spread over the data", spread(right, SHOWN)),
        ]
    for title, some in groups:
        if some:
            cards = [_card(found, found.items[place], values[place]) for place in some]
            yield element("h3", title)
            yield element("div", *cards, class_="cards")


def _card(found: TaskFindings, item: Item, value: float) -> Element:
    lines = list(_lines(found.asked.task.kind, item, found.predictions[item.id], value))
    said = element("div", element("p", element("small", item.id)), *lines)
    if item.picture is None:
        return element("div", said, class_="card")
    picture = element("figure", thumbnail(found.asked.pictures[item.picture], item.id))
    return element("div", picture, said, class_="card named")


def _lines(kind: str, item: Item, prediction: Prediction, value: float) -> Iterator[Element]:
    if kind == "perplexity":
        yield element("p", f"{item.expected[0][:TEXT]}{'...' if len(item.expected[0]) > TEXT else ''}")
        yield element("p", element("b", f"perplexity {exp(-value):.2f}"))
        return
    if kind == "captions":
        yield element("p", element("b", prediction.answer or "(nothing)"), element("small", f" CIDEr {value:.0f}"))
        yield element("ul", *(element("li", one, class_="soft") for one in item.expected[:REFERENCES]))
        return
    yield element("p", item.question)
    if kind == "choices":
        pick = item.choices[chosen(prediction, by_token=True)]
        for choice in item.choices:
            mark = marked(choice == item.expected[0], choice) if choice in (pick, item.expected[0]) else choice
            yield element("p", mark, element("small", " (chosen)" if choice == pick else ""))
        return
    yield element("p", marked(value > 0.5, prediction.answer or "(nothing)"))
    if value <= 0.5:
        yield element("p", element("small", f"expected: {', '.join(dict.fromkeys(item.expected))}"))


def _made_of(report: Mapping[str, Any]) -> Element:
    """What stands in the JSON too: enough to measure the same again."""
    facts = {f"model: {name}": str(value) for name, value in report["model"].items()}
    for task in report["tasks"]:
        facts[f"{task['task']}: sha256 of all that is asked"] = task["sha256"]
        facts[f"{task['task']}: settings"] = str(task["settings"])
    facts |= report["versions"]
    listed = [part for name, value in facts.items() for part in (element("dt", name), element("dd", value))]
    return element("footer", element("details", element("summary", "What this was made of"), element("dl", *listed)))
