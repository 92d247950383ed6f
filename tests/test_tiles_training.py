"""Tiles from the command to a taught model: join, data of people, recipes, scenes with small words, and the proof."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from safetensors.torch import load_file
from typer.testing import CliRunner

from assistant.answering import Assistant, Request
from assistant.checkpoint import load_llava
from assistant.models import JOEY, find_model
from scripts.prove_tiles import changed, without_tiles
from scripts.prove_tiles import main as prove
from tests.scene_reader import read, see
from tests.test_tiles import make_tiny_tiled
from tests.tiny import make_tiny_joined, make_tiny_language_model
from training.adapters import LoraSettings
from training.config import InstructStage, PictureSource, Recipe, RecipeError, read_recipe, rehearsal
from training.data.check_samples import shown_samples
from training.data.conversation_lessons import ConversationLessons
from training.data.data_check import check_data
from training.data.lesson_judge import LessonJudge, judge_for
from training.data.picture_references import PictureFinder
from training.data.recognise import recognise
from training.data.samples import SceneLessons
from training.data.scene_captions import joined
from training.data.scene_facts import CORNERS, SMALL_WORDS
from training.data.scenes import make_scene
from training.instruct_start import build_instruct_objective
from training.lessons import pack
from training.recipe import run_recipe, run_stage
from training.stages import Workshop
from training.teaching import Wish, plan_of, teach, teaching_recipe
from ui.command_line import app

SIZES = ((160, 160), (320, 300), (90, 640), (700, 210), (33, 40), (2100, 1050))
WIDE = {"COLUMNS": "250"}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny LLaVA without tiles."""
    folder = tmp_path_factory.mktemp("plain")
    make_tiny_joined("siglip", folder)
    return folder


