"""Every format of pictures is read whole, in a stable order, resumes exactly, and says what is missing or damaged."""

import csv
import io
import itertools
import json
import multiprocessing
import os
import pickle
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet as parquet
import pytest
import torch
import webdataset
from PIL import ExifTags, Image
from pydantic import ValidationError
from torch.utils.data import DataLoader

from assistant.images import PictureError, PictureLimits, open_picture
from tests.shards import picture_record
from training.config import PictureSource
from training.data.decoding import decode, kept_side
from training.data.pictures import DataError, DecodedPictures, Picture, PictureSet, read_rows
from training.data.pixel_cache import PixelMemory, pixel_file
from training.data.scenes import make_scene
from training.data.sources import open_pictures
from training.data.tar_streams import TarStream
from training.data.tars import TarPictures, expand_tars

SIDE = 32


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home-cache"))


def coloured(number: int, width: int = 40, height: int = 30) -> Image.Image:
    """A picture of one colour that tells its number."""
    return Image.new("RGB", (width, height), (number % 256, number // 256, 77))


def number_of(picture: Picture) -> int:
    red, green, blue = picture.pixels[:, 0, 0].tolist()
    assert blue == 77
    return red + 256 * green


def encoded(number: int, format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    coloured(number).save(buffer, format, **options)
    return buffer.getvalue()


def open_source(data: Path, side: int = SIDE, **fields: Any) -> PictureSet:
    return open_pictures(PictureSource.model_validate({"weight": 1, **fields}), lambda: data, side)


def no_folder() -> Path:
    raise AssertionError("the data folder was asked for")


def numbers(pictures: PictureSet) -> list[int]:
    return [number_of(pictures[index]) for index in range(len(pictures))]


def write(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


# --- draft decoding


def photograph(width: int, height: int) -> Image.Image:
    small = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def assert_reduced(whole: Image.Image, draft: Image.Image) -> None:
    """The draft shows about the means of the whole picture's squares of 1, 2, 4 or 8 pixels."""
    factor = next(f for f in (8, 4, 2, 1) if draft.size == (-(-whole.width // f), -(-whole.height // f)))
    assert np.abs(np.array(whole.reduce(factor)).astype(float) - np.array(draft)).mean() < 4


@pytest.mark.parametrize("size", [(640, 480), (481, 799), (97, 1200), (100, 100), (48, 300)])
@pytest.mark.parametrize("enough", [1, 48, 50, 96, 5000])
def test_a_draft_is_never_under_what_is_enough_and_shows_the_same(size: tuple[int, int], enough: int) -> None:
    buffer = io.BytesIO()
    photograph(*size).save(buffer, "JPEG", quality=95)
    whole, draft = open_picture(buffer.getvalue()), open_picture(buffer.getvalue(), enough=enough)
    assert min(draft.size) >= min(enough, *size)
    if min(size) < 2 * enough:
        assert draft.size == size
    if min(size) >= 8 * enough:
        assert draft.size == (-(-size[0] // 8), -(-size[1] // 8))
    assert_reduced(whole, draft)


@pytest.mark.parametrize("orientation", [3, 6, 8])
def test_a_draft_is_upright(orientation: int) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    buffer = io.BytesIO()
    photograph(800, 400).save(buffer, "JPEG", exif=exif, quality=95)
    whole, draft = open_picture(buffer.getvalue()), open_picture(buffer.getvalue(), enough=90)
    assert draft.size == (whole.width // 4, whole.height // 4)
    assert_reduced(whole, draft)


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_a_draft_of_other_modes_is_rgb(mode: str) -> None:
    buffer = io.BytesIO()
    photograph(400, 400).convert(mode).save(buffer, "JPEG", quality=95)
    whole, draft = open_picture(buffer.getvalue()), open_picture(buffer.getvalue(), enough=100)
    assert (draft.mode, draft.size) == ("RGB", (100, 100))
    assert_reduced(whole, draft)


def test_limits_count_the_whole_picture_not_the_draft() -> None:
    buffer = io.BytesIO()
    photograph(400, 400).save(buffer, "JPEG")
    with pytest.raises(PictureError, match="too many pixels"):
        open_picture(buffer.getvalue(), PictureLimits(max_pixels=150_000), enough=10)


def test_a_draft_of_a_cut_off_picture_is_refused() -> None:
    buffer = io.BytesIO()
    photograph(400, 400).save(buffer, "JPEG")
    with pytest.raises(PictureError, match="damaged"):
        open_picture(buffer.getvalue()[:2000], enough=50)


# --- folders


def test_a_folder_is_read_in_the_order_of_its_paths_with_its_sub_folders_as_labels(tmp_path: Path) -> None:
    for name, number in {"b/2.png": 1, "a_b/x/9.JPG": 0, "z.webp": 4, "b/10.png": 2, ".hidden/1.png": 9}.items():
        format = {"png": "PNG", "jpg": "JPEG", "webp": "WEBP"}[name.lower().rpartition(".")[2]]
        options = {"lossless": True} if format == "WEBP" else {}
        write(tmp_path / "all" / name, encoded(number, format, **options))
    write(tmp_path / "all" / "README.txt", "not a picture")
    pictures = open_source(tmp_path, folder="all", use="pictures")
    names = [Path(pictures[i].name).relative_to(tmp_path / "all").as_posix() for i in range(len(pictures))]
    assert names == ["a_b/x/9.JPG", "b/10.png", "b/2.png", "z.webp"]
    assert [pictures[i].label for i in range(4)] == ["x", "b", "b", None]
    assert [number_of(pictures[i]) for i in (1, 2, 3)] == [2, 1, 4]  # JPEG does not keep a colour exactly
    assert all(pictures[i].texts == () for i in range(4))
    labelled = open_source(tmp_path, folder="all", use="labels")
    assert [labelled[i].texts for i in range(3)] == [("A photo of a x.",), ("A photo of a b.",), ("A photo of a b.",)]
    assert len(labelled) == 3  # what has no label teaches no words


def test_underscores_of_a_label_are_spaces_in_words(tmp_path: Path) -> None:
    write(tmp_path / "sea_horse" / "1.png", encoded(1))
    picture = open_source(tmp_path, folder=str(tmp_path), use="labels")[0]
    assert (picture.label, picture.texts) == ("sea_horse", ("A photo of a sea horse.",))


def test_an_absolute_path_needs_no_data_folder(tmp_path: Path) -> None:
    write(tmp_path / "1.png", encoded(1))
    source = PictureSource.model_validate({"folder": str(tmp_path), "use": "pictures", "weight": 1})
    assert len(open_pictures(source, no_folder, SIDE)) == 1


def test_a_large_picture_is_cut_down_and_a_small_one_kept(tmp_path: Path) -> None:
    photograph(640, 480).save(tmp_path / "a.jpg")
    photograph(300, 900).save(tmp_path / "b.png")
    photograph(40, 30).save(tmp_path / "c.png")
    pictures = open_source(tmp_path, folder=".", use="pictures")
    kept = kept_side(SIDE)
    assert [tuple(pictures[i].pixels.shape) for i in range(3)] == [(3, kept, 64), (3, 144, kept), (3, 30, 40)]
    assert pictures[0].pixels.dtype == torch.uint8
    whole = photograph(300, 900).resize((kept, 144), Image.Resampling.BICUBIC)
    assert np.abs(np.array(whole).transpose(2, 0, 1).astype(int) - pictures[1].pixels.numpy()).mean() < 2


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"folder": "empty", "use": "pictures"}, r"no picture .* in the folder .*empty"),
        ({"folder": "gone", "use": "pictures"}, "there is no folder .*gone"),
        ({"folder": "plain"}, "none of the 1 pictures has captions; .*`use`"),
        ({"folder": "plain", "use": "labels"}, "none of the 1 pictures has labels"),
        ({"captions": "gone.jsonl"}, "there is no caption file"),
        ({"tars": "gone-*.tar"}, "there is no tar"),
        ({"shard": "gone"}, "no shard gone-00.parquet"),
    ],
)
def test_nothing_to_read_is_said_before_the_first_step(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "empty" / "sub").mkdir(parents=True)
    write(tmp_path / "plain" / "1.png", encoded(1))
    with pytest.raises(DataError, match=message):
        open_source(tmp_path, **fields)


# --- caption files


def write_captions(folder: Path, suffix: str) -> Path:
    for number in range(3):
        write(folder / "pictures" / f"{number}.png", encoded(number))
    file = folder / f"captions{suffix}"
    if suffix == ".jsonl":
        records = [
            {"image": "pictures/2.png", "caption": 'a colour, "two"', "source": "ours"},
            {"image": "pictures/0.png", "captions": ["nought", "  ", "naught"], "label": "zero"},
            {"image": "pictures/2.png", "caption": "zwei"},
        ]
        return write(file, "\n".join([*map(json.dumps, records), "", ""]))
    with file.open("w", newline="", encoding="utf-8-sig") as lines:
        table = csv.writer(lines)
        table.writerow(["caption", "image", "label"])
        table.writerow(['a colour, "two"', "pictures/2.png", ""])
        table.writerow(["nought", "pictures/0.png", "zero"])
        table.writerow(["naught", "pictures/0.png", ""])
        table.writerow(["zwei", "pictures/2.png", ""])
    return file


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_a_caption_file_names_its_pictures(suffix: str, tmp_path: Path) -> None:
    write_captions(tmp_path / "set", suffix)
    pictures = open_source(tmp_path, captions=f"set/captions{suffix}")
    assert numbers(pictures) == [2, 0]
    assert [pictures[i].texts for i in range(2)] == [('a colour, "two"', "zwei"), ("nought", "naught")]
    assert [pictures[i].label for i in range(2)] == [None, "zero"]
    assert len(open_source(tmp_path, captions=f"set/captions{suffix}", use="labels")) == 1


def test_missing_pictures_are_counted_and_the_first_are_named(tmp_path: Path) -> None:
    write(tmp_path / "here.png", encoded(1))
    lines = [json.dumps({"image": name, "caption": "x"}) for name in ("here.png", *(f"{n}.png" for n in range(5)))]
    write(tmp_path / "c.jsonl", "\n".join(lines))
    with pytest.raises(DataError, match=r"names 5 of 6 pictures .*/0\.png, .*/1\.png, .*/2\.png \.\.\.\. Paths count"):
        open_source(tmp_path, captions="c.jsonl")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("c.jsonl", '{"image": "1.png", "caption": "x"}\n{"image"', "line 2 .*not JSON"),
        ("c.jsonl", '{"picture": "1.png"}', "line 1 .*names no image"),
        ("c.jsonl", "[1]", "line 1 .*names no image"),
        ("c.jsonl", '{"image": "1.png", "caption": 3}', "line 1 .*caption is not a text"),
        ("c.jsonl", '{"image": "1.png", "captions": "x"}', "line 1 .*captions is not a list"),
        ("c.jsonl", "\n", "names no picture"),
        ("c.jsonl", b'{"image": "\xff"}', "not UTF-8"),
        ("c.csv", "file,text\n1.png,x", "header .*image and caption"),
        ("c.csv", "", "header .*image and caption"),
        ("c.csv", "image,caption\n,x", "line 2 .*names no image"),
        ("c.txt", "1.png x", "neither in .jsonl nor in .csv"),
    ],
)
def test_a_broken_caption_file_names_its_line(name: str, content: bytes | str, message: str, tmp_path: Path) -> None:
    write(tmp_path / "1.png", encoded(1))
    write(tmp_path / name, content)
    with pytest.raises(DataError, match=message):
        open_source(tmp_path, captions=name)


# --- shards and scenes


def test_a_shard_is_the_rows_that_were_written(tmp_path: Path) -> None:
    records = [picture_record(seed) for seed in range(3)]
    parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "s-00.parquet")
    for use in ("captions", "labels", "pictures"):
        pictures = open_source(tmp_path, side=160, shard="s", use=use)
        for seed in range(3):
            scene = make_scene(seed)
            texts = {"captions": scene.captions, "labels": (f"A photo of a {scene.kind}.",), "pictures": ()}[use]
            assert pictures[seed].texts == texts
            assert pictures[seed].label == scene.kind
            assert np.array_equal(pictures[seed].pixels.permute(1, 2, 0).numpy(), np.array(scene.image))


def test_scenes_are_pictures_with_their_words(tmp_path: Path) -> None:
    source = PictureSource.model_validate({"scenes": 4, "weight": 1})
    pictures = open_pictures(source, no_folder, side=96, first_scene=50)
    scene = make_scene(53, 96)
    assert len(pictures) == 4
    assert (pictures[3].texts, pictures[3].label) == (scene.captions, scene.kind)
    assert np.array_equal(pictures[3].pixels.permute(1, 2, 0).numpy(), np.array(scene.image))
    assert open_pictures(source, no_folder, side=32)[0].pixels.shape == (3, 64, 64)
    with pytest.raises(IndexError):
        pictures[4]


# --- datasets


def table_of(count: int = 4) -> datasets.Dataset:
    features = datasets.Features(
        {
            "photo": datasets.Image(),
            "said": datasets.Sequence(datasets.Value("string")),
            "kind": datasets.ClassLabel(names=["cat", "dog"]),
        }
    )
    rows = {
        "photo": [{"bytes": encoded(number), "path": None} for number in range(count)],
        "said": [[f"one {n}", f"two {n}"] for n in range(count)],
        "kind": [n % 2 for n in range(count - 1)] + [-1],
    }
    return datasets.Dataset.from_dict(rows, features)


COLUMNS: dict[str, Any] = {"image_column": "photo", "text_column": "said", "label_column": "kind"}


@pytest.fixture
def saved_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf-cache")
    datasets.DatasetDict({"train": table_of(), "other": table_of(2)}).save_to_disk(tmp_path / "saved")
    table_of().to_parquet(tmp_path / "parquet" / "train.parquet")
    return tmp_path


@pytest.mark.parametrize("place", ["./saved", "./parquet", "./parquet/train.parquet"])
def test_a_local_dataset_is_read_by_its_own_column_names(place: str, saved_table: Path) -> None:
    pictures = open_source(saved_table, dataset=place, **COLUMNS)
    witness = datasets.load_from_disk(str(saved_table / "saved"))["train"]
    assert len(pictures) == len(witness) == 4
    for picture, row in zip((pictures[i] for i in range(4)), witness, strict=True):
        assert np.array_equal(picture.pixels.permute(1, 2, 0).numpy(), np.array(row["photo"].convert("RGB")))
        assert list(picture.texts) == row["said"]
        assert picture.label == (None if row["kind"] == -1 else ["cat", "dog"][row["kind"]])
    labelled = open_source(saved_table, dataset=place, use="labels", **COLUMNS)
    assert [labelled[i].texts[0] for i in range(len(labelled))] == [f"A photo of a {k}." for k in ("cat", "dog", "cat")]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dataset": "./saved", "split": "gone"}, "no split gone, but train, other"),
        ({"dataset": "./saved", "image_column": "picture"}, "no column picture, but photo, said, kind"),
        ({"dataset": "./saved", "image_column": "kind"}, "the column kind .* holds no pictures"),
        ({"dataset": "./gone"}, "the dataset .*gone, split train, cannot be loaded"),
    ],
)
def test_a_dataset_that_does_not_fit_says_why(fields: dict[str, Any], message: str, saved_table: Path) -> None:
    with pytest.raises(DataError, match=message):
        open_source(saved_table, **{**COLUMNS, "use": "pictures", **fields})


def test_a_hub_name_without_a_network_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = (
        "from training.data.hub_datasets import TablePictures\n"
        "from training.data.pictures import DataError\n"
        "try:\n    TablePictures('nobody/kangaroo-pictures', 'train', 'image', None, None)\n"
        "except DataError as error:\n    print(error)\n"
    )
    offline = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    ran = subprocess.run([sys.executable, "-c", program], env=offline, capture_output=True, text=True, check=True)
    assert "the dataset nobody/kangaroo-pictures, split train, cannot be loaded" in ran.stdout
    assert "Fetch it once where there is a network" in ran.stdout


# --- tars


def write_tars(folder: Path, tars: int = 4, samples: int = 6) -> list[Path]:
    """Tars with a caption, a JSON record or a class beside each picture, written by webdataset itself."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"shard-{number:03d}.tar" for number in range(tars)]
    for shard, file in enumerate(files):
        with webdataset.TarWriter(str(file)) as writer:
            for place in range(samples):
                number = shard * samples + place
                sample: dict[str, Any] = {"__key__": f"part{shard}/{number:05d}"}
                if number % 3 == 0:
                    sample |= {"png": encoded(number), "txt": f"number {number}"}
                elif number % 3 == 1:
                    sample |= {"webp": encoded(number, "WEBP", lossless=True)}
                    sample |= {"json": {"caption": f"number {number}", "label": f"kind_{number % 2}", "extra": 1}}
                else:
                    sample |= {"png": encoded(number), "txt": f"number {number}", "cls": number % 2}
                writer.write(sample)
    return files


def by_webdataset(files: Sequence[Path]) -> list[tuple[str, bytes, str]]:
    """Key, picture and caption of every sample as webdataset reads them."""
    raw = webdataset.WebDataset([str(file) for file in files], shardshuffle=False)
    return [
        (s["__key__"], s.get("png") or s["webp"], s["txt"].decode() if "txt" in s else json.loads(s["json"])["caption"])
        for s in raw
    ]


def test_tars_read_at_random_give_what_webdataset_gives(tmp_path: Path) -> None:
    files = write_tars(tmp_path / "tars")
    read = TarPictures(files)
    catalogue = read.catalogue
    ours = [(catalogue.name(i), read.content(i), catalogue.texts(i, "captions")) for i in range(len(catalogue))]
    witness = by_webdataset(files)
    assert len(witness) == 24
    assert [(name.partition(" of ")[0], content, texts[0]) for name, content, texts in ours] == witness
    pictures = open_source(tmp_path, tars="tars/shard-{000..003}.tar")
    assert numbers(pictures) == list(range(24))
    assert [pictures[i].label for i in range(3)] == [None, "kind_1", "0"]


def test_the_index_is_kept_and_made_anew_for_another_tar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (file,) = write_tars(tmp_path / "tars", 1)
    first = TarPictures([file]).catalogue.table
    assert len(list((tmp_path / "home-cache" / "kangaroo" / "tars").iterdir())) == 1
    with monkeypatch.context() as patched:
        patched.setattr(tarfile, "open", lambda *a, **k: pytest.fail("the index was not used"))
        assert TarPictures([file]).catalogue.table.equals(first)
    write_tars(tmp_path / "tars", 1, samples=2)
    assert len(TarPictures([file]).catalogue) == 2


def test_a_home_without_room_for_the_index_is_no_obstacle(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path / "home-cache", "a file where the folder should be")
    assert len(TarPictures(write_tars(tmp_path / "tars", 1)).catalogue) == 6
    assert "is not kept" in caplog.text


@pytest.mark.parametrize("pattern", ["a-{000..003}.tar", "{a,b}-{8..11}.tar", "plain.tar", "x{1..2}y{03..04}"])
def test_braces_are_expanded_as_the_library_does(pattern: str, tmp_path: Path) -> None:
    expected = [tmp_path / name for name in webdataset.shardlists.expand_urls(pattern)]
    for path in expected:
        path.touch()
    assert expand_tars(str(tmp_path / pattern)) == expected


def test_globs_are_expanded_in_order_and_gaps_are_named(tmp_path: Path) -> None:
    files = write_tars(tmp_path, 3, 1)
    assert expand_tars(f"{tmp_path}/shard-*.tar") == files
    files[1].unlink()
    with pytest.raises(DataError, match=r"1 of 3 tars .* not there: .*shard-001\.tar"):
        expand_tars(f"{tmp_path}/shard-{{000..002}}.tar")


def tar_with(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def test_samples_without_a_picture_are_left_out_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    members = {"a.txt": b"alone", "b.png": encoded(1), "b.txt": b"with", "__meta__/c.png": b"", "c.seg.png": b"mask"}
    pictures = open_source(tmp_path, tars=str(tar_with(tmp_path / "t.tar", members)))
    assert [pictures[i].texts for i in range(len(pictures))] == [("with",)]
    assert "2 samples" in caplog.text and "a, c" in caplog.text


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"a.txt": b"x"}, "no sample"),
        ({"a.png": b"x", "a.jpg": b"x"}, "sample a of .* two pictures"),
        ({"a.png": b"x", "a.json": b"{"}, "a.json of .* cannot be read"),
        ({"a.png": b"x", "a.json": b"[]"}, "a.json of .* no JSON object"),
        ({"a.png": b"x", "a.json": b'{"caption": 3}'}, "a.json of .* caption is neither"),
        ({"a.png": b"x", "a.txt": b"\xff"}, "a.txt of .* cannot be read"),
    ],
)
def test_a_broken_sample_is_named(members: dict[str, bytes], message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        TarPictures([tar_with(tmp_path / "t.tar", members)])


@pytest.mark.parametrize("kept", [0, 100, 700, 3000])
def test_a_tar_that_was_cut_off_is_named(kept: int, tmp_path: Path) -> None:
    members = {f"{n}.png": np.random.default_rng(n).bytes(1500) for n in range(2)}
    whole = tar_with(tmp_path / "t.tar", members).read_bytes()
    with pytest.raises(DataError, match=r"t\.tar"):
        TarPictures([write(tmp_path / "t.tar", whole[:kept])])


def test_a_compressed_tar_is_refused_where_it_is_read_at_random(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "t.tar", "w:gz") as tar:
        tar.add(write(tmp_path / "1.png", encoded(1)), "1.png")
    with pytest.raises(DataError, match="no uncompressed tar"):
        TarPictures([tmp_path / "t.tar"])


# --- streams


def stream(files: Sequence[Path], **options: Any) -> TarStream:
    return TarStream(files, "captions", SIDE, **{"seed": 3, "buffer": 5, "epochs": 1, **options})


def drawn(pictures: Iterator[Picture] | TarStream, count: int | None = None) -> list[int]:
    return [number_of(picture) for picture in itertools.islice(pictures, count)]


def test_a_stream_gives_every_sample_once_an_epoch_in_a_new_order(tmp_path: Path) -> None:
    files = write_tars(tmp_path)
    two = drawn(stream(files, epochs=2))
    first, second = two[:24], two[24:]
    assert (
        sorted(first)
        == sorted(second)
        == list(range(24))
        == sorted(int(caption.split()[1]) for _, _, caption in by_webdataset(files))
    )
    assert first != second and first != sorted(first)
    assert drawn(stream(files, epochs=2)) == two
    assert drawn(stream(files, seed=4)) != first
    picture = next(iter(stream(files)))
    assert picture.texts == (f"number {number_of(picture)}",)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("workers", [0, 2])
def test_readers_share_a_stream_without_overlap_or_loss(ranks: int, workers: int, tmp_path: Path) -> None:
    files = write_tars(tmp_path, tars=5)
    seen: list[int] = []
    for rank in range(ranks):
        loader = DataLoader(
            stream(files, rank=rank, ranks=ranks, batch_size=3), 3, num_workers=workers, collate_fn=list
        )
        seen += [number_of(picture) for batch in loader for picture in batch]
    assert sorted(seen) == list(range(30))


@pytest.mark.parametrize("buffer", [1, 5, 100])
@pytest.mark.parametrize("used", [0, 1, 10, 23, 24, 25, 60])
def test_a_resumed_stream_goes_on_as_the_uninterrupted_one(buffer: int, used: int, tmp_path: Path) -> None:
    files = write_tars(tmp_path)
    whole = drawn(stream(files, buffer=buffer, epochs=None), 75)
    before = stream(files, buffer=buffer, epochs=None)
    assert drawn(before, used) == whole[:used]
    after = stream(files, buffer=buffer, epochs=None)
    after.load_state_dict(json.loads(json.dumps(before.state_dict())))
    assert drawn(after, 75 - used) == whole[used:]


@pytest.mark.parametrize("used_batches", [1, 5, 11])
def test_workers_resume_by_the_number_of_samples_used(used_batches: int, tmp_path: Path) -> None:
    def batches(start: TarStream) -> Iterator[list[int]]:
        return ([number_of(p) for p in b] for b in DataLoader(start, 3, num_workers=2, collate_fn=list))

    def fresh() -> TarStream:
        return stream(write_tars(tmp_path, tars=3), epochs=None, batch_size=3)

    whole = list(itertools.islice(batches(fresh()), 15))
    after = fresh()
    after.load_state_dict({**after.state_dict(), "samples": 3 * used_batches})
    assert list(itertools.islice(batches(after), 15 - used_batches)) == whole[used_batches:]


def test_what_was_used_is_not_decoded_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = write_tars(tmp_path)
    opened: list[str] = []
    real = open_picture

    def counted(content: bytes, **options: Any) -> Image.Image:
        opened.append(options["name"])
        return real(content, **options)

    monkeypatch.setattr("training.data.decoding.open_picture", counted)
    resumed = stream(files, epochs=None)
    resumed.load_state_dict({**resumed.state_dict(), "samples": 40})
    next(iter(resumed))
    assert len(opened) == 1


def test_a_stream_with_other_tars_does_not_resume(tmp_path: Path) -> None:
    files = write_tars(tmp_path)
    with pytest.raises(DataError, match="tars changed"):
        stream(files[:3]).load_state_dict(stream(files).state_dict())


def test_too_few_tars_for_the_readers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="1 tars cannot be shared among 2 readers"):
        next(iter(stream(write_tars(tmp_path, 1), ranks=2)))


def test_a_pipe_and_a_compressed_tar_are_streamed(tmp_path: Path) -> None:
    (file,) = write_tars(tmp_path, 1)
    expected = drawn(stream([file]))
    compressed = tmp_path / "c.tar.gz"
    with tarfile.open(compressed, "w:gz") as packed, tarfile.open(file) as plain:
        for member in plain.getmembers():
            packed.addfile(member, plain.extractfile(member))
    assert drawn(stream([compressed])) == expected
    pipe = tmp_path / "pipe.tar"
    os.mkfifo(pipe)
    feeder = threading.Thread(target=lambda: pipe.write_bytes(file.read_bytes()), daemon=True)
    feeder.start()
    resumed = stream([pipe])
    resumed.load_state_dict({**resumed.state_dict(), "samples": 2})
    assert drawn(resumed) == expected[2:]
    feeder.join()


def test_a_damaged_picture_of_a_stream_is_replaced_and_the_places_stay(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    members = {f"{n:02d}.png": encoded(n) if n not in (2, 3) else b"no picture" for n in range(10)}
    file = tar_with(tmp_path / "t.tar", members)

    def fresh() -> TarStream:
        return TarStream([file], "pictures", SIDE, 3, buffer=4, epochs=1, damaged=0.5)

    whole = [picture.name for picture in fresh()]
    good = {f"{n:02d}" for n in range(10) if n not in (2, 3)}
    assert len(whole) == 10 and set(whole) == good
    assert caplog.text.count("skipped a damaged picture") == 2
    for used in range(10):
        resumed = fresh()
        resumed.load_state_dict({**resumed.state_dict(), "samples": used})
        assert [picture.name for picture in resumed] == whole[used:]
    with pytest.raises(DataError, match=r"pictures cannot be read.*0[23].*damaged"):
        list(TarStream([file], "pictures", SIDE, 3, epochs=1, damaged=0.0))


# --- damage


def damaged_folder(folder: Path, good: int, bad: Sequence[int]) -> Path:
    for number in range(good + len(bad)):
        content = encoded(number) if number not in bad else encoded(number)[:60]
        write(folder / f"{number:03d}.png", content)
    return folder


def test_a_damaged_picture_is_named_and_its_place_is_taken_by_the_next(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    damaged_folder(tmp_path / "p", 7, bad=[2, 3, 9])
    pictures = open_source(tmp_path, folder="p", use="pictures", damaged=0.3)
    assert len(pictures) == 10
    backwards = [number_of(pictures[index]) for index in reversed(range(10))]
    assert numbers(pictures) == [0, 1, 4, 4, 4, 5, 6, 7, 8, 0] == backwards[::-1]
    for name in ("002.png", "003.png", "009.png"):
        assert caplog.text.count(name) == 1
    assert "damaged or cut off" in caplog.text


def test_more_damage_than_allowed_ends_the_run_before_the_first_step(tmp_path: Path) -> None:
    damaged_folder(tmp_path / "p", 7, bad=[2, 3, 9])
    message = r"folder .*p: 3 of 10 pictures cannot be read.*0\.2.*009\.png.*damaged"
    with pytest.raises(DataError, match=message):
        open_source(tmp_path, folder="p", use="pictures", damaged=0.2)


def test_strict_mode_allows_none(tmp_path: Path) -> None:
    damaged_folder(tmp_path / "p", 9, bad=[4])
    assert len(open_source(tmp_path, folder="p", use="pictures")) == 10
    with pytest.raises(DataError, match=r"1 of 10 .*004\.png"):
        open_source(tmp_path, folder="p", use="pictures", damaged=0)


@pytest.mark.parametrize("cache", [None, "cache"])
@pytest.mark.parametrize("damaged", [0.01, 1.0])
def test_nothing_but_damage_is_refused(cache: str | None, damaged: float, tmp_path: Path) -> None:
    damaged_folder(tmp_path / "p", 0, bad=range(70))
    with pytest.raises(DataError, match=r"pictures cannot be read|none of its 70 pictures can be read"):
        open_source(tmp_path, folder="p", use="pictures", damaged=damaged, cache=cache)[0]


def test_workers_count_damage_together(tmp_path: Path) -> None:
    # More pictures than are tried at the start, damaged where those do not look.
    bad = [5, 6, 7, 8, 45, 46, 47, 48, 145, 146, 147, 148]
    damaged_folder(tmp_path / "p", 400 - len(bad), bad)
    probed = set(np.linspace(0, 399, 64).round().astype(int))
    unseen = len(set(bad) - probed)
    pictures = open_source(
        tmp_path, folder="p", use="pictures", damaged=(unseen - 1.5) / 400 + len(set(bad) & probed) / 400
    )
    with pytest.raises(DataError, match="of 400 pictures cannot be read"):
        list(DataLoader(pictures, 8, num_workers=2, collate_fn=list))  # type: ignore[arg-type]


# --- caches


def test_memory_keeps_to_its_budget_and_changes_nothing(tmp_path: Path) -> None:
    for number in range(6):
        write(tmp_path / f"{number}.png", encoded(number))
    one = 3 * 30 * 40
    memory = PixelMemory(6, int(2.5 * one))
    for number in range(6):
        memory.put(number, torch.full((3, 30, 40), number, dtype=torch.uint8))
        memory.put(number, torch.full((3, 30, 40), number, dtype=torch.uint8))
    kept = [memory.get(number) for number in range(6)]
    assert [None if k is None else int(k.max()) for k in kept] == [0, 1, None, None, None, None]
    for gigabytes in (0.0, 2.5 * one / 2**30, 1.0):
        pictures = open_source(tmp_path, folder=".", use="pictures", memory=gigabytes)
        assert numbers(pictures) == numbers(pictures) == list(range(6))


def test_what_is_kept_cannot_be_changed_from_outside(tmp_path: Path) -> None:
    write(tmp_path / "1.png", encoded(1))
    for cache in (None, "cache"):
        pictures = open_source(tmp_path, folder=".", use="pictures", cache=cache)
        pictures[0].pixels.zero_()
        assert number_of(pictures[0]) == 1


def test_what_one_worker_decodes_the_others_find(tmp_path: Path) -> None:
    for number in range(80):
        write(tmp_path / f"{number:02d}.png", encoded(number))
    pictures = open_source(tmp_path, folder=".", use="pictures")
    loaded = [p for b in DataLoader(pictures, 8, num_workers=2, collate_fn=list) for p in b]  # type: ignore[arg-type]
    assert [number_of(picture) for picture in loaded] == list(range(80))
    for number in range(80):
        (tmp_path / f"{number:02d}.png").unlink()
    assert numbers(pictures) == list(range(80))  # this process decoded 64 of them only


def test_rows_of_a_shard_are_decoded_within_their_budget(tmp_path: Path) -> None:
    parquet.write_table(pyarrow.Table.from_pylist([picture_record(s) for s in range(3)]), tmp_path / "s-00.parquet")
    rows = read_rows(tmp_path, "s")
    for budget in (0, 160 * 160 * 3, 2**20):
        decoded = DecodedPictures(rows, budget)
        for index in (0, 1, 2, 0, 1, 2):
            assert np.array_equal(decoded[index].permute(1, 2, 0).numpy(), np.array(make_scene(index).image))


def test_a_cache_outlives_the_run_and_notices_another_picture(tmp_path: Path) -> None:
    folder = damaged_folder(tmp_path / "p", 5, bad=[1])

    def fresh() -> PictureSet:
        return open_source(tmp_path, folder="p", use="pictures", cache="cache", damaged=0.5)

    assert numbers(fresh()) == [0, 2, 2, 3, 4, 5]
    (finished,) = [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]
    times = {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in finished.iterdir()}
    again = fresh()
    assert numbers(again) == [0, 2, 2, 3, 4, 5]
    assert {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in finished.iterdir()} == times
    assert numbers(pickle.loads(pickle.dumps(again))) == [0, 2, 2, 3, 4, 5]
    write(folder / "003.png", encoded(33))
    assert numbers(fresh()) == [0, 2, 2, 33, 4, 5]


def test_pixels_are_the_same_with_and_without_a_cache(tmp_path: Path) -> None:
    for number, size in enumerate([(640, 480), (100, 900), (20, 20)]):
        photograph(*size).save(tmp_path / f"{number}.jpg", quality=90)
    plain = open_source(tmp_path, folder=".", use="pictures", memory=0)
    cached = open_source(tmp_path, folder=".", use="pictures", cache="cache")
    assert all(torch.equal(plain[i].pixels, cached[i].pixels) for i in range(3))


def test_a_cache_that_was_not_finished_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    damaged_folder(tmp_path / "p", 40, bad=[])
    calls: list[int] = []

    def dying(content: bytes | Path, name: str, side: int) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 20:
            os._exit(9)
        return decode(content, name, side)

    def fresh() -> PictureSet:
        return open_source(tmp_path, folder="p", use="pictures", cache="cache")

    with monkeypatch.context() as patched:
        patched.setattr("training.data.decoding.decode", dying)
        killed = multiprocessing.get_context("fork").Process(target=fresh)
        killed.start()
        killed.join()
    assert killed.exitcode == 9
    assert [path.suffix for path in sorted((tmp_path / "cache").iterdir())] == [".lock", ".partial"]
    assert numbers(fresh()) == list(range(40))
    assert [path.suffix for path in sorted((tmp_path / "cache").iterdir())] == ["", ".lock"]


def test_one_process_fills_the_cache_and_the_others_wait(tmp_path: Path) -> None:
    def decode_slowly(index: int) -> torch.Tensor:
        with (tmp_path / "calls").open("a") as calls:
            calls.write(f"{index}\n")
        time.sleep(0.05)
        return torch.full((3, 2, 2), index, dtype=torch.uint8)

    def use() -> None:
        cached = pixel_file(tmp_path / "cache", "key", 8, decode_slowly, lambda place, reason: None)
        values = [int(pixels.max()) for pixels in map(cached.get, range(8)) if pixels is not None]
        os._exit(0 if values == list(range(8)) else 1)

    processes = [multiprocessing.get_context("fork").Process(target=use) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert sorted((tmp_path / "calls").read_text().split()) == [str(index) for index in range(8)]


# --- what a recipe says


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "name one of shard, scenes, folder, captions, tars, dataset, not none"),
        ({"folder": "a", "tars": "b"}, "not folder and tars"),
        ({"folder": "a", "text_column": "b"}, "text_column is said of a dataset only"),
        ({"folder": "a", "use": "questions"}, "a folder has no questions"),
        ({"dataset": "a"}, "use: captions of a dataset needs text_column"),
        ({"dataset": "a", "use": "labels"}, "needs label_column"),
        ({"folder": "a", "damaged": 1.5}, "less than or equal to 1"),
        ({"folder": "a", "colour": 1}, "Extra inputs are not permitted"),
    ],
)
def test_a_source_that_cannot_be_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        PictureSource.model_validate({"weight": 1, **fields})
