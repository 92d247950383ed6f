"""Measures a start of `kangaroo serve` and what the engine then does, with the model in a process of its own or not.

Example, on a quiet machine (some 4 minutes on two cores): python -m scripts.bench_start
"""

import json
import os
import statistics
import sys
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from itertools import count
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer

from assistant.images import encode_data_url
from assistant.models import JOEY
from assistant.questions import CAPTION_QUESTION
from scripts.bench_serving import SECONDS_TO_START, running
from serving.engine import LocalEngine, free_port
from training.data.scenes import make_scene

# vLLM's own way, and what `serving.vllm_program` sets on few cores.
WAYS: dict[str, dict[str, str]] = {
    "a process of its own": {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"},
    "in the scheduler's": {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
}
REQUESTS_A_ROUND = {1: 4, 8: 24}  # by how many are under way at once
SEEDS = count()


@contextmanager
def with_environment(said: Mapping[str, str]) -> Iterator[None]:
    """The process's environment with `said` in it, which engines inherit."""
    before = dict(os.environ)
    os.environ.update(said)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def start_of(way: Mapping[str, str]) -> dict[str, float]:
    """Seconds on the clock and of processors, and MiB, from the command to the first answer about a picture."""
    port = free_port()
    command = [sys.executable, "-m", "ui.command_line", "serve", "--port", str(port)]
    started = time.monotonic()
    with running("the server", command, port, way, "/ready") as place:
        ask(place.url, None)
        seconds = time.monotonic() - started
        assert place.process is not None
        family = [place.process, *place.process.children(recursive=True)]
        times = [member.cpu_times() for member in family]
        memory = sum(member.memory_full_info().pss for member in family) / 2**20
    return {"seconds": seconds, "processor": sum(each.user + each.system for each in times), "MiB": memory}


def ask(address: str, key: str | None) -> None:
    """64 tokens about a scene that was not shown before."""
    shown = {"type": "image_url", "image_url": {"url": encode_data_url(make_scene(next(SEEDS)).image)}}
    content = [shown, {"type": "text", "text": CAPTION_QUESTION}]
    body: dict[str, Any] = {"model": JOEY.name, "messages": [{"role": "user", "content": content}], "max_tokens": 64}
    body |= {"temperature": 0, "ignore_eos": True}
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    url = f"{address}/v1/chat/completions"
    httpx.post(url, json=body, headers=headers, timeout=600, trust_env=False).raise_for_status()


def tokens_a_second(engine: LocalEngine, at_once: int) -> float:
    """Of one round."""
    requests = REQUESTS_A_ROUND[at_once]
    started = time.monotonic()
    with ThreadPoolExecutor(at_once) as pool:
        list(pool.map(lambda _: ask(engine.base_url, engine.api_key), range(requests)))
    return 64 * requests / (time.monotonic() - started)


def speeds(rounds: int) -> dict[int, dict[str, list[float]]]:
    """Tokens a second of each way, by how many ask at once: an engine of each way, asked in turns."""
    found: dict[int, dict[str, list[float]]] = {at_once: {name: [] for name in WAYS} for at_once in REQUESTS_A_ROUND}
    with ExitStack() as running_engines:
        engines: dict[str, LocalEngine] = {}
        for name, way in WAYS.items():
            with with_environment(way):
                engines[name] = running_engines.enter_context(LocalEngine(JOEY, JOEY.name))
            engines[name].wait_until_ready(SECONDS_TO_START)
            ask(engines[name].base_url, engines[name].api_key)
        for at_once in REQUESTS_A_ROUND:
            for _ in range(rounds):
                for name, engine in engines.items():
                    found[at_once][name].append(tokens_a_second(engine, at_once))
    return found


def main(
    rounds: Annotated[int, typer.Option(min=1, help="Of speed; the middle one counts.")] = 5,
    starts: Annotated[int, typer.Option(min=1, help="Of each way, in turns; the middle one counts.")] = 3,
    out: Annotated[Path | None, typer.Option(dir_okay=False, help="Also write all figures there, as JSON.")] = None,
) -> None:
    """Start the server each way, then ask an engine of each way in turns, and print ratios."""
    began: dict[str, list[dict[str, float]]] = {name: [] for name in WAYS}
    for _ in range(starts):
        for name, way in WAYS.items():
            began[name].append(start_of(way))
    spoken = speeds(rounds)
    for name, found in began.items():
        middle = {key: statistics.median(one[key] for one in found) for key in found[0]}
        print(f"{name}: " + ", ".join(f"{value:.1f} {key}" for key, value in middle.items()))
    own, scheduler = WAYS
    for at_once, by_way in spoken.items():
        ratios = [here / there for here, there in zip(by_way[scheduler], by_way[own], strict=True)]
        print(f"{at_once} at once: {statistics.median(ratios):.2f} x ({min(ratios):.2f}-{max(ratios):.2f}) the tokens")
    if out is not None:
        out.write_text(json.dumps({"starts": began, "tokens a second": spoken}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