@pytest.fixture(scope="module")
def tiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiled")
    make_tiny_tiled("siglip", folder)
    return folder / "tiled"


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A csv of pictures of many sizes, one of them larger than any picture is answered about."""
    folder = tmp_path_factory.mktemp("rows")
    with (folder / "rows.csv").open("w", newline="") as sink:
        table = csv.writer(sink)
        table.writerow(["image", "question", "answer"])
        for number, (height, width) in enumerate(SIZES):
            noise = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
            Image.fromarray(noise).save(folder / f"{number}.png")
            table.writerow([f"{number}.png", f"What is in number {number}?", f"thing {number}"])
    return folder / "rows.csv"


def said(*words: str | Path) -> tuple[int, str]:
    """Exit code and output of the command."""
    result = CliRunner().invoke(app, [str(word) for word in words], env=WIDE)
    return result.exit_code, " ".join(result.output.split())


def test_join_gives_tiles_to_a_llava_that_has_none(plain: Path, tmp_path: Path) -> None:
    """Every weight is as it was, and pictures are cut; it never writes over something."""
    code, output = said("join", plain, "--tiles", "1x2, 2x2", "--out", tmp_path / "tiles")
    assert code == 0, output
    assert "A picture is up to 520 tokens now" in output and f"kangaroo tune {tmp_path / 'tiles'} --full" in output
    before, after = (load_file(folder / "model.safetensors") for folder in (plain, tmp_path / "tiles"))
    assert after.keys() - before.keys() == {"image_newline"}
    assert all(after[name].equal(value) for name, value in before.items())
    assistant = Assistant.load(tmp_path / "tiles")
    assert assistant.answer_batch([Request("What?", (make_scene(1, 320).image,))], max_new_tokens=2)
    assert said("join", plain, "--tiles", "1x2", "--out", tmp_path / "tiles")[0] == 1


def test_join_joins_parts_with_tiles(plain: Path, tmp_path: Path) -> None:
    """From a tower and a language model, with a new projector that align can teach."""
    processor = load_llava(plain)[1]
    words = tmp_path / "words"
    processor.tokenizer.save_pretrained(words)
    make_tiny_language_model(processor.tokenizer).save_pretrained(words)
    code, output = said("join", plain, words, "--tiles", "2x1", "--out", tmp_path / "joined")
    assert code == 0, output
    assert "a picture is up to 320 tokens" in output
    assert type(load_llava(tmp_path / "joined")[0]).__name__ == "LlavaNextForConditionalGeneration"


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ((), "name the language model that joins the tower, or the --tiles"),
        (("--tiles", "2by2"), "--tiles 2by2: write grids as rows x columns"),
        (("--tiles", "0x2"), "--tiles 0x2: write grids as rows x columns"),
        (("--tiles", "1x2,,2x2"), "--tiles 1x2,,2x2: write grids"),
        (("--tiles", "9x9"), "the language model reads 1,024 with its words; take smaller grids"),
    ],
)
def test_join_says_what_is_wrong_with_tiles(words: tuple[str, ...], reason: str, plain: Path, tmp_path: Path) -> None:
    code, output = said("join", plain, *words, "--out", tmp_path / "out")
    assert code == 1 and reason in output
    assert not (tmp_path / "out").exists()


def test_data_is_checked_with_the_tokens_that_it_will_have(rows: Path, tiled: Path) -> None:
    """Lengths are those of training, of the processor, and of what is shown; a row that is too long is refused."""
    judge, _ = judge_for(str(tiled))
    opened = recognise(rows)
    finder = PictureFinder(opened.base)
    check = check_data(opened, finder, judge)
    lessons = ConversationLessons(opened, finder, judge)
    processor = load_llava(tiled)[1]
    expected = []
    for place in range(len(SIZES)):
        lesson = lessons.sample(place, np.random.default_rng(0))
        text = processor.apply_chat_template(list(lesson.messages), tokenize=False)
        ids = processor(text=text, images=list(lesson.views), add_special_tokens=False)["input_ids"][0]
        assert pack(lesson, processor, 1500).ids.tolist() == list(ids)
        expected.append(len(ids))
    assert check.lengths == expected and len(set(expected)) > 4
    assert [tuple(lessons.sample(n, np.random.default_rng(0)).views[0].shape[1:]) for n in (1, 5)] == [
        (320, 300),
        (2048, 1024),  # no picture is answered about in more
    ]
    shown = shown_samples(check, opened, judge, 10)
    assert [one.tokens for one in shown] == expected
    assert all(sum(piece.is_picture for piece in one.pieces) == 1 for one in shown)
    strict = LessonJudge(processor, 300)
    faults = [finding.fault for finding in check_data(opened, finder, strict).findings]
    assert {fault.kind for fault in faults} == {"too long"} and len(faults) == sum(n > 300 for n in expected)
    assert any("(1 x 480 for pictures), over 300" in fault.wrong for fault in faults)


def tiny_recipe(start: Path) -> Recipe:
    """The shipped recipe in its two-step form, from another model than Joey."""
    return changed(rehearsal(read_recipe("joey-tiles")), str(start), None, 2)


def test_the_recipe_runs_and_goes_on_as_if_it_never_stopped(plain: Path, tmp_path: Path) -> None:
    """From a plain model; what comes out is tiled, moved wherever an answer hangs on it, and resumes exactly."""
    recipe = tiny_recipe(plain)
    model = run_recipe(recipe, None, tmp_path)
    before, after = (load_file(folder / "model.safetensors") for folder in (plain, model))
    stage, folder = recipe.stages[-1], tmp_path / recipe.name
    output = load_file(folder / stage.name / "output" / "model.safetensors")
    still = {name for name, value in before.items() if output[name].equal(value)}
    assert still and all(".layers.2." in name or "post_layernorm" in name for name in still)
    assert "image_newline" in after
    shutil.copytree(folder, tmp_path / "again" / recipe.name)
    again = tmp_path / "again" / recipe.name
    (again / stage.name / "done.json").unlink()
    shutil.rmtree(again / stage.name / "output")
    shutil.rmtree(again / stage.name / "checkpoints" / "checkpoint-2")
    run_stage(stage, Workshop(again, None))
    logged = [json.loads(line) for line in (again / stage.name / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in logged if "loss" in line] == [1, 2, 2], "it did not go on from step 1"
    resumed = load_file(again / stage.name / "output" / "model.safetensors")
    assert resumed.keys() == output.keys() and all(resumed[name].equal(value) for name, value in output.items())


@pytest.mark.parametrize("mode", ["align", "lora", "full"])
def test_a_tiled_model_is_taught(mode: str, rows: Path, tiled: Path, tmp_path: Path) -> None:
    """With the short commands; an adapter is merged into the tiled base, and each mode moves its own."""
    recipe = teaching_recipe(Wish(str(tiled), str(rows), mode, tmp_path / mode, steps=2, batch_size=2, replay=0.2))  # type: ignore[arg-type]
    plan = plan_of(recipe, tmp_path)
    model = teach(recipe, tmp_path)
    before, after = (load_file(folder / "model.safetensors") for folder in (tiled, model))
    moved = {name for name in before if not before[name].equal(after[name])}
    projector = {name for name in before if name.startswith(("multi_modal_projector.", "image_newline"))}
    language = {name for name in before if name.startswith("language_model.")}
    assert after.keys() == before.keys()
    assert moved & projector == (set() if mode == "lora" else projector)
    assert moved <= projector | language and bool(moved & language) == (mode != "align")
    if mode != "lora":
        newline = before["image_newline"].numel()
        assert plan.parts[1].trained == plan.parts[1].weights == sum(before[name].numel() for name in projector)
        assert newline == 64
    assert type(load_llava(model)[0]).__name__ == "LlavaNextForConditionalGeneration"


def stage_of(**said: object) -> InstructStage:
    """The recipe's stage, said otherwise."""
    stage = read_recipe("joey-tiles").stages[-1]
    return InstructStage.model_validate(stage.model_dump(exclude_unset=True) | said)


