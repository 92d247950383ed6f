"""Masked autoencoding against transformers' ViTMAE and the paper's formula in plain loops."""

from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModel, ViTMAEConfig, ViTMAEForPreTraining

from assistant.towers import ResNetShape, Tower, ViTShape, load_tower, new_tower
from scripts.benchmarks.peer_weights import for_vit_mae
from training.data.pictures import Picture
from training.objective import Start
from training.objectives.mae import MaeObjective, MaskedView, Settings, build, pixel_loss
from training.picture_decoder import NORM_EPSILON, PictureDecoder, others, patchify, take, unpatchify
from training.trainer import freeze_all_but

Family = Literal["clip", "siglip", "dinov2", "vit"]
FAMILIES: tuple[Family, ...] = ("clip", "siglip", "dinov2", "vit")
PATCH, SIDE, WIDTH = 8, 32, 32
SMALL = {"decoder_width": 16, "decoder_layers": 2, "decoder_heads": 2}


def tiny_tower(family: Family) -> Tower:
    """A tower of that shape with 16 patches and random weights."""
    return new_tower(ViTShape(family=family, width=WIDTH, layers=2, heads=2, patch=PATCH, image_side=SIDE))


def tiny_objective(family: Family = "vit", **settings: object) -> MaeObjective:
    """An objective on `tiny_tower`, everything that is trained ready to train."""
    torch.manual_seed(0)
    objective = build(Settings.model_validate(SMALL | settings), Start(side=SIDE, tower=tiny_tower(family)))
    freeze_all_but(objective, objective.trained_parameters())
    return objective


def picture(seed: int) -> Picture:
    """Noise over a gradient of brightness, uint8 (3, 40, 56)."""
    ramp = np.linspace(0, 120, 56, dtype=np.uint8)
    noise = np.random.default_rng(seed).integers(0, 120, (3, 40, 56), dtype=np.uint8)
    return Picture(f"picture {seed}", torch.from_numpy(noise + ramp))


def batch_of(objective: MaeObjective, count: int) -> dict[str, Tensor]:
    """A collated batch of `count` different pictures."""
    generator = np.random.default_rng(5)
    return dict(objective.collate([objective.sample(picture(number), generator) for number in range(count)]))


