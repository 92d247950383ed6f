"""Fast answers come some tokens at a time, slow ones token by token; what was written and counted stays the same."""

import json
import time
from typing import Any

import httpx
import pytest

from assistant.models import JOEY
from serving.gateway import create_gateway
from serving.model_folder import read_model_folder
from serving.stream_pace import SECONDS_AN_EVENT, StreamPace
from tests.conftest import MODEL_NAME, served
from tests.small_engine import small_engine
from tests.test_seen_pictures import CHAT, chat

STREAM: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}, "seed": 1, "temperature": 1}


@pytest.mark.parametrize(
    ("tokens_a_second", "tokens_an_event"), [(0.5, 1), (8, 1), (11, 1), (20, 2), (75, 9), (140, 16), (5_000, 16)]
)
def test_an_event_carries_what_comes_in_its_time(tokens_a_second: float, tokens_an_event: int) -> None:
    pace = StreamPace()
    assert pace.tokens_an_event() == 1, "nothing is known yet"
    for _ in range(30):
        pace.note(64, 64 / tokens_a_second)
    assert pace.tokens_an_event() == tokens_an_event
    assert (tokens_an_event - 0.5) / tokens_a_second <= SECONDS_AN_EVENT or tokens_an_event == 1


def test_it_follows_the_newest_answers_and_heeds_no_short_ones() -> None:
    pace = StreamPace()
    pace.note(64, 1)
    pace.note(2, 100)
    assert pace.tokens_an_event() == 8
    for _ in range(10):
        pace.note(64, 64)
    assert pace.tokens_an_event() == 1


def test_the_engine_is_told_and_the_client_s_own_wish_counts() -> None:
    with small_engine() as engine:
        app = create_gateway(engine, MODEL_NAME, read_model_folder(JOEY))
        app.state.chat_service.upstream._pace.note(64, 2)
        with served(app) as address, httpx.Client(base_url=address, timeout=60, trust_env=False) as client:
            for more in ({"stream": True}, {"stream": True, "stream_interval": 3}, {}):
                assert client.post(CHAT, json=chat(**more)).status_code == 200
            assert client.post(CHAT, json=chat(stream=True, stream_interval=0)).status_code == 400
    assert [body.get("stream_interval") for body in engine.seen] == [4, 3, None]


def test_vllm_says_the_same_in_fewer_events(gateway: httpx.Client) -> None:
    said = {interval: _streamed(gateway, stream_interval=interval) for interval in (1, 4)}
    texts = {"".join(text) for text, _ in said.values()}
    assert len(texts) == 1 and texts != {""}
    assert said[1][1] == said[4][1]
    written = said[1][1]["completion_tokens"]
    assert written == 32
    assert len(said[4][0]) <= 2 + written // 4 < len(said[1][0])


def _streamed(gateway: httpx.Client, **more: Any) -> tuple[list[str], dict[str, Any]]:
    """What the events say, one after the other, and the usage that the last one tells."""
    body = chat(max_tokens=32, ignore_eos=True, logprobs=True, **STREAM, **more)
    answer = gateway.post(CHAT, json=body)
    assert answer.status_code == 200, answer.text
    events = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
    tokens = [event["choices"][0]["logprobs"] for event in events if event["choices"]]
    assert sum(len(each["content"]) for each in tokens if each) == 32, "each token has its log-probability"
    texts = [event["choices"][0]["delta"].get("content") or "" for event in events if event["choices"]]
    return [text for text in texts if text], events[-1]["usage"]


@pytest.mark.parametrize("interval", [1, 4])
def test_usage_that_is_told_with_each_event_is_counted_once(interval: int, gateway: httpx.Client) -> None:
    def counted() -> list[float]:
        lines = gateway.get("/metrics").text.splitlines()
        return [
            float(line.split()[-1])
            for kind in ("prompt", "completion")
            for line in lines
            if line.startswith(f'kangaroo_tokens_total{{kind="{kind}"')
        ]

    gateway.post(CHAT, json=chat(max_tokens=2))
    before = counted()
    options = {"stream_options": {"include_usage": True, "continuous_usage_stats": True}}
    body = chat(max_tokens=20, ignore_eos=True) | STREAM | options | {"stream_interval": interval}
    answer = gateway.post(CHAT, json=body)
    assert answer.text.count('"usage"') > 20 // interval
    usage = json.loads([line for line in answer.text.splitlines() if line.startswith("data: {")][-1][6:])["usage"]
    time.sleep(0.2)  # counted when the request has ended
    counts = [after - earlier for earlier, after in zip(before, counted(), strict=True)]
    assert counts == [usage["prompt_tokens"], usage["completion_tokens"]]
    assert usage["completion_tokens"] == 20
