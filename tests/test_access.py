"""Who may come in: keys and their limits, origins, request ids, what is counted, and what is never written down."""

import base64
import json
import logging
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import openai
import pytest
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families

import serving.day_counts
import serving.keys
import serving.routes.chat
from assistant.models import find_model
from serving.day_counts import DayCounts, file_of_counts
from serving.doors import Doors
from serving.engine import EngineState, Phase
from serving.errors import ApiError
from serving.gateway import create_gateway
from serving.keys import Key, KeyFileError, KeyLimits, KeyRing, digest_of, new_key, read_keys, revoke_key
from serving.model_folder import ModelFacts, read_model_folder
from serving.origins import OriginError, checked_origin
from serving.quotas import Quotas
from tests.conftest import served
from tests.small_engine import SmallEngine, small_engine

PATH = "/v1/chat/completions"
WORDS = "a secret about wombats"
PICTURE = base64.b64encode(
    base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg==")
).decode()


@pytest.fixture(scope="module")
def facts() -> ModelFacts:
    return read_model_folder(find_model(None))


@pytest.fixture(scope="module")
def engine() -> Iterator[SmallEngine]:
    with small_engine() as engine:
        yield engine


@contextmanager
def client_of(facts: ModelFacts, engine: SmallEngine, doors: Doors) -> Iterator[TestClient]:
    app = create_gateway(engine, "joey", facts, doors=doors)
    with TestClient(app, base_url="http://localhost", raise_server_exceptions=False) as client:
        yield client


def chat(content: object = WORDS, **fields: object) -> dict[str, Any]:
    return {"model": "joey", "messages": [{"role": "user", "content": content}]} | fields


