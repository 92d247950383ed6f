"""Files that are uploaded to teach with: the openai client keeps and fetches them, bad lines are refused by name."""

import io
import json
import socket
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from assistant.models import JOEY
from serving.doors import Doors
from serving.gateway import GatewayLimits, create_gateway
from serving.jobs.data_folder import DataFolder, DataFolderError, FolderInUseError
from serving.jobs.stored_files import FileLimits, plain_name
from serving.keys import KeyRing, new_key
from serving.model_folder import ModelFacts, read_model_folder
from tests.conftest import served
from tests.made_up_lesson import as_lines, lesson_file, rows
from tests.small_engine import SmallEngine
from tests.test_gateway import assert_refused

GOOD = as_lines(rows(3))


@pytest.fixture(scope="module")
def facts() -> ModelFacts:
    return read_model_folder(JOEY)


@contextmanager
def files_served(
    facts: ModelFacts, folder: Path, limits: GatewayLimits | None = None, doors: Doors | None = None
) -> Iterator[str]:
    """The address of a gateway that keeps files in `folder`; no engine is needed for that."""
    app = create_gateway(SmallEngine(), "joey", facts, limits or GatewayLimits(), doors, data=DataFolder(folder))
    with served(app) as address:
        yield address


@contextmanager
def client_of(address: str, key: str = "none") -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{address}/v1", api_key=key, max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def address(facts: ModelFacts, folder: Path) -> Iterator[str]:
    """One for all tests that leave no file behind."""
    with files_served(facts, folder) as address:
        yield address


@pytest.fixture
def client(facts: ModelFacts, tmp_path: Path) -> Iterator[openai.OpenAI]:
    with files_served(facts, tmp_path / "data") as address, client_of(address) as client:
        yield client


def upload(address: str, content: bytes, purpose: str = "fine-tune", **fields: str) -> httpx.Response:
    form = {"purpose": purpose} | fields
    return httpx.post(f"{address}/v1/files", files={"file": ("a.jsonl", content)}, data=form, trust_env=False)


def test_the_client_uploads_lists_fetches_and_deletes(client: openai.OpenAI, tmp_path: Path) -> None:
    before = int(time.time())
    uploaded = client.files.create(file=lesson_file(4), purpose="fine-tune")
    assert (uploaded.filename, uploaded.purpose, uploaded.object) == ("lesson.jsonl", "fine-tune", "file")
    assert uploaded.bytes == len(as_lines(rows(4)))
    assert before <= uploaded.created_at <= time.time()
    assert client.files.retrieve(uploaded.id) == uploaded
    assert client.files.wait_for_processing(uploaded.id).status == "processed"
    assert client.files.content(uploaded.id).content == as_lines(rows(4))
    assert [file.id for file in client.files.list()] == [uploaded.id]
    deleted = client.files.delete(uploaded.id)
    assert (deleted.id, deleted.deleted) == (uploaded.id, True)
    assert list(client.files.list()) == []
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(uploaded.id)
    assert list((tmp_path / "data" / "files").iterdir()) == []


def test_a_list_comes_in_pages_in_either_order(client: openai.OpenAI) -> None:
    made = [client.files.create(file=lesson_file(1, f"{number}.jsonl"), purpose="fine-tune").id for number in range(5)]
    page = client.files.list(limit=2)
    assert [file.id for file in page.data] == made[:2:-1]
    assert page.has_more
    assert [file.id for file in page] == made[::-1]  # the client turns the pages
    assert [file.id for file in client.files.list(limit=3, order="asc")] == made
    assert [file.id for file in client.files.list(order="asc", after=made[2])] == made[3:]
    assert list(client.files.list(purpose="batch")) == []
    assert len(list(client.files.list(purpose="fine-tune"))) == 5


