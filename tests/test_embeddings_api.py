"""Embeddings and classifications over the API are those of the library, and need no engine."""

import base64
import io
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import torch
from PIL import Image

from assistant.embeddings import Embedder, load_embedder
from assistant.file_embedding import embed_files
from assistant.images import encode_data_url
from assistant.models import EMBEDDER, JOEY
from assistant.naming import TEMPLATES, label_embeddings, label_shares
from serving.engine import RemoteEngine, free_port
from serving.model_folder import read_model_folder
from tests.conftest import MODEL_NAME, gateway_client
from tests.test_gateway import assert_refused, data_url
from training.data.scenes import EVALUATION_SEED, make_scene

EMBEDDINGS = "/v1/embeddings"
CLASSIFICATIONS = "/v1/classifications"
TEXTS = ["a red square", "two blue circles", "a dog in the snow"]
JSON = {"Content-Type": "application/json"}
LABELS = ["a circle", "a square", "a bar chart", "a dog"]


@pytest.fixture(scope="module")
def client() -> Iterator[httpx.Client]:
    """Of a gateway over Joey whose engine is not there at all."""
    nobody = RemoteEngine(f"http://127.0.0.1:{free_port()}")
    with gateway_client(nobody, read_model_folder(JOEY), JOEY.name) as client:
        yield client


