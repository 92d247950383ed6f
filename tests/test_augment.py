"""Views are drawn as the papers say: pixels against Pillow and SciPy, chances against torchvision and lightly."""

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from lightly.models.utils import random_block_mask_image
from lightly.transforms.dino_transform import DINOViewTransform
from lightly.transforms.simclr_transform import SimCLRViewTransform
from PIL import Image, ImageOps
from scipy import ndimage, stats
from torchvision.transforms import v2

from training.data import augment

SIDE = 32
Draw = Callable[[torch.Tensor, np.random.Generator], torch.Tensor]


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def soft_picture(height: int = 48, width: int = 64) -> torch.Tensor:
    """uint8 (3, H, W): colours that change slowly, with some noise, as photographs have them."""
    small = generator(7).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    large = np.array(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    noisy = large + generator(8).integers(-20, 21, large.shape)
    return torch.from_numpy(noisy.clip(0, 255).astype(np.uint8)).permute(2, 0, 1).contiguous()


def as_image(view: torch.Tensor) -> Image.Image:
    return Image.fromarray(view.permute(1, 2, 0).numpy())


def as_tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def furthest(one: torch.Tensor, other: torch.Tensor) -> int:
    return int((one.int() - other.int()).abs().max())


def same_distribution(one: list[float], other: list[float]) -> bool:
    return stats.ks_2samp(one, other).pvalue > 1e-3


def test_a_crop_is_pillows_crop_of_the_same_box() -> None:
    picture = soft_picture()
    top, left, height, width = augment.crop_box(48, 64, generator(3), (0.2, 0.9))
    view = augment.random_crop(picture, SIDE, generator(3), (0.2, 0.9))
    box = (left, top, left + width, top + height)
    witness = as_image(picture).crop(box).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    assert furthest(view, as_tensor(witness)) <= 2


def test_boxes_are_distributed_as_torchvision_draws_them() -> None:
    torch.manual_seed(0)
    draws, theirs = generator(), v2.RandomResizedCrop(SIDE, (0.1, 0.9))
    ours = [augment.crop_box(48, 64, draws, (0.1, 0.9)) for _ in range(1500)]
    params = [theirs.make_params([torch.zeros(3, 48, 64)]) for _ in range(1500)]
    witness = [(p["top"], p["left"], p["height"], p["width"]) for p in params]
    for value in range(4):
        assert same_distribution([float(box[value]) for box in ours], [float(box[value]) for box in witness])


@pytest.mark.parametrize(("height", "width"), [(200, 4), (4, 200), (1, 1)])
def test_a_box_stays_in_the_narrowest_picture(height: int, width: int) -> None:
    theirs = v2.RandomResizedCrop(SIDE, (1.0, 1.0)).make_params([torch.zeros(3, height, width)])
    box = augment.crop_box(height, width, generator(), (1.0, 1.0))
    if height != width:  # no box fits: both take the middle
        assert box == (theirs["top"], theirs["left"], theirs["height"], theirs["width"])
    for seed in range(50):
        top, left, box_height, box_width = augment.crop_box(height, width, generator(seed), (0.05, 1.0))
        assert 0 <= top <= top + box_height <= height and 0 <= left <= left + box_width <= width
        assert box_height > 0 and box_width > 0


def test_a_picture_smaller_than_its_view_is_enlarged() -> None:
    assert augment.random_crop(soft_picture(10, 12), SIDE, generator(), (0.1, 1.0)).shape == (3, SIDE, SIDE)


@pytest.mark.parametrize("area", [(0.0, 1.0), (0.5, 0.2), (0.5, 1.5)])
def test_an_impossible_area_is_refused(area: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="area of a crop"):
        augment.random_crop(soft_picture(), SIDE, generator(), area)


def test_a_colour_change_equals_torchvisions_with_the_same_factors() -> None:
    picture, order = soft_picture(), np.array([2, 0, 3, 1])
    params = {
        "fn_idx": torch.tensor(order),
        "brightness_factor": 1.3,
        "contrast_factor": 0.6,
        "saturation_factor": 1.5,
        "hue_factor": -0.1,
    }
    view = augment.adjust(picture, 1.3, 0.6, 1.5, -0.1, order)
    assert torch.equal(view, v2.ColorJitter(0.5, 0.5, 0.5, 0.2).transform(picture, params))
    # Pillow rounds hue to 256 steps, so it is near only.
    by_pillow = as_tensor(v2.ColorJitter(0.5, 0.5, 0.5, 0.2).transform(as_image(picture), params))
    assert (view.float() - by_pillow.float()).abs().mean() < 3


def test_jitter_is_distributed_as_torchvisions() -> None:
    torch.manual_seed(0)
    picture, draws, theirs = soft_picture(16, 16), generator(), v2.ColorJitter(0.4, 0.4, 0.2, 0.1)
    ours = [augment.jitter(picture, draws, 0.5, 1.0, saturation=0.4).float() for _ in range(400)]
    witness = [theirs(picture).float() for _ in range(400)]
    for measure in (brightness, contrast, colourfulness):
        assert same_distribution([measure(v) for v in ours], [measure(v) for v in witness])


def brightness(view: torch.Tensor) -> float:
    return float(view.float().mean())


def contrast(view: torch.Tensor) -> float:
    return float(view.float().mean(0).std())


def colourfulness(view: torch.Tensor) -> float:
    return float(view.float().std(0).mean())


def roughness(view: torch.Tensor) -> float:
    return float(view.float().diff(dim=-1).abs().mean())


def test_grey_and_solarise_equal_pillows() -> None:
    picture = soft_picture()
    assert (
        furthest(augment.grey(picture, generator(), 1.0), as_tensor(as_image(picture).convert("L").convert("RGB"))) <= 1
    )
    solarised = as_tensor(ImageOps.solarize(as_image(picture), 128))
    assert torch.equal(augment.solarise(picture, generator(), 1.0), solarised)


@pytest.mark.parametrize("deviation", [0.1, 0.7, 2.0])
def test_the_blur_is_scipys(deviation: float) -> None:
    picture = soft_picture()
    radius = int(np.ceil(3 * deviation))
    witness = ndimage.gaussian_filter(picture.double().numpy(), (0, deviation, deviation), mode="mirror", radius=radius)
    assert (augment.gaussian_blur(picture, deviation).double() - torch.from_numpy(witness)).abs().max() < 0.51


def test_a_tiny_view_can_be_blurred() -> None:
    assert augment.gaussian_blur(soft_picture(3, 4), 2.0).shape == (3, 3, 4)


@pytest.mark.parametrize("change", [augment.mirror, augment.grey, augment.blur, augment.solarise])
def test_a_change_comes_as_often_as_its_chance(change: Callable[..., torch.Tensor]) -> None:
    picture, draws = soft_picture(8, 8), generator()
    changed = sum(change(picture, draws, 0.3) is not picture for _ in range(1000))
    assert 230 < changed < 370


def test_a_mirrored_view_is_mirrored() -> None:
    picture = soft_picture()
    assert torch.equal(augment.mirror(picture, generator(), 1.0), as_tensor(ImageOps.mirror(as_image(picture))))


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (lambda p, g: augment.simclr_view(p, SIDE, g), SimCLRViewTransform(SIDE, normalize=None)),
        (
            lambda p, g: augment.byol_views(p, SIDE, g, (0.4, 1.0))[0],
            DINOViewTransform(SIDE, gaussian_blur=1.0, solarization_prob=0.0, normalize=None),
        ),
        (
            lambda p, g: augment.byol_views(p, SIDE, g, (0.4, 1.0))[1],
            DINOViewTransform(SIDE, gaussian_blur=0.1, solarization_prob=0.2, normalize=None),
        ),
        (
            lambda p, g: augment.multi_crop(p, g, large=8, small=SIDE, small_count=1, small_area=(0.05, 0.4))[1][0],
            DINOViewTransform(SIDE, (0.05, 0.4), gaussian_blur=0.5, solarization_prob=0.0, normalize=None),
        ),
    ],
    ids=["SimCLR", "BYOL first", "BYOL second", "DINO small"],
)
def test_views_are_distributed_as_lightlys(ours: Draw, theirs: Callable[[Image.Image], torch.Tensor]) -> None:
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    picture, draws = soft_picture(), generator()
    views = [ours(picture, draws) for _ in range(250)]
    witness = [theirs(as_image(picture)) * 255 for _ in range(250)]
    for measure in (brightness, contrast, colourfulness, roughness):
        assert same_distribution([measure(v) for v in views], [measure(v) for v in witness]), measure.__name__


