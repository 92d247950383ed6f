"""vLLM as a program of its own: it says how it does, why it died, and never outlives the process that started it."""

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

import serving.vllm_program
from assistant.models import ModelError
from serving import supervisor
from serving.engine import (
    EngineError,
    LocalEngine,
    Phase,
    RemoteEngine,
    free_port,
)
from serving.engine_arguments import REFUSED, parse_engine_arguments
from serving.listening import listen
from serving.model_folder import ModelFacts, read_model_folder
from serving.vllm_program import death_reason, loading_stage, vllm_command, vllm_environment
from tests.conftest import SECONDS_TO_START

ROOT = Path(__file__).resolve().parent.parent


def wait_until(true: Callable[[], object], seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s: {what}"
        time.sleep(0.1)


def living(processes: list[psutil.Process]) -> list[psutil.Process]:
    found = []
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


# -- The supervisor, with small programs in vLLM's place ---------------------------------------------------------------

# Starts a child that ignores every polite request and has left for a session of its own, then waits.
STUBBORN_PROGRAM = """
import subprocess, sys, time
child = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(600)"
process = subprocess.Popen([sys.executable, "-c", child], stdout=subprocess.PIPE, start_new_session=True)
process.stdout.readline()
print("up", flush=True)
{then}
"""

PARENT = """
import os, subprocess, sys, time
process = subprocess.Popen(
    [sys.executable, sys.argv[1], str(os.getpid()), sys.argv[3], sys.executable, "-c", sys.argv[2]],
    stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True,
)
process.stdout.readline()
{also}
print(process.pid, flush=True)
time.sleep(600)
"""

Family = tuple[subprocess.Popen[bytes], list[psutil.Process]]


@contextlib.contextmanager
def parent_of(program: str, also: str = "", scratch: Path | str = supervisor.NO_FOLDER) -> Iterator[Family]:
    """A process that runs `program` under a supervisor; and the supervisor, the program and its stubborn child."""
    command = [sys.executable, "-c", PARENT.format(also=also), supervisor.__file__, program, str(scratch)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as parent:
        everybody: list[psutil.Process] = []
        try:
            assert parent.stdout is not None
            leader = psutil.Process(int(parent.stdout.readline()))
            everybody = psutil.Process(parent.pid).children(recursive=True)
            supervised = [leader, *leader.children(recursive=True)]
            assert len(supervised) == 3
            yield parent, supervised
        finally:
            parent.kill()
            for process in living(everybody):
                process.kill()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGSEGV])
def test_nothing_outlives_a_parent_that_a_signal_ends(number: signal.Signals, tmp_path: Path) -> None:
    scratch = tmp_path / "pictures"
    scratch.mkdir()
    (scratch / "one.bmp").touch()
    with parent_of(STUBBORN_PROGRAM.format(then="time.sleep(600)"), scratch=scratch) as (parent, descendants):
        assert scratch.exists()
        parent.send_signal(number)
        wait_until(lambda: not living(descendants), 120, "all descendants ended")
    assert not scratch.exists()


def test_nothing_outlives_a_parent_whose_pipe_a_fork_holds_open() -> None:
    """A forked worker keeps a copy of the pipe, so its end does not come; the parent's id tells."""
    also = "if os.fork() == 0: time.sleep(600)"
    with parent_of(STUBBORN_PROGRAM.format(then="time.sleep(600)"), also) as (parent, descendants):
        parent.kill()
        wait_until(lambda: not living(descendants), 120, "all descendants ended")


def test_a_program_that_ends_takes_its_children_with_it() -> None:
    with parent_of(STUBBORN_PROGRAM.format(then="time.sleep(1); sys.exit(7)")) as (_, descendants):
        wait_until(lambda: not living(descendants), 120, "all descendants ended")


def test_the_program_ends_when_its_supervisor_is_killed() -> None:
    with parent_of(STUBBORN_PROGRAM.format(then="time.sleep(600)")) as (_, descendants):
        descendants[0].kill()
        wait_until(lambda: not living(descendants[:2]), 120, "supervisor and program ended")


@pytest.mark.parametrize(("ending", "code"), [("sys.exit(7)", 7), ("os.kill(os.getpid(), 9)", 137)])
def test_the_exit_code_passes_through(ending: str, code: int) -> None:
    command = [*supervisor.supervised(), sys.executable, "-c", f"import os, sys; {ending}"]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
        assert process.wait(10) == code


# -- What the log tells ------------------------------------------------------------------------------------------------


