"""Quantised exports have the layouts that their readers want, and answer nearly as the original does."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForImageTextToText

from assistant.answering import Assistant, Request
from assistant.checkpoint import load_llava
from assistant.exporting import Format, export_model
from assistant.integer_weights import rounded_to_integers
from assistant.log_probabilities import read
from assistant.models import ModelError
from serving.model_folder import read_model_folder
from tests.tiny import make_tiny_llava
from training.check_questions import scene_requests

QUANTISED: tuple[Format, ...] = ("int8", "bitsandbytes-4bit", "bitsandbytes-8bit")
LAYER = "language_model.model.layers.0.self_attn.q_proj"
SEVEN = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llava(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def exported(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[Format, Path]:
    """The tiny model in every quantised form."""
    folders = {form: tmp_path_factory.mktemp(form) for form in QUANTISED}
    for form, folder in folders.items():
        export_model(model, "tiny", form, folder)
    return folders


@pytest.fixture(scope="module")
def request_() -> Request:
    return scene_requests(1)[0]


def original_weights(model: Path) -> dict[str, Tensor]:
    return {key: value.bfloat16() for key, value in load_file(model / "model.safetensors").items()}


def test_int8_has_compressed_tensors_keys(exported: dict[Format, Path], model: Path) -> None:
    """Beside each matrix of the language model a scale for each row; all else as it was, in bfloat16."""
    weights, before = load_file(exported["int8"] / "model.safetensors"), original_weights(model)
    matrices = {key for key in before if key.startswith("language_model.") and key.split(".")[-2] in SEVEN}
    assert len(matrices) == 2 * len(SEVEN)
    assert weights.keys() == before.keys() | {key.replace(".weight", ".weight_scale") for key in matrices}
    for key, value in before.items():
        if key not in matrices:
            assert torch.equal(weights[key], value), key
            continue
        scale = weights[key.replace(".weight", ".weight_scale")]
        assert weights[key].dtype is torch.int8 and scale.shape == (len(value), 1)
        half_a_step = scale.float() * 0.51
        assert ((weights[key].float() * scale.float() - value.float()).abs() <= half_a_step).all(), key


def test_compressed_tensors_own_code_reads_int8_as_we_wrote_it(exported: dict[Format, Path]) -> None:
    """The outside witness: transformers and compressed-tensors widen the matrices again, to integer times scale."""
    pytest.importorskip("compressed_tensors")
    weights = load_file(exported["int8"] / "model.safetensors")
    loaded = AutoModelForImageTextToText.from_pretrained(exported["int8"], dtype=torch.bfloat16).eval()
    with torch.no_grad():
        loaded(input_ids=torch.tensor([[1, 5, 9]]))  # widened at the first use
    own = loaded.get_parameter("model.language_model.layers.0.self_attn.q_proj.weight")
    expected = weights[f"{LAYER}.weight"].bfloat16() * weights[f"{LAYER}.weight_scale"]
    torch.testing.assert_close(own, expected)


def test_rounding_to_integers_by_hand() -> None:
    matrix = torch.tensor([[127.0, -63.4, 0.0], [0.0, 0.0, 0.0], [-2.54, 1.29, 0.004]])
    integers, scale = rounded_to_integers(matrix)
    assert integers.tolist() == [[127, -63, 0], [0, 0, 0], [-127, 64, 0]]
    assert scale[0].item() == 1.0 and scale[2].item() == pytest.approx(0.02)


def test_four_bits_have_the_keys_that_vllms_loader_reads(exported: dict[Format, Path]) -> None:
    """As vllm-bnb-plugin 0.0.3 does: it takes bytes (M, 1), and a state by the names behind `.weight.`."""
    weights = load_file(exported["bitsandbytes-4bit"] / "model.safetensors")
    beside = {key.removeprefix(f"{LAYER}.weight.") for key in weights if key.startswith(f"{LAYER}.weight.")}
    assert beside == {"absmax", "quant_map", "nested_absmax", "nested_quant_map", "quant_state.bitsandbytes__nf4"}
    assert weights[f"{LAYER}.weight"].dtype is torch.uint8
    assert weights[f"{LAYER}.weight"].shape == (64 * 64 // 2, 1)
    functional = pytest.importorskip("bitsandbytes.functional")
    state = {key: value for key, value in weights.items() if key.startswith(f"{LAYER}.weight.")}
    read_back = functional.QuantState.from_dict(state, device=torch.device("cpu"))
    assert tuple(read_back.shape) == (64, 64) and read_back.quant_type == "nf4" and read_back.nested


def test_eight_bits_have_the_keys_that_vllms_loader_reads(exported: dict[Format, Path], model: Path) -> None:
    """Rows of integers, and beside them `SCB`, what the largest of each row was."""
    weights = load_file(exported["bitsandbytes-8bit"] / "model.safetensors")
    assert weights[f"{LAYER}.weight"].dtype is torch.int8 and weights[f"{LAYER}.weight"].shape == (64, 64)
    widened = weights[f"{LAYER}.weight"].float() * weights[f"{LAYER}.SCB"][:, None] / 127
    assert (widened - original_weights(model)[f"{LAYER}.weight"].float()).abs().max() < 0.01


def vllm_skips(path: str, skipped: list[str]) -> bool:
    """Whether vllm-bnb-plugin leaves a module as it is: a part of its path, or the beginning, is among `skipped`."""
    parts = path.split(".")
    beginnings = {".".join(parts[: count + 1]) for count in range(len(parts))}
    return any(name in parts for name in skipped) or bool(beginnings & set(skipped))


@pytest.mark.parametrize("form", ["bitsandbytes-4bit", "bitsandbytes-8bit"])
def test_vllm_and_transformers_leave_the_same_modules_as_they_are(form: Format, exported: dict[Format, Path]) -> None:
    """Each by its own names of modules. The tower is not quantised for one and whole for the other."""
    said = json.loads((exported[form] / "config.json").read_text())["quantization_config"]
    assert said["quant_method"] == "bitsandbytes"
    assert (said["load_in_4bit"], said["load_in_8bit"]) == (form.endswith("4bit"), form.endswith("8bit"))
    assert form.endswith("8bit") or (said["bnb_4bit_quant_type"], said["bnb_4bit_quant_storage"]) == ("nf4", "uint8")
    skipped = said["llm_int8_skip_modules"]
    for path in ("vision_tower.vision_model.encoder.layers.0.self_attn.qkv_proj", "multi_modal_projector.linear_1"):
        assert vllm_skips(path, skipped) and vllm_skips(f"model.{path}", skipped)
    assert vllm_skips("language_model.lm_head", skipped)
    assert not vllm_skips("language_model.model.layers.0.self_attn.qkv_proj", skipped)
    weights = load_file(exported[form] / "model.safetensors")
    packed = {key for key, value in weights.items() if value.dtype in (torch.int8, torch.uint8) and value.dim() == 2}
    assert {key.split(".")[0] for key in packed} == {"language_model"}


@pytest.mark.parametrize("form", QUANTISED)
def test_a_quantised_export_is_asked_in_process_and_answers_nearly_as_before(
    form: Format, exported: dict[Format, Path], model: Path, request_: Request
) -> None:
    quantised, original = Assistant.load(exported[form], torch.bfloat16), Assistant.load(model, torch.bfloat16)
    one, other = read(quantised, request_), read(original, request_)
    assert one.ids == other.ids
    furthest = (one.log_probabilities - other.log_probabilities).abs().mean()
    assert 0 < float(furthest) < 0.5
    assert isinstance(quantised.answer_batch([request_], max_new_tokens=4)[0], str)


def test_a_bitsandbytes_export_needs_vllms_plugin_and_says_so(
    exported: dict[Format, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serving.model_folder.find_spec", lambda name: None)
    with pytest.raises(ModelError, match="with vllm-bnb-plugin, which is not installed"):
        read_model_folder(exported["bitsandbytes-4bit"])
    assert read_model_folder(exported["int8"]).read_by_vllm


def test_four_bits_load_as_bitsandbytes_layers(exported: dict[Format, Path]) -> None:
    linear = pytest.importorskip("bitsandbytes.nn").Linear4bit
    loaded, _ = load_llava(exported["bitsandbytes-4bit"], torch.bfloat16)
    packed = {name for name, module in loaded.named_modules() if isinstance(module, linear)}
    assert len(packed) == 2 * len(SEVEN) and all(".language_model.layers." in name for name in packed)
