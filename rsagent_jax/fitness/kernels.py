"""Each attention kernel of the platform against the plain one: values and gradients."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from rsagent_jax.config.schema import TrainConfig
from rsagent_jax.fitness.finding import Examined, Finding, Verdict
from rsagent_jax.models.qwen25_vl import attention
from rsagent_jax.models.qwen25_vl.compute import Compute
from rsagent_jax.models.qwen25_vl.config import Qwen25VLConfig

SHORT, LONG = 640, 4608  # the second is a row for which the splash kernel's backward pass is two programs
EXACT, ROUNDED = 2e-5, 3e-2  # of the largest value: fp32 on a CPU, and where products round to bf16


def check_kernels(examined: Examined) -> list[Finding]:
    """On this process's first device, in the config's dtype, with the policy's head dims and a few of its heads."""
    config, platform = examined.settled, jax.default_backend()
    dtype, found = config.policy.dtype, []
    remedy = "--config.policy.attention=blocks until another jax, driver or device agrees"
    lengths = (SHORT,) if platform == "cpu" or not _has_long_rows(config) else (SHORT, LONG)
    bound, kinds = kernel_bound(dtype, platform), kernels_of(platform, dtype, config.policy.attention)
    for kind, length in itertools.product(kinds, lengths):
        for name, (values, grads) in kernel_differences(kind, dtype, examined.policy, length).items():
            good = max(values, grads) <= bound
            title = f"attention, {kind}, {name}, {length} places"
            figure, against = f"values {values:.1e}, gradients {grads:.1e} of the largest", f"{bound:.0e} from plain"
            found.append(Finding.judged(title, good, Verdict.WRONG, figure, against, remedy))
    return found


def kernels_of(platform: str, dtype: str, asked: str = "") -> list[str]:
    """What attention.in_segments has for this platform beside the plain one; cuDNN has nothing in fp32. `asked`:
    without those that "auto" never takes, but for this one."""
    gpu = ["triton"] + ["cudnn", "cudnn_causal"] * (dtype == "bfloat16")
    every = ["blocks", *{"tpu": ["splash"], "gpu": gpu}.get(platform, [])]
    return [kind for kind in every if not asked or kind == asked or kind not in ("triton", "cudnn_causal")]


def kernel_bound(dtype: str, platform: str) -> float:
    """Of the largest value."""
    return EXACT if platform == "cpu" and dtype == "float32" else ROUNDED


def kernel_differences(
    kind: str, dtype: str, policy: Qwen25VLConfig, length: int = SHORT
) -> dict[str, tuple[float, float]]:
    """By shape of heads: the largest difference of values and of gradients from plain, over plain's largest."""
    text, vision = policy.text, policy.vision
    heads = {
        "text": (min(4, text.num_attention_heads // text.num_key_value_heads), 1, text.head_dim),
        "images": (2, 2, vision.hidden_size // vision.num_heads),
    }
    return {name: _differences(kind, dtype, name == "text", length, *sizes) for name, sizes in heads.items()}


def _has_long_rows(config) -> bool:
    stages = [getattr(config, stage).batch for stage in config.stages] if isinstance(config, TrainConfig) else []
    return any(not attention.is_fused(n) for batch in stages for n in (batch.tokens, batch.patches))


def _differences(kind: str, dtype: str, causal: bool, t: int, n: int, k: int, h: int) -> tuple[float, float]:
    """The largest of values and of gradients, over the largest plain one (at least 1). NaN counts as infinite."""
    rng = np.random.default_rng(0)
    shapes = ((1, t, n, h), (1, k, t, h), (1, k, t, h), (1, t, n, h))
    q, key, v, weight = (jnp.asarray(rng.standard_normal(s, np.float32), dtype) for s in shapes)
    ids = np.repeat([[1, 2, 3, 0]], [t // 2, t // 4, t // 8, t - t // 2 - t // 4 - t // 8], axis=1).astype(np.int32)
    real = (ids > 0)[..., None, None]  # padding may give anything

    def value(kind: str):
        def f(q, key, v):
            o = attention.in_segments(jnp.asarray(ids), Compute(dtype, attention=kind), causal=causal)(q, key, v)
            return jnp.sum(jnp.where(real, o * weight, 0).astype(jnp.float32)), jnp.where(real, o, 0)

        (_, o), grads = jax.jit(jax.value_and_grad(f, (0, 1, 2), has_aux=True))(q, key, v)
        return [np.asarray(x, np.float32) for x in (o, *grads)]

    pairs = zip(value(kind), value("plain"), strict=True)
    off = [float(np.abs(got - want).max() / max(1.0, np.abs(want).max())) for got, want in pairs]
    off = [x if np.isfinite(x) else np.inf for x in off]
    return off[0], max(off[1:])
