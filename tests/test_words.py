"""Naming: patches in a region name its words, pictures name theirs, rare words weigh more."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from assistant.towers import TextShape, ViTShape, new_image_processor, new_pair
from tests.tiny import make_tiny_tokenizer
from training.data.pictures import Picture, Region
from training.data.scenes import make_scene
from training.data.sources import ScenePictures
from training.naming import naming_loss, patches_in, share_named
from training.objective import Start, total_loss
from training.objectives.words import Settings, WordsObjective, build
from training.trainer import freeze_all_but

SIDE = 64


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    """A tokenizer trained on scenes."""
    return make_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def tiny_objective(tokenizer: PreTrainedTokenizerFast, **settings: float) -> WordsObjective:
    """Naming on a tiny new SigLIP with 64 patches."""
    torch.manual_seed(0)
    model = new_pair(ViTShape("siglip", 32, 2, 2, 8, SIDE), TextShape(32, 1, 2, 8, 64), tokenizer)
    start = Start(SIDE, None, model, new_image_processor("siglip", SIDE), tokenizer)
    objective = build(Settings(start_temperature=10, start_bias=-10, **settings), start)
    freeze_all_but(objective, objective.trained_parameters())
    return objective.train()


def test_naming_loss_is_the_formula() -> None:
    """Each row's cross-entropy with the weighted, normalised words that were said; then the mean over the rows."""
    torch.manual_seed(0)
    logits, weights = torch.randn(3, 5, dtype=torch.float64), torch.tensor([1.0, 2.0, 0.5, 3.0, 1.5]).double()
    said = torch.tensor([[0, 3, -1], [4, -1, -1], [1, 2, 3]])
    expected = 0.0
    for row, ids in enumerate([[0, 3], [4], [1, 2, 3]]):
        total = sum(float(weights[i]) for i in ids)
        normaliser = math.log(sum(math.exp(float(score)) for score in logits[row]))
        expected -= sum(float(weights[i]) / total * (float(logits[row, i]) - normaliser) for i in ids) / 3
    assert float(naming_loss(logits, said, weights)) == pytest.approx(expected, abs=1e-12)
    nothing = naming_loss(logits[:0], said[:0], weights)
    assert float(nothing) == 0.0


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        ((0.0, 0.0, 0.5, 0.5), {0, 1, 4, 5}),
        ((0.5, 0.25, 1.0, 0.5), {6, 7}),
        ((0.30, 0.30, 0.36, 0.36), {5}),  # holds no centre: the nearest patch
        ((0.0, 0.0, 1.0, 1.0), set(range(16))),
    ],
)
def test_patches_of_a_region(box: tuple[float, float, float, float], expected: set[int]) -> None:
    """In a grid of 4 x 4, row by row."""
    assert set(patches_in(Region(box, ("x",)), (4, 4)).nonzero().flatten().tolist()) == expected


def test_a_scenes_regions_lie_where_its_objects_are_drawn() -> None:
    """Inside the box the picture has another colour than in its corners; the words are a shape and a colour."""
    seen = 0
    for seed in range(60):
        scene = make_scene(seed, SIDE, "position")
        pixels = np.asarray(scene.image).astype(int)
        for region in scene.regions:
            left, top, right, bottom = (round(share * SIDE) for share in region.box)
            part = pixels[top:bottom, left:right].reshape(-1, 3)
            away = np.abs(part - pixels[0, 0]).sum(-1) > 60
            assert away.mean() > 0.25, (seed, region)
            assert any(f"a {region.words[1]} {region.words[0]}" in text.lower() for text in scene.statements[2]) or (
                f"an {region.words[1]} {region.words[0]}" in scene.statements[2]
            )
            seen += 1
    assert seen > 60


def test_share_named_wants_all_words_and_no_other() -> None:
    """Two words have to be the two likeliest; one the likeliest."""
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0], [3.0, 2.0, 1.0, 0.0], [3.0, 2.0, 1.0, 0.0]])
    said = torch.tensor([[1, 0], [0, -1], [0, 2]])
    assert float(share_named(logits, said)) == pytest.approx(2 / 3)
    assert float(share_named(logits[:0], said[:0])) == 0.0


def test_a_few_steps_name_the_regions(tokenizer: PreTrainedTokenizerFast) -> None:
    """Trained on eight scenes it names nearly all of their patches, and by chance nearly none."""
    objective = tiny_objective(tokenizer, contrast=0.1)
    pictures = ScenePictures(400, SIDE, "statements")
    chosen = [picture for picture in (pictures[i] for i in range(40)) if picture.regions][:8]
    batch = objective.collate([objective.sample(picture, np.random.default_rng(0)) for picture in chosen])
    optimiser = torch.optim.AdamW([p for p in objective.parameters() if p.requires_grad], lr=3e-3)
    named = []
    for _ in range(250):
        values = objective(**batch)
        optimiser.zero_grad()
        total_loss(values).backward()
        optimiser.step()
        named.append(float(values["regions_named"]))
    assert named[0] < 0.2
    assert named[-1] > 0.9


def test_rare_words_weigh_more(tokenizer: PreTrainedTokenizerFast) -> None:
    """Counts move after the step, not within it, and not while validating."""
    objective = tiny_objective(tokenizer)
    pixels = torch.zeros(3, SIDE, SIDE, dtype=torch.uint8)
    said = ["red star", "red circle", "red star", "red square"]
    pictures = [Picture(str(n), pixels, (text,), whole=True) for n, text in enumerate(said)]
    batch = objective.collate([objective.sample(picture, np.random.default_rng(0)) for picture in pictures])
    before = objective.counts.clone()
    objective(**batch)
    assert objective.counts.equal(before)
    objective.after_step(0, 1)
    assert float(objective.counts[-1]) == 4
    objective.eval()
    objective(**batch)
    assert float(objective.pending.sum()) == 0
    read = tokenizer(" red star", add_special_tokens=False)["input_ids"]
    red, star = read[0], read[-1]
    weights = objective._weights()
    assert weights[red] < weights[star]
    assert float(weights[star]) == pytest.approx(math.log(5 / 3) + 1e-3, rel=1e-5)


def test_regions_of_a_picture_that_may_be_cropped_are_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    """A crop would move what a region names; the message names the picture."""
    region = Region((0.0, 0.0, 0.5, 0.5), ("star",))
    picture = Picture("row 7 of mine", torch.zeros(3, 80, 80, dtype=torch.uint8), ("a star",), regions=(region,))
    with pytest.raises(ValueError, match="row 7 of mine has regions"):
        tiny_objective(tokenizer).sample(picture, np.random.default_rng(0))


def test_the_export_is_a_plain_siglip(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """What names is left behind."""
    objective = tiny_objective(tokenizer)
    objective.export(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} >= {"config.json", "model.safetensors", "tokenizer.json"}
    assert type(objective.model).from_pretrained(tmp_path).num_parameters() == objective.model.num_parameters()
