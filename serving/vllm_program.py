"""How vLLM is started as a program: its command and its environment; and what its log says of its life and death."""

import importlib.metadata
import json
import os
import re
import sys
from typing import Literal

from serving.model_folder import ModelFacts

# What vLLM has reached when its log holds the line; the last match counts.
STAGES = (
    ("non-default args", "reading the model's configuration"),
    ("Initializing a V1 LLM engine", "starting the engine's own process"),
    ("Starting to load model", "loading weights"),
    ("Loading weights took", "warming up"),
    ("init engine", "opening the engine for requests"),
)

# Adapters that vLLM computes with at once, the highest rank of one, and how many it keeps in memory. The first two are
# memory: so many times the rank is held for every layer, used or not.
ADAPTERS_AT_ONCE, HIGHEST_ADAPTER_RANK, ADAPTERS_IN_MEMORY = 4, 32, 32

# Errors that only say that there was another.
FOLLOWERS = ("See root cause above", "See stack trace (above)")

# Tokens in a block of what vLLM keeps of prompts, on CPUs.
BLOCK = 32

# On so few nothing is gained by binding threads to cores.
FEW_CORES = 4

Dtype = Literal["auto", "bfloat16", "float16", "float32"]


def vllm_command(facts: ModelFacts, model_name: str, port: int, dtype: Dtype, most_pictures: int) -> list[str]:
    """How vLLM is started. Every flag is here for a reason; vLLM's defaults hold for the rest."""
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", str(facts.folder.absolute()), "--served-model-name", model_name]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", dtype]
    # The default is 999 pictures a request.
    command += ["--limit-mm-per-prompt", json.dumps({"image": most_pictures, "video": 0, "audio": 0})]
    # The gateway sends data URLs and files of one folder. Should any address slip through, it is none of these.
    command += ["--allowed-media-domains", "no.address.is.allowed.invalid"]
    # 4 GiB by default, and twice: too much for a small machine.
    command += ["--mm-processor-cache-gb", "0.5"]
    # Small models that are held to JSON write line breaks and spaces without end where the form allows any.
    command += ["--structured-outputs-config", json.dumps({"backend": "xgrammar", "disable_any_whitespace": True})]
    command += ["--disable-fastapi-docs", "--disable-uvicorn-access-log"]
    command += ["--model-impl", "vllm" if facts.read_by_vllm else "transformers"]
    if facts.context_length is not None:
        command += ["--max-model-len", str(facts.context_length)]
    if runs_on_cpu():
        # Compiling takes 27 s of a start (26.7 against 0.9 s for two layers) and gains small models nothing on a CPU.
        command += ["--enforce-eager"]
        # Only whole blocks of a prompt are kept for the next one that begins alike. vLLM's 128 tokens on CPUs are more
        # than a small model's picture and question have together: nothing was kept. 32 is the least that it advises.
        command += ["--block-size", str(BLOCK)]
    return command


def adapter_flags() -> list[str]:
    """The flags with which vLLM serves adapters; a later flag of the same name wins."""
    flags = ["--enable-lora", "--max-loras", str(ADAPTERS_AT_ONCE), "--max-lora-rank", str(HIGHEST_ADAPTER_RANK)]
    return [*flags, "--max-cpu-loras", str(ADAPTERS_IN_MEMORY)]


def vllm_environment(api_key: str, most_pixels: int) -> dict[str, str]:
    """This process's environment with what vLLM reads from there."""
    environment = dict(os.environ)
    # Not on the command line: `ps` shows that to every user of the machine.
    environment["VLLM_API_KEY"] = api_key
    environment["VLLM_NO_USAGE_STATS"] = "1"
    environment["VLLM_MAX_IMAGE_PIXELS"] = str(most_pixels)
    environment["VLLM_MEDIA_URL_ALLOW_REDIRECTS"] = "0"
    # The model is a folder: nothing is to be looked up elsewhere.
    environment |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    # A file in the person's current folder must not shadow a module of vLLM.
    environment["PYTHONSAFEPATH"] = "1"
    # Set in many a container. vLLM's processes would each compile its thousands of files anew, in every start.
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    # In GiB; a CPU's default is half of the memory. A larger model may need more: the person's own setting wins.
    environment.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    if runs_on_cpu() and (cores := len(os.sched_getaffinity(0))) <= FEW_CORES:
        # The model then lives in the scheduler's process and not in one of its own that is bound to cores: that starts
        # in two thirds of the time and says as many tokens or more (docs/benchmarks.md). Its name is of another use.
        environment.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        # As many threads as vLLM itself would take; one more, and they wait for each other.
        environment.setdefault("OMP_NUM_THREADS", str(max(1, cores - 1)))
    return environment


def runs_on_cpu() -> bool:
    """Whether the installed vLLM is the CPU build (asking torch would cost the gateway seconds of start)."""
    try:
        importlib.metadata.distribution("vllm-cpu")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def loading_stage(log: str) -> str:
    """What vLLM is doing, by its log."""
    reached = [stage for marker, stage in STAGES if marker in log]
    return reached[-1] if reached else "starting Python"


def death_reason(code: int, log: str) -> str:
    """Why vLLM ended, in one line: the first error of its log that is no mere follower, or its exit code."""
    if code > 128:
        return f"it was killed by signal {code - 128} (when memory runs out, that is signal 9)"
    errors = re.findall(r"(?:^|\s)((?:\w+\.)*\w+(?:Error|Exception): .+)$", log, flags=re.MULTILINE)
    # vLLM's own words on flags that it does not know, or whose value it cannot read.
    errors += re.findall(r"error: ((?:unrecognized arguments|argument ).+)$", log, flags=re.MULTILINE)
    causes = [error for error in errors if not any(words in error for words in FOLLOWERS)]
    if causes:
        return str(causes[-1])[:300]
    if "EngineDeadError" in log:
        return "the process that holds the model ended without a word (killed, or memory ran out)"
    return f"it ended with exit code {code}"
