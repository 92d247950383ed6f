"""Measure how usable serving stays while a fine-tuning job trains on the same cores: seconds to the first token.

Example, on a quiet machine (some 4 minutes on two cores): python scripts/bench_jobs.py

One server, as people run it, is asked about pictures with nothing else to do, then while a job of a lesson is under
way, then again without. The pictures are other ones in every request.
"""

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import httpx
import typer

from assistant.images import encode_data_url
from assistant.models import JOEY
from scripts.bench_serving import NAME, Place, new_round, running
from serving.engine import free_port
from training.data.scenes import make_scene

AIM = 3.0  # times the idle p95
SECONDS_TO_TRAIN = 900.0
TOKENS, SIDE = 16, 512


def lesson(count: int) -> bytes:
    """Questions about generated scenes, as OpenAI's clients upload them."""
    lines = []
    for seed in range(count):
        scene = make_scene(seed)
        shown = {"type": "image_url", "image_url": {"url": encode_data_url(scene.image)}}
        asked = {"role": "user", "content": [shown, {"type": "text", "text": scene.questions[0].question}]}
        lines.append(json.dumps({"messages": [asked, {"role": "assistant", "content": scene.questions[0].answer}]}))
    return "\n".join(lines).encode()


def begun_job(client: httpx.Client) -> str:
    """The id of a job that takes steps now. Raises RuntimeError where it does not come to that."""
    files = {"file": ("lesson.jsonl", lesson(64))}
    kept = client.post("/v1/files", files=files, data={"purpose": "fine-tune"}).raise_for_status().json()
    body = {"model": NAME, "training_file": kept["id"], "hyperparameters": {"n_epochs": 100}}
    job = str(client.post("/v1/fine_tuning/jobs", json=body).raise_for_status().json()["id"])
    deadline = time.monotonic() + SECONDS_TO_TRAIN
    while time.monotonic() < deadline:
        events = client.get(f"/v1/fine_tuning/jobs/{job}/events").json()["data"]
        if any(event["type"] == "metrics" for event in events):
            return job
        time.sleep(0.5)
    raise RuntimeError(f"the job took no step in {SECONDS_TO_TRAIN:.0f} s: {events[:3]}")


def tell(what: str, first: list[float]) -> float:
    """Print the middle and the 95th of a hundred seconds to the first token; gives that one."""
    late = statistics.quantiles(first, n=20, method="inclusive")[-1]
    print(f"{what}: first token after {statistics.median(first):.3f} s, p95 {late:.3f} s, longest {max(first):.3f} s")
    return late


def first_tokens(place: Place, requests: int) -> list[float]:
    """Seconds to the first token of so many requests, one after the other."""
    return new_round(place, requests, 1, TOKENS, SIDE).first


def main(
    model: Annotated[Path, typer.Option(help="Folder of the model that is served and taught.")] = JOEY,
    requests: Annotated[int, typer.Option(min=20, help="Requests of each round.")] = 60,
) -> None:
    """Ask, start a job, ask again, cancel it, ask once more."""
    with tempfile.TemporaryDirectory(prefix="kangaroo-bench-jobs-") as folder:
        port = free_port()
        command = [sys.executable, "-m", "ui.command_line", "serve", str(model), "--name", NAME, "--port", str(port)]
        command += ["--data-folder", folder]
        with (
            running("kangaroo serve", command, port, {}, "/ready") as place,
            httpx.Client(base_url=place.url, timeout=60, trust_env=False) as client,
        ):
            first_tokens(place, 8)  # the first requests warm it up
            before = tell("idle", first_tokens(place, requests))
            job = begun_job(client)
            busy = tell("while a job trains", first_tokens(place, requests))
            state = client.get(f"/v1/fine_tuning/jobs/{job}").json()["status"]
            client.post(f"/v1/fine_tuning/jobs/{job}/cancel").raise_for_status()
            if state != "running":
                raise RuntimeError(f"the job was {state} before the round was over: take fewer requests")
            time.sleep(10)  # the job's process ends within six seconds
            after = tell("idle again", first_tokens(place, requests))
            times = busy / min(before, after)  # whatever else the machine did, the quieter of both is the measure
            print(f"p95 is {times:.2f} times as long while a job trains (aim: at most {AIM:g})")


if __name__ == "__main__":
    typer.run(main)
