"""Learning from answers that are tried: rewards are exact, advantages the formula's, and what pays is done more."""

import json
import shutil
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from assistant.checkpoint import load_llava
from training.config import RecipeError
from training.evaluation.answers import normalised
from training.preference_stages import ReinforceStage
from training.reinforce import ReinforceTrainer, SceneQuestions, exact, reinforce_trainer, run_reinforce
from training.reward_model import RewardHead, RewardModel
from training.stages import Workshop
from ui.command_line import app


def stage_on(model: Path, steps: int = 4, **said: Any) -> ReinforceStage:
    """A stage that tries four answers of two tokens to each of two questions, in float32, on `model`."""
    schedule: dict[str, Any] = {"steps": steps, "batch_size": 2, "learning_rate": 1e-2, "bf16": False, "log_every": 1}
    schedule |= {"save_every": steps, "evaluate_every": steps, "final_rate": 1.0} | said.pop("schedule", {})
    stage: dict[str, Any] = {
        "kind": "reinforce",
        "name": "reinforce",
        "start_from": str(model),
        "lora": {"rank": 4, "alpha": 8},
    }
    stage |= {"answers": 4, "longest_answer": 2, "held_out_samples": 2, "scenes": 50, "schedule": schedule}
    return ReinforceStage.model_validate(stage | said)


@pytest.mark.parametrize(
    ("given", "right", "reward"),
    [
        ("red", "red", 1),
        ("Red.", "red", 1),
        ("The red", "red", 1),
        ("three", "3", 1),
        ("3", "3", 1),
        ("gray", "grey", 1),
        ("none", "0", 1),
        ("blue", "red", 0),
        ("red or blue", "red", 0),
        ("33", "3", 0),
        ("", "red", 0),
        ("not red", "red", 0),
    ],
)
def test_the_reward_is_exact(given: str, right: str, reward: float) -> None:
    assert exact([[{"role": "assistant", "content": given}]], [right], prompts=[], trainer_state=None) == [reward]


def test_questions_are_of_the_wanted_kinds_and_always_the_same(tiny_model: Path) -> None:
    stage = stage_on(tiny_model, scene_kinds=["count", "shapes"], questions=["yes_no", "count"])
    questions = SceneQuestions(stage, 64, 0)
    for place in range(12):
        scene, question = questions.question(place)
        assert scene.kind in ("count", "shapes") and question.kind in ("yes_no", "count")
        assert question in scene.questions and question == SceneQuestions(stage, 64, 0).question(place)[1]
    with pytest.raises(RecipeError, match="scenes of word have no question about size"):
        SceneQuestions(stage_on(tiny_model, scene_kinds=["word"], questions=["size"]), 64, 0).question(0)