def test_the_stage_follows_the_log() -> None:
    lines = [
        "(APIServer pid=1) INFO 01-01 00:00:00 [api_utils.py:286] non-default args: {'host': '127.0.0.1'}",
        "(EngineCore pid=2) INFO 01-01 00:00:00 [core.py:133] Initializing a V1 LLM engine (v0.32.0) with config",
        "(Worker pid=3) INFO 01-01 00:00:00 [cpu_model_runner.py:68] Starting to load model /models/joey...",
        "(Worker pid=3) INFO 01-01 00:00:00 [default_loader.py:501] Loading weights took 0.01 seconds",
        "(EngineCore pid=2) INFO 01-01 00:00:00 [core.py:402] init engine (profile, create kv cache, warmup model)",
    ]
    stages = [loading_stage("\n".join(lines[:count])) for count in range(len(lines) + 1)]
    assert stages[0] == "starting Python"
    assert stages[3] == "loading weights"
    assert len(set(stages)) == len(stages)


def test_the_reason_of_a_death_is_the_cause_and_not_its_follower() -> None:
    log = (
        "(EngineCore pid=2) ERROR 01-01 00:00:00 [core.py:1] Traceback (most recent call last):\n"
        "(EngineCore pid=2) ERROR 01-01 00:00:00 [core.py:1] ValueError: the weights have no head\n"
        "(APIServer pid=1) RuntimeError: Engine core initialization failed. See root cause above.\n"
    )
    assert death_reason(1, log) == "ValueError: the weights have no head"
    assert "signal 9" in death_reason(137, log)
    assert death_reason(3, "nothing of note") == "it ended with exit code 3"
    dead = "v1.engine.exceptions.EngineDeadError: EngineCore encountered an issue. See stack trace (above)."
    assert "ended without a word" in death_reason(1, dead)
    assert death_reason(1, log + dead) == "ValueError: the weights have no head"


# -- How vLLM is started -----------------------------------------------------------------------------------------------


def flag(command: list[str], name: str) -> str:
    return command[command.index(name) + 1]


