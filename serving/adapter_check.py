"""Check an adapter, and copy it for vLLM, in a program of its own: torch stays out of the gateway, and so do faults.

Started as `python -m serving.adapter_check ADAPTER BASE TARGET`; it answers with a line of JSON.
"""

import json
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from subprocess import CalledProcessError

import anyio

SECONDS_TO_CHECK = 600.0
NICENESS = 5  # whoever waits for an answer goes first


class AdapterRefused(ValueError):
    """The adapter cannot be served beside the base; the message says why."""


@dataclass(frozen=True)
class CheckedAdapter:
    """As `assistant.adapter_serving.ServableAdapter`, which the gateway does without torch for."""

    modules: int
    rank: int
    warning: str | None


async def check_adapter(adapter: Path, base: Path, target: Path) -> CheckedAdapter:
    """Write a copy of `adapter` for vLLM into the new folder `target`.

    Raises:
        AdapterRefused: it cannot be served beside `base`, or the check itself failed or took too long.
    """
    # -P: a file in the person's current folder must not shadow a module.
    command = [sys.executable, "-P", "-m", "serving.adapter_check", str(adapter), str(base), str(target)]
    environment = dict(os.environ) | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    try:
        with anyio.fail_after(SECONDS_TO_CHECK):
            done = await anyio.run_process(command, env=environment)
        said = json.loads(done.stdout.splitlines()[-1])
    except TimeoutError as error:
        raise AdapterRefused(f"it was not checked within {SECONDS_TO_CHECK:.0f} s") from error
    except CalledProcessError as error:
        last = error.stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise AdapterRefused(f"the check of it failed: {' '.join(last)}") from error
    if "refused" in said:
        raise AdapterRefused(said["refused"])
    return CheckedAdapter(**said)


def main(adapter: Path, base: Path, target: Path) -> None:
    """Check and copy, and say on standard output how that went."""
    os.nice(NICENESS)
    # Late: seconds of importing are to be nice already.
    from assistant.adapter_serving import write_servable
    from assistant.models import ModelError

    try:
        print(json.dumps(asdict(write_servable(adapter, base, target))))
    except (ModelError, OSError) as error:
        print(json.dumps({"refused": str(error)}))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
