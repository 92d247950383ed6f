"""An index of a folder follows what happens to its pictures; searching it is exact; files are embedded in order."""

import os
import sqlite3
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
from typer.testing import CliRunner, Result

from assistant.embeddings import Embedder, load_embedder
from assistant.file_embedding import embed_files
from assistant.images import PictureError, open_picture
from assistant.models import EMBEDDER, JOEY
from assistant.naming import label_embeddings, label_shares
from assistant.nearest import Searcher
from assistant.picture_index import COMMIT_EVERY, INDEX_FILE, IndexFileError, PictureIndex
from assistant.pixels import pixels_of
from assistant.searching import FolderSearch, said_of
from tests.test_command_line import kangaroo
from ui.command_line import app


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


def test_an_index_of_another_tower_is_kept_until_it_is_made_anew(folder: Path) -> None:
    """Vectors of two towers never meet; a wrong --tower costs nobody an index."""
    PictureIndex(folder, "one").refresh(Embedding())
    with pytest.raises(IndexFileError, match=r"made with another tower.*--tower.*--index.*--anew"):
        PictureIndex(folder, "another")
    embedding = Embedding()
    assert PictureIndex(folder, "one").refresh(embedding).unchanged == 5
    assert PictureIndex(folder, "another", anew=True).refresh(embedding).added == 5
    assert len(embedding.asked) == 5
    with pytest.raises(IndexFileError, match="made with another tower"):
        PictureIndex(folder, "one")


def test_an_index_of_an_older_layout_is_begun_anew(folder: Path) -> None:
    """There is nothing in it that could be used."""
    PictureIndex(folder, "tower").refresh(Embedding())
    with sqlite3.connect(folder / INDEX_FILE) as database:
        database.execute("UPDATE facts SET value = '0' WHERE name = 'layout'")
    assert PictureIndex(folder, "tower").refresh(Embedding()).added == 5


def test_an_index_that_cannot_be_kept_says_so(folder: Path, tmp_path: Path) -> None:
    """No folder, a damaged file, somebody else's database: the message names the file, and nothing is lost."""
    with pytest.raises(IndexFileError, match="there is no folder"):
        PictureIndex(tmp_path / "gone", "tower")
    damaged = tmp_path / "damaged.sqlite"
    damaged.write_bytes(b"this is no database at all" * 100)
    with pytest.raises(IndexFileError, match=r"damaged\.sqlite cannot be used"):
        PictureIndex(folder, "tower", damaged)
    foreign = tmp_path / "mine.sqlite"
    with sqlite3.connect(foreign) as database:
        database.execute("CREATE TABLE money (amount INTEGER)")
        database.execute("INSERT INTO money VALUES (7)")
    with pytest.raises(IndexFileError, match="a database of something else"):
        PictureIndex(folder, "tower", foreign)
    with sqlite3.connect(foreign) as database:
        assert database.execute("SELECT amount FROM money").fetchall() == [(7,)]
    index = PictureIndex(folder, "tower", tmp_path / "cut.sqlite")
    index.refresh(Embedding())
    index.close()
    whole = (tmp_path / "cut.sqlite").read_bytes()
    (tmp_path / "cut.sqlite").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(IndexFileError, match=r"cut\.sqlite cannot be used: .*delete it if it is damaged"):
        PictureIndex(folder, "tower", tmp_path / "cut.sqlite").refresh(Embedding())


