"""Numbers agree (`pytest -m device`): attention kernels, bf16 and fp32, engine and trainer, a device and the CPU.

On a CPU these are toys; what needs an accelerator is skipped there. On a machine that has one, tests/conftest.py would
still choose the CPU: JAX_PLATFORMS=cuda,cpu (or tpu,cpu) python -m pytest -m device
"""

import jax
import numpy as np
import pytest

from benchmarks._device_parity import DTYPES, Scored, kernel_differences
from benchmarks._policy_step import raw_config
from rsagent_jax.fitness.decoding import EXACT, ROUNDED
from rsagent_jax.fitness.kernels import EXACT as EXACT_KERNEL
from rsagent_jax.fitness.kernels import ROUNDED as ROUNDED_KERNEL
from rsagent_jax.models.qwen25_vl.config import Qwen25VLConfig

PLATFORM = jax.default_backend()
if PLATFORM == "cpu":  # compiling is most of the time of these tests
    jax.config.update("jax_disable_most_optimizations", True)
pytestmark = [pytest.mark.device, pytest.mark.slow]
accelerator = pytest.mark.skipif(PLATFORM == "cpu", reason="needs an accelerator: JAX_PLATFORMS=cuda,cpu or tpu,cpu")
gpu = pytest.mark.skipif(PLATFORM != "gpu", reason="cuDNN needs a GPU: JAX_PLATFORMS=cuda,cpu")
tpu = pytest.mark.skipif(PLATFORM != "tpu", reason="splash needs a TPU: JAX_PLATFORMS=tpu,cpu")
RAW = raw_config(toy=True)
RAW["text_config"]["num_hidden_layers"] = 1  # less to compile
KERNELS = [
    pytest.param("blocks", "float32"),
    pytest.param("blocks", "bfloat16", marks=accelerator),
    pytest.param("splash", "float32", marks=tpu),
    pytest.param("splash", "bfloat16", marks=tpu),
    pytest.param("cudnn", "bfloat16", marks=gpu),
    pytest.param("cudnn_causal", "bfloat16", marks=gpu),
    pytest.param("triton", "float32"),
    pytest.param("triton", "bfloat16", marks=gpu),
]


@pytest.fixture(scope="module")
def scored():
    return Scored(Qwen25VLConfig.from_hf(RAW), RAW, 2, 96, (16, 16))


@pytest.fixture(scope="module")
def plain(scored):
    return {dtype: scored.logprobs(dtype) for dtype in DTYPES}


def bound(dtype: str, exact: float, rounded: float) -> float:
    return exact if PLATFORM == "cpu" and dtype == "float32" else rounded


@pytest.mark.parametrize(("kind", "dtype"), KERNELS)
def test_log_probs_by_each_attention_kernel_are_those_of_the_plain_one(scored, plain, kind, dtype):
    off = np.abs(scored.logprobs(dtype, kind) - plain[dtype])
    assert off.size > 0 and off.max() <= bound(dtype, EXACT, ROUNDED)


@accelerator
@pytest.mark.parametrize(("kind", "dtype"), KERNELS)
def test_values_and_gradients_of_each_attention_kernel_are_those_of_the_plain_one(kind, dtype):
    for name, differences in kernel_differences(kind, dtype).items():
        assert max(differences) <= bound(dtype, EXACT_KERNEL, ROUNDED_KERNEL), name


def test_bf16_says_what_fp32_says(plain):
    off = np.abs(plain["bfloat16"] - plain["float32"])
    assert 0 < off.max() <= ROUNDED and off.mean() <= ROUNDED / 5


@pytest.mark.parametrize("dtype", [DTYPES[0], pytest.param(DTYPES[1], marks=accelerator)])
def test_the_engine_draws_with_the_trainers_log_probs(scored, dtype):
    off = scored.engine_differences(dtype)
    assert off.size > 0 and off.max() <= bound(dtype, EXACT, ROUNDED)


@accelerator
@pytest.mark.parametrize(("dtype", "exact", "largest"), [("float32", True, EXACT), ("bfloat16", False, ROUNDED)])
def test_the_device_says_what_the_cpu_says(scored, dtype, exact, largest):
    off = np.abs(scored.logprobs(dtype, exact=exact) - scored.logprobs(dtype, device=scored.cpu))
    assert off.max() <= largest