@pytest.fixture(scope="module")
def embedder() -> Embedder:
    return load_embedder(JOEY / EMBEDDER)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three scenes as PNG and a photograph-sized JPEG, which is decoded at a part of its size."""
    folder = tmp_path_factory.mktemp("pictures")
    paths = [folder / f"{number}.png" for number in range(3)]
    for number, path in enumerate(paths):
        make_scene(EVALUATION_SEED + number).image.save(path)
    paths.append(folder / "large.jpg")
    make_scene(EVALUATION_SEED + 3).image.resize((1500, 1100)).save(paths[-1], quality=95)
    return paths


def url_of(file: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(file.read_bytes()).decode()


def vectors(answer: httpx.Response) -> torch.Tensor:
    assert answer.status_code == 200, answer.text
    assert [item["index"] for item in answer.json()["data"]] == list(range(len(answer.json()["data"])))
    return torch.tensor([item["embedding"] for item in answer.json()["data"]])


def request(given: object, **fields: object) -> dict[str, Any]:
    return {"model": JOEY.name, "input": given} | fields


def test_texts_are_embedded_as_the_library_does(client: httpx.Client, embedder: Embedder) -> None:
    answer = client.post(EMBEDDINGS, json=request(TEXTS))
    torch.testing.assert_close(vectors(answer), embedder.texts(TEXTS), atol=1e-5, rtol=0)
    tokens = sum(len(ids) for ids in embedder.tokenizer(TEXTS)["input_ids"])
    assert answer.json()["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens}
    assert answer.json()["object"] == "list"
    assert answer.json()["model"] == JOEY.name
    alone = vectors(client.post(EMBEDDINGS, json=request(TEXTS[1])))
    torch.testing.assert_close(alone, embedder.texts([TEXTS[1]]), atol=1e-5, rtol=0)


def test_pictures_are_embedded_as_search_embeds_files(
    client: httpx.Client, embedder: Embedder, files: list[Path]
) -> None:
    wanted = torch.stack([vector for _, vector in embed_files(embedder, files) if isinstance(vector, torch.Tensor)])
    answer = client.post(EMBEDDINGS, json=request([url_of(file) for file in files]))
    torch.testing.assert_close(vectors(answer), wanted, atol=1e-5, rtol=0)
    rows, columns = embedder.tower.grid(embedder.tower.image_side, embedder.tower.image_side)
    assert answer.json()["usage"]["prompt_tokens"] == rows * columns * len(files)


def test_pictures_and_texts_keep_their_places(client: httpx.Client, embedder: Embedder, files: list[Path]) -> None:
    part = {"type": "image_url", "image_url": {"url": url_of(files[1])}}
    mixed = [TEXTS[0], url_of(files[0]), {"type": "text", "text": TEXTS[1]}, part]
    found = vectors(client.post(EMBEDDINGS, json=request(mixed)))
    texts = embedder.texts(TEXTS[:2])
    pictures = [vector for _, vector in embed_files(embedder, files[:2]) if isinstance(vector, torch.Tensor)]
    wanted = torch.stack([texts[0], pictures[0], texts[1], pictures[1]])
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)


def test_the_openai_client_reads_both_encodings(client: httpx.Client, embedder: Embedder) -> None:
    """It asks for base64 where nothing is said, and decodes it."""
    api = openai.OpenAI(base_url=f"{client.base_url}/v1", api_key="none")
    wanted = embedder.texts(TEXTS)
    encodings: list[dict[str, Any]] = [{}, {"encoding_format": "float"}, {"encoding_format": "base64"}]
    for fields in encodings:
        answer = api.embeddings.create(model=JOEY.name, input=TEXTS, **fields)
        for item, vector in zip(answer.data, wanted, strict=True):
            given = item.embedding
            if isinstance(given, str):
                given = np.frombuffer(base64.b64decode(given), "<f4").tolist()
            torch.testing.assert_close(torch.tensor(given), vector, atol=1e-5, rtol=0)


def test_a_long_text_is_refused_or_cut(client: httpx.Client, embedder: Embedder) -> None:
    long = "a dog in the snow " * 20
    assert_refused(client.post(EMBEDDINGS, json=request([TEXTS[0], long])), 400, "the text tower reads", "input.1")
    cut = vectors(client.post(EMBEDDINGS, json=request([long], truncate=True)))
    torch.testing.assert_close(cut, embedder.texts([long]), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("fields", "status", "message", "param"),
    [
        ({"model": "other"}, 404, "does not exist", "model"),
        ({"input": ""}, 400, "at least 1", "input"),
        ({"input": []}, 400, "at least 1", "input"),
        ({"input": [""]}, 400, "at least 1", "input.0"),
        ({"input": ["x"] * 257}, 400, "at most 256", "input"),
        ({"input": ["data:image/png;base64,xx"] * 65}, 400, "more than 64 pictures", None),
        ({"input": "x" * 10_001}, 400, "10,000 characters", None),
        ({"input": [1, 2, 3]}, 400, "input.0", "input.0"),
        ({"input": [{"type": "image_url"}]}, 400, "input.0", None),
        ({"input": "\ud800"}, 400, "surrogate", None),
        ({"dimensions": 8}, 400, "Unrecognized request argument supplied: dimensions", "dimensions"),
        ({"encoding_format": "hex"}, 400, "'float' or 'base64'", "encoding_format"),
        ({"input": ["a", "data:image/png;base64,@"]}, 400, "base64", "input.1"),
        ({"input": [data_url(b"hello")]}, 415, "Use PNG", "input.0"),
        (
            {"input": [{"type": "image_url", "image_url": {"url": "http://127.0.0.1/a.png"}}]},
            400,
            "data URLs",
            "input.0",
        ),
    ],
)
def test_bad_requests_for_embeddings(
    fields: dict[str, Any], status: int, message: str, param: str | None, client: httpx.Client
) -> None:
    body = request("a dog") | fields
    # `json.dumps` writes half a surrogate pair as an escape; httpx would look for its UTF-8, and there is none.
    assert_refused(client.post(EMBEDDINGS, content=json.dumps(body), headers=JSON), status, message, param)


def test_classification_is_the_library_s(client: httpx.Client, embedder: Embedder, files: list[Path]) -> None:
    pictures = torch.stack([vector for _, vector in embed_files(embedder, files) if isinstance(vector, torch.Tensor)])
    own = ["{} on a plain background", "a drawing of {}"]
    for templates in (None, own):
        wanted = label_shares(embedder, pictures, label_embeddings(embedder.texts, LABELS, templates or TEMPLATES))
        body: dict[str, Any] = {"pictures": [url_of(file) for file in files], "labels": LABELS}
        answer = client.post(CLASSIFICATIONS, json=body | ({"templates": templates} if templates else {}))
        assert answer.status_code == 200, answer.text
        for item, shares in zip(answer.json()["data"], wanted, strict=True):
            scores = {score["label"]: score["score"] for score in item["scores"]}
            torch.testing.assert_close(torch.tensor([scores[label] for label in LABELS]), shares, atol=1e-5, rtol=0)
            assert item["label"] == LABELS[int(shares.argmax())] == item["scores"][0]["label"]
            assert list(scores.values()) == sorted(scores.values(), reverse=True)
            assert sum(scores.values()) == pytest.approx(1, abs=1e-4)


def test_classification_of_uploaded_files(client: httpx.Client, files: list[Path]) -> None:
    wanted = client.post(CLASSIFICATIONS, json={"pictures": [url_of(file) for file in files], "labels": LABELS}).json()
    uploads = [("pictures", (file.name, file.read_bytes())) for file in files]
    answer = client.post(CLASSIFICATIONS, files=uploads, data={"labels": LABELS})
    assert answer.status_code == 200, answer.text
    for uploaded, sent, file in zip(answer.json()["data"], wanted["data"], files, strict=True):
        assert uploaded == sent | {"name": file.name}


@pytest.mark.parametrize(
    ("fields", "status", "message", "param"),
    [
        ({"labels": ["one"]}, 400, "at least 2", "labels"),
        ({"labels": ["a", "a"]}, 400, "more than once", None),
        ({"labels": ["a", " "]}, 400, "pattern", "labels.1"),
        ({"labels": [f"l{number}" for number in range(1_025)]}, 400, "at most 1024", "labels"),
        ({"labels": ["a", "word " * 39]}, 400, "the text tower reads", "labels.1"),
        ({"templates": ["no place"]}, 400, "pattern", "templates.0"),
        ({"templates": []}, 400, "at least 1", "templates"),
        ({"pictures": []}, 400, "at least 1", "pictures"),
        ({"pictures": ["x", data_url(b"hello")]}, 400, "data URLs", "pictures.0"),
        ({"model": "other"}, 404, "does not exist", "model"),
        ({"style": "short"}, 400, "Unrecognized", "style"),
    ],
)
def test_bad_requests_for_classifications(
    fields: dict[str, Any], status: int, message: str, param: str | None, client: httpx.Client
) -> None:
    small = encode_data_url(Image.new("RGB", (20, 20), "red"))
    body = {"pictures": [small], "labels": ["red", "blue"]} | fields
    assert_refused(client.post(CLASSIFICATIONS, json=body), status, message, param)


def test_a_model_without_a_text_tower_says_so(tiny_model: Path) -> None:
    nobody = RemoteEngine(f"http://127.0.0.1:{free_port()}")
    small = encode_data_url(Image.new("RGB", (20, 20), "red"))
    with gateway_client(nobody, read_model_folder(tiny_model)) as client:
        answer = client.post(EMBEDDINGS, json={"model": MODEL_NAME, "input": "a dog"})
        assert_refused(answer, 404, f"{MODEL_NAME} has no text tower")
        assert answer.json()["error"]["code"] == "no_embedder"
        body = {"pictures": [small], "labels": ["red", "blue"]}
        assert_refused(client.post(CLASSIFICATIONS, json=body), 404, "no text tower")


def test_other_requests_go_on_while_it_embeds(client: httpx.Client) -> None:
    """The embedder has a thread of its own: 64 pictures are still being looked at when other answers are there."""
    buffer = io.BytesIO()
    Image.effect_noise((1200, 900), 80).convert("RGB").save(buffer, "PNG", compress_level=1)
    body = request([data_url(buffer.getvalue())] * 8 + ["a dog"] * 240)
    with ThreadPoolExecutor(1) as pool:
        embedding = pool.submit(client.post, EMBEDDINGS, json=body)
        answered = 0
        while not embedding.done():
            answered += client.get("/v1/models").status_code == 200
    assert embedding.result().status_code == 200
    assert answered > 3
