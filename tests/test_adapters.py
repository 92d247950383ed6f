"""Adapters: what they stand on, what trains and what stays, and that they leave as peft and vLLM expect them."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForImageTextToText

from assistant.adapter_files import ADAPTER, BASE, load_adapted, merge_adapter
from assistant.checkpoint import load_llava
from assistant.hashing import weights_hash
from assistant.models import ModelError
from assistant.projectors import Llava
from tests.test_training import lessons
from tests.tiny import make_tiny_llava
from training.adapters import LoraSettings, add_lora, lora_modules
from training.config import InstructStage
from training.instruct_start import build_instruct_objective
from training.objectives.instruct import InstructObjective
from training.trainer import freeze_all_but

SEVEN = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
MODES = ("align", "full", "lora", "lora with projector", "qlora")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llava(tmp_path_factory.mktemp("base"))


def stage_of(mode: str, base: Path) -> InstructStage:
    """The stage that trains so."""
    trains = {
        "align": ["projector"],
        "full": ["projector", "language"],
        "lora with projector": ["projector", "language"],
    }
    said = {
        "kind": "instruct",
        "name": "tune",
        "start_from": str(base),
        "trains": trains.get(mode, ["language"]),
        "longest": 600,
        "packing": False,  # so that the trained model itself can be asked for its logits
        "mixture": [{"scenes": 8, "weight": 1}],
        "held_out": [{"scenes": 8, "weight": 1}],
        "schedule": {"steps": 1, "batch_size": 1, "learning_rate": 1e-3, "bf16": False},
        "lora": {"rank": 4, "alpha": 8} if "lora" in mode else None,
        "four_bits": mode == "qlora",
    }
    return InstructStage.model_validate(said)


def trained(mode: str, base: Path, steps: int = 2) -> InstructObjective:
    """An objective whose declared set was trained for some steps of plain AdamW."""
    if mode == "qlora":
        pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    objective = build_instruct_objective(stage_of(mode, base), lambda name: name)
    freeze_all_but(objective.train(), objective.trained_parameters())
    optimizer = torch.optim.AdamW([p for p in objective.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        objective(**objective.collate(lessons()))["answer_loss"].backward()
        optimizer.step()
    return objective.eval()


def logits(model: Llava | PeftModel, objective: InstructObjective) -> Tensor:
    """(T, V) of the first lesson's first conversation, as transformers computes them."""
    ids = objective.pack(lessons()[1]).ids[None]
    with torch.no_grad():
        return model(input_ids=ids).logits[0]


def test_an_adapter_stands_on_every_named_layer_of_the_language_model_and_nowhere_else(base: Path) -> None:
    model, _ = load_llava(base)
    layers = model.config.text_config.num_hidden_layers
    adapter = add_lora(model, LoraSettings(), base, "tiny")
    assert len(adapter.modules) == layers * len(SEVEN)
    assert all(name.startswith("model.language_model.layers.") for name in adapter.modules)
    injected = {name for name, _ in model.named_parameters() if ".lora_" in name}
    assert injected == adapter.parameters()
    assert "model.language_model.layers.{0..1}.self_attn.q_proj" in adapter.told()


def test_a_name_that_hits_nothing_is_an_error(base: Path) -> None:
    """The tower has `out_proj` and the language model has not: a pattern that hit the tower would be a trap."""
    model, _ = load_llava(base)
    assert set(lora_modules(model, ["q_proj"])) == {
        f"model.language_model.layers.{number}.self_attn.q_proj" for number in range(2)
    }
    with pytest.raises(ModelError, match=r"out_proj is no layer of this language model; there are .*q_proj"):
        add_lora(model, LoraSettings(targets=("q_proj", "out_proj")), base, "tiny")


@pytest.mark.parametrize("mode", MODES)
def test_what_is_declared_moves_and_nothing_else(mode: str, base: Path) -> None:
    """After two steps of AdamW, both ways. In 4 bits the packed bytes of the language model stand still too."""
    if mode == "qlora":
        pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    before = build_instruct_objective(stage_of(mode, base), lambda name: name)
    start = {name: p.detach().clone() for name, p in before.named_parameters()}
    after = trained(mode, base)
    moved = {name for name, p in after.named_parameters() if not torch.equal(p, start[name])}
    assert moved == after.trained_parameters()
    kinds = {
        "align": ("multi_modal_projector",),
        "full": ("multi_modal_projector", "language_model"),
        "lora": ("lora_",),
        "qlora": ("lora_",),
        "lora with projector": ("multi_modal_projector", "lora_"),
    }[mode]
    assert moved == {name for name in start if any(kind in name for kind in kinds)}


def test_peft_loads_what_was_exported_and_computes_the_same(base: Path, tmp_path: Path) -> None:
    """peft itself, on the base as transformers loads it; and the merged model beside it."""
    objective = trained("lora", base)
    expected = logits(objective.model, objective)
    objective.export(tmp_path)
    fresh = AutoModelForImageTextToText.from_pretrained(base)
    assert (logits(fresh, objective) - expected).abs().max() > 1e-2  # or nothing was learned
    witness = PeftModel.from_pretrained(fresh, str(tmp_path / ADAPTER)).eval()
    torch.testing.assert_close(logits(witness, objective), expected, rtol=1e-4, atol=1e-5)
    merged, _ = load_llava(tmp_path)
    torch.testing.assert_close(logits(merged.eval(), objective), expected, rtol=1e-4, atol=1e-4)
    assert not (tmp_path / BASE).exists()  # nothing else trained: the base is the one there was


