"""An index of a folder follows what happens to its pictures; searching it is exact; files are embedded in order."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from assistant.embeddings import Embedder, load_embedder
from assistant.file_embedding import embed_files
from assistant.images import PictureError, open_picture
from assistant.models import EMBEDDER, JOEY
from assistant.naming import label_embeddings, label_shares
from assistant.picture_index import COMMIT_EVERY, INDEX_FILE, IndexFileError, PictureIndex, Searcher
from assistant.searching import FolderSearch, said_of
from tests.test_command_line import assert_refused, kangaroo
from training.data.pictures import pixels_of


@pytest.fixture(scope="module")
def embedder() -> Embedder:
    """Joey's own."""
    return load_embedder(JOEY / EMBEDDER)


def picture(file: Path, number: int) -> None:
    """A small picture whose content hangs on `number`."""
    file.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((24, 24)).save(file)


class Embedding:
    """Stands for a tower: a vector from the mean colours, and which files it was asked for."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __call__(self, files: Iterable[Path]) -> Iterator[tuple[Path, Tensor | PictureError]]:
        for file in files:
            self.asked.append(file.name)
            try:
                vector = torch.from_numpy(np.array(open_picture(file))).float().mean((0, 1))
            except PictureError as error:
                yield file, error
            else:
                yield file, vector / vector.norm()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five pictures, one of them in a folder below."""
    for number, name in enumerate(("a.png", "b.png", "c.png", "d.png", "below/e.png")):
        picture(tmp_path / "pictures" / name, number)
    return tmp_path / "pictures"


def test_an_index_follows_the_folder(folder: Path) -> None:
    """New, unchanged, changed, renamed, copied, removed and damaged files; only unknown content is embedded."""
    index, embedding = PictureIndex(folder, "tower"), Embedding()
    news = index.refresh(embedding)
    assert (news.added, news.unchanged, len(embedding.asked)) == (5, 0, 5)
    assert said_of(news) == "5 pictures (5 new)"
    embedding.asked.clear()
    assert vars(index.refresh(embedding)) | {"damaged": {}} == vars(news) | {"added": 0, "unchanged": 5}
    assert embedding.asked == []
    picture(folder / "a.png", 77)
    (folder / "b.png").rename(folder / "below" / "renamed.png")
    (folder / "c.png").unlink()
    (folder / "copy of d.png").write_bytes((folder / "d.png").read_bytes())
    (folder / "damaged.png").write_bytes((folder / "d.png").read_bytes()[:60])
    (folder / "notes.txt").write_text("no picture")
    news = index.refresh(embedding)
    assert (news.changed, news.moved, news.removed, news.added, news.unchanged) == (1, 1, 1, 2, 2)
    assert list(news.damaged) == ["damaged.png"] and "damaged" in news.damaged["damaged.png"]
    assert sorted(embedding.asked) == ["a.png", "damaged.png"]
    paths, vectors = index.vectors()
    names = [str(path.relative_to(folder)) for path in paths]
    assert names == ["a.png", "below/e.png", "below/renamed.png", "copy of d.png", "d.png"]
    for path, vector in zip(paths, vectors, strict=True):
        ((_, expected),) = Embedding()([path])
        assert isinstance(expected, Tensor)
        np.testing.assert_allclose(vector, expected.numpy(), rtol=1e-6)
    embedding.asked.clear()
    assert list(index.refresh(embedding).damaged) == ["damaged.png"]
    assert embedding.asked == []  # a damaged picture is not tried again as long as it is the same
    picture(folder / "damaged.png", 9)
    news = index.refresh(embedding)
    assert (news.changed, news.damaged) == (1, {})


def test_a_touched_file_is_read_and_not_embedded(folder: Path) -> None:
    """Another time with the same bytes is no change."""
    index, embedding = PictureIndex(folder, "tower"), Embedding()
    index.refresh(embedding)
    embedding.asked.clear()
    os.utime(folder / "a.png", (1, 1))
    news = index.refresh(embedding)
    assert (news.unchanged, news.changed, embedding.asked) == (5, 0, [])


