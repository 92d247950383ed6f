"""Adapters come and go beside a real vLLM on Joey: each answers as transformers with it, and the base as without."""

import json
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import torch
from fastapi import FastAPI
from peft import LoraConfig, PeftModel
from playwright.sync_api import Browser, expect
from safetensors.torch import load_file, save_file
from torch import nn
from typer.testing import CliRunner
from vllm.lora.layers import LoRAMapping
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

from assistant.adapter_files import load_adapted, save_adapter
from assistant.adapter_layouts import PREFIX
from assistant.adapter_serving import write_servable
from assistant.checkpoint import load_llava
from assistant.images import encode_data_url
from assistant.models import JOEY, ModelError
from serving.adapters import AdapterPlaces
from serving.cpu_adapters import AdapterRows
from serving.doors import Doors
from serving.engine import LocalEngine, Phase
from serving.gateway import create_gateway
from serving.keys import KeyRing, new_key
from serving.model_folder import read_model_folder
from serving.openapi import PICTURE
from serving.restarting import RestartingEngine
from tests.conftest import SECONDS_TO_START, served
from tests.test_browser import answers as shown_answers
from tests.test_browser import box, opened_page
from tests.test_engine import wait_until
from tests.test_serving_parity import Answer, Prompt, ask_transformers, prompts
from tests.tiny import make_tiny_llava
from ui.browser.chat import attach_page, build_page
from ui.command_line import app

BASE = JOEY.name
WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
ASKED = prompts()[:6]  # two questions with 0, 1 and 2 pictures


def make_adapter(folder: Path, base: Path = JOEY, seed: int = 1, part: str = "language_model", rank: int = 8) -> Path:
    """peft's own random LoRA on every linear layer of `part`, as peft saves it."""
    torch.manual_seed(seed)
    model, _ = load_llava(base)
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and f".{part}." in name]
    config = LoraConfig(r=rank, lora_alpha=8 * rank, target_modules=linear, init_lora_weights=False)
    PeftModel(model, config).save_pretrained(str(folder))
    return folder


