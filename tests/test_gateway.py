"""The API over a real vLLM: good requests are answered, bad ones refused in OpenAI's words, nothing is left behind."""

import base64
import io
import json
import re
import socket
import time
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from PIL import Image
from tokenizers import Tokenizer

from assistant.images import encode_data_url
from assistant.plain_text import PlainText
from serving.engine import EngineState, LocalEngine, Phase, RemoteEngine
from serving.gateway import GatewayLimits, create_gateway
from serving.listening import ListenError, listen
from serving.model_folder import read_model_folder
from tests.conftest import MODEL_NAME, gateway_client, served
from tests.small_engine import SmallEngine, small_engine

PATH = "/v1/chat/completions"


def noise(width: int = 60, height: int = 40) -> Image.Image:
    return Image.effect_noise((width, height), 80).convert("RGB")


def picture(url: str | None = None) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": encode_data_url(noise()) if url is None else url}}


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def request(content: object = "Hello", **fields: object) -> dict[str, Any]:
    messages = [{"role": "user", "content": content}]
    return {"model": MODEL_NAME, "messages": messages, "max_tokens": 8, "temperature": 0} | fields


def prompt_ids(gateway: httpx.Client, content: object) -> list[int]:
    answer = gateway.post(PATH, json=request(content, return_token_ids=True))
    assert answer.status_code == 200, answer.text
    ids = answer.json()["prompt_token_ids"]
    assert isinstance(ids, list)
    return ids


def assert_refused(answer: httpx.Response, status: int, message: str, param: str | None = None) -> None:
    """The answer is OpenAI's error object, says `message`, and lets nothing out of the house."""
    assert answer.status_code == status, answer.text
    assert set(answer.json()) == {"error"}
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == ("invalid_request_error" if status < 500 else "server_error")
    assert re.search(message, error["message"]), error["message"]
    assert param is None or error["param"] == param
    for leak in ("Traceback", "0x7", "/home", "/root", "site-packages", "object at"):
        assert leak not in answer.text


def vllm_number(engine: LocalEngine, name: str) -> float:
    metrics = httpx.get(f"{engine.base_url}/metrics", timeout=30).text
    found = re.search(rf"^vllm:{name}\{{.*\}} (\S+)$", metrics, flags=re.MULTILINE)
    assert found, f"vLLM's metrics hold no {name}"
    return float(found[1])


def wait_until_idle(engine: LocalEngine, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while vllm_number(engine, "num_requests_running") + vllm_number(engine, "num_requests_waiting") > 0:
        assert time.monotonic() < deadline, f"vLLM still works {seconds} s after its clients have gone"
        time.sleep(0.05)


def wait_until_busy(engine: LocalEngine) -> None:
    deadline = time.monotonic() + 120
    while vllm_number(engine, "num_requests_running") == 0:
        assert time.monotonic() < deadline, "vLLM never began"
        time.sleep(0.02)


# -- Good requests -----------------------------------------------------------------------------------------------------


def test_openai_s_own_client_chats_and_streams(gateway: httpx.Client) -> None:
    client = openai.OpenAI(base_url=f"{gateway.base_url}/v1", api_key="any")
    assert [model.id for model in client.models.list()] == [MODEL_NAME]
    assert client.models.retrieve(MODEL_NAME).id == MODEL_NAME
    fields = request([picture(), text("What is this?")], max_tokens=24, seed=1)
    whole = client.chat.completions.create(**fields)
    assert whole.model == MODEL_NAME
    assert whole.choices[0].message.content
    assert whole.usage is not None
    assert whole.usage.completion_tokens <= 24
    fields |= {"stream": True, "stream_options": {"include_usage": True}, "extra_body": {"stream_interval": 1}}
    chunks = list(client.chat.completions.create(**fields))
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(pieces) == whole.choices[0].message.content
    assert len([piece for piece in pieces if piece]) > 3
    assert chunks[-1].usage == whole.usage


def test_a_stream_comes_piece_by_piece(gateway: httpx.Client) -> None:
    arrived = []
    long = request(stream=True, n=4, temperature=1, max_tokens=300, ignore_eos=True)
    with gateway.stream("POST", PATH, json=long) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = []
        for line in filter(None, answer.iter_lines()):
            lines.append(line)
            arrived.append(time.monotonic())
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    assert arrived[-1] - arrived[0] > 0.2, "everything came at once"


def test_pictures_stay_where_they_were_put(gateway: httpx.Client, engine: LocalEngine) -> None:
    """0, 1, 2 and 8 pictures: as many picture tokens as the tower has patches for each, and no more."""
    words = len(prompt_ids(gateway, [text("What is this?")]))
    one = prompt_ids(gateway, [picture(), text("What is this?")])
    patches = len(one) - words
    assert patches > 1
    for count in (2, 8):
        ids = prompt_ids(gateway, [*[picture()] * count, text("What is this?")])
        assert len(ids) - words == count * patches
    answer = gateway.post(PATH, json=request([*[picture()] * 9, text("What is this?")]))
    assert_refused(answer, 400, "9 pictures; the limit is 8", "messages")


def test_earlier_turns_are_read(gateway: httpx.Client) -> None:
    turns: list[dict[str, Any]] = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [picture(), text("What is this?")]},
        {"role": "assistant", "content": ""},
        {"role": "user", "content": "And now?"},
    ]
    answer = gateway.post(PATH, json=request(return_token_ids=True) | {"messages": turns})
    assert answer.status_code == 200, answer.text
    assert len(answer.json()["prompt_token_ids"]) > len(prompt_ids(gateway, [picture(), text("What is this?")]))


