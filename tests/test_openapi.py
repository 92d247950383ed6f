"""The served OpenAPI document: its examples are answered as they are, and schemathesis finds no answer beside it."""

import base64
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from assistant.models import JOEY
from serving.engine import RemoteEngine
from serving.gateway import create_gateway
from serving.model_folder import read_model_folder
from serving.openapi import PICTURE, describe_api, examples_of
from tests.conftest import MODEL_NAME
from tests.test_house import ROOT

ROUTES = {
    "/v1/chat/completions": "post",
    "/v1/responses": "post",
    "/v1/captions": "post",
    "/v1/answers": "post",
    "/v1/embeddings": "post",
    "/v1/classifications": "post",
    "/v1/models": "get",
    "/v1/models/{name}": "get delete",
    "/v1/adapters": "get post",
    "/v1/adapters/{name}": "delete",
    "/v1/files": "post get",
    "/v1/files/{file_id}": "get delete",
    "/v1/files/{file_id}/content": "get",
    "/v1/fine_tuning/jobs": "post get",
    "/v1/fine_tuning/jobs/{job_id}": "get",
    "/v1/fine_tuning/jobs/{job_id}/cancel": "post",
    "/v1/fine_tuning/jobs/{job_id}/events": "get",
    "/v1/fine_tuning/jobs/{job_id}/checkpoints": "get",
    "/health": "get",
    "/ready": "get",
    "/metrics": "get",
}
EXAMPLES = [(path, title) for path, examples in examples_of(JOEY.name).items() for title in examples]
SCHEMATHESIS = Path(sys.executable).with_name("schemathesis")


@pytest.fixture(scope="module")
def document(joey_gateway: httpx.Client) -> dict[str, Any]:
    return dict(joey_gateway.get("/openapi.json").json())


def judged(gateway: httpx.Client, phases: str, examples: int, folder: Path) -> str:
    """What schemathesis says after it sent what the document allows and what it forbids, with all checks but one.

    That one wants everything accepted that the schema allows, and no schema can say what a picture shows, what the
    engine makes of a form, or how long a prompt is for the model.
    """
    words: list[str | Path] = [SCHEMATHESIS, "run", f"{gateway.base_url}/openapi.json", "--phases", phases]
    words += ["--exclude-checks", "positive_data_acceptance", "--max-examples", str(examples), "--mode", "all"]
    words += ["--request-timeout", "120", "--seed", "1", "--generation-deterministic", "--no-color"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "SCHEMATHESIS_HOOKS": "tests.openapi_hooks"}
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said[-6000:]
    return said


def test_no_answer_is_beside_the_document(joey_gateway: httpx.Client, tmp_path: Path) -> None:
    said = judged(joey_gateway, "examples,fuzzing", 6, tmp_path)
    operations = sum(len(methods.split()) for methods in ROUTES.values())
    assert f"{operations} selected / {operations} total" in said


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_no_answer_is_beside_the_document_however_often_one_tries(joey_gateway: httpx.Client, tmp_path: Path) -> None:
    judged(joey_gateway, "examples,coverage,fuzzing", 200, tmp_path)


def test_every_route_is_described(document: dict[str, Any]) -> None:
    described = {path: " ".join(operations) for path, operations in document["paths"].items()}
    assert described == ROUTES
    for path, method in [(path, method) for path, methods in ROUTES.items() for method in methods.split()]:
        operation = document["paths"][path][method]
        assert operation["description"], path
        assert "200" in operation["responses"], path
        assert "422" not in operation["responses"], path
        if method == "post":
            bodies = operation.get("requestBody", {}).get("content", {}).values()
            assert any("examples" in body for body in bodies) == (not path.endswith("/cancel")), path
            error = operation["responses"]["400"]["content"]["application/json"]["schema"]["$ref"]
            assert error == "#/components/schemas/ErrorAnswer"


@pytest.mark.parametrize(("path", "title"), EXAMPLES)
def test_every_example_is_answered(path: str, title: str, document: dict[str, Any], joey_gateway: httpx.Client) -> None:
    content = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]
    (body,) = (example["value"] for example in content["examples"].values() if example["summary"] == title)
    answer = joey_gateway.post(path, json=body)
    assert answer.status_code == 200, answer.text


def test_a_form_as_the_document_says(document: dict[str, Any], joey_gateway: httpx.Client) -> None:
    form = document["paths"]["/v1/captions"]["post"]["requestBody"]["content"]["multipart/form-data"]["schema"]
    assert form["properties"]["pictures"]["items"] == {"type": "string", "format": "binary"}
    content = base64.b64decode(PICTURE.partition(",")[2])
    # A data URL in a field of its own may stand beside uploaded files.
    fields: list[tuple[str, Any]] = [
        ("pictures", ("red.png", content)),
        ("pictures", (None, PICTURE)),
        ("style", (None, "alt_text")),
    ]
    answer = joey_gateway.post("/v1/captions", files=fields)
    assert answer.status_code == 200, answer.text
    uploaded, sent = answer.json()["data"]
    assert uploaded["text"] == sent["text"]
    assert (uploaded["name"], sent["name"]) == ("red.png", None)


@pytest.mark.parametrize("needs_key", [False, True])
def test_the_document_says_whether_a_key_is_needed(needs_key: bool) -> None:
    app = create_gateway(RemoteEngine("http://127.0.0.1:9"), MODEL_NAME, read_model_folder(JOEY))
    describe_api(app, MODEL_NAME, needs_key)
    document = app.openapi()
    assert ("security" in document) == needs_key
    assert ("securitySchemes" in document["components"]) == needs_key
    if needs_key:
        assert document["paths"]["/health"]["get"]["security"] == []
