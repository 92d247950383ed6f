"""What form an answer may be asked to take: JSON, a regular expression, one of some choices, or a grammar."""

import json
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from serving.protocols.common import Part, Text, writable

# The engine compiles the form before it answers. In xgrammar 0.2.8, which vLLM does it with, none within these bounds
# took more than 0.3 s or 10 MB: counts up to a million in each other, 300 properties, a grammar of 1,000 alternatives.
MOST_SCHEMA_LETTERS = 16_384
MOST_SCHEMA_DEPTH = 32
MOST_PATTERN = 1_000
MOST_GRAMMAR = 8_000


def compilable(schema: dict[str, Any]) -> dict[str, Any]:
    """The JSON schema itself. Raises ValueError where it is too large or too deep, or cannot be passed on."""
    if len(writable(json.dumps(schema, ensure_ascii=False))) > MOST_SCHEMA_LETTERS:
        raise ValueError(f"the JSON schema is longer than {MOST_SCHEMA_LETTERS:,} letters")
    level: list[Any] = [schema]
    for _ in range(MOST_SCHEMA_DEPTH):
        inner = (each.values() if isinstance(each, dict) else each for each in level if isinstance(each, dict | list))
        level = [each for values in inner for each in values]
    if level:
        raise ValueError(f"the JSON schema is nested deeper than {MOST_SCHEMA_DEPTH}")
    return schema


Schema = Annotated[dict[str, Any], AfterValidator(compilable), Field(description="A JSON schema.")]
Pattern = Annotated[Text, Field(min_length=1, max_length=MOST_PATTERN)]
Grammar = Annotated[
    Text, Field(min_length=1, max_length=MOST_GRAMMAR, pattern=r"\S", description="In GBNF, as xgrammar reads it.")
]
Choice = Annotated[Text, Field(min_length=1, max_length=1_000)]


class TextFormat(Part):
    type: Literal["text"]


class JsonObjectFormat(Part):
    type: Literal["json_object"]


class NamedSchema(Part):
    name: Annotated[Text, Field(min_length=1, max_length=64)]
    description: Text | None = None
    json_schema: Schema = Field(alias="schema")
    strict: bool | None = None


class JsonSchemaFormat(Part):
    type: Literal["json_schema"]
    json_schema: NamedSchema


ResponseFormat = Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")]


class StructuredOutputs(Part):
    """vLLM's own way to ask for a form: exactly one of these."""

    json_schema: Schema | None = Field(default=None, alias="json")
    json_object: Literal[True] | None = None
    regex: Pattern | None = None
    choice: Annotated[list[Choice], Field(min_length=1, max_length=256)] | None = None
    grammar: Grammar | None = None

    @model_validator(mode="after")
    def check(self) -> "StructuredOutputs":
        given = [name for name in type(self).model_fields if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError("give exactly one of json, json_object, regex, choice and grammar")
        return self