def test_all_chance_comes_from_the_generator() -> None:
    def draw(seed: int) -> list[torch.Tensor]:
        large, small = augment.multi_crop(soft_picture(), generator(seed), large=32, small=16, small_count=2)
        return [*large, *small, augment.block_mask(7, 7, 0.4, generator(seed))]

    torch.manual_seed(0)
    first, before = draw(1), torch.get_rng_state()
    torch.manual_seed(5), random.seed(5), np.random.seed(5)
    again, other = draw(1), draw(2)
    assert all(torch.equal(one, two) for one, two in zip(first, again, strict=True))
    assert not any(torch.equal(one, two) for one, two in zip(first, other, strict=True))
    torch.manual_seed(0)
    assert torch.equal(before, torch.get_rng_state())


def test_the_picture_itself_is_never_changed() -> None:
    picture = soft_picture()
    before = picture.clone()
    for seed in range(20):
        augment.simclr_view(picture, SIDE, generator(seed))
        augment.byol_views(picture, SIDE, generator(seed))
    assert torch.equal(picture, before)


@pytest.mark.parametrize("small_count", [0, 3])
def test_multi_crop_gives_two_large_and_the_small_ones(small_count: int) -> None:
    large, small = augment.multi_crop(soft_picture(20, 30), generator(), large=48, small=16, small_count=small_count)
    assert [view.shape for view in large] == [(3, 48, 48)] * 2
    assert [view.shape for view in small] == [(3, 16, 16)] * small_count
    assert all(view.dtype == torch.uint8 for view in large + small)


