"""What we mend in vLLM from the inside: how its processes ask for the CPU's matrix unit, and compute adapters there."""

import torch


def ask_for_matrix_unit() -> None:
    """Called by vLLM in each of its processes (entry point `vllm.general_plugins` in `pyproject.toml`).

    On CPUs with AMX, vLLM 0.32 answers bfloat16 attention with AMX instructions, which Linux gives a process only when
    it asks. vLLM does not; it lives on oneDNN's asking, and oneDNN asks when it first meets a matrix product that is
    large enough. A short text as the very first request is not, and killed the worker with SIGILL (exit code -4).
    A new program starts without the permission, so it cannot be had for vLLM from outside.
    """
    torch.cpu._init_amx()
    _mend_adapters()


def _mend_adapters() -> None:
    """Have vLLM compute adapters on CPUs as `serving.cpu_adapters` does, which says why."""
    # Late: only vLLM's own processes import vLLM.
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        current_platform.get_punica_wrapper = lambda: "serving.cpu_adapters.AdapterRows"  # type: ignore[method-assign]
