"""A picture that the engine has seen goes to it by name alone, and whole again where it has forgotten it."""

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from PIL import Image

from assistant.images import encode_data_url
from assistant.models import JOEY
from serving.engine import LocalEngine
from serving.model_folder import read_model_folder
from serving.seen_pictures import SeenPictures
from serving.upstream import Upstream
from tests.conftest import MODEL_NAME, gateway_client
from tests.small_engine import SmallEngine, small_engine
from tests.test_engine_pictures import noise

CHAT = "/v1/chat/completions"


def chat(*pictures: Image.Image, jpeg_quality: int | None = 90, **fields: Any) -> dict[str, Any]:
    """A question about some pictures."""
    urls = [encode_data_url(picture, jpeg_quality) for picture in pictures]
    parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    parts.append({"type": "text", "text": "What is this?"})
    return {"model": MODEL_NAME, "messages": [{"role": "user", "content": parts}], "max_tokens": 6} | fields


def sent_whole(body: dict[str, Any]) -> list[bool]:
    """Of each picture in what an engine was asked, whether it was sent whole."""
    parts = [part for message in body["messages"] for part in message["content"]]
    return [part["image_url"] is not None for part in parts if part["type"] == "image_url"]


@pytest.fixture
def small() -> Iterator[SmallEngine]:
    with small_engine() as engine:
        yield engine


@pytest.fixture
def client(small: SmallEngine) -> Iterator[httpx.Client]:
    with gateway_client(small, read_model_folder(JOEY)) as client:
        yield client


@pytest.mark.parametrize("stream", [False, True])
def test_the_second_turn_names_the_picture(stream: bool, small: SmallEngine, client: httpx.Client) -> None:
    for pictures in ([0], [0, 1], [1, 0, 0]):
        answer = client.post(CHAT, json=chat(*map(noise, pictures), stream=stream))
        assert answer.status_code == 200, answer.text
    assert [sent_whole(body) for body in small.seen] == [[True], [False, True], [False, False, False]]
    names = [[part["uuid"] for part in body["messages"][0]["content"][:-1]] for body in small.seen]
    assert names[1][0] == names[0][0]
    assert names[2] == [names[1][1], names[1][0], names[1][0]]
    assert names[1][0] != names[1][1]


def test_a_question_that_comes_in_another_way_knows_the_picture_too(small: SmallEngine, client: httpx.Client) -> None:
    assert client.post(CHAT, json=chat(noise(0))).status_code == 200
    captions = {"model": MODEL_NAME, "pictures": [encode_data_url(noise(0), 90)]}
    assert client.post("/v1/captions", json=captions).status_code == 200
    assert [sent_whole(body) for body in small.seen] == [[True], [False]]


def test_a_picture_that_the_engine_has_forgotten_is_sent_whole(small: SmallEngine, client: httpx.Client) -> None:
    for forgets in (False, True, False):
        if forgets:
            small.known.clear()
        assert client.post(CHAT, json=chat(noise(0))).status_code == 200
    assert [sent_whole(body) for body in small.seen] == [[True], [False], [True], [False]]


def test_a_picture_that_was_refused_is_not_named(small: SmallEngine, client: httpx.Client) -> None:
    cut = encode_data_url(noise(0, (300, 300)), 90)[:-4000]
    body = chat() | {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": cut}}]}]}
    for _ in range(2):
        refused = client.post(CHAT, json=body)
        assert refused.status_code == 400
        assert refused.json()["error"]["code"] == "invalid_image"
    assert [sent_whole(asked) for asked in small.seen] == [[True], [True]]


def test_the_latest_names_are_remembered() -> None:
    def body(*names: str) -> dict[str, Any]:
        parts = [{"type": "image_url", "image_url": {"url": name}, "uuid": name} for name in names]
        return {"messages": [{"role": "user", "content": [*parts, {"type": "text", "text": "?"}]}], "n": 1}

    seen = SeenPictures(most=2)
    assert seen.shortened(body("a")) is None
    seen.remember(body("a", "b"))
    seen.remember(body("a"))
    seen.remember(body("c"))
    asked = body("a", "b", "c")
    short = seen.shortened(asked)
    assert short is not None
    assert sent_whole(short) == [False, True, False]
    assert sent_whole(asked) == [True, True, True], "what was asked is left as it was"
    assert short["n"] == 1
    seen.forget(body("c", "d"))
    assert seen.shortened(body("c")) is None
    assert seen.shortened({"model": "x", "input": "no chat"}) is None


def test_vllm_knows_a_picture_by_its_name(engine: LocalEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[bool]] = []
    ask = Upstream._ask

    async def ask_and_note(upstream: Upstream, method: str, path: str, body: Any = None, **more: Any) -> Any:
        if method == "POST":
            asked.append(sent_whole(body))
        return await ask(upstream, method, path, body, **more)

    monkeypatch.setattr(Upstream, "_ask", ask_and_note)
    conversations = [[20], [20, 21], [21, 20, 20], [22, 20]]
    said = [_said(engine, [pictures])[0] for pictures in conversations]
    assert asked == [[True] * len(pictures) for pictures in conversations], "each had a gateway of its own"
    asked.clear()
    for (tokens, likely), (their_tokens, their_likely) in zip(_said(engine, conversations), said, strict=True):
        assert tokens == their_tokens
        assert likely == pytest.approx(their_likely, abs=0.02), "what is in vLLM's cache is bf16"
    assert asked == [[True], [False, True], [False, False, False], [True, False]]


def _said(engine: LocalEngine, conversations: list[list[int]]) -> list[tuple[list[str], list[float]]]:
    """Of each conversation the tokens of the answer and their log-probabilities, by one new gateway."""
    answers: list[tuple[list[str], list[float]]] = []
    with gateway_client(engine, engine.facts) as client:
        for pictures in conversations:
            answer = client.post(CHAT, json=chat(*map(noise, pictures), logprobs=True, temperature=0))
            assert answer.status_code == 200, answer.text
            tokens = answer.json()["choices"][0]["logprobs"]["content"]
            answers.append(([token["token"] for token in tokens], [token["logprob"] for token in tokens]))
    return answers


def test_vllm_is_shown_a_picture_whose_name_it_does_not_know(
    engine: LocalEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SeenPictures, "forget", lambda *_: None)
    with gateway_client(engine, engine.facts) as client:
        assert client.post(CHAT, json=chat(noise(30))).status_code == 200
    shortened = SeenPictures.shortened
    monkeypatch.setattr(SeenPictures, "shortened", lambda seen, body: (seen.remember(body), shortened(seen, body))[1])
    with gateway_client(engine, engine.facts) as client:
        answer = client.post(CHAT, json=chat(noise(31)))
        assert answer.status_code == 200, answer.text
