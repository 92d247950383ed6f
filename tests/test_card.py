"""The model card tells what was measured and trained on, and converted weights still answer alike."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from assistant.checkpoint import convert_weights, load_llava
from tests.tiny import make_tiny_llava
from training.evaluation.card import model_card

SCORE = {"right": 0.912, "majority": 0.25, "questions": 340}
REPORT = {
    "scenes": {"by_kind": {"colour": SCORE}, "all": SCORE},
    "coco-validation": SCORE,
    "flickr8k-validation": {
        "pictures": 1000,
        "bleu_4": 12.34,
        "cider": 23.45,
        "moved": {"bleu_4": 3.2, "cider": 1.9},
        "distinct_captions": 321,
        "unchosen": [{"id": "flickr8k/7.jpg", "caption": "A dog runs.", "people": ["A brown dog runs on grass."]}],
    },
}
PROVENANCE = {
    "data": {"flickr8k-train-00.parquet": "ab" * 32, "mine.parquet": "cd" * 32},
    "stages": {
        "tokenizer": {"scores": {"vocabulary": 8192.0}, "seconds": 5},
        "tower": {"scores": {"eval_loss": 1.5}, "seconds": 60},
    },
}


def test_the_card_holds_every_number_it_was_given() -> None:
    """Scores beside their baselines, captions beside people's, shards with licence and hash, stages with loss."""
    card = model_card(PROVENANCE, REPORT)
    for expected in ("| 91.2% | 340 | 25.0% |", "| 12.3 | 23.4 |", "| 3.2 | 1.9 |", "321 of the captions differ"):
        assert expected in card
    assert "| 7.jpg | A dog runs. | A brown dog runs on grass. |" in card
    assert "| flickr8k-train-00.parquet | photographs with five captions each; research only" in card
    assert "| mine.parquet |  | cdcdcdcdcdcdcdcd |" in card
    assert "| tower | 60 | 1.500 |" in card and "| tokenizer | 5 |  |" in card


def test_narrow_weights_are_half_as_large_and_answer_alike(tmp_path: Path) -> None:
    """bfloat16 on disk: the config says so, and the logits move by no more than its precision."""
    folder = make_tiny_llava(tmp_path)
    wide, _ = load_llava(folder)
    size = (folder / "model.safetensors").stat().st_size
    convert_weights(folder, "bfloat16")
    assert (folder / "model.safetensors").stat().st_size == pytest.approx(size / 2, rel=0.1)
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    assert {value.dtype for value in load_file(folder / "model.safetensors").values()} == {torch.bfloat16}
    narrow, _ = load_llava(folder)
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        expected, found = wide(input_ids=ids).logits, narrow(input_ids=ids).logits
    # bfloat16 keeps 8 bits, an error of 0.2 to 0.4 % a weight; over four layers of random ones it stays near that.
    assert 0 < float((expected - found).std() / expected.std()) < 0.02
