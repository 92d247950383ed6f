"""A run that is killed, stopped, spoiled or out of room loses nothing, and says in plain words what happened."""

import io
import json
import math
import os
import random
import resource
import shutil
import signal
import sys
import threading
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.axes import Axes
from PIL import Image
from rich.console import Console
from torch.utils.data import DataLoader, Dataset
from transformers import TrainerState

from tests.ranks import processes
from tests.small_runs import assert_same_weights, logged, small_run, small_stage, weights_in
from tests.test_pretraining import write_streamed_tars
from tests.tiny import make_tiny_language_model, make_tiny_tokenizer
from training.checkpoints import PARTIAL, SEAL, fault_of, newest_whole
from training.config import RecipeError, Schedule, TrainingError
from training.curves import draw_curves
from training.data.samples import Mixture
from training.objective import Objective
from training.objectives.language import LanguageObjective
from training.objectives.simclr import SimclrObjective
from training.progress import ProgressLine
from training.recipe import run_stage
from training.reporting import require_reporter
from training.run_log import RunLog, series
from training.sample_names import NamedSample
from training.stages import Workshop
from training.stopping import StopRequest
from training.trainer import train

STEPS = 4
SAVING = {"save_every": 1, "log_every": 1, "batch_size": 4}
OPERATIONS = 21  # of a save on files, the first until it has its name is number 18
NOWHERE = Path("nowhere")  # of a tokenizer that nothing reads


def saving_run(folder: Path, steps: int = STEPS, **schedule: Any) -> None:
    """A run that saves at each of its steps; a child process does it too."""
    torch.set_num_threads(1)
    small_run(small_stage("simclr", steps, schedule=SAVING | schedule), NOWHERE, folder)


def run_without_room(folder: Path, room: int) -> None:
    """The same where no file may grow beyond `room` bytes, as on a full disk; what is said goes into a file."""
    saving_run(folder, 2, evaluate_every=1)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
    try:
        saving_run(folder, 3)
    except TrainingError as error:
        os.write(os.open(folder / "said.txt", os.O_CREAT | os.O_WRONLY), str(error).encode()[:room])


def run_until_stopped(folder: Path) -> None:
    """A run of many steps that saves rarely, and stops when it is asked to."""
    try:
        saving_run(folder, 1000, save_every=1000)
    except KeyboardInterrupt:
        os._exit(130)


