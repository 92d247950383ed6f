"""The page when the server has keys: the browser asks for one, and the page works in the name of whoever has it."""

from pathlib import Path

import httpx
from playwright.sync_api import Browser, expect

from assistant.models import find_model
from serving.doors import Doors
from serving.keys import KeyLimits, KeyRing, new_key
from serving.model_folder import read_model_folder
from tests.small_engine import USAGE, small_engine
from tests.test_browser import PATIENCE, answers, ask, box, served_page, wait_for_answer


def test_the_page_works_with_a_key_in_its_visitor_s_name_and_not_without(browser: Browser, tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    key = new_key(file, "ann", KeyLimits(tokens_a_day=2 * USAGE["total_tokens"]))
    doors = Doors(keys=KeyRing(file))
    with small_engine() as engine, served_page(engine, read_model_folder(find_model(None)), doors) as address:
        refused = httpx.get(address, trust_env=False)
        assert refused.status_code == 401
        assert refused.headers["www-authenticate"].startswith("Basic ")
        for path in ("/config", "/gradio_api/info", "/gradio_api/upload", "/assets/index.js"):
            assert httpx.get(address + path, trust_env=False).status_code == 401
        context = browser.new_context(http_credentials={"username": "anybody", "password": key})
        page = context.new_page()
        page.goto(address)
        expect(box(page)).to_be_visible(timeout=PATIENCE * 1000)
        for number in (1, 2):
            ask(page, "Is it you?")
            expect(answers(page)).to_have_count(number, timeout=PATIENCE * 1000)
            wait_for_answer(page)
            expect(answers(page).last).to_have_text("Yes.")
        ask(page, "And again?")
        expect(answers(page).last).to_contain_text("20 tokens of today", timeout=PATIENCE * 1000)
        context.close()
