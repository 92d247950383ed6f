"""The benchmark of pretraining in its tiny form: it runs, both sides do the same, and the peers are really there."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from typer.testing import CliRunner

from scripts.bench_pretraining import NAMES, PEERS, app, chosen_pairs
from scripts.benchmarks.measuring import Disagreement, Pair, Work, arithmetic, compare, peak_memory
from scripts.benchmarks.workbench import TINY, Workbench

CPU = torch.device("cpu")
BATCHES = (6, 10)
# The class of the peer's that does the work, for each comparison.
PEER_CLASSES = {
    "nt-xent": {"lightly.loss.ntx_ent_loss.NTXentLoss"},
    "clip-loss": {"open_clip.loss.ClipLoss"},
    "siglip-loss": {"open_clip.loss.SigLipLoss"},
    "dino-loss": {"lightly.loss.dino_loss.DINOLoss"},
    "ibot-loss": {"lightly.loss.ibot_loss.IBOTPatchLoss"},
    "koleo-loss": {"lightly.loss.koleo_loss.KoLeoLoss"},
    "simclr": {"lightly.loss.ntx_ent_loss.NTXentLoss", "timm.models.vision_transformer.Block"},
    "mae": {"transformers.models.vit_mae.modeling_vit_mae.ViTMAEForPreTraining"},
    "mae-light": {"transformers.models.vit_mae.modeling_vit_mae.ViTMAEForPreTraining"},
    "dino": {"lightly.loss.dino_loss.DINOLoss", "timm.models.vision_transformer.Block"},
    "dinov2": {
        "lightly.loss.dino_loss.DINOLoss",
        "lightly.loss.ibot_loss.IBOTPatchLoss",
        "lightly.loss.koleo_loss.KoLeoLoss",
        "timm.models.vision_transformer.Block",
    },
    "clip": {"open_clip.model.CLIP", "open_clip.loss.ClipLoss"},
    "clip-transformers": {"transformers.models.clip.modeling_clip.CLIPModel"},
    "siglip": {"transformers.models.siglip.modeling_siglip.SiglipModel"},
}
DIFFERENT_LOSSES = {"mae-light", "dinov2"}  # what is compared there is what the towers give


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Workbench:
    """A workbench of tiny sizes."""
    return Workbench(TINY, bf16=False, device=CPU, folder=tmp_path_factory.mktemp("bench"))


def watched(work: Work) -> tuple[float, set[str]]:
    """What one call gives, and the full names of the classes of all modules that it goes through."""
    called = set()

    def note(module: nn.Module, inputs: object, output: object) -> None:
        called.add(f"{type(module).__module__}.{type(module).__qualname__}")

    hook = register_module_forward_hook(note)
    try:
        return float(work()), called
    finally:
        hook.remove()


def test_every_comparison_names_its_peer() -> None:
    assert set(PEER_CLASSES) == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_the_peer_is_called_and_both_sides_agree(name: str, bench: Workbench) -> None:
    """Theirs goes through the peer's own classes and ours through none; the losses of two steps are the same."""
    for pair in chosen_pairs([name], BATCHES, bench):
        our_loss, our_classes = watched(pair.ours)
        their_loss, their_classes = watched(pair.theirs)
        assert PEER_CLASSES[name] <= their_classes and not PEER_CLASSES[name] & our_classes
        assert not any(used.startswith(("lightly.", "open_clip.", "timm.")) for used in our_classes)
        assert our_loss == pytest.approx(their_loss, rel=pair.tolerance)
        # Behind the first step the losses agree only where gradients and optimisers do too.
        if name not in DIFFERENT_LOSSES:
            assert float(pair.ours()) == pytest.approx(float(pair.theirs()), rel=5 * pair.tolerance)


