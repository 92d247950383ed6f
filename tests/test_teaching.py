"""Join, align and tune as a person does: parts that never met, a csv of questions, and the recipes of LLaVA-1.5."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from typer.testing import CliRunner

from assistant.answering import Assistant, Request
from assistant.chat import assistant_message, encode_conversation, user_message
from assistant.checkpoint import load_llava
from assistant.fusion import join
from assistant.hashing import file_hash
from assistant.language_models import load_language_model
from assistant.merging import merge
from assistant.models import EMBEDDER, JOEY, ModelError
from assistant.projectors import PROJECTORS, Projector, calibrate_projector, picture_features, picture_tokens
from assistant.towers import ViTShape, load_tower, new_tower
from tests.question_rows import write_question_rows
from tests.test_fusion import published_keys
from tests.tiny import TowerFamily, make_tiny_language_model, make_tiny_llava, make_tiny_tokenizer
from training.config import InstructStage, Recipe, RecipeError, read_recipe, rehearsal
from training.data.scenes import make_scene
from training.joining import join_models
from training.objectives.instruct import tokens_per_picture
from training.recipe import run_recipe
from training.teaching import Wish, default_rate, plan_of, teach, teaching_recipe
from ui.command_line import app

SIDE = 32
LLAVA = ("llava-1.5-7b", "llava-1.5-7b-lora", "llava-1.5-7b-qlora", "llava-1.5-7b-24gb")


def words_of_scenes() -> list[str]:
    return [caption for seed in range(60) for caption in make_scene(seed).captions]


def plain_tokenizer(special: tuple[str, ...], template: str | None = None) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer that has never heard of pictures, with the special tokens of its model."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        words_of_scenes(), trainers.BpeTrainer(vocab_size=400, special_tokens=list(special), initial_alphabet=alphabet)
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=special[-1], chat_template=template)
    if special[0] == "<unk>":
        fast.add_special_tokens({"unk_token": "<unk>", "bos_token": "<s>"})
    return fast


SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
}


def make_vicuna(folder: Path) -> Path:
    """Tiny and random in Vicuna's layout: an untied Llama in float16, no padding token, no picture, no template."""
    tokenizer = plain_tokenizer(("<unk>", "<s>", "</s>"))
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **SMALL)).half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_qwen(folder: Path) -> Path:
    """Tiny and random in Qwen2.5's layout: tied, more rows than words, a template that reads texts alone."""
    template = "{% for m in messages %}<|im_start|>{{ m['role'] + '\n' + m['content'] }}<|im_end|>\n{% endfor %}"
    tokenizer = plain_tokenizer(("<|endoftext|>", "<|im_start|>", "<|im_end|>"), template)
    tokenizer.add_special_tokens({"pad_token": "<|endoftext|>"})
    rows = len(tokenizer) + 40
    Qwen2ForCausalLM(Qwen2Config(vocab_size=rows, tie_word_embeddings=True, **SMALL)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_clip(folder: Path) -> Path:
    """Tiny and random in the layout of openai/clip-vit-large-patch14-336: both halves, and a processor that crops."""
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
    vision |= {"image_size": SIDE, "patch_size": 8}
    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=16)).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The parts of LLaVA-1.5 and a Qwen, tiny, in the published layouts."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("parts")
    return {
        "clip": make_clip(folder / "clip"),
        "vicuna": make_vicuna(folder / "vicuna"),
        "qwen": make_qwen(folder / "qwen"),
    }


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    return make_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A csv of 50 questions about pictures, as a person would write it."""
    return write_question_rows(tmp_path_factory.mktemp("questions") / "rows", 50)


@pytest.mark.parametrize("family", ["clip", "siglip", "dinov2"])
@pytest.mark.parametrize("projector", PROJECTORS)
def test_every_projector_leaves_in_a_published_layout(
    projector: Projector, family: TowerFamily, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """transformers alone loads it and computes the same picture tokens, as many as its processor writes places."""
    torch.manual_seed(0)
    tower = new_tower(ViTShape(family, 32, 3, 2, 8, SIDE))
    model, processor = join(
        tower.model, make_tiny_language_model(tokenizer), tokenizer, tower.image_processor, projector
    )
    pixels = torch.randn(4, 3, SIDE, SIDE)
    calibrate_projector(model.eval(), pixels)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    with torch.no_grad():
        ours = picture_tokens(model, picture_features(model, pixels))
        theirs = AutoModelForImageTextToText.from_pretrained(tmp_path).get_image_features(pixels).pooler_output
    torch.testing.assert_close(ours, torch.stack(list(theirs)))
    assert abs(float(ours.mean())) < 0.2 and 0.5 < float(ours.std()) < 2
    count = 4 if projector == "pixel-shuffle" else 16
    loaded = AutoProcessor.from_pretrained(tmp_path)
    ids = loaded(images=[make_scene(1).image], text="<image>What?", add_special_tokens=False)["input_ids"][0]
    assert ids.count(tokenizer.convert_tokens_to_ids("<image>")) == count == ours.shape[1] == tokens_per_picture(loaded)


def test_pixel_shuffle_puts_neighbours_together(tokenizer: PreTrainedTokenizerBase) -> None:
    """The formula in plain loops: one token reads the four patches of its own square and no other."""
    tower = new_tower(ViTShape("siglip", 32, 2, 2, 8, SIDE))
    model, _ = join(tower.model, make_tiny_language_model(tokenizer), tokenizer, tower.image_processor, "pixel-shuffle")
    features = torch.arange(16.0)[None, :, None].expand(1, 16, 32)
    shuffled = model.model.multi_modal_projector.pixel_shuffle(features)
    for row in range(2):
        for column in range(2):
            square = {4 * (2 * row + down) + 2 * column + right for down in (0, 1) for right in (0, 1)}
            assert set(shuffled[0, row, column].tolist()) == square


def test_a_linear_projector_is_linear(tokenizer: PreTrainedTokenizerBase) -> None:
    tower = new_tower(ViTShape("siglip", 32, 2, 2, 8, SIDE))
    model, _ = join(tower.model, make_tiny_language_model(tokenizer), tokenizer, tower.image_processor, "linear")
    first, second = torch.randn(2, 1, 16, 32)
    with torch.no_grad():
        zero = picture_tokens(model, torch.zeros(1, 16, 32))
        together = picture_tokens(model, 2 * first - second)
        apart = 2 * picture_tokens(model, first) - picture_tokens(model, second)
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(zero[0, 0], model.model.multi_modal_projector.linear_1.bias)


def test_what_does_not_fit_says_so(parts: dict[str, Path], tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    odd = new_tower(ViTShape("siglip", 32, 2, 2, 8, 40))
    with pytest.raises(ModelError, match="2 x 2 patches, and this tower sees 5 x 5"):
        join(odd.model, make_tiny_language_model(tokenizer), tokenizer, odd.image_processor, "pixel-shuffle")
    GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=500)).save_pretrained(tmp_path)
    plain_tokenizer(("<unk>", "<s>", "</s>")).save_pretrained(tmp_path)
    with pytest.raises(
        ModelError, match="holds a gpt2, no language model that can be joined; these are: llama, mistral"
    ):
        load_language_model(tmp_path)
    with pytest.raises(ModelError, match=r"lacks tokenizer\.json"):
        load_language_model(parts["clip"])
    with pytest.raises(ModelError, match=r"lacks preprocessor_config\.json"):
        join_models(str(parts["qwen"]), str(parts["vicuna"]), tmp_path / "out")


@pytest.mark.parametrize(("name", "end"), [("vicuna", "</s>"), ("qwen", "<|im_end|>")])
def test_a_language_model_gets_room_for_pictures(name: str, end: str, parts: dict[str, Path]) -> None:
    """A picture token, a padding token, and a template whose answers end as the model was taught to end them."""
    model, tokenizer = load_language_model(parts[name])
    assert len(tokenizer) <= model.config.vocab_size == model.get_output_embeddings().weight.shape[0]
    assert tokenizer.pad_token is not None
    messages = [
        user_message("What is it?", 2),
        assistant_message("a red circle"),
        user_message("More?"),
        assistant_message("no"),
    ]
    encoded = encode_conversation(tokenizer, messages, 3)
    assert encoded.ids.count(tokenizer.convert_tokens_to_ids("<image>")) == 6
    learned = tokenizer.decode([i for i, s in zip(encoded.ids, encoded.supervised, strict=True) if s])
    assert learned.split(end) in ([" a red circle", " no", ""], ["a red circle", "no", ""])
    asked = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, tokenize=False)
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    assert whole.startswith(asked)


def test_the_command_joins_what_align_takes(parts: dict[str, Path], tmp_path: Path) -> None:
    """And says what to do next; it never writes over something."""
    out = tmp_path / "joined"
    said = CliRunner().invoke(app, ["join", str(parts["clip"]), str(parts["qwen"]), "--out", str(out)])
    assert said.exit_code == 0, said.output
    assert "a picture is 16 tokens" in said.output and f"kangaroo align {out}" in said.output.replace("\n", "")
    assert Assistant.load(out).answer_batch([Request("What?", (make_scene(1).image,))], max_new_tokens=2)
    again = CliRunner().invoke(app, ["join", str(parts["clip"]), str(parts["qwen"]), "--out", str(out)])
    assert again.exit_code == 1


def test_align_on_a_csv_moves_the_projector_alone(rows: Path, tmp_path: Path) -> None:
    model = make_tiny_llava(tmp_path / "model")
    recipe = teaching_recipe(Wish(str(model), str(rows), "align", tmp_path / "out", steps=2, batch_size=4))
    result = teach(recipe, tmp_path)
    before, after = (load_file(folder / "model.safetensors") for folder in (model, result))
    assert {key for key in before if not torch.equal(before[key], after[key])} == {
        key for key in before if key.startswith("multi_modal_projector.")
    }


def test_a_taught_joey_still_finds_and_names_pictures(rows: Path, tmp_path: Path) -> None:
    """The embedder beside the base, which is a model of its own, stands beside the taught and the merged one too."""
    recipe = teaching_recipe(Wish(None, str(rows), "lora", tmp_path / "out", steps=1, batch_size=1))
    taught = teach(recipe, tmp_path)
    merge(taught / "adapter", tmp_path / "merged", [Request("What?", (make_scene(1).image,))])
    wanted = {file.name: file_hash(file) for file in (JOEY / EMBEDDER).iterdir()}
    for folder in (taught, tmp_path / "merged"):
        assert {file.name: file_hash(file) for file in (folder / EMBEDDER).iterdir()} == wanted


def test_tune_shows_what_it_will_do_and_does_it(rows: Path, tmp_path: Path) -> None:
    """The whole command: a table with full paths, a rehearsal, the run, and a model that answers, with its adapter."""
    model = make_tiny_llava(tmp_path / "model")
    asked = ["tune", str(model), "--data", str(rows), "--steps", "2", "--batch", "4", "--out", str(tmp_path / "out")]
    dry = CliRunner().invoke(app, [*asked, "--dry-run"], env={"COLUMNS": "200"})
    assert dry.exit_code == 0, dry.output
    assert "model.language_model.layers.{0..1}.self_attn.q_proj" in dry.output
    assert "4 lessons" in dry.output and "GiB" in dry.output and "s a step, measured" in dry.output
    assert not (tmp_path / "out" / "model").exists()
    said = CliRunner().invoke(app, asked, env={"COLUMNS": "200"})
    assert said.exit_code == 0, said.output
    result = tmp_path / "out" / "model"
    assert f"kangaroo chat {result}" in said.output.replace("\n", "")
    assert (result / "adapter" / "adapter_model.safetensors").is_file()
    before, after = (load_file(folder / "model.safetensors") for folder in (model, result))
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    assert moved and all(".layers." in key and key.startswith("language_model.") for key in moved)
    assert Assistant.load(result).answer_batch([Request("What?", (make_scene(1).image,))], max_new_tokens=2)


def test_wishes_that_make_no_sense_are_refused(rows: Path, tmp_path: Path) -> None:
    refused = CliRunner().invoke(app, ["tune", "--data", str(rows), "--lora", "--full"])
    assert refused.exit_code == 1
    model = make_tiny_llava(tmp_path / "model")
    with pytest.raises(RecipeError, match="say --steps or --epochs"):
        teaching_recipe(Wish(str(model), str(rows), "lora", tmp_path / "out", steps=2, epochs=1.0))
    assert (
        default_rate("lora", 4096) == 2e-4 and default_rate("full", 4096) == 2e-5 and default_rate("align", 64) == 1e-3
    )
    assert default_rate("full", 2048) == pytest.approx(4e-5)


def test_the_plan_counts_what_torch_counts(rows: Path, tmp_path: Path) -> None:
    model = make_tiny_llava(tmp_path / "model")
    recipe = teaching_recipe(Wish(str(model), str(rows), "full", tmp_path / "out", steps=3, batch_size=2))
    plan = plan_of(recipe, tmp_path)
    loaded, _ = load_llava(model)
    parts = (loaded.model.vision_tower, loaded.model.multi_modal_projector, loaded.model.language_model)
    assert [part.weights for part in plan.parts] == [sum(p.numel() for p in part.parameters()) for part in parts]
    trained = sum(part.weights for part in plan.parts[1:])
    assert [part.trained for part in plan.parts] == [0, plan.parts[1].weights, plan.parts[2].weights]
    assert plan.held_bytes == pytest.approx(4 * sum(part.weights for part in plan.parts) + 12 * trained, rel=0.01)
    assert plan.kept_bytes > 0 and plan.seconds > 0 and 0 < plan.supervised < plan.tokens


def conversations_of(rows: Path, file: Path) -> None:
    """The same rows in LLaVA's own form, three in a dialogue about one picture and one without a picture."""
    with rows.open(newline="") as opened:
        read = list(csv.DictReader(opened))
    made: list[dict[str, Any]] = [
        {"id": f"{n}", "image": row["image"], "conversations": turns(f"<image>\n{row['question']}", row["answer"])}
        for n, row in enumerate(read)
    ]
    made[3]["conversations"] += turns("And why?", "because it is so")
    made.append({"id": "text", "conversations": turns("Say hello.", "hello")})
    file.write_text(json.dumps(made))