def test_an_index_of_another_tower_is_begun_anew(folder: Path) -> None:
    """Vectors of two towers never meet."""
    PictureIndex(folder, "one").refresh(Embedding())
    other, embedding = PictureIndex(folder, "another"), Embedding()
    assert other.refresh(embedding).added == 5
    assert len(embedding.asked) == 5


def test_an_index_that_cannot_be_kept_says_so(folder: Path, tmp_path: Path) -> None:
    """No folder, a damaged file, somebody else's database: the message names the file, and nothing is lost."""
    with pytest.raises(IndexFileError, match="there is no folder"):
        PictureIndex(tmp_path / "gone", "tower")
    damaged = tmp_path / "damaged.sqlite"
    damaged.write_bytes(b"this is no database at all" * 100)
    with pytest.raises(IndexFileError, match=r"damaged\.sqlite cannot be used"):
        PictureIndex(folder, "tower", damaged)
    import sqlite3

    foreign = tmp_path / "mine.sqlite"
    with sqlite3.connect(foreign) as database:
        database.execute("CREATE TABLE money (amount INTEGER)")
        database.execute("INSERT INTO money VALUES (7)")
    with pytest.raises(IndexFileError, match="a database of something else"):
        PictureIndex(folder, "tower", foreign)
    with sqlite3.connect(foreign) as database:
        assert database.execute("SELECT amount FROM money").fetchall() == [(7,)]


SLOW_INDEXING = """
import sys, time
from pathlib import Path
from assistant.picture_index import PictureIndex
from tests.test_searching import Embedding
def slowly(files):
    for number, result in enumerate(Embedding()(files)):
        if number > {enough}:
            print("enough", flush=True)
            time.sleep(60)
        yield result
PictureIndex(Path(sys.argv[1]), "tower").refresh(slowly)
"""


def test_an_index_survives_a_kill_while_it_is_written(tmp_path: Path) -> None:
    """What was committed before the kill is not embedded again, and the finished index is whole."""
    total = COMMIT_EVERY + 40
    for number in range(total):
        picture(tmp_path / f"{number:03d}.png", number)
    code = SLOW_INDEXING.format(enough=COMMIT_EVERY + 5)
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"enough\n"
        process.send_signal(signal.SIGKILL)
    index, embedding = PictureIndex(tmp_path, "tower"), Embedding()
    assert index.refresh(embedding).added == total
    assert len(embedding.asked) == total - COMMIT_EVERY
    assert len(index.vectors()[0]) == total


def test_searching_is_exact() -> None:
    """The nearest by FAISS are those of the plain products, best first; there are never more than pictures."""
    vectors = torch.nn.functional.normalize(torch.randn(500, 16, generator=torch.Generator().manual_seed(0)), dim=-1)
    paths = [Path(f"{number}.png") for number in range(500)]
    query = vectors[7] + 0.3 * vectors[8]
    hits = Searcher(paths, vectors.numpy()).nearest(query, 20)
    likeness, places = (vectors @ query).topk(20)
    assert [hit.path for hit in hits] == [paths[place] for place in places.tolist()]
    np.testing.assert_allclose([hit.likeness for hit in hits], likeness.numpy(), rtol=1e-5)
    assert len(Searcher(paths[:3], vectors[:3].numpy()).nearest(query, 20)) == 3


@pytest.mark.parametrize("batch", [1, 3, 32])
def test_files_are_embedded_as_pictures_are(batch: int, embedder: Embedder, folder: Path) -> None:
    """In the given order, a damaged one in its place, and each as the embedder itself embeds it."""
    (folder / "bad.png").write_bytes(b"nothing")
    files = [folder / name for name in ("c.png", "bad.png", "a.png", "below/e.png", "d.png", "b.png")]
    found = list(embed_files(embedder, files, batch))
    assert [file for file, _ in found] == files
    for file, vector in found:
        if file.name == "bad.png":
            assert isinstance(vector, PictureError)
            continue
        assert isinstance(vector, Tensor)
        torch.testing.assert_close(vector, embedder.pictures([pixels_of(open_picture(file))])[0], rtol=1e-4, atol=1e-5)


