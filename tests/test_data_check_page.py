"""The report of a data check in a real Chromium: what it shows, that it fits a phone, and that nothing in it runs."""

from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page

from tests.test_conversations import encoded, write_lines
from tests.tiny import make_tiny_llava
from training.data.check_page import Section, write_page
from training.data.check_samples import shown_samples
from training.data.data_check import check_data
from training.data.lesson_judge import judge_for
from training.data.picture_references import PictureFinder
from training.data.recognise import recognise

EVIL = "<script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\">\"'>&amp; [b]"


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page about rows whose every word tries to act."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "red.png").write_bytes(encoded("red"))
    (folder / "a'\"><b>.png").write_bytes(encoded("blue"))

    def row(question: str, answer: str, *images: str) -> dict[str, Any]:
        value = "<image>\n" * len(images) + question
        turns = [{"from": "human", "value": value}, {"from": "gpt", "value": answer}]
        return {"images": list(images), "conversations": turns}

    rows = [
        row("What is it?", "A red square.", "red.png"),
        row(EVIL, EVIL, "a'\"><b>.png"),
        row("Which?", "Both.", "red.png", "a'\"><b>.png"),
        row("What is it?", "Nothing.", EVIL),
        row("long" * 400, "x" * 400),
        row("Hi", "  "),
    ]
    rows[5]["conversations"][1]["from"] = EVIL
    source = recognise(write_lines(folder / "<i>data.jsonl", rows))
    judge, name = judge_for(str(make_tiny_llava(tmp_path_factory.mktemp("model") / "tiny")))
    finder = PictureFinder(source.base)
    check = check_data(source, finder, judge)
    page = folder / "report.html"
    write_page(page, [Section(check, shown_samples(check, source, judge, 12), finder)], name, strict=False)
    return page


def opened(browser: Browser, report: Path, width: int, scheme: str) -> Page:
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)  # type: ignore[arg-type]
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(report.as_uri())
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
    return page


def test_the_page_shows_counts_faults_and_learned_words(browser: Browser, report: Path) -> None:
    page = opened(browser, report, 1100, "light")
    assert "Training would stop" in page.get_by_role("status").inner_text()
    assert page.locator(".tile").first.inner_text().split()[0] == "6"
    assert page.locator("mark").first.inner_text() == "A red square.</s>"
    kinds = page.locator("summary b").all_inner_texts()
    assert {"missing picture", "unknown role"} <= set(kinds)
    details = page.locator("details").filter(has_text="missing picture")
    assert not details.locator(".finding").first.is_visible()
    details.locator("summary").click()
    assert "row 4 (line 4)" in details.locator(".finding").first.inner_text()
    pictures = page.locator(".thumbnails img")
    assert pictures.count() == 4
    assert pictures.evaluate_all("all => all.every(one => one.complete && one.naturalWidth > 0)")


def test_words_of_the_data_do_not_act_on_the_page(browser: Browser, report: Path) -> None:
    """No element, no script and no attribute comes from the data; its words are shown as they were typed."""
    page = opened(browser, report, 1100, "light")
    page.wait_for_timeout(200)
    assert "taken" not in page.title()
    assert page.locator("script, i, main b b, [onerror]").count() == 0
    assert page.locator("img:not([src^='data:image/jpeg'])").count() == 0
    assert any("onerror=" in text for text in page.locator(".words").all_inner_texts())


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_a_phone_and_can_be_read(browser: Browser, report: Path, scheme: str) -> None:
    """No sideways scrolling at 360 pixels, and every text has a contrast of 4.5 or more (WCAG 2 AA)."""
    page = opened(browser, report, 360, scheme)
    page.locator("details").evaluate_all("all => all.forEach(one => one.open = true)")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    colours = page.evaluate(
        """() => [...document.querySelectorAll("main *")].filter(e => e.innerText && e.offsetWidth).map(e => {
            let ground = e;
            while (getComputedStyle(ground).backgroundColor === "rgba(0, 0, 0, 0)") ground = ground.parentElement;
            return [getComputedStyle(e).color, getComputedStyle(ground).backgroundColor];
        })"""
    )
    assert len(colours) > 40
    for ink, ground in {tuple(pair) for pair in colours}:
        assert contrast(ink, ground) >= 4.5, (ink, ground)
    assert (luminance(colours[0][1]) < 0.5) == (scheme == "dark")


def luminance(colour: str) -> float:
    """Relative luminance of `rgb(r, g, b)` by WCAG 2."""
    channels = [int(part) / 255 for part in colour.removeprefix("rgb(").removesuffix(")").split(",")]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(ink: str, ground: str) -> float:
    light, dark = sorted((luminance(ink), luminance(ground)), reverse=True)
    return (light + 0.05) / (dark + 0.05)
