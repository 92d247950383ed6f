"""Compare the gateway with the vLLM behind it, in turns on like requests, and with `transformers serve`.

Example, on a quiet machine (some 4 minutes on two cores): python scripts/bench_serving.py

The gateway and the very vLLM that it started are asked in turns, so that whatever else the machine does meets both
alike; each ratio is the middle one of its rounds. The pictures are others in every request, for vLLM remembers them.
"""

import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

import httpx
import psutil
import typer
from PIL import Image

from assistant.images import encode_data_url
from assistant.models import find_model
from serving.engine import free_port

ROOT = Path(__file__).resolve().parent.parent
PATH = "/v1/chat/completions"
SECONDS_TO_START = 600.0
NAME = "bench"
KEY = "VLLM_API_KEY"  # in vLLM's environment
REQUESTS_A_ROUND = {1: 4, 8: 16, 32: 64}  # by how many of them are under way at once
SHARE, ADDED_MS, SECOND_TURN, TIMES_TRANSFORMERS = 97, 5, 1.5, 7  # what we aim at
SEEDS = count()


@dataclass(frozen=True)
class Place:
    """Where requests go; `process` is what answers them, where its processor time is of interest."""

    name: str
    url: str
    headers: Mapping[str, str] = field(default_factory=dict)
    process: psutil.Process | None = None

    def processor_seconds(self) -> float:
        if self.process is None:
            return 0.0
        times = self.process.cpu_times()
        return times.user + times.system


@dataclass(frozen=True)
class Round:
    """What one round of requests took: tokens written in a second, and each request's seconds to its first event."""

    tokens_a_second: float
    first: list[float]
    processor_ms: float  # of the place's own process, for each request


@contextmanager
def running(name: str, command: list[str], port: int, more: Mapping[str, str], ready: str) -> Iterator[Place]:
    """A server in a process of its own, once `ready` answers. Raises TimeoutError where it does not in time."""
    with (
        tempfile.TemporaryDirectory() as folder,  # holds no keys of the person who measures
        subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | {"XDG_DATA_HOME": folder} | dict(more),
            stderr=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        ) as process,
    ):
        try:
            place = Place(name, f"http://127.0.0.1:{port}", process=psutil.Process(process.pid))
            wait_until_ready(place, ready)
            yield place
        finally:
            process.terminate()


@contextmanager
def gateway_and_its_vllm(model: Path) -> Iterator[tuple[Place, Place]]:
    """`kangaroo serve`, as people run it, and the vLLM that it started."""
    port = free_port()
    command = [sys.executable, "-m", "ui.command_line", "serve", str(model), "--name", NAME, "--port", str(port)]
    with running("gateway", command, port, {}, "/ready") as ours:
        assert ours.process is not None
        yield ours, vllm_below(ours.process)


def vllm_below(gateway: psutil.Process) -> Place:
    """The engine that a gateway started; its key stands in its environment. Raises LookupError where there is none."""
    for process in gateway.children(recursive=True):
        flags = process.cmdline()
        if KEY in process.environ() and "--port" in flags:
            headers = {"Authorization": f"Bearer {process.environ()[KEY]}"}
            return Place("vllm", f"http://127.0.0.1:{flags[flags.index('--port') + 1]}", headers)
    raise LookupError("the gateway has started no vLLM")


def put_apart(gateway: psutil.Process) -> None:
    """vLLM on the first core, the gateway on the others. Raises typer.BadParameter where there is one only."""
    first, *others = sorted(os.sched_getaffinity(0))
    if not others:
        raise typer.BadParameter("there is one core only", param_hint="--apart")
    for process, cores in [(gateway, others), *((child, [first]) for child in gateway.children(recursive=True))]:
        for thread in process.threads():
            os.sched_setaffinity(thread.id, cores)


def transformers_serve(model: Path) -> Any:
    """What transformers brings along, with its defaults; it has the model loaded once it is healthy."""
    port = free_port()
    program = str(Path(sys.executable).with_name("transformers"))
    command = [program, "serve", str(model), "--host", "127.0.0.1", "--port", str(port)]
    return running("transformers serve", command, port, {"HF_HUB_OFFLINE": "1"}, "/health")


def wait_until_ready(place: Place, path: str = "/ready") -> None:
    """Raises TimeoutError where it is not ready in time."""
    deadline = time.monotonic() + SECONDS_TO_START
    while time.monotonic() < deadline:
        try:
            if httpx.get(place.url + path, timeout=5, trust_env=False).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    raise TimeoutError(f"{place.name} is not ready in {SECONDS_TO_START:.0f} s")