def turns(question: str, answer: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def with_local_names(recipe: Recipe, parts: dict[str, Path], finished: Path, data: Path) -> Recipe:
    """The recipe on tiny parts and on `data`, otherwise as it is shipped."""
    local = {
        "openai/clip-vit-large-patch14-336": str(parts["clip"]),
        "lmsys/vicuna-7b-v1.5": str(parts["vicuna"]),
        "llava-hf/llava-1.5-7b-hf": str(finished),
    }
    stages = []
    for stage in recipe.stages:
        assert isinstance(stage, InstructStage)
        named = {
            key: local.get(getattr(stage, key) or "", getattr(stage, key))
            for key in ("tower", "language_model", "start_from")
        }
        source = stage.conversations[0].model_copy(update={"conversations": str(data), "pictures": str(data.parent)})
        schedule = stage.schedule.model_copy(update={"accumulation": 2, "workers": 0})
        stages.append(stage.model_copy(update={**named, "conversations": (source,), "schedule": schedule}))
    return recipe.model_copy(update={"stages": tuple(stages)})


@pytest.mark.parametrize("name", LLAVA)
def test_the_recipes_of_llava_run_on_its_layouts(name: str, parts: dict[str, Path], rows: Path, tmp_path: Path) -> None:
    """Two steps of each stage on tiny checkpoints in the layouts they name; what comes out is llava-hf's layout."""
    if "qlora" in name or "24gb" in name:
        pytest.importorskip("bitsandbytes")
    finished = tmp_path / "llava"
    join_models(str(parts["clip"]), str(parts["vicuna"]), finished)
    data = rows.parent / "conversations.json"
    conversations_of(rows, data)
    recipe = rehearsal(with_local_names(read_recipe(name), parts, finished, data))
    result = run_recipe(recipe, data.parent, tmp_path / "runs")
    weights = load_file(result / "model.safetensors")
    clip = {"embeddings.class_embedding", "embeddings.patch_embedding.weight", "embeddings.position_embedding.weight"}
    clip |= {"pre_layrnorm.weight", "pre_layrnorm.bias"}
    assert set(weights) == published_keys(clip, 3) | {"language_model.lm_head.weight"}
    start = load_file(finished / "model.safetensors")
    assert all(torch.equal(start[key].bfloat16(), weights[key]) for key in start if key.startswith("vision_tower."))
    assert (result / "adapter").is_dir() == (name != "llava-1.5-7b")
    assert (result / "base").is_dir() == (name in ("llava-1.5-7b-lora", "llava-1.5-7b-qlora"))
    processor = AutoProcessor.from_pretrained(result)
    assert not processor.image_processor.do_center_crop  # pictures are squeezed when it answers, as when it was taught
    assert load_tower(result).image_side == SIDE


def test_the_recipes_say_what_was_published() -> None:
    """Table 9 of Liu et al. 2023, and the scripts: rate, samples of a step, warm-up, length, rank."""
    align, tune = read_recipe("llava-1.5-7b").stages
    lora = read_recipe("llava-1.5-7b-lora").stages[1]
    assert isinstance(align, InstructStage) and isinstance(tune, InstructStage) and isinstance(lora, InstructStage)
    for stage, samples, rate, rows in (
        (align, 256, 1e-3, 558_128),
        (tune, 128, 2e-5, 665_298),
        (lora, 128, 2e-4, 665_298),
    ):
        schedule = stage.schedule
        assert schedule.batch_size * schedule.accumulation == samples and schedule.learning_rate == rate
        assert schedule.steps == -(-rows // samples) and schedule.final_rate == schedule.weight_decay == 0
        assert schedule.warmup_steps == -(-schedule.steps * 3 // 100) and stage.longest == 2048
    assert align.trains == ("projector",) and tune.trains == ("projector", "language")
    assert lora.lora is not None and (lora.lora.rank, lora.lora.alpha) == (128, 256)
    assert lora.rates["projector"] * lora.schedule.learning_rate == pytest.approx(2e-5)
