"""The whole way of the `openai` client with Joey behind a real vLLM: chat in all forms, models, responses, errors."""

import itertools
import json
import math
import re
from typing import Any, Literal

import httpx
import openai
import pytest
from PIL import Image
from pydantic import BaseModel

from assistant.images import encode_data_url
from assistant.models import JOEY
from training.data.scenes import EVALUATION_SEED, make_scene

SCENES = [encode_data_url(make_scene(EVALUATION_SEED + number).image) for number in range(4)]
QUESTION = "Describe this picture in one sentence."


class Shape(BaseModel):
    """What the model is to fill in."""

    colour: Literal["red", "green", "blue"]
    count: Literal[1, 2, 3]


@pytest.fixture(scope="module")
def api(joey_gateway: httpx.Client) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{joey_gateway.base_url}/v1", api_key="none", max_retries=0, timeout=120)


def asked(*pictures: str, text: str = QUESTION) -> list[Any]:
    """One user turn with pictures."""
    parts: list[Any] = [{"type": "image_url", "image_url": {"url": url}} for url in pictures]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def chat(api: openai.OpenAI, messages: list[Any] | None = None, **fields: Any) -> Any:
    """A greedy answer, unless the fields say otherwise."""
    wanted: dict[str, Any] = {"model": JOEY.name, "temperature": 0, "max_tokens": 32} | fields
    return api.chat.completions.create(messages=messages or asked(SCENES[0]), **wanted)


def text_of(answer: Any) -> str:
    return str(answer.choices[0].message.content)


def ids_of(answer: Any) -> list[int]:
    return list(answer.choices[0].token_ids)


# -- Chat --------------------------------------------------------------------------------------------------------------


def test_a_picture_is_talked_about(api: openai.OpenAI) -> None:
    answer = chat(api)
    assert answer.object == "chat.completion"
    assert answer.model == JOEY.name
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "stop"
    assert len(text_of(answer).split()) > 3
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert text_of(chat(api, asked(SCENES[1]))) != text_of(answer), "both pictures looked alike"


def test_each_further_picture_is_read(api: openai.OpenAI) -> None:
    read = [chat(api, asked(*SCENES[:count]), max_tokens=4).usage.prompt_tokens for count in range(5)]
    steps = {after - before for before, after in itertools.pairwise(read)}
    assert len(steps) == 1
    assert steps.pop() > 1


