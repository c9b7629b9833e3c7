"""Numbers agree (`pytest -m device`): attention kernels, bf16 and fp32, engine and trainer, a device and the CPU.

On a CPU these are toys, and what needs an accelerator is not there. On a machine that has one, tests/conftest.py would
still choose the CPU: JAX_PLATFORMS=cuda,cpu (or tpu,cpu) python -m pytest -m device
"""

import dataclasses

import jax
import pytest

from benchmarks._policy_step import raw_config
from rsagent_jax.fitness import kernels, parity
from rsagent_jax.models.qwen25_vl.config import Qwen25VLConfig, size_config

PLATFORM = jax.default_backend()
if PLATFORM == "cpu":  # compiling is most of the time of these tests
    jax.config.update("jax_disable_most_optimizations", True)
pytestmark = [pytest.mark.device, pytest.mark.slow]
accelerator = pytest.mark.skipif(PLATFORM == "cpu", reason="needs an accelerator: JAX_PLATFORMS=cuda,cpu or tpu,cpu")
TOY = Qwen25VLConfig.from_hf(raw_config(toy=True))
TOY = dataclasses.replace(TOY, text=dataclasses.replace(TOY.text, num_hidden_layers=1))  # less to compile
HERE = [(kind, dtype) for dtype in parity.DTYPES for kind in kernels.kernels_of(PLATFORM, dtype)]


@pytest.fixture(scope="module")
def compared():
    return {c.name: c for c in parity.compare_logprobs(parity.reduced(TOY if PLATFORM == "cpu" else size_config("3b")))}


def test_all_that_has_to_agree_is_compared_and_agrees(compared):
    beside = [f"{PLATFORM} and CPU, float32", f"{PLATFORM} and CPU, bfloat16"] if PLATFORM != "cpu" else []
    beside += [f"{PLATFORM} and CPU, float32, exact products"] * bool(beside)
    wanted = {f"policy, {pair}" for pair in ("bfloat16 and float32", *beside)}
    wanted |= {f"policy, {kind} and plain, {dtype}" for kind, dtype in HERE}
    assert set(compared) == wanted | {f"engine and trainer, {dtype}" for dtype in parity.DTYPES}
    assert not [c for c in compared.values() if not c.agrees]


def test_bf16_says_what_fp32_says_and_is_not_fp32(compared):
    off = compared["policy, bfloat16 and float32"]
    assert 0 < off.max <= parity.ROUNDED and off.mean <= parity.ROUNDED / 5


@accelerator
@pytest.mark.parametrize(("kind", "dtype"), HERE)
def test_values_and_gradients_of_each_attention_kernel_are_those_of_the_plain_one(kind, dtype):
    for name, differences in kernels.kernel_differences(kind, dtype, size_config("7b")).items():
        assert max(differences) <= kernels.kernel_bound(dtype, PLATFORM), name
