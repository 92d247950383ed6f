"""The chat page in a real Chromium, over the real gateway and a real vLLM."""

import asyncio
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from playwright.sync_api import Browser, Locator, Page, expect

from serving.doors import Doors
from serving.engine import Engine, LocalEngine, RemoteEngine, free_port
from serving.gateway import create_gateway
from serving.listening import listen
from serving.model_folder import ModelFacts
from tests.conftest import MODEL_NAME
from ui.browser.chat import EXAMPLES, attach_page, build_page

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE_PICTURES = [ROOT / "ui" / "browser" / "examples" / file for file, _ in EXAMPLES]
# Time for a slow machine that does something else as well; nothing here waits so long when all is well.
PATIENCE = 60.0
# So many other requests keep the tiny model at one long answer for seconds; alone it is done before anyone can stop it.
OTHER_REQUESTS = 31


@contextmanager
def served_page(engine: Engine, facts: ModelFacts, doors: Doors | None = None) -> Iterator[str]:
    """The gateway over `engine`, with the page on it, in a thread of this process; gives its address."""
    with listen("127.0.0.1", 0) as listener:
        address = f"http://127.0.0.1:{listener.getsockname()[1]}"
        app = create_gateway(engine, MODEL_NAME, facts, doors=doors)
        attach_page(app, build_page(f"{address}/v1", api_key=None, model_name=MODEL_NAME))
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=2))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield address
        finally:
            server.should_exit = True
            thread.join(PATIENCE)


def wait_until(true: Callable[[], bool], seconds: float, what: str) -> None:
    """Fails with `what` when it is not true within so many seconds."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.05)


def vllm_sum(engine: LocalEngine, pattern: str) -> float:
    """The sum of vLLM's own metrics whose name and labels match, such as how many prompt tokens it has read."""
    text = httpx.get(f"{engine.base_url}/metrics", headers=authorization(engine), trust_env=False).text
    found = re.findall(rf"^vllm:{pattern} (\S+)$", text, flags=re.MULTILINE)
    assert found, f"vLLM's metrics hold no {pattern}"
    return sum(map(float, found))


def prompt_tokens(engine: LocalEngine) -> int:
    return int(vllm_sum(engine, r"prompt_tokens_total\{.*\}"))


def answers_made_to_their_end(engine: LocalEngine) -> int:
    return int(vllm_sum(engine, r'request_success_total\{.*finished_reason="(?:stop|length)".*\}'))


def authorization(engine: LocalEngine) -> dict[str, str]:
    return {"Authorization": f"Bearer {engine.api_key}"}


@contextmanager
def busy(engine: LocalEngine) -> Iterator[None]:
    """Other people's long requests, which the engine works on meanwhile; waits for the last of them."""

    async def one(client: httpx.AsyncClient) -> None:
        body: dict[str, Any] = {"model": MODEL_NAME, "messages": [{"role": "user", "content": "Talk."}]}
        body |= {"max_tokens": 900, "ignore_eos": True, "stream": True}
        async with client.stream("POST", f"{engine.base_url}/v1/chat/completions", json=body) as answer:
            assert answer.status_code == 200
            async for _ in answer.aiter_bytes():
                pass

    async def everyone() -> None:
        async with httpx.AsyncClient(timeout=None, headers=authorization(engine), trust_env=False) as client:
            await asyncio.gather(*(one(client) for _ in range(OTHER_REQUESTS)))

    thread = threading.Thread(target=asyncio.run, args=[everyone()])
    thread.start()
    try:
        yield
    finally:
        thread.join()


@pytest.fixture(scope="module")
def address(engine: LocalEngine) -> Iterator[str]:
    with served_page(engine, engine.facts) as address:
        yield address


@contextmanager
def opened_page(browser: Browser, address: str, width: int = 1280, height: int = 900) -> Iterator[Page]:
    """The page in a fresh browser context. At the end nothing may have been asked of a foreign host, and no script
    have failed."""
    page = browser.new_page(viewport={"width": width, "height": height})
    requests: list[str] = []
    errors: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(address)
    expect(box(page)).to_be_visible(timeout=PATIENCE * 1000)
    yield page
    page.close()
    own = (address, "data:", "blob:")
    assert [url for url in requests if not url.startswith(own)] == []
    assert errors == []