@pytest.fixture(scope="module")
def trainer(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> ReinforceTrainer:
    folder = tmp_path_factory.mktemp("reinforce")
    return reinforce_trainer(stage_on(tiny_model), Workshop(folder, None), folder / "reinforce")[0]


def test_an_advantage_is_the_reward_against_its_group(trainer: ReinforceTrainer) -> None:
    """Shao et al. 2024, section 4.1.2, in plain loops, on two made-up groups; one that is all alike teaches nothing."""
    made_up = [1.0, 0.0, 0.25, 0.0, 0.5, 0.5, 0.5, 0.5]
    rewards = iter(made_up)

    def given(completions: list[Any], **unused: Any) -> list[float]:
        return [next(rewards) for _ in completions]

    trainer.model.train()
    rows = next(iter(trainer.get_train_dataloader()))
    assert [row["answer"] for row in rows[:4]] == [rows[0]["answer"]] * 4, "a group is not about one question"
    before, trainer.reward_funcs = trainer.reward_funcs, [given]
    scored = trainer._generate_and_score_completions(rows)
    trainer.reward_funcs = before
    expected = []
    for start in (0, 4):
        group = made_up[start : start + 4]
        expected += [(reward - fmean(group)) / (stdev(group) + 1e-4) for reward in group]
    torch.testing.assert_close(scored["advantages"], torch.tensor(expected), rtol=1e-4, atol=1e-5)
    assert expected[4:] == [0, 0, 0, 0]
    assert len(scored["pixel_values"]) == 8 and scored["completion_ids"].shape[1] <= 2
    image = trainer.model.config.image_token_id
    per_picture = int((scored["prompt_ids"][0] == image).sum())
    assert per_picture == 100 and not (scored["completion_ids"] == image).any()


def test_what_pays_is_done_more(tiny_model: Path, tmp_path: Path) -> None:
    """Paid for tokens of an even number, the model says more of them; only the adapter moves."""

    def even(completion_ids: list[list[int]], **unused: Any) -> list[float]:
        return [fmean(token % 2 == 0 for token in ids) for ids in completion_ids]

    folder = tmp_path / "reinforce"
    stage = stage_on(tiny_model, steps=14, answers=16, longest_answer=1, beta=0, schedule={"learning_rate": 2e-2})
    trainer, _ = reinforce_trainer(stage, Workshop(tmp_path, None), folder)
    trainer.reward_funcs, trainer.reward_func_names = [even], ["even"]
    trainer.run(folder)
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    paid = [line["reward"] for line in lines if "reward" in line and "loss" in line]
    assert len(paid) == 14 and fmean(paid[-4:]) > fmean(paid[:4]) + 0.15, paid
    assert (folder / "curves.png").is_file()
    base = dict(load_llava(tiny_model)[0].named_parameters())
    for name, value in trainer.model.get_base_model().named_parameters():
        if "lora_" not in name:
            assert torch.equal(value, base[name.replace(".base_layer", "")]), name
        elif "lora_B" in name:
            assert value.abs().max() > 0, name


def test_a_run_on_exact_answers_leaves_adapter_and_model(tiny_model: Path, tmp_path: Path) -> None:
    scores = run_reinforce(stage_on(tiny_model, steps=1), Workshop(tmp_path, None))
    assert 0 <= scores["eval_reward"] <= 1
    output = tmp_path / "reinforce" / "output"
    assert (output / "adapter" / "adapter_model.safetensors").is_file() and (output / "model.safetensors").is_file()
    with pytest.raises(RecipeError, match=r"lora.targets: qkv"):
        run_reinforce(stage_on(tiny_model, lora={"targets": ["qkv"]}), Workshop(tmp_path, None))


def test_a_judge_may_pay_in_place_of_exact_answers(tiny_model: Path, tmp_path: Path) -> None:
    """Each attempt gets the judge's number, as when it is judged alone; whether it is right is counted, not paid."""
    shutil.copytree(tiny_model, tmp_path / "judge")
    stage = stage_on(tiny_model, judge=str(tmp_path / "judge"))
    with pytest.raises(RecipeError, match=r"judge: .* is no reward model: it lacks reward_head.safetensors"):
        reinforce_trainer(stage, Workshop(tmp_path, None), tmp_path / "reinforce")
    head = RewardHead(load_llava(tiny_model)[0].config.text_config.hidden_size)
    torch.nn.init.normal_(head.score.weight)
    head.save(tmp_path / "judge")
    trainer, _ = reinforce_trainer(stage, Workshop(tmp_path, None), tmp_path / "reinforce")
    rows = next(iter(trainer.get_train_dataloader()))
    said = ["red", "blue", "", rows[3]["answer"], "a green ring", "two", "2", "left"]
    completions = [[{"role": "assistant", "content": one}] for one in said]
    paid = trainer._calculate_rewards(rows, [row["prompt"] for row in rows], completions, [[0]] * 8)
    alone = RewardModel.load(tmp_path / "judge")
    expected = [alone.rewards(row["question"], [one], row["images"][0])[0] for row, one in zip(rows, said, strict=True)]
    assert len(set(expected)) == 8
    torch.testing.assert_close(paid[:, 0], torch.tensor(expected), rtol=1e-4, atol=1e-4)
    assert paid[:4, 1].tolist() == [float(normalised(one) == normalised(rows[0]["answer"])) for one in said[:4]]
    assert trainer.reward_weights.tolist() == [1, 0]


def test_a_kind_that_there_is_not_is_named(tiny_model: Path) -> None:
    wrong = CliRunner().invoke(app, ["reinforce", str(tiny_model), "--ask", "weather", "--dry-run"])
    assert wrong.exit_code == 1 and "questions.0" in wrong.stderr and "'yes_no'" in wrong.stderr