def test_a_projector_that_trained_beside_is_baked_into_the_base(base: Path, tmp_path: Path) -> None:
    objective = trained("lora with projector", base)
    expected = logits(objective.model, objective)
    objective.export(tmp_path)
    old, new = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / BASE))
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert changed == {name for name in old if name.startswith("multi_modal_projector.")}
    own = load_file(tmp_path / ADAPTER / "adapter_model.safetensors")
    assert all(".lora_A." in name or ".lora_B." in name for name in own)
    adapted, _ = load_adapted(tmp_path / ADAPTER)  # finds the base beside it
    torch.testing.assert_close(logits(adapted.eval(), objective), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ModelError, match=r"was trained on .* and .* holds others .*: its answers would be noise"):
        load_adapted(tmp_path / ADAPTER, base)


def test_what_is_exported_has_nothing_that_vllm_refuses(base: Path, tmp_path: Path) -> None:
    """No bias, no DoRA, no modules_to_save, a rank vLLM serves, and keys of peft's published form."""
    trained("lora", base, steps=1).export(tmp_path)
    config = json.loads((tmp_path / ADAPTER / "adapter_config.json").read_text())
    assert (config["peft_type"], config["bias"], config["use_dora"], config["modules_to_save"]) == (
        "LORA",
        "none",
        False,
        None,
    )
    assert config["base_model_name_or_path"] == str(base.absolute())
    keys = set(load_file(tmp_path / ADAPTER / "adapter_model.safetensors"))
    assert keys == {
        f"base_model.model.{module}.lora_{half}.weight" for module in config["target_modules"] for half in "AB"
    }
    said = json.loads((tmp_path / ADAPTER / "provenance.json").read_text())
    assert said["base"]["weights_sha256"] == weights_hash(base)


def test_merging_changes_no_logit(base: Path, tmp_path: Path) -> None:
    objective = trained("lora", base)
    objective.export(tmp_path / "tuned")
    adapted, _ = load_adapted(tmp_path / "tuned" / ADAPTER, base)
    before = logits(adapted.eval(), objective)
    merge_adapter(tmp_path / "tuned" / ADAPTER, tmp_path / "merged", base)
    merged, _ = load_llava(tmp_path / "merged")
    torch.testing.assert_close(logits(merged.eval(), objective), before, rtol=1e-4, atol=1e-4)


def test_an_adapter_that_is_damaged_or_of_another_base_is_refused(base: Path, tmp_path: Path) -> None:
    trained("lora", base, steps=1).export(tmp_path / "tuned")
    adapter = tmp_path / "tuned" / ADAPTER
    other = tmp_path / "other"
    shutil.copytree(base, other)
    weights = load_file(other / "model.safetensors")
    weights["language_model.model.norm.weight"] += 1
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="name the base it was trained on"):
        load_adapted(adapter, other)
    own = load_file(adapter / "adapter_model.safetensors")
    save_file(dict(list(own.items())[1:]), adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ModelError, match=r"the adapter is incomplete or of another model: base_model\.model\.model\.language"
    ):
        load_adapted(adapter, base)
    with pytest.raises(ModelError, match="holds no adapter"):
        load_adapted(base)


def test_four_bits_hold_the_language_model_and_nothing_else(base: Path, tmp_path: Path) -> None:
    """The loss is near the unquantised one's, the adapter learns, and what is exported stands on the whole base."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    objective = trained("qlora", base, steps=0)
    packed = {name for name, m in objective.model.named_modules() if isinstance(m, bitsandbytes.nn.Linear4bit)}
    assert {name.removesuffix(".base_layer") for name in packed} == set(lora_modules_of(objective))
    whole = trained("lora", base, steps=0)
    batch = whole.collate(lessons())
    losses = [float(each(**batch)["answer_loss"].detach()) for each in (objective, whole)]
    assert losses[0] == pytest.approx(losses[1], rel=0.1) and losses[0] != losses[1]
    learned = trained("qlora", base, steps=8)
    assert float(learned(**batch)["answer_loss"].detach()) < losses[0] - 0.1
    learned.export(tmp_path)
    merged, _ = load_llava(tmp_path)
    assert merged.get_parameter("model.language_model.layers.0.mlp.up_proj.weight").dtype == torch.float32


def test_an_evaluation_on_the_way_leaves_the_gradients_of_four_bits_as_they_were(base: Path) -> None:
    """bitsandbytes repacks weights on a CPU when it evaluates, and would go back through them wrongly."""
    objective = trained("qlora", base, steps=1)
    batch = objective.collate(lessons())
    found = []
    for _ in range(2):
        objective.train().zero_grad()
        objective(**batch)["answer_loss"].backward()
        found.append([p.grad.clone() for p in objective.parameters() if p.grad is not None])
        with torch.no_grad():
            objective.eval()(**batch)
    assert len(found[0]) == len(objective.trained_parameters())
    assert all(torch.equal(before, after) for before, after in zip(*found, strict=True))


def lora_modules_of(objective: InstructObjective) -> tuple[str, ...]:
    assert objective.adapter is not None
    return objective.adapter.modules
