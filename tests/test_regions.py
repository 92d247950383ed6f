"""Naming regions: a page is learned by the patches that show its words, in a tower that then goes into an assistant."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from transformers import PreTrainedTokenizerFast

from assistant.answering import Assistant, Request
from assistant.checkpoint import load_llava
from assistant.fusion import replace_tower
from assistant.models import ModelError
from assistant.towers import ResNetShape, Tower, ViTShape, load_tower, new_tower
from tests.tiny import make_tiny_joined, make_tiny_tokenizer
from training.config import InstructStage, RecipeError, TowerStage, read_recipe, rehearsal
from training.data.pictures import DataError, Picture
from training.data.scenes import make_scene
from training.data.sources import ScenePictures
from training.instruct_start import build_instruct_objective
from training.objective import Start, total_loss
from training.objectives.regions import RegionsObjective, Settings, build
from training.recipe import run_recipe
from training.trainer import freeze_all_but

SIDE = 64


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    """A tokenizer trained on scenes."""
    return make_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny LLaVA on a SigLIP tower."""
    folder = tmp_path_factory.mktemp("plain")
    make_tiny_joined("siglip", folder)
    return folder


def tiny_objective(tokenizer: PreTrainedTokenizerFast, family: str = "siglip") -> RegionsObjective:
    """Naming on a tiny new tower of three layers and 64 patches."""
    torch.manual_seed(0)
    shape = ViTShape(family, 32, 3, 2, 8, SIDE)  # type: ignore[arg-type]
    objective = build(Settings(), Start(SIDE, new_tower(shape), tokenizer=tokenizer))
    freeze_all_but(objective, objective.trained_parameters())
    return objective.train()


def batch_of(objective: RegionsObjective, kind: str, count: int) -> dict[str, torch.Tensor]:
    pictures = ScenePictures(count, SIDE, "pictures", kinds=(kind,))  # type: ignore[arg-type]
    samples = [objective.sample(pictures[place], np.random.default_rng(0)) for place in range(count)]
    return dict(objective.collate(samples))


def test_the_words_of_a_page_lie_where_they_are_told() -> None:
    """Around each box there is nothing; within it something is written, and its word is the answer there."""
    for seed in range(20):
        scene = make_scene(seed, 320, "page")
        pixels = np.asarray(scene.image).astype(int)
        written = np.abs(pixels - np.median(pixels.reshape(-1, 3), axis=0)).sum(-1) > 60
        assert len(scene.regions) == 4
        for region in scene.regions:
            left, top, right, bottom = (round(share * 320) for share in region.box)
            assert written[top:bottom, left:right].mean() > 0.2, (seed, region)
            written[top - 2 : bottom + 2, left - 2 : right + 2] = False
        assert not written.any(), seed
        answers = {q.question[:-1].rsplit(" at the ")[1]: q.answer for q in scene.questions if q.kind == "word"}
        for corner, region in zip(("top left", "top right", "bottom left", "bottom right"), scene.regions, strict=True):
            assert region.words == (answers.get(corner, region.words[0]),)


@pytest.mark.parametrize("family", ["clip", "siglip", "dinov2", "vit"])
def test_the_loss_is_the_formula(family: str, tokenizer: PreTrainedTokenizerFast) -> None:
    """The mean, over patches in a region, of the cross-entropy shared out among its words; by plain loops."""
    objective = tiny_objective(tokenizer, family).eval()
    batch = batch_of(objective, "shapes", 3)
    with torch.no_grad():
        loss = float(objective(**batch)["regions_loss"])
        features = objective.tower.features(objective.tower.normalise(batch["views"]))
        expected, patches = 0.0, 0
        for row, regions in enumerate(batch["region_of"].tolist()):
            for patch, region in enumerate(regions):
                if region < 0:
                    continue
                feature = features[row, patch].double()
                feature = (feature - feature.mean()) / math.sqrt(float(feature.var(unbiased=False)) + 1e-5)
                scores = objective.names.weight.double() @ feature + objective.names.bias.double()
                words = [word for word in batch["region_said"][row, region].tolist() if word >= 0]
                cost = sum(float(scores.logsumexp(0) - scores[word]) for word in words)
                expected, patches = expected + cost / len(words), patches + 1
    assert patches > 10
    assert loss == pytest.approx(expected / patches, rel=1e-5)


def test_a_few_steps_read_a_page_and_move_what_is_looked_at(tokenizer: PreTrainedTokenizerFast) -> None:
    """Words are named, and what lies behind the features stays as it was, to the bit."""
    objective = tiny_objective(tokenizer)
    batch = batch_of(objective, "page", 6)
    before = {name: weight.detach().clone() for name, weight in objective.named_parameters()}
    optimiser = torch.optim.AdamW([p for p in objective.parameters() if p.requires_grad], lr=3e-3)
    named = []
    for _ in range(200):
        values = objective(**batch)
        optimiser.zero_grad()
        total_loss(values).backward()
        optimiser.step()
        named.append(float(values["regions_named"]))
    assert named[0] < 0.3 and named[-1] > 0.9
    moved = {name for name, weight in objective.named_parameters() if not weight.equal(before[name])}
    # A key's bias changes no attention, for softmax takes it out again; rounding may move it or not.
    assert moved | {name for name in before if name.endswith("k_proj.bias")} >= objective.trained_parameters() >= moved
    behind = {name for name in before if "layers.2." in name or "post_layernorm" in name or ".head." in name}
    assert behind and not behind & moved and "tower.model.embeddings.patch_embedding.weight" in moved