def run_and_be_killed(folder: Path, steps: int, seed: int) -> None:
    """The same, killed in its first or second save: at a random one of the save's file operations or just behind it."""
    generator = random.Random(seed)
    saves, operations = generator.randint(1, 2), generator.randint(0, OPERATIONS)
    seconds = generator.choice([0.0, generator.uniform(0, 0.005)])
    begun, done = set[str](), [0]

    def count(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "os.mkdir" and Path(str(arguments[0])).parent.name == PARTIAL:
            begun.add(str(arguments[0]))
        if len(begun) == saves and (event == "open" or event.startswith("os.")):
            done[0] += 1
            if done[0] == operations + 1:
                kill = partial(os.kill, os.getpid(), signal.SIGKILL)
                threading.Timer(seconds, kill).start() if seconds else kill()

    sys.addaudithook(count)
    saving_run(folder, steps)


def assert_survives(kills: int, folder: Path) -> None:
    """After so many kills, each at a random moment of saving, a last run ends with the uninterrupted one's weights."""
    steps, left_behind = 2 * kills + 2, 0
    run = folder / "killed"
    for seed in range(kills):
        process = processes().Process(target=run_and_be_killed, args=(run, steps, seed))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        left_behind += any((run / "checkpoints" / PARTIAL).glob("*"))
        newest_whole(run / "checkpoints")  # raises where none is whole
    assert left_behind > 0, "no kill came while a checkpoint was written"
    saving_run(run, steps)
    saving_run(folder / "whole", steps)
    assert_same_weights(weights_in(run, steps), weights_in(folder / "whole", steps))
    done, losses = series(RunLog(run / "log.jsonl").lines(steps), "loss")
    assert done == list(range(1, steps + 1))
    assert losses == series(RunLog(folder / "whole" / "log.jsonl").lines(steps), "loss")[1]


def test_three_kills_while_saving_change_nothing(tmp_path: Path) -> None:
    assert_survives(3, tmp_path)


@pytest.mark.slow
def test_thirty_kills_while_saving_change_nothing(tmp_path: Path) -> None:
    assert_survives(30, tmp_path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an uninterrupted run, with the checkpoints of its last two steps."""
    folder = tmp_path_factory.mktemp("whole")
    saving_run(folder)
    return folder


def test_a_damaged_checkpoint_is_passed_over_by_name(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A missing file, a cut one, a damaged seal: the one before is taken and said, and weights are the same."""
    faults = {"optimizer.pt": "is missing", "objective.safetensors": "bytes instead of", SEAL: "is damaged"}
    for name, words in faults.items():
        folder = tmp_path / name
        shutil.copytree(whole, folder)
        file = folder / "checkpoints" / f"checkpoint-{STEPS}" / name
        if "missing" in words:
            file.unlink()
        else:
            file.write_bytes(file.read_bytes()[:-10])
        saving_run(folder)
        said = capsys.readouterr().err
        assert f"going on from {folder}/checkpoints/checkpoint-{STEPS - 1}" in said
        assert f"checkpoint-{STEPS}: {name}" in said and words in said
        assert fault_of(folder / "checkpoints" / f"checkpoint-{STEPS}") is None
        assert_same_weights(weights_in(folder, STEPS), weights_in(whole, STEPS))


def test_no_run_begins_again_in_silence(whole: Path, tmp_path: Path) -> None:
    """Where no checkpoint is whole the run is refused, and each is named with its fault."""
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    for file in (folder / "checkpoints").glob("*/trainer_state.json"):
        file.unlink()
    with pytest.raises(TrainingError, match=r"checkpoint-4: trainer_state.json is missing; checkpoint-3: .*delete"):
        saving_run(folder)


def test_no_room_keeps_the_checkpoint_before_and_says_so(tmp_path: Path) -> None:
    """Weights that do not fit, and a log that does not: plain words, no half checkpoint, and then it goes on."""
    for name, room, words in (("weights", 30_000, "the checkpoint of step 3 could not be written"), ("log", 200, "")):
        folder = tmp_path / name
        process = processes().Process(target=run_without_room, args=(folder, room))
        process.start()
        process.join()
        said = (folder / "said.txt").read_text()
        assert said.startswith(words), said
        assert "[Errno 27]" in said or "File too large" in said, said
        newest, faults = newest_whole(folder / "checkpoints")
        assert newest is not None and newest.name == "checkpoint-2" and faults == []
        saving_run(folder, 3)
        assert newest_whole(folder / "checkpoints")[0] == folder / "checkpoints" / "checkpoint-3"
    said = (tmp_path / "weights" / "said.txt").read_text()
    assert "MiB are free" in said and "checkpoint-2 is whole and stays" in said and "Make room" in said


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_saves_first(number: signal.Signals, tmp_path: Path) -> None:
    """Ctrl-C, or a machine that shuts down: a checkpoint of the step it came to, though none was due."""
    process = processes().Process(target=run_until_stopped, args=(tmp_path,))
    process.start()
    while not (tmp_path / "log.jsonl").is_file() or len(logged(tmp_path, "loss")) < 3:
        assert process.is_alive()
        time.sleep(0.01)
    os.kill(process.pid, number)
    process.join()
    assert process.exitcode == 130
    newest, faults = newest_whole(tmp_path / "checkpoints")
    assert newest is not None and faults == []
    state = json.loads((newest / "trainer_state.json").read_text())
    assert state["global_step"] == logged(tmp_path, "loss")[-1]["step"] < 1000
    assert (tmp_path / "curves.png").is_file()


def test_a_second_stop_at_once_is_the_first_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun repeats a Ctrl-C; two seconds later one more ends the run where it stands."""
    before = signal.getsignal(signal.SIGINT)
    with StopRequest() as request:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
        assert request.made
        now = time.monotonic()
        monkeypatch.setattr(time, "monotonic", lambda: now + 3)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0)
    assert signal.getsignal(signal.SIGINT) is before


class Interrupted(Dataset[int]):
    """Each sample is read while Ctrl-C reaches the reading process."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, place: int) -> int:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0)
        return place


def test_processes_that_read_ahead_leave_ctrl_c_to_the_run(capfd: pytest.CaptureFixture[str]) -> None:
    """A terminal sends it to all of them: they read on for the step that is finished, and say nothing."""
    with StopRequest() as request:
        assert [int(place) for place in DataLoader(Interrupted(), num_workers=1)] == [0, 1]
    assert not request.made
    assert "finishing this step" not in capfd.readouterr().err


class Spoiled:
    """The samples of a run, of which those at some places are not finite."""

    def __init__(self, samples: Mixture[Any], places: set[int]) -> None:
        self.samples, self.places = samples, places

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, place: int) -> NamedSample:
        sample = self.samples[place]
        assert isinstance(sample, NamedSample)
        if place not in self.places:
            return sample
        return NamedSample(f"spoiled {place}", self._spoiled(sample.sample))

    def _spoiled(self, sample: Any) -> Any:
        if isinstance(sample, torch.Tensor):
            return sample.float() * math.nan if sample.dtype == torch.uint8 else sample
        return replace(sample, **{name: self._spoiled(value) for name, value in vars(sample).items()})


def spoiled_run(folder: Path, places: set[int], name: str = "simclr", **schedule: Any) -> Objective:
    """Three steps of eight samples."""
    stage = small_stage(name, 3, schedule={"batch_size": 8, "save_every": 1, "log_every": 1} | schedule)
    return small_run(stage, NOWHERE, folder, spoil=lambda samples: Spoiled(samples, places))


def test_a_loss_that_is_not_finite_stops_and_names_its_samples(tmp_path: Path) -> None:
    """No weight is touched: the newest checkpoint is that of the step before, and the log has the names too."""
    with pytest.raises(TrainingError, match=r"step 3: nt_xent_loss \(nan\) is not finite.*spoiled 20.*on_nan: skip"):
        spoiled_run(tmp_path, {20})
    newest, _ = newest_whole(tmp_path / "checkpoints")
    assert newest is not None and newest.name == "checkpoint-2"
    (line,) = logged(tmp_path, "not_finite")
    assert line["step"] == 3 and len(line["samples"]) == 8 and "spoiled 20" in line["samples"]
    assert all(name.startswith(("scene ", "spoiled ")) for name in line["samples"])


def test_a_bad_micro_batch_is_named_alone(tmp_path: Path) -> None:
    """Of an accumulated step of an objective that does not compare samples, the four at fault and no others."""
    with pytest.raises(TrainingError, match=r"step 2: pixel_loss"):
        spoiled_run(tmp_path, {14}, "mae", batch_size=4, accumulation=2)
    (line,) = logged(tmp_path, "not_finite")
    assert len(line["samples"]) == 4 and "spoiled 14" in line["samples"]


@pytest.mark.parametrize("name", ["moco", "dino"])
def test_a_step_that_is_skipped_changes_nothing(name: str, tmp_path: Path) -> None:
    """Weights, batch norm's statistics, centre and teacher are as before it; a run with one in the middle goes on."""
    spoiled_run(tmp_path / "last", {20}, name, on_nan="skip")
    assert_same_weights(weights_in(tmp_path / "last", 2), weights_in(tmp_path / "last", 3))
    objective = spoiled_run(tmp_path / "middle", {12}, name, on_nan="skip")
    before, after = weights_in(tmp_path / "middle", 2), weights_in(tmp_path / "middle", 3)
    assert any(not torch.equal(before[key], after[key]) for key in after)
    assert all(bool(weight.isfinite().all()) for weight in objective.state_dict().values())
    assert [line["step"] for line in logged(tmp_path / "middle", "loss")] == [1, 2, 3]
    assert all(math.isfinite(line["loss"]) for line in logged(tmp_path / "middle", "loss"))
    assert [line["step"] for line in logged(tmp_path / "middle", "not_finite")] == [2]


def test_a_gradient_that_is_not_finite_is_found_too(tmp_path: Path) -> None:
    """The loss is finite, its gradient is not: the step is not taken."""

    def spoil_gradient(objective: Objective) -> None:
        assert isinstance(objective, SimclrObjective)
        next(objective.head.parameters()).register_hook(lambda gradient: gradient * math.inf)

    stage = small_stage("simclr", 2, schedule={"batch_size": 8})
    with pytest.raises(
        TrainingError, match=r"step 1: the gradient \((nan|inf)\) is not finite, with the samples scene"
    ):
        small_run(stage, NOWHERE, tmp_path, change=spoil_gradient)
    assert len(logged(tmp_path, "not_finite")[0]["samples"]) == 8


def test_weights_that_are_spoiled_end_a_run_that_skips(tmp_path: Path) -> None:
    """Ten steps one after the other: no sample is at fault then."""

    def spoil_weights(objective: Objective) -> None:
        with torch.no_grad():
            next(iter(objective.parameters())).fill_(math.nan)

    stage = small_stage("simclr", 20, schedule={"batch_size": 4, "on_nan": "skip"})
    with pytest.raises(TrainingError, match=r"step 10: .*so were the 9 steps before"):
        small_run(stage, NOWHERE, tmp_path, change=spoil_weights)


def test_a_log_that_was_cut_goes_on(tmp_path: Path) -> None:
    """What a kill left of the last line is taken off; of a step that ran twice the newest value counts."""
    file = tmp_path / "log.jsonl"
    RunLog(file).append({"step": 1, "loss": 3.0})
    RunLog(file).append({"step": 2, "loss": 2.5})
    with file.open("a") as opened:
        opened.write('{"step": 3, "lo')
    log = RunLog(file)
    log.append({"step": 2, "loss": 2.0})
    assert series(log.lines(up_to=9), "loss") == ([1, 2], [3.0, 2.0])
    assert [line["loss"] for line in log.lines(up_to=1)] == [3.0]


def test_every_kind_of_run_leaves_its_curves(whole: Path) -> None:
    """A small picture that opens, with more than white in it."""
    with Image.open(whole / "curves.png") as picture:
        assert picture.width > 600 and len(set(picture.convert("L").getdata())) > 20
    assert (whole / "curves.png").stat().st_size < 300_000


def test_curves_are_drawn_at_saves_now_and_then_and_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four saves of a run that has only begun draw nothing; where time has passed, each does."""
    drawn: list[int] = []
    monkeypatch.setattr("training.callbacks.draw_curves", lambda lines, title, file: drawn.append(len(lines)))
    saving_run(tmp_path / "short")
    assert len(drawn) == 1
    monkeypatch.setattr("training.callbacks.SECONDS_BETWEEN_DRAWINGS", 0)
    saving_run(tmp_path / "long")
    assert len(drawn) == 1 + STEPS + 1 and drawn[1:] == sorted(drawn[1:])


def test_curves_show_what_was_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses share a panel, every other number has one, long runs are thinned but keep their ends; no loss, no file."""
    drawn: dict[str, tuple[list[int], list[float]]] = {}
    original = Axes.plot

    def noting(axis: Axes, steps: Any, values: Any, **said: Any) -> Any:
        drawn[said["label"]] = (list(steps), list(values))
        return original(axis, steps, values, **said)

    monkeypatch.setattr(Axes, "plot", noting)
    draw_curves([{"step": 0, "rank": 3.0}], "nothing yet", tmp_path / "none.png")
    lines: list[Any] = [{"step": step, "loss": 1 / step, "grad_norm": 1.0} for step in range(1, 2001)]
    lines += [{"step": 2000, "eval_loss": 0.5, "eval_runtime": 3.0}, {"step": 7, "diagnosis": "stuck", "words": "a"}]
    draw_curves(lines, "run", tmp_path / "curves.png")
    assert drawn.keys() == {"training", "held out", "grad_norm"}
    steps, values = drawn["training"]
    assert len(steps) <= 401 and (steps[0], steps[-1]) == (1, 2000) and values[-1] == 1 / 2000
    assert [file.name for file in tmp_path.iterdir()] == ["curves.png"]


def test_a_reporter_that_is_not_installed_is_named_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    require_reporter("none")
    monkeypatch.setattr("training.reporting.find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=r"report_to: wandb needs the package wandb.*pip install wandb"):
        small_run(small_stage("simclr", 1, schedule={"report_to": "wandb"}), NOWHERE, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_reporter_gets_what_the_log_has(tmp_path: Path) -> None:
    """Through transformers: a file of tensorboard's, where that is installed."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    small_run(small_stage("simclr", 2, schedule={"report_to": "tensorboard", "log_every": 1}), NOWHERE, tmp_path)
    (events,) = tmp_path.rglob("events.out.tfevents.*")
    read = accumulator.EventAccumulator(str(events)).Reload()
    assert len(read.Scalars("train/loss")) == 2


def test_the_line_tells_loss_speed_and_time_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a terminal one line that moves; elsewhere a line for each of the log."""
    plain = io.StringIO()
    show_run(ProgressLine("tower", Console(file=plain)))
    assert "step 50 of 100: loss 2.312, 1,234 samples/s, 0:00:" in plain.getvalue()
    assert "step 50: held-out loss 2.5" in plain.getvalue()
    live = io.StringIO()
    show_run(ProgressLine("tower", Console(file=live, force_terminal=True, width=120)))
    assert "tower" in live.getvalue() and "loss 2.312, 1,234 samples/s" in live.getvalue()
    assert "50/100" in live.getvalue() and "left" in live.getvalue()


def show_run(line: ProgressLine) -> None:
    """A run of which half is done."""
    state = TrainerState(max_steps=100)
    line.on_train_begin(None, state, None)
    state.global_step = 50
    line.on_step_end(None, state, None)
    line.on_log(None, state, None, {"loss": 2.3123, "samples_per_second": 1234.4})
    line.on_log(None, state, None, {"eval_loss": 2.5})
    line.on_train_end(None, state, None)


def test_language_runs_count_tokens(tmp_path: Path) -> None:
    """Blocks of 16 tokens, four a step: the log has tokens a second, and no samples."""
    tokenizer = make_tiny_tokenizer(tmp_path)
    model = make_tiny_language_model(tokenizer)
    objective = LanguageObjective(model, tokenizer)
    blocks: Any = [torch.randint(0, 500, (16,)) for _ in range(8)]
    schedule = Schedule(steps=2, batch_size=4, learning_rate=1e-3, log_every=1, bf16=False)
    train(objective, schedule, blocks, blocks[:4], tmp_path / "run")
    assert all(line["tokens_per_second"] > 0 for line in logged(tmp_path / "run", "loss")[1:])
    assert logged(tmp_path / "run", "samples_per_second") == []
    assert (tmp_path / "run" / "curves.png").is_file()


def test_a_monitor_does_not_make_a_finished_stage_run_again(tmp_path: Path) -> None:
    """Neither what only tells people how a run goes, nor a field that did not exist when the stage finished."""
    stage = small_stage("mae", 1)
    run_stage(stage, Workshop(tmp_path, None))
    marker = tmp_path / "mae" / "done.json"
    done = json.loads(marker.read_text())
    del done["settings"]["monitor"], done["settings"]["schedule"]["on_nan"]
    marker.write_text(json.dumps(done))
    run_stage(stage.model_copy(update={"monitor": None}), Workshop(tmp_path, None))
    assert json.loads(marker.read_text()) == done
    run_stage(small_stage("mae", 2), Workshop(tmp_path, None))
    assert json.loads(marker.read_text())["settings"]["schedule"]["steps"] == 2


def test_a_streamed_run_with_random_depth_resumes_exactly(tmp_path: Path) -> None:
    """Reading on must not draw from the random state that drops paths; and nothing is read only to be passed over."""
    write_streamed_tars(tmp_path / "tars")
    stage = small_stage(
        "dinov2",
        4,
        mixture=[{"tars": "tars/part-*.tar.gz", "stream": True, "use": "pictures", "weight": 1}],
        held_out=[{"scenes": 8, "weight": 1}],
        schedule={"batch_size": 4, "save_every": 2},
    )
    workshop, folder = Workshop(tmp_path, tmp_path), tmp_path / "dinov2"
    run_stage(stage, workshop)
    first = weights_in(folder, 4)
    (folder / "done.json").unlink()
    shutil.rmtree(folder / "output")
    shutil.rmtree(folder / "checkpoints" / "checkpoint-4")
    run_stage(stage, workshop)
    assert_same_weights(weights_in(folder, 4), first)
