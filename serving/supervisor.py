"""Run one program, and end it with all its children when it stops, or when the process that asked for it is gone.

Started as a process of its own (`supervised` begins the command), with a pipe from the parent as standard input.
However the parent ends, even by `kill -9`, the kernel closes that pipe, and this process lives on for the second it
takes to clean up. It needs nothing but the standard library and psutil, so that it starts at once and stays small.
"""

import ctypes
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

NO_FOLDER = "-"
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
SECONDS_TO_END_ITSELF = 5.0
SECONDS_BETWEEN_LOOKS = 0.2


def supervised(scratch: Path | None = None) -> list[str]:
    """How the command begins that runs another under supervision, for this process as its parent.

    `scratch` is a folder of the program's, which is removed when it ends.
    """
    return [sys.executable, "-P", __file__, str(os.getpid()), str(scratch or NO_FOLDER)]


def prctl(option: int, argument: int) -> None:
    """Linux prctl(2)."""
    if ctypes.CDLL(None, use_errno=True).prctl(option, argument, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl({option}) failed")


def supervise(parent: int, command: list[str]) -> int:
    """Run `command` until it ends or the parent does; its exit code (negative: the signal that ended it)."""
    # Children that lose their own parent become ours, so none of them can escape the cleaning up.
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    # Should this process be killed itself, the program is told to end: vLLM then ends its children.
    program = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, preexec_fn=lambda: prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    )
    try:
        while program.poll() is None and parent_lives(parent):
            pass
    finally:
        end(program)
        end_descendants()
    return program.returncode


def parent_lives(parent: int) -> bool:
    """Wait a moment for the pipe to close. A fork of the parent may hold the pipe open, so its id is looked at too."""
    readable, _, _ = select.select([sys.stdin.fileno()], [], [], SECONDS_BETWEEN_LOOKS)
    closed = bool(readable) and not os.read(sys.stdin.fileno(), 1)
    return not closed and os.getppid() == parent


def end(program: subprocess.Popen[bytes]) -> None:
    if program.poll() is None:
        program.terminate()
        try:
            program.wait(SECONDS_TO_END_ITSELF)
        except subprocess.TimeoutExpired:
            program.kill()
            program.wait()


def end_descendants() -> None:
    """Give what is left a moment (Python's resource tracker removes shared memory last), then kill it."""
    started = time.monotonic()
    while descendants := living_descendants():
        if time.monotonic() - started > 1.0:
            for process in descendants:
                # Gone already is as good as killed.
                try:
                    process.kill()
                except psutil.NoSuchProcess:
                    continue
        time.sleep(0.05)
    reap()


def reap() -> None:
    """Take the exit codes of adopted children, which would otherwise stay in the process table as zombies."""
    try:
        while os.waitpid(-1, os.WNOHANG) != (0, 0):
            continue
    except ChildProcessError:
        return


def living_descendants() -> list[psutil.Process]:
    living = []
    for process in psutil.Process().children(recursive=True):
        try:
            if process.status() != psutil.STATUS_ZOMBIE:
                living.append(process)
        except psutil.NoSuchProcess:
            continue
    return living


def main() -> int:
    # The terminal's Ctrl-C is the parent's to handle; a request to end is ours, and passes through `finally`.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    parent, scratch, *command = sys.argv[1:]
    try:
        code = supervise(int(parent), command)
    finally:
        if scratch != NO_FOLDER:
            shutil.rmtree(scratch, ignore_errors=True)
    return 128 - code if code < 0 else code


if __name__ == "__main__":
    sys.exit(main())
