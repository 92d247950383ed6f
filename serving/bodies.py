"""Read a body that may be JSON, or a form with uploaded files, as one and the same request."""

import base64
from typing import Any, TypeVar, get_args, get_origin

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError
from starlette.datastructures import FormData, UploadFile

from serving.errors import ApiError

MOST_FILES = 64
MOST_FIELDS = 2_000
FIELD_BYTES = 32 * 2**20  # a picture may come as a data URL in a field too; the whole body has its own limit

Body = TypeVar("Body", bound=BaseModel)


async def read_body(request: Request, kind: type[Body], files: str) -> tuple[Body, list[str | None]]:
    """The body of `request` as a `kind`, and the name of each picture in its list `files`, where it has one.

    Files of a form become data URLs in that list, in their order.

    Raises:
        ApiError: the body is neither JSON nor a form.
        RequestValidationError: it is not what `kind` says.
    """
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type == "multipart/form-data":
        async with request.form(max_files=MOST_FILES, max_fields=MOST_FIELDS, max_part_size=FIELD_BYTES) as form:
            values, names = await _form_values(form, kind, files)
        # The fields of a form are all text: "64" is a number there.
        return _validated(kind, values, strict=False), names
    if content_type != "application/json" and not content_type.endswith("+json"):
        raise ApiError(400, "The body must be JSON (Content-Type: application/json) or a form (multipart/form-data).")
    try:
        content = await request.json()
    except (ValueError, RecursionError) as error:
        raise ApiError(400, "The body is not valid JSON.") from error
    body = _validated(kind, content, strict=None)
    return body, [None] * len(getattr(body, files))


async def _form_values(form: FormData, kind: type[BaseModel], files: str) -> tuple[dict[str, Any], list[str | None]]:
    values: dict[str, Any] = {}
    names: list[str | None] = []
    for key, value in form.multi_items():
        if key == files:
            names.append(value.filename if isinstance(value, UploadFile) else None)
        if isinstance(value, UploadFile):
            if key != files:
                raise ApiError(400, f"{key}: files are taken in the field {files} only.", param=key)
            # Of what kind the picture is, its content says.
            value = "data:image/upload;base64," + base64.b64encode(await value.read()).decode("ascii")
        if _is_list(kind, key):
            values.setdefault(key, []).append(value)
        elif key in values:
            raise ApiError(400, f"{key}: given more than once.", param=key)
        else:
            values[key] = value
    return values, names


def _is_list(kind: type[BaseModel], key: str) -> bool:
    field = kind.model_fields.get(key)
    choices = [field.annotation, *get_args(field.annotation)] if field is not None else []
    return any(get_origin(choice) is list for choice in choices)


def _validated(kind: type[Body], content: object, strict: bool | None) -> Body:
    try:
        return kind.model_validate(content, strict=strict)
    except ValidationError as error:
        found = [complaint | {"loc": ("body", *complaint["loc"])} for complaint in error.errors(include_url=False)]
        raise RequestValidationError(found, body=content) from error
