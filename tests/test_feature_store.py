"""Features are computed once: kept by content and found again, whatever happens to the files or the process."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from assistant.embeddings import tower_key
from assistant.tower_shapes import ResNetShape, ViTShape
from assistant.towers import Tower, TowerOutput, load_tower, new_tower
from training.data.pictures import DataError
from training.evaluation.feature_store import FORGOTTEN, KEEP_EVERY, FeatureStore, Row, default_folder
from training.evaluation.features import Features, compute_features
from training.evaluation.picture_data import open_data
from training.evaluation.tower_report import Wanted, measure_tower, said_of_reuse

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tower_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny DINOv2: a tower without a text half."""
    folder = tmp_path_factory.mktemp("tower")
    torch.manual_seed(0)
    new_tower(ViTShape(family="dinov2", width=32, layers=2, heads=2, patch=8, image_side=32)).save(folder)
    return folder


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Three pictures of each of two labels."""
    for number in range(6):
        draw(tmp_path / "pictures" / ("red" if number % 2 else "blue") / f"{number}.png", number)
    return tmp_path / "pictures"


def draw(file: Path, number: int) -> None:
    """A small picture whose content hangs on `number`."""
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(number).integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(file)


class Watched:
    """Counts the pictures that any tower looks at."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen = 0
        forward = Tower.forward

        def counted(tower: Tower, pixels: Tensor) -> TowerOutput:
            self.seen += len(pixels)
            return forward(tower, pixels)

        monkeypatch.setattr(Tower, "forward", counted)


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Watched:
    return Watched(monkeypatch)


def features_of(tower: Path, pictures: Path, store: FeatureStore | None, batch: int = 4) -> Features:
    data = open_data(str(pictures), "labels", Path)
    return compute_features(load_tower(tower).eval(), None, data, batch, CPU, store=store)


def assert_same(one: Features, other: Features) -> None:
    """To the bit, for they come out of a file."""
    assert torch.equal(one.pooled, other.pooled)
    assert torch.equal(one.patches, other.patches)
    assert one.sha256 == other.sha256