def test_the_upright_picture_reaches_the_model(gateway: httpx.Client) -> None:
    """A picture stored sideways with an EXIF note gives the very answer that the upright picture gives."""
    upright = Image.linear_gradient("L").convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    upright.transpose(Image.Transpose.ROTATE_90).save(buffer, "PNG", exif=exif)
    sideways = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    logprobs = []
    for url in (encode_data_url(upright), sideways):
        content = [picture(url), text("What is this?")]
        answer = gateway.post(PATH, json=request(content, logprobs=True))
        assert answer.status_code == 200, answer.text
        logprobs.append([token["logprob"] for token in answer.json()["choices"][0]["logprobs"]["content"]])
    assert logprobs[0] == pytest.approx(logprobs[1], abs=0.05)


def test_health_and_models(gateway: httpx.Client) -> None:
    assert gateway.get("/health").json() == {"status": "alive", "engine": {"state": "ready", "reason": "ready"}}
    listed = gateway.get("/v1/models").json()
    assert listed["object"] == "list"
    assert [model["id"] for model in listed["data"]] == [MODEL_NAME]
    assert "/v1/chat/completions" in gateway.get("/openapi.json").json()["paths"]


# -- Typed words are only words ----------------------------------------------------------------------------------------


def special_ids(engine: LocalEngine) -> dict[str, int]:
    tokenizer = Tokenizer.from_file(str(engine.facts.folder / "tokenizer.json"))
    return {token.content: number for number, token in tokenizer.get_added_tokens_decoder().items() if token.special}


def test_typed_special_tokens_are_only_text(gateway: httpx.Client, engine: LocalEngine) -> None:
    """Every special token of the tokenizer, typed whole and in two parts, with and without a picture."""
    specials = special_ids(engine)
    assert engine.facts.picture_token in specials
    for typed in specials:
        half = len(typed) // 2
        for pictures in ([], [picture()]):
            harmless = prompt_ids(gateway, [*pictures, text("a b")])
            for words in ([text(f"a {typed} b")], [text(f"a {typed[:half]}"), text(f"{typed[half:]} b")]):
                ids = prompt_ids(gateway, [*pictures, *words])
                for number in specials.values():
                    assert ids.count(number) == harmless.count(number), f"{typed} acts as token {number}"


def test_a_special_token_is_taken_apart_visibly(engine: LocalEngine) -> None:
    plain = PlainText(Tokenizer.from_file(str(engine.facts.folder / "tokenizer.json")), engine.facts.picture_token)
    assert plain("What does <image> mean in <b>HTML</b>?") == "What does < image> mean in <b>HTML</b>?"
    assert plain("<<image>image>") == "<< image>image>"
    untouched = "a < b, 5 > 3; naïve 東京 🦘\n\ttabs\0 and [INST]"
    assert plain(untouched) == untouched


