"""Adapters that peft saved for llava-hf's checkpoints load with the logits they had, or are refused with the reason."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from assistant.adapter_files import load_adapted, merge_adapter, unproven_base, why_only_merged
from assistant.checkpoint import load_llava
from assistant.models import ModelError
from assistant.projectors import Llava
from tests.tiny import make_tiny_joined, make_tiny_language_model

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
LANGUAGE = r".*language_model.*\.(q_proj|down_proj)"  # a regex as people write it, right in every layout


@dataclass(frozen=True)
class Case:
    """How an adapter was made, what transformers 4 would have called its modules, and why vLLM needs it merged."""

    made: dict[str, Any]
    old_targets: str | list[str] | None = None  # the same as now where None
    only_merged: str | None = None


FULL = r"model\.language_model\.layers\.\d+\.mlp\.\w+_proj"
FULL_BEFORE = r"language_model\.model\.layers\.\d+\.mlp\.\w+_proj"
PATTERNS = {"rank_pattern": {r"layers\.0\.self_attn\.q_proj": 8}, "alpha_pattern": {"down_proj": 40}}
CASES = {
    "suffixes, the tower's too": Case({"target_modules": ["q_proj", "v_proj"]}, None, "vision_tower"),
    "a regex": Case({"target_modules": LANGUAGE}),
    "a regex of whole paths": Case({"target_modules": FULL}, FULL_BEFORE),
    "ranks and alphas of their own": Case({"target_modules": LANGUAGE, "use_rslora": True, **PATTERNS}),
    "one layer": Case({"target_modules": ["up_proj", "gate_proj"], "layers_to_transform": [1]}),
    "a projector trained whole": Case(
        {"target_modules": LANGUAGE, "modules_to_save": ["multi_modal_projector"]}, None, "trained whole"
    ),
    "DoRA": Case({"target_modules": LANGUAGE, "use_dora": True}, None, "DoRA"),
    "a high rank": Case({"target_modules": LANGUAGE, "r": 520}, None, "its rank is 520"),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaVA with a CLIP tower in the layout of llava-hf/llava-1.5."""
    folder = tmp_path_factory.mktemp("llava")
    make_tiny_joined("clip", folder)
    return folder


def logits(model: Llava | PeftModel) -> Tensor:
    """(T, V) behind a picture and some words."""
    generator = torch.Generator().manual_seed(3)
    picture = model.config.image_token_index
    ids = torch.tensor([[1, *[picture] * 100, 30, 40, 50, 60]])
    with torch.no_grad():
        return model.eval()(input_ids=ids, pixel_values=torch.randn(1, 3, 160, 160, generator=generator)).logits[0]


def saved_by_peft(base: Path, folder: Path, **made: Any) -> Tensor:
    """Save what peft makes so, all of it random, and give its logits."""
    torch.manual_seed(1)
    model, _ = load_llava(base)
    adapted = PeftModel(model, LoraConfig(**{"r": 4, "lora_alpha": 8, "init_lora_weights": False} | made))
    for name, parameter in adapted.named_parameters():
        if "modules_to_save" in name or "magnitude" in name:
            parameter.data += 0.1 * torch.rand_like(parameter)
    adapted.save_pretrained(str(folder))
    return logits(adapted)


def as_transformers_4_named_it(folder: Path, targets: str | list[str] | None) -> None:
    """Rewrite an adapter with the names that llava-hf's checkpoints and transformers before 4.52 have."""
    renamed = {}
    for key, value in load_file(folder / WEIGHTS).items():
        key = key.replace("base_model.model.model.language_model.", "base_model.model.language_model.model.")
        key = key.replace("base_model.model.model.vision_tower.", "base_model.model.vision_tower.vision_model.")
        renamed[key.replace("base_model.model.model.multi_modal", "base_model.model.multi_modal")] = value
    save_file(renamed, folder / WEIGHTS, metadata={"format": "pt"})
    if targets is not None:
        change(folder, target_modules=targets)


def change(folder: Path, **fields: Any) -> None:
    """Write other settings into an adapter's configuration."""
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | fields))


@pytest.mark.parametrize("layout", ["transformers 5", "transformers 4"])
@pytest.mark.parametrize("name", CASES)
def test_others_adapters_load_and_merge_to_the_logits_they_had(
    name: str, layout: str, base: Path, tmp_path: Path
) -> None:
    case = CASES[name]
    expected = saved_by_peft(base, tmp_path / "theirs", **case.made)
    assert (logits(load_llava(base)[0]) - expected).abs().max() > 0.1  # or nothing was adapted
    if layout == "transformers 4":
        as_transformers_4_named_it(tmp_path / "theirs", case.old_targets)
    adapted, _ = load_adapted(tmp_path / "theirs", base)
    torch.testing.assert_close(logits(adapted), expected, rtol=1e-4, atol=1e-4)
    reason = why_only_merged(adapted)
    assert (reason is None) == (case.only_merged is None)
    assert (case.only_merged or "") in (reason or "")
    merge_adapter(tmp_path / "theirs", tmp_path / "merged", base)
    torch.testing.assert_close(logits(load_llava(tmp_path / "merged")[0]), expected, rtol=1e-3, atol=1e-3)