def picture(seed: int, side: int) -> str:
    """A JPEG of about the size that a photograph has; another one for each `seed`."""
    noise = Image.effect_noise((side // 8, side // 8), 60).resize((side, side), Image.Resampling.BICUBIC)
    return encode_data_url(Image.merge("RGB", [noise, noise.rotate(90), noise.rotate(seed % 360)]), jpeg_quality=85)


def question(url: str | None, tokens: int, turns: int = 1) -> dict[str, Any]:
    """A streamed request about one picture, or none, that is answered with exactly so many tokens."""
    shown = [{"type": "image_url", "image_url": {"url": url}}] if url is not None else []
    asked = {"type": "text", "text": "What is in this picture?" if shown else f"What is the number {next(SEEDS)}?"}
    messages: list[dict[str, Any]] = [{"role": "user", "content": [*shown, asked]}]
    for _ in range(turns - 1):
        messages += [{"role": "assistant", "content": "A picture."}, {"role": "user", "content": "What else?"}]
    body = {"model": NAME, "messages": messages, "max_tokens": tokens, "ignore_eos": True, "temperature": 0}
    return body | {"stream": True, "stream_options": {"include_usage": True}}


def as_transformers_takes_it(body: dict[str, Any], model: Path) -> dict[str, Any]:
    """The same request in the fields that `transformers serve` knows."""
    generation = {"do_sample": False, "max_new_tokens": body["max_tokens"], "min_new_tokens": body["max_tokens"]}
    messages = {"model": str(model), "messages": body["messages"], "stream": True}
    return messages | {"generation_config": json.dumps(generation)}


async def ask(place: Place, body: dict[str, Any]) -> tuple[float, int]:
    """Seconds to the first event of the answer, and the tokens written.

    By the bare connection: a client library takes longer for an event than the gateway, on the cores that are measured.
    Raises RuntimeError where the answer is none.
    """
    address = urlsplit(place.url)
    content = json.dumps(body).encode()
    head = f"POST {PATH} HTTP/1.1\r\nHost: {address.netloc}\r\nContent-Type: application/json\r\nConnection: close\r\n"
    head += "".join(f"{name}: {value}\r\n" for name, value in place.headers.items())
    began = time.perf_counter()
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    writer.write(head.encode() + f"Content-Length: {len(content)}\r\n\r\n".encode() + content)
    first, answer = None, b""
    while piece := await reader.read(2**16):
        answer += piece
        if first is None and b"data: {" in answer:
            first = time.perf_counter() - began
    writer.close()
    _, found, rest = answer.rpartition(b'"completion_tokens":')
    if first is None or not found or not answer.startswith(b"HTTP/1.1 200"):
        raise RuntimeError(f"{place.name} gave no answer: {answer[:500]!r}")
    digits = rest.lstrip()
    return first, int(digits[: len(digits) - len(digits.lstrip(b"0123456789"))])


async def measure(place: Place, bodies: list[dict[str, Any]], at_once: int) -> Round:
    """Send all of `bodies`, so many at once."""
    slots = asyncio.Semaphore(at_once)

    async def one(body: dict[str, Any]) -> tuple[float, int]:
        async with slots:
            return await ask(place, body)

    used, began = place.processor_seconds(), time.perf_counter()
    answers = await asyncio.gather(*(one(body) for body in bodies))
    seconds, used = time.perf_counter() - began, place.processor_seconds() - used
    tokens = sum(tokens for _, tokens in answers)
    return Round(tokens / seconds, [first for first, _ in answers], 1000 * used / len(bodies))


def new_round(place: Place, requests: int, at_once: int, tokens: int, side: int) -> Round:
    """Ask about pictures that nobody has seen yet; about words only where `side` is 0."""
    bodies = [question(picture(next(SEEDS), side) if side else None, tokens) for _ in range(requests)]
    return asyncio.run(measure(place, bodies, at_once))


def throughput(bare: Place, ours: Place, at_once: int, rounds: int, tokens: int, side: int) -> None:
    """Print how the gateway keeps up with the bare engine at one number of requests at once."""
    pairs: list[tuple[Round, Round]] = []
    for number in range(rounds):
        # Who comes first changes.
        taken = {
            place.name: new_round(place, REQUESTS_A_ROUND[at_once], at_once, tokens, side)
            for place in ((bare, ours) if number % 2 else (ours, bare))
        }
        pairs.append((taken[bare.name], taken[ours.name]))
    shares = [100 * our.tokens_a_second / its.tokens_a_second for its, our in pairs]
    rates = [statistics.median(each.tokens_a_second for each in column) for column in zip(*pairs, strict=True)]
    processor = statistics.median(our.processor_ms for _, our in pairs)
    print(
        f"{at_once:3d} at once: {statistics.median(shares):.1f} % of vLLM's tokens a second (aim {SHARE} %; "
        f"rounds {min(shares):.0f} to {max(shares):.0f} %); {rates[1]:.0f} of {rates[0]:.0f}; "
        f"the gateway's process works {processor:.0f} ms for a request of {tokens} tokens",
        flush=True,
    )


def first_tokens(bare: Place, ours: Place, rounds: int, side: int) -> None:
    """Print what the gateway adds to the time to the first token of a single request; without a picture at `side` 0."""
    times: dict[str, list[float]] = {bare.name: [], ours.name: []}
    for number in range(8 * rounds):
        for place in (bare, ours) if number % 2 else (ours, bare):
            times[place.name] += new_round(place, 1, 1, 2, side).first
    one, two = (1000 * statistics.median(times[place.name]) for place in (bare, ours))
    added = 1000 * statistics.median(our - its for its, our in zip(times[bare.name], times[ours.name], strict=True))
    asked = f"a picture of {side} x {side} pixels" if side else "words"
    print(
        f"first token after {asked}: {added:+.1f} ms (aim +{ADDED_MS} ms); {two:.0f} ms, and {one:.0f} ms without "
        "the gateway",
        flush=True,
    )


def second_turns(place: Place, rounds: int, side: int) -> None:
    """Print how much sooner the second turn of a conversation about a picture begins."""
    firsts = []
    for _ in range(2 * rounds):
        url = picture(next(SEEDS), side)
        firsts.append([asyncio.run(measure(place, [question(url, 2, turn)], 1)).first[0] for turn in (1, 2)])
    one, two = (1000 * statistics.median(each) for each in zip(*firsts, strict=True))
    ratio = statistics.median(first / second for first, second in firsts)
    print(f"second turn: its first token comes {ratio:.2f} x as soon as the first turn's (aim {SECOND_TURN} x); "
          f"{two:.0f} and {one:.0f} ms, a picture of {side} x {side} pixels", flush=True)  # fmt: skip


def against_transformers(ours: Place, model: Path, rounds: int, tokens: int, side: int) -> None:
    """Print how many times as fast the gateway is with 8 requests at once."""
    ratios = []
    with transformers_serve(model) as theirs:
        for number in range(rounds + 1):
            bodies = [question(picture(next(SEEDS), side), tokens) for _ in range(8)]
            converted = [as_transformers_takes_it(body, model) for body in bodies]
            their = asyncio.run(measure(theirs, converted, 8)).tokens_a_second
            our = asyncio.run(measure(ours, bodies, 8)).tokens_a_second
            if number:  # what is made at first use is made
                ratios.append(our / their)
    print(f"8 at once: {statistics.median(ratios):.1f} x transformers serve (aim {TIMES_TRANSFORMERS} x; rounds "
          f"{min(ratios):.1f} to {max(ratios):.1f} x); {our:.0f} and {their:.0f} tokens a second")  # fmt: skip


def main(
    model: Annotated[str | None, typer.Argument(show_default="Joey")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Of each comparison; the middle one counts.")] = 5,
    at_once: Annotated[
        list[int] | None, typer.Option(help="Only so many at once: 1, 8 or 32; may be repeated.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Of each answer.")] = 64,
    side: Annotated[int, typer.Option(min=16, help="Of the pictures, in pixels.")] = 640,
    transformers: Annotated[bool, typer.Option(help="Compare with `transformers serve` too.")] = True,
    apart: Annotated[bool, typer.Option("--apart", help="vLLM on the first core, the gateway on the others.")] = False,
) -> None:
    """Start the gateway and its vLLM, and measure both in turns."""
    if unknown := set(at_once or ()) - set(REQUESTS_A_ROUND):
        raise typer.BadParameter(
            f"{min(unknown)} is none of {', '.join(map(str, REQUESTS_A_ROUND))}", param_hint="--at-once"
        )
    folder = find_model(model)
    began = time.perf_counter()
    with gateway_and_its_vllm(folder) as (ours, bare):
        print(f"the gateway and vLLM were ready after {time.perf_counter() - began:.1f} s", flush=True)
        if apart and ours.process is not None:
            put_apart(ours.process)
        for place in (bare, ours):  # what is made at first use is made
            new_round(place, 16, 8, tokens, side)
        for number in at_once or REQUESTS_A_ROUND:
            throughput(bare, ours, number, rounds, tokens, side)
        if at_once:
            return
        for asked_side in (0, side):
            first_tokens(bare, ours, rounds, asked_side)
        second_turns(ours, rounds, max(side, 1600))
        if transformers:
            against_transformers(ours, folder, max(1, rounds // 2), tokens, side)


if __name__ == "__main__":
    typer.run(main)