@pytest.mark.parametrize(("rows", "columns"), [(14, 14), (7, 3), (2, 2), (1, 9)])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.37, 0.5, 0.9, 1.0])
def test_a_block_mask_hides_exactly_its_share(rows: int, columns: int, share: float) -> None:
    for seed in range(5):
        mask = augment.block_mask(rows, columns, share, generator(seed))
        assert mask.shape == (rows * columns,) and mask.dtype == torch.bool
        assert int(mask.sum()) == round(share * rows * columns)


def test_a_block_mask_is_made_of_blocks_like_lightlys() -> None:
    random.seed(0)
    draws, hidden = generator(), 78  # of 196
    ours = [togetherness(augment.block_mask(14, 14, 0.4, draws).view(14, 14)) for _ in range(200)]
    theirs = [togetherness(random_block_mask_image((14, 14), hidden)) for _ in range(200)]
    scattered = [togetherness(torch.from_numpy(draws.permutation(196) < hidden).view(14, 14)) for _ in range(200)]
    assert abs(np.mean(ours) - np.mean(theirs)) < 0.03
    assert np.mean(ours) > np.mean(scattered) + 0.3


def togetherness(mask: torch.Tensor) -> float:
    """The share of pairs of neighbours, with a hidden one among them, of which both are hidden."""
    pairs = [(mask[1:], mask[:-1]), (mask[:, 1:], mask[:, :-1])]
    return float(sum((a & b).sum() for a, b in pairs) / sum((a | b).sum() for a, b in pairs))


def test_an_impossible_share_is_refused() -> None:
    with pytest.raises(ValueError, match="share of hidden patches"):
        augment.block_mask(4, 4, 1.1, generator())