KILLED_WHILE_INDEXING = """
import os, signal, sqlite3, sys
from pathlib import Path
from assistant import picture_index
from tests.test_searching import Embedding

folder, file = map(Path, sys.argv[1:])
picture_index.COMMIT_EVERY = 2
connect = sqlite3.connect

def killed_at(number):
    # Connections that kill this process when they begin their statement of that number.
    def connected(*arguments, **settings):
        left = iter(range(number))
        database = connect(*arguments, **settings)
        database.set_trace_callback(lambda words: next(left, None) is None and os.kill(os.getpid(), signal.SIGKILL))
        return database
    return connected

for number in range(1000):
    child = os.fork()
    if child == 0:
        sqlite3.connect = killed_at(number)
        picture_index.PictureIndex(folder, "tower", file).refresh(Embedding())
        os._exit(0)
    finished = os.waitpid(child, 0)[1] == 0
    index = picture_index.PictureIndex(folder, "tower", file)
    news = index.refresh(Embedding())
    print(number, finished, news.unchanged + news.added, len(index.vectors()[0]), flush=True)
    index.close()
    if finished:
        break
    for left in file.parent.glob(file.name + "*"):
        left.unlink()
"""


def test_an_index_survives_a_kill_at_any_statement(folder: Path, tmp_path: Path) -> None:
    """Killed before each statement in turn, from the first on a new file to the last: it opens again and is whole."""
    done = subprocess.run(
        [sys.executable, "-c", KILLED_WHILE_INDEXING, str(folder), str(tmp_path / "killed.sqlite")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert len(lines) > 20  # statements
    assert [finished for _, finished, *_ in lines] == ["False"] * (len(lines) - 1) + ["True"]
    assert {tuple(counts) for _, _, *counts in lines} == {("5", "5")}


def test_what_was_embedded_is_kept_when_somebody_stops_it(tmp_path: Path) -> None:
    """By Ctrl-C every picture that was done; by a kill all but those since the last commit."""
    total = COMMIT_EVERY + 40
    for number in range(total):
        picture(tmp_path / f"{number:03d}.png", number)

    def stopped(files: Iterable[Path]) -> Iterator[tuple[Path, Tensor | PictureError]]:
        for number, result in enumerate(Embedding()(files)):
            if number == COMMIT_EVERY + 5:
                raise KeyboardInterrupt
            yield result

    index, embedding = PictureIndex(tmp_path, "tower"), Embedding()
    with pytest.raises(KeyboardInterrupt):
        index.refresh(stopped)
    with sqlite3.connect(tmp_path / INDEX_FILE) as database:
        assert database.execute("SELECT count(*) FROM contents").fetchone() == (COMMIT_EVERY + 5,)
    news = PictureIndex(tmp_path, "tower").refresh(embedding)
    assert (news.unchanged, news.added) == (COMMIT_EVERY + 5, 35)
    assert len(embedding.asked) == 35
    assert len(index.vectors()[0]) == total


def test_two_processes_may_use_an_index_at_once(folder: Path) -> None:
    """While one embeds, another brings the index up to date and clears what is gone; neither loses anything."""
    index = PictureIndex(folder, "tower")

    def interrupted(files: Iterable[Path]) -> Iterator[tuple[Path, Tensor | PictureError]]:
        for number, result in enumerate(Embedding()(files)):
            if number == 3:
                (folder / "a.png").rename(folder / "moved.png")
                assert PictureIndex(folder, "tower").refresh(Embedding()).added == 5
            yield result

    index.refresh(interrupted)
    index.refresh(Embedding())
    names = {path.name for path in index.vectors()[0]}
    assert names == {"moved.png", "b.png", "c.png", "d.png", "e.png"}


def test_a_file_without_its_embedding_is_embedded_again(folder: Path) -> None:
    """Whatever took it: the picture does not stay away from searches for ever."""
    index, embedding = PictureIndex(folder, "tower"), Embedding()
    index.refresh(Embedding())
    with sqlite3.connect(folder / INDEX_FILE) as database:
        database.execute("DELETE FROM contents WHERE content IN (SELECT content FROM files WHERE path = 'b.png')")
    index.refresh(embedding)
    assert embedding.asked == ["b.png"] and len(index.vectors()[0]) == 5


@pytest.mark.parametrize("apart", [1.0, 1e-4, 0.0])
def test_searching_is_exact(apart: float) -> None:
    """The nearest are those of the plain products in float64, best first, also where float16 cannot tell them apart."""
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(1, 16, generator=generator) + apart * torch.randn(500, 16, generator=generator)
    vectors = torch.nn.functional.normalize(vectors, dim=-1)
    paths = [Path(f"{number}.png") for number in range(500)]
    query = torch.nn.functional.normalize(vectors[7] + 0.3 * torch.randn(16, generator=generator), dim=-1)
    searcher = Searcher(paths, vectors.numpy())
    likeness, places = (vectors.double() @ query.double()).topk(500)
    for count in (1, 20, 499, 600):
        hits = searcher.nearest(query, count)
        assert len(hits) == min(count, 500)
        np.testing.assert_allclose([hit.likeness for hit in hits], likeness[:count].numpy(), rtol=0, atol=3e-7)
        assert apart < 1 or [hit.path for hit in hits] == [paths[place] for place in places[:count].tolist()]
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


def run(*words: object) -> Result:
    """The command in this process, in a wide terminal."""
    return CliRunner().invoke(app, list(map(str, words)), env={"COLUMNS": "200"})


def test_the_installed_command_searches(folder: Path) -> None:
    """As a user types it, in a process of its own: a picture finds itself first, the index says what it took in."""
    done = kangaroo("search", folder, "--like", folder / "c.png", "--count", "2")
    assert done.returncode == 0, done.stderr
    assert "5 pictures (5 new)" in done.stderr
    assert "token_id" not in done.stderr  # what transformers says of its own defaults helps nobody
    first, second = done.stdout.splitlines()
    assert first == f"1.000 {folder / 'c.png'}"
    assert float(second.split()[0]) < 1.0


def test_the_commands_search_and_classify(folder: Path) -> None:
    """What is searched by words, what changed meanwhile, and shares that are of the labels."""
    assert "5 pictures (5 new)" in run("search", folder, "a red star").stderr
    (folder / "a.png").unlink()
    (folder / "b.png").rename(folder / "renamed.png")
    (folder / "bad.png").write_bytes(b"nothing")
    done = run("search", folder, "a red star")
    assert len(done.stdout.splitlines()) == 4
    assert "left out: bad.png" in done.stderr
    assert done.stderr.strip().endswith("5 pictures (1 new, 1 moved, 1 gone)")
    done = run("classify", folder / "c.png", folder / "bad.png", "--labels", "a red star, a dog", "--first", "2")
    assert done.exit_code == 1
    assert "bad.png" in done.stderr and "1 of 2 pictures could not be read" in done.stderr
    (line,) = done.stdout.splitlines()
    assert line.startswith(f"{folder / 'c.png'}: ")
    assert "a red star" in line and "a dog" in line


def test_commands_that_cannot_search_say_why(folder: Path, tmp_path: Path) -> None:
    """Nothing to look for, no such folder, one label, a picture that is none, an index of another tower, and so on."""
    (tmp_path / "words.png").write_text("no picture")
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    PictureIndex(tmp_path / "other", "another tower").close()
    for words, said in (
        (("search", folder), "say what to look for"),
        (("search", tmp_path / "gone", "a dog"), "there is no folder"),
        (("search", tmp_path / "empty", "a dog"), "no picture that can be read"),
        (("search", tmp_path / "other", "a dog"), "was made with another tower"),
        (("classify", folder / "a.png", "--labels", "dog"), "give at least two"),
        (("search", folder, "--like", tmp_path / "words.png"), "not a picture that can be read"),
        (("search", folder, "a dog", "--tower", tmp_path), "lacks config.json"),
    ):
        done = run(*words)
        assert done.exit_code == 1, words
        assert said in done.stderr, done.stderr
        assert done.stdout == ""
    assert run("search", tmp_path / "other", "a dog", "--anew").exit_code == 1  # no picture, but an index of its own
    assert "no picture" in run("search", tmp_path / "other", "a dog").stderr
