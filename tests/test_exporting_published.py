"""A checkpoint in exactly the files of llava-hf/llava-1.5-7b-hf, tiny: read, adapted, merged, exported."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForImageTextToText

from assistant.answering import Assistant
from assistant.checkpoint import load_llava
from assistant.exporting import export_model
from assistant.log_probabilities import read
from assistant.merging import merge
from assistant.models import ModelError, find_model
from serving.model_folder import read_model_folder
from tests.tiny import make_tiny_joined
from training.check_questions import scene_requests

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def make_published(folder: Path) -> Path:
    """Two shards in float16, words apart from the head, a processor in two files, as published in 2023 and 2024."""
    torch.manual_seed(0)
    make_tiny_joined("clip", folder)
    weights = {key: value.half() for key, value in load_file(folder / "model.safetensors").items()}
    words = weights["language_model.model.embed_tokens.weight"]
    weights["language_model.lm_head.weight"] = (words + 0.1 * torch.randn_like(words)).half()
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    halves = {SHARDS[0]: names[: len(names) // 2], SHARDS[1]: names[len(names) // 2 :]}
    for file, keys in halves.items():
        save_file({key: weights[key] for key in keys}, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {key: file for file, keys in halves.items() for key in keys}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    _write_published_configs(folder)
    return folder


def _write_published_configs(folder: Path) -> None:
    """The fields that llava-hf's own files have, with our sizes."""
    config = json.loads((folder / "config.json").read_text())
    text, vision = config["text_config"], config["vision_config"]
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    published = {
        "architectures": ["LlavaForConditionalGeneration"],
        "ignore_index": -100,
        "image_token_index": config["image_token_index"],
        "model_type": "llava",
        "pad_token_id": config["pad_token_id"],
        "projector_hidden_act": "gelu",
        "text_config": {name: text[name] for name in (*sizes, "num_key_value_heads", "head_dim", "rms_norm_eps")}
        | {"_name_or_path": "lmsys/vicuna-7b-v1.5", "model_type": "llama", "torch_dtype": "float16"}
        | {"architectures": ["LlamaForCausalLM"], "max_position_embeddings": 1024},
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "transformers_version": "4.36.0.dev0",
        "vision_config": {name: vision[name] for name in (*sizes[:4], "image_size", "patch_size")}
        | {"model_type": "clip_vision_model", "projection_dim": 64, "vocab_size": 32000},
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "vocab_size": text["vocab_size"],
    }
    (folder / "config.json").write_text(json.dumps(published))
    processor = json.loads((folder / "processor_config.json").read_text())
    image = processor.pop("image_processor")
    image |= {"image_processor_type": "CLIPImageProcessor", "processor_class": "LlavaProcessor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(image))
    (folder / "processor_config.json").write_text(json.dumps(processor))
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_published(tmp_path_factory.mktemp("published"))


def log_probabilities(folder: Path) -> Tensor:
    """(T, V) of a question about a scene, in float32."""
    return read(Assistant.load(folder), scene_requests(1)[0]).log_probabilities


def test_published_files_are_read_and_nothing_is_lost_or_made_up(published: Path) -> None:
    """Every weight of both shards is in the model, and the head is not tied to the words."""
    model, _ = load_llava(published)
    found = {value.double().sum().item() for value in model.state_dict().values() if value.is_floating_point()}
    for shard in SHARDS:
        for key, value in load_file(published / shard).items():
            assert value.double().sum().item() in found, key
    assert not torch.equal(model.lm_head.weight, model.model.language_model.embed_tokens.weight)
    assert read_model_folder(published).read_by_vllm


def test_what_is_written_again_has_the_published_keys(published: Path, tmp_path: Path) -> None:
    """In one file instead of shards, and transformers alone reads the same from both."""
    export_model(published, "llava-hf/llava-1.5-7b-hf", "float32", tmp_path)
    before = {key: value for shard in SHARDS for key, value in load_file(published / shard).items()}
    after = load_file(tmp_path / "model.safetensors")
    assert after.keys() == before.keys()
    assert all(torch.equal(value.float(), after[key]) for key, value in before.items())
    ids = torch.tensor([[1, 20, 30, 40]])
    with torch.no_grad():
        one, other = (
            AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)(input_ids=ids).logits
            for folder in (published, tmp_path)
        )
    assert torch.equal(one, other)
    torch.testing.assert_close(log_probabilities(tmp_path), log_probabilities(published))


def test_an_adapter_of_others_is_merged_into_published_files(published: Path, tmp_path: Path) -> None:
    """The head adapted too. What comes out is stored in float16, as the base is."""
    model, _ = load_llava(published)
    config = LoraConfig(r=4, target_modules=["lm_head", "down_proj"], init_lora_weights=False)
    PeftModel(model, config).save_pretrained(str(tmp_path / "theirs"))
    report = merge(tmp_path / "theirs", tmp_path / "merged", scene_requests(1), published)
    assert report.stored == "float16" and report.merging <= 1e-4 < report.storing
    assert report.only_merged is not None and "lm_head" in report.only_merged
    assert {value.dtype for value in load_file(tmp_path / "merged" / "model.safetensors").values()} == {torch.float16}
    assert (log_probabilities(tmp_path / "merged") - log_probabilities(published)).abs().max() > 0.1


@pytest.mark.parametrize(
    "file", ["config.json", "tokenizer.json", "chat_template.json", SHARDS[1], "preprocessor_config.json"]
)
def test_a_file_that_is_missing_is_named(file: str, published: Path, tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(published, folder)
    (folder / file).unlink()
    (folder / "processor_config.json").unlink()  # either of the processor's files would do
    named = {"chat_template.json": "chat_template.jinja", "preprocessor_config.json": "processor_config.json"}
    with pytest.raises(ModelError, match=f"lacks .*{named.get(file, file)}"):
        find_model(folder)