def test_micro_batches_are_one_batch(tokenizer: PreTrainedTokenizerFast) -> None:
    """The loss of eight pictures is that of their representations made four by four."""
    objective = tiny_objective(tokenizer).eval()
    batch = batch_of(objective, "page", 8)
    halves = [{name: value[part] for name, value in batch.items()} for part in (slice(4), slice(4, 8))]
    made = [objective(only_represent=True, **half) for half in halves]
    joined = {name: torch.cat([half[name] for half in made]) for name in made[0]}
    torch.testing.assert_close(objective(representations=joined), objective(**batch))


def test_what_does_not_fit_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    nothing = Picture("holiday.jpg", torch.zeros(3, SIDE, SIDE, dtype=torch.uint8))
    with pytest.raises(DataError, match=r"holiday\.jpg has no regions"):
        tiny_objective(tokenizer).sample(nothing, np.random.default_rng(0))
    with pytest.raises(ValueError, match="no tokenizer was given"):
        build(Settings(), Start(SIDE, new_tower(ViTShape("siglip", 32, 2, 2, 8, SIDE))))
    with pytest.raises(ValueError, match="it is a ResNet"):
        build(Settings(), Start(SIDE, new_tower(ResNetShape(18, SIDE)), tokenizer=tokenizer))
    with pytest.raises(ValueError, match="does not divide into patches of 8"):
        build(Settings(), Start(60, new_tower(ViTShape("siglip", 32, 2, 2, 8, SIDE)), tokenizer=tokenizer))


def test_a_tower_takes_the_place_of_a_models_own(plain: Path, tmp_path: Path) -> None:
    """The answer is then that of the other tower; one of another shape, or for an adapter, is refused."""
    torch.manual_seed(1)
    other = new_tower(ViTShape("siglip", 64, 3, 2, 16, 160))
    other.save(tmp_path / "other")
    said: dict[str, Any] = {"kind": "instruct", "name": "x", "start_from": str(plain), "tower": str(tmp_path / "other")}
    said |= {"trains": ["projector"], "mixture": [{"scenes": 4, "weight": 1}], "held_out": [{"scenes": 4, "weight": 1}]}
    said |= {"schedule": {"steps": 1, "batch_size": 2, "learning_rate": 1e-3}}
    stage = InstructStage.model_validate(said)
    model = build_instruct_objective(stage, Path).model
    theirs = other.model.state_dict()
    for name, weight in model.model.vision_tower.state_dict().items():
        assert weight.equal(theirs[name])
    own = load_llava(plain)[0]
    assert model.model.language_model.embed_tokens.weight.equal(own.model.language_model.embed_tokens.weight)
    narrow = new_tower(ViTShape("siglip", 32, 3, 2, 16, 160)).model
    with pytest.raises(ModelError, match=r"of width 32 cannot take the place of .* of width 64"):
        replace_tower(own, narrow)
    with pytest.raises(RecipeError, match=r"stage x: a CLIPVisionModel of width 64 cannot take the place"):
        new_tower(ViTShape("clip", 64, 3, 2, 16, 160)).save(tmp_path / "clip")
        build_instruct_objective(stage.model_copy(update={"tower": str(tmp_path / "clip")}), Path)
    with pytest.raises(ValidationError, match="another tower make a new base"):
        InstructStage.model_validate(said | {"trains": ["language"], "lora": {}})
    with pytest.raises(ValidationError, match="name either start_from"):
        InstructStage.model_validate(said | {"language_model": "x"})


def test_the_recipe_reads_and_goes_on_with_what_it_read(plain: Path, tmp_path: Path) -> None:
    """In its two-step form: the tower that learned letters is the one that answers."""
    recipe = rehearsal(read_recipe("joey-tiles"))
    letters = recipe.stages[0]
    assert isinstance(letters, TowerStage) and letters.objective == "regions"
    stages = [
        stage.model_copy(update={"start_from": str(plain)}) if stage.start_from == "joey" else stage  # type: ignore[union-attr]
        for stage in recipe.stages[:2]
    ]
    recipe = recipe.model_copy(update={"stages": tuple(stages), "publish": "reading", "dtype": "float32"})
    folder = run_recipe(recipe, None, tmp_path)
    learned = load_tower(tmp_path / recipe.name / "letters" / "output")
    assert isinstance(learned, Tower)
    own = load_llava(plain)[0].model.vision_tower.state_dict()
    published = load_llava(folder)[0].model.vision_tower.state_dict()
    for name, weight in learned.model.state_dict().items():
        assert weight.equal(published[name])
    assert not own["embeddings.patch_embedding.weight"].equal(published["embeddings.patch_embedding.weight"])
    asked = Request("What word is at the top left?", (make_scene(1, 160, "page").image,))
    assert len(Assistant.load(folder).answer_batch([asked], 4)) == 1