def test_a_stream_says_the_same_and_counts(api: openai.OpenAI) -> None:
    whole = chat(api)
    chunks = list(chat(api, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == text_of(whole)
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert chunks[-1].usage.prompt_tokens == whole.usage.prompt_tokens
    assert all(chunk.usage is None for chunk in chat(api, stream=True))
    growing = [
        chunk.usage.completion_tokens
        for chunk in chat(api, stream=True, stream_options={"include_usage": True, "continuous_usage_stats": True})
    ]
    assert growing == sorted(growing)
    assert growing[-1] == whole.usage.completion_tokens


def test_log_probabilities_are_of_the_likeliest_tokens(api: openai.OpenAI) -> None:
    answer = chat(api, logprobs=True, top_logprobs=5)
    steps = answer.choices[0].logprobs.content
    assert len(steps) == answer.usage.completion_tokens
    for step in steps:
        ordered = [top.logprob for top in step.top_logprobs]
        assert len(ordered) == 5
        assert ordered == sorted(ordered, reverse=True)
        assert step.logprob == ordered[0]
        assert sum(map(math.exp, ordered)) <= 1 + 1e-3
    streamed = [
        step
        for chunk in chat(api, logprobs=True, top_logprobs=5, stream=True)
        for step in (chunk.choices[0].logprobs.content if chunk.choices[0].logprobs else [])
    ]
    assert [step.token for step in streamed] == [step.token for step in steps]


def test_several_answers_and_seeds(api: openai.OpenAI) -> None:
    def answers(seed: int) -> list[str]:
        given = chat(api, n=4, temperature=1.5, seed=seed)
        assert [choice.index for choice in given.choices] == [0, 1, 2, 3]
        return [choice.message.content for choice in given.choices]

    assert len(set(answers(1))) > 1
    assert answers(1) == answers(1)
    assert answers(1) != answers(2)


def test_tokens_are_pushed_aside_awaited_and_stopped_at(api: openai.OpenAI) -> None:
    tell_ids = {"return_token_ids": True}
    usual = ids_of(chat(api, extra_body=tell_ids))
    first = str(usual[0])
    assert ids_of(chat(api, logit_bias={first: -100}, extra_body=tell_ids))[0] != usual[0]
    pushed = str(usual[2])
    assert ids_of(chat(api, logit_bias={pushed: 100}, max_tokens=3, extra_body=tell_ids)) == [usual[2]] * 3
    place = next(place for place in (3, 2, 1) if usual[place] not in usual[:place])
    stopped = chat(api, extra_body=tell_ids | {"stop_token_ids": [usual[place]]})
    assert ids_of(stopped)[:place] == usual[:place]
    assert stopped.choices[0].finish_reason == "stop"
    assert stopped.usage.completion_tokens == place + 1
    assert chat(api, extra_body={"min_tokens": 30}).usage.completion_tokens >= 30
    allowed = [usual[0], usual[1]]
    only = ids_of(chat(api, max_tokens=6, extra_body=tell_ids | {"allowed_token_ids": allowed}))
    assert set(only) <= set(allowed)


def test_a_stop_word_ends_the_answer(api: openai.OpenAI) -> None:
    whole = text_of(chat(api))
    word = whole.split()[2]
    assert text_of(chat(api, stop=[word])) == whole[: whole.index(word)]
    kept = chat(api, stop=[word], extra_body={"include_stop_str_in_output": True})
    assert text_of(kept) == whole[: whole.index(word) + len(word)]


# -- Answers in a form -------------------------------------------------------------------------------------------------


def test_json_of_a_schema(api: openai.OpenAI) -> None:
    answer = api.chat.completions.parse(
        model=JOEY.name, messages=asked(SCENES[0]), response_format=Shape, temperature=0, max_tokens=64
    )
    assert isinstance(answer.choices[0].message.parsed, Shape)
    schema = Shape.model_json_schema()
    given = chat(api, max_tokens=64, extra_body={"structured_outputs": {"json": schema}})
    Shape.model_validate_json(text_of(given))


def test_any_json_object(api: openai.OpenAI) -> None:
    answer = chat(api, max_tokens=200, response_format={"type": "json_object"})
    if answer.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(text_of(answer)), dict)
    assert text_of(answer).lstrip().startswith("{")


@pytest.mark.parametrize("pattern", [r"(red|green|blue) (circle|square)", r"\d{3}-\d{4}"])
def test_a_regular_expression(pattern: str, api: openai.OpenAI) -> None:
    answer = chat(api, extra_body={"structured_outputs": {"regex": pattern}})
    assert re.fullmatch(pattern, text_of(answer))


def test_one_of_some_choices_and_a_grammar(api: openai.OpenAI) -> None:
    choices = ["a kangaroo", "a wombat", "a platypus"]
    for temperature in (0, 2):
        answer = chat(api, temperature=temperature, extra_body={"structured_outputs": {"choice": choices}})
        assert text_of(answer) in choices
    grammar = 'root ::= "there are " number " shapes"\nnumber ::= [1-9] [0-9]?'
    answer = chat(api, extra_body={"structured_outputs": {"grammar": grammar}})
    assert re.fullmatch(r"there are [1-9]\d? shapes", text_of(answer))


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nonsense"}}}},
        {"structured_outputs": {"regex": "(("}},
        {"structured_outputs": {"grammar": "root ::= nothing"}},
        {"structured_outputs": {"grammar": "this is no grammar"}},
        {"structured_outputs": {"grammar": "root ::= root"}},
        {"structured_outputs": {"regex": r"[^\s\S]"}},
        {"structured_outputs": {"json": {"type": "string", "minLength": -2}}},
        {"structured_outputs": {"json": {"$ref": "#"}}},
        {"structured_outputs": {"json": {"type": "string", "pattern": r"[^\s\S]"}}},
        {"structured_outputs": {"json": {"type": "array", "uniqueItems": True}}},
    ],
)
def test_a_form_that_is_none_is_refused_and_the_next_request_answered(fields: Any, api: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError):
        chat(api, extra_body=fields)
    assert text_of(chat(api, max_tokens=4))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"structured_outputs": {"regex": "a" * 1_001}}, "at most 1000"),
        ({"structured_outputs": {"choice": ["a"] * 257}}, "at most 256"),
        ({"structured_outputs": {"choice": []}}, "at least 1"),
        ({"structured_outputs": {"grammar": "x" * 8_001}}, "at most 8000"),
        ({"structured_outputs": {}}, "exactly one"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "exactly one"),
        ({"structured_outputs": {"json": {"description": "x" * 17_000}}}, "longer than 16,384"),
        ({"structured_outputs": {"json": {"a": json.loads("[" * 40 + "]" * 40)}}}, "nested"),
        ({"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}}, "not both"),
        ({"response_format": {"type": "yaml"}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "Field required"),
    ],
)
def test_forms_are_bounded(fields: Any, message: str, api: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match=message):
        chat(api, extra_body=fields)


# -- What is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message", "param"),
    [
        ({"continue_final_message": True, "add_generation_prompt": False}, "Unrecognized", None),
        ({"echo": True}, "Unrecognized", "echo"),
        ({"chat_template_kwargs": {"a": 1}}, "Unrecognized", "chat_template_kwargs"),
        ({"use_beam_search": True}, "Unrecognized", "use_beam_search"),
        ({"truncate_prompt_tokens": 5}, "Unrecognized", "truncate_prompt_tokens"),
        ({"documents": [{"a": "b"}]}, "Unrecognized", "documents"),
        ({"vllm_xargs": {"a": "b"}}, "Unrecognized", "vllm_xargs"),
        ({"priority": -1}, "Unrecognized", "priority"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "calls no tools", "tools"),
        ({"tool_choice": "required"}, "'none' or 'auto'", "tool_choice"),
        ({"logit_bias": {"a": 1}}, "pattern", None),
        ({"logit_bias": {"1": 101}}, "less than or equal to 100", None),
        ({"logit_bias": {str(number): 1 for number in range(301)}}, "at most 300", "logit_bias"),
        ({"logit_bias": {"999999999": 1}}, ".", None),
        ({"stop_token_ids": [1] * 65}, "at most 64", "stop_token_ids"),
        ({"stop_token_ids": [10**6]}, "out-of-vocab", None),
        ({"stop_token_ids": [-1]}, "greater than or equal to 0", "stop_token_ids.0"),
        ({"allowed_token_ids": []}, "at least 1", "allowed_token_ids"),
        ({"allowed_token_ids": [10**9]}, ".", None),
        ({"allowed_token_ids": [5], "response_format": {"type": "json_object"}}, "do not go with", None),
        ({"allowed_token_ids": [5], "structured_outputs": {"regex": "a"}}, "do not go with", None),
        ({"min_tokens": 33}, "larger than max_tokens", None),
        ({"min_tokens": -1}, "greater than or equal to 0", "min_tokens"),
    ],
)
def test_what_the_client_is_told_of_bad_fields(
    fields: dict[str, Any], message: str, param: str | None, api: openai.OpenAI
) -> None:
    with pytest.raises(openai.BadRequestError, match=message) as caught:
        chat(api, extra_body=fields)
    assert caught.value.type == "invalid_request_error"
    assert param is None or caught.value.param == param


