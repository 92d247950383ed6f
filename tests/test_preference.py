"""Preference tuning: the loss is the paper's, the margin grows, the adapter alone moves, and it leaves as ours do."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from typer.testing import CliRunner

from assistant.adapter_files import load_adapted
from assistant.answering import Assistant, Request
from assistant.checkpoint import load_llava
from tests.pairs import two_pairs
from tests.shards import write_shards
from training.checkpoints import newest_whole
from training.config import RecipeError, read_recipe, rehearsal
from training.data.pictures import DataError
from training.data.scenes import make_scene
from training.preference import PreferenceTrainer, preference_trainer, run_preference
from training.preference_stages import PreferenceStage
from training.recipe import run_recipe
from training.stages import Workshop
from ui.command_line import app

BETA = 0.3


def stage_on(model: Path, steps: int = 4, **said: Any) -> PreferenceStage:
    """A stage that prefers on scenes, in float32, on `model`."""
    schedule: dict[str, Any] = {"steps": steps, "batch_size": 2, "learning_rate": 1e-2, "bf16": False, "log_every": 1}
    schedule |= {"save_every": 2, "evaluate_every": steps, "final_rate": 1.0} | said.pop("schedule", {})
    stage: dict[str, Any] = {
        "kind": "preference",
        "name": "prefer",
        "start_from": str(model),
        "lora": {"rank": 4, "alpha": 8},
    }
    stage |= {"beta": BETA, "mixture": [{"scenes": 2, "weight": 1}], "held_out_samples": 2, "schedule": schedule}
    return PreferenceStage.model_validate(stage | said)


@pytest.fixture(scope="module")
def trainer(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> PreferenceTrainer:
    """A trainer whose adapter is not the zero that it starts from."""
    folder = tmp_path_factory.mktemp("trainer")
    trainer, adapter = preference_trainer(
        stage_on(tiny_model, imitation=0.5), Workshop(folder, None), folder / "prefer"
    )
    torch.manual_seed(3)
    for name, parameter in trainer.model.get_base_model().named_parameters():
        if name in adapter.parameters() and "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return trainer


def log_probabilities(model: Any, batch: dict[str, Tensor]) -> list[float]:
    """Of each row the sum over the tokens of its answer, in plain loops over transformers' own logits."""
    seen = {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values")}
    with torch.no_grad():
        logits = model(**seen).logits.float()
    sums = []
    for row in range(len(logits)):
        total = 0.0
        for place in range(1, logits.shape[1]):
            if batch["completion_mask"][row, place]:
                wanted = batch["input_ids"][row, place]
                total += float(torch.log_softmax(logits[row, place - 1], -1)[wanted])
        sums.append(total)
    return sums


def test_the_loss_is_the_papers_and_imitation_comes_on_top(trainer: PreferenceTrainer) -> None:
    """Rafailov et al. 2023, eq. 7, of transformers' log-probabilities with the adapter and without it."""
    batch = next(iter(trainer.get_eval_dataloader()))
    model = trainer.model.eval()
    assert isinstance(model, PeftModel)
    ours = log_probabilities(model, batch)
    with model.disable_adapter():
        reference = log_probabilities(model, batch)
    assert max(abs(a - b) for a, b in zip(ours, reference, strict=True)) > 0.1, "the adapter changes nothing"
    pairs = len(ours) // 2
    losses = []
    for pair in range(pairs):
        better, worse = (ours[row] - reference[row] for row in (pair, pair + pairs))
        losses.append(-torch.log(torch.sigmoid(torch.tensor(BETA * (better - worse)))))
    tokens = int(batch["completion_mask"][:pairs].sum())
    expected = float(torch.stack(losses).mean()) - 0.5 * sum(ours[:pairs]) / tokens
    with torch.no_grad():
        assert float(trainer.compute_loss(model, batch)) == pytest.approx(expected, rel=1e-4)


def test_the_mask_covers_the_answer_and_the_end_of_its_turn(trainer: PreferenceTrainer) -> None:
    batch = next(iter(trainer.get_eval_dataloader()))
    tokenizer = trainer.processing_class.tokenizer
    for row, mask in zip(batch["input_ids"], batch["completion_mask"], strict=True):
        answer = tokenizer.decode(row[mask.bool()])
        assert answer.endswith("</s>") and "<|assistant|>" not in answer and len(answer) > 4
    half = len(batch["input_ids"]) // 2
    assert torch.equal(batch["pixel_values"][:half], batch["pixel_values"][half:])
    assert not torch.equal(batch["input_ids"][:half], batch["input_ids"][half:])


def run(stage: PreferenceStage, folder: Path) -> list[dict[str, Any]]:
    """Run `stage` in `folder`; the lines of its log."""
    run_preference(stage, Workshop(folder, None))
    return [json.loads(line) for line in (folder / stage.name / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def preferred(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """The folder of a run of some steps on two pairs, and its log."""
    folder = tmp_path_factory.mktemp("preferred")
    return folder, run(stage_on(tiny_model, steps=8, **two_pairs(folder)), folder)


def test_the_margin_grows(preferred: tuple[Path, list[dict[str, Any]]]) -> None:
    """Where it starts there is none; behind some steps on the same pairs the better answers are preferred."""
    folder, lines = preferred
    steps = [line for line in lines if "loss" in line]
    assert steps[0]["margin"] == pytest.approx(0, abs=1e-5) and steps[0]["loss"] == pytest.approx(0.6931, abs=1e-3)
    assert steps[-1]["margin"] > 0.5 and steps[-1]["preferred"] == 1 and steps[-1]["loss"] < 0.5
    assert {"eval_margin", "eval_preferred"} <= lines[-2].keys() and "rewards/margins" not in steps[0]
    assert (folder / "prefer" / "curves.png").stat().st_size > 1000


def test_exactly_the_adapter_moves_and_it_merges(
    tiny_model: Path, preferred: tuple[Path, list[dict[str, Any]]]
) -> None:
    """What is exported is the base with the adapter: the same answers, and no weight of the base is another one."""
    output = preferred[0] / "prefer" / "output"
    adapted, processor = load_adapted(output / "adapter")
    names = set(load_file(output / "adapter" / "adapter_model.safetensors"))
    assert names and all(".language_model.layers." in name and "lora_" in name for name in names)
    base, _ = load_llava(tiny_model)
    before = dict(base.named_parameters())
    moved: set[str] = set()
    still: set[str] = set()
    for name, value in load_llava(output)[0].named_parameters():
        (still if torch.equal(value, before[name]) else moved).add(name)
    adapters = {name.removeprefix("base_model.model.").rpartition(".lora_")[0] + ".weight" for name in names}
    assert moved == adapters and still == set(before) - adapters
    request = Request("What is this?", (make_scene(5).image,))
    merged = Assistant.load(output).answer_batch([request], 8)
    assert Assistant(adapted, processor).answer_batch([request], 8) == merged


def test_a_run_that_was_stopped_ends_as_if_it_was_not(
    tiny_model: Path, preferred: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    """Going on from the checkpoint of step 6 gives the very adapter of the uninterrupted run."""
    shutil.copytree(preferred[0] / "prefer", tmp_path / "prefer")
    shutil.rmtree(tmp_path / "prefer" / "output")
    shutil.rmtree(tmp_path / "prefer" / "checkpoints" / "checkpoint-8")
    lines = run(stage_on(tiny_model, steps=8, **two_pairs(preferred[0])), tmp_path)
    assert [line["step"] for line in lines if "loss" in line] == [*range(1, 9), 7, 8]
    first, second = (
        load_file(folder / "prefer" / "output" / "adapter" / "adapter_model.safetensors")
        for folder in (preferred[0], tmp_path)
    )
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_a_stop_saves_a_whole_checkpoint(trainer: PreferenceTrainer) -> None:
    """A request to stop is heard behind the step: the checkpoint is there, sealed, and the run ends."""
    folder = Path(str(trainer.args.output_dir)).parent
    trainer.stop.made = True
    with pytest.raises(KeyboardInterrupt):
        trainer.run(folder)
    trainer.stop.made = False
    newest, faults = newest_whole(folder / "checkpoints")
    assert newest is not None and newest.name == "checkpoint-1" and not faults


def test_faults_are_told_before_anything_trains(tiny_model: Path, tmp_path: Path) -> None:
    workshop = Workshop(tmp_path, None)
    with pytest.raises(RecipeError, match=r"stage prefer: lora.targets: qkv is no layer.*q_proj"):
        run_preference(stage_on(tiny_model, lora={"targets": ["qkv"]}), workshop)
    with pytest.raises(RecipeError, match=r"stage prefer: the model folder .* lacks config.json"):
        (tmp_path / "empty").mkdir()
        run_preference(stage_on(tmp_path / "empty"), workshop)
    pairs = tmp_path / "pairs.csv"
    pairs.write_text("image,question,chosen,rejected\ncat.png,What?,A cat.,A dog.\n")
    with pytest.raises(DataError, match=r"row 1 \(line 2\).*image: there is no file.*cat.png"):
        run_preference(stage_on(tiny_model, mixture=[], pairs=[{"conversations": str(pairs), "damaged": 0}]), workshop)
    with pytest.raises(ValueError, match="name where pairs come from"):
        stage_on(tiny_model, mixture=[])
    with pytest.raises(ValueError, match=r"schedule.compile is not done in a PreferenceStage"):
        stage_on(tiny_model, schedule={"compile": True})
    assert not (tmp_path / "prefer" / "checkpoints").exists()


@pytest.mark.parametrize("name", ["prefer-joey", "reward-joey", "reward-captions", "reinforce-joey"])
def test_the_two_step_form_of_a_shipped_recipe_runs(name: str, tiny_model: Path, tmp_path: Path) -> None:
    """On a tiny model in Joey's place; what comes out answers, and says what it came from."""
    recipe = rehearsal(read_recipe(name))
    stage = recipe.stages[0].model_copy(update={"start_from": str(tiny_model)})
    recipe = recipe.model_copy(update={"stages": (stage,)})
    model = run_recipe(recipe, write_shards(tmp_path / "data", recipe), tmp_path)
    assert Assistant.load(model).answer_batch([Request("What is this?", (make_scene(1).image,))], 4)
    assert (model / "adapter" / "adapter_model.safetensors").is_file()
    assert set(json.loads((model / "provenance.json").read_text())["stages"]) == {stage.name}


def test_a_person_prefers_from_a_file(tiny_model: Path, tmp_path: Path) -> None:
    """The plan, the run and the model from a csv; a wrong row is one line and exit code 1."""
    rows = ["image,question,chosen,rejected"]
    for seed in range(6):
        scene = make_scene(seed, 80)
        scene.image.save(tmp_path / f"{seed}.png")
        rows.append(f'{seed}.png,Describe this picture.,"{scene.captions[0]}","{make_scene(seed + 90).captions[0]}"')
    file = tmp_path / "pairs.csv"
    file.write_text("\n".join(rows))
    out = tmp_path / "runs" / "mine"
    command = ["prefer", str(tiny_model), "--data", str(file), "--out", str(out), "--steps", "2", "--batch", "2"]
    planned = CliRunner().invoke(app, [*command, "--dry-run"])
    assert planned.exit_code == 0, planned.output
    assert "rank 16" in planned.output and "2 steps" in planned.output and not out.exists()
    done = CliRunner().invoke(app, [*command, "--no-rehearsal", "--no-report"])
    assert done.exit_code == 0, done.output
    assert f"The model is in {out / 'model'}" in done.stdout.replace("\n", "")
    assert json.loads((out / "model" / "provenance.json").read_text())["recipe"]["stages"][0]["held_out_samples"] == 6
    file.write_text("\n".join([*rows, "0.png,What?,the same,the same"]))
    wrong = CliRunner().invoke(app, [*command[:-4], "--no-rehearsal"])
    assert wrong.exit_code == 1 and "row 7 (line 8): rejected: it is the same answer" in wrong.stderr
