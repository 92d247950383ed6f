"""Embed one folder of photographs in several ways, by the same weights: ours, the bare tower, and peers' own paths."""

import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import numpy as np
import open_clip
import torch
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset
from transformers import AutoTokenizer, CLIPModel, CLIPProcessor

from assistant.embeddings import Embedder, load_embedder
from assistant.file_embedding import BATCH, SPARE, embed_files
from assistant.images import PictureError, open_picture
from assistant.models import JOEY
from assistant.pixels import pixels_of, processed
from assistant.towers import TextShape, ViTShape, clip_tokenizer, new_image_processor, new_pair
from scripts.benchmarks.measuring import Disagreement, Pair, Work
from scripts.benchmarks.peer_weights import for_open_clip

SENTENCE_TRANSFORMERS = "sentence_transformers"  # no dependency of ours: compared with where somebody installed it
DISTINCT = 24  # photographs; the folder holds copies of them under other names, which are decoded anew all the same
QUALITY = 85  # of the JPEGs
TEXT = TextShape(width=512, layers=1, heads=8, length=16, feed_forward=512)  # never run here
EXACT = 1e-4  # distance of two vectors of unit length that other kernels and orders of sums may make
ALIKE = 0.2  # two ways may differ by that share of what two different pictures differ by


@dataclass(frozen=True)
class Shape:
    """A tower to measure with, and how many pictures a pass embeds; no layers stand for Joey's own tower."""

    width: int
    layers: int
    heads: int
    patch: int
    side: int
    pictures: int


SHAPES = {
    "base": Shape(768, 12, 12, 16, 224, 48),
    "small": Shape(384, 12, 6, 16, 224, 128),
    "joey": Shape(0, 0, 0, 0, 0, 128),
    "tiny": Shape(64, 2, 2, 16, 64, 8),
}


def photographs(folder: Path, count: int, width: int, height: int) -> list[Path]:
    """`count` JPEGs of that size: soft shapes of many colours under grain, about as hard to decode as a camera's."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    files = []
    for number in range(min(count, DISTINCT)):
        coarse = generator.integers(0, 256, (12, 16, 3), dtype=np.uint8)
        smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC), np.int16)
        grain = generator.normal(0, 6, (height, width, 1)).astype(np.int16)
        files.append(folder / f"{number:04d}.jpg")
        Image.fromarray((smooth + grain).clip(0, 255).astype(np.uint8)).save(files[-1], quality=QUALITY)
    for number in range(len(files), count):
        files.append(folder / f"{number:04d}.jpg")
        files[-1].write_bytes(files[number % DISTINCT].read_bytes())
    return files


def new_embedder(shape: Shape, folder: Path) -> Embedder:
    """A CLIP of that shape with random weights, saved in `folder` and loaded from there as any user's."""
    torch.manual_seed(0)
    tokenizer = clip_tokenizer(AutoTokenizer.from_pretrained(JOEY), TEXT.length)
    vit = ViTShape("clip", shape.width, shape.layers, shape.heads, shape.patch, shape.side)
    new_pair(vit, TEXT, tokenizer).save_pretrained(folder)
    tokenizer.init_kwargs.pop("processor_class", None)  # Joey's is LLaVA's
    CLIPProcessor(new_image_processor("clip", shape.side), tokenizer).save_pretrained(folder)
    return load_embedder(folder)


def ours(embedder: Embedder, files: Sequence[Path]) -> Work:
    """`embed_files`, as `kangaroo search` and `classify` use it: (N, D) of unit length."""

    def work() -> Tensor:
        vectors = []
        for file, vector in embed_files(embedder, files):
            if isinstance(vector, PictureError):
                raise Disagreement(f"{file}: {vector}")
            vectors.append(vector)
        return torch.stack(vectors)

    return work


def bare_pair(embedder: Embedder, files: Sequence[Path]) -> Pair:
    """Ours beside the tower alone, on the same pictures decoded and resized beforehand."""
    opened = [open_picture(file, enough=SPARE * embedder.tower.image_side) for file in files]
    pixels = torch.cat([processed(embedder.tower.image_processor, [pixels_of(picture)]) for picture in opened])

    @torch.inference_mode()
    def theirs() -> Tensor:
        return torch.cat([embedder.of_pooled(embedder.tower(some).pooled) for some in pixels.split(BATCH)])

    return Pair("embed a folder", "bare tower", ours(embedder, files), theirs, 0.0, "decoding goes on beside the tower")


def transformers_pair(embedder: Embedder, files: Sequence[Path]) -> Pair:
    """Ours beside the plain loop of transformers' documentation: open, process, `get_image_features`."""

    @torch.inference_mode()
    def theirs() -> Tensor:
        vectors = []
        for start in range(0, len(files), BATCH):
            pictures = [Image.open(file).convert("RGB") for file in files[start : start + BATCH]]
            pixels = embedder.tower.image_processor(pictures, return_tensors="pt")["pixel_values"]
            vectors.append(embedder.model.get_image_features(pixel_values=pixels).pooler_output)
        return functional.normalize(torch.cat(vectors), dim=-1)

    return Pair("embed a folder", "transformers", ours(embedder, files), theirs, ALIKE, "threads, JPEGs at their scale")


