"""Run one command of `kangaroo` for a job: behind everything else, on few threads, and never longer than the server."""

import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from serving.supervisor import supervised
from serving.vllm_program import death_reason

NICEST = 19  # of the kernel's 20 ranks below the usual one: whoever else wants the cores has nearly all of them
THREAD_SETTINGS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
SAID = "kangaroo: "  # how the command line begins what it has to say on standard error


class JobProcess:
    """A running command. However this process ends, the command ends with it, and all that it started."""

    def __init__(self, arguments: Sequence[str], folder: Path, output: Path, log: Path, niceness: int = NICEST) -> None:
        """`arguments` are those of `kangaroo`, which runs in `folder` and writes into `output` and `log`.

        Raises BlockingIOError while one that wrote into the same log still ends: its server was killed just now.
        """
        command = ["nice", "-n", str(niceness), sys.executable, "-m", "ui.command_line", *arguments]
        self.log = log
        with log.open("ab") as errors:
            # It is the standard error of all that runs for the job, which hold on to it until the last has ended.
            fcntl.flock(errors, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with output.open("wb") as answers:
                self._supervisor = subprocess.Popen(
                    [*supervised(), *command],
                    stdin=subprocess.PIPE,
                    stdout=answers,
                    stderr=errors,
                    cwd=folder,
                    env=job_environment(),
                    start_new_session=True,
                )

    def code(self) -> int | None:
        """The exit code; over 128 where a signal ended it, None while it runs."""
        code = self._supervisor.poll()
        return code if code is None or code >= 0 else 128 - code

    def stop(self) -> None:
        """End it and all its children, within some six seconds. It is no error if it has ended already."""
        if self._supervisor.stdin is not None:
            self._supervisor.stdin.close()
        self._supervisor.wait()


def job_environment() -> dict[str, str]:
    """This process's environment with what keeps a job small: half of the cores, and nothing looked up elsewhere."""
    threads = str(max(1, len(os.sched_getaffinity(0)) // 2))
    environment = dict(os.environ) | dict.fromkeys(THREAD_SETTINGS, threads)
    environment |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    # A file in the folder that it runs in must not shadow a module.
    environment["PYTHONSAFEPATH"] = "1"
    return environment


def why_it_failed(code: int, log: str) -> str:
    """In words: the signal that ended it, what the command line said last, or the last error in its log."""
    if code > 128:
        name = signal.Signals(code - 128).name if code - 128 in set(signal.Signals) else str(code - 128)
        return f"its process was ended by signal {code - 128} ({name}; when memory runs out, that is SIGKILL)"
    said = [line.removeprefix(SAID) for line in log.splitlines() if line.startswith(SAID)]
    return said[-1] if said else death_reason(code, log)