# -- Bad requests ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "status", "message", "param"),
    [
        ({"model": "gpt-4o"}, 404, "`gpt-4o` does not exist", "model"),
        ({"messages": []}, 400, "at least 1", "messages"),
        ({"messages": "hello"}, 400, "valid list", "messages"),
        ({"messages": [{"role": "boss", "content": "x"}]}, 400, "'system', 'user' or 'assistant'", "messages.0.role"),
        ({"messages": [{"role": "user"}]}, 400, "Field required", "messages.0.content"),
        ({"messages": [{"role": "user", "content": None}]}, 400, "messages.0.content", "messages.0.content"),
        ({"messages": [{"role": "user", "content": ""}]}, 400, "message is empty", "messages.0"),
        ({"messages": [{"role": "user", "content": " \n"}]}, 400, "message is empty", "messages.0"),
        ({"messages": [{"role": "user", "content": []}]}, 400, "message is empty", "messages.0"),
        ({"messages": [{"role": "user", "content": [{"text": "x"}]}]}, 400, "'type'", "messages.0.content.0"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, 400, "surrogate", "messages.0.content"),
        ({"messages": [{"role": "user", "content": "x" * 1_000_001}]}, 400, "1,000,000 characters", None),
        ({"messages": [{"role": "system", "content": [picture()]}]}, 400, "cannot hold pictures", "messages.0"),
        ({"max_tokens": 0}, 400, "greater than or equal to 1", "max_tokens"),
        ({"max_tokens": -1}, 400, "greater than or equal to 1", "max_tokens"),
        ({"max_tokens": "5"}, 400, "integer", "max_tokens"),
        ({"max_tokens": True}, 400, "integer", "max_tokens"),
        ({"max_tokens": 10**9}, 400, "tokens in all", "max_tokens"),
        ({"max_completion_tokens": 10**9}, 400, "tokens in all", "max_completion_tokens"),
        ({"n": 1_000_000}, 400, "less than or equal to 8", "n"),
        ({"temperature": -1}, 400, "greater than or equal to 0", "temperature"),
        ({"temperature": 1e30}, 400, "less than or equal to 2", "temperature"),
        ({"temperature": float("nan")}, 400, "finite", "temperature"),
        ({"temperature": float("inf")}, 400, "finite", "temperature"),
        ({"top_p": 0}, 400, "greater than 0", "top_p"),
        ({"top_p": 2}, 400, "less than or equal to 1", "top_p"),
        ({"seed": 2**70}, 400, "seed", "seed"),
        ({"stop": ""}, 400, "stop", "stop"),
        ({"stop": ["x"] * 10_000}, 400, "at most 4 items", "stop"),
        ({"bad_words": ["x"] * 100_000}, 400, "Unrecognized request argument supplied: bad_words", "bad_words"),
        ({"chat_template": "{{ 1 }}"}, 400, "Unrecognized request argument supplied: chat_template", "chat_template"),
        ({"mm_processor_kwargs": {}}, 400, "Unrecognized", "mm_processor_kwargs"),
        ({"logprobs": True, "top_logprobs": 1000}, 400, "less than or equal to 20", "top_logprobs"),
        ({"top_logprobs": 2}, 400, "needs logprobs", None),
        ({"stream_options": {"include_usage": True}}, 400, "needs stream", None),
        ({"structured_outputs": {"json": {"const": "\ud800"}}}, 400, "surrogate", "structured_outputs.json"),
    ],
)
def test_bad_fields_are_refused(
    fields: dict[str, Any], status: int, message: str, param: str | None, gateway: httpx.Client
) -> None:
    body = json.dumps(request() | fields)
    answer = gateway.post(PATH, content=body, headers={"Content-Type": "application/json"})
    assert_refused(answer, status, message, param)