def test_fields_that_change_nothing_are_taken(api: openai.OpenAI) -> None:
    usual = text_of(chat(api))
    fields = {"user": "me", "metadata": {"a": "b"}, "store": False, "service_tier": "auto", "tools": []}
    more = {"safety_identifier": "x", "prompt_cache_key": "y", "parallel_tool_calls": True, "modalities": ["text"]}
    assert text_of(chat(api, extra_body=fields | more)) == usual


# -- Models and errors -------------------------------------------------------------------------------------------------


def test_the_model_is_listed_and_found(api: openai.OpenAI) -> None:
    assert [model.id for model in api.models.list()] == [JOEY.name]
    assert api.models.retrieve(JOEY.name).owned_by == "kangaroo"
    with pytest.raises(openai.NotFoundError) as caught:
        api.models.retrieve("gpt-4o")
    assert caught.value.code == "model_not_found"


def test_errors_are_the_client_s_own_kinds(api: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="does not exist") as missing:
        chat(api, model="gpt-4o")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.APIStatusError, match="Use PNG") as broken:
        chat(api, asked("data:image/png;base64,AAAA", text="What?"))
    assert broken.value.status_code == 415
    with pytest.raises(openai.BadRequestError, match=r"context|length|tokens"):
        chat(api, [{"role": "user", "content": "one two three " * 2000}])


def test_embeddings_lie_on_a_sphere(api: openai.OpenAI) -> None:
    answer = api.embeddings.create(model=JOEY.name, input=["a red square", SCENES[0]])
    for item in answer.data:
        assert math.hypot(*item.embedding) == pytest.approx(1, abs=1e-3)


# -- Responses ---------------------------------------------------------------------------------------------------------


def respond(api: openai.OpenAI, given: Any, **fields: Any) -> Any:
    wanted: dict[str, Any] = {"model": JOEY.name, "temperature": 0, "max_output_tokens": 32} | fields
    return api.responses.create(input=given, **wanted)


def turn(*pictures: str, text: str = QUESTION) -> list[Any]:
    parts: list[Any] = [{"type": "input_image", "image_url": url} for url in pictures]
    return [{"role": "user", "content": [*parts, {"type": "input_text", "text": text}]}]


@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_response_says_what_chat_says(count: int, api: openai.OpenAI) -> None:
    said = chat(api, asked(*SCENES[:count]))
    answer = respond(api, turn(*SCENES[:count]) if count else QUESTION)
    assert answer.object == "response"
    assert answer.status == "completed"
    assert answer.output_text == text_of(said)
    assert answer.usage.input_tokens == said.usage.prompt_tokens
    assert answer.usage.output_tokens == said.usage.completion_tokens


