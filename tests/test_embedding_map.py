"""Sheets and maps of pictures: neighbours are scikit-learn's, groups stay apart on the map, files have their form."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.manifold import trustworthiness
from sklearn.neighbors import NearestNeighbors
from typer.testing import CliRunner, Result

from assistant.images import open_picture
from assistant.pixels import pixels_of, processed
from assistant.towers import ResNetShape, Tower, ViTShape, new_tower
from tests.test_mae import tiny_objective
from training.data.pictures import DataError
from training.evaluation import embedding_map
from training.evaluation.drawing import DOTS_PER_INCH, INCHES, TITLE_INCHES, Cell, draw_sheet, shortened
from training.evaluation.embedding_map import FEWEST, place
from training.evaluation.map_drawing import COLOURS, REST, draw_map, label_colours, spread
from training.evaluation.picture_features import FileFeatures, features_of, neighbours
from ui.command_line import app

RED, GREEN = (220, 10, 20), (10, 200, 30)


def tiny_tower() -> Tower:
    """A ViT of two layers and two heads for 32 pixels, random weights."""
    torch.manual_seed(0)
    return new_tower(ViTShape("vit", 32, 2, 2, 8, 32)).eval()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two labels, `red` and `green`, of five pictures each: one colour, with one other pixel that makes them differ."""
    for label, colour in (("red", RED), ("green", GREEN)):
        (tmp_path / "pictures" / label).mkdir(parents=True)
        for number in range(5):
            picture = Image.new("RGB", (40, 30), colour)
            picture.paste((255, 255, 255), (0, 0, 4 + 6 * number, 8))
            picture.save(tmp_path / "pictures" / label / f"{number}.png")
    return tmp_path / "pictures"


def groups(count: int, seed: int = 0) -> FileFeatures:
    """`count` vectors of 24 channels, in turn near one and near another direction."""
    noise = torch.randn(count, 24, generator=torch.Generator().manual_seed(seed))
    noise[::2, 0] += 12
    noise[1::2, 1] += 12
    vectors = torch.nn.functional.normalize(noise, dim=-1)
    return FileFeatures(tuple(Path(f"{number}.png") for number in range(count)), vectors, ())


def run(*words: object) -> Result:
    """The command in this process, in a wide terminal."""
    return CliRunner().invoke(app, list(map(str, words)), env={"COLUMNS": "200"})


def pixels_like(file: Path, colour: tuple[int, int, int]) -> int:
    """How many pixels of the picture in `file` have exactly that colour."""
    with Image.open(file) as picture:
        return int((np.array(picture.convert("RGB")) == colour).all(-1).sum())


# --- features and neighbours


@pytest.mark.parametrize("kind", ["pooled", "patches"])
def test_features_are_the_towers_own(kind: str, folder: Path) -> None:
    """Of unit length, in the given order; a damaged file is named and leaves the others where they are."""
    tower = tiny_tower()
    (folder / "red" / "bad.png").write_bytes(b"nothing")
    files = [folder / "red" / "0.png", folder / "red" / "bad.png", folder / "green" / "3.png"]
    found = features_of(tower, files, kind)  # type: ignore[arg-type]
    assert found.files == (files[0], files[2])
    assert len(found.damaged) == 1 and "bad.png" in found.damaged[0]
    for file, vector in zip(found.files, found.vectors, strict=True):
        with torch.inference_mode():
            output = tower(processed(tower.image_processor, [pixels_of(open_picture(file))]))
        expected = output.pooled[0] if kind == "pooled" else sum(output.patches[0]) / 16
        torch.testing.assert_close(vector, expected / expected.square().sum().sqrt(), rtol=1e-4, atol=1e-5)
    with pytest.raises(DataError, match=r"none of 1 pictures can be read.*bad\.png"):
        features_of(tower, files[1:2], "pooled")