def test_the_tokens_of_a_short_prompt_may_be_weighed(tiny_model: Path) -> None:
    """They are asked of the engine as they are; what would cost it too much, or be streamed, never comes there."""
    shown = [picture(), text("What is it?")]
    refused: list[tuple[dict[str, Any], str]] = [
        ({"prompt_logprobs": 6}, "less than or equal to 5"),
        ({"prompt_logprobs": -1}, "greater than or equal to 0"),
        ({"prompt_logprobs": 0, "stream": True}, "not streamed"),
        ({"prompt_logprobs": 0, "content": "x" * 4_001}, "one picture and 4,000 characters"),
        ({"prompt_logprobs": 0, "content": [picture(), picture()]}, "one picture and 4,000 characters"),
    ]
    with small_engine() as behind, gateway_client(behind, read_model_folder(tiny_model)) as client:
        weighed = client.post(PATH, json=request(shown, prompt_logprobs=0, add_generation_prompt=False))
        assert weighed.status_code == 200, weighed.text
        assert (behind.seen[-1]["prompt_logprobs"], behind.seen[-1]["add_generation_prompt"]) == (0, False)
        for fields, message in refused:
            content = fields.pop("content", shown)
            assert_refused(client.post(PATH, json=request(content, **fields)), 400, message)
    assert len(behind.seen) == 1


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "JSON object"),
        (b"[1]", "JSON object"),
        (b'"hello"', "JSON object"),
        (b"null", "JSON object"),
        (b"{", "not valid JSON"),
        (b"\xff\xfe\x00", "JSON|parsing"),
        (b"[" * 20_000 + b"]" * 20_000, "JSON|parsing"),
    ],
)
def test_bodies_that_are_no_json_object(body: bytes, message: str, gateway: httpx.Client) -> None:
    assert_refused(gateway.post(PATH, content=body, headers={"Content-Type": "application/json"}), 400, message)


def test_a_foreign_page_s_simple_request_is_refused(gateway: httpx.Client) -> None:
    """A page of another origin can send text/plain without asking the server first; nothing may come of it."""
    body = json.dumps(request())
    headers = {"Content-Type": "text/plain", "Origin": "https://elsewhere.example"}
    answer = gateway.post(PATH, content=body, headers=headers)
    assert_refused(answer, 403, "origins")
    assert not [name for name in answer.headers if name.startswith("access-control")]


def test_unknown_urls_and_methods(gateway: httpx.Client) -> None:
    assert_refused(gateway.get("/v1/nothing"), 404, "/v1/nothing")
    assert_refused(gateway.get("/nothing"), 404, "Not Found")
    assert_refused(gateway.get(PATH), 405, "GET is not allowed")
    assert_refused(gateway.post("/v1/models", json={}), 405, "POST is not allowed")
    assert_refused(gateway.get("/v1/models/other"), 404, "`other` does not exist")


def data_url(content: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(content).decode()


def png(image: Image.Image, format: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("url", "status", "message"),
    [
        ("http://127.0.0.1:1/cat.png", 400, "data URLs"),
        ("https://example.com/cat.png", 400, "data URLs"),
        ("file:///etc/passwd", 400, "data URLs"),
        ("../../etc/passwd", 400, "data URLs"),
        ("", 400, "data URLs"),
        ("data:image/png;base64,", 400, "empty"),
        ("data:image/png;base64,@@@@", 400, "base64"),
        ("data:text/plain;base64,aGVsbG8=", 415, "data:image/"),
        (data_url(b"hello"), 415, "Use PNG"),
        (data_url(png(noise(), "TIFF")), 415, "Use PNG"),
        (data_url(png(noise())[:500]), 400, "damaged"),
        (data_url(png(noise(), "JPEG")[:700]), 400, "damaged"),
        (data_url(png(Image.new("1", (30_000, 30_000)))), 413, "too many pixels"),
        (data_url(png(Image.new("1", (13_000, 13_000)))), 413, "too many pixels"),
    ],
)
def test_bad_pictures_are_refused_and_the_next_good_one_is_answered(
    url: str, status: int, message: str, gateway: httpx.Client
) -> None:
    started = time.monotonic()
    answer = gateway.post(PATH, json=request([picture(url), text("What is this?")]))
    assert time.monotonic() - started < 5
    assert_refused(answer, status, message, "messages.0.content")
    assert gateway.post(PATH, json=request([picture(), text("What is this?")])).status_code == 200


def test_a_prompt_beyond_the_context_is_refused_in_the_engine_s_words(gateway: httpx.Client) -> None:
    assert_refused(gateway.post(PATH, json=request("one two three " * 2000)), 400, "context|length|tokens")


def test_a_huge_body_and_a_slow_one(engine: LocalEngine) -> None:
    app = create_gateway(engine, MODEL_NAME, engine.facts, GatewayLimits(body_bytes=100_000, body_seconds=1))
    with served(app) as address:
        assert_refused(httpx.post(address + PATH, json=request("x" * 200_000)), 413, "over the limit")
        pieces = (b" " * 50_000 for _ in range(10))
        assert_refused(httpx.post(address + PATH, content=pieces), 413, "over the limit")
        host, port = address.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=5) as slow:
            slow.sendall(f"POST {PATH} HTTP/1.1\r\nHost: {host}\r\nContent-Length: 100\r\n\r\n{{".encode())
            assert b" 408 " in slow.recv(1000)
        assert httpx.post(address + PATH, json=request(), timeout=60).status_code == 200