def test_a_folder_is_searched_by_words_and_by_picture(embedder: Embedder, folder: Path) -> None:
    """A picture finds itself first; words rank as their embedding does; an empty folder says so."""
    with FolderSearch(folder, embedder) as found:
        found.refresh()
        hits = found.by_picture(folder / "c.png", 3)
        assert hits[0].path == folder / "c.png" and hits[0].likeness == pytest.approx(1.0, abs=1e-5)
        by_words = found.by_words("a red star", 5)
        vectors = dict(zip(*found.index.vectors(), strict=True))
        query = embedder.texts(["a red star"])[0].numpy()
        expected = sorted(vectors, key=lambda path: -float(vectors[path] @ query))
        assert [hit.path for hit in by_words] == expected
    assert (folder / INDEX_FILE).is_file()
    (folder / "none").mkdir()
    with FolderSearch(folder / "none", embedder) as found:
        found.refresh()
        with pytest.raises(IndexFileError, match="no picture that can be read"):
            found.by_words("a dog", 1)


def test_label_shares_are_a_softmax_at_the_models_temperature(embedder: Embedder) -> None:
    """By the plain formula; they sum to one."""
    labels = label_embeddings(embedder.texts, ["dog", "red_star"])
    pictures = torch.nn.functional.normalize(torch.randn(3, labels.shape[1]), dim=-1)
    shares = label_shares(embedder, pictures, labels)
    scale = float(embedder.model.logit_scale.detach().exp())
    for row, one in zip(shares, pictures, strict=True):
        weights = [float(torch.exp(scale * (one @ label))) for label in labels]
        np.testing.assert_allclose(row.numpy(), np.array(weights) / sum(weights), rtol=1e-4)


def test_a_refresh_of_an_unchanged_folder_opens_no_picture(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes and times are enough."""
    index = PictureIndex(folder, "tower")
    index.refresh(Embedding())
    monkeypatch.setattr("assistant.picture_index.file_hashes", lambda files: iter([(f, 1 / 0) for f in files]))
    time.sleep(0.01)
    assert index.refresh(Embedding()).unchanged == 5


def test_the_commands_search_and_classify(folder: Path) -> None:
    """As a user types them: a picture finds itself first, the index says what it took in, shares are of the labels."""
    done = kangaroo("search", folder, "--like", folder / "c.png", "--count", "2")
    assert done.returncode == 0, done.stderr
    assert "5 pictures (5 new)" in done.stderr
    first, second = done.stdout.splitlines()
    assert first == f"1.000 {folder / 'c.png'}"
    assert float(second.split()[0]) < 1.0
    done = kangaroo("search", folder, "a red star")
    assert len(done.stdout.splitlines()) == 5
    assert done.stderr.strip().endswith("5 pictures")
    (folder / "bad.png").write_bytes(b"nothing")
    done = kangaroo("classify", folder / "a.png", folder / "bad.png", "--labels", "a red star, a dog", "--first", "2")
    assert done.returncode == 1
    assert "bad.png" in done.stderr and "1 of 2 pictures could not be read" in done.stderr
    (line,) = done.stdout.splitlines()
    assert line.startswith(f"{folder / 'a.png'}: ")
    assert "a red star" in line and "a dog" in line


def test_commands_that_cannot_search_say_why(folder: Path, tmp_path: Path) -> None:
    """Nothing to look for, no such folder, one label, a picture that is none, a tower without a text half."""
    assert_refused(kangaroo("search", folder), "say what to look for")
    assert_refused(kangaroo("search", tmp_path / "gone", "a dog"), "there is no folder")
    assert_refused(kangaroo("classify", folder / "a.png", "--labels", "dog"), "give at least two")
    (tmp_path / "words.png").write_text("no picture")
    assert_refused(kangaroo("search", folder, "--like", tmp_path / "words.png"), "not a picture that can be read")
    assert_refused(kangaroo("search", folder, "a dog", "--tower", tmp_path), "lacks config.json")
