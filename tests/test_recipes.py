"""Every stage of every shipped recipe runs, resumes exactly, and leaves what the next one and a user can load."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor

from assistant.answering import Assistant, Request
from assistant.models import EMBEDDER, JOEY
from tests.shards import write_shards
from training.config import (
    RECIPES,
    Recipe,
    RecipeError,
    TokenizerStage,
    TowerStage,
    check_settings,
    read_recipe,
    rehearsal,
)
from training.data.pictures import DataError
from training.data.scenes import make_scene
from training.recipe import model_taught, run_recipe, run_stage
from training.stages import Workshop

SHIPPED = sorted(path.stem for path in RECIPES.glob("*.yaml"))
TOWERS = [name for name in SHIPPED if all(isinstance(stage, TowerStage) for stage in read_recipe(name).stages)]
# Those of LLaVA start from models of the hub; tests/test_teaching.py runs them on tiny ones in the same layouts.
ASSISTANTS = [n for n in SHIPPED if any(isinstance(stage, TokenizerStage) for stage in read_recipe(n).stages)]
SMALL_SETTINGS = {"small_side": 16, "small_count": 1, "prototypes": 24, "head_hidden": 32, "decoder_layers": 1}


@pytest.fixture(scope="module", params=ASSISTANTS)
def rehearsed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, Path, Path]:
    """The two-step form of a shipped recipe, its data folder, and the folder it ran in."""
    recipe = rehearsal(read_recipe(request.param))
    folder = tmp_path_factory.mktemp(request.param)
    data = write_shards(folder / "data", recipe)
    run_recipe(recipe, data, folder / "runs")
    return recipe, data, folder / "runs" / recipe.name


def test_the_shipped_recipes_are_these() -> None:
    """Both recipes of the README are shipped, and one for each objective that trains a tower.

    Regions are told of generated scenes only; the recipe joey-tiles names them (tests/test_regions.py).
    """
    assert ASSISTANTS == ["joey", "scenes"]
    objectives = {file.stem for file in (RECIPES.parent / "objectives").glob("*.py")}
    assert set(TOWERS) == objectives - {"__init__", "instruct", "language", "regions"}


def smaller(recipe: Recipe) -> Recipe:
    """The same tower recipe on small pictures, with a small new tower and small heads."""
    stage = recipe.stages[0]
    assert isinstance(stage, TowerStage)
    said = stage.model_dump(exclude_unset=True)
    fields = type(check_settings(stage.objective, {})).model_fields
    said["settings"] |= {key: value for key, value in SMALL_SETTINGS.items() if key in fields}
    small = {"image_side": 32, "patch": 8, "width": 32, "layers": 2, "heads": 2}
    said["backbone"] |= {"image_side": 32, "depth": 18} if said["backbone"]["family"] == "resnet" else small
    said["schedule"] |= {"workers": 0}
    return recipe.model_copy(update={"stages": (TowerStage.model_validate(said | {"side": 32}),)})


@pytest.mark.parametrize("name", TOWERS)
def test_a_tower_recipe_runs_on_a_folder_of_pictures(name: str, tmp_path: Path) -> None:
    """Given a folder with a few pictures and captions, each shipped recipe leaves a tower that transformers loads."""
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    scenes = [make_scene(seed) for seed in range(9)]
    for scene in scenes:
        scene.image.save(pictures / f"{scene.seed}.png")
    lines = [json.dumps({"image": f"{scene.seed}.png", "caption": scene.captions[0]}) for scene in scenes]
    (pictures / "captions.jsonl").write_text("\n".join(lines))
    recipe = smaller(rehearsal(read_recipe(name)))
    run_recipe(recipe, pictures, tmp_path / "runs")
    model = tmp_path / "runs" / recipe.name / "model"
    assert AutoModel.from_pretrained(model).config.model_type
    assert len(json.loads((model / "provenance.json").read_text())["data"]) == 1


@pytest.mark.parametrize(
    ("name", "found"),
    [("prefer-joey", JOEY), ("reinforce-joey", JOEY), ("joey-tiles", JOEY), ("joey", None), ("dino", None)],
)
def test_a_recipe_knows_which_model_it_goes_on_from(name: str, found: Path | None, tmp_path: Path) -> None:
    assert model_taught(read_recipe(name), Workshop(tmp_path, None)) == found


def test_the_result_answers_and_loads_without_our_code(rehearsed: tuple[Recipe, Path, Path]) -> None:
    """The published folder is complete for us and for transformers, and says where it came from."""
    recipe, _, runs = rehearsed
    model = runs / "model"
    assistant = Assistant.load(model)
    answer = assistant.answer_batch([Request("What is this?", (make_scene(1).image,))], max_new_tokens=4)
    assert len(answer) == 1
    assert AutoModelForImageTextToText.from_pretrained(model).config.model_type == "llava"
    assert AutoModel.from_pretrained(model / EMBEDDER).config.model_type == "siglip"
    assert AutoProcessor.from_pretrained(model / EMBEDDER).tokenizer.padding_side == "right"
    keys = load_file(model / "model.safetensors")
    assert any(key.startswith("vision_tower.vision_model.embeddings.") for key in keys)
    provenance = json.loads((model / "provenance.json").read_text())
    assert set(provenance["stages"]) == {stage.name for stage in recipe.stages}
    assert all(len(digest) == 64 for digest in provenance["data"].values())


def test_a_stage_that_was_stopped_ends_as_if_it_was_not(rehearsed: tuple[Recipe, Path, Path], tmp_path: Path) -> None:
    """Resuming each stage from its first checkpoint gives the very weights of the uninterrupted run."""
    recipe, data, runs = rehearsed
    again = tmp_path / recipe.name
    shutil.copytree(runs, again)
    for stage in recipe.stages[1:]:
        (again / stage.name / "done.json").unlink()
        shutil.rmtree(again / stage.name / "output")
        shutil.rmtree(again / stage.name / "checkpoints" / "checkpoint-2")
        run_stage(stage, Workshop(again, data))
        logged = [json.loads(line) for line in (again / stage.name / "log.jsonl").read_text().splitlines()]
        assert [line["step"] for line in logged if "loss" in line] == [1, 2, 2], "it did not go on from step 1"
        first = load_file(runs / stage.name / "output" / "model.safetensors")
        second = load_file(again / stage.name / "output" / "model.safetensors")
        assert first.keys() == second.keys()
        assert all(first[key].equal(second[key]) for key in first), f"stage {stage.name} differs after resuming"


def test_a_finished_stage_is_not_run_again(rehearsed: tuple[Recipe, Path, Path]) -> None:
    """Running the recipe a second time trains nothing."""
    recipe, data, runs = rehearsed
    logs = {stage.name: (runs / stage.name / "done.json").stat().st_mtime_ns for stage in recipe.stages}
    run_recipe(recipe, data, runs.parent)
    assert logs == {stage.name: (runs / stage.name / "done.json").stat().st_mtime_ns for stage in recipe.stages}


def test_each_stage_changes_what_it_trains_and_nothing_else(rehearsed: tuple[Recipe, Path, Path]) -> None:
    """Aligning moves the projector alone; the instructed model differs from the aligned one in the parts it names."""
    recipe, _, runs = rehearsed
    align = next(stage for stage in recipe.stages if stage.name == "align")
    aligned = load_file(runs / "align" / "output" / "model.safetensors")
    instructed = load_file(runs / "instruct" / "output" / "model.safetensors")
    tower = load_file(runs / str(getattr(align, "tower", None)) / "output" / "model.safetensors")
    language = load_file(runs / str(getattr(align, "language_model", None)) / "output" / "model.safetensors")
    for key, value in tower.items():
        if key.startswith("vision_model.") and ".head." not in key:
            assert aligned[f"vision_tower.{key}"].equal(value), f"align moved the tower: {key}"
    for key, value in language.items():
        assert aligned[f"language_model.{key}"].equal(value), f"align moved the language model: {key}"
    layers = AutoConfig.from_pretrained(runs / "align" / "output").vision_config.num_hidden_layers
    unused = (f"vision_tower.vision_model.encoder.layers.{layers - 1}.", "vision_tower.vision_model.post_layernorm.")
    for key, value in instructed.items():
        moved = not aligned[key].equal(value)
        assert moved != key.startswith(unused), f"{key} {'moved' if moved else 'did not move'}"


def test_a_missing_shard_is_named_before_the_first_step(tmp_path: Path) -> None:
    """No stage starts when a shard of a later one is missing, and the message tells the way out."""
    with pytest.raises(DataError, match=r"caltech101-train.*--data"):
        run_recipe(rehearsal(read_recipe("joey")), tmp_path, tmp_path / "runs")
    with pytest.raises(DataError, match="--data or KANGAROO_DATA"):
        run_recipe(rehearsal(read_recipe("joey")), None, tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_unknown_recipes_stages_and_keys_are_named(tmp_path: Path) -> None:
    """A typing error in a recipe is found by file and field."""
    with pytest.raises(RecipeError, match=r"no recipe jeoy.*joey"):
        read_recipe("jeoy")
    with pytest.raises(RecipeError, match=r"no stage 'tune'.*instruct"):
        run_recipe(rehearsal(read_recipe("scenes")), None, tmp_path, only="tune")
    text = (RECIPES / "scenes.yaml").read_text()
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(text.replace("length_power", "length_powder"))
    with pytest.raises(RecipeError, match=r"wrong.yaml: stages.4.instruct.length_powder"):
        read_recipe(str(wrong))