def test_a_recipe_says_what_does_not_fit(tiled: Path, plain: Path) -> None:
    with pytest.raises(ValidationError, match="tiles or another tower make a new base"):
        stage_of(lora=LoraSettings().model_dump())
    with pytest.raises(ValidationError, match="side is said of scenes only, not of a shard"):
        PictureSource(shard="flickr8k-train", side=320, weight=1.0)
    with pytest.raises(RecipeError, match=r"stage tiles: tiles are for a LLaVA .* has none yet"):
        build_instruct_objective(stage_of(start_from=str(tiled)), lambda name: name)
    kept = build_instruct_objective(stage_of(start_from=str(tiled), tiles=[[1, 2], [2, 1], [2, 2], [1, 3]]), str)
    assert type(kept.model).__name__ == "LlavaNextForConditionalGeneration"
    with pytest.raises(RecipeError, match=r"4,\d+ tokens, and the language model reads 1,024"):
        build_instruct_objective(stage_of(start_from=str(plain), tiles=[[6, 7]]), lambda name: name)


def test_both_ways_see_the_same_pictures() -> None:
    """The arm without tiles is the same recipe; its pictures are the same ones, made small."""
    recipe = read_recipe("joey-tiles")
    control = without_tiles(recipe)
    assert control.stages[:-1] == recipe.stages[:-1] and len(recipe.stages) == 3
    one, other = (each.stages[-1].model_dump() for each in (recipe, control))
    assert {key for key in one if one[key] != other[key]} == {"tiles", "name"} and other["tiles"] == ()
    assert (recipe.publish, control.publish) == (one["name"], other["name"])
    whole = SceneLessons(9, None, 5, ("small word",), 320).sample(2, np.random.default_rng(0))
    small = SceneLessons(9, 160, 5, ("small word",), 320).sample(2, np.random.default_rng(0))
    assert whole.views[0].shape == (3, 320, 320) and small.views[0].shape == (3, 160, 160)
    halved = torch.nn.functional.avg_pool2d(whole.views[0].float(), 2)
    assert float((halved - small.views[0].float()).abs().mean()) < 2
    assert whole.turns == small.turns
    with pytest.raises(ValueError, match="say how large they are drawn"):
        SceneLessons(9, None)


