"""A file with two pairs of answers, for trainings that must learn just these."""

import json
from pathlib import Path
from typing import Any

from training.data.scenes import make_scene


def two_pairs(folder: Path) -> dict[str, Any]:
    """What a stage says to train and validate on two pairs, the same in each step; they are written to `folder`."""
    rows = [{"image": f"{seed}.png", "question": "What is it?", "chosen": "red", "rejected": "blue"} for seed in (1, 2)]
    for seed in (1, 2):
        make_scene(seed).image.save(folder / f"{seed}.png")
    file = folder / "pairs.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    source = {"conversations": str(file), "damaged": 0}
    return {"mixture": [], "pairs": [source], "held_out_pairs": [source]}
