"""Numbers that have to agree: log-probs of one random policy on one batch, computed in several ways.

By every attention kernel of the platform and by the plain one, in bf16 and in fp32, by the device and by this host's
CPU, by the rollout engine and by the trainer. For doctor, benchmarks/device.py and tests/device.
"""

import contextlib
import dataclasses
from collections.abc import Iterator

import jax
import numpy as np
from flax import nnx

from rsagent_jax.config.schema import BatchConfig, MeshConfig, SamplingConfig
from rsagent_jax.data.packing import Item, pack
from rsagent_jax.fitness.finding import Examined, Finding, Verdict
from rsagent_jax.fitness.kernels import kernels_of
from rsagent_jax.fitness.made_up import random_policy, random_prompt
from rsagent_jax.models.qwen25_vl.compute import Compute
from rsagent_jax.models.qwen25_vl.config import Qwen25VLConfig
from rsagent_jax.models.qwen25_vl.positions import padded_patches
from rsagent_jax.rollout.engine import Engine
from rsagent_jax.rollout.policy import Request, Task
from rsagent_jax.runtime import sharding
from rsagent_jax.train.step import batch_logprobs

EXACT, ROUNDED = 1e-3, 0.15  # nats: fp32 on a CPU or with exact products, and where products round to bf16
DTYPES = ("float32", "bfloat16")
PACKED, WORDS = 2, 256  # sequences of the one row, longer together than attention.BLOCK; words of each about an image
PLAYED, ASKED, DRAWN = 4, 24, 16  # trajectories of the engine; words in each about an image of one window; tokens drawn
LAYERS, VOCABULARY = 2, 4096  # of a policy that is compared; it has the widths, heads and head dims of the config's


@dataclasses.dataclass(frozen=True)
class Compared:
    """The largest and the mean difference."""

    name: str
    max: float
    mean: float
    bound: float
    unit: str = "nats"

    @classmethod
    def of(cls, name: str, differences: np.ndarray, bound: float) -> "Compared":
        return cls(name, float(differences.max()), float(differences.mean()), bound)

    @property
    def agrees(self) -> bool:
        return self.max <= self.bound  # not so for NaN


def nats_bound(dtype: str, platform: str) -> float:
    return EXACT if platform == "cpu" and dtype == "float32" else ROUNDED


def reduced(policy: Qwen25VLConfig) -> Qwen25VLConfig:
    """Few layers of it, one that sees windows and one that sees whole images, and few words: seconds for a CPU."""
    depth, size = min(LAYERS, policy.vision.depth), min(VOCABULARY, policy.text.vocab_size)
    vision = dataclasses.replace(policy.vision, depth=depth, fullatt_block_indexes=(depth - 1,))
    layers = min(LAYERS, policy.text.num_hidden_layers)
    text = dataclasses.replace(policy.text, num_hidden_layers=layers, vocab_size=size)
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    special = {name: size - 1 - i for i, name in enumerate(names)} | {"eos_token_ids": (size - 1 - len(names),)}
    return dataclasses.replace(policy, text=text, vision=vision, **special)


class Scored:
    """A policy and a batch whose log-probs can be computed in several ways. Weights: fp32, the same everywhere."""

    def __init__(self, config: Qwen25VLConfig):
        self.config, self.device = config, jax.local_devices()[0]
        try:
            self.cpu = jax.local_devices(backend="cpu")[0]
        except RuntimeError:  # JAX_PLATFORMS names none
            self.cpu = None
        self.graphdef, self.params = random_policy(config, self._mesh(self.cpu or self.device), "float32")
        side, rng = 2 * config.vision.window_size // config.vision.patch_size, np.random.default_rng(1)
        prompts = [random_prompt(config, ((1, side, side),), WORDS, rng)[0] for _ in range(PACKED)]
        length, patches = len(prompts[0].tokens), padded_patches(prompts[0].grids, config.vision)
        trained, zeros = np.arange(length) >= length - WORDS // 2, np.zeros(length, np.float32)
        sizes = BatchConfig(rows=1, tokens=PACKED * length, patches=PACKED * patches)
        (self.batch,) = pack([_item(prompt, trained, zeros) for prompt in prompts], sizes, config)

    def _mesh(self, device) -> jax.sharding.Mesh:
        return sharding.make_mesh(MeshConfig(), [device])

    def logprobs(self, dtype: str, attention: str = "plain", device=None, *, exact: bool = False) -> np.ndarray:
        """f32[N] of the trained tokens. `exact`: fp32 products without TF32 or bf16 passes."""
        mesh = self._mesh(device or self.device)
        compute = Compute(dtype, attention=attention, mesh=mesh)
        params = jax.device_put(self.params, sharding.replicated(mesh))
        with jax.default_matmul_precision("highest") if exact else contextlib.nullcontext():
            return trainer_logprobs(self.graphdef, params, self.batch, compute, 1.0)

    def engine_differences(self, dtype: str) -> np.ndarray:
        """|engine - trainer| in nats, of every token that the engine drew; both on the first device."""
        config = self.config
        params = jax.device_put(jax.tree.map(lambda x: x.astype(dtype), self.params), self.device)
        sizes = dict(slots=4, lanes=2, context=256, patches=config.vision.window_patches, prefill=64)
        model, ends, key = nnx.merge(self.graphdef, params), config.eos_token_ids[0], jax.random.key(0)
        engine = Engine(model, SamplingConfig(**sizes, max_new_tokens=DRAWN), ends, dtype, key)
        return engine_differences(engine, self.graphdef, params, Compute(dtype))