@pytest.fixture
def page(browser: Browser, address: str) -> Iterator[Page]:
    with opened_page(browser, address) as page:
        expect(page.locator("#status .ready")).to_be_visible(timeout=PATIENCE * 1000)
        yield page


def box(page: Page) -> Locator:
    return page.locator("#box textarea")


def answers(page: Page) -> Locator:
    return page.locator("#chat [data-testid=bot]")


def questions(page: Page) -> Locator:
    return page.locator("#chat [data-testid=user]")


def submit_button(page: Page) -> Locator:
    return page.locator("#box [data-testid=submit-button]")


def upload(page: Page, *files: Path) -> None:
    page.set_input_files("#box input[type=file]", list(files))
    expect(page.locator("#box .thumbnail-item")).to_have_count(len(files))
    expect(submit_button(page)).to_be_enabled()


def ask(page: Page, question: str) -> None:
    box(page).fill(question)
    box(page).press("Enter")


def set_longest_answer(page: Page, tokens: int) -> None:
    page.click("#settings button")
    page.get_by_label("number input for Longest answer, in tokens").fill(str(tokens))
    page.get_by_label("number input for Longest answer, in tokens").press("Tab")


def wait_for_answer(page: Page) -> None:
    """The answer is whole when the message box offers to send again, as it did before the answer began too."""
    expect(answers(page).last).not_to_be_empty(timeout=PATIENCE * 1000)
    expect(submit_button(page)).to_be_visible(timeout=PATIENCE * 1000)


WATCH_LENGTHS = """() => {
    window.lengths = new Set();
    const chat = document.querySelector("#chat");
    const look = () => {
        const answer = [...chat.querySelectorAll("[data-testid=bot]")].pop();
        if (answer) window.lengths.add(answer.innerText.length);
    };
    new MutationObserver(look).observe(chat, {subtree: true, childList: true, characterData: true});
}"""


def test_a_question_about_a_picture_is_answered_piece_by_piece(page: Page, engine: LocalEngine) -> None:
    set_longest_answer(page, 700)
    upload(page, EXAMPLE_PICTURES[0])
    read_before = prompt_tokens(engine)
    ask(page, "What is in this picture?")
    expect(answers(page)).to_have_count(1, timeout=PATIENCE * 1000)
    # A picture is 100 tokens to the tiny model, so it has been there.
    assert prompt_tokens(engine) - read_before > 100
    wait_for_answer(page)
    expect(questions(page)).to_have_count(2)  # the picture and the words
    expect(box(page)).to_have_value("")
    page.locator("#chat [aria-label=Clear]").click()
    expect(answers(page)).to_have_count(0)
    with busy(engine):
        # The page itself watches: the whole answer may be there before anybody asks it from outside.
        page.evaluate(WATCH_LENGTHS)
        ask(page, "What do you know?")
        wait_for_answer(page)
    lengths = page.evaluate("[...window.lengths]")
    # Events come eight times a second, and a busy machine draws some together.
    assert len(lengths) > 5, f"the answer came in one piece: {lengths}"


def settled_answer(page: Page) -> str:
    """The last answer, once it is the same for a second: pieces on their way to the page may arrive after a stop."""
    deadline = time.monotonic() + PATIENCE
    while True:
        text = answers(page).last.inner_text()
        time.sleep(1.0)
        if answers(page).last.inner_text() == text:
            return text
        assert time.monotonic() < deadline, "the answer went on after it was stopped"


