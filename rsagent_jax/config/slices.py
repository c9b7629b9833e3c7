"""What a config leaves open and a slice decides: tensor parallelism, rows per micro-batch, remat policy, slots.

`mesh.tensor = 0`, `batch.rows = 0`, `policy.remat = ""`, and for GRPO `sampling.tensor = 0` and `sampling.slots = 0`
mean: as the slice's preset says. docs/scaling.md has what was compiled, with rows of 6k tokens: `selective` where it
fits and its projected time is shorter. The slices of 64 of the 3B and 7B alone are arithmetic: less of the state on a
device than on the smaller slice of their kind.

The hosts of a slice share a step's prompts evenly: where there are more than 16 of them, as in v6e-128, v5e-256 or
v5p-256, GRPO takes --config.grpo.prompts of a multiple of them, and not the paper's 16.
"""

import dataclasses
from collections.abc import Sequence

from rsagent_jax.config.schema import SamplingConfig, TrainConfig
from rsagent_jax.types import DataError


@dataclasses.dataclass(frozen=True)
class Preset:
    tensor: int = 1
    remat: str = "full"
    rollout_tensor: int = 1  # of a host's devices, to hold the engine's weights and slots beside the training state
    slots: int = 64  # per host, of 6k tokens; 0: SFT alone, no engine fits a host beside the training state


SIZES = {2048: "3b", 3584: "7b", 5120: "32b", 8192: "72b"}  # hidden size -> name
# 3B has those of 7B, but a slot on two devices at most: it has two key-value heads.
_SMALL = {
    "v5e-8": Preset(rollout_tensor=4, slots=32),  # 7B with policy.lora only
    "v5e-16": Preset(tensor=2, rollout_tensor=4, slots=32),  # rows of 6k tokens on a device each would not fit
    "v5e-64": Preset(rollout_tensor=4, slots=32),
    "v5p-8": Preset(remat="selective"),
    "v5p-64": Preset(remat="selective"),
    "v6e-8": Preset(rollout_tensor=2),
    "v6e-64": Preset(rollout_tensor=2),
    "tpu7x-8": Preset(),
}
PRESETS: dict[str, dict[str, Preset]] = {
    "3b": {name: dataclasses.replace(p, rollout_tensor=min(2, p.rollout_tensor)) for name, p in _SMALL.items()},
    "7b": _SMALL,
    # The smallest of a kind that fit. A host of v5e or v6e does not hold an engine of the 72B.
    "32b": {
        "v5e-256": Preset(tensor=4, slots=0),
        "v6e-64": Preset(tensor=2, rollout_tensor=4, slots=4),
        "v5p-32": Preset(rollout_tensor=4, slots=16),
        "tpu7x-16": Preset(rollout_tensor=8, slots=32),
    },
    "72b": {
        "v6e-128": Preset(tensor=2, slots=0),
        "v5p-64": Preset(rollout_tensor=4, slots=16),
        "tpu7x-32": Preset(rollout_tensor=8, slots=16),
    },
}


# An engine without a trainer beside it (evaluate.py, collect, segment), by kind of device: devices that share a slot,
# and slots for such a group; contexts of 6k tokens, weights and cache in bf16. docs/scaling.md has what they need, but
# for v4, which was not compiled.
ENGINES: dict[str, dict[str, tuple[int, int]]] = {
    "7b": {"TPU v5 lite": (4, 64), "TPU v6 lite": (2, 64), "TPU v5": (1, 128), "TPU v4": (2, 64), "TPU7x": (1, 64)},
    "32b": {"TPU v6 lite": (8, 64), "TPU v5": (4, 128), "TPU7x": (4, 64)},
    "72b": {"TPU v5": (4, 64), "TPU7x": (8, 64)},
}
TOO_LARGE = ("72b", "TPU v6 lite")  # eight of them hold the weights, but not beside what these are made of
ENGINES["3b"] = {kind: (min(tensor, 2), slots) for kind, (tensor, slots) in ENGINES["7b"].items()}  # it has 2 KV heads


def fill_engine_defaults(sampling: SamplingConfig, hidden_size: int, devices: Sequence) -> SamplingConfig:
    """With tensor = 0 and slots = 0 filled in for an engine on these devices of a host, which it has to itself.

    DataError where the kind's engine wants more devices than this host has (the 32B of v6e eight, and the hosts of
    larger slices have four), and for TOO_LARGE.
    """
    kind, size = devices[0].device_kind, SIZES.get(hidden_size)
    if (size, kind) == TOO_LARGE and not sampling.tensor:
        raise DataError(f"no engine of {size} fits a host of {kind}: take one of {', '.join(ENGINES[size])}")
    tensor, slots = ENGINES.get(size, {}).get(kind, (1, 64))
    sampling = _fill(sampling, tensor=tensor)
    if len(devices) % sampling.tensor:
        raise DataError(
            f"sampling.tensor = {sampling.tensor} must divide the {len(devices)} devices of a host of {kind}; set"
            " sampling.tensor and sampling.slots for fewer, or take a slice whose host has more (v6e-8)"
        )
    return _fill(sampling, slots=slots * max(1, len(devices) // sampling.tensor))


def fill_slice_defaults(config: TrainConfig, hidden_size: int, devices: int) -> TrainConfig:
    """The config with nothing left open. DataError for a slice without a preset, or one of another size."""
    size = SIZES.get(hidden_size, f"hidden size {hidden_size}")
    known = PRESETS.get(size, {})
    if config.slice and config.slice not in known:
        raise DataError(
            f"slice {config.slice!r} has no preset for {size}; there are {', '.join(known) or 'none'}."
            ' Without one, leave slice = "" and set mesh.tensor, policy.remat and the batches\' rows'
        )
    preset = known.get(config.slice, Preset())
    mesh = _fill(config.mesh, tensor=preset.tensor)
    if devices % mesh.tensor:
        raise DataError(f"mesh.tensor = {mesh.tensor} does not divide {devices} devices")
    groups = devices // mesh.tensor  # a row of a micro-batch each, unless the config says otherwise
    sft = dataclasses.replace(config.sft, batch=_fill(config.sft.batch, rows=groups))
    sampling = _fill(config.grpo.sampling, tensor=preset.rollout_tensor, slots=preset.slots)
    if config.plays and not sampling.slots:
        raise DataError(
            f"slice {config.slice!r} has a preset of {size} for SFT alone: a host of it does not hold the weights that"
            " rollouts need beside the training state. Take another slice, or set grpo.sampling.tensor and .slots"
        )
    grpo = dataclasses.replace(config.grpo, batch=_fill(config.grpo.batch, rows=groups), sampling=sampling)
    policy = _fill(config.policy, remat=preset.remat)
    config = dataclasses.replace(config, mesh=mesh, policy=policy, sft=sft, grpo=grpo)
    for stage in config.stages:
        have = getattr(config, stage).batch.rows
        if have % groups:
            raise DataError(f"{stage}.batch.rows = {have} must be a multiple of the mesh's {groups} groups of devices")
    return config


def _fill(config, **values):
    """The config with these values where it leaves a field open: 0 or ""."""
    return dataclasses.replace(config, **{name: getattr(config, name) or value for name, value in values.items()})