def compare_logprobs(config: Qwen25VLConfig, *, engine: bool = True, asked: str = "") -> Iterator[Compared]:
    """Everything that can be compared on this process's first device, with or without the rollout engine; `asked` as of
    kernels_of."""
    scored, platform = Scored(config), jax.default_backend()
    plain = {dtype: scored.logprobs(dtype) for dtype in DTYPES}
    yield Compared.of("policy, bfloat16 and float32", np.abs(plain["bfloat16"] - plain["float32"]), ROUNDED)
    if platform != "cpu" and scored.cpu is not None:
        on_cpu = {dtype: scored.logprobs(dtype, device=scored.cpu) for dtype in DTYPES}
        for dtype in DTYPES:
            yield Compared.of(f"policy, {platform} and CPU, {dtype}", np.abs(plain[dtype] - on_cpu[dtype]), ROUNDED)
        exact = np.abs(scored.logprobs("float32", exact=True) - on_cpu["float32"])
        yield Compared.of(f"policy, {platform} and CPU, float32, exact products", exact, EXACT)
    for dtype in DTYPES:
        for kind in kernels_of(platform, dtype, asked):
            differences = np.abs(scored.logprobs(dtype, kind) - plain[dtype])
            yield Compared.of(f"policy, {kind} and plain, {dtype}", differences, nats_bound(dtype, platform))
        if engine:
            yield Compared.of(
                f"engine and trainer, {dtype}", scored.engine_differences(dtype), nats_bound(dtype, platform)
            )


def check_numbers(examined: Examined) -> list[Finding]:
    """With a policy of the config's widths and few layers; the check of the engine has a line for its log-probs."""
    found, remedy = [], "do not train here; another jax, driver or device; see the attention kernels' lines"
    asked = examined.settled.policy.attention
    for c in compare_logprobs(reduced(examined.policy), engine=False, asked=asked):
        figure, against = f"{c.max:.1e} nats at most, {c.mean:.1e} in the mean", f"{c.bound:g} at most"
        found.append(Finding.judged(c.name, c.agrees, Verdict.WRONG, figure, against, remedy))
    return found


# ---------------------------------------------------------------------------------------------- engine and trainer


def engine_differences(engine: Engine, graphdef, params, compute: Compute, temperature: float = 1.0) -> np.ndarray:
    """|engine - trainer| in nats, of every token that the engine draws in a turn of a few trajectories.

    The trainer reads packed rows, as training has them.
    """
    items = _play(engine)
    parts, longest = sharding.parts("rows", compute.mesh), max(len(item.tokens) for item in items)
    rows, patches = -(-len(items) // parts) * parts, engine.config.vision.window_patches
    (batch,) = pack(items, BatchConfig(rows=rows, tokens=longest, patches=patches), engine.config)
    drawn = batch.old_logprobs[batch.loss_mask]
    return np.abs(trainer_logprobs(graphdef, params, batch, compute, temperature) - drawn)


def trainer_logprobs(graphdef, params, batch, compute: Compute, temperature: float) -> np.ndarray:
    """f32[N] of the batch's trained tokens."""
    program = jax.jit(lambda params, batch: batch_logprobs(graphdef, params, batch, compute, temperature))
    placed = batch if compute.mesh is None else jax.device_put(batch, sharding.rows(compute.mesh))
    return np.asarray(program(params, placed))[batch.loss_mask]


def _play(engine: Engine) -> list[Item]:
    """A turn of a few trajectories, about an image of one window each."""
    rng, prompts, items = np.random.default_rng(0), {}, []
    side = engine.config.vision.window_size // engine.config.vision.patch_size
    for slot in range(min(PLAYED, engine.slots)):
        prompts[slot] = prompt, end = random_prompt(engine.config, ((1, side, side),), ASKED, rng)
        engine.submit(Request(slot, prompt, end, None, Task(None, slot, slot), 0, DRAWN))
    while len(items) < len(prompts):
        for slot, drawn in engine.step():
            prompt, end = prompts[slot]
            n, forced = len(drawn.tokens), len(prompt.tokens)
            later = np.broadcast_to(end + np.arange(n), (3, n))
            whole = dataclasses.replace(
                prompt,
                tokens=np.concatenate([prompt.tokens, drawn.tokens]),
                positions=np.concatenate([prompt.positions, later], axis=1, dtype=np.int32),
            )
            logprobs = np.concatenate([np.zeros(forced, np.float32), drawn.logprobs])
            items.append(_item(whole, np.arange(forced + n) >= forced, logprobs))
    return items


def _item(prompt, trained: np.ndarray, logprobs: np.ndarray) -> Item:
    return Item(prompt.tokens, prompt.positions, trained, logprobs, prompt.patches, prompt.grids)