def test_files_outlive_the_server(facts: ModelFacts, tmp_path: Path) -> None:
    with files_served(facts, tmp_path) as address, client_of(address) as client:
        kept = client.files.create(file=lesson_file(2), purpose="fine-tune")
    (tmp_path / "files" / "file-half.partial").write_bytes(b"what a kill left")
    with files_served(facts, tmp_path) as address, client_of(address) as client:
        assert list(client.files.list()) == [kept]
        assert client.files.content(kept.id).content == as_lines(rows(2))
    assert [file.name for file in (tmp_path / "files").iterdir()] == [kept.id]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no rows"),
        (b"\n  \n", "no rows"),
        (GOOD + b'{"messages": [\n', r"line 4 is not JSON"),
        (GOOD + b"[1, 2]\n", r"line 4 has no list of messages"),
        (b'{"prompt": "a", "completion": "b"}\n', r"line 1 has no list of messages"),
        (b'{"messages": "hello"}\n', r"line 1 has no list of messages"),
        (GOOD + b'\n{"messages": "\xff"}\n', r"line 5 is not UTF-8"),
        (b'{"messages":' + b"[" * 100_000 + b"\n", r"line 1 is (nested too deep|not JSON)"),
        (b"PAR1" + bytes(100), r"line 1 is not (JSON|UTF-8)"),
    ],
)
def test_a_line_that_is_no_row_is_named(address: str, folder: Path, content: bytes, message: str) -> None:
    assert_refused(upload(address, content), 400, message, "file")
    assert list((folder / "files").iterdir()) == []


def test_a_form_that_is_wrong_is_refused(address: str) -> None:
    assert_refused(upload(address, GOOD, "assistants"), 400, "purpose: .*fine-tune", "purpose")
    assert_refused(upload(address, GOOD, **{"expires_after[anchor]": "created_at"}), 400, "expires_after")
    post = f"{address}/v1/files"
    assert_refused(httpx.post(post, data={"purpose": "fine-tune"}, trust_env=False), 400, "file", "file")
    assert_refused(httpx.post(post, files={"file": GOOD}, trust_env=False), 400, "purpose", "purpose")
    assert_refused(httpx.post(post, json={"purpose": "fine-tune"}, trust_env=False), 400, "file|purpose")
    many = [("file", ("a.jsonl", GOOD))] * 3
    assert_refused(httpx.post(post, files=many, data={"purpose": "fine-tune"}, trust_env=False), 400, "Too many files")
    fields = {f"field{number}": "x" for number in range(30)}
    assert_refused(upload(address, GOOD, **fields), 400, "Too many fields")
    assert_refused(upload(address, GOOD, note="x" * 10_000), 400, "exceeded maximum size")
    text = {"file": (None, "no file"), "purpose": (None, "fine-tune")}
    assert_refused(httpx.post(post, files=text, trust_env=False), 400, "file", "file")


@pytest.mark.parametrize(
    ("limits", "status", "message"),
    [
        (FileLimits(rows=2), 413, "more than 2 lines"),
        (FileLimits(line_bytes=200), 413, "line 1 is over"),
        (FileLimits(owner_bytes=len(GOOD) - 1), 413, "Your files would hold more"),
        (FileLimits(owner_files=0), 413, "which is the most"),
        (FileLimits(free_bytes=2**60), 507, "no room"),
    ],
)
def test_what_is_too_much_is_refused_and_not_kept(
    facts: ModelFacts, tmp_path: Path, limits: FileLimits, status: int, message: str
) -> None:
    with files_served(facts, tmp_path, GatewayLimits(files=limits)) as address:
        assert_refused(upload(address, GOOD), status, message)
        assert httpx.get(f"{address}/v1/files", trust_env=False).json()["data"] == []
    assert list((tmp_path / "files").iterdir()) == []


def test_unknown_files_and_places_are_refused(address: str) -> None:
    for method, path in (("GET", ""), ("GET", "/content"), ("DELETE", "")):
        answer = httpx.request(method, f"{address}/v1/files/file-nowhere{path}", trust_env=False)
        assert_refused(answer, 404, "No such File object: file-nowhere", "file_id")
    assert_refused(httpx.get(f"{address}/v1/files?after=file-nowhere", trust_env=False), 400, "no file", "after")
    assert_refused(httpx.get(f"{address}/v1/files?limit=0", trust_env=False), 400, "limit", "limit")
    for wild in ("..%2Fkangaroo.db", "%2e%2e/lock", "file-%00"):
        assert httpx.get(f"{address}/v1/files/{wild}/content", trust_env=False).status_code == 404


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("lesson.jsonl", "lesson.jsonl"),
        ("../../etc/passwd", "passwd"),
        ("C:\\Users\\ann\\a.jsonl", "a.jsonl"),
        ("line\r\nbreak: 1", "linebreak: 1"),
        ("", "upload.jsonl"),
        (None, "upload.jsonl"),
        ("ä.jsonl", "ä.jsonl"),
    ],
)
def test_names_are_names_alone(given: str | None, kept: str) -> None:
    assert plain_name(given) == kept