def picture_question() -> list[dict[str, Any]]:
    url = f"data:image/png;base64,{PICTURE}"
    return [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": WORDS}]


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def basic(key: str) -> dict[str, str]:
    return {"Authorization": "Basic " + base64.b64encode(f"anybody:{key}".encode()).decode()}


# -- The file of keys --------------------------------------------------------------------------------------------------


def test_a_key_is_told_once_and_kept_as_a_hash_that_only_its_owner_reads(tmp_path: Path) -> None:
    file = tmp_path / "data" / "keys.json"
    texts = [new_key(file, name) for name in ("ann", "bob")]
    assert len(set(texts)) == 2
    assert [key.name for key in read_keys(file)] == ["ann", "bob"]
    for text in texts:
        assert text not in file.read_text()
        assert text.removeprefix("kangaroo-") not in file.read_text()
    assert file.stat().st_mode & 0o777 == 0o600
    assert file.parent.stat().st_mode & 0o777 == 0o700
    assert list(file.parent.iterdir()) == [file]


def test_many_keys_made_at_once_are_all_there(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    with ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(lambda number: new_key(file, f"key-{number}"), range(16)))
    ring = KeyRing(file)
    assert sorted(key.name for text in texts if (key := ring.find(text))) == sorted(f"key-{n}" for n in range(16))


def test_what_is_wrong_with_the_file_of_keys_is_said(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    with pytest.raises(KeyFileError, match="kangaroo key new"):
        KeyRing(file)
    new_key(file, "ann")
    with pytest.raises(KeyFileError, match="ann already"):
        new_key(file, "ann")
    with pytest.raises(KeyFileError, match="no name for a key"):
        new_key(file, "an/n")
    with pytest.raises(KeyFileError, match=r"no key named bob \(there are: ann\)"):
        revoke_key(file, "bob")
    file.write_text('{"keys": [{"name": "ann"}]}')
    with pytest.raises(KeyFileError, match=r"damaged \(keys\.0\.digest"):
        KeyRing(file)


def test_a_running_server_follows_the_file_and_never_opens_without_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving.keys, "SECONDS_BETWEEN_LOOKS", 0)
    file = tmp_path / "keys.json"
    ann = new_key(file, "ann")
    ring = KeyRing(file)
    bob = new_key(file, "bob")
    assert ring.find(ann)
    assert ring.find(bob)
    revoke_key(file, "ann")
    assert ring.find(ann) is None
    assert ring.find(bob)
    file.write_text("{")
    assert ring.find(bob) is None
    file.unlink()
    assert ring.find(bob) is None
    assert ring.find("") is None


# -- The key at the door -----------------------------------------------------------------------------------------------


@pytest.fixture
def keyed(tmp_path: Path, facts: ModelFacts, engine: SmallEngine) -> Iterator[tuple[TestClient, str]]:
    """A client of a gateway with keys, and a key that opens it."""
    file = tmp_path / "keys.json"
    key = new_key(file, "ann")
    with client_of(facts, engine, Doors(keys=KeyRing(file))) as client:
        yield client, key


def test_every_route_but_health_wants_a_key(keyed: tuple[TestClient, str]) -> None:
    client, _ = keyed
    assert client.get("/health").status_code == 200
    routes = {getattr(route, "path", "") for route in client.app.routes} - {"/health"}  # type: ignore[attr-defined]
    assert {PATH, "/v1/models", "/ready", "/metrics", "/openapi.json"} <= routes
    for path in [*routes, "/", "/a/page", "/v1/nothing", "/Health", "//health", "/health/"]:
        for method in ("GET", "POST", "HEAD", "OPTIONS"):
            answer = client.request(method, path)
            assert answer.status_code == 401, f"{method} {path}"
            assert answer.headers["www-authenticate"].startswith("Bearer" if path.startswith("/v1/") else "Basic")
            if method != "HEAD":
                error = answer.json()["error"]
                assert set(error) == {"message", "type", "param", "code"}
                assert error["code"] == "invalid_api_key"


@pytest.mark.parametrize(
    "authorization",
    ["", "Bearer", "Bearer ", "Bearer wrong", "Bearer \xff\xfe", "Basic", "Basic @@", "Basic YTo=", "Basic /w==",
     "Digest a", "Token {key}", "{key}", "Bearer {key}x", "Bearer x{key}"],
)  # fmt: skip
def test_what_is_no_key_opens_nothing(authorization: str, keyed: tuple[TestClient, str]) -> None:
    client, key = keyed
    header = authorization.replace("{key}", key).encode("latin-1")
    assert client.get("/v1/models", headers={b"authorization": header}).status_code == 401


@pytest.mark.parametrize("scheme", [bearer, basic])
def test_a_key_opens_whether_a_program_or_a_browser_sends_it(scheme: Any, keyed: tuple[TestClient, str]) -> None:
    client, key = keyed
    assert client.get("/v1/models", headers=scheme(key)).status_code == 200
    assert client.post(PATH, json=chat(), headers=scheme(key)).status_code == 200
    assert client.get("/metrics", headers=scheme(key)).status_code == 200


def test_openai_s_own_client_understands_keys_and_limits(
    tmp_path: Path, facts: ModelFacts, engine: SmallEngine
) -> None:
    file = tmp_path / "keys.json"
    key = new_key(file, "ann", KeyLimits(requests_a_minute=1))
    with served(create_gateway(engine, "joey", facts, doors=Doors(keys=KeyRing(file)))) as address:
        stranger = openai.OpenAI(base_url=f"{address}/v1", api_key="wrong", max_retries=0)
        with pytest.raises(openai.AuthenticationError) as refused:
            stranger.models.list()
        assert refused.value.code == "invalid_api_key"
        client = openai.OpenAI(base_url=f"{address}/v1", api_key=key, max_retries=0)
        messages: list[Any] = [{"role": "user", "content": "Hello"}]
        assert client.chat.completions.create(model="joey", messages=messages).choices
        with pytest.raises(openai.RateLimitError) as limited:
            client.chat.completions.create(model="joey", messages=messages)
        assert [model.id for model in client.models.list()] == ["joey"], "looking is not counted"
        assert 0 < int(limited.value.response.headers["retry-after"]) <= 60


# -- Limits ------------------------------------------------------------------------------------------------------------


class Clock:
    """Time that goes when it is told."""

    def __init__(self, now: float = 1_000_000 * 86_400.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def key_with(**limits: int) -> Key:
    return Key.model_validate(
        {"name": "ann", "digest": digest_of("x"), "created": "2026-01-01T00:00:00Z", "limits": limits}
    )


def test_a_minute_slides_and_says_when_to_come_back() -> None:
    clock, key = Clock(), key_with(requests_a_minute=2)
    quotas = Quotas(clock)
    for seconds in (0, 10):
        clock.now += seconds
        quotas.enter(key)
        quotas.leave(key)
    assert quotas.headers(key) == {
        "x-ratelimit-limit-requests": "2",
        "x-ratelimit-remaining-requests": "0",
        "x-ratelimit-reset-requests": "50s",
    }
    with pytest.raises(ApiError) as refused:
        quotas.enter(key)
    assert (refused.value.status, refused.value.headers) == (429, {"Retry-After": "50"})
    clock.now += 50
    quotas.enter(key)
    with pytest.raises(ApiError):
        quotas.enter(key)


def test_a_day_s_tokens_and_pictures_come_back_with_the_next_day() -> None:
    clock, key = Clock(), key_with(tokens_a_day=10, pictures_a_day=3)
    clock.now += 86_000
    quotas = Quotas(clock)
    quotas.enter(key)
    quotas.add_tokens(key, 9)
    quotas.enter(key)  # one token is left, and nobody knows yet how long the answer is
    quotas.add_tokens(key, 9)
    quotas.take_pictures(key, 2)
    with pytest.raises(ApiError, match="3 pictures a day"):
        quotas.take_pictures(key, 2)
    quotas.take_pictures(key, 1)
    with pytest.raises(ApiError, match="tokens of today") as refused:
        quotas.enter(key)
    assert refused.value.headers == {"Retry-After": "400"}
    clock.now += 400
    quotas.enter(key)
    quotas.take_pictures(key, 3)


def test_a_restart_gives_nobody_a_second_day(
    tmp_path: Path, facts: ModelFacts, engine: SmallEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does being killed, but for the last seconds; what was counted on another day is no more."""
    monkeypatch.setattr(serving.day_counts, "SECONDS_BETWEEN_WRITES", 3600.0)
    file, clock = tmp_path / "keys.json", Clock()
    key = new_key(file, "ann", KeyLimits(tokens_a_day=10_000, pictures_a_day=5))
    kept = file_of_counts(file)

    def doors() -> Doors:
        return Doors(keys=KeyRing(file), quotas=Quotas(clock, DayCounts(kept)))

    with client_of(facts, engine, doors()) as client:
        for _ in range(2):
            assert client.post(PATH, json=chat(picture_question()), headers=bearer(key)).status_code == 200
        was_killed = kept.read_bytes()
    kept_in_order = kept.read_bytes()
    assert kept.stat().st_mode & 0o777 == 0o600
    for content, pictures_left, tokens_left in ((was_killed, 4, 10_000), (kept_in_order, 3, 9_980)):
        kept.write_bytes(content)
        with client_of(facts, engine, doors()) as client:
            answer = client.post(PATH, json=chat(), headers=bearer(key))
            assert answer.headers["x-ratelimit-remaining-pictures"] == str(pictures_left)
            assert answer.headers["x-ratelimit-remaining-tokens"] == str(tokens_left)
    clock.now += 86_400
    with client_of(facts, engine, doors()) as client:
        answer = client.post(PATH, json=chat(), headers=bearer(key))
        assert answer.headers["x-ratelimit-remaining-pictures"] == "5"
        assert answer.headers["x-ratelimit-remaining-tokens"] == "10000"


@pytest.mark.parametrize("content", [b"", b"{}", b'{"day": 0, "keys": {"ann": {"tokens": -5}}}', b"\xff"])
def test_a_damaged_file_of_counts_is_named_and_nobody_is_let_in(content: bytes, tmp_path: Path) -> None:
    kept = tmp_path / "counts.json"
    kept.write_bytes(content)
    with pytest.raises(KeyFileError, match=r"counts\.json is damaged; remove it"):
        Quotas(kept=DayCounts(kept))


def test_counting_goes_on_where_the_file_cannot_be_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    quotas = Quotas(Clock(), DayCounts(tmp_path / "no such folder" / "counts.json"))
    key = key_with(tokens_a_day=10)
    for _ in range(2):
        quotas.enter(key)
        quotas.add_tokens(key, 5)
        quotas.keep()
    assert [record.message for record in caplog.records if "cannot be written: No such file" in record.message] != []
    assert len(caplog.records) == 1, "it is told once"
    with pytest.raises(ApiError, match="tokens of today"):
        quotas.enter(key)


def test_limits_hold_when_many_ask_at_once(tmp_path: Path, facts: ModelFacts) -> None:
    """Twenty at once: a limit of five running lets five in, and all who were let in are answered."""
    file = tmp_path / "keys.json"
    running, minute = (
        new_key(file, "running", KeyLimits(running=5)),
        new_key(file, "minute", KeyLimits(requests_a_minute=5)),
    )
    with (
        small_engine() as engine,
        client_of(facts, engine, Doors(keys=KeyRing(file))) as client,
        ThreadPoolExecutor(20) as pool,
    ):
        engine.go_on.clear()
        asked = [pool.submit(client.post, PATH, json=chat(), headers=bearer(running)) for _ in range(20)]
        refused = list(islice(as_completed(asked, timeout=60), 15))
        assert all(answer.result().status_code == 429 for answer in refused)
        assert all(int(answer.result().headers["retry-after"]) > 0 for answer in refused)
        engine.go_on.set()
        assert sorted(answer.result(60).status_code for answer in asked) == [200] * 5 + [429] * 15
        assert len(engine.seen) == 5
        asked = [pool.submit(client.post, PATH, json=chat(), headers=bearer(minute)) for _ in range(20)]
        assert sorted(answer.result(60).status_code for answer in asked) == [200] * 5 + [429] * 15
        # The places are free again, also after refusals.
        assert client.post(PATH, json=chat(), headers=bearer(running)).status_code == 200


@pytest.mark.parametrize("stream", [True, False])
def test_tokens_and_pictures_are_counted_for_the_key(
    stream: bool, tmp_path: Path, facts: ModelFacts, engine: SmallEngine
) -> None:
    file = tmp_path / "keys.json"
    key = new_key(file, "ann", KeyLimits(tokens_a_day=25, pictures_a_day=2))
    with client_of(facts, engine, Doors(keys=KeyRing(file))) as client:
        answer = client.post(PATH, json=chat(picture_question(), stream=stream), headers=bearer(key))
        assert answer.status_code == 200
        assert ('"usage"' in answer.text) is not stream, "the usage that nobody asked for is counted, not told"
        later = client.post(PATH, json=chat(stream=stream), headers=bearer(key))
        assert later.headers["x-ratelimit-remaining-tokens"] == "15"
        assert later.headers["x-ratelimit-remaining-pictures"] == "1"
        too_many = chat([*picture_question(), *picture_question()])
        assert client.post(PATH, json=too_many, headers=bearer(key)).status_code == 429
        assert client.post(PATH, json=chat(), headers=bearer(key)).status_code == 200
        refused = client.post(PATH, json=chat(), headers=bearer(key))
        assert refused.status_code == 429
        assert refused.json()["error"]["code"] == "rate_limit_exceeded"
        assert "tokens of today" in refused.json()["error"]["message"]


def test_the_usage_is_told_where_it_was_asked_for(facts: ModelFacts, engine: SmallEngine) -> None:
    with client_of(facts, engine, Doors()) as client:
        asked = client.post(PATH, json=chat(stream=True, stream_options={"include_usage": True})).text
        unasked = client.post(PATH, json=chat(stream=True)).text
    assert asked.replace(usage_event(asked), "") == unasked


def usage_event(text: str) -> str:
    """The event that tells the usage, with its empty line."""
    return next(line for line in text.splitlines() if '"usage"' in line) + "\n\n"


def test_no_more_requests_are_let_in_than_there_is_room_for(facts: ModelFacts) -> None:
    with small_engine() as engine, client_of(facts, engine, Doors(most_running=2)) as client:
        engine.go_on.clear()
        with ThreadPoolExecutor(2) as pool:
            waiting = [pool.submit(client.post, PATH, json=chat()) for _ in range(2)]
            while len(engine.seen) < 2:
                threading.Event().wait(0.02)
            answer = client.post(PATH, json=chat())
            assert answer.status_code == 503
            assert answer.json()["error"]["code"] == "busy"
            assert answer.headers["retry-after"]
            assert client.get("/health").status_code == 200
            engine.go_on.set()
            assert [each.result(60).status_code for each in waiting] == [200, 200]
        assert client.post(PATH, json=chat()).status_code == 200


# -- Origins -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("host", "origin", "let_in"),
    [
        ("localhost", None, True),
        ("localhost:7860", "http://localhost:7860", True),
        ("127.0.0.1:7860", "http://127.0.0.1:7860", True),
        ("192.168.1.7:7860", "http://192.168.1.7:7860", True),
        ("[::1]:7860", "http://[::1]:7860", True),
        ("chat.example", "https://chat.example", True),
        ("localhost", "https://chat.example", True),
        ("localhost", "https://elsewhere.example", False),
        ("localhost:7860", "http://localhost:1234", False),
        ("localhost", "null", False),
        ("localhost", "file://", False),
        ("localhost", "http://localhost.elsewhere.example", False),
        ("elsewhere.example", None, False),
        ("elsewhere.example", "http://elsewhere.example", False),
        ("127.0.0.1.elsewhere.example", None, False),
        ("localhost@elsewhere.example", None, False),
        ("[", None, False),
        ("", None, False),
    ],
)
def test_foreign_pages_and_names_are_kept_out(
    host: str, origin: str | None, let_in: bool, facts: ModelFacts, engine: SmallEngine
) -> None:
    headers = {"Host": host} | ({"Origin": origin} if origin else {})
    with client_of(facts, engine, Doors(origins=("https://chat.example",))) as client:
        for answer in (client.get("/v1/models", headers=headers), client.post(PATH, json=chat(), headers=headers)):
            assert answer.status_code == (200 if let_in else 403)
            if not let_in:
                assert answer.json()["error"]["code"] == "origin_not_allowed"
                assert "--allow-origin" in answer.json()["error"]["message"]
            cross = origin == "https://chat.example"
            assert (answer.headers.get("access-control-allow-origin") == origin) is cross or origin is None


def test_a_browser_may_ask_first_without_a_key(tmp_path: Path, facts: ModelFacts, engine: SmallEngine) -> None:
    file = tmp_path / "keys.json"
    new_key(file, "ann")
    asks = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}
    with client_of(facts, engine, Doors(keys=KeyRing(file), origins=("https://chat.example",))) as client:
        assert client.options(PATH, headers=asks | {"Origin": "https://chat.example"}).status_code == 200
        assert client.options(PATH, headers=asks | {"Origin": "https://elsewhere.example"}).status_code == 403
        assert client.post(PATH, json=chat(), headers={"Origin": "https://chat.example"}).status_code == 401


@pytest.mark.parametrize(
    "text", ["*", "chat.example", "https://", "https://a/b", "https://a?b", "ftp://a", "https://a:x"]
)
def test_what_is_no_origin_is_refused(text: str) -> None:
    with pytest.raises(OriginError, match="no origin"):
        checked_origin(text)


def test_an_origin_is_written_as_browsers_do() -> None:
    assert checked_origin("HTTPS://Chat.example:8443/") == "https://chat.example:8443"


# -- Ids, log and numbers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", ["", "a b", "x" * 129, "a\tb", '"}', "é"])
def test_every_answer_has_an_id_and_a_plain_one_is_kept(given: str, facts: ModelFacts, engine: SmallEngine) -> None:
    with client_of(facts, engine, Doors()) as client:
        header = {b"x-request-id": given.encode()}
        ids = [client.get(path, headers=header).headers["x-request-id"] for path in ("/health", "/v1/x", "/v1/models")]
        assert len(set(ids)) == 3
        assert all(each.startswith("req-") for each in ids)
        assert client.get("/v1/x", headers={"x-request-id": "mine.1_2-3"}).headers["x-request-id"] == "mine.1_2-3"


def test_a_failure_of_ours_has_an_id_too(
    facts: ModelFacts, engine: SmallEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("/home/somebody/secret.py is at fault")

    with client_of(facts, engine, Doors()) as client:
        monkeypatch.setattr(serving.routes.chat, "check_tokens", fails)
        answer = client.post(PATH, json=chat(), headers={"x-request-id": "mine"})
    assert answer.status_code == 500
    assert answer.headers["x-request-id"] == "mine"
    assert answer.json()["error"]["message"] == "The server failed; its log says why."


@pytest.mark.parametrize("log_content", [False, True])
def test_the_log_has_a_line_for_each_request_and_no_words_unless_told(
    log_content: bool, tmp_path: Path, facts: ModelFacts, engine: SmallEngine, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    file = tmp_path / "keys.json"
    key = new_key(file, "ann")
    with client_of(facts, engine, Doors(keys=KeyRing(file), log_content=log_content)) as client:
        for stream in (True, False):
            body = chat(picture_question(), stream=stream, user="somebody")
            assert client.post(f"{PATH}?who=somebody", json=body, headers=bearer(key)).status_code == 200
        assert client.post(PATH, json=chat(WORDS, temperature=-1), headers=bearer(key)).status_code == 400
    lines = [json.loads(record.message) for record in caplog.records if record.name == "kangaroo.requests"]
    assert [(line["method"], line["path"], line["status"]) for line in lines] == [
        ("POST", PATH, 200), ("POST", PATH, 200), ("POST", PATH, 400),
    ]  # fmt: skip
    for line in lines[:2]:
        assert (line["key"], line["prompt_tokens"], line["completion_tokens"], line["pictures"]) == ("ann", 7, 3, 1)
        assert line["ms"] > 0
    ours = " ".join(record.getMessage() for record in caplog.records if not record.name.startswith("httpx"))
    assert key not in ours
    assert PICTURE[:40] not in ours
    assert (WORDS in ours) is log_content
    assert ("Yes." in ours) is log_content


def test_the_numbers_are_those_of_what_was_done(tmp_path: Path, facts: ModelFacts, engine: SmallEngine) -> None:
    file = tmp_path / "keys.json"
    key = new_key(file, "ann", KeyLimits(pictures_a_day=1))
    with client_of(facts, engine, Doors(keys=KeyRing(file))) as client:
        for headers in ({}, bearer(key), bearer(key)):
            client.post(PATH, json=chat(picture_question(), stream=True), headers=headers)
        client.post(PATH, json=chat(temperature=-1), headers=bearer(key))
        client.request("GET", "/v1/made/up/1", headers=bearer(key))
        client.request("GET", "/v1/made/up/2", headers=bearer(key))
        text = client.get("/metrics", headers=bearer(key)).text
    samples = {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    route = ("route", PATH)
    assert samples["kangaroo_requests_total", ("method", "POST"), route, ("status", "200")] == 1
    assert samples["kangaroo_requests_total", ("method", "POST"), route, ("status", "400")] == 1
    assert samples["kangaroo_requests_total", ("method", "POST"), route, ("status", "429")] == 1
    assert samples["kangaroo_rejected_total", ("reason", "key")] == 1
    assert samples["kangaroo_rejected_total", ("reason", "limit")] == 1
    assert samples["kangaroo_pictures_total",] == 1
    assert samples["kangaroo_tokens_total", ("kind", "completion")] == 3
    assert samples["kangaroo_first_token_seconds_count",] == 1
    assert samples["kangaroo_running_requests",] == 0
    assert samples["kangaroo_engine_ready",] == 1
    assert samples["vllm:num_requests_running",] == 0, "the engine's own"
    made_up = [name for name in samples if "made" in str(name)]
    assert made_up == [], "paths that clients invent make no series"


def test_ready_tells_the_stage_until_it_is(facts: ModelFacts) -> None:
    loading = SmallEngine(state=EngineState(Phase.LOADING, "loading weights"))
    with client_of(facts, loading, Doors()) as client:
        answer = client.get("/ready")
        assert answer.status_code == 503
        assert answer.headers["retry-after"]
        assert "loading weights" in answer.json()["error"]["message"]
        assert client.get("/health").status_code == 200
        assert client.get("/metrics").status_code == 200
    with client_of(facts, SmallEngine(), doors := Doors()) as client:
        assert client.get("/ready").json() == {"status": "ready"}
        doors.drain.begin()
        assert client.get("/ready").json()["error"]["code"] == "stopping"
        refused = client.post(PATH, json=chat())
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "stopping")
        assert refused.headers["retry-after"]
        assert client.get("/health").status_code == 200
