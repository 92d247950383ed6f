"""The OpenAPI document of the gateway: every route with its bodies, examples and errors."""

import json
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel

from serving.protocols.captions import AnswersRequest, CaptionsRequest
from serving.protocols.embeddings import ClassificationsRequest
from serving.protocols.errors import ErrorAnswer

REFERENCE = "#/components/schemas/{model}"
KEY_SCHEME = "key"
DESCRIPTION = (
    "Chat about pictures, caption, embed and classify them. Pictures travel as data URLs or uploaded files; no address "
    "is fetched unless the person who runs the server allows it. Every error is OpenAI's error object."
)
# Eight by eight pixels of red.
PICTURE = (
    "data:image/png;base64,"
    "iVBORw0KGgoAAAANSUhEUgAAAAgAAAAICAIAAABLbSncAAAAEUlEQVR42mO4IyKCFTEMLQkAmD9BAeEqE6gAAAAASUVORK5CYII="
)
ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorAnswer, "description": "The request is wrong; the message says where."},
    401: {"model": ErrorAnswer, "description": "The key is missing or unknown."},
    403: {"model": ErrorAnswer, "description": "A page of another origin asked."},
    404: {"model": ErrorAnswer, "description": "No such model, or it cannot do this."},
    408: {"model": ErrorAnswer, "description": "The body came too slowly."},
    413: {"model": ErrorAnswer, "description": "The body or a picture is too large."},
    415: {"model": ErrorAnswer, "description": "Not a picture of a format that is read."},
    429: {"model": ErrorAnswer, "description": "The key's quota is used up; Retry-After says for how long."},
    500: {"model": ErrorAnswer, "description": "The server failed; its log says why."},
    503: {
        "model": ErrorAnswer,
        "description": "The engine is loading, stopped or full; Retry-After says when to come.",
    },
}
EVENT = {
    "type": "object",
    "description": "One event of the stream; `data` holds JSON, or `[DONE]` at the end of a chat.",
    "properties": {"event": {"type": "string"}, "data": {"type": "string"}},
    "required": ["data"],
}
EVENTS: dict[str, Any] = {"text/event-stream": {"schema": EVENT}}
# Read by `serving.bodies`, as JSON or as a form, so that FastAPI does not know of them.
READ_BY_US: dict[str, type[BaseModel]] = {
    "/v1/captions": CaptionsRequest,
    "/v1/answers": AnswersRequest,
    "/v1/classifications": ClassificationsRequest,
}


def describe_api(app: FastAPI, model_name: str, needs_key: bool) -> None:
    """Make `app` serve this document at /openapi.json; it is made once, when first asked for."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = get_openapi(title=app.title, version=app.version, description=DESCRIPTION, routes=app.routes)
            _add_bodies(document)
            _add_examples(document, model_name)
            _correct_errors(document)
            if needs_key:
                document["components"]["securitySchemes"] = {KEY_SCHEME: {"type": "http", "scheme": "bearer"}}
                document["security"] = [{KEY_SCHEME: []}]
                document["paths"]["/health"]["get"]["security"] = []
            app.openapi_schema = document
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]  # as FastAPI's own documentation does it


def _add_bodies(document: dict[str, Any]) -> None:
    """The bodies that come as JSON or as a form with files."""
    schemas = document["components"]["schemas"]
    for path, kind in READ_BY_US.items():
        schema = kind.model_json_schema(ref_template=REFERENCE)
        schemas |= schema.pop("$defs", {})
        schemas[kind.__name__] = schema
        files = schema["properties"]["pictures"] | {"items": {"type": "string", "format": "binary"}}
        form = schema | {"title": f"{kind.__name__}Form", "properties": schema["properties"] | {"pictures": files}}
        document["paths"][path]["post"]["requestBody"] = {
            "required": True,
            "content": {
                "application/json": {"schema": {"$ref": REFERENCE.format(model=kind.__name__)}},
                "multipart/form-data": {"schema": form},
            },
        }


def _add_examples(document: dict[str, Any], model_name: str) -> None:
    for path, examples in (examples_of(model_name) | teaching_examples(model_name)).items():
        (content,) = list(document["paths"][path]["post"]["requestBody"]["content"].values())[:1]
        content["examples"] = {
            title.lower().replace(" ", "_"): {"summary": title, "value": value} for title, value in examples.items()
        }


def _correct_errors(document: dict[str, Any]) -> None:
    """FastAPI writes of a 422 with errors of its own form; ours are 400 with OpenAI's."""
    for operations in document["paths"].values():
        for operation in operations.values():
            operation["responses"].pop("422", None)
    for name in ("HTTPValidationError", "ValidationError"):
        document["components"]["schemas"].pop(name, None)