def test_nobody_knows_by_hash_which_base_it_was(base: Path, tmp_path: Path) -> None:
    saved_by_peft(base, tmp_path, target_modules=LANGUAGE)
    change(tmp_path, base_model_name_or_path="llava-hf/llava-1.5-7b-hf")
    assert "by name it is llava-hf/llava-1.5-7b-hf" in str(unproven_base(tmp_path))


def drop_one(folder: Path) -> None:
    own = load_file(folder / WEIGHTS)
    save_file(dict(sorted(own.items())[2:]), folder / WEIGHTS, metadata={"format": "pt"})


def drop_a_half(folder: Path) -> None:
    own = load_file(folder / WEIGHTS)
    save_file(dict(sorted(own.items())[1:]), folder / WEIGHTS, metadata={"format": "pt"})


def add_embeddings(folder: Path) -> None:
    own = load_file(folder / WEIGHTS)
    own["base_model.model.model.language_model.embed_tokens.weight"] = torch.zeros(700, 64)
    save_file(own, folder / WEIGHTS, metadata={"format": "pt"})


def of_another_family(folder: Path) -> None:
    own = load_file(folder / WEIGHTS)
    renamed = {re.sub(r"model\.language_model\.layers\.(\d+)", r"transformer.h.\1", k): v for k, v in own.items()}
    save_file(renamed, folder / WEIGHTS, metadata={"format": "pt"})


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "a module is gone": (drop_one, r"incomplete or of another model: 3 modules in its weights, 4 by target_modules"),
    "half a module is gone": (drop_a_half, r"incomplete or of another model: .*lora_A"),
    "embeddings of another size": (add_embeddings, r"embed_tokens\.weight, which is no LoRA, is not named in mod"),
    "another family": (of_another_family, r"hits no module of this base: it stands on transformer\.h\.0"),
    "pickled": (pickled, r"pickled \(adapter_model\.bin\), which may run code; save it again"),
    "cut": (lambda folder: (folder / WEIGHTS).write_bytes(b"\x01" * 100), "damaged"),
    "gone": (lambda folder: (folder / WEIGHTS).unlink(), r"there is no adapter_model\.safetensors"),
    "prefix tuning": (lambda folder: change(folder, peft_type="PREFIX_TUNING"), "of the kind PREFIX_TUNING, and LoRA"),
    "PiSSA": (lambda folder: change(folder, init_lora_weights="pissa_niter_4"), "began by changing the base"),
    "biases": (lambda folder: change(folder, bias="lora_only"), "biases of the base"),
    "single words": (lambda folder: change(folder, trainable_token_indices=[1, 2]), "single rows of the word embed"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_read_is_refused_with_the_reason(what: str, base: Path, tmp_path: Path) -> None:
    spoil, reason = REFUSED[what]
    saved_by_peft(base, tmp_path / "theirs", target_modules=LANGUAGE)
    spoil(tmp_path / "theirs")
    with pytest.raises(ModelError, match=reason):
        load_adapted(tmp_path / "theirs", base)
    with pytest.raises(ModelError, match=reason):
        merge_adapter(tmp_path / "theirs", tmp_path / "merged", base)
    assert not (tmp_path / "merged").exists()


def test_another_base_is_refused_where_there_is_no_hash(base: Path, tmp_path: Path) -> None:
    """A language model's own adapter, which knows no layers inside a LLaVA, and one for a base of another width."""
    own = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    words = PeftModel(make_tiny_language_model(load_llava(base)[1].tokenizer), own)
    words.save_pretrained(str(tmp_path / "words"))
    with pytest.raises(
        ModelError, match=r"hits no module of this base: it stands on model\.layers\.0\.self_attn\.q_proj"
    ):
        load_adapted(tmp_path / "words", base)
    saved_by_peft(base, tmp_path / "theirs", target_modules=LANGUAGE)
    weights = load_file(tmp_path / "theirs" / WEIGHTS)
    narrow = {key: value[:, :32].contiguous() if ".lora_A." in key else value for key, value in weights.items()}
    save_file(narrow, tmp_path / "theirs" / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"does not load onto its base: .*size mismatch"):
        load_adapted(tmp_path / "theirs", base)


def test_an_adapter_that_names_no_base_says_so(base: Path, tmp_path: Path) -> None:
    saved_by_peft(base, tmp_path, target_modules=LANGUAGE)
    change(tmp_path, base_model_name_or_path=None)
    with pytest.raises(ModelError, match="does not name the base it was trained on; name it with --base"):
        load_adapted(tmp_path)
    change(tmp_path, base_model_name_or_path=str(tmp_path / "nowhere"))
    with pytest.raises(ModelError, match="there is no folder"):
        load_adapted(tmp_path)