# -- Clients that go away, engines that are not there ------------------------------------------------------------------


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_ends_the_engine_s_work(
    stream: bool, gateway: httpx.Client, engine: LocalEngine
) -> None:
    """Eight answers at once: a single one of the tiny model is over before anybody can go away."""
    wait_until_idle(engine, 20)
    address = gateway.base_url
    before = vllm_number(engine, "generation_tokens_total")
    body = json.dumps(request(n=8, temperature=1, max_tokens=900, ignore_eos=True, stream=stream)).encode()
    head = f"POST {PATH} HTTP/1.1\r\nHost: {address.host}\r\nContent-Type: application/json\r\n"
    with socket.create_connection((address.host, address.port or 80), timeout=20) as client:
        client.sendall(head.encode() + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
        wait_until_busy(engine)
    wait_until_idle(engine, 2)
    made = vllm_number(engine, "generation_tokens_total") - before
    assert 0 < made < 8 * 900, "the answers were made to their end"
    assert gateway.post(PATH, json=request()).status_code == 200


def test_while_the_engine_loads_requests_are_told_to_come_back(engine: LocalEngine) -> None:
    loading = SmallEngine(state=EngineState(Phase.LOADING, "loading weights"))
    with gateway_client(loading, engine.facts) as client:
        answer = client.post(PATH, json=request())
        assert_refused(answer, 503, "not ready yet: loading weights")
        assert int(answer.headers["retry-after"]) > 0
        assert client.get("/health").json()["engine"] == {"state": "loading", "reason": "loading weights"}
        assert client.get("/v1/models").status_code == 200


def test_an_engine_that_vanished_between_two_looks(engine: LocalEngine) -> None:
    gone = SmallEngine(state=EngineState(Phase.READY, "ready"))
    with gateway_client(gone, engine.facts) as client:
        for stream in (True, False):
            assert_refused(client.post(PATH, json=request(stream=stream)), 503, "The engine stopped")


def test_an_engine_elsewhere(engine: LocalEngine) -> None:
    with gateway_client(RemoteEngine(engine.base_url + "/", engine.api_key), engine.facts) as client:
        assert client.get("/health").json()["engine"]["state"] == "ready"
        assert client.post(PATH, json=request()).status_code == 200
    with gateway_client(RemoteEngine(engine.base_url, "wrong key"), engine.facts) as client:
        assert_refused(client.post(PATH, json=request()), 503, "refuses our key")
    with gateway_client(RemoteEngine(engine.base_url, engine.api_key, "joey"), engine.facts) as client:
        assert_refused(client.get("/ready"), 503, "serves tiny, not joey")


def test_a_port_in_use_is_said_to_be() -> None:
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ListenError, match=rf"port {port}: Address already in use.*--port"):
            listen("127.0.0.1", port)
    with pytest.raises(ListenError, match="Cannot listen"):
        listen("no-such-host.invalid", 0)
    with pytest.raises(ListenError, match="Cannot listen"):
        listen("127.0.0.1", 70_000)
