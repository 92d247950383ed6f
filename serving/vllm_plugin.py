"""What we mend in vLLM on CPUs from the inside: the asking for the matrix unit, adapters, and norms."""

import torch


def mend() -> None:
    """Called by vLLM in each of its processes (entry point `vllm.general_plugins` in `pyproject.toml`)."""
    ask_for_matrix_unit()
    # Late: only vLLM's own processes import vLLM.
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        # It says itself why.
        current_platform.get_punica_wrapper = lambda: "serving.cpu_adapters.AdapterRows"  # type: ignore[method-assign]
        from serving.cpu_norms import use_kernels

        use_kernels()


def ask_for_matrix_unit() -> None:
    """Ask Linux for AMX.

    On CPUs with AMX, vLLM 0.32 answers bfloat16 attention with AMX instructions, which Linux gives a process only when
    it asks. vLLM does not; it lives on oneDNN's asking, and oneDNN asks when it first meets a matrix product that is
    large enough. A short text as the very first request is not, and killed the worker with SIGILL (exit code -4).
    A new program starts without the permission, so it cannot be had for vLLM from outside.
    """
    torch.cpu._init_amx()