def test_what_was_kept_never_meets_the_tower_again(
    tower_folder: Path, pictures: Path, tmp_path: Path, watched: Watched
) -> None:
    """Nor does a renamed or copied picture; a new one does, and alone."""
    plain = features_of(tower_folder, pictures, None)
    watched.seen = 0
    first = features_of(tower_folder, pictures, FeatureStore(tmp_path / "kept", "tower", "float32"))
    assert (watched.seen, first.reused) == (6, 0)
    assert_same(first, plain)
    second = features_of(tower_folder, pictures, FeatureStore(tmp_path / "kept", "tower", "float32"))
    assert (watched.seen, second.reused) == (6, 6)
    assert_same(second, first)

    (pictures / "red" / "1.png").rename(pictures / "blue" / "moved.png")
    (pictures / "red" / "copy.png").write_bytes((pictures / "blue" / "0.png").read_bytes())
    draw(pictures / "red" / "new.png", 77)
    store = FeatureStore(tmp_path / "kept", "tower", "float32")
    third = features_of(tower_folder, pictures, store)
    assert (watched.seen, third.reused, store.notes) == (7, 7, [])
    # The new picture goes through the tower in a batch of another size, which may cost the last bit.
    exact = features_of(tower_folder, pictures, None)
    torch.testing.assert_close(third.pooled, exact.pooled, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(third.patches, exact.patches, atol=1e-6, rtol=1e-5)


def test_a_second_report_runs_no_tower(tower_folder: Path, pictures: Path, tmp_path: Path, watched: Watched) -> None:
    for number in range(4):
        draw(tmp_path / "test" / ("red" if number % 2 else "blue") / f"{number}.png", 100 + number)
    wanted = Wanted(str(pictures), str(tmp_path / "test"), neighbours=2)
    first = measure_tower(tower_folder, wanted, None, tmp_path / "kept")
    assert watched.seen == 10
    assert said_of_reuse(first) == []
    second = measure_tower(tower_folder, wanted, None, tmp_path / "kept")
    assert watched.seen == 10
    assert second["scores"] == first["scores"]
    assert [line.split(": ")[1] for line in said_of_reuse(second)] == [
        "the features of 6 of 6 pictures had been kept",
        "the features of 4 of 4 pictures had been kept",
    ]
    measure_tower(tower_folder, Wanted(**vars(wanted) | {"bf16": True}), None, tmp_path / "kept")
    assert watched.seen == 20  # another precision, other features
    measure_tower(tower_folder, wanted, None)
    assert watched.seen == 30  # without a folder nothing is kept or used


@pytest.mark.parametrize(
    "shape",
    [
        ViTShape(family="dinov2", width=32, layers=1, heads=2, patch=8, image_side=32),
        ViTShape(family="vit", width=32, layers=1, heads=2, patch=8, image_side=32),
        ViTShape(family="siglip", width=32, layers=1, heads=2, patch=8, image_side=32),
        ResNetShape(depth=18, image_side=32),
    ],
    ids=["dinov2", "vit", "siglip", "resnet"],
)
def test_the_key_follows_weights_and_image_processor(shape: ViTShape | ResNetShape, tmp_path: Path) -> None:
    """And neither the folder's name nor files that are nothing to the tower."""
    tower = new_tower(shape)
    tower.save(tmp_path / "one")
    tower.save(tmp_path / "two")
    (tmp_path / "two" / "README.md").write_text("A card.")
    key = tower_key(tmp_path / "one")
    assert key == tower_key(tmp_path / "two")
    tower.image_processor.image_mean = [0.1, 0.2, 0.3]
    tower.save(tmp_path / "two")
    other = tower_key(tmp_path / "two")
    with torch.no_grad():
        next(tower.parameters()).view(-1)[0] += 1
    tower.save(tmp_path / "two")
    assert len({key, other, tower_key(tmp_path / "two")}) == 3


def cut(content: bytes) -> bytes:
    return content[:-5]


def flip_last(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


def flip_header(content: bytes) -> bytes:
    return content[:8] + b"?" + content[9:]


def no_tensors(content: bytes) -> bytes:
    return b""


@pytest.mark.parametrize("damage", [cut, flip_last, flip_header, no_tensors])
def test_a_damaged_file_is_said_and_made_again(
    damage: object, tower_folder: Path, pictures: Path, tmp_path: Path, watched: Watched
) -> None:
    first = features_of(tower_folder, pictures, FeatureStore(tmp_path / "kept", "tower", "float32"))
    (file,) = (tmp_path / "kept").rglob("*.safetensors")
    assert callable(damage)
    file.write_bytes(damage(file.read_bytes()))
    store = FeatureStore(tmp_path / "kept", "tower", "float32")
    second = features_of(tower_folder, pictures, store)
    assert (second.reused, watched.seen) == (0, 12)
    assert_same(second, first)
    (note,) = store.notes
    assert "damaged" in note and "computed again" in note and file.name in note
    third = features_of(tower_folder, pictures, FeatureStore(tmp_path / "kept", "tower", "float32"))
    assert (third.reused, watched.seen) == (6, 12)
    assert_same(third, first)


def row(number: int) -> Row:
    return Row(torch.full((3,), float(number)), torch.full((2,), float(-number)))


def content(number: int) -> bytes:
    return number.to_bytes(32, "big")


WRITING = """
import sys
from pathlib import Path
from training.evaluation.feature_store import FeatureStore
from tests.test_feature_store import content, row
store = FeatureStore(Path(sys.argv[1]), "tower", "float32")
print("ready", flush=True)
sys.stdin.readline()
for number in range(int(sys.argv[2]), int(sys.argv[3])):
    store.add(content(number), row(number))
    store.write()
    print(number, flush=True)
"""


def writing(folder: Path, first: int, last: int) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", WRITING, str(folder), str(first), str(last)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_two_processes_write_at_once_and_one_is_killed(tmp_path: Path) -> None:
    """What either had written is there and right; of what the killed one was writing nothing is left for long."""
    with writing(tmp_path, 0, 40) as one, writing(tmp_path, 20, 100_000) as other:
        for process in (one, other):
            assert process.stdin and process.stdout
            assert process.stdout.readline() == "ready\n"
        for process in (one, other):
            assert process.stdin
            process.stdin.write("go\n")
            process.stdin.flush()
        assert one.stdout and other.stdout
        assert len(one.stdout.readlines()) == 40
        written = [int(other.stdout.readline()) for _ in range(40)][-1]
        other.send_signal(signal.SIGKILL)
    forgotten = next(tmp_path.iterdir()) / "a.partial"
    forgotten.write_bytes(b"half")
    os.utime(forgotten, (1, 1))
    store = FeatureStore(tmp_path, "tower", "float32")
    for number in range(written + 1):
        kept = store.get(content(number))
        assert kept is not None
        assert torch.equal(kept.pooled, row(number).pooled)
        assert torch.equal(kept.patches, row(number).patches)
    assert store.notes == []
    assert not forgotten.exists()
    assert FORGOTTEN > 60  # a file that another process is writing is left alone


def test_an_evaluation_that_is_stopped_keeps_what_it_had(
    tower_folder: Path, pictures: Path, tmp_path: Path, watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(6, 20):
        draw(pictures / "red" / f"{number}.png", number)
    forward = Tower.forward

    def interrupted(tower: Tower, pixels: Tensor) -> TowerOutput:
        if watched.seen >= 8:
            raise KeyboardInterrupt
        return forward(tower, pixels)

    with monkeypatch.context() as patched:
        patched.setattr(Tower, "forward", interrupted)
        with pytest.raises(KeyboardInterrupt):
            features_of(tower_folder, pictures, FeatureStore(tmp_path / "kept", "tower", "float32"))
    found = features_of(tower_folder, pictures, FeatureStore(tmp_path / "kept", "tower", "float32"))
    assert (found.reused, watched.seen) == (8, 20)


def test_many_pictures_are_written_in_parts(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path, "tower", "float32")
    with store:
        for number in range(KEEP_EVERY + 3):
            store.add(content(number), row(number))
        assert len(list(tmp_path.rglob("*.safetensors"))) == 1
    assert len(list(tmp_path.rglob("*.safetensors"))) == 2
    assert FeatureStore(tmp_path, "another tower", "float32").get(content(0)) is None


def test_a_full_disk_ends_the_keeping_and_not_the_measuring(
    tower_folder: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, data: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    plain = features_of(tower_folder, pictures, None)
    store = FeatureStore(tmp_path / "kept", "tower", "float32")
    monkeypatch.setattr(Path, "write_bytes", full)
    assert_same(features_of(tower_folder, pictures, store), plain)
    (note,) = store.notes
    assert "not kept any more" in note and "No space left" in note


def test_features_that_cannot_be_kept_are_refused_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(DataError, match=r"--features-folder.*--no-keep"):
        FeatureStore(tmp_path / "file", "tower", "float32")


def test_the_folder_is_the_users_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere/cache")
    assert default_folder() == Path("/somewhere/cache/kangaroo/features")
    for unset in ("", "relative"):  # the specification wants both passed over
        monkeypatch.setenv("XDG_CACHE_HOME", unset)
        assert default_folder() == Path.home() / ".cache/kangaroo/features"
