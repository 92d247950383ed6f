"""One real vLLM and one real gateway for the whole test session, on a tiny model with random weights."""

import gc
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from fastapi import FastAPI
from playwright.sync_api import Browser, sync_playwright

from assistant.models import JOEY
from serving.engine import Engine, LocalEngine
from serving.gateway import create_gateway
from serving.jobs.data_folder import DataFolder
from serving.listening import listen
from serving.model_folder import ModelFacts
from serving.server import uvicorn_config
from tests.chromium import CHROMIUM_FLAGS, chromium_path
from tests.tiny import make_tiny_llava

MODEL_NAME = "tiny"
# vLLM starts in half a minute on two quiet cores, and in several while something else is training on them.
SECONDS_TO_START = 400.0

# A shell starts what runs in its background with Ctrl-C ignored, and programs that we start would inherit that; tests
# of Ctrl-C would wait for ever.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    """Leave what the imports left out where garbage is looked for: each training does that, and it took a second."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Our own order where files are handed out whole, as `make test` does; xdist's for the rest."""
    if config.getvalue("dist") != "loadfile":
        return None
    from tests.scheduling import EngineScheduling

    return EngineScheduling(config, log)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny LLaVA with random weights, in the published layout."""
    return make_tiny_llava(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """A real Chromium; no longer than for one file, for it keeps an event loop running in this thread."""
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=chromium_path(), args=CHROMIUM_FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture(scope="session")
def engine(tiny_model: Path) -> Iterator[LocalEngine]:
    """A real vLLM on the tiny model, ready."""
    with LocalEngine(tiny_model, MODEL_NAME) as engine:
        engine.wait_until_ready(SECONDS_TO_START)
        yield engine


@contextmanager
def served(app: FastAPI) -> Iterator[str]:
    """Serves `app` in a thread of this process and gives its address."""
    with listen("127.0.0.1", 0) as listener:
        server = uvicorn.Server(uvicorn_config(app))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(30)


@contextmanager
def gateway_client(
    engine: Engine, facts: ModelFacts, model_name: str = MODEL_NAME, data: DataFolder | None = None
) -> Iterator[httpx.Client]:
    """A client of a gateway over `engine`."""
    with (
        served(create_gateway(engine, model_name, facts, data=data)) as address,
        httpx.Client(base_url=address, timeout=120, trust_env=False) as client,
    ):
        yield client


@pytest.fixture(scope="session")
def gateway(engine: LocalEngine) -> Iterator[httpx.Client]:
    """A client of a real gateway over the real vLLM."""
    with gateway_client(engine, engine.facts) as client:
        yield client


@pytest.fixture(scope="session")
def joey_engine() -> Iterator[LocalEngine]:
    """A real vLLM on Joey, ready: for what a model must know something for."""
    # In float32 answers hang on no neighbours in the batch, so that they can be compared.
    with LocalEngine(JOEY, JOEY.name, dtype="float32", takes_adapters=True) as engine:
        engine.wait_until_ready(SECONDS_TO_START)
        yield engine


@pytest.fixture(scope="session")
def joey_gateway(joey_engine: LocalEngine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A client of a real gateway over the real vLLM on Joey, which keeps files and teaches."""
    data = DataFolder(tmp_path_factory.mktemp("data"))
    with gateway_client(joey_engine, joey_engine.facts, JOEY.name, data) as client:
        yield client
