"""Measure what taking adapters costs an engine: its start, its memory, its speed, and how long loading one holds it up.

Example, on a quiet machine: python scripts/bench_adapters.py
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import httpx
import psutil
import typer

from assistant.models import JOEY
from serving.engine import LocalEngine, free_port
from serving.openapi import PICTURE

SECONDS_TO_START = 900.0
QUESTION = [
    {"type": "image_url", "image_url": {"url": PICTURE}},
    {"type": "text", "text": "Describe the picture in detail."},
]
KEY = "KANGAROO_BENCH_ENGINE_KEY"


@dataclass(frozen=True)
class Target:
    """What is measured: a model by its name, at a running vLLM."""

    told: str
    engine: LocalEngine
    model: str


def body(model: str, tokens: int, **more: Any) -> dict[str, Any]:
    """A request for exactly so many tokens."""
    asked = {"model": model, "messages": [{"role": "user", "content": QUESTION}], "max_tokens": tokens}
    return asked | {"temperature": 0, "ignore_eos": True} | more


def make_adapters(folder: Path, count: int) -> None:
    """Adapters on Joey of the size that `kangaroo tune` makes, as they are before the first step."""
    from assistant.adapter_files import save_adapter
    from assistant.checkpoint import load_llava
    from training.adapters import LoraSettings, add_lora

    model, _ = load_llava(JOEY)
    adapter = add_lora(model, LoraSettings(), JOEY, JOEY.name)
    for number in range(count):
        save_adapter(adapter.config, adapter.weights(model), JOEY, JOEY.name, folder / f"adapter{number}")


def started(stack: ExitStack, takes_adapters: bool) -> LocalEngine:
    """A vLLM on Joey; what its start took is told."""
    began = time.monotonic()
    engine = stack.enter_context(LocalEngine(JOEY, JOEY.name, takes_adapters=takes_adapters))
    engine.wait_until_ready(SECONDS_TO_START)
    seconds = time.monotonic() - began
    port = engine.base_url.rpartition(":")[2]
    own = [each for each in psutil.Process().children(recursive=True) if port in each.cmdline()]
    everybody = {each for parent in own for each in (parent, *parent.children(recursive=True))}
    memory = sum(each.memory_info().rss for each in everybody) / 2**20
    typer.echo(f"{named(takes_adapters)}: ready in {seconds:.1f} s, {memory:.0f} MiB resident")
    return engine


def named(takes_adapters: bool) -> str:
    return "an engine that takes adapters" if takes_adapters else "an engine that takes none"


def client_of(engine: LocalEngine) -> httpx.Client:
    headers = {"Authorization": f"Bearer {engine.api_key}"}
    return httpx.Client(base_url=engine.base_url, headers=headers, timeout=600, trust_env=False)


def speed(target: Target, at_once: int, tokens: int) -> float:
    """Tokens a second of so many requests at once."""
    with client_of(target.engine) as client, ThreadPoolExecutor(at_once) as pool:

        def ask(_: int) -> None:
            client.post("/v1/chat/completions", json=body(target.model, tokens)).raise_for_status()

        began = time.monotonic()
        list(pool.map(ask, range(at_once)))
        return at_once * tokens / (time.monotonic() - began)


@contextmanager
def gateway(engine: LocalEngine, adapters: Path, data: Path) -> Iterator[httpx.Client]:
    """A client of `kangaroo serve` in front of the engine, as a program of its own."""
    port = free_port()
    words = [sys.executable, "-m", "ui.command_line", "serve", str(JOEY), "--port", str(port)]
    words += ["--engine-url", engine.base_url, "--engine-key-env", KEY, "--name", JOEY.name]
    words += ["--adapters", str(adapters), "--data-folder", str(data)]
    environment = os.environ | {KEY: engine.api_key or "", "XDG_DATA_HOME": str(data)}
    program = subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=600, trust_env=False) as client:
            deadline = time.monotonic() + SECONDS_TO_START
            while not _is_ready(client):
                if time.monotonic() > deadline or program.poll() is not None:
                    raise SystemExit("the gateway did not start")
                time.sleep(0.2)
            yield client
    finally:
        program.terminate()
        program.wait()


def _is_ready(client: httpx.Client) -> bool:
    try:
        return client.get("/ready").status_code == 200
    except httpx.TransportError:
        return False


def event_times(client: httpx.Client, model: str, tokens: int, times: list[float]) -> None:
    """Note when each event of a streamed answer came."""
    with client.stream("POST", "/v1/chat/completions", json=body(model, tokens, stream=True)) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: "):
                times.append(time.monotonic())


def stall(client: httpx.Client, folders: list[str], tokens: int) -> tuple[list[float], list[float], list[float]]:
    """Milliseconds between the events of running answers: while adapters are loaded, and at other times.

    Last come the seconds that each load took. One answer follows the other as long as there is something to load.
    """
    times: list[float] = []
    loads: list[tuple[float, float]] = []
    over = threading.Event()

    def answer_on() -> None:
        while not over.is_set():
            event_times(client, JOEY.name, tokens, times)

    reader = threading.Thread(target=answer_on)
    reader.start()
    for folder in folders:
        time.sleep(3)
        began = time.monotonic()
        client.post("/v1/adapters", json={"name": f"{folder}-again", "folder": folder}).raise_for_status()
        loads.append((began, time.monotonic()))
    over.set()
    reader.join()
    gaps = [(before, after, 1000 * (after - before)) for before, after in pairwise(times)]
    during = [gap for before, after, gap in gaps if any(before < end and after > began for began, end in loads)]
    otherwise = [gap for before, after, gap in gaps if not any(before < end and after > began for began, end in loads)]
    return during, otherwise, [end - began for began, end in loads]


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    at_once: Annotated[int, typer.Option(min=1, help="Requests at one time.")] = 16,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of each answer.")] = 64,
    rounds: Annotated[int, typer.Option(min=1, help="How often the targets take turns.")] = 3,
    loads: Annotated[int, typer.Option(min=1, help="Adapters that are loaded while an answer runs.")] = 5,
    out: Annotated[Path | None, typer.Option(dir_okay=False, help="Also write all figures there, as JSON.")] = None,
) -> None:
    """Measure on this machine, with Joey: two engines run at once and take turns, so that others hit them alike."""
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        adapters = Path(name) / "adapters"
        make_adapters(adapters, loads)
        without, taking = (started(stack, takes) for takes in (False, True))
        with client_of(taking) as client:
            path = str(adapters / "adapter0")
            client.post("/v1/load_lora_adapter", json={"lora_name": "asked", "lora_path": path}).raise_for_status()
        targets = [
            Target("base, of an engine that takes none", without, JOEY.name),
            Target("base, of an engine that takes adapters", taking, JOEY.name),
            Target("an adapter", taking, "asked"),
        ]
        for target in targets:
            speed(target, at_once, 8)  # the first requests find cold caches
        found: dict[str, list[float]] = {target.told: [] for target in targets}
        for _ in range(rounds):
            for target in targets:
                found[target.told].append(speed(target, at_once, tokens))
        for told, speeds in found.items():
            typer.echo(f"{told}: {statistics.median(speeds):.0f} tokens/s ({min(speeds):.0f}-{max(speeds):.0f})")
        figures["tokens_per_second"] = found
        with gateway(taking, adapters, Path(name) / "data") as client:
            while len(client.get("/v1/adapters").json()["data"]) < loads:
                time.sleep(0.5)
            during, otherwise, seconds = stall(client, [f"adapter{number}" for number in range(loads)], 500)
        for told, gaps in (("while one is loaded", during), ("otherwise", otherwise)):
            typer.echo(
                f"between two events of a running answer, {told}: median {statistics.median(gaps):.1f} ms, "
                f"99 % below {statistics.quantiles(gaps, n=100)[-1]:.1f} ms, longest {max(gaps):.1f} ms ({len(gaps)})"
            )
        typer.echo(f"a load took {statistics.median(seconds):.1f} s ({max(seconds):.1f} s at most)")
        figures |= {"gaps_while_loading_ms": during, "gaps_otherwise_ms": otherwise, "load_seconds": seconds}
    if out is not None:
        out.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    app()
