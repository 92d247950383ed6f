"""vLLM serves a LLaVA with a CLIP and with a DINOv2 tower: its answers equal transformers', token by token."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from transformers import AutoModelForImageTextToText, AutoProcessor

from serving.engine import LocalEngine
from tests.conftest import SECONDS_TO_START, gateway_client
from tests.test_serving_parity import MODEL_NAME, QUESTIONS, TOLERANCE, Answer, ask_gateway, ask_transformers, prompts
from tests.tiny import TowerFamily, make_tiny_joined

pytestmark = pytest.mark.slow

# DINOv2 is served by vLLM's transformers backend, CLIP by vLLM's own LLaVA; SigLIP's has a test for every change.
FAMILIES: tuple[TowerFamily, ...] = ("clip", "dinov2")


@dataclass(frozen=True)
class Answers:
    """Greedy answers to `prompts()`, by vLLM through the gateway and by transformers."""

    served: list[Answer]
    reference: list[Answer]


@pytest.fixture(scope="module", params=FAMILIES)
def answers(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Answers]:
    folder: Path = tmp_path_factory.mktemp("joined")
    make_tiny_joined(request.param, folder)
    with LocalEngine(folder, MODEL_NAME, dtype="float32") as engine:
        engine.wait_until_ready(SECONDS_TO_START)
        with gateway_client(engine, engine.facts, MODEL_NAME) as client:
            served = [ask_gateway(client, prompt) for prompt in prompts()]
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    processor = AutoProcessor.from_pretrained(folder)
    yield Answers(served, [ask_transformers(model, processor, prompt) for prompt in prompts()])


def test_the_prompt_and_the_answer_are_equal_token_by_token(answers: Answers) -> None:
    for prompt, served, reference in zip(prompts(), answers.served, answers.reference, strict=True):
        assert served.prompt_ids == reference.prompt_ids, prompt
        assert served.ids == reference.ids, prompt


def test_log_probabilities_agree(answers: Answers) -> None:
    """Of every answered token and of the five likeliest at its place."""
    for prompt, served, reference in zip(prompts(), answers.served, answers.reference, strict=True):
        assert served.logprobs == pytest.approx(reference.logprobs, abs=TOLERANCE["float32"]), prompt
        for these, those in zip(served.likeliest, reference.likeliest, strict=True):
            assert these == pytest.approx(those, abs=TOLERANCE["float32"]), prompt


def test_answers_depend_on_the_picture(answers: Answers) -> None:
    """Or all of the above would prove nothing about the tower."""
    for number in range(0, 3 * len(QUESTIONS), 3):
        without, one, two = (answer.logprobs for answer in answers.served[number : number + 3])
        assert without != one != two