@pytest.mark.parametrize(
    ("change", "read_by_vllm"),
    [
        ({}, True),
        ({"vision_config": {"model_type": "clip_vision_model"}}, True),
        ({"vision_config": {"model_type": "dinov2"}}, False),
        ({"vision_config": {"model_type": "vit"}}, False),
        ({"model_type": "aya_vision"}, False),
        ({"projector_hidden_act": "linear"}, False),
    ],
)
def test_the_configuration_chooses_vllm_s_own_model_or_its_transformers_backend(
    change: dict[str, Any], read_by_vllm: bool, tiny_model: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    assert read_model_folder(folder).read_by_vllm is read_by_vllm


@pytest.mark.parametrize(("read_by_vllm", "implementation"), [(True, "vllm"), (False, "transformers")])
def test_the_command_says_what_the_model_folder_needs(read_by_vllm: bool, implementation: str) -> None:
    facts = ModelFacts(Path("model"), "siglip_vision_model", read_by_vllm, 1024, "<image>")
    command = vllm_command(facts, "joey", 1234, "bfloat16", most_pictures=8)
    assert flag(command, "--model-impl") == implementation
    assert flag(command, "--host") == "127.0.0.1"
    assert flag(command, "--max-model-len") == "1024"
    assert json.loads(flag(command, "--limit-mm-per-prompt"))["image"] == 8
    assert Path(flag(command, "--model")).is_absolute()


def test_every_flag_is_known_to_this_vllm(tiny_model: Path) -> None:
    """vLLM's own parser reads the command (in a process of its own: the import takes long and changes much)."""
    command = vllm_command(read_model_folder(tiny_model), "joey", 1234, "bfloat16", most_pictures=8)
    program = (
        "import sys\n"
        "from vllm.entrypoints.launchers.cli_args import make_arg_parser\n"
        "from vllm.utils.argparse_utils import FlexibleArgumentParser\n"
        "make_arg_parser(FlexibleArgumentParser()).parse_args(sys.argv[1:])\n"
    )
    result = subprocess.run([sys.executable, "-c", program, *command[3:]], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]


def test_the_key_is_not_on_the_command_line_and_new_each_time(tiny_model: Path) -> None:
    first, second = (LocalEngine(tiny_model, "tiny") for _ in range(2))
    assert first.api_key
    assert first.api_key != second.api_key
    command = vllm_command(first.facts, "tiny", 1, "bfloat16", 8)
    assert first.api_key not in " ".join(command)
    assert vllm_environment(first.api_key, 1000)["VLLM_API_KEY"] == first.api_key


def test_vllm_keeps_its_compiled_files_whatever_the_container_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    assert "PYTHONDONTWRITEBYTECODE" not in vllm_environment("key", 1000)


@pytest.mark.parametrize(("cores", "on_cpu", "own", "processes", "threads"), [
    (1, True, None, "0", "1"), (2, True, None, "0", "1"), (4, True, "1", "1", "3"), (5, True, None, None, None),
    (2, False, None, None, None),
])  # fmt: skip
def test_on_few_cores_the_model_lives_in_the_schedulers_process(
    cores: int,
    on_cpu: bool,
    own: str | None,
    processes: str | None,
    threads: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(cores)))
    monkeypatch.setattr(serving.vllm_program, "runs_on_cpu", lambda: on_cpu)
    monkeypatch.delenv("VLLM_ENABLE_V1_MULTIPROCESSING", raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if own is not None:
        monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", own)
    environment = vllm_environment("key", 1000)
    assert environment.get("VLLM_ENABLE_V1_MULTIPROCESSING") == processes
    assert environment.get("OMP_NUM_THREADS") == threads


def test_without_vllm_the_way_out_is_told(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EngineError, match="uv sync --extra"):
        LocalEngine(tiny_model, "tiny")


@pytest.mark.parametrize("name", REFUSED)
def test_flags_that_would_open_what_is_shut_are_refused_by_name(name: str) -> None:
    underscored = name.replace("-", "_")
    for text in (f"--{name} x", f"--{name}=x", f"--{underscored}=x", f"--{name.upper()} x", f"--no-{name}",
                 f"--{name}.field x", f"--max-num-seqs 4 '--{name}' x", f"--{name[:-1]} x"):  # fmt: skip
        with pytest.raises(EngineError, match=r"may not hold .*--"):
            parse_engine_arguments(text)


def test_other_flags_pass_as_a_shell_splits_them() -> None:
    text = "--max-num-seqs 4 --tensor-parallel-size=2 -tp 2 --hf-overrides '{\"a b\": 1}' --enforce-eager"
    expected = ["--max-num-seqs", "4", "--tensor-parallel-size=2", "-tp", "2", "--hf-overrides", '{"a b": 1}']
    assert parse_engine_arguments(text) == [*expected, "--enforce-eager"]
    assert parse_engine_arguments("") == []
    for text in ("max-num-seqs 4", "--a 'b", "-- --host x"):
        with pytest.raises(EngineError):
            parse_engine_arguments(text)


def test_every_refused_flag_is_one_of_this_vllm_or_its_front_end(tiny_model: Path) -> None:
    """A name that vLLM does not know would guard nothing."""
    program = (
        "from vllm.entrypoints.launchers.cli_args import make_arg_parser\n"
        "from vllm.utils.argparse_utils import FlexibleArgumentParser\n"
        "parser = make_arg_parser(FlexibleArgumentParser())\n"
        "print(*[option for action in parser._actions for option in action.option_strings])\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    known = {option.lstrip("-") for option in result.stdout.split()} | {"model-tag"}
    assert set(REFUSED) - known == set()


# -- Model folders -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors", "processor_config.json"])
def test_a_missing_file_is_named(name: str, tiny_model: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    (folder / name).unlink()
    with pytest.raises(ModelError, match=rf"model lacks {name}"):
        read_model_folder(folder)


def test_a_missing_shard_and_a_damaged_configuration_are_named(tiny_model: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    with pytest.raises(ModelError, match=r"lacks model-00002-of-00002\.safetensors"):
        read_model_folder(folder)
    shutil.copy(folder / "model-00001-of-00002.safetensors", folder / "model-00002-of-00002.safetensors")
    (folder / "config.json").write_text('{"architectures": [')
    with pytest.raises(ModelError, match=r"config\.json is damaged: not readable as JSON"):
        read_model_folder(folder)
    with pytest.raises(ModelError, match="no model folder"):
        read_model_folder(tmp_path / "nowhere")


def test_the_facts_of_a_model(tiny_model: Path) -> None:
    facts = read_model_folder(tiny_model)
    assert (facts.tower, facts.context_length, facts.picture_token) == ("siglip_vision_model", 1024, "<image>")


# -- The real vLLM -----------------------------------------------------------------------------------------------------


def test_another_user_of_the_machine_cannot_use_the_engine(engine: LocalEngine) -> None:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
    assert httpx.post(f"{engine.base_url}/v1/chat/completions", json=body, timeout=60).status_code == 401
    headers = {"Authorization": f"Bearer {engine.api_key}"}
    answer = httpx.post(f"{engine.base_url}/v1/chat/completions", json=body, headers=headers, timeout=60)
    assert answer.status_code == 200


def test_the_engine_itself_fetches_no_picture(engine: LocalEngine) -> None:
    """Behind the gateway's refusal stands vLLM's own."""
    headers = {"Authorization": f"Bearer {engine.api_key}"}
    for url in (f"{engine.base_url}/health", "file:///etc/passwd"):
        content = [{"type": "image_url", "image_url": {"url": url}}]
        body = {"model": "tiny", "messages": [{"role": "user", "content": content}]}
        answer = httpx.post(f"{engine.base_url}/v1/chat/completions", json=body, headers=headers, timeout=60)
        assert answer.status_code >= 400


def test_the_states_of_an_engine_elsewhere(engine: LocalEngine) -> None:
    there = RemoteEngine(engine.base_url, engine.api_key)
    assert engine.is_ready() and not there.is_ready(), "nobody has looked at it yet"
    assert there.state().phase is Phase.READY and there.is_ready()
    there.base_url += "/elsewhere"
    assert not there.is_ready()
    nowhere = RemoteEngine(f"http://127.0.0.1:{free_port()}")
    nobody = nowhere.state()
    assert nobody.phase is Phase.LOADING and not nowhere.is_ready()
    assert "waiting for the engine" in nobody.reason


@pytest.mark.slow
def test_weights_that_are_cut_off_are_the_reason_of_the_death(tiny_model: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with LocalEngine(folder, "tiny", log_path=tmp_path / "engine.log") as engine:
        with pytest.raises(EngineError, match="SafetensorError"):
            engine.wait_until_ready(SECONDS_TO_START)
        assert engine.state().phase is Phase.DEAD
        assert "SafetensorError" in engine.state().reason
    assert engine.state().phase is Phase.STOPPED


@contextlib.contextmanager
def server(model: Path, port: int) -> Iterator[subprocess.Popen[str]]:
    """`kangaroo serve`, as people run it; it keeps no keys and asks for none."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XDG_DATA_HOME": str(model.parent / "no-keys")}
    command = [sys.executable, "-m", "ui.command_line", "serve", str(model), "--name", "tiny", "--port", str(port)]
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def engine_state(port: int) -> dict[str, str]:
    state = httpx.get(f"http://127.0.0.1:{port}/health", timeout=10, trust_env=False).json()["engine"]
    assert isinstance(state, dict)
    return state


def is_up(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/v1/models", timeout=10, trust_env=False).status_code == 200
    except httpx.TransportError:
        return False


def family(process: subprocess.Popen[str]) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def has_worker(process: subprocess.Popen[str]) -> bool:
    """Whether vLLM has started the process that holds the model, the last and deepest of its family."""
    names = []
    for member in family(process):
        with contextlib.suppress(psutil.NoSuchProcess):
            names.append(" ".join(member.cmdline()))
    return any(name.startswith("VLLM::EngineCore") for name in names)


def test_the_life_of_a_server(tiny_model: Path) -> None:
    """Up at once, 503 with the stage while it loads, answers, 503 while a dead engine starts again, a clean end."""
    port = free_port()
    body = {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
    url = f"http://127.0.0.1:{port}/v1/chat/completions"
    with server(tiny_model, port) as process:
        wait_until(lambda: is_up(port), 120, "the gateway is up")
        answer = httpx.post(url, json=body, timeout=30)
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == "engine_loading"
        assert int(answer.headers["retry-after"]) > 0
        wait_until(lambda: engine_state(port)["state"] == "ready", SECONDS_TO_START, "the engine is ready")
        assert httpx.post(url, json=body, timeout=60).status_code == 200
        members = family(process)
        core = next(member for member in members if "EngineCore" in " ".join(member.cmdline()))
        core.kill()
        wait_until(lambda: engine_state(port)["state"] == "loading", 30, "the engine's death is noticed")
        answer = httpx.post(url, json=body, timeout=30)
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == "engine_loading"
        assert int(answer.headers["retry-after"]) > 0
        wait_until(lambda: not living(members), 30, "nothing of the dead engine is left")
        wait_until(lambda: len(family(process)) > 0, 30, "another engine starts")
        members = family(process)
        process.send_signal(signal.SIGTERM)
        output, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
        assert f"http://127.0.0.1:{port}" in output
        assert "It starts again in 1 s" in errors
        assert not living(members)


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGKILL, -signal.SIGKILL), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)],
)
def test_no_part_of_vllm_outlives_the_server(number: signal.Signals, code: int, tiny_model: Path) -> None:
    port = free_port()
    with server(tiny_model, port) as process:
        wait_until(lambda: has_worker(process), SECONDS_TO_START, "vLLM has started its children")
        members = family(process)
        assert len(members) >= 3
        process.send_signal(number)
        assert process.wait(30) == code
        wait_until(lambda: not living(members), 15, "every process of vLLM ended")


def test_a_server_that_cannot_start_says_why_in_one_line(tiny_model: Path, tmp_path: Path) -> None:
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with server(tiny_model, port) as process:
            _, errors = process.communicate(timeout=60)
            assert process.returncode == 1
            assert f"port {port}: Address already in use" in errors
            assert len(errors.splitlines()) == 1
    with server(tmp_path, free_port()) as process:
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 1
        assert "lacks config.json" in errors
        assert len(errors.splitlines()) == 1
