"""Measuring an assistant here in the process, end to end, and the command that tells assistants from towers."""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from playwright.sync_api import Browser
from playwright.sync_api import Request as PageRequest
from torch.nn.functional import log_softmax
from typer.testing import CliRunner

from assistant.answering import Assistant, Request
from assistant.chat import assistant_message, encode_conversation, user_message
from assistant.towers import ViTShape, new_tower
from tests.tiny import make_tiny_llava
from training.data.scenes import EVALUATION_SEED, make_scene
from training.evaluation.assistant_report import Wanted, examine_assistant, kind_of_model, predictions_file
from training.evaluation.in_process import InProcess
from training.evaluation.likelihood import log_likelihoods, see, weigh_answer, weigh_text
from training.evaluation.predictions import Prediction, PredictionError
from training.evaluation.scorecard import measure_scenes
from training.evaluation.task_items import Item, TaskItems, open_task
from training.evaluation.task_run import answer_task, findings_of
from ui.command_line import app

EVIL = "<script>document.title = 'owned'</script>"


@pytest.fixture(scope="module")
def assistant(tiny_model: Path) -> Assistant:
    return Assistant.load(tiny_model)


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a task of each kind of one's own; texts in them try to be more than texts."""
    folder = tmp_path_factory.mktemp("own")
    for seed in range(4):
        make_scene(EVALUATION_SEED + seed).image.save(folder / f"{seed}.png")

    def task(kind: str, rows: list[dict]) -> None:
        (folder / f"{kind}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / f"{kind}.yaml").write_text(
            f"about: mine\nkind: {kind}\ndata: {{file: {kind}.jsonl}}\nmax_tokens: 6\n"
        )

    asked = [{"image": f"{n // 3}.png", "question": f"Which one is it, {n}? {EVIL}"} for n in range(12)]
    task("words", [row | {"answer": EVIL} for row in asked])
    task("vqa", [row | {"answers": ["red", "a red", "blue"]} for row in asked])
    task("yes_no", [row | {"answer": ("yes", "no")[n % 2]} for n, row in enumerate(asked)])
    task(
        "true_false", [row | {"answer": ("true", "false")[n % 2], "group": str(n // 4)} for n, row in enumerate(asked)]
    )
    choices = ["a red circle", "green", "two blue squares on the left"]
    task("choices", [row | {"answer": choices[n % 3], "choices": choices} for n, row in enumerate(asked)])
    task("captions", [{"image": f"{n}.png", "captions": list(make_scene(n).captions)} for n in range(4)])
    task("perplexity", [{"text": make_scene(n).captions[0]} for n in range(5)])
    return folder


def test_a_likelihood_is_that_of_a_plain_loop_over_logits(assistant: Assistant) -> None:
    """Each answer alone, unpadded, through transformers' own forward pass; answers of several lengths in one batch."""
    scenes = [make_scene(EVALUATION_SEED + seed) for seed in range(2)]
    pictures = [scene.image for scene in scenes]
    seen = see(assistant, pictures)
    asked = [
        (place, question.question, answer)
        for place, scene in enumerate(scenes)
        for question in scene.questions[:2]
        for answer in (question.answer, "a green circle on the left", "no")
    ]
    batch = [weigh_answer(assistant, words, answer, place, len(seen[place])) for place, words, answer in asked]
    found = log_likelihoods(assistant, batch, seen)
    tokenizer = assistant.processor.tokenizer
    for (place, words, answer), (likelihood, count) in zip(asked, found, strict=True):
        prompt = assistant.inputs([Request(words, (pictures[place],))])
        ends = [*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        ids = torch.cat([prompt["input_ids"], torch.tensor([ends])], dim=1)
        with torch.inference_mode():
            logits = assistant.model(
                input_ids=ids, pixel_values=prompt["pixel_values"], attention_mask=torch.ones_like(ids)
            ).logits[0]
        total = 0.0
        for number, token in enumerate(ends):
            total += float(log_softmax(logits[prompt["input_ids"].shape[1] + number - 1], -1)[token])
        assert (likelihood, count) == (pytest.approx(total, abs=1e-3), len(ends))


def test_a_texts_likelihood_is_transformers_loss(assistant: Assistant) -> None:
    texts = ["A red circle.", make_scene(3).captions[0], "two"]
    found = log_likelihoods(assistant, [weigh_text(assistant, text) for text in texts], [])
    tokenizer = assistant.processor.tokenizer
    for text, (likelihood, count) in zip(texts, found, strict=True):
        words = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids = torch.tensor([[tokenizer.bos_token_id, *words, tokenizer.eos_token_id]])
        with torch.inference_mode():
            loss = assistant.model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss
        assert (likelihood / count, count) == (pytest.approx(-float(loss), abs=1e-4), ids.shape[1] - 1)


def test_choices_are_weighed_as_training_reads_them(assistant: Assistant) -> None:
    messages = [user_message("Which?", 1), assistant_message("a red circle")]
    encoded = encode_conversation(assistant.processor.tokenizer, messages, 100)
    weighed = weigh_answer(assistant, "Which?", "a red circle", 0, 100)
    assert (weighed.ids, weighed.weighed) == (encoded.ids, encoded.supervised)


class Rule:
    """Answers by a rule that the test knows, in place of a model."""

    def __init__(self, rule: Callable[[str], str]) -> None:
        self.rule = rule

    def answer_batch(self, requests: Sequence[Request], max_new_tokens: int = 64) -> list[str]:
        return [self.rule(request.question) for request in requests]

    def predict(self, asked: TaskItems, items: Sequence[Item], keep: Callable[[Prediction], None]) -> None:
        for item in items:
            keep(Prediction(id=item.id, answer=self.rule(item.question)))


def test_scenes_are_scored_as_the_model_card_scores_them(tmp_path: Path) -> None:
    rule = Rule(lambda question: ("2", "red", "yes", "circle", "left")[len(question) % 5])
    card = measure_scenes(rule, 40)
    asked = open_task("scenes", None, limit=40)
    stored, new = answer_task(asked, rule, tmp_path / "kept.jsonl", {})
    findings = findings_of(asked, stored, partial=False)
    values = {m.part: (float(m.value(m.counts.sum(0))), m.majority, m.items) for m in findings.measures}
    expected = {None: card["all"], **card["by_kind"]}
    assert values == {part: (s["right"], s["majority"], s["questions"]) for part, s in expected.items()}
    assert new == len(asked.items) == card["all"]["questions"]


@pytest.mark.parametrize("kind", ["words", "vqa", "yes_no", "true_false", "choices", "captions", "perplexity"])
def test_every_kind_is_measured_shown_and_gone_on_from(
    tiny_model: Path, own: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the command: a report, a page, and a second run that asks nothing and says the same."""
    monkeypatch.setenv("PATH", "")  # METEOR has a test of its own
    out, page = tmp_path / "report.json", tmp_path / "report.html"
    words = ["evaluate", str(tiny_model), "--task", str(own / f"{kind}.yaml"), "--out", str(out), "--page", str(page)]
    done = CliRunner().invoke(app, [*words, "--batch", "5"])
    assert done.exit_code == 0, done.output
    assert "is an assistant (llava)" in done.stderr
    report = json.loads(out.read_text())
    (task,) = report["tasks"]
    questions = {"captions": 4, "perplexity": 5}.get(kind, 12)
    pictures = 0 if kind == "perplexity" else 4
    assert (task["questions"], task["answered"], task["answered_now"]) == (questions,) * 3
    assert (task["pictures"], task["pictures_decoded"]) == (pictures, pictures)
    for score in task["scores"]:
        if score["value"] is not None:
            assert score["low"] <= score["value"] + 1e-9 and score["value"] <= score["high"] + 1e-9
    html = page.read_text()
    assert html.count("data:image/jpeg") >= pictures
    assert EVIL not in html and "<script" not in html and 'src="http' not in html
    again = CliRunner().invoke(app, [*words, "--batch", "3"])
    assert again.exit_code == 0, again.output
    (second,) = json.loads(out.read_text())["tasks"]
    assert second["answered_now"] == 0
    assert (second["scores"], second["sha256"]) == (task["scores"], task["sha256"])


def test_two_models_are_compared_and_no_picture_is_decoded_twice(tiny_model: Path, own: Path, tmp_path: Path) -> None:
    other = make_tiny_llava(tmp_path / "other", seed=1)
    tasks = tuple(str(own / f"{kind}.yaml") for kind in ("yes_no", "choices"))
    wanted = Wanted(tasks, tmp_path / "report.json", against=str(other))
    report = examine_assistant(str(tiny_model), wanted).report
    for task in report["tasks"]:
        assert task["pictures_decoded"] == task["pictures"] == 4
        for found in task["compared"]:
            if found["difference"] is not None:
                assert found["difference"] == pytest.approx(found["first"] - found["second"])
    alone = examine_assistant(str(other), Wanted(tasks, tmp_path / "other.json")).report
    for task, same in zip(report["tasks"], alone["tasks"], strict=True):
        assert [c["second"] for c in task["compared"]] == [s["value"] for s in same["scores"]]
    # The same again from kept answers: of the other's report, and as a file of answers.
    kept = examine_assistant(str(tiny_model), replace(wanted, against=str(tmp_path / "other.json"))).report
    assert [t["compared"] for t in kept["tasks"]] == [t["compared"] for t in report["tasks"]]


def test_kept_answers_are_scored_without_a_model(tiny_model: Path, own: Path, tmp_path: Path) -> None:
    wanted = Wanted((str(own / "words.yaml"),), tmp_path / "report.json")
    first = examine_assistant(str(tiny_model), wanted).report
    answers = predictions_file(wanted.out, "words")
    scored = examine_assistant(None, replace(wanted, predictions=answers)).report
    assert scored["tasks"][0]["scores"] == first["tasks"][0]["scores"]
    strange = tmp_path / "strange.jsonl"
    strange.write_text('{"id": "1", "answer": "a"}\n{"id": "99", "answer": "a"}\n')
    with pytest.raises(PredictionError, match="does not ask: 99"):
        examine_assistant(None, replace(wanted, predictions=strange))
    with pytest.raises(PredictionError, match="answers other questions"):
        examine_assistant(None, replace(wanted, predictions=answers, tasks=(str(own / "yes_no.yaml"),)))
    with pytest.raises(PredictionError, match="holds answers to one task, and 2 are named"):
        examine_assistant(None, replace(wanted, predictions=answers, tasks=wanted.tasks * 2))
    few = tmp_path / "few.jsonl"
    few.write_text('{"id": "1", "answer": "a"}\n')
    words = [
        "evaluate",
        "--task",
        str(own / "words.yaml"),
        "--predictions",
        str(few),
        "--out",
        str(tmp_path / "r.json"),
    ]
    done = CliRunner().invoke(app, words)
    assert (done.exit_code, len(done.stderr.splitlines())) == (1, 1)
    assert "11 of 12 questions are not answered" in done.stderr
    done = CliRunner().invoke(app, [*words, "--partial"])
    assert done.exit_code == 0 and json.loads((tmp_path / "r.json").read_text())["tasks"][0]["partial"]


def test_what_is_stopped_is_kept(assistant: Assistant, own: Path, tmp_path: Path) -> None:
    """Ctrl-C in the middle: the answers so far stand in the file, and are not asked again."""
    asked = open_task(str(own / "yes_no.yaml"), None)
    file = tmp_path / "kept.jsonl"

    class Stops(InProcess):
        def predict(self, asked: TaskItems, items: Sequence[Item], keep: Callable[[Prediction], None]) -> None:
            super().predict(asked, items[:5], keep)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        answer_task(asked, Stops(assistant, 5), file, {})
    stored, new = answer_task(asked, InProcess(assistant, 5), file, {})
    assert (len(stored.answered), new) == (12, 7)


@pytest.fixture(scope="module")
def tower(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tower")
    new_tower(ViTShape(family="dinov2", width=64, layers=2, heads=2, patch=16, image_side=32)).save(folder)
    return folder


def test_assistants_and_towers_are_told_apart(tiny_model: Path, tower: Path, tmp_path: Path) -> None:
    assert kind_of_model(tiny_model) == ("llava", True)
    assert kind_of_model(tower) == ("dinov2", False)
    for part in ("train", "test"):
        for label, red in (("one", 40), ("two", 200)):
            (tmp_path / part / label).mkdir(parents=True)
            for number in range(3):
                colour = (red, 20 * number, 10 * len(part))
                Image.new("RGB", (32, 32), colour).save(tmp_path / part / label / f"{number}.png")
    labelled = ["--train", str(tmp_path / "train"), "--test", str(tmp_path / "test"), "--neighbours", "1", "--no-keep"]
    for model, said in ((tower, "is a tower (dinov2)"), (tiny_model, "its vision tower is measured")):
        done = CliRunner().invoke(app, ["evaluate", str(model), *labelled])
        assert done.exit_code == 0, done.output
        assert said in done.stderr and "kNN" in done.stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["TOWER", "--task", "scenes"], "is a tower (dinov2), which answers no questions"),
        (["MODEL", "--task", "scenes", "--train", "x"], "--task asks an assistant"),
        (["MODEL", "--task", "nothing"], "no task nothing; the shipped ones are"),
        (["MODEL", "--task", "coco-yes-no"], "--data or KANGAROO_DATA"),
        (["no/such/folder/at/all"], "no folder no/such/folder/at/all"),
        (["MODEL", "--task", "scenes", "--predictions", "none.jsonl"], "no file of predictions none.jsonl"),
    ],
)
def test_the_command_refuses_in_one_line(
    tiny_model: Path, tower: Path, tmp_path: Path, words: list[str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("KANGAROO_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    names = {"TOWER": str(tower), "MODEL": str(tiny_model)}
    done = CliRunner().invoke(app, ["evaluate", *(names.get(word, word) for word in words)])
    lines = [line for line in done.stderr.splitlines() if not re.search(r"is an assistant \(llava\)$", line)]
    assert (done.exit_code, done.stdout, len(lines)) == (1, "", 1), done.output
    assert said in lines[0]


def test_a_browser_shows_the_page(
    browser: Browser, tiny_model: Path, own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a phone and wide: nothing is fetched, no text runs, every picture is drawn."""
    monkeypatch.setenv("PATH", "")  # METEOR has a test of its own
    page = tmp_path / "report.html"
    words = ["evaluate", str(tiny_model), "--out", str(tmp_path / "r.json"), "--page", str(page)]
    tasks = [word for kind in ("words", "choices", "captions") for word in ("--task", str(own / f"{kind}.yaml"))]
    assert CliRunner().invoke(app, [*words, *tasks]).exit_code == 0
    fetched: list[str] = []

    def note(request: PageRequest) -> None:
        fetched.append(request.url)

    for width in (360, 1200):
        shown = browser.new_page(viewport={"width": width, "height": 800})
        shown.on("request", note)
        shown.goto(page.as_uri())
        assert [url for url in fetched if not url.startswith(("file:", "data:"))] == []
        assert shown.title() == f"Measured: {tiny_model}"
        assert shown.evaluate("document.documentElement.scrollWidth") <= width
        shown.evaluate("document.querySelectorAll('img').forEach(img => img.loading = 'eager')")
        shown.wait_for_function("[...document.images].every(image => image.complete)")
        assert shown.evaluate("[...document.images].every(image => image.naturalWidth > 0)")
        shown.close()
