"""vLLM serves what `kangaroo join` and `kangaroo tune` make: each projector, an adapter on its base, both merged."""

import json
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from peft import LoraConfig, PeftModel
from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor

from assistant.adapter_files import ADAPTER, load_adapted, merge_adapter, save_adapter, why_only_merged
from assistant.adapter_layouts import PREFIX
from assistant.checkpoint import load_llava
from assistant.models import ModelError
from assistant.projectors import Projector
from assistant.towers import ViTShape, new_tower
from serving.engine import LocalEngine
from tests.conftest import SECONDS_TO_START, gateway_client
from tests.test_adapters import trained
from tests.test_serving_parity import MODEL_NAME, QUESTIONS, Answer, ask_gateway, ask_transformers, prompts
from tests.tiny import TowerFamily, make_tiny_language_model, make_tiny_llava, make_tiny_tokenizer
from training.joining import join_models

pytestmark = pytest.mark.slow

# An MLP behind each tower is in test_serving_parity.py and test_tower_serving.py. Of these vLLM's own code reads none:
# its LLaVA knows no linear projector, and pixel-shuffle leaves in Aya Vision's layout.
JOINED: tuple[tuple[TowerFamily, Projector], ...] = (
    ("siglip", "linear"),
    ("siglip", "pixel-shuffle"),
    ("clip", "pixel-shuffle"),
    ("dinov2", "pixel-shuffle"),
)
TAUGHT = "taught"  # what vLLM calls the adapter
TOLERANCE = 3e-4  # in float32 only the order of additions differs: 1.1e-4 at most was seen
LORA_FLAGS = ["--enable-lora", "--max-lora-rank", "16"]


def make_joined(family: TowerFamily, projector: Projector, folder: Path) -> Path:
    """What `kangaroo join` writes of a tower of `family` (100 patches) and a Llama, both tiny and random."""
    torch.manual_seed(0)
    new_tower(ViTShape(family, 64, 3, 2, 16, 160)).save(folder / "tower")
    tokenizer = make_tiny_tokenizer(folder)
    make_tiny_language_model(tokenizer).save_pretrained(folder / "words")
    tokenizer.save_pretrained(folder / "words")
    return join_models(str(folder / "tower"), str(folder / "words"), folder / "joined", projector).folder


def served_answers(model: Path) -> list[Answer]:
    """Greedy answers to `prompts()` through the gateway, as `kangaroo serve` gives them."""
    with LocalEngine(model, MODEL_NAME, dtype="float32") as engine:
        engine.wait_until_ready(SECONDS_TO_START)
        with gateway_client(engine, engine.facts, MODEL_NAME) as client:
            return [ask_gateway(client, prompt) for prompt in prompts()]


def reference_answers(model: Any, processor: Any) -> list[Answer]:
    """Greedy answers to `prompts()` by transformers."""
    return [ask_transformers(model.eval(), processor, prompt) for prompt in prompts()]


def of_base(folder: Path) -> list[Answer]:
    """Greedy answers of transformers alone, from the folder."""
    return reference_answers(AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder))


def assert_equal_token_by_token(what: str, these: Sequence[Answer], those: Sequence[Answer]) -> None:
    """The same prompt, the same tokens, and every log-probability of an answered token and of the likeliest near."""
    apart = []
    for prompt, one, other in zip(prompts(), these, those, strict=True):
        assert one.prompt_ids == other.prompt_ids, prompt
        assert one.ids == other.ids, prompt
        steps = zip((one.logprobs, *one.likeliest), (other.logprobs, *other.likeliest), strict=True)
        apart += [abs(a - b) for here, there in steps for a, b in zip(here, there, strict=True)]
    furthest = max(apart)
    print(f"{what}: log-probabilities lie at most {furthest:.2g} apart")
    assert furthest < TOLERANCE


def differing(these: Sequence[Answer], those: Sequence[Answer]) -> int:
    """How many answers are not the same tokens."""
    return sum(one.ids != other.ids for one, other in zip(these, those, strict=True))


@pytest.mark.parametrize(("family", "projector"), JOINED)
def test_what_join_makes_is_served(family: TowerFamily, projector: Projector, tmp_path: Path) -> None:
    """With no, one and two pictures, and each picture matters."""
    folder = make_joined(family, projector, tmp_path)
    served = served_answers(folder)
    assert_equal_token_by_token(f"{family}, {projector}", served, of_base(folder))
    for number in range(0, 3 * len(QUESTIONS), 3):
        without, one, two = (answer.logprobs for answer in served[number : number + 3])
        assert without != one != two


class AdapterEngine(LocalEngine):
    """A vLLM that takes adapters while it runs."""

    def __init__(self, model_folder: Path) -> None:
        super().__init__(model_folder, MODEL_NAME, dtype="float32")
        self._command += LORA_FLAGS
        self._environment["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "True"

    def client(self, model_name: str = MODEL_NAME) -> httpx.Client:
        """A client of vLLM itself whose every question goes to the base or the adapter of that name."""
        headers = {"Authorization": f"Bearer {self.api_key}"}
        return httpx.Client(base_url=self.base_url, headers=headers, timeout=120, transport=AskingFor(model_name))

    def load(self, name: str, adapter: Path) -> httpx.Response:
        with self.client() as client:
            return client.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": str(adapter)})

    def answers(self, model_name: str = MODEL_NAME) -> list[Answer]:
        with self.client(model_name) as client:
            return [ask_gateway(client, prompt) for prompt in prompts()]


class AskingFor(httpx.HTTPTransport):
    """Writes the name of a model into every question."""

    def __init__(self, model_name: str) -> None:
        super().__init__()
        self.model_name = model_name

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content) | {"model": self.model_name}
        headers = {"Authorization": request.headers["Authorization"]}
        named = httpx.Request(request.method, request.url, headers=headers, json=body, extensions=request.extensions)
        return super().handle_request(named)