def test_neighbours_are_scikit_learns_without_oneself(tmp_path: Path) -> None:
    """By cosine, nearest first; a picture that lies in the folder does not find itself, however it is named."""
    known = groups(30)
    files = tuple(tmp_path / file for file in known.files)
    for file in files:
        file.touch()
    (tmp_path / "link.png").symlink_to(files[3])
    among = FileFeatures(files, known.vectors, ())
    asked = FileFeatures((tmp_path / "link.png", files[8]), known.vectors[[3, 8]], ())
    vectors = known.vectors.numpy()
    distances, places = NearestNeighbors(n_neighbors=30, metric="cosine").fit(vectors).kneighbors(vectors[[3, 8]])
    for hits, own, away, order in zip(neighbours(asked, among, 5), (3, 8), distances, places, strict=True):
        expected = [(files[p], 1 - d) for p, d in zip(order, away, strict=True) if p != own][:5]
        assert [hit.path for hit in hits] == [path for path, _ in expected]
        np.testing.assert_allclose([hit.likeness for hit in hits], [likeness for _, likeness in expected], rtol=1e-4)
    assert [len(hits) for hits in neighbours(asked, among, 100)] == [29, 29]


# --- the map


def purity(points: np.ndarray, labels: np.ndarray) -> float:
    """The share of pairs of near neighbours (5 of each point) on the map that have one label."""
    places = NearestNeighbors(n_neighbors=6).fit(points).kneighbors(points, return_distance=False)[:, 1:]
    return float((labels[places] == labels[:, None]).mean())


def test_groups_stay_apart_on_the_map() -> None:
    """Near neighbours on it are of one group, as they are not when the groups are dealt anew; and it is the seed's."""
    features = groups(60)
    placed = place(features, seed=3)
    assert placed.files == features.files
    assert placed.points.min() >= 0 and placed.points.max() <= 1
    group = np.arange(60) % 2
    assert purity(placed.points, group) > 0.98
    assert purity(placed.points, np.random.default_rng(0).permutation(group)) < 0.7
    # Noise of 22 channels beyond the two groups has no plane to lie in; random places reach 0.5.
    assert trustworthiness(features.vectors.numpy(), placed.points) > 0.8
    np.testing.assert_array_equal(place(features, seed=3).points, placed.points)


@pytest.mark.parametrize("count", [FEWEST, 6, 20])
def test_few_pictures_have_a_map_too(count: int) -> None:
    """The perplexity follows; every point is a number, and no two are one."""
    points = place(groups(count), 0).points
    assert points.shape == (count, 2) and np.isfinite(points).all()
    assert len(np.unique(points.round(6), axis=0)) == count


def test_a_collapsed_tower_has_no_map_and_copies_do_not_break_one() -> None:
    """One vector for all is refused in words; pairs of equal ones lie together."""
    files = tuple(Path(f"{number}.png") for number in range(40))
    rounding = 1e-8 * torch.randn(40, 24, generator=torch.Generator().manual_seed(0))
    with pytest.raises(DataError, match="the tower has collapsed"):
        place(FileFeatures(files, torch.ones(40, 24) / 24**0.5 + rounding, ()), 0)
    points = place(FileFeatures(files, groups(20).vectors.repeat_interleave(2, 0), ()), 0).points
    assert np.isfinite(points).all()
    assert np.abs(points[::2] - points[1::2]).max() < 0.1