def gradients(objective: MaeObjective, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every gradient that one batch leaves."""
    objective.zero_grad(set_to_none=True)
    objective(**batch)["pixel_loss"].backward()
    return {name: p.grad.clone() for name, p in objective.named_parameters() if p.grad is not None}


# --- transformers' ViTMAE with the same weights and the same mask


def twins(normalise: bool) -> tuple[MaeObjective, ViTMAEForPreTraining]:
    """Our objective on a ViT, and a ViTMAE with exactly its weights."""
    ours = tiny_objective("vit", normalise_target=normalise)
    # The class token and the biases start at zero or nearly so: what is zero hides a mistake.
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    for norm in (module for module in ours.modules() if isinstance(module, torch.nn.LayerNorm)):
        norm.eps = NORM_EPSILON  # ViTMAE has one for both halves, a ViT its own
    config = ViTMAEConfig(
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=4 * WIDTH,
        image_size=SIDE,
        patch_size=PATCH,
        layer_norm_eps=NORM_EPSILON,
        decoder_hidden_size=16,
        decoder_num_hidden_layers=2,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=64,
        norm_pix_loss=normalise,
    )
    theirs = ViTMAEForPreTraining(config)
    theirs.decoder.initialize_weights(ours.patches)  # transformers 5.19 overwrites these positions with zeros
    left_out, unknown = theirs.load_state_dict(for_vit_mae(dict(ours.named_parameters()), PATCH), strict=False)
    assert (left_out, unknown) == (["decoder.decoder_pos_embed"], [])
    return ours, theirs


def same_batch(ours: MaeObjective) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """A batch for us; its pixels, and the noise that makes ViTMAE show the same patches, for them."""
    batch = batch_of(ours, 3)
    noise = torch.ones(3, ours.patches).scatter_(1, batch["visible"], torch.linspace(0, 0.5, ours.seen).repeat(3, 1))
    return batch, ours.tower.normalise(batch["views"]), noise


@pytest.mark.parametrize("normalise", [True, False])
def test_loss_and_every_gradient_equal_those_of_vit_mae(normalise: bool) -> None:
    """Encoder, decoder, positions, target and mean: one value, and the gradient of each weight."""
    ours, theirs = twins(normalise)
    batch, pixels, noise = same_batch(ours)
    our_loss = ours(**batch)["pixel_loss"]
    their_loss = theirs(pixel_values=pixels, noise=noise).loss
    torch.testing.assert_close(our_loss, their_loss, rtol=1e-5, atol=1e-5)
    our_loss.backward()
    their_loss.backward()
    gradients_of_ours = {name: p.grad for name, p in ours.named_parameters() if p.grad is not None}
    mapped = for_vit_mae(gradients_of_ours, PATCH)
    compared = {name: p.grad for name, p in theirs.named_parameters() if p.requires_grad}
    assert mapped.keys() - compared.keys() == {"vit.embeddings.position_embeddings"}  # fixed in theirs
    for name, gradient in compared.items():
        torch.testing.assert_close(mapped[name], gradient, rtol=1e-5, atol=1e-5, msg=name)


def test_reconstruction_is_what_vit_mae_predicts() -> None:
    """Seen patches stay to the byte; the others are ViTMAE's logits with mean and deviation put back, in loops."""
    ours, theirs = twins(normalise=True)
    batch, pixels, noise = same_batch(ours)
    drawn = ours.reconstruct(batch["views"], batch["visible"])
    with torch.no_grad():
        logits = theirs(pixel_values=pixels, noise=noise).logits
    mean, deviation = (torch.tensor(v)[:, None, None] for v in ([0.5] * 3, [0.5] * 3))  # ViTImageProcessor's own
    for number in range(3):
        for place in range(ours.patches):
            top, left = (place // 4) * PATCH, (place % 4) * PATCH
            ours_here = drawn[number, :, top : top + PATCH, left : left + PATCH]
            if place in batch["visible"][number]:
                expected = batch["views"][number, :, top : top + PATCH, left : left + PATCH]
                assert torch.equal(ours_here, expected)
                continue
            original = pixels[number, :, top : top + PATCH, left : left + PATCH]
            predicted = logits[number, place].reshape(PATCH, PATCH, 3).permute(2, 0, 1)
            predicted = predicted * (original.var() + 1e-6).sqrt() + original.mean()
            expected = ((predicted * deviation + mean) * 255).clamp(0, 255)
            torch.testing.assert_close(ours_here.float(), expected, rtol=0, atol=0.51)


def test_patches_hold_what_transformers_holds() -> None:
    """The same rows as ViTMAE's patchify, their values in another order; and back."""
    theirs = ViTMAEForPreTraining(
        ViTMAEConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=1, image_size=24, patch_size=PATCH)
    )
    pixels = torch.randn(2, 3, 24, 24)
    rows = patchify(pixels, PATCH)
    channels_innermost = rows.unflatten(-1, (3, PATCH, PATCH)).movedim(2, -1).flatten(2)
    assert torch.equal(channels_innermost, theirs.patchify(pixels))
    assert torch.equal(unpatchify(rows, PATCH, 3, 3), pixels)
    wide = torch.randn(2, 3, 16, 40)
    assert torch.equal(unpatchify(patchify(wide, PATCH), PATCH, 2, 5), wide)


# --- the formula


@pytest.mark.parametrize("normalise", [True, False])
def test_loss_is_the_formula_in_plain_loops(normalise: bool) -> None:
    """Value and gradient of the mean squared error to patches with their own mean and deviation taken out."""
    torch.manual_seed(0)
    predicted = torch.randn(2, 3, 12, requires_grad=True)
    target = torch.randn(2, 3, 12) * 3 + 1
    expected, count = 0.0, 2 * 3 * 12
    expected_gradient = torch.zeros(2, 3, 12)
    for b in range(2):
        for m in range(3):
            values = [float(v) for v in target[b, m].double()]
            if normalise:
                mean = sum(values) / 12
                deviation = (sum((v - mean) ** 2 for v in values) / 11 + 1e-6) ** 0.5
                values = [(v - mean) / deviation for v in values]
            for place, value in enumerate(values):
                error = float(predicted[b, m, place].detach()) - value
                expected += error**2 / count
                expected_gradient[b, m, place] = 2 * error / count
    loss = pixel_loss(predicted, target, normalise)
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-5)
    (gradient,) = torch.autograd.grad(loss, predicted)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-5, atol=1e-7)