@dataclass(frozen=True)
class Taught:
    """A base, and the folder of what a few steps with LoRA made of it: base and adapter merged, the adapter beside."""

    base: Path
    folder: Path

    @property
    def adapter(self) -> Path:
        return self.folder / ADAPTER


@dataclass(frozen=True)
class Running:
    """A running vLLM with the adapter loaded, and what its base answered before."""

    engine: AdapterEngine
    before: list[Answer]


# vLLM's own LLaVA, and its transformers backend: the names of the modules differ, and so does the way keys find them.
@pytest.fixture(scope="module", params=["mlp", "pixel-shuffle"])
def taught(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Taught:
    folder: Path = tmp_path_factory.mktemp("taught")
    base = make_tiny_llava(folder / "base") if request.param == "mlp" else make_joined("siglip", request.param, folder)
    trained("lora", base, steps=6).export(folder / "tuned")
    return Taught(base, folder / "tuned")


@pytest.fixture(scope="module")
def adapted_answers(taught: Taught) -> list[Answer]:
    """Greedy answers of base and adapter by transformers and peft, not merged."""
    return reference_answers(*load_adapted(taught.adapter, taught.base))


@pytest.fixture(scope="module")
def running(taught: Taught) -> Iterator[Running]:
    engine = AdapterEngine(taught.base)
    with engine:
        engine.wait_until_ready(SECONDS_TO_START)
        before = engine.answers()
        loaded = engine.load(TAUGHT, taught.adapter)
        assert loaded.status_code == 200, loaded.text
        yield Running(engine, before)


def test_an_adapter_is_served_as_peft_computes_it(running: Running, adapted_answers: list[Answer]) -> None:
    served = running.engine.answers(TAUGHT)
    assert_equal_token_by_token("adapter", served, adapted_answers)
    assert differing(served, running.before) > len(served) // 2  # or the adapter would say nothing


def test_the_base_answers_as_before_while_an_adapter_is_loaded(running: Running, taught: Taught) -> None:
    assert_equal_token_by_token("base beside an adapter", running.engine.answers(), running.before)
    assert_equal_token_by_token("base", running.before, of_base(taught.base))


def test_base_and_adapter_answer_at_once(running: Running, adapted_answers: list[Answer]) -> None:
    """In the same batches of vLLM, each with its own weights."""
    with ThreadPoolExecutor() as pool:
        base, adapted = pool.map(running.engine.answers, (MODEL_NAME, TAUGHT))
    assert_equal_token_by_token("adapter in mixed batches", adapted, adapted_answers)
    assert_equal_token_by_token("base in mixed batches", base, running.before)


def test_merged_is_served_as_the_adapter_is(taught: Taught, adapted_answers: list[Answer]) -> None:
    """Merging rounds once more than adding does, in float32."""
    assert_equal_token_by_token("merged", served_answers(taught.folder), adapted_answers)


def peft_adapter(part: str, base: Path, folder: Path) -> tuple[PeftModel, Any]:
    """The base with peft's own random LoRA on every linear layer of `part`, saved in `folder`, and the processor."""
    torch.manual_seed(1)
    model, processor = load_llava(base)
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and f".{part}." in name]
    adapted = PeftModel(model, LoraConfig(r=8, lora_alpha=64, target_modules=linear, init_lora_weights=False))
    adapted.save_pretrained(str(folder))
    return adapted, processor


@pytest.mark.parametrize("part", ["vision_tower", "multi_modal_projector"])
def test_vllm_drops_what_an_adapter_holds_for_tower_or_projector(
    part: str, running: Running, taught: Taught, tmp_path: Path
) -> None:
    """Why we refuse such a one: vLLM takes it, says that all is well, and answers as if it held nothing."""
    adapted, processor = peft_adapter(part, taught.base, tmp_path)
    assert differing(reference_answers(adapted, processor), running.before) > 0
    loaded = running.engine.load(f"trap in {part}", tmp_path)
    assert loaded.status_code == 200, loaded.text
    assert_equal_token_by_token(f"{part} by vLLM", running.engine.answers(f"trap in {part}"), running.before)


@pytest.mark.parametrize("part", ["vision_tower", "multi_modal_projector"])
def test_an_adapter_on_tower_or_projector_is_served_merged_and_never_alone(
    part: str, taught: Taught, tmp_path: Path
) -> None:
    """We write none, and say of another's why vLLM must not have it; merged into its base it answers as it should."""
    reason = rf"may stand on the language model's layers alone, and this one holds .*model\.{part}\..*vLLM would drop"
    adapted, processor = peft_adapter(part, taught.base, tmp_path / "peft")
    own = {name.removeprefix(PREFIX): value for name, value in adapted.named_parameters() if ".lora_" in name}
    with pytest.raises(ModelError, match=reason):
        save_adapter(adapted.peft_config["default"], own, taught.base, "base", tmp_path / "ours")
    assert not (tmp_path / "ours").exists()
    expected = reference_answers(adapted, processor)
    loaded, _ = load_adapted(tmp_path / "peft", taught.base)
    assert re.search(reason, why_only_merged(loaded) or "")
    merge_adapter(tmp_path / "peft", tmp_path / "merged", taught.base)
    assert_equal_token_by_token(f"{part}, merged", of_base(tmp_path / "merged"), expected)
