"""A tower keeps its decoder, and transformers' ViTMAE checkpoints draw what transformers' own model predicts."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModel, ViTImageProcessor, ViTMAEConfig, ViTMAEForPreTraining
from typer.testing import CliRunner

from assistant.models import ModelError
from assistant.towers import ViTShape, load_tower, new_tower
from tests.test_mae import PATCH, SIDE, Family, batch_of, tiny_objective
from training.evaluation.reconstruction import GREY, load_masked_autoencoder, reconstruct
from training.objectives.mae import DECODER_FOLDER, DECODER_SETTINGS, DECODER_WEIGHTS
from training.picture_decoder import patchify
from ui.command_line import app


def views(height: int = SIDE, width: int = SIDE) -> Tensor:
    """Two pictures of noise, none of whose pixels is the grey of hidden patches."""
    return torch.randint(0, GREY, (2, 3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def vit_mae(folder: Path, normalise: bool) -> ViTMAEForPreTraining:
    """A tiny ViTMAE with random weights, saved in `folder` in the layout of facebook/vit-mae-base."""
    torch.manual_seed(0)
    config = ViTMAEConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=128,
        image_size=SIDE,
        patch_size=PATCH,
        decoder_hidden_size=16,
        decoder_num_hidden_layers=2,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=64,
        norm_pix_loss=normalise,
    )
    model = ViTMAEForPreTraining(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.decoder.initialize_weights(16)  # transformers 5.19 overwrites these positions with zeros
    model.save_pretrained(folder)
    ViTImageProcessor(size={"height": SIDE, "width": SIDE}).save_pretrained(folder)
    return model


@pytest.mark.parametrize("family", ["clip", "siglip", "dinov2", "vit"])
def test_an_exported_tower_draws_as_in_training(family: Family, tmp_path: Path) -> None:
    """The loaded decoder predicts to the bit what the trained one did; the tower beside it is a plain checkpoint."""
    trained = tiny_objective(family, masked=0.5, normalise_target=False).eval()
    trained.export(tmp_path)
    loaded = load_masked_autoencoder(tmp_path)
    assert loaded is not None
    assert loaded.settings == trained.settings and not loaded.training
    batch = batch_of(trained, 2)
    assert torch.equal(
        loaded.reconstruct(batch["views"], batch["visible"]), trained.reconstruct(batch["views"], batch["visible"])
    )
    assert type(AutoModel.from_pretrained(tmp_path)).__name__ == type(trained.tower.model).__name__
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert not any("decoder" in name for name in file.keys())  # noqa: SIM118


@pytest.mark.parametrize("normalise", [True, False])
def test_a_vit_mae_checkpoint_draws_what_transformers_predicts(normalise: bool, tmp_path: Path) -> None:
    """For the same mask: the hidden patches are its logits, undone in plain loops; the seen ones stay to the byte."""
    theirs = vit_mae(tmp_path, normalise)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert {"vit.encoder.layer.0.attention.attention.query.weight", "decoder.decoder_pos_embed"} <= names
    model = load_masked_autoencoder(tmp_path)
    assert model is not None
    shown = views()
    made = reconstruct(model, shown, seed=5)
    pixels = model.tower.normalise(shown)
    hidden = patchify(made.masked, PATCH).eq(GREY).all(-1)
    assert hidden.sum(1).tolist() == [12, 12]
    assert not torch.equal(hidden[0], hidden[1])
    with torch.no_grad():
        logits = theirs(pixel_values=pixels, noise=hidden.float()).logits
    for number in range(2):
        for place in range(16):
            top, left = place // 4 * PATCH, place % 4 * PATCH
            drawn = made.drawn[number, :, top : top + PATCH, left : left + PATCH]
            original = pixels[number, :, top : top + PATCH, left : left + PATCH]
            if not hidden[number, place]:
                assert torch.equal(drawn, shown[number, :, top : top + PATCH, left : left + PATCH])
                continue
            predicted = logits[number, place].reshape(PATCH, PATCH, 3).permute(2, 0, 1)
            if normalise:
                predicted = predicted * (original.var() + 1e-6).sqrt() + original.mean()
            expected = ((predicted * 0.5 + 0.5) * 255).clamp(0, 255)  # ViTImageProcessor's own mean and deviation
            torch.testing.assert_close(drawn.float(), expected, rtol=0, atol=0.51)


def test_hiding_is_a_matter_of_the_seed() -> None:
    """One seed, one mask; of a picture that is not square too, and never all of it."""
    model = tiny_objective("vit").eval()
    one, same, other = (reconstruct(model, views(48, 32), seed).masked for seed in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert patchify(one, PATCH).eq(GREY).all(-1).sum(1).tolist() == [18, 18]
    smallest = reconstruct(model, views(8, 16), 0).masked
    assert patchify(smallest, PATCH).eq(GREY).all(-1).sum(1).tolist() == [1, 1]


@torch.inference_mode()
def test_a_vit_mae_is_a_tower_too(tmp_path: Path) -> None:
    """Measured, searched and trained on: its patches and class token are those of transformers with nothing hidden."""
    theirs = vit_mae(tmp_path, normalise=True)
    tower = load_tower(tmp_path).eval()
    pixels = tower.normalise(views())
    count = tower.grid(SIDE, SIDE)[0] * tower.grid(SIDE, SIDE)[1]
    theirs.config.mask_ratio = 0.0
    hidden = theirs.vit(pixels, noise=torch.arange(count).float().expand(len(pixels), -1)).last_hidden_state
    output = tower(pixels)
    assert torch.allclose(output.patches, hidden[:, 1:], atol=1e-5)
    assert torch.allclose(output.pooled, hidden[:, 0], atol=1e-5)


def test_a_tower_without_a_decoder_has_none(tmp_path: Path) -> None:
    """And is loaded as ever."""
    new_tower(ViTShape("vit", 32, 1, 2, PATCH, SIDE)).save(tmp_path)
    assert load_masked_autoencoder(tmp_path) is None
    assert load_tower(tmp_path).image_side == SIDE


def test_the_command_draws_with_a_vit_mae(tmp_path: Path) -> None:
    """A sheet with and without what is drawn back, and a map of a folder."""
    vit_mae(tmp_path / "vit-mae", normalise=False)
    (tmp_path / "pictures").mkdir()
    for number in range(6):
        Image.fromarray(views()[0].permute(1, 2, 0).numpy() + number).save(tmp_path / "pictures" / f"{number}.png")
    widths = []
    for words in (("pictures/0.png",), ("pictures/0.png", "--no-reconstruct"), ("pictures", "--plot", "sheet.png")):
        asked = [str(tmp_path / word) if word[0] != "-" else word for word in words]
        out = () if "--plot" in words else ("--out", str(tmp_path / "sheet.png"))
        done = CliRunner().invoke(app, ["look", str(tmp_path / "vit-mae"), *asked, *out])
        assert done.exit_code == 0, done.output
        with Image.open(tmp_path / "sheet.png") as sheet:
            widths.append(sheet.width)
    assert widths[0] == pytest.approx(1.5 * widths[1], abs=1)


@pytest.mark.parametrize(
    ("file", "content"),
    [(DECODER_SETTINGS, b'{"masked": 2}'), (DECODER_WEIGHTS, b"no weights"), (DECODER_WEIGHTS, None)],
)
def test_a_damaged_decoder_is_named(file: str, content: bytes | None, tmp_path: Path) -> None:
    """Settings out of range, weights that are none, weights that are gone."""
    tiny_objective("vit").export(tmp_path)
    if content is None:
        (tmp_path / DECODER_FOLDER / file).unlink()
    else:
        (tmp_path / DECODER_FOLDER / file).write_bytes(content)
    with pytest.raises(ModelError, match=f"the decoder in .*{DECODER_FOLDER} cannot be read"):
        load_masked_autoencoder(tmp_path)


def test_a_vit_mae_of_another_make_is_refused(tmp_path: Path) -> None:
    """Positions that were learned, or never set, would be drawn with wrongly."""
    model = vit_mae(tmp_path, normalise=False)
    torch.nn.init.zeros_(model.decoder.decoder_pos_embed)
    model.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="not the sines and cosines"):
        load_masked_autoencoder(tmp_path)