@pytest.mark.parametrize("name", ["simclr", "mae", "clip", "siglip"])
def test_steps_move_the_loss(name: str, bench: Workbench) -> None:
    """A step trains: after a few on one batch both sides' losses are lower than the first."""
    (pair,) = chosen_pairs([name], BATCHES, bench)
    for work in (pair.ours, pair.theirs):
        losses = [float(work()) for _ in range(12)]
        assert losses[-1] < losses[0]


def test_sides_that_disagree_are_not_compared() -> None:
    one, other = torch.tensor(1.0), torch.tensor(1.1)
    pair = Pair("loss", "peer", lambda: one, lambda: other, tolerance=1e-3, lever="")
    with pytest.raises(Disagreement, match=r"our loss is 1.0, that of peer 1.1"):
        compare(pair, rounds=1, device=CPU)


def test_peak_memory_counts_what_is_held_at_once() -> None:
    """Of three tensors of 4 MB the first is gone before the last is made."""

    def work() -> Tensor:
        first = torch.ones(1000, 1000)
        second = first * 2
        del first
        return (second + 1).sum()

    assert peak_memory(work, CPU) == pytest.approx(8e6, rel=0.01)


def test_arithmetic_counts_products_and_attention() -> None:
    """A matrix product forward and backward, and torch's CPU attention: 2 products forward, 5 backward."""
    matrix = torch.randn(64, 64, requires_grad=True)
    assert arithmetic(lambda: _back((matrix @ matrix).sum())) == 3 * 2 * 64**3
    assert arithmetic(lambda: torch.zeros(64, 64).addmm_(matrix.detach(), matrix.detach())) == 2 * 64**3
    heads = torch.randn(2, 4, 50, 16, requires_grad=True)

    def attend() -> Tensor:
        return _back(nn.functional.scaled_dot_product_attention(heads, heads, heads).sum())

    assert arithmetic(attend) == 7 * 2 * 2 * 4 * 50 * 50 * 16


def _back(value: Tensor) -> Tensor:
    value.backward()
    return value


def test_the_program_prints_a_table_and_writes_json(tmp_path: Path) -> None:
    """Its tiny form, two comparisons of two kinds; every figure is there."""
    out = tmp_path / "figures.json"
    chosen = ["--only", "nt-xent", "--only", "mae-light", "--loss-batches", "6,10"]
    done = CliRunner().invoke(app, [*chosen, "--tiny", "--rounds", "2", "--threads", "1", "--out", str(out)])
    assert done.exit_code == 0, done.output
    report = json.loads(out.read_text())
    assert [result["name"] for result in report["results"]] == [
        "NT-Xent loss, B = 6",
        "NT-Xent loss, B = 10",
        "MAE step, our decoder",
    ]
    assert set(report["machine"]["versions"]) == set(PEERS) and report["peak"] > 0
    for result in report["results"]:
        assert result["name"] in done.output
        assert len(result["ratios"]) == 2 and min(result["ratios"]) <= result["ratio"] <= max(result["ratios"])
        assert result["our_seconds"] > result["limit_seconds"] > 0
        assert result["our_memory"] > 0 and result["their_memory"] > 0


def test_the_program_says_what_it_does_and_what_it_does_not_know() -> None:
    told = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "200"}).output
    assert "ratio above 1 says that ours is faster" in told and all(name in told for name in NAMES)
    refused = CliRunner().invoke(app, ["--only", "byol"], env={"COLUMNS": "200"})
    assert refused.exit_code == 2 and "byol is none of" in refused.output


def test_sizes_change_one_at_a_time(bench: Workbench) -> None:
    """`--batch` reaches the batch that is trained on."""
    larger = Workbench(replace(TINY, batch=6), bf16=False, device=CPU, folder=Path("unused"))
    (pair,) = chosen_pairs(["mae"], BATCHES, larger)
    (smaller,) = chosen_pairs(["mae"], BATCHES, bench)
    assert arithmetic(pair.ours) == pytest.approx(1.5 * arithmetic(smaller.ours), rel=0.01)