def test_stop_ends_the_work_of_the_engine_and_keeps_what_had_come(page: Page, engine: LocalEngine) -> None:
    set_longest_answer(page, 900)
    before = answers_made_to_their_end(engine)
    with busy(engine):
        ask(page, "What do you know?")
        expect(answers(page).last).not_to_be_empty(timeout=PATIENCE * 1000)
        page.click("#box .stop-button")
        expect(submit_button(page)).to_be_visible()
        at_once = answers(page).last.inner_text()
        kept = settled_answer(page)
        assert at_once and kept
    assert answers(page).last.inner_text() == kept
    assert answers_made_to_their_end(engine) - before == OTHER_REQUESTS


def test_closing_the_page_ends_the_work_of_the_engine(browser: Browser, address: str, engine: LocalEngine) -> None:
    before = answers_made_to_their_end(engine)
    with opened_page(browser, address) as page:
        set_longest_answer(page, 900)
        with busy(engine):  # not before the page is there: on a slow machine the others would be done by then
            ask(page, "What do you know?")
            expect(answers(page).last).not_to_be_empty(timeout=PATIENCE * 1000)
            page.close()
    assert answers_made_to_their_end(engine) - before == OTHER_REQUESTS


def test_retry_asks_again_and_clear_forgets(page: Page, engine: LocalEngine) -> None:
    set_longest_answer(page, 20)
    upload(page, *EXAMPLE_PICTURES[:2])
    ask(page, "What differs?")
    wait_for_answer(page)
    first = answers(page).last.inner_text()
    read_before = prompt_tokens(engine)
    page.locator("#chat [aria-label=Retry]").click()
    wait_until(lambda: prompt_tokens(engine) - read_before > 200, PATIENCE, "both pictures are read again")
    wait_for_answer(page)
    # At temperature 0 the same question has the same answer, and it takes the first one's place.
    expect(answers(page).last).to_have_text(first)
    expect(answers(page)).to_have_count(1)
    page.locator("#chat [aria-label=Clear]").click()
    expect(answers(page)).to_have_count(0)
    expect(page.locator("#chat .example")).to_have_count(len(EXAMPLES))


def test_an_example_is_asked_with_one_click(page: Page) -> None:
    set_longest_answer(page, 20)
    page.locator("#chat .example").nth(1).click()
    wait_for_answer(page)
    expect(questions(page).last).to_have_text(EXAMPLES[1][1])


def test_an_earlier_turn_is_remembered(page: Page, engine: LocalEngine) -> None:
    set_longest_answer(page, 5)
    upload(page, EXAMPLE_PICTURES[0])
    ask(page, "What is this?")
    wait_for_answer(page)
    read_before = prompt_tokens(engine)
    ask(page, "And what else?")
    expect(answers(page)).to_have_count(2, timeout=PATIENCE * 1000)
    assert prompt_tokens(engine) - read_before > 100


def test_a_file_that_is_no_picture_is_refused_and_nothing_is_lost(page: Page, tmp_path: Path) -> None:
    fake = tmp_path / "page.png"
    fake.write_text("<html><script>alert(1)</script></html>")
    upload(page, fake)
    ask(page, "What is this?")
    expect(page.get_by_text("page.png: ")).to_contain_text("PNG, JPEG, WebP, GIF or BMP")
    expect(box(page)).to_have_value("What is this?")
    expect(page.locator("#box .thumbnail-item")).to_have_count(1)
    expect(questions(page)).to_have_count(0)


def test_an_empty_message_gives_a_hint(page: Page) -> None:
    submit_button(page).click()
    expect(page.get_by_text("Type a question, or add a picture.")).to_be_visible()
    expect(questions(page)).to_have_count(0)


def hand_over(page: Page, event: str, name: str, content: bytes, media_type: str) -> None:
    """Drops or pastes a file, as the browser tells the page about it."""
    page.evaluate(
        """([event, name, bytes, type]) => {
            const data = new DataTransfer();
            data.items.add(new File([new Uint8Array(bytes)], name, {type}));
            const target = document.querySelector("#box textarea");
            const init = {bubbles: true, cancelable: true};
            target.dispatchEvent(event === "drop" ? new DragEvent("drop", {...init, dataTransfer: data})
                                                  : new ClipboardEvent("paste", {...init, clipboardData: data}));
        }""",
        [event, name, list(content), media_type],
    )