def own_adapter(folder: Path, base: Path) -> Path:
    """One that says by hash of which base it is, as `kangaroo tune` writes it."""
    model, _ = load_llava(base)
    config = LoraConfig(r=4, target_modules=["model.language_model.layers.0.mlp.up_proj"], init_lora_weights=False)
    adapted = PeftModel(model, config)
    own = {name.removeprefix(PREFIX): value for name, value in adapted.named_parameters() if ".lora_" in name}
    save_adapter(config, own, base, "some base", folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The server's folder of adapters: two good ones and what is wrong in some way."""
    folder: Path = tmp_path_factory.mktemp("adapters")
    make_adapter(folder / "one", seed=1)
    make_adapter(folder / "two", seed=2)
    make_adapter(folder / "high", rank=128)
    shutil.copytree(folder / "one", folder / "damaged")
    content = (folder / "one" / WEIGHTS).read_bytes()
    (folder / "damaged" / WEIGHTS).write_bytes(content[: len(content) // 2])
    (folder / "empty").mkdir()
    return folder


@contextmanager
def gateway_over(engine: LocalEngine, places: AdapterPlaces, key_file: Path | None = None) -> Iterator[str]:
    """The address of a gateway over Joey's engine that serves adapters."""
    doors = Doors(keys=KeyRing(key_file)) if key_file is not None else None
    with served(create_gateway(engine, BASE, engine.facts, doors=doors, adapters=places)) as address:
        yield address


def client_of(address: str, key: str | None = None) -> httpx.Client:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return httpx.Client(base_url=address, headers=headers, timeout=120, trust_env=False)


@pytest.fixture(scope="module")
def gateway(joey_engine: LocalEngine, folder: Path) -> Iterator[httpx.Client]:
    with gateway_over(joey_engine, AdapterPlaces(folder=folder)) as address, client_of(address) as client:
        yield client


def load(client: httpx.Client, name: str, folder: str) -> httpx.Response:
    return client.post("/v1/adapters", json={"name": name, "folder": folder})


@contextmanager
def loaded(client: httpx.Client, name: str, folder: str) -> Iterator[dict[str, Any]]:
    """The adapter in `folder`, served by `name` for a while."""
    answer = load(client, name, folder)
    assert answer.status_code == 200, answer.text
    yield answer.json()
    assert client.delete(f"/v1/adapters/{name}").status_code == 200


def ask(client: httpx.Client, model: str, prompt: Prompt) -> list[int]:
    """The tokens of the greedy answer."""
    answer = client.post("/v1/chat/completions", json={"model": model, **body_of(prompt)})
    assert answer.status_code == 200, answer.text
    assert answer.json()["model"] == model
    return list(answer.json()["choices"][0]["token_ids"])


def body_of(prompt: Prompt, tokens: int = 24) -> dict[str, Any]:
    """A request for the likeliest answer, less the model."""
    messages = prompt.messages(lambda picture: {"type": "image_url", "image_url": {"url": encode_data_url(picture)}})
    return {"messages": messages, "max_tokens": tokens, "temperature": 0, "return_token_ids": True}


def answers(client: httpx.Client, model: str) -> list[list[int]]:
    return [ask(client, model, prompt) for prompt in ASKED]


def expected(model: Any, processor: Any) -> list[list[int]]:
    """By transformers."""
    found: list[Answer] = [ask_transformers(model.eval(), processor, prompt) for prompt in ASKED]
    return [answer.ids for answer in found]


@pytest.fixture(scope="module")
def of_one(folder: Path) -> list[list[int]]:
    """What transformers answers with Joey and the adapter `one` on it."""
    return expected(*load_adapted(folder / "one", JOEY))


@pytest.fixture(scope="module")
def of_two(folder: Path) -> list[list[int]]:
    return expected(*load_adapted(folder / "two", JOEY))


@pytest.fixture(scope="module")
def of_base() -> list[list[int]]:
    return expected(*load_llava(JOEY))


def test_an_adapter_answers_as_transformers_does_also_when_the_engine_lost_it(
    gateway: httpx.Client,
    joey_engine: LocalEngine,
    of_one: list[list[int]],
    of_base: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with loaded(gateway, "one", "one") as told:
        assert (told["parent"], told["rank"], told["modules"], told["status"]) == (BASE, 8, 42, "loaded")
        assert answers(gateway, "one") == of_one
        assert answers(gateway, BASE) == of_base
        assert sum(one != other for one, other in zip(of_one, of_base, strict=True)) >= 4
        # As an engine that was started again: it has forgotten, and counts one start more.
        headers = {"Authorization": f"Bearer {joey_engine.api_key}"}
        httpx.post(
            f"{joey_engine.base_url}/v1/unload_lora_adapter", json={"lora_name": "one"}, headers=headers
        ).raise_for_status()
        lost = gateway.post("/v1/chat/completions", json={"model": "one", **body_of(ASKED[0])})
        assert lost.status_code == 404
        monkeypatch.setattr(joey_engine, "restarts", 1)
        assert answers(gateway, "one") == of_one


@pytest.mark.slow
def test_an_engine_that_is_killed_has_its_adapters_again(
    folder: Path, of_one: list[list[int]], of_base: list[list[int]]
) -> None:
    """The process of vLLM itself; the gateway stays, and asks the new one."""
    engine = RestartingEngine(lambda: LocalEngine(JOEY, BASE, dtype="float32", takes_adapters=True), first_wait=0.1)
    with engine:
        wait_until(lambda: engine.state().phase is Phase.READY, SECONDS_TO_START, "ready")
        gateway = create_gateway(engine, BASE, read_model_folder(JOEY), adapters=AdapterPlaces(folder=folder))
        with served(gateway) as address, client_of(address) as client, loaded(client, "one", "one"):
            assert answers(client, "one") == of_one
            port = engine.base_url.rpartition(":")[2]  # other tests' engines live beside it
            [vllm] = [
                process
                for process in psutil.Process().children(recursive=True)
                if port in process.cmdline() and "supervisor.py" not in " ".join(process.cmdline())
            ]
            vllm.kill()
            wait_until(lambda: engine.restarts == 1, 60, "started again")
            wait_until(lambda: engine.state().phase is Phase.READY, SECONDS_TO_START, "ready again")
            assert answers(client, "one") == of_one
            assert answers(client, BASE) == of_base


@pytest.mark.slow
def test_an_engine_that_takes_none_says_how_it_would(folder: Path) -> None:
    with (
        LocalEngine(JOEY, BASE) as engine,
        gateway_over(engine, AdapterPlaces(folder=folder)) as address,
        client_of(address) as client,
    ):
        engine.wait_until_ready(SECONDS_TO_START)
        answer = load(client, "one", "one")
        assert answer.status_code == 400
        assert "--enable-lora" in answer.json()["error"]["message"]


@pytest.mark.slow
def test_base_and_adapters_answer_at_once_as_each_alone_while_adapters_come_and_go(
    gateway: httpx.Client, of_base: list[list[int]], of_one: list[list[int]], of_two: list[list[int]]
) -> None:
    """In the same batches of vLLM. On a CPU its own code gives the base the weights of the last adapter there."""
    with loaded(gateway, "one", "one"), ThreadPoolExecutor(8) as pool:
        with loaded(gateway, "two", "two"):
            asked = [(BASE, of_base), ("one", of_one), ("two", of_two), (BASE, of_base)]
            running = [(pool.submit(answers, gateway, model), right) for model, right in asked * 2]
            with loaded(gateway, "three", "one"):
                assert ask(gateway, "three", ASKED[1]) == of_one[1]
            for answered, right in running:
                assert answered.result() == right
        assert answers(gateway, BASE) == of_base


@pytest.mark.slow
def test_another_adapter_of_the_same_name_answers_for_itself(
    gateway: httpx.Client, of_one: list[list[int]], of_two: list[list[int]]
) -> None:
    """And not out of what vLLM remembers of the first one's prompts."""
    with loaded(gateway, "birds", "one"):
        assert ask(gateway, "birds", ASKED[1]) == of_one[1]
    with loaded(gateway, "birds", "two"):
        assert ask(gateway, "birds", ASKED[1]) == of_two[1]


def test_every_route_takes_an_adapter(gateway: httpx.Client) -> None:
    with loaded(gateway, "org/one:v1", "one"):
        listed = {model["id"]: model["parent"] for model in gateway.get("/v1/models").json()["data"]}
        assert listed == {BASE: None, "org/one:v1": BASE}
        assert gateway.get("/v1/models/org/one:v1").json()["parent"] == BASE
        base, adapted = (
            gateway.post("/v1/captions", json={"model": model, "pictures": [PICTURE]}).json()
            for model in (BASE, "org/one:v1")
        )
        assert adapted["model"] == "org/one:v1"
        assert adapted["data"][0]["text"] != base["data"][0]["text"]
        question = {"model": "org/one:v1", "pictures": [PICTURE], "question": "What is this?", "max_tokens": 8}
        assert gateway.post("/v1/answers", json=question).json()["failed"] == 0
        response = gateway.post("/v1/responses", json={"model": "org/one:v1", "input": "Hello", "max_output_tokens": 4})
        assert response.json()["model"] == "org/one:v1"
    gone = gateway.post("/v1/captions", json={"model": "org/one:v1", "pictures": [PICTURE]})
    assert (gone.status_code, gone.json()["error"]["code"]) == (404, "model_not_found")


def test_what_cannot_be_loaded_is_refused_with_the_reason(gateway: httpx.Client, folder: Path, tmp_path: Path) -> None:
    outside = make_adapter(tmp_path / "outside")
    (folder / "link").symlink_to(outside)
    shutil.copytree(folder / "one", folder / "linked weights")
    (folder / "linked weights" / WEIGHTS).unlink()
    (folder / "linked weights" / WEIGHTS).symlink_to(outside / WEIGHTS)
    refused = {
        ("damaged", "damaged"): (400, "weights are damaged"),
        ("high", "high"): (400, "rank 128 is greater than max_lora_rank 32"),
        ("empty", "empty"): (400, "there is no adapter in 'empty'"),
        ("none", "nowhere"): (400, "there is no adapter in 'nowhere'"),
        ("up", f"../{outside.parent.name}/outside"): (400, "no path below the server's folder"),
        ("absolute", str(outside)): (400, "no path below the server's folder"),
        ("link", "link"): (400, "leads out of the server's folder"),
        ("linked", "linked weights"): (400, "leads out of the server's folder"),
        (BASE, "one"): (409, "is the base itself"),
        ("with space", "one"): (400, "is no name for an adapter"),
    }
    for (name, where), (status, reason) in refused.items():
        answer = load(gateway, name, where)
        assert (answer.status_code, reason in answer.json()["error"]["message"]) == (status, True), answer.text
        assert str(folder) not in answer.text
    assert gateway.get("/v1/adapters").json()["data"] == []
    with loaded(gateway, "taken", "one"):
        assert load(gateway, "taken", "two").status_code == 409
    assert gateway.delete("/v1/adapters/taken").status_code == 404
    assert gateway.delete(f"/v1/models/{BASE}").status_code == 400
    assert ask(gateway, BASE, ASKED[0])  # the engine is well


@pytest.mark.slow
def test_an_adapter_is_for_the_key_that_loaded_it(joey_engine: LocalEngine, folder: Path, tmp_path: Path) -> None:
    keys = {name: new_key(tmp_path / "keys.json", name) for name in ("ann", "bob")}
    places = AdapterPlaces(named={"everybody's": folder / "nothing", "all": folder / "two"}, folder=folder)
    with (
        gateway_over(joey_engine, places, tmp_path / "keys.json") as address,
        client_of(address, keys["ann"]) as ann,
        client_of(address, keys["bob"]) as bob,
    ):
        with loaded(ann, "anns", "one"):
            assert {model["id"] for model in ann.get("/v1/models").json()["data"]} == {BASE, "all", "anns"}
            assert {model["id"] for model in bob.get("/v1/models").json()["data"]} == {BASE, "all"}
            body = body_of(ASKED[0], tokens=2)
            for path, method in (("/v1/models/anns", "GET"), ("/v1/models/anns", "DELETE")):
                assert bob.request(method, path).status_code == 404
            asked = bob.post("/v1/chat/completions", json={"model": "anns", **body})
            assert (asked.status_code, "anns" in asked.json()["error"]["message"].partition(";")[2]) == (404, False)
            assert ann.post("/v1/chat/completions", json={"model": "anns", **body}).status_code == 200
            assert bob.post("/v1/chat/completions", json={"model": "all", **body}).status_code == 200
        forbidden = bob.delete("/v1/adapters/all")
        assert forbidden.status_code == 403, forbidden.text


@pytest.mark.slow
def test_the_command_lists_what_is_served(joey_engine: LocalEngine, folder: Path, tmp_path: Path) -> None:
    command = CliRunner()
    key = new_key(tmp_path / "keys.json", "ann")
    with gateway_over(joey_engine, AdapterPlaces(folder=folder), tmp_path / "keys.json") as address:
        with client_of(address, key) as client, loaded(client, "birds", "one"):
            told = command.invoke(app, ["models", "--url", address, "--key-env", "KEY"], env={"KEY": key})
            assert told.exit_code == 0
            assert [line.split()[1:6:2] for line in told.stdout.splitlines()[3:5]] == [
                [BASE, "-", "kangaroo"],
                ["birds", BASE, "ann"],
            ]
        refused = command.invoke(app, ["models", "--url", address])
        assert (refused.exit_code, "wants a key" in refused.stderr) == (1, True)
    nobody = command.invoke(app, ["models", "--url", address])
    assert (nobody.exit_code, "no server answers" in nobody.stderr) == (1, True)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--adapter", "birds"], "write NAME=FOLDER"),
        (["--adapter", "birds=nowhere"], "there is no adapter in nowhere"),
        (["--adapters", "nowhere"], "there is no folder nowhere"),
    ],
)
def test_the_command_refuses_what_is_not_there(words: list[str], reason: str) -> None:
    done = CliRunner().invoke(app, ["serve", *words])
    assert (done.exit_code, reason in done.stderr) == (1, True), done.stderr


@pytest.mark.slow
def test_the_page_offers_what_is_served_now(joey_engine: LocalEngine, folder: Path, browser: Browser) -> None:
    """A visitor who opens the settings sees an adapter that was loaded after the page, and is answered by it."""
    with gateway_over(joey_engine, AdapterPlaces(folder=folder)) as address, client_of(address) as client:
        with_page = FastAPI()
        attach_page(with_page, build_page(f"{address}/v1", api_key=None, model_name=BASE))
        with served(with_page) as page_address, opened_page(browser, page_address) as page:
            page.click("#settings button")
            expect(page.get_by_label("number input for Longest answer, in tokens")).to_be_visible()
            expect(page.locator("#model")).not_to_be_visible()
            page.click("#settings button")
            with loaded(client, "birds", "one"):
                page.click("#settings button")
                page.locator("#model input").click()
                page.get_by_role("option", name="birds").click()
                box(page).fill("What is this?")
                box(page).press("Enter")
                asked = {"messages": [{"role": "user", "content": "What is this?"}], "max_tokens": 256}
                said = client.post("/v1/chat/completions", json={"model": "birds", "temperature": 0, **asked}).json()
                words = said["choices"][0]["message"]["content"].split()
                expect(shown_answers(page).last).to_contain_text(words[0], timeout=60_000)


@pytest.mark.slow
def test_what_is_kept_is_there_again(joey_engine: LocalEngine, folder: Path, tmp_path: Path) -> None:
    places = AdapterPlaces(folder=folder, kept=tmp_path / "kept")
    with gateway_over(joey_engine, places) as address, client_of(address) as client:
        assert load(client, "stays", "one").status_code == 200
        first = ask(client, "stays", ASKED[1])
    [note] = (tmp_path / "kept").glob("*/kangaroo.json")
    (tmp_path / "kept" / "unfinished").mkdir()
    other = tmp_path / "kept" / "of another base"
    shutil.copytree(note.parent, other)
    (other / note.name).write_text(json.dumps(json.loads(note.read_text()) | {"name": "b", "base_sha256": "0"}))
    with gateway_over(joey_engine, places) as address, client_of(address) as client:
        assert ask(client, "stays", ASKED[1]) == first
        assert [model["id"] for model in client.get("/v1/models").json()["data"]] == [BASE, "stays"]
        assert client.delete("/v1/models/stays").json() == {"id": "stays", "object": "model", "deleted": True}
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == ["of another base"]


def test_vllm_itself_gives_the_base_an_adapter_on_a_cpu_and_the_mend_does_not() -> None:
    """Where its own way is right one day, the mend can go."""
    rows, width, rank, slots = 7, 16, 4, 3
    asked = [0, 0, 5, 5, 0, 9, 5]  # who asked for each row: the base, or the adapter of that number
    held = [5, None, 9]  # which adapter is in which slot
    torch.manual_seed(0)
    first, second = torch.randn(slots, 1, rank, width), torch.randn(slots, 1, width, rank)
    x, start = torch.randn(rows, width), torch.randn(rows, width)
    right = start.clone()
    for row, number in enumerate(asked):
        if number:
            right[row] += second[held.index(number), 0] @ first[held.index(number), 0] @ x[row]
    off = {}
    for kind in (PunicaWrapperCPU, AdapterRows):
        wrapper = kind(64, 8, "cpu")
        wrapper.update_metadata(LoRAMapping(tuple(asked), (0, 5, 0, 9), is_prefill=True), held, slots, 100)
        y = start.clone()
        wrapper.add_lora_linear(y, x, (first,), (second,), 1.0, (width,))
        off[kind] = ((y - right).abs().amax(1) > 1e-4).tolist()
    assert off[AdapterRows] == [False] * rows
    assert off[PunicaWrapperCPU] == [number == 0 for number in asked]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llava(tmp_path_factory.mktemp("base"))


def rename(old: str, new: str) -> Callable[[Path], None]:
    """Writes other names into the adapter's weights."""

    def change(adapter: Path) -> None:
        weights = {key.replace(old, new): value for key, value in load_file(adapter / WEIGHTS).items()}
        save_file(weights, adapter / WEIGHTS)
        config = json.loads((adapter / CONFIG).read_text())
        config["target_modules"] = [name.replace(old, new) for name in config["target_modules"]]
        (adapter / CONFIG).write_text(json.dumps(config))

    return change


def spoil(adapter: Path) -> None:
    weights = load_file(adapter / WEIGHTS)
    next(iter(weights.values()))[0, 0] = float("nan")
    save_file(weights, adapter / WEIGHTS)


def hide_rank(adapter: Path) -> None:
    (adapter / CONFIG).write_text(json.dumps(json.loads((adapter / CONFIG).read_text()) | {"use_dora": True}))


BROKEN: dict[str, tuple[Callable[[Path, Path], Any], str]] = {
    "no adapter": (lambda adapter, base: adapter.mkdir(), "holds no adapter"),
    "tower": (lambda adapter, base: make_adapter(adapter, base, part="vision_tower"), "vLLM would drop them"),
    "projector": (lambda adapter, base: make_adapter(adapter, base, part="multi_modal_projector"), "vLLM would drop"),
    "hits nothing": (lambda adapter, base: rename(".layers.", ".blocks.")(make_adapter(adapter, base)), "hits no"),
    "of other shapes": (lambda adapter, base: make_adapter(adapter, JOEY), "incomplete or of another model"),
    "no numbers": (lambda adapter, base: spoil(make_adapter(adapter, base)), "values that are no numbers"),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_vllm_never_sees_a_broken_adapter(broken: str, base: Path, tmp_path: Path) -> None:
    make, reason = BROKEN[broken]
    make(tmp_path / "adapter", base)
    with pytest.raises(ModelError, match=reason):
        write_servable(tmp_path / "adapter", base, tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_an_adapter_that_names_another_base_is_refused(base: Path, tmp_path: Path) -> None:
    """Even one of the same shapes, whose answers would be noise."""
    other = make_tiny_llava(tmp_path / "other", seed=1)
    own_adapter(tmp_path / "adapter", other)
    with pytest.raises(ModelError, match=r"was trained on some base .* holds others"):
        write_servable(tmp_path / "adapter", base, tmp_path / "copy")
    written = write_servable(tmp_path / "adapter", other, tmp_path / "copy")
    assert (written.modules, written.rank, written.warning) == (1, 4, None)
