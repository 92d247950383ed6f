"""The norms that vLLM computes on a CPU are transformers', and vLLM takes them where they fit and only there."""

import subprocess
import sys

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from vllm.platforms import current_platform

from serving.cpu_norms import KERNELS, MULTIPLE, fused_add_rms_norm, rms_norm

EPSILON = 1e-6
LOADED_BY_VLLM = f"""
import torch
from vllm.plugins import load_general_plugins
load_general_plugins()
from vllm import ir
from vllm.platforms import current_platform
print(current_platform.get_punica_wrapper())
current_platform.get_default_ir_op_priority(None).set_default()
def taken(width, weight=torch.float32, step=1, residual=torch.float32, heads=None):
    x, scale = torch.ones(4, width * step)[:, ::step], torch.ones(width, dtype=weight)
    sum = torch.ones(4, width, dtype=residual)
    single = ir.ops.rms_norm.dispatch(x, scale, {EPSILON}, heads)
    fused = ir.ops.fused_add_rms_norm.dispatch(x, sum, scale, {EPSILON}, heads)
    print(single.provider, fused.provider)
taken(64)
taken({MULTIPLE + 1})
taken(64, weight=torch.bfloat16)
taken(64, step=2)
taken(64, heads=32)
taken(64, residual=torch.bfloat16)
"""


@pytest.fixture(scope="module", autouse=True)
def _kernels() -> None:
    current_platform.import_kernels()


def norm_of_transformers(width: int, dtype: torch.dtype) -> LlamaRMSNorm:
    norm = LlamaRMSNorm(width, EPSILON)
    torch.nn.init.normal_(norm.weight)
    return norm.to(dtype)


@pytest.mark.parametrize("shape", [(1, 320), (7, 64), (3, 5, MULTIPLE), (0, 64)])
@pytest.mark.parametrize(("dtype", "away"), [(torch.float32, 1e-6), (torch.bfloat16, 0.02), (torch.float16, 0.003)])
@torch.no_grad()
def test_norms_are_those_of_transformers(shape: tuple[int, ...], dtype: torch.dtype, away: float) -> None:
    """Half precision is off by what it rounds twice and the kernel once: two units of its last place."""
    torch.manual_seed(0)
    norm = norm_of_transformers(shape[-1], dtype)
    x, residual = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    torch.testing.assert_close(rms_norm(x, norm.weight, EPSILON), norm(x), rtol=away, atol=away)
    total = x + residual
    normed, kept = fused_add_rms_norm(x, residual, norm.weight, EPSILON)
    torch.testing.assert_close(kept, total, rtol=0, atol=0)
    torch.testing.assert_close(normed, norm(total), rtol=away, atol=away)
    assert normed.data_ptr() == x.data_ptr() and kept.data_ptr() == residual.data_ptr()


def test_vllm_takes_them_where_they_fit_and_plain_torch_elsewhere() -> None:
    said = subprocess.run([sys.executable, "-c", LOADED_BY_VLLM], check=True, capture_output=True, text=True).stdout
    wrapper, *taken = said.splitlines()[-7:]
    assert wrapper == "serving.cpu_adapters.AdapterRows"
    fits, *others, mixed = taken
    assert fits == f"{KERNELS} {KERNELS}"
    assert others == ["native native"] * 4
    assert mixed == f"{KERNELS} native"