def test_a_perfect_prediction_costs_nothing_and_silence_costs_one() -> None:
    """Closed form: of a normalised patch of P values the squares add up to P - 1."""
    target = torch.randn(2, 5, 48)
    variance, mean = torch.var_mean(target, dim=-1, keepdim=True)
    assert float(pixel_loss((target - mean) / variance.sqrt(), target, True)) == pytest.approx(0, abs=1e-6)
    assert float(pixel_loss(torch.zeros_like(target), target, True)) == pytest.approx(47 / 48, rel=1e-4)
    grey = torch.full((1, 2, 48), 0.3)
    assert float(pixel_loss(torch.zeros_like(grey), grey, True)) == pytest.approx(0, abs=1e-6)


def test_others_are_those_not_chosen() -> None:
    chosen = torch.tensor([[4, 0], [2, 3]])
    assert others(chosen, 5).tolist() == [[1, 2, 3], [0, 1, 4]]
    rows = torch.arange(30).reshape(2, 5, 3)
    assert take(rows, chosen).tolist() == [[rows[0, 4].tolist(), rows[0, 0].tolist()], rows[1, 2:4].tolist()]


# --- what is seen, what is trained, what chance decides


@pytest.mark.parametrize("family", FAMILIES)
def test_a_hidden_patch_is_not_seen(family: Family) -> None:
    """The prediction has no gradient on the pixels of a masked patch, and some on those of every visible one."""
    objective = tiny_objective(family)
    batch = batch_of(objective, 2)
    pixels = objective.tower.normalise(batch["views"]).requires_grad_()
    masked = others(batch["visible"], objective.patches)
    objective._predict(pixels, batch["visible"], masked).square().sum().backward()
    assert pixels.grad is not None
    felt = patchify(pixels.grad, PATCH).abs().sum(-1) > 0
    expected = torch.zeros(2, objective.patches, dtype=torch.bool).scatter_(1, batch["visible"], True)
    assert torch.equal(felt, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_trained_parameters_are_those_with_a_gradient(family: Family) -> None:
    """With everything free to move, exactly the declared set gets a gradient."""
    objective = tiny_objective(family)
    objective.requires_grad_(True)
    moved = {name for name, gradient in gradients(objective, batch_of(objective, 4)).items() if gradient.abs().sum()}
    assert moved == objective.trained_parameters()


def test_all_chance_comes_from_the_generator() -> None:
    """One seed, one sample, whatever torch's and numpy's own generators say; another seed, another."""
    objective = tiny_objective()
    drawn: list[MaskedView] = []
    for seed in (3, 3, 4):
        torch.manual_seed(len(drawn))
        drawn.append(objective.sample(picture(0), np.random.default_rng(seed)))
    assert torch.equal(drawn[0].view, drawn[1].view) and torch.equal(drawn[0].visible, drawn[1].visible)
    assert not torch.equal(drawn[0].view, drawn[2].view)
    assert not torch.equal(drawn[0].visible, drawn[2].visible)


def test_every_patch_is_seen_equally_often() -> None:
    """A quarter of the patches, each place with the same chance."""
    objective = tiny_objective()
    generator = np.random.default_rng(0)
    seen = torch.zeros(objective.patches)
    for _ in range(400):
        sample = objective.sample(picture(0), generator)
        assert sample.view.shape == (3, SIDE, SIDE) and sample.view.dtype == torch.uint8
        assert len(sample.visible.unique()) == 4
        seen[sample.visible] += 1
    assert seen.min() > 70 and seen.max() < 130  # 100 +- 9 (one deviation)


def test_a_batch_of_eight_is_two_of_four_accumulated() -> None:
    objective = tiny_objective()
    batch = batch_of(objective, 8)
    whole = gradients(objective, batch)
    halves = [gradients(objective, {name: value[part] for name, value in batch.items()}) for part in halves_of(8)]
    for name, gradient in whole.items():
        torch.testing.assert_close((halves[0][name] + halves[1][name]) / 2, gradient, rtol=1e-4, atol=1e-6, msg=name)


def halves_of(count: int) -> tuple[slice, slice]:
    """The first and the second half."""
    return slice(0, count // 2), slice(count // 2, count)


def test_gradient_checkpointing_changes_no_gradient() -> None:
    objective = tiny_objective()
    batch = batch_of(objective, 3)
    plain = gradients(objective.train(), batch)
    objective.gradient_checkpointing_enable({"use_reentrant": False})
    assert all(layer.gradient_checkpointing for layer in (*objective.decoder.layers, *objective.tower.layers))
    for name, gradient in gradients(objective, batch).items():
        torch.testing.assert_close(gradient, plain[name], rtol=1e-5, atol=1e-7, msg=name)


def test_in_bf16_the_loss_is_nearly_the_same() -> None:
    objective = tiny_objective()
    batch = batch_of(objective, 4)
    exact = objective(**batch)["pixel_loss"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = objective(**batch)["pixel_loss"]
    assert rounded.dtype == torch.float32
    assert float(rounded.detach()) == pytest.approx(float(exact.detach()), rel=0.02)


@pytest.mark.parametrize("family", FAMILIES)
def test_it_learns_what_lies_behind_the_mask(family: Family) -> None:
    """Pictures of one slanted brightness each: what is hidden follows from what is seen; scored on unseen ones."""
    objective = tiny_objective(family)
    generator = np.random.default_rng(0)

    def slanted(count: int) -> dict[str, Tensor]:
        slopes = generator.choice((-1, 1), (count, 2)) * generator.uniform(1.5, 3.5, (count, 2))
        rows, columns = np.mgrid[-16:16, -16:16]
        grey = 128 + slopes[:, :1, None] * rows + slopes[:, 1:, None] * columns
        views = torch.from_numpy(grey.clip(0, 255).astype(np.uint8))[:, None].expand(-1, 3, -1, -1)
        visible = np.stack([generator.permutation(objective.patches)[: objective.seen] for _ in range(count)])
        return {"views": views, "visible": torch.from_numpy(visible)}

    unseen = slanted(32)
    with torch.no_grad():
        before = float(objective(**unseen)["pixel_loss"])
    optimiser = torch.optim.AdamW([p for p in objective.parameters() if p.requires_grad], lr=3e-3)
    for _ in range(120):
        optimiser.zero_grad()
        objective(**slanted(16))["pixel_loss"].backward()
        optimiser.step()
    with torch.no_grad():
        after = float(objective(**unseen)["pixel_loss"])
    assert before > 0.9
    assert after < 0.4


# --- what comes out, and what is refused


@pytest.mark.parametrize("family", FAMILIES)
def test_the_export_is_the_tower_alone(family: Family, tmp_path: Path) -> None:
    """Loadable by transformers without our code, equal in output, and nothing of the decoder in it."""
    objective = tiny_objective(family).eval()
    objective.export(tmp_path)
    assert type(AutoModel.from_pretrained(tmp_path)).__name__ == type(objective.tower.model).__name__
    pixels = torch.randn(2, 3, SIDE, SIDE)
    with torch.no_grad():
        torch.testing.assert_close(load_tower(tmp_path).eval()(pixels).patches, objective.tower(pixels).patches)
    assert not any("decoder" in file.read_text() for file in tmp_path.glob("*.json"))


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_above_count_down_to_the_decoder(family: Family) -> None:
    """The first layer of two has one layer and what follows above it; the decoder has nothing."""
    objective = tiny_objective(family)
    counted = {objective.layers_above(name) for name, _ in objective.named_parameters()}
    assert counted == {0, 1, 2, 3}
    assert {objective.layers_above(f"decoder.{name}") for name, _ in objective.decoder.named_parameters()} == {0}


def test_a_larger_picture_can_be_drawn() -> None:
    """Positions are interpolated in the tower and computed in the decoder."""
    objective = tiny_objective()
    views = torch.randint(0, 256, (1, 3, 48, 64), dtype=torch.uint8)
    drawn = objective.reconstruct(views, torch.tensor([[0, 5, 20]]))
    assert drawn.shape == views.shape and drawn.dtype == torch.uint8
    assert torch.equal(drawn[..., :PATCH, :PATCH], views[..., :PATCH, :PATCH])
    assert not torch.equal(drawn, views)


def test_what_cannot_be_masked_is_refused() -> None:
    """A clear message before the first step, with the way out."""
    with pytest.raises(ValueError, match=r"no patch tokens.*simclr"):
        build(Settings(), Start(side=64, tower=new_tower(ResNetShape(depth=18, image_side=64))))
    with pytest.raises(ValueError, match="none was given"):
        build(Settings(), Start(side=SIDE))
    with pytest.raises(ValueError, match=r"36 pixels does not divide into patches of 8.*side: 32"):
        build(Settings(), Start(side=36, tower=tiny_tower("vit")))
    with pytest.raises(ValueError, match="at least one to see"):
        build(Settings(masked=0.75), Start(side=PATCH, tower=tiny_tower("vit")))
    with pytest.raises(ValueError, match="have to divide the width"):
        PictureDecoder(WIDTH, 3 * PATCH**2, width=18, layers=1, heads=2)