@pytest.mark.parametrize("event", ["drop", "paste"])
def test_a_picture_can_be_dropped_and_pasted(event: str, page: Page) -> None:
    set_longest_answer(page, 10)
    hand_over(page, event, "shapes.png", EXAMPLE_PICTURES[0].read_bytes(), "image/png")
    expect(page.locator("#box .thumbnail-item")).to_have_count(1)
    ask(page, "What is this?")
    wait_for_answer(page)
    expect(questions(page)).to_have_count(2)


def test_what_is_typed_and_answered_is_never_run(page: Page) -> None:
    set_longest_answer(page, 5)
    typed = "<img src=x onerror='window.hit=1'><script>window.hit=1</script> & <b>bold</b>"
    ask(page, typed)
    wait_for_answer(page)
    expect(questions(page).last).to_have_text(typed)
    assert page.evaluate("window.hit") is None


def test_a_phone_shows_the_page_without_sideways_scrolling(browser: Browser, address: str) -> None:
    with opened_page(browser, address, width=390, height=844) as page:
        expect(page.locator("#chat .example")).to_have_count(len(EXAMPLES))
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        expect(submit_button(page)).to_be_in_viewport()


def test_until_the_engine_is_ready_the_page_says_so_and_keeps_the_question(
    browser: Browser, engine: LocalEngine
) -> None:
    waiting = RemoteEngine(f"http://127.0.0.1:{free_port()}")
    with served_page(waiting, engine.facts) as address, opened_page(browser, address) as page:
        expect(page.locator("#status .loading")).to_contain_text("waiting for the engine", timeout=10_000)
        ask(page, "Are you there?")
        expect(answers(page).last).to_contain_text("The engine is not ready yet", timeout=10_000)
        expect(questions(page).last).to_have_text("Are you there?")
        # The same page answers once the engine does.
        waiting.api_key, waiting.base_url = engine.api_key, engine.base_url
        expect(page.locator("#status .ready")).to_be_visible(timeout=10_000)
        expect(page.locator("#chat [aria-label=Retry]")).to_be_visible()


def test_a_server_that_is_gone_is_said_to_be(browser: Browser, engine: LocalEngine) -> None:
    """The page's own API may be elsewhere and down: the reader sees that, not an endless wait."""
    with listen("127.0.0.1", 0) as listener:
        address = f"http://127.0.0.1:{listener.getsockname()[1]}"
        app = create_gateway(engine, MODEL_NAME, engine.facts)
        attach_page(app, build_page(f"http://127.0.0.1:{free_port()}/v1", api_key=None, model_name=MODEL_NAME))
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            with opened_page(browser, address) as page:
                expect(page.locator("#status .unreachable")).to_be_visible(timeout=10_000)
                ask(page, "Are you there?")
                expect(answers(page).last).to_contain_text("Is it still running?", timeout=10_000)
        finally:
            server.should_exit = True
            thread.join(PATIENCE)


@pytest.mark.skipif(os.environ.get("KANGAROO_SCREENSHOT") != "1", reason="only with KANGAROO_SCREENSHOT=1")
def test_take_the_screenshot_of_the_readme(browser: Browser) -> None:
    """Joey himself, asked about one of the page's own examples; writes docs/chat.png."""
    from assistant.models import find_model

    with LocalEngine(find_model(), MODEL_NAME) as joey:
        joey.wait_until_ready(400)
        with served_page(joey, joey.facts) as address, opened_page(browser, address, height=800) as page:
            expect(page.locator("#status .ready")).to_be_visible(timeout=PATIENCE * 1000)
            upload(page, EXAMPLE_PICTURES[0])
            ask(page, EXAMPLES[0][1])
            wait_for_answer(page)
            ask(page, "What is the shape of the brown object?")
            expect(answers(page)).to_have_count(2, timeout=PATIENCE * 1000)
            wait_for_answer(page)
            page.wait_for_timeout(500)
            page.screenshot(path=ROOT / "docs" / "chat.png")
