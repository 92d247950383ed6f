"""Compare what vLLM answers with what transformers computes for the same tokens of the same prompts."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
import torch
from rich.progress import track
from rich.table import Table

from assistant.answering import Assistant, Request
from assistant.images import encode_data_url
from assistant.log_probabilities import LIKELY, Arithmetic, read
from serving.engine import EngineError, LocalEngine

TOP = 5  # likeliest tokens of each step that are compared besides the answered one
SECONDS_A_REQUEST = 300.0


class ParityError(RuntimeError):
    """The exported model answers otherwise than the original; the message says where."""


@dataclass(frozen=True)
class Served:
    """What vLLM read and answered, greedily: T tokens, and the log-probabilities of the likeliest at each."""

    prompt_ids: list[int]
    ids: list[int]
    likeliest: list[dict[int, float]]  # T times: token id -> log-probability, the answered one among them


@dataclass(frozen=True)
class Comparison:
    """One prompt: how near the original's log-probabilities are to those that vLLM gave."""

    request: Request
    tokens: int  # of the answer
    same: int  # of these, the original's own choice too
    furthest: float  # over the answered tokens and the likely ones beside them
    mean: float  # over the answered tokens


def compare_served(
    exported: Path,
    original: Path,
    arithmetic: Arithmetic,
    requests: Sequence[Request],
    most_tokens: int,
    seconds: float,
) -> list[Comparison]:
    """What a vLLM on the folder `exported` answers to `requests`, against transformers on the folder `original`.

    Args:
        exported: the model that is served.
        original: the model that was trained.
        arithmetic: of both.
        requests: questions with pictures, answered greedily one after the other.
        most_tokens: of an answer.
        seconds: how long vLLM may take to start.

    Raises:
        EngineError: vLLM does not start, or gives no answer.
        ModelError: one of the folders is not complete or cannot be read.
        ParityError: the two read different prompts.
    """
    with LocalEngine(exported, "exported", dtype=arithmetic) as engine:
        engine.wait_until_ready(seconds)
        served = [ask_engine(engine, request, most_tokens) for request in track(requests, "vLLM answers")]
    # Only now, for on a GPU vLLM takes nearly all of its memory.
    reference = Assistant.load(original, getattr(torch, arithmetic))
    pairs = list(zip(requests, served, strict=True))
    return [compare(reference, request, answer) for request, answer in track(pairs, "transformers reads")]


def fault_in(comparisons: Sequence[Comparison], furthest: float | None, mean: float | None) -> str | None:
    """What is beyond what is allowed, in words: a single log-probability, or the mean over all answered tokens."""
    largest = largest_of(comparisons)
    if furthest is not None and not largest <= furthest:
        return f"log-probabilities lie {largest:.3g} apart, and {furthest:g} is allowed"
    middle = mean_of(comparisons)
    if mean is not None and not middle <= mean:
        return f"log-probabilities lie {middle:.3g} apart in the mean, and {mean:g} is allowed"
    return None


def mean_of(comparisons: Sequence[Comparison]) -> float:
    """The mean difference over the answered tokens of all prompts."""
    return sum(one.mean * one.tokens for one in comparisons) / max(1, sum(one.tokens for one in comparisons))


def largest_of(comparisons: Sequence[Comparison]) -> float:
    """The largest difference over all prompts."""
    return _largest([one.furthest for one in comparisons])


def parity_table(comparisons: Sequence[Comparison], furthest: float | None, mean: float | None) -> Table:
    """A row for each prompt, one for all, and what is allowed."""
    table = Table("prompt", "answered tokens", "the same", "largest difference", "mean", title="Log-probabilities")
    for one in comparisons:
        table.add_row(one.request.question, f"{one.tokens}", f"{one.same}", f"{one.furthest:.2g}", f"{one.mean:.2g}")
    table.add_section()
    tokens, same = sum(one.tokens for one in comparisons), sum(one.same for one in comparisons)
    table.add_row("all", f"{tokens}", f"{same}", f"{largest_of(comparisons):.2g}", f"{mean_of(comparisons):.2g}")
    table.add_row("allowed", "", "", *("" if limit is None else f"{limit:g}" for limit in (furthest, mean)))
    return table


def ask_engine(engine: LocalEngine, request: Request, most_tokens: int) -> Served:
    """The greedy answer of a running engine. Raises EngineError where it gives none."""
    pictures = [{"type": "image_url", "image_url": {"url": encode_data_url(picture)}} for picture in request.pictures]
    body = {
        "model": engine.model_name,
        "messages": [{"role": "user", "content": [*pictures, {"type": "text", "text": request.question}]}],
        "max_tokens": most_tokens,
        "temperature": 0,
        "logprobs": True,
        "top_logprobs": TOP,
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
    }
    try:
        answer = httpx.post(
            f"{engine.base_url}/v1/chat/completions",
            json=body,
            headers={"Authorization": f"Bearer {engine.api_key}"},
            timeout=SECONDS_A_REQUEST,
            trust_env=False,
        )
    except httpx.TransportError as error:
        raise EngineError(f"the engine stopped answering: {error}\n{engine.log_tail()}") from error
    if answer.status_code != 200:
        raise EngineError(f"the engine refused a prompt: {answer.text[:500]}\n{engine.log_tail()}")
    choice = answer.json()["choices"][0]
    steps = [
        {_token_id(top["token"]): top["logprob"] for top in (*step["top_logprobs"], step)}
        for step in choice["logprobs"]["content"]
    ]
    return Served(answer.json()["prompt_token_ids"], choice["token_ids"], steps)


def _token_id(written: str) -> int:
    """`token_id:17` -> 17, as vLLM writes tokens where it is asked for their ids."""
    return int(written.removeprefix("token_id:"))


def compare(original: Assistant, request: Request, served: Served) -> Comparison:
    """How near `original` is to what was `served`: it reads the same prompt and the same answer, in one pass.

    So every answered token is compared, also behind a place where the original would have gone on otherwise.
    Raises ParityError where the two read different prompts.
    """
    reading = read(original, request, served.ids)
    start = len(reading.ids) - len(served.ids)
    if reading.ids[:start] != served.prompt_ids:
        raise ParityError(
            f"{request.question!r}: vLLM reads {len(served.prompt_ids)} tokens and transformers {start}, or others: "
            "template, tokenizer or image processor differ"
        )
    steps = reading.log_probabilities[start - 1 : len(reading.ids) - 1]
    answered = [
        abs(step[token].item() - tops[token])
        for step, token, tops in zip(steps, served.ids, served.likeliest, strict=True)
    ]
    beside = [
        abs(step[token].item() - logprob)
        for step, tops in zip(steps, served.likeliest, strict=True)
        for token, logprob in tops.items()
        if not max(step[token].item(), logprob) <= LIKELY
    ]
    same = int((steps.argmax(-1) == torch.tensor(served.ids)).sum())
    return Comparison(
        request, len(served.ids), same, _largest(answered + beside), sum(answered) / max(1, len(answered))
    )


def _largest(numbers: Sequence[float]) -> float:
    """The largest; NaN where one is no number."""
    return float(torch.tensor(numbers).max()) if numbers else 0.0