def test_a_response_streams_its_events(api: openai.OpenAI) -> None:
    whole = respond(api, turn(SCENES[0]))
    events = list(respond(api, turn(SCENES[0]), stream=True))
    assert events[0].type == "response.created"
    assert events[-1].type == "response.completed"
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == whole.output_text
    assert events[-1].response.output_text == whole.output_text


def test_a_conversation_is_sent_back_whole(api: openai.OpenAI) -> None:
    """Earlier answers come back as the client has them; instructions are the system's turn."""
    first = respond(api, turn(SCENES[0]))
    earlier = [item.model_dump(exclude_none=True) for item in first.output]
    second = [*turn(SCENES[0]), *earlier, *turn(text="What colour is it?")]
    answer = respond(api, second, instructions="Be brief.")
    messages = [
        {"role": "system", "content": "Be brief."},
        *asked(SCENES[0]),
        {"role": "assistant", "content": first.output_text},
        {"role": "user", "content": "What colour is it?"},
    ]
    said = chat(api, messages)
    assert answer.output_text == text_of(said)
    assert answer.usage.input_tokens == said.usage.prompt_tokens


def test_a_response_in_a_form(api: openai.OpenAI) -> None:
    answer = api.responses.parse(
        model=JOEY.name, input=turn(SCENES[0]), text_format=Shape, temperature=0, max_output_tokens=64
    )
    assert isinstance(answer.output_parsed, Shape)


def test_a_typed_picture_token_is_only_text_in_responses(api: openai.OpenAI) -> None:
    typed = respond(api, "a <image> b", max_output_tokens=4)
    apart = respond(api, "a < image> b", max_output_tokens=4)
    assert typed.usage.input_tokens == apart.usage.input_tokens
    halves = [{"type": "input_text", "text": "a <ima"}, {"type": "input_text", "text": "ge> b"}]
    split = respond(api, [{"role": "user", "content": halves}], max_output_tokens=4)
    assert split.usage.input_tokens == apart.usage.input_tokens


@pytest.mark.parametrize(
    ("fields", "message", "param"),
    [
        ({"previous_response_id": "resp_1"}, "keeps no answers", "previous_response_id"),
        ({"background": True}, "keeps no answers", "background"),
        ({"conversation": "conv_1"}, "keeps no answers", "conversation"),
        ({"tools": [{"type": "web_search"}]}, "calls no tools", "tools"),
        ({"input": ""}, "is empty", None),
        ({"input": [{"role": "user", "content": []}]}, "is empty", None),
        ({"input": turn("http://127.0.0.1:1/cat.png")}, "data URLs", None),
        ({"input": turn("file:///etc/passwd")}, "data URLs", None),
        ({"input": turn(*[SCENES[0]] * 9)}, "9 pictures; the limit is 8", "input"),
        (
            {"input": [{"role": "assistant", "content": [{"type": "input_image", "image_url": SCENES[0]}]}]},
            "cannot hold",
            None,
        ),
        ({"input": [{"type": "function_call", "name": "f", "arguments": "", "call_id": "1"}]}, "input.0", None),
        ({"input": [{"role": "user", "content": [{"type": "input_file", "file_id": "1"}]}]}, "input", None),
        ({"previous_input_messages": [{"role": "user"}]}, "Unrecognized", "previous_input_messages"),
        ({"chat_template_kwargs": {"a": 1}}, "Unrecognized", "chat_template_kwargs"),
        ({"max_output_tokens": 10**9}, "tokens in all", "max_output_tokens"),
        ({"temperature": 3}, "less than or equal to 2", "temperature"),
    ],
)
def test_what_responses_refuse(fields: dict[str, Any], message: str, param: str | None, api: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match=message) as caught:
        respond(api, "What is this?", extra_body=fields)
    assert param is None or caught.value.param == param


def test_a_response_refuses_a_bad_picture(api: openai.OpenAI) -> None:
    with pytest.raises(openai.APIStatusError, match="Use PNG") as caught:
        respond(api, turn("data:image/png;base64,aGVsbG8="))
    assert caught.value.status_code == 415


def test_a_stored_response_is_not_there(joey_gateway: httpx.Client, api: openai.OpenAI) -> None:
    """`store` is taken, as every client sends it, and nothing is kept."""
    answer = respond(api, "What is this?", store=True)
    with pytest.raises(openai.NotFoundError):
        api.responses.retrieve(answer.id)


def test_a_small_picture_of_one_colour_gets_an_answer(api: openai.OpenAI) -> None:
    assert text_of(chat(api, asked(encode_data_url(Image.new("RGB", (1, 1), "red")))))
