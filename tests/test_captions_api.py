"""Captions and answers over the API with Joey behind a real vLLM: as chat says them, from files and from data URLs."""

import base64
import io
import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from assistant.images import encode_data_url, open_picture
from assistant.models import JOEY
from assistant.questions import CAPTION_QUESTION, CAPTION_STYLES, CaptionStyle, tidied
from serving.captioning import PICTURES_AT_ONCE
from serving.engine import RemoteEngine, free_port
from serving.model_folder import read_model_folder
from tests.conftest import gateway_client
from tests.test_gateway import assert_refused, data_url
from training.data.scenes import EVALUATION_SEED, make_scene

CAPTIONS = "/v1/captions"
ANSWERS = "/v1/answers"
QUESTION = "What colour is the largest shape?"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """More scenes than are asked about at once."""
    folder = tmp_path_factory.mktemp("pictures")
    paths = [folder / f"scene {number}.png" for number in range(PICTURES_AT_ONCE + 3)]
    for number, path in enumerate(paths):
        make_scene(EVALUATION_SEED + number).image.save(path)
    return paths


def url_of(file: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(file.read_bytes()).decode()


def said_in_chat(client: httpx.Client, file: Path, question: str, max_tokens: int) -> dict[str, Any]:
    """The choice of the chat route for the same picture and question."""
    picture = {"type": "image_url", "image_url": {"url": url_of(file)}}
    messages = [{"role": "user", "content": [picture, {"type": "text", "text": question}]}]
    body = {"model": JOEY.name, "messages": messages, "temperature": 0, "max_tokens": max_tokens}
    answer = client.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    return dict(answer.json()["choices"][0] | {"usage": answer.json()["usage"]})


def assert_whole(answer: httpx.Response, count: int) -> list[dict[str, Any]]:
    """The texts of an answer in which nothing failed, whose parts agree with its whole."""
    assert answer.status_code == 200, answer.text
    content = answer.json()
    assert content["object"] == "list"
    assert content["model"] == JOEY.name
    assert content["failed"] == 0
    texts = content["data"]
    assert [text["index"] for text in texts] == list(range(count))
    for text in texts:
        assert text["error"] is None
        assert text["text"].strip() == text["text"] != ""
        assert text["finish_reason"] in ("stop", "length")
        assert 0 < text["seconds"] <= content["seconds"]
        assert text["usage"]["total_tokens"] == text["usage"]["prompt_tokens"] + text["usage"]["completion_tokens"]
    for name, total in content["usage"].items():
        assert total == sum(text["usage"][name] for text in texts) > 0
    return list(texts)


def test_a_caption_is_what_chat_says(joey_gateway: httpx.Client, files: list[Path]) -> None:
    """More pictures than go at once, in their order, and each of them as if it had been asked about alone."""
    answer = joey_gateway.post(CAPTIONS, json={"pictures": [url_of(file) for file in files]})
    texts = assert_whole(answer, len(files))
    for text, file in zip(texts, files, strict=True):
        said = said_in_chat(joey_gateway, file, CAPTION_QUESTION, CAPTION_STYLES["short"].max_tokens)
        assert text["text"] == tidied(said["message"]["content"], "short")
        assert text["finish_reason"] == said["finish_reason"]
        assert text["usage"] == {name: said["usage"][name] for name in text["usage"]}
    assert len({text["text"] for text in texts}) > 1, "all pictures looked alike"


def test_uploaded_files_give_the_same_captions(joey_gateway: httpx.Client, files: list[Path]) -> None:
    sent = assert_whole(joey_gateway.post(CAPTIONS, json={"pictures": [url_of(file) for file in files]}), len(files))
    uploads = [("pictures", (file.name, file.read_bytes(), "image/png")) for file in files]
    fields = {"model": JOEY.name, "style": "short", "temperature": "0"}
    uploaded = assert_whole(joey_gateway.post(CAPTIONS, files=uploads, data=fields), len(files))
    for one, other, file in zip(sent, uploaded, files, strict=True):
        assert other["name"] == file.name
        assert one["name"] is None
        assert other["text"] == one["text"]


@pytest.mark.parametrize("style", CAPTION_STYLES)
def test_each_style_asks_its_own_way(style: CaptionStyle, joey_gateway: httpx.Client, files: list[Path]) -> None:
    (text,) = assert_whole(joey_gateway.post(CAPTIONS, json={"pictures": [url_of(files[0])], "style": style}), 1)
    words = CAPTION_STYLES[style]
    said = said_in_chat(joey_gateway, files[0], words.question, words.max_tokens)["message"]["content"]
    assert text["text"] == tidied(said, style)


@pytest.mark.parametrize(
    ("said", "alternative"),
    [
        ("A picture of a green square.", "A green square."),
        ("This is an image showing two dogs.", "Two dogs."),
        ("the photo of a  cat\non a mat", "A cat on a mat"),
        ("There are four diamonds.", "There are four diamonds."),
        ("A picture frame on a wall.", "A picture frame on a wall."),
        ("", ""),
    ],
)
def test_an_alternative_text_does_not_say_that_it_is_a_picture(said: str, alternative: str) -> None:
    assert tidied(said, "alt_text") == alternative


def test_a_question_is_asked_about_each_picture(joey_gateway: httpx.Client, files: list[Path]) -> None:
    texts = assert_whole(
        joey_gateway.post(ANSWERS, json={"pictures": [url_of(file) for file in files[:3]], "question": QUESTION}), 3
    )
    for text, file in zip(texts, files[:3], strict=True):
        assert text["text"] == said_in_chat(joey_gateway, file, QUESTION, 256)["message"]["content"].strip()
    upload = [("pictures", (files[0].name, files[0].read_bytes()))]
    (uploaded,) = assert_whole(joey_gateway.post(ANSWERS, files=upload, data={"question": QUESTION}), 1)
    assert uploaded["text"] == texts[0]["text"]


def test_max_tokens_and_temperature_are_heard(joey_gateway: httpx.Client, files: list[Path]) -> None:
    body = {"pictures": [url_of(files[0])], "max_tokens": 2}
    (text,) = assert_whole(joey_gateway.post(CAPTIONS, json=body), 1)
    assert text["usage"]["completion_tokens"] == 2
    assert text["finish_reason"] == "length"
    body = {"pictures": [url_of(files[0])] * 8, "temperature": 2, "max_tokens": 20}
    texts = assert_whole(joey_gateway.post(CAPTIONS, json=body), 8)
    assert len({text["text"] for text in texts}) > 1


def test_a_typed_picture_token_is_only_text(joey_gateway: httpx.Client, files: list[Path]) -> None:
    body = {"pictures": [url_of(files[0])], "max_tokens": 4}
    (typed,) = assert_whole(joey_gateway.post(ANSWERS, json=body | {"question": "a <image> b"}), 1)
    (apart,) = assert_whole(joey_gateway.post(ANSWERS, json=body | {"question": "a < image> b"}), 1)
    assert typed["usage"] == apart["usage"]
    assert typed["text"] == apart["text"]


def test_a_picture_that_fails_is_named_and_the_rest_go_on(joey_gateway: httpx.Client, files: list[Path]) -> None:
    good = files[0].read_bytes()
    uploads = [("pictures", ("good.png", good)), ("pictures", ("notes.txt", b"hello")), ("pictures", ("2.png", good))]
    answer = joey_gateway.post(CAPTIONS, files=uploads)
    assert answer.status_code == 200, answer.text
    first, second, third = answer.json()["data"]
    assert answer.json()["failed"] == 1
    assert first["text"] == third["text"] != ""
    assert second["text"] is None
    assert second["name"] == "notes.txt"
    assert second["error"]["param"] == "pictures.1"
    assert second["error"]["code"] == "invalid_image"
    assert "Use PNG" in second["error"]["message"]
    assert answer.json()["usage"]["completion_tokens"] == 2 * first["usage"]["completion_tokens"]


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


BAD_PICTURES = [
    (b"hello", 415, "Use PNG"),
    (b"", 400, "empty"),
    (png(Image.effect_noise((60, 40), 80))[:500], 400, "damaged"),
    (png(Image.new("1", (13_000, 13_000))), 413, "too many pixels"),
    (b"\x89PNG\r\n\x1a\n" + bytes(21 * 2**20), 413, "limit of 20 MiB"),
]


@pytest.mark.parametrize(("content", "status", "message"), BAD_PICTURES)
def test_a_bad_picture_alone_is_refused_in_both_forms(
    content: bytes, status: int, message: str, joey_gateway: httpx.Client
) -> None:
    answer = joey_gateway.post(CAPTIONS, files=[("pictures", ("a.png", content))])
    assert_refused(answer, status, message, "pictures.0")
    if len(content) < 2**20:
        assert_refused(
            joey_gateway.post(CAPTIONS, json={"pictures": [data_url(content)]}), status, message, "pictures.0"
        )


SMALL = encode_data_url(Image.new("RGB", (20, 20), "red"))


@pytest.mark.parametrize(
    ("fields", "status", "message", "param"),
    [
        ({"pictures": None}, 400, "valid list", "pictures"),
        ({"pictures": []}, 400, "at least 1", "pictures"),
        ({"pictures": [SMALL] * 65}, 400, "at most 64", "pictures"),
        ({"pictures": [7]}, 400, "valid string", "pictures.0"),
        ({"pictures": ["http://127.0.0.1:1/cat.png"]}, 400, "data URLs", "pictures.0"),
        ({"pictures": ["file:///etc/passwd"]}, 400, "data URLs", "pictures.0"),
        ({"style": "long"}, 400, "'short', 'detailed' or 'alt_text'", "style"),
        ({"max_tokens": 0}, 400, "greater than or equal to 1", "max_tokens"),
        ({"max_tokens": "5"}, 400, "integer", "max_tokens"),
        ({"max_tokens": 10**9}, 400, "tokens in all", "max_tokens"),
        ({"temperature": 3}, 400, "less than or equal to 2", "temperature"),
        ({"temperature": float("nan")}, 400, "finite", "temperature"),
        ({"model": "gpt-4o"}, 404, "does not exist", "model"),
        ({"chat_template": "{{ 1 }}"}, 400, "Unrecognized request argument supplied: chat_template", "chat_template"),
        ({"question": "What?"}, 400, "Unrecognized request argument supplied: question", "question"),
    ],
)
def test_bad_fields_as_json(
    fields: dict[str, Any], status: int, message: str, param: str, joey_gateway: httpx.Client
) -> None:
    body = json.dumps({"pictures": [SMALL]} | fields)
    answer = joey_gateway.post(CAPTIONS, content=body, headers={"Content-Type": "application/json"})
    assert_refused(answer, status, message, param)


@pytest.mark.parametrize(
    ("files", "fields", "message", "param"),
    [
        (0, {"style": "short"}, "pictures: Field required", "pictures"),
        (65, {}, "Too many files", None),
        (1, {"style": "long"}, "'short', 'detailed' or 'alt_text'", "style"),
        (1, {"max_tokens": "many"}, "integer", "max_tokens"),
        (1, {"style": ["short", "short"]}, "given more than once", "style"),
        (1, {"question": "What?"}, "Unrecognized request argument supplied: question", "question"),
    ],
)
def test_bad_forms(
    files: int, fields: dict[str, Any], message: str, param: str | None, joey_gateway: httpx.Client
) -> None:
    content = base64.b64decode(SMALL.partition(",")[2])
    uploads = [("pictures", (f"{number}.png", content)) for number in range(files)]
    # A field of the form that has a file name of None is a text.
    texts = [
        (key, (None, text)) for key, value in fields.items() for text in ([value] if isinstance(value, str) else value)
    ]
    assert_refused(joey_gateway.post(CAPTIONS, files=[*uploads, *texts]), 400, message, param)


def test_files_elsewhere_in_the_form_are_refused(joey_gateway: httpx.Client) -> None:
    answer = joey_gateway.post(CAPTIONS, files=[("style", ("a.png", b"short"))])
    assert_refused(answer, 400, "files are taken in the field pictures only", "style")


@pytest.mark.parametrize(
    ("body", "content_type", "message"),
    [
        (b"{", "application/json", "not valid JSON"),
        (b"\xff\xfe", "application/json", "not valid JSON"),
        (b"[" * 20_000 + b"]" * 20_000, "application/json", "JSON"),
        (b"[1]", "application/json", "JSON object"),
        (b"{}", "text/plain", "JSON .* or a form"),
        (b"a=1", "application/x-www-form-urlencoded", "JSON .* or a form"),
        (b"nothing", "multipart/form-data", "boundary"),
        (b"nothing", "multipart/form-data; boundary=x", "multipart"),
        (
            b'--x\r\nContent-Disposition: form-data; name="pictures"; filename="a.png"\r\n\r\nhello',
            "multipart/form-data; boundary=x",
            ".",
        ),
    ],
)
def test_bodies_that_are_neither(body: bytes, content_type: str, message: str, joey_gateway: httpx.Client) -> None:
    answer = joey_gateway.post(CAPTIONS, content=body, headers={"Content-Type": content_type})
    assert_refused(answer, 400, message)


def test_an_empty_question_is_refused(joey_gateway: httpx.Client) -> None:
    assert_refused(joey_gateway.post(ANSWERS, json={"pictures": [SMALL]}), 400, "Field required", "question")
    for question in ("", " \n"):
        assert_refused(joey_gateway.post(ANSWERS, json={"pictures": [SMALL], "question": question}), 400, "question")


def test_without_an_engine_captions_are_told_to_come_back() -> None:
    nobody = RemoteEngine(f"http://127.0.0.1:{free_port()}")
    with gateway_client(nobody, read_model_folder(JOEY), JOEY.name) as client:
        answer = client.post(CAPTIONS, json={"pictures": [SMALL]})
        assert_refused(answer, 503, "not ready yet")
        assert int(answer.headers["retry-after"]) > 0


def test_the_picture_lies_upright_before_the_model(joey_gateway: httpx.Client, files: list[Path]) -> None:
    """An upload that was stored sideways with an EXIF note is captioned as the upright picture is."""
    upright = open_picture(files[0])
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    upright.transpose(Image.Transpose.ROTATE_90).save(buffer, "PNG", exif=exif)
    uploads = [("pictures", ("sideways.png", buffer.getvalue())), ("pictures", ("upright.png", png(upright)))]
    one, other = assert_whole(joey_gateway.post(CAPTIONS, files=uploads), 2)
    assert one["text"] == other["text"]