class _Decoded(Dataset[Tensor]):
    """Files as open_clip's own transform makes them."""

    def __init__(self, files: Sequence[Path], transform: Callable[[Image.Image], Tensor]) -> None:
        self.files, self.transform = files, transform

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Tensor:
        with Image.open(self.files[index]) as picture:
            return self.transform(picture)


def open_clip_pair(embedder: Embedder, files: Sequence[Path]) -> Pair:
    """Ours beside open_clip's model with the same weights, its own transform, and torch's DataLoader with workers."""
    model = _open_clip_model(embedder.model)
    processor = embedder.tower.image_processor
    side = embedder.tower.image_side
    settings = PreprocessCfg(
        side, mean=processor.image_mean, std=processor.image_std, interpolation="bilinear", resize_mode="squash"
    )
    dataset = _Decoded(files, image_transform_v2(settings, is_train=False))

    @torch.inference_mode()
    def theirs() -> Tensor:
        loader = DataLoader(dataset, batch_size=BATCH, num_workers=len(os.sched_getaffinity(0)))
        return torch.cat([model.encode_image(pixels, normalize=True) for pixels in loader])

    return Pair("embed a folder", "open_clip", ours(embedder, files), theirs, ALIKE, "threads, JPEGs at their scale")


def sentence_transformers_pair(embedder: Embedder, files: Sequence[Path]) -> Pair:
    """Ours beside sentence-transformers' CLIP on the same checkpoint. Raises ImportError where it is not installed."""
    library = import_module(SENTENCE_TRANSFORMERS)
    module = import_module(f"{SENTENCE_TRANSFORMERS}.sentence_transformer.modules").CLIPModel(str(embedder.folder))
    model = library.SentenceTransformer(modules=[module], device="cpu")

    def theirs() -> Tensor:
        pictures = [Image.open(file) for file in files]
        return model.encode(
            pictures, batch_size=BATCH, convert_to_tensor=True, normalize_embeddings=True, show_progress_bar=False
        )

    return Pair("embed a folder", "sentence-transformers", ours(embedder, files), theirs, ALIKE, "threads, JPEG scale")


PAIRS: dict[str, Callable[[Embedder, Sequence[Path]], Pair]] = {
    "bare": bare_pair,
    "transformers": transformers_pair,
    "open_clip": open_clip_pair,
    "sentence-transformers": sentence_transformers_pair,
}


def check(build: Callable[[Embedder, Sequence[Path]], Pair], embedder: Embedder, files: Sequence[Path]) -> None:
    """Both sides embed each different picture alike. Raises Disagreement where they do not.

    Two ways of shrinking a photograph never give the same pixels, and a tower with random weights puts all pictures
    near each other. So what one picture differs by between the sides is measured by what two pictures differ by: at
    most the pair's tolerance of it. With a tolerance of 0 both sides see the same pixels and differ by rounding alone.
    """
    pair = build(embedder, files[:DISTINCT])
    one, other = pair.ours(), pair.theirs()
    if one.shape != other.shape:
        raise Disagreement(f"{pair.peer}: ours is {tuple(one.shape)}, theirs {tuple(other.shape)}")
    apart = torch.cdist(one.double(), other.double())
    same, different = float(apart.diagonal().max()), float(apart.fill_diagonal_(math.inf).min())
    if same > (pair.tolerance * different if pair.tolerance else EXACT):
        raise Disagreement(f"{pair.peer}: one picture differs by {same:.2g}, two pictures by {different:.2g}")


def decode_seconds(embedder: Embedder, files: Sequence[Path]) -> float:
    """Seconds of one core that a photograph takes from the file to the tower's pixels: the median."""
    taken = []
    for file in files[:DISTINCT]:
        start = time.thread_time()
        processed(
            embedder.tower.image_processor, [pixels_of(open_picture(file, enough=SPARE * embedder.tower.image_side))]
        )
        taken.append(time.thread_time() - start)
    return statistics.median(taken)


def embedders(names: Sequence[str], folder: Path) -> Iterator[tuple[str, Shape, Embedder]]:
    """Each named tower when its turn comes."""
    for name in names:
        shape = SHAPES[name]
        yield name, shape, new_embedder(shape, folder / name) if shape.layers else load_embedder(JOEY / "embedder")


def _open_clip_model(ours: CLIPModel) -> CLIP:
    """open_clip's model with the weights of ours."""
    vision, text = ours.config.vision_config, ours.config.text_config
    model = open_clip.CLIP(
        embed_dim=ours.config.projection_dim,
        vision_cfg=CLIPVisionCfg(
            layers=vision.num_hidden_layers,
            width=vision.hidden_size,
            head_width=vision.hidden_size // vision.num_attention_heads,
            patch_size=vision.patch_size,
            image_size=vision.image_size,
        ),
        text_cfg=CLIPTextCfg(
            context_length=text.max_position_embeddings,
            vocab_size=text.vocab_size,
            width=text.hidden_size,
            heads=text.num_attention_heads,
            layers=text.num_hidden_layers,
            mlp_ratio=text.intermediate_size / text.hidden_size,
        ),
    )
    model.load_state_dict(for_open_clip(ours.state_dict()), strict=True)
    return model.eval()
