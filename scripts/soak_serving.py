"""Keep a server under load for minutes, kill its engine half way, and say what was lost and what memory grew.

Example: python -m scripts.soak_serving --minutes 10

The exit code is 1 where a request was lost that the engine's death does not explain, where anything still runs when
nobody asks any more, or where the gateway's memory went on growing.
"""

import asyncio
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import httpx
import psutil
import typer

from scripts.bench_serving import NAME, PATH, ROOT, Place, picture, question, wait_until_ready
from serving.engine import free_port

MOST_GROWTH = 100  # MiB of the gateway, from a quarter of the time to the end


class Soak:
    """Clients that ask without a pause, and what became of their requests: `outcomes` by phase and kind.

    The phases are `before` the kill, `in flight` for requests that ran when it came, `away` for those that were sent
    while no engine was there, and `after`.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.outcomes: Counter[tuple[str, str]] = Counter()
        self.phase = "before"
        self.ending = False

    def lost(self) -> dict[tuple[str, str], int]:
        """What ended otherwise than it should, by phase and outcome."""
        fine = {"whole", "left"}
        allowed = {"before": fine, "after": fine, "away": fine | {"503", "cut"}, "in flight": fine | {"503", "cut"}}
        return {found: count for found, count in self.outcomes.items() if found[1] not in allowed[found[0]]}

    async def client(self, number: int) -> None:
        """One client: streams, whole answers, pictures old and new, and some who leave in the middle."""
        draw = random.Random(number)
        pictures = [picture(each, 320) for each in range(4)]
        async with httpx.AsyncClient(base_url=self.url, timeout=300, trust_env=False) as http:
            while not self.ending:
                body = question(draw.choice(pictures), draw.choice((4, 16, 64)))
                if draw.random() < 0.5:
                    body.pop("stream_options")
                    body["stream"] = False
                began_in = self.phase
                outcome = await self._one(http, body, leaves=draw.random() < 0.1)
                phase = "in flight" if began_in == "before" and self.phase != "before" else began_in
                self.outcomes[phase, outcome] += 1
                if outcome == "503":
                    await asyncio.sleep(0.5)

    async def _one(self, http: httpx.AsyncClient, body: dict[str, Any], leaves: bool) -> str:
        """How the request ended: whole, left, 503, cut (an error in its stream), or else what went wrong."""
        try:
            async with http.stream("POST", PATH, json=body) as answer:
                if answer.status_code != 200:
                    return str(answer.status_code)
                text = ""
                async for piece in answer.aiter_text():
                    text += piece
                    if leaves and body["stream"]:
                        return "left"
                if not body["stream"]:
                    return "whole"
                return "whole" if text.endswith("data: [DONE]\n\n") else "cut" if '"server_error"' in text else "lost"
        except httpx.HTTPError as error:
            return type(error).__name__


def engine_core(server: psutil.Process) -> psutil.Process:
    """vLLM's process that holds the model."""
    return next(each for each in server.children(recursive=True) if "EngineCore" in " ".join(each.cmdline()))


def number_of(url: str, name: str) -> float:
    """The value of one of the numbers at /metrics."""
    lines = httpx.get(f"{url}/metrics", timeout=30, trust_env=False).text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith((f"{name} ", f"{name}{{")))


async def run(place: Place, server: psutil.Process, minutes: float, at_once: int) -> list[str]:
    """The soak itself; what went wrong, in words."""
    soak = Soak(place.url)
    clients = [asyncio.create_task(soak.client(number)) for number in range(at_once)]
    half = minutes * 30
    await asyncio.sleep(half / 2)
    memory = server.memory_info().rss / 2**20
    await asyncio.sleep(half / 2)
    engine_core(server).kill()
    soak.phase = "away"
    killed = time.monotonic()
    while number_of(place.url, "kangaroo_engine_restarts") < 1:
        await asyncio.sleep(0.2)
    await asyncio.to_thread(wait_until_ready, place)
    print(f"ready again {time.monotonic() - killed:.0f} s after the engine was killed", flush=True)
    soak.phase = "after"
    await asyncio.sleep(half)
    soak.ending = True
    await asyncio.gather(*clients)
    await asyncio.sleep(2)
    grown = server.memory_info().rss / 2**20 - memory
    running = [number_of(place.url, name) for name in ("kangaroo_running_requests", "vllm:num_requests_running")]
    print(f"memory of the gateway: {memory:.0f} MiB after a quarter of the time, {memory + grown:.0f} MiB at the end")
    print(f"running requests at the end: {running[0]:.0f} at the gateway, {running[1]:.0f} in vLLM")
    for (phase, outcome), count in sorted(soak.outcomes.items()):
        print(f"{phase:>10} {outcome}: {count}")
    faults = [f"{count} requests were lost ({outcome}, {phase})" for (phase, outcome), count in soak.lost().items()]
    faults += [f"{sum(running):.0f} requests run for nobody"] if sum(running) else []
    return faults + ([f"the memory grew by {grown:.0f} MiB"] if grown > MOST_GROWTH else [])


def main(
    minutes: Annotated[float, typer.Option(min=0.5, help="Of load, less the time the engine needs to come back.")] = 10,
    at_once: Annotated[int, typer.Option(min=1, help="Clients.")] = 32,
) -> None:
    """Serve Joey with a vLLM of its own, and soak it."""
    port = free_port()
    command = [sys.executable, "-m", "ui.command_line", "serve", "--name", NAME, "--port", str(port)]
    with tempfile.TemporaryDirectory() as folder, (Path(folder) / "log").open("w") as log:
        environment = os.environ | {"XDG_DATA_HOME": folder}
        with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log) as process:
            try:
                place = Place("server", f"http://127.0.0.1:{port}", {})
                wait_until_ready(place)
                faults = asyncio.run(run(place, psutil.Process(process.pid), minutes, at_once))
            finally:
                process.terminate()
                process.wait()
    if process.returncode:
        faults.append(f"the server ended with exit code {process.returncode}")
    print(f"faults: {', '.join(faults) or 'none'}")
    raise typer.Exit(1 if faults else 0)


if __name__ == "__main__":
    typer.run(main)