def test_too_few_and_too_many_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Too few are refused; of too many a lot is drawn, each in its place."""
    with pytest.raises(DataError, match="needs at least 5 pictures that can be read, and there are 4"):
        place(groups(4), 0)
    monkeypatch.setattr(embedding_map, "MOST", 20)
    placed = place(groups(50), 1)
    assert len(placed.files) == 20 == len(set(placed.files))
    numbers = [int(file.stem) for file in placed.files]
    assert numbers == sorted(numbers) and max(numbers) > 20
    assert purity(placed.points, np.array(numbers) % 2) > 0.9


def test_small_copies_do_not_overlap_and_leave_no_room() -> None:
    """Squares of that side around the chosen points are apart; every other point is too near to one of them."""
    points = np.random.default_rng(0).random((200, 2))
    kept = spread(points, 0.1, seed=0)
    for number in range(200):
        gaps = [float(np.abs(points[other] - points[number]).max()) for other in kept if other != number]
        assert (min(gaps) >= 0.1) == (number in kept)
    assert len(kept) > 20


def test_the_commonest_labels_have_colours_of_their_own() -> None:
    """Twenty of them; the others and pictures without a label are grey."""
    labels: list[str | None] = [f"label {n:02d}" for n in range(25) for _ in range(30 - n)]
    colours = label_colours([*labels, None])
    assert [colours[f"label {n:02d}"] for n in range(20)] == list(COLOURS)
    assert len(set(COLOURS)) == 20
    assert all(colours[f"label {n}"] == REST for n in range(20, 25)) and colours[None] == REST


def test_a_map_is_written(folder: Path, tmp_path: Path) -> None:
    """Copies on the left, dots on the right; one panel where there are no labels; many labels fit too."""
    files = sorted(folder.rglob("*.png"))
    placed = place(FileFeatures(tuple(files), groups(10).vectors, ()), 0)
    draw_map(placed, [file.parent.name for file in files], "two", tmp_path / "two.png", 0)
    draw_map(placed, [None] * 10, "none", tmp_path / "one.png", 0)
    draw_map(placed, [f"{'long ' * 12}{n}" for n in range(10)], "many", tmp_path / "many.svg", 0)
    with Image.open(tmp_path / "two.png") as two, Image.open(tmp_path / "one.png") as one:
        assert two.width > 2 * two.height * 0.9 and abs(one.width / one.height - 1) < 0.1
    assert pixels_like(tmp_path / "two.png", RED) > 1000 and pixels_like(tmp_path / "two.png", GREEN) > 1000
    assert "<svg" in (tmp_path / "many.svg").read_text()[:500]


# --- the sheet


def test_a_sheet_has_a_cell_for_each_picture(tmp_path: Path) -> None:
    """Lines of unequal length; a map lies over its picture and changes it."""
    picture = np.full((8, 8, 3), RED, np.uint8)
    draw_sheet([[Cell(picture, "one")], [Cell(picture), Cell(picture, "x" * 99)]], tmp_path / "plain.png")
    draw_sheet([[Cell(picture)], [Cell(picture), Cell(picture, "", np.eye(2))]], tmp_path / "heat.png")
    with Image.open(tmp_path / "plain.png") as sheet:
        assert sheet.size == (
            round(2 * INCHES * DOTS_PER_INCH),
            pytest.approx(2 * (INCHES + TITLE_INCHES) * DOTS_PER_INCH, abs=1),
        )
    assert pixels_like(tmp_path / "plain.png", RED) == pytest.approx(
        1.5 * pixels_like(tmp_path / "heat.png", RED), rel=0.05
    )
    assert shortened("abcdefghij", 5) == "ab…ij" and shortened("abcde", 5) == "abcde"


def test_the_command_draws_a_sheet_with_neighbours(folder: Path, tmp_path: Path) -> None:
    """A line for each picture and one for its neighbours; what cannot be read in the folder is named."""
    tiny_tower().save(tmp_path / "tower")
    (folder / "bad.png").write_bytes(b"nothing")
    out = tmp_path / "sheet.png"
    asked = (folder / "red" / "1.png", folder / "green" / "2.png")
    done = run("look", tmp_path / "tower", *asked, "--among", folder, "--count", 5, "--out", out)
    assert done.exit_code == 0, done.output
    assert f"see {out}" in done.stdout and "left out" in done.stderr and "bad.png" in done.stderr
    with Image.open(out) as sheet:
        columns, lines = sheet.width / INCHES / DOTS_PER_INCH, sheet.height / (INCHES + TITLE_INCHES) / DOTS_PER_INCH
        assert (round(columns), round(lines)) == (5, 4)  # five neighbours; a picture, patches and two heads are four
    assert pixels_like(out, RED) > 20_000 and pixels_like(out, GREEN) > 20_000


def test_a_picture_alone_in_its_folder_has_no_neighbours(tmp_path: Path) -> None:
    """The sheet is drawn all the same."""
    tiny_tower().save(tmp_path / "tower")
    (tmp_path / "alone").mkdir()
    picture = tmp_path / "alone" / "one.png"
    Image.new("RGB", (40, 30), RED).save(picture)
    done = run("look", tmp_path / "tower", picture, "--among", tmp_path / "alone", "--out", tmp_path / "sheet.png")
    assert done.exit_code == 0, done.output


def test_the_command_draws_back_what_mae_hides(folder: Path, tmp_path: Path) -> None:
    """Two more columns where the tower has a decoder, none with --no-reconstruct, and an error where it has none."""
    tiny_objective("vit").export(tmp_path / "mae")
    picture, out = folder / "red" / "0.png", tmp_path / "sheet.png"
    columns = []
    for option in ((), ("--no-reconstruct",)):
        assert run("look", tmp_path / "mae", picture, "--out", out, *option).exit_code == 0
        with Image.open(out) as sheet:
            columns.append(round(sheet.width / INCHES / DOTS_PER_INCH))
    assert columns == [6, 4]
    tiny_tower().save(tmp_path / "plain")
    done = run("look", tmp_path / "plain", picture, "--out", out, "--reconstruct")
    assert done.exit_code == 1
    assert "has no decoder" in done.stderr and "kangaroo train mae" in done.stderr


def test_a_resnet_has_patches_and_a_word_about_attention(folder: Path, tmp_path: Path) -> None:
    """Larger pictures, so that it has patches enough for three components."""
    new_tower(ResNetShape(18, 96)).save(tmp_path / "resnet")
    out = tmp_path / "sheet.png"
    done = run("look", tmp_path / "resnet", folder / "red" / "0.png", "--out", out)
    assert done.exit_code == 0, done.output
    assert "no attention to draw" in done.stderr
    with Image.open(out) as sheet:
        assert round(sheet.width / INCHES / DOTS_PER_INCH) == 2


def test_the_command_draws_a_map(folder: Path, tmp_path: Path) -> None:
    """Of a folder with labels; the same again for the same seed."""
    tiny_tower().save(tmp_path / "tower")
    maps = [tmp_path / "one.png", tmp_path / "two.png"]
    for file in maps:
        done = run("look", tmp_path / "tower", folder, "--plot", file, "--features", "patches")
        assert done.exit_code == 0, done.output
    with Image.open(maps[0]) as one, Image.open(maps[1]) as two:
        assert one.width > one.height
        assert np.array_equal(np.array(one), np.array(two))


def test_what_cannot_be_drawn_is_said(folder: Path, tmp_path: Path) -> None:
    """One line with the way out for each mistake."""
    tiny_tower().save(tmp_path / "tower")
    tower, picture = tmp_path / "tower", folder / "red" / "0.png"
    (tmp_path / "empty").mkdir()
    for words, said in (
        ((tower, folder), "is a folder: name pictures in it, or draw a map of it with --plot"),
        ((tower, picture, "--plot", tmp_path / "map.png"), "--plot draws a map of one folder"),
        ((tower, folder, "--plot", tmp_path / "map.gif"), "name a .png, .svg or .pdf file"),
        ((tower, tmp_path / "empty", "--plot", tmp_path / "map.png"), "no picture"),
        ((tower, picture, "--among", tmp_path / "gone"), "there is no folder"),
        ((tower, picture, "--side", "36"), "--side: 32"),
        ((tower, *[picture] * 61), "name at most 60"),
        ((tower, tmp_path / "gone.png"), "there is no such file"),
        ((tmp_path / "gone", picture), "there is no folder"),
    ):
        done = run("look", *words, *(() if "--plot" in words else ("--out", tmp_path / "out.png")))
        assert done.exit_code == 1, words
        assert said in done.stderr, done.stderr
        assert done.stdout == ""
    assert not (tmp_path / "out.png").exists() and not (tmp_path / "map.png").exists()