def test_content_is_an_attachment_whatever_it_is_called(address: str) -> None:
    with client_of(address) as client:
        file = client.files.create(file=("ä page.html", io.BytesIO(GOOD)), purpose="fine-tune")
        answer = client.files.with_raw_response.content(file.id)
        client.files.delete(file.id)
    assert answer.headers["content-type"].startswith("application/jsonl")
    assert answer.headers["content-disposition"].startswith("attachment; filename*=utf-8''")
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_files_of_one_key_are_invisible_to_another(facts: ModelFacts, tmp_path: Path) -> None:
    keys = {name: new_key(tmp_path / "keys.json", name) for name in ("ann", "bob")}
    doors = Doors(keys=KeyRing(tmp_path / "keys.json"))
    with (
        files_served(facts, tmp_path / "data", doors=doors) as address,
        client_of(address, keys["ann"]) as ann,
        client_of(address, keys["bob"]) as bob,
        client_of(address, "wrong") as nobody,
    ):
        file = ann.files.create(file=lesson_file(1), purpose="fine-tune")
        assert [kept.id for kept in ann.files.list()] == [file.id]
        assert list(bob.files.list()) == []
        looks: list[Callable[[str], Any]] = [bob.files.retrieve, bob.files.content, bob.files.delete]
        for look in looks:
            with pytest.raises(openai.NotFoundError):
                look(file.id)
        with pytest.raises(openai.BadRequestError):
            bob.files.list(after=file.id)
        with pytest.raises(openai.NotFoundError):
            bob.fine_tuning.jobs.create(model="joey", training_file=file.id)
        with pytest.raises(openai.AuthenticationError):
            nobody.files.list()
        assert ann.files.content(file.id).content == as_lines(rows(1))


def test_a_large_file_passes_where_no_other_body_would(facts: ModelFacts, tmp_path: Path) -> None:
    limits = GatewayLimits(body_bytes=2**20)
    wide = as_lines([{"messages": [{"role": "user", "content": "x" * 2**20}]}] * 3)
    with files_served(facts, tmp_path, limits) as address:
        assert upload(address, wide).status_code == 200
        chat = {"model": "joey", "messages": [{"role": "user", "content": "x" * 2**20}]}
        assert httpx.post(f"{address}/v1/chat/completions", json=chat, trust_env=False).status_code == 413


def test_an_upload_that_does_not_come_is_dropped(facts: ModelFacts, tmp_path: Path) -> None:
    with files_served(facts, tmp_path, GatewayLimits(body_seconds=0.5)) as address:
        host, _, port = address.removeprefix("http://").partition(":")
        head = b"POST /v1/files HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\n"
        head += b"Content-Type: multipart/form-data; boundary=x\r\n\r\n--x\r\n"
        with socket.create_connection((host, int(port)), timeout=30) as slow:
            slow.sendall(head)
            said = b"".join(iter(lambda: slow.recv(4096), b""))  # head and body may come one after the other
        assert b" 408 " in said.splitlines()[0]
        assert b"too slowly" in said
        assert upload(address, GOOD).status_code == 200


def test_a_length_over_the_limit_is_refused_before_it_comes(address: str) -> None:
    host, _, port = address.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=30) as long:
        long.sendall(b"POST /v1/files HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999999\r\n\r\n")
        assert b" 413 " in long.recv(4096).splitlines()[0]


def test_a_server_without_a_data_folder_says_so(facts: ModelFacts) -> None:
    with served(create_gateway(SmallEngine(), "joey", facts)) as address:
        for path in ("/v1/files", "/v1/fine_tuning/jobs", "/v1/files/file-a/content"):
            assert_refused(httpx.get(address + path, trust_env=False), 503, "no data folder")


def test_one_folder_is_for_one_server(tmp_path: Path) -> None:
    with DataFolder(tmp_path), pytest.raises(FolderInUseError, match="--data-folder"):
        DataFolder(tmp_path)
    DataFolder(tmp_path).close()


def test_a_folder_that_cannot_be_used_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataFolderError, match="cannot be used"):
        DataFolder(tmp_path / "file")
    DataFolder(tmp_path / "newer").close()
    with sqlite3.connect(tmp_path / "newer" / "kangaroo.db") as database:
        database.execute("PRAGMA user_version = 99")
    with pytest.raises(DataFolderError, match="newer Kangaroo"):
        DataFolder(tmp_path / "newer")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "kangaroo.db").write_bytes(json.dumps("no database").encode() * 1000)
    with pytest.raises(DataFolderError, match="move it away"):
        DataFolder(tmp_path / "broken")
