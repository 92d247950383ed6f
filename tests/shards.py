"""Write small data folders in the layout of the real one, with pictures and words of generated scenes."""

import io
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet as parquet

from training.config import Recipe
from training.data.scenes import make_scene


def picture_record(seed: int) -> dict[str, Any]:
    """One row of a picture shard: captions, a label and questions that are true of the picture."""
    scene = make_scene(seed)
    encoded = io.BytesIO()
    scene.image.save(encoded, "WEBP", lossless=True)
    questions = [{"question": q.question, "answer": q.answer, "choices": list(q.choices)} for q in scene.questions]
    return {
        "id": f"scene/{seed}",
        "image": {"bytes": encoded.getvalue(), "path": None},
        "source": "scenes",
        "split": "train",
        "licence": "CC0",
        "label": scene.kind,
        "captions": list(scene.captions),
        "qa": questions,
    }


def text_record(seed: int, source: str) -> dict[str, Any]:
    """One row of a text shard: a question with its answer, or a caption."""
    scene = make_scene(seed)
    if seed % 2:
        question = scene.questions[0]
        return {"source": source, "licence": "CC0", "prompt": question.question, "text": question.answer}
    return {"source": source, "licence": "CC0", "prompt": None, "text": scene.captions[0]}


def write_shards(folder: Path, recipe: Recipe, rows: int = 12) -> Path:
    """Every shard that `recipe` names, `rows` rows each, and every source of its texts."""
    pictures: set[str] = set()
    texts: dict[str, set[str]] = {}
    for stage in recipe.stages:
        for field in ("mixture", "held_out"):
            pictures |= {source.shard for source in getattr(stage, field, ()) if source.shard}
        pictures |= set(getattr(stage, "exclude_captions_of", ()))
        for source in getattr(stage, "texts", ()):
            if source.shard:
                texts.setdefault(source.shard, set()).add(source.source or "any")
    folder.mkdir(parents=True, exist_ok=True)
    for number, shard in enumerate(sorted(pictures)):
        records = [picture_record(1000 * number + seed) for seed in range(rows)]
        parquet.write_table(pyarrow.Table.from_pylist(records), folder / f"{shard}-00.parquet")
    for shard, sources in texts.items():
        records = [text_record(seed, source) for source in sorted(sources) for seed in range(4 * rows)]
        parquet.write_table(pyarrow.Table.from_pylist(records), folder / f"{shard}.parquet")
    return folder
