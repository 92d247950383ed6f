"""What is served is what was trained: answers through the gateway equal transformers', token by token."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from assistant.images import encode_data_url, open_picture
from assistant.models import JOEY
from serving.engine import LocalEngine
from serving.vllm_program import BLOCK, Dtype
from tests.conftest import SECONDS_TO_START, gateway_client
from tests.test_gateway import vllm_number
from training.data.scenes import EVALUATION_SEED, make_scene

MODEL_NAME = "parity"
MOST_TOKENS = 24
TOP = 5

# How far two programs may lie apart in the log-probability of a token. In float32 only the order of additions differs.
# In bfloat16 each of some dozens of roundings keeps 8 bits (2^-9 = 0.2 % relative): logits around 10 move by a few
# hundredths each time, and 0.15 is what is left of that at the end.
TOLERANCE: dict[Dtype, float] = {"float32": 2e-3, "bfloat16": 0.15}

QUESTIONS = [
    "What is in this picture?",
    "How many shapes are there?",
    "What colour is the circle?",
    "Describe the picture.",
    "Where is the red square?",
    "Is there a triangle?",
    "Write a caption.",
    "What is on the left?",
]


Turn = tuple[str, list[str | Image.Image]]  # who says it, and texts and pictures in their order


@dataclass(frozen=True)
class Prompt:
    """A conversation whose last turn is a question."""

    turns: list[Turn]

    @property
    def pictures(self) -> list[Image.Image]:
        return [part for _, parts in self.turns for part in parts if isinstance(part, Image.Image)]

    def messages(self, shown: Callable[[Image.Image], dict[str, Any]]) -> list[dict[str, Any]]:
        """As chat takes it, with pictures as `shown` makes them."""
        return [
            {
                "role": role,
                "content": [{"type": "text", "text": part} if isinstance(part, str) else shown(part) for part in parts],
            }
            for role, parts in self.turns
        ]

    def __str__(self) -> str:
        return f"{self.turns[-1][1][-1]} ({len(self.turns)} turns, {len(self.pictures)} pictures)"


def question_about(question: str, pictures: Sequence[Image.Image]) -> Prompt:
    """One turn: the pictures, and a question behind them."""
    return Prompt([("user", [*pictures, question])])


@dataclass(frozen=True)
class Answer:
    """`ids` of the T answered tokens, the log-probability of each, and those of the likeliest tokens at each step."""

    prompt_ids: list[int]
    ids: list[int]
    logprobs: list[float]
    likeliest: list[list[float]]


def prompts() -> list[Prompt]:
    """8 questions with each of 0, 1 and 2 pictures, and 10 conversations with 0 to 4.

    The pictures are scenes that no training has seen, and odd sizes among them.
    """
    scenes = [make_scene(EVALUATION_SEED + number).image for number in range(16)]
    scenes[0] = scenes[0].resize((317, 93))
    scenes[1] = scenes[1].resize((64, 400))
    made = []
    for number, question in enumerate(QUESTIONS):
        for count in (0, 1, 2):
            made.append(question_about(question, scenes[2 * number : 2 * number + count]))
    for number in range(10):
        made.append(conversation(number, scenes[number : number + number % 5]))
    return made


def conversation(number: int, pictures: Sequence[Image.Image]) -> Prompt:
    """Three questions and two answers; the pictures are spread over the questions, other ones for each `number`."""
    asked: list[list[str | Image.Image]] = [[], [], []]
    for place, picture in enumerate(pictures):
        asked[(place + number) % 3].append(picture)
    for turn, parts in enumerate(asked):
        parts.append(QUESTIONS[(number + turn) % len(QUESTIONS)])
    turns: list[Turn] = [("system", ["Answer briefly."])] if number % 2 else []
    for parts, said in zip(asked, ("A red circle and a blue square.", "Two.", None), strict=True):
        turns.append(("user", parts))
        if said is not None:
            turns.append(("assistant", [said]))
    return Prompt(turns)


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> Dtype:
    dtype: Dtype = request.param
    return dtype


@pytest.fixture(scope="module")
def served_answers(dtype: Dtype, request: pytest.FixtureRequest) -> list[Answer]:
    """Greedy answers of vLLM through the gateway."""
    if dtype == "float32":
        return answers_of(request.getfixturevalue("joey_engine"))
    with LocalEngine(JOEY, MODEL_NAME, dtype=dtype) as engine:
        engine.wait_until_ready(SECONDS_TO_START)
        return answers_of(engine)


def answers_of(engine: LocalEngine) -> list[Answer]:
    with gateway_client(engine, engine.facts, engine.model_name) as client:
        return [ask_gateway(client, prompt, engine.model_name) for prompt in prompts()]


def ask_gateway(client: httpx.Client, prompt: Prompt, model_name: str = MODEL_NAME) -> Answer:
    messages = prompt.messages(lambda picture: {"type": "image_url", "image_url": {"url": encode_data_url(picture)}})
    body: dict[str, Any] = {"model": model_name, "messages": messages, "max_tokens": MOST_TOKENS, "temperature": 0}
    body |= {"logprobs": True, "top_logprobs": TOP, "return_token_ids": True}
    answer = client.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    choice = answer.json()["choices"][0]
    steps = choice["logprobs"]["content"]
    return Answer(
        prompt_ids=answer.json()["prompt_token_ids"],
        ids=choice["token_ids"],
        logprobs=[step["logprob"] for step in steps],
        likeliest=[sorted((top["logprob"] for top in step["top_logprobs"]), reverse=True)[:TOP] for step in steps],
    )


@pytest.fixture(scope="module")
def reference_answers(dtype: Dtype) -> list[Answer]:
    """Greedy answers of transformers, in the same arithmetic."""
    reference = AutoModelForImageTextToText.from_pretrained(JOEY, dtype=getattr(torch, dtype)).eval()
    processor = AutoProcessor.from_pretrained(JOEY)
    return [ask_transformers(reference, processor, prompt) for prompt in prompts()]


def ask_transformers(model: Any, processor: Any, prompt: Prompt) -> Answer:
    messages = prompt.messages(lambda picture: {"type": "image"})
    words = processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = processor(images=prompt.pictures or None, text=words, add_special_tokens=False, return_tensors="pt")
    if prompt.pictures:
        inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    with torch.no_grad():
        output = model.generate(
            **inputs,
            max_new_tokens=MOST_TOKENS,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    length = inputs["input_ids"].shape[1]
    ids = output.sequences[0, length:].tolist()
    steps = [logits[0].float().log_softmax(-1) for logits in output.logits]
    return Answer(
        prompt_ids=inputs["input_ids"][0].tolist(),
        ids=ids,
        logprobs=[step[token].item() for step, token in zip(steps, ids, strict=True)],
        likeliest=[step.topk(TOP).values.tolist() for step in steps],
    )


def test_the_prompt_is_the_same_to_the_token(served_answers: list[Answer], reference_answers: list[Answer]) -> None:
    for prompt, served, reference in zip(prompts(), served_answers, reference_answers, strict=True):
        assert served.prompt_ids == reference.prompt_ids, prompt


def test_answers_are_equal_token_by_token(
    served_answers: list[Answer], reference_answers: list[Answer], dtype: Dtype
) -> None:
    """In float32 all of them. In bfloat16 an answer may part where the two likeliest tokens lie within the tolerance:
    there the arithmetic itself is undecided. Three answers of four must still be equal to their ends.
    """
    parted = 0
    for prompt, served, reference in zip(prompts(), served_answers, reference_answers, strict=True):
        step = first_difference(served.ids, reference.ids)
        if step is None:
            continue
        best, second = reference.likeliest[step][:2]
        assert dtype == "bfloat16", f"{prompt}: {served.ids} and {reference.ids} part at {step}"
        assert best - second < TOLERANCE[dtype], f"{prompt}: part at {step}, where the best leads by {best - second}"
        parted += 1
    assert parted <= len(prompts()) // 4


def test_log_probabilities_agree(served_answers: list[Answer], reference_answers: list[Answer], dtype: Dtype) -> None:
    """Of the answered token and of the five likeliest at every step, up to where the answers part if they do."""
    furthest = 0.0
    for served, reference in zip(served_answers, reference_answers, strict=True):
        step = first_difference(served.ids, reference.ids)
        for here, there in zip(served.logprobs[:step], reference.logprobs[:step], strict=True):
            furthest = max(furthest, abs(here - there))
        for these, those in zip(served.likeliest[:step], reference.likeliest[:step], strict=True):
            # Tokens of little probability are nobody's answer, and their logits lie where the roundings are coarsest.
            near = [abs(a - b) for a, b in zip(these, those, strict=True) if max(a, b) > -5]
            furthest = max([furthest, *near])
    print(f"{dtype}: log-probabilities lie at most {furthest:.2g} apart")
    assert furthest < TOLERANCE[dtype]


def test_a_second_question_is_answered_from_what_is_kept_of_the_first(joey_engine: LocalEngine) -> None:
    """What both begin with, the picture above all, is not computed again, and the answer is still transformers'."""
    picture = make_scene(EVALUATION_SEED - 1).image
    first, second = (Prompt([("user", [picture, question])]) for question in QUESTIONS[:2])
    with gateway_client(joey_engine, joey_engine.facts, joey_engine.model_name) as client:
        asked = ask_gateway(client, first, joey_engine.model_name)
        before = vllm_number(joey_engine, "prefix_cache_hits_total")
        served = ask_gateway(client, second, joey_engine.model_name)
    common = first_difference(asked.prompt_ids, served.prompt_ids)
    assert common is not None and common >= 3 * BLOCK
    assert vllm_number(joey_engine, "prefix_cache_hits_total") - before == common // BLOCK * BLOCK
    reference = AutoModelForImageTextToText.from_pretrained(JOEY, dtype=torch.float32).eval()
    right = ask_transformers(reference, AutoProcessor.from_pretrained(JOEY), second)
    assert served.ids == right.ids
    assert served.logprobs == pytest.approx(right.logprobs, abs=TOLERANCE["float32"])


def test_answers_depend_on_the_picture(served_answers: list[Answer]) -> None:
    """Or all of the above would prove nothing about pictures."""
    differ = 0
    for number in range(0, 3 * len(QUESTIONS), 3):
        without, one, two = (answer.logprobs for answer in served_answers[number : number + 3])
        differ += without != one and one != two
    assert differ == len(QUESTIONS)


def first_difference(ours: list[int], theirs: list[int]) -> int | None:
    """The step at which two answers part; None when they are equal."""
    if ours == theirs:
        return None
    shorter = min(len(ours), len(theirs))
    return next((step for step in range(shorter) if ours[step] != theirs[step]), shorter)


def test_a_large_photograph_is_shrunk_alike_for_both(tmp_path: Path) -> None:
    """The gateway and the in-process assistant open pictures with the same function, so both see the same pixels."""
    path = tmp_path / "large.png"
    Image.effect_noise((2500, 500), 60).convert("RGB").save(path)
    opened = open_picture(path)
    assert opened.size == (2048, 410)
    assert open_picture(path.read_bytes()).tobytes() == opened.tobytes()