def examples_of(model_name: str) -> dict[str, dict[str, dict[str, Any]]]:
    """Bodies that are answered as they are, by path and by what they show."""
    shown = {"type": "image_url", "image_url": {"url": PICTURE}}
    asked = [{"role": "user", "content": [shown, {"type": "text", "text": "What colour is this?"}]}]
    chat = {"model": model_name, "messages": asked, "max_tokens": 16}
    colours = {"type": "object", "properties": {"colour": {"enum": ["red", "green", "blue"]}}, "required": ["colour"]}
    schema = {"type": "json_schema", "json_schema": {"name": "colours", "schema": colours}}
    return {
        "/v1/chat/completions": {
            "A question about a picture": chat,
            "Streamed with usage": chat | {"stream": True, "stream_options": {"include_usage": True}},
            "Log-probabilities": chat | {"logprobs": True, "top_logprobs": 3},
            "JSON of a schema": chat | {"response_format": schema, "max_tokens": 64},
            "One of some choices": chat | {"structured_outputs": {"choice": ["red", "green", "blue"]}},
        },
        "/v1/responses": {
            "A text": {"model": model_name, "input": "What can you see?", "max_output_tokens": 16},
            "A picture": {
                "model": model_name,
                "input": [
                    {
                        "role": "user",
                        "content": [
                            {"type": "input_image", "image_url": PICTURE},
                            {"type": "input_text", "text": "What colour is this?"},
                        ],
                    }
                ],
                "max_output_tokens": 16,
            },
        },
        "/v1/captions": {"Alternative texts of two pictures": {"pictures": [PICTURE, PICTURE], "style": "alt_text"}},
        "/v1/answers": {"One question": {"pictures": [PICTURE], "question": "What colour is this?", "max_tokens": 16}},
        "/v1/embeddings": {
            "Two texts": {"model": model_name, "input": ["a red square", "a blue circle"]},
            "A text and a picture": {"model": model_name, "input": ["a red square", PICTURE]},
        },
        "/v1/classifications": {
            "Two labels": {"pictures": [PICTURE], "labels": ["red square", "blue circle"]},
            "Own templates": {
                "pictures": [PICTURE],
                "labels": ["red", "blue"],
                "templates": ["Everything here is {}."],
            },
        },
    }


def teaching_examples(model_name: str) -> dict[str, dict[str, dict[str, Any]]]:
    """A file that can be uploaded as it is, and jobs that name files, which have other ids on each server."""
    shown = {"type": "image_url", "image_url": {"url": PICTURE}}
    asked = {"role": "user", "content": [shown, {"type": "text", "text": "What colour is this?"}]}
    row = json.dumps({"messages": [asked, {"role": "assistant", "content": "Red."}]})
    job = {"model": model_name, "training_file": "file-0123456789abcdef01234567"}
    how = {"n_epochs": 10, "batch_size": 4, "learning_rate_multiplier": 0.5}
    return {
        "/v1/files": {"Two rows with a picture": {"file": f"{row}\n{row}\n", "purpose": "fine-tune"}},
        "/v1/fine_tuning/jobs": {
            "A lesson": job,
            "How often, how fast, and under which name": job
            | {
                "suffix": "colours",
                "seed": 1,
                "method": {"type": "supervised", "supervised": {"hyperparameters": how}},
            },
            "With rows to validate on": job | {"validation_file": job["training_file"], "metadata": {"lesson": "red"}},
        },
    }
