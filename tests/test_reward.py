"""A judge of answers: its loss is the formula, it learns to rank, and it judges alike when it is loaded again."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

from assistant.adapter_files import load_adapted
from assistant.models import ModelError
from tests.pairs import two_pairs
from training.data.preferences import Preference
from training.preference_stages import RewardStage
from training.reward import RewardObjective, ranked_right, reward_objective, run_reward
from training.reward_model import HEAD, RewardModel, answer_ends
from training.stages import Workshop
from training.trainer import freeze_all_but
from ui.command_line import app


def stage_on(model: Path, steps: int = 2, **said: Any) -> RewardStage:
    """A stage that judges two pairs about scenes, in float32, on `model`."""
    schedule: dict[str, Any] = {"steps": steps, "batch_size": 2, "learning_rate": 1e-2, "bf16": False, "log_every": 1}
    schedule |= {"save_every": steps, "evaluate_every": steps, "final_rate": 1.0}
    stage: dict[str, Any] = {
        "kind": "reward",
        "name": "reward",
        "start_from": str(model),
        "lora": {"rank": 4, "alpha": 8},
    }
    stage |= {"mixture": [{"scenes": 2, "weight": 1}], "held_out_samples": 3, "schedule": schedule}
    return RewardStage.model_validate(stage | said)


def test_the_loss_is_the_formula(tiny_model: Path, tmp_path: Path) -> None:
    """Ouyang et al. 2022, eq. 1, in plain loops: the head reads each answer's likelihood and the last of its tokens."""
    objective, pairs, held_out = reward_objective(stage_on(tiny_model), Workshop(tmp_path, None))
    torch.nn.init.normal_(objective.head.score.weight)
    batch = dict(objective.eval().collate([pairs[0], pairs[1]]))
    with torch.no_grad():
        seen = {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values")}
        made = objective.model(**seen, output_hidden_states=True)
        values = objective(**batch)
    rewards = []
    for row in range(4):
        answer = [place for place in range(made.logits.shape[1]) if batch["completion_mask"][row, place]]
        assert batch["input_ids"][row, answer[-1]] == objective.processor.tokenizer.eos_token_id
        assert answer[-1] == int(answer_ends(batch["completion_mask"])[row])
        chances = [made.logits[row, place - 1].softmax(-1)[batch["input_ids"][row, place]] for place in answer]
        likely = sum(float(torch.log(chance)) for chance in chances) / len(answer)
        read = float(made.hidden_states[-1][row, answer[-1]] @ objective.head.score.weight[0].detach())
        rewards.append(read + float(objective.head.likelihood) * likely)
    losses = [-torch.log(torch.sigmoid(torch.tensor(rewards[pair] - rewards[pair + 2]))) for pair in (0, 1)]
    assert float(values["ranking_loss"]) == pytest.approx(float(sum(losses)) / 2, rel=1e-4)
    right = sum(rewards[pair] > rewards[pair + 2] for pair in (0, 1)) / 2
    assert float(values["ranked_right"]) == right
    counted = [float(objective(**dict(objective.collate([held_out[place]])))["ranked_right"]) for place in range(3)]
    assert ranked_right(objective, held_out, 2) == pytest.approx(sum(counted) / 3)


def test_exactly_adapter_and_head_train(tiny_model: Path, tmp_path: Path) -> None:
    objective, pairs, _ = reward_objective(stage_on(tiny_model), Workshop(tmp_path, None))
    assert isinstance(objective, RewardObjective)
    freeze_all_but(objective.train(), objective.trained_parameters())
    before = {name: value.clone() for name, value in objective.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in objective.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        objective(**objective.collate([pairs[0]]))["ranking_loss"].backward()
        optimizer.step()
    moved = {name for name, value in objective.named_parameters() if not torch.equal(value, before[name])}
    assert moved == objective.trained_parameters()
    head = {"head.score.weight", "head.likelihood"}
    assert head < moved and all("lora_" in name for name in moved - head)


def test_it_learns_to_rank_and_judges_alike_when_loaded(tiny_model: Path, tmp_path: Path) -> None:
    """Behind some steps on two pairs it ranks both right; what is loaded gives the numbers of what was trained."""
    stage = stage_on(tiny_model, steps=12, **two_pairs(tmp_path))
    scores = run_reward(stage, Workshop(tmp_path, None))
    assert scores["ranked_right"] == 1
    untrained, _, held_out = reward_objective(stage, Workshop(tmp_path, None))
    assert scores["ranked_right_before"] == ranked_right(untrained, held_out, 2)
    lines = [json.loads(line) for line in (tmp_path / "reward" / "log.jsonl").read_text().splitlines()]
    trained = [line for line in lines if "loss" in line]
    assert trained[-1]["ranked_right"] == 1 and trained[-1]["margin"] > trained[0]["margin"] + 0.5
    output = tmp_path / "reward" / "output"
    load_adapted(output / "adapter")
    judge = RewardModel.load(output)
    _, pairs, _ = reward_objective(stage, Workshop(tmp_path, None))
    for place in range(2):
        pair = pairs[place]
        assert isinstance(pair, Preference)
        asked = pair.messages[0]["content"][-1]["text"]
        answers = [messages[1]["content"][0]["text"] for messages in (pair.messages, pair.other().messages)]
        picture = Image.fromarray(pair.views[0].permute(1, 2, 0).numpy())
        better, worse = judge.rewards(asked, answers, picture)
        assert better > worse
    save_file({"score.weight": torch.zeros(1, 8), "likelihood": torch.zeros(1)}, output / HEAD)
    with pytest.raises(ModelError, match=r"reward_head.safetensors does not fit this model"):
        RewardModel.load(output)
    (output / HEAD).unlink()
    with pytest.raises(ModelError, match=r"no reward model: it lacks reward_head.safetensors"):
        RewardModel.load(output)


def test_the_command_tells_how_well_the_judge_ranks(tiny_model: Path, tmp_path: Path) -> None:
    said = ["--steps", "1", "--batch", "2", "--no-rehearsal", "--out", str(tmp_path / "judge")]
    trained = CliRunner().invoke(app, ["reward", str(tiny_model), *said])
    assert trained.exit_code == 0, trained.output
    scores = json.loads((tmp_path / "judge" / "reward" / "done.json").read_text())["scores"]
    now, before = (f"{100 * scores[name]:.1f} %" for name in ("ranked_right", "ranked_right_before"))
    assert f"It ranks {now} of the held-out pairs rightly; before it was trained {before}." in trained.output
