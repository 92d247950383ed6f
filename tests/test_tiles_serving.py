"""vLLM's own LLaVA-NeXT serves what cuts tiles as transformers answers it: token by token, pictures of every shape."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from serving.engine import LocalEngine
from tests.conftest import SECONDS_TO_START, gateway_client
from tests.test_serving_parity import MODEL_NAME, Answer, Prompt, ask_gateway, ask_transformers, question_about
from tests.test_tiles import make_tiny_tiled
from training.data.scenes import EVALUATION_SEED, make_scene

pytestmark = pytest.mark.slow  # it starts an engine of its own

TOLERANCE = 1e-4  # in float32 only the order of additions differs
SIZES = ((320, 160), (160, 320), (90, 500), (640, 210), (160, 160), (31, 40), (1200, 900))  # width and height


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, of whose pictures two leave room for words."""
    folder = tmp_path_factory.mktemp("tiled")
    make_tiny_tiled("siglip", folder, ((1, 2), (2, 1)))
    return folder / "tiled"


def prompts() -> list[Prompt]:
    """A question about each picture, about two at once, and about none."""
    pictures = [
        make_scene(EVALUATION_SEED + number, 320).image.resize(size, Image.Resampling.BICUBIC)
        for number, size in enumerate(SIZES)
    ]
    asked = [question_about("What is in this picture?", [picture]) for picture in pictures]
    return [
        *asked,
        question_about("Which is larger?", pictures[:2]),
        question_about("Where is it?", pictures[2:4]),
        question_about("Hello", []),
    ]


@pytest.fixture(scope="module")
def served(folder: Path) -> Iterator[list[Answer]]:
    """Greedy answers of vLLM through the gateway, as `kangaroo serve` starts them."""
    with LocalEngine(folder, MODEL_NAME, dtype="float32") as engine:
        assert engine.facts.read_by_vllm
        engine.wait_until_ready(SECONDS_TO_START)
        with gateway_client(engine, engine.facts, MODEL_NAME) as client:
            answers = [ask_gateway(client, prompt) for prompt in prompts()]
    yield answers


@pytest.fixture(scope="module")
def expected(folder: Path) -> list[Answer]:
    """Greedy answers of transformers, with no code of ours."""
    model, processor = AutoModelForImageTextToText.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
    return [ask_transformers(model, processor, prompt) for prompt in prompts()]


def test_vllm_answers_as_transformers(served: list[Answer], expected: list[Answer]) -> None:
    """The same prompt, so as many tokens of each picture; the same answer; and all log-probabilities within 1e-4."""
    apart = [0.0]
    for prompt, one, other in zip(prompts(), served, expected, strict=True):
        assert one.prompt_ids == other.prompt_ids, prompt
        assert one.ids == other.ids, prompt
        steps = zip((one.logprobs, *one.likeliest), (other.logprobs, *other.likeliest), strict=True)
        apart += [abs(a - b) for here, there in steps for a, b in zip(here, there, strict=True)]
    print(f"tiles: log-probabilities lie at most {max(apart):.2g} apart")
    assert max(apart) < TOLERANCE


def test_pictures_take_as_many_tokens_as_their_shape_asks_for(served: list[Answer]) -> None:
    """Or all of the above would prove nothing about tiles; and the answers hang on the pictures."""
    lengths = [len(answer.prompt_ids) for answer in served[: len(SIZES)]]
    assert len(set(lengths)) >= 4
    assert len({tuple(answer.ids) for answer in served}) > len(SIZES) // 2