def test_a_small_word_is_small_and_true() -> None:
    """It is asked for by its kind alone, lies inside, is as high as told, and is what the first question asks."""
    words = set()
    for seed in range(60):
        scene = make_scene(seed, 320, "small word")
        pixels = np.asarray(scene.image, dtype=float)
        distance = np.abs(pixels - np.median(pixels[[0, -1]].reshape(-1, 3), axis=0)).sum(axis=2)
        down, across = np.nonzero(distance > 0.5 * distance.max())
        assert 12 <= down.max() - down.min() <= 24 and 24 <= across.max() - across.min() <= 56, seed
        assert min(down.min(), across.min()) > 4 and max(down.max(), across.max()) < 315
        assert scene.kind == "small word" and scene.questions[0].kind == "word"
        assert any(scene.questions[0].answer in caption for caption in scene.captions)
        words.add(scene.questions[0].answer)
    assert words == set(SMALL_WORDS)
    assert not any(make_scene(seed, 64).kind == "small word" for seed in range(300))


def test_a_page_has_a_word_in_each_corner() -> None:
    """Asked for by its place, within its quarter, and as high in 160 pixels as a small word in 320."""
    words, whole = set(), 0
    for seed in range(40):
        scene = make_scene(seed, 160, "page")
        asked = {question.question[:-1].rsplit(" at the ")[1]: question.answer for question in scene.questions
                 if question.kind == "word"}  # fmt: skip
        assert scene.questions[0].kind == "word" and asked.keys() <= set(CORNERS)
        if len(asked) == len(CORNERS):
            assert f"the words {joined([asked[corner] for corner in CORNERS])}" in " ".join(scene.captions)
            whole += 1
        for corner in CORNERS:
            down, across = ink_in(np.asarray(scene.image, dtype=float), corner)
            assert 12 <= down.max() - down.min() <= 24 and 24 <= across.max() - across.min() <= 56, (seed, corner)
        words |= set(asked.values())
    assert words == set(SMALL_WORDS) and whole > 30
    assert not any(make_scene(seed, 64).kind == "page" for seed in range(300))


def ink_in(pixels: np.ndarray, corner: str) -> tuple[np.ndarray, np.ndarray]:
    """The rows and columns of a quarter of the picture in which something is written."""
    half = len(pixels) // 2
    rows = slice(half, None) if "bottom" in corner else slice(half)
    columns = slice(half, None) if "right" in corner else slice(half)
    quarter = pixels[rows, columns]
    distance = np.abs(quarter - np.median(quarter.reshape(-1, 3), axis=0)).sum(axis=2)
    down, across = np.nonzero(distance > 0.5 * distance.max())
    return down, across


def test_a_small_shape_is_small_and_is_what_is_told() -> None:
    """A reader that shares no code with the generator sees it in the large picture, and answers what is asked."""
    for seed in range(12):
        scene = make_scene(seed, 640, "small shape")
        things = see(scene.image)
        assert len(things) == 1 and 0.06 < things[0].across < 0.13, seed
        for question in scene.questions:
            assert read(question.question, scene.image, things) == question.answer, (seed, question)


def test_joey_is_found_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As recipes and commands say it; a folder of that name goes before."""
    monkeypatch.chdir(tmp_path)
    assert find_model("joey") == JOEY
    shutil.copytree(JOEY, tmp_path / "joey", ignore=shutil.ignore_patterns("embedder"))
    assert find_model("joey") == Path("joey")


def test_the_proof_runs_from_end_to_end(plain: Path, tmp_path: Path) -> None:
    """In its two-step form on a tiny model: scores of three, with intervals, and a picture."""
    prove(out=tmp_path / "proof", unseen=2, steps=None, batch=2, start_from=str(plain), rehearse=True)
    report = json.loads((tmp_path / "proof" / "scores.json").read_text())
    assert [arm["name"] for arm in report["arms"]] == ["before", "without tiles", "with tiles"]
    assert [arm["largest_picture"] for arm in report["arms"]] == [100, 100, 520]
    for arm in report["arms"]:
        assert arm["read"].keys() == {"small word", "small shape"}
        for one in arm["read"].values():
            assert one["accuracy"]["questions"] == 2
            assert 0 <= one["interval"][0] <= one["accuracy"]["right"] <= one["interval"][1] <= 1
    assert Image.open(tmp_path / "proof" / "tiles.png").size == (1200, 400)
