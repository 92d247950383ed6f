"""Write a model's card from its provenance and its measured scores: data, licences, numbers, unchosen captions."""

from collections.abc import Mapping
from typing import Any

# What the shards of the data folder are, by the name that provenance keeps; unknown shards are listed without words.
LICENCES = {
    "flickr8k": "photographs with five captions each; research only (Flickr terms)",
    "coco": "photographs with captions and yes/no questions; annotations CC BY 4.0, pictures under Flickr terms",
    "visual7w": "photographs with questions; research only",
    "daquar": "indoor photographs with questions; research only (NYU depth v2 pictures)",
    "storybook": "children's book pictures with the text of their page; CC BY 4.0",
    "nlvr": "drawn boxes with true or false statements; CC BY 4.0",
    "caltech101": "photographs with a label; CC BY 4.0",
    "sports": "photographs with a label; CC0 as published",
    "flowers": "flower photographs with a caption; research only",
    "natural": "landscapes with a label; CC0",
    "tiny-imagenet": "small photographs with a label; research only",
    "easyvqa": "drawn shapes with questions; MIT",
    "emoji": "emoji with keywords; Apache-2.0 (pictures), MIT (keywords)",
    "text": "captions (research only), dialogues and Wikipedia (CC BY-SA), stories (CC BY 4.0), prompts, answers",
}

HEAD = """---
license: other
library_name: transformers
pipeline_tag: image-text-to-text
---

# Joey

Joey is the small assistant that ships with Kangaroo: a SigLIP-shaped vision tower, a two-layer projector and a
Llama-shaped language model, joined as one LLaVA and trained from nothing by `training/recipes/joey.yaml`.
It exists so that everything works with no download. It is small, it saw few pictures, and it is often wrong; do not
rely on what it says.

**For research and demonstration only**, because some of the pictures it was trained on may be used for research only.
"""


def model_card(provenance: Mapping[str, Any], report: Mapping[str, Any]) -> str:
    """Markdown. `report` is what `training.evaluation.scorecard.measure` gives."""
    sections = [HEAD, _scores(report), _captions(report), _data(provenance), _stages(provenance)]
    return "\n".join(section for section in sections if section)


def _scores(report: Mapping[str, Any]) -> str:
    rows = ["## Measured", "", "| what | right | questions | always saying the commonest answer |", "|---|---|---|---|"]
    scenes = report["scenes"]
    for kind, score in [*scenes["by_kind"].items(), ("all questions", scenes["all"])]:
        rows.append(_row(f"generated scenes never seen: {kind}", score))
    if "coco-validation" in report:
        rows.append(_row("COCO validation, yes/no", report["coco-validation"]))
    if "flickr8k-validation" in report:
        captions = report["flickr8k-validation"]
        rows += ["", "| captions of Flickr8k validation | BLEU-4 | CIDEr |", "|---|---|---|"]
        rows.append(f"| {captions['pictures']} photographs | {captions['bleu_4']:.1f} | {captions['cider']:.1f} |")
        rows.append(
            f"| the same captions, moved | {captions['moved']['bleu_4']:.1f} | {captions['moved']['cider']:.1f} |"
        )
        rows += [
            "",
            f"{captions['distinct_captions']} of the captions differ. Moved means that each caption is scored as if it",
        ]
        rows += ["were of another picture: what is left of the score then owes nothing to looking.", ""]
    return "\n".join(rows)


def _row(what: str, score: Mapping[str, Any]) -> str:
    return f"| {what} | {score['right']:.1%} | {score['questions']} | {score['majority']:.1%} |"


def _captions(report: Mapping[str, Any]) -> str:
    if "flickr8k-validation" not in report:
        return ""
    rows = ["### Ten captions that nobody picked", "", "| picture | Joey | one of five people |", "|---|---|---|"]
    for sample in report["flickr8k-validation"]["unchosen"]:
        rows.append(f"| {sample['id'].split('/')[-1]} | {sample['caption']} | {sample['people'][0]} |")
    return "\n".join([*rows, ""])


def _data(provenance: Mapping[str, Any]) -> str:
    rows = ["## Data", "", "| shard | what and licence | sha256 |", "|---|---|---|"]
    for name, digest in provenance["data"].items():
        said = next((words for start, words in LICENCES.items() if name.startswith(start)), "")
        rows.append(f"| {name} | {said} | {digest[:16]} |")
    rows += [
        "",
        "And generated scenes (`training/data/scenes.py`), which are nobody's. No validation shard was trained on.",
        "",
    ]
    return "\n".join(rows)


def _stages(provenance: Mapping[str, Any]) -> str:
    rows = ["## Stages", "", "| stage | seconds | held-out loss |", "|---|---|---|"]
    for name, stage in provenance["stages"].items():
        loss = stage["scores"].get("eval_loss")
        rows.append(f"| {name} | {stage['seconds']} | {'' if loss is None else f'{loss:.3f}'} |")
    return "\n".join(
        [*rows, "", "`provenance.json` beside this card holds the whole recipe, data hashes and versions.", ""]
    )
