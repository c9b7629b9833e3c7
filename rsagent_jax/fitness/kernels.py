"""Each attention kernel that the config could use against the plain one: values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np

from rsagent_jax.config.schema import PolicyConfig, TrainConfig
from rsagent_jax.fitness.finding import Examined, Finding, Verdict, not_run
from rsagent_jax.models.qwen25_vl import attention
from rsagent_jax.models.qwen25_vl.compute import Compute

SHORT, LONG = 640, 4608  # the second is a row for which the splash kernel's backward pass is two programs
EXACT, ROUNDED = 2e-5, 3e-2  # of the largest value: fp32 on a CPU, and where products round to bf16


def check_kernels(examined: Examined) -> list[Finding]:
    """On this process's first device, with the policy's head dims and a few of its heads."""
    policy, config, platform = examined.policy, examined.settled, jax.default_backend()
    if (kind := kernel_of(config.policy, platform)) == "plain":
        return not_run("attention", "the config asks for the plain one")
    text, vision, found = policy.text, policy.vision, []
    heads = {
        "text": (min(4, text.num_attention_heads // text.num_key_value_heads), 1, text.head_dim),
        "images": (2, 2, vision.hidden_size // vision.num_heads),
    }
    bound = EXACT if platform == "cpu" and config.policy.dtype == "float32" else ROUNDED
    remedy = "--config.policy.attention=blocks until another jax, driver or device agrees"
    for length in (SHORT,) if platform == "cpu" or not _has_long_rows(config) else (SHORT, LONG):
        for name, sizes in heads.items():
            values, grads = _differences(kind, config.policy.dtype, name == "text", length, *sizes)
            title, good = f"attention, {kind}, {name}, {length} places", max(values, grads) <= bound
            figure, against = f"values {values:.1e}, gradients {grads:.1e} of the largest", f"{bound:.0e} from plain"
            found.append(Finding.judged(title, good, Verdict.WRONG, figure, against, remedy))
    return found


def kernel_of(policy: PolicyConfig, platform: str) -> str:
    """The one beside plain that attention.in_segments chooses on this platform; on a CPU for long rows."""
    fused = jnp.dtype(policy.dtype).itemsize == 2
    auto = {"tpu": "splash", "gpu": "cudnn" if fused else "blocks"}.get(platform, "blocks")
    return auto if policy.attention == "auto" else policy.attention


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
