"""Every field a user can set, and the one function that turns a config file into these dataclasses.

A config file is Python with `get_config() -> ml_collections.ConfigDict`; `--config.a.b=v` overrides a leaf. `build`
checks the whole tree at once: a single DataError lists every unknown, missing or ill-typed field with the closest
match.
Fields marked (paper) carry the numbers of arXiv 2512.24023; every other default is ours.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Sequence
from typing import Any, TypeVar

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from rsagent_jax.types import DataError

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AgentConfig:
    """The environment: what the policy may do and when it ends."""

    max_turns: int = 8  # (paper)
    history_size: int = 384  # (paper) overlays of the history pool fit into this square, pixels
    prompt: str = "full"  # system prompt: "full" carries the JSON schema of every tool, "brief" is for tiny policies
    max_invalid: int = 3  # malformed calls in a row that end a trajectory
    max_repeats: int = 3  # same action in a row that ends a trajectory
    min_pixels: int = 0  # smart-resize limits of a view; 0 = those of the weights' preprocessor_config.json
    max_pixels: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class SegmenterConfig:
    """Where masks come from."""

    mode: str = "spawn"  # spawn: start and supervise a side-car; connect: use `addresses`; inprocess: no bridge
    backend: str = "grabcut"
    addresses: tuple[str, ...] = ()
    timeout_s: float = 30.0  # deadline of one call
    wait_s: float = 60.0  # how long an unreachable side-car is waited for
    workers: int = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which samples."""

    root: str = ""
    dataset: str = "refcocog"
    split_by: str = "umd"
    split: str = "train"
    unit: str = "sentence"  # sentence: every expression is a sample; reference: the first one of each
    limit: int = 0  # 0 = all


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Device mesh; -1 takes what is left."""

    data: int = 1
    fsdp: int = -1
    tensor: int = 1  # 0 = as the slice's preset says


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW with linear warm-up, then a constant or cosine schedule."""

    lr: float = 1e-6
    warmup_steps: int = 0
    schedule: str = "constant"  # constant | cosine
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    offload: bool = False  # AdamW's moments stay in host memory between updates
    freeze: tuple[str, ...] = ()  # parts that are not trained: vision, merger, decoder, embed, head


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """The fixed shapes of a training batch."""

    rows: int = 16  # over the whole mesh; 0 = as the slice's preset says
    tokens: int = 1024  # T per row
    patches: int = 1024  # P per row, before merging


@dataclasses.dataclass(frozen=True)
class RewardTerm:
    """One term of the reward."""

    function: str  # module:function(trajectory, sample) -> float
    weight: float = 1.0  # inside its group; negative for a cost


@dataclasses.dataclass(frozen=True)
class RewardGroup:
    """Terms weighted and added up, clipped to a range, then weighted in the total."""

    name: str
    weight: float  # in the total
    terms: tuple[RewardTerm, ...]
    clip: tuple[float, ...] = ()  # (low, high) of the sum of the terms; () = no clip


DEFAULT_REWARD = (
    RewardGroup("final", 1.0, (RewardTerm("rsagent_jax.rewards:final_iou"),)),  # group weight: (paper)
    RewardGroup(
        "process",
        0.5,  # (paper); everything below in this group is ours
        (
            RewardTerm("rsagent_jax.rewards:iou_gain", 1.0),
            RewardTerm("rsagent_jax.rewards:call_cost", -0.02),
            RewardTerm("rsagent_jax.rewards:novel_action", 0.1),
            RewardTerm("rsagent_jax.rewards:point_excess", -0.02),
            RewardTerm("rsagent_jax.rewards:overshoot", -1.0),
        ),
        clip=(-1.0, 1.0),
    ),
    RewardGroup("format", 0.2, (RewardTerm("rsagent_jax.rewards:format_ok"),)),  # group weight: (paper)
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How turns are sampled."""

    temperature: float = 1.0  # 0 = greedy
    max_new_tokens: int = 512  # per turn
    context: int = 8192  # tokens of a whole trajectory, images included
    slots: int = 64  # trajectories at a time
    patches: int = 4096  # patches of new images per slot and turn
    chunk: int = 8  # decode steps per compiled call


@dataclasses.dataclass(frozen=True, kw_only=True)
class SftConfig:
    """Supervised fine-tuning on stored trajectories."""

    trajectories: str = ""  # directory written by rsagent_jax.collect
    epochs: float = 2.0  # (paper)
    steps: int = 0  # 0 = as many as `epochs` gives
    trajectories_per_step: int = 128  # (paper) batch size
    batch: BatchConfig = BatchConfig()  # of one micro-batch
    optim: OptimConfig = OptimConfig(lr=2e-5)  # (paper)
    checkpoint_every: int = 0  # steps; 0 = only at the end


@dataclasses.dataclass(frozen=True, kw_only=True)
class GrpoConfig:
    """Group-relative policy optimisation."""

    steps: int = 100
    prompts: int = 16  # (paper) per step
    group: int = 4  # (paper) samples per prompt
    updates: int = 1  # optimiser steps per rollout
    advantage: str = "zscore"  # zscore | mean | loo
    ddof: int = 1
    ratio: str = "grpo"  # grpo | gspo | cispo
    clip_low: float = 0.2
    clip_high: float = 0.2
    kl: float = 0.0
    kl_estimator: str = "k3"
    normalize: str = "token"  # token | sequence | constant
    tis_clip: float = 2.0  # truncated importance sampling between engine and trainer; 0 = off
    drop_zero_variance: bool = True  # groups that have nothing to teach are not trained on
    min_spread: float = 0.0  # of a group's rewards; with less it counts as one of those
    mask_overlong: bool = False  # MAX_CONTEXT trajectories are not trained on
    reward: tuple[RewardGroup, ...] = DEFAULT_REWARD
    data: DataConfig = DataConfig()
    batch: BatchConfig = BatchConfig()
    optim: OptimConfig = OptimConfig()
    sampling: SamplingConfig = SamplingConfig()
    checkpoint_every: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters on the decoder's linear maps, trained in place of all other parameters (ours; paper: none)."""

    rank: int = 0  # 0 = no adapters
    alpha: float = 32.0  # an adapter's product counts alpha / rank times
    targets: tuple[str, ...] = ("q", "k", "v", "o", "gate", "up", "down")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyConfig:
    """The policy's weights and numerics."""

    weights: str  # a Hugging Face directory, or a checkpoint directory of train.py
    dtype: str = "bfloat16"  # of activations; parameters stay fp32 in training
    # What the backward pass keeps: none (no remat) | full | attention | selective | dots | save:NAMES | offload:NAMES
    remat: str = "full"  # "" = as the slice's preset says
    attention: str = "auto"  # auto | plain | blocks | splash (TPU) | cudnn (GPU)
    lora: LoraConfig = LoraConfig()  # of training; whoever loads its checkpoints gets merged weights


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """configs/*.py of train.py."""

    seed: int = 0
    stages: tuple[str, ...] = ("sft", "grpo")
    policy: PolicyConfig
    agent: AgentConfig = AgentConfig()
    segmenter: SegmenterConfig = SegmenterConfig()
    slice: str = ""  # v5e-16, v6e-64, …: decides what mesh.tensor, policy.remat and batch.rows leave open
    mesh: MeshConfig = MeshConfig()
    sft: SftConfig = SftConfig()
    grpo: GrpoConfig = GrpoConfig()
    cache_dir: str = ""  # compiled programs are kept here; "" = in the work directory
    profiler_port: int = 0  # every process serves jax.profiler on it (docs/tpu.md); 0 = none


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """configs/eval_*.py of evaluate.py."""

    benchmark: str = "refcocog"
    seed: int = 0
    policy: PolicyConfig
    agent: AgentConfig = AgentConfig()
    segmenter: SegmenterConfig = SegmenterConfig()
    data: DataConfig = DataConfig(split="val")
    sampling: SamplingConfig = SamplingConfig(temperature=0.0)
    cache_dir: str = ""
    examples: int = 12  # trajectories shown in the report


@dataclasses.dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """The oracle teacher: looks at the true mask, acts with the real tools."""

    function: str = "rsagent_jax.agent.teacher:Oracle"
    box: float = 0.5  # share of first prompts that are boxes; the rest are clicks
    wrong_first: float = 0.25  # share of trajectories whose first guess is wrong on purpose


@dataclasses.dataclass(frozen=True, kw_only=True)
class CollectConfig:
    """configs/collect_*.py of rsagent_jax.collect."""

    seed: int = 0
    limit: int = 0  # samples to try; 0 = all
    min_iou: float = 0.9  # (paper)
    max_turns: int = 8  # (paper)
    processor: str  # Hugging Face directory with the tokenizer and the image processor
    teacher: TeacherConfig = TeacherConfig()
    agent: AgentConfig = AgentConfig()
    segmenter: SegmenterConfig = SegmenterConfig()
    data: DataConfig = DataConfig()
    workers: int = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class SegmentConfig:
    """configs/segment.py of rsagent_jax.segment: one picture, one sentence."""

    seed: int = 0
    policy: PolicyConfig
    agent: AgentConfig = AgentConfig()
    segmenter: SegmenterConfig = SegmenterConfig(workers=1)
    sampling: SamplingConfig = SamplingConfig(temperature=0.0, slots=1)
    cache_dir: str = ""  # compiled programs are kept here; "" = in the output directory


def build(cls: type[T], values: Any, found: Sequence[str] = ()) -> T:
    """Turns a ConfigDict (or dict) into `cls`, or raises one DataError that lists everything that is wrong.

    `found`: problems that are known already, to be listed with the rest.
    """
    problems = list(found)
    result = _build(cls, dict(values), "", problems)
    if problems:
        if len(problems) == 1:
            raise DataError(f"config: {problems[0]}")
        raise DataError("\n  - ".join([f"config has {len(problems)} problems:", *problems]))
    return result


def to_dict(config: Any) -> Any:
    """The resolved config as plain JSON values, to be saved beside checkpoints and results."""
    if dataclasses.is_dataclass(config):
        return {f.name: to_dict(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, tuple | list):
        return [to_dict(v) for v in config]
    return config


def template(cls: type) -> ConfigDict:
    """A ConfigDict with every field of `cls` that has a default, so that a config file states only what differs and
    every field can be overridden on the command line. Reward groups and terms are reached by name:
    `--config.grpo.reward.final.terms.final_iou.function=module:function`.
    """
    hints = typing.get_type_hints(cls)
    out = ConfigDict()
    for field in dataclasses.fields(cls):
        if field.default is not dataclasses.MISSING:
            out[field.name] = _plain(field.default)
        elif dataclasses.is_dataclass(hints[field.name]):
            out[field.name] = template(hints[field.name])
        else:
            out[field.name] = placeholder(hints[field.name])
    return out


def _plain(value: Any) -> Any:
    if isinstance(value, tuple) and value and dataclasses.is_dataclass(value[0]):
        return ConfigDict({_item_name(item): _plain(item) for item in value})
    if dataclasses.is_dataclass(value):
        return ConfigDict({f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)})
    return value


def _item_name(item: Any) -> str:
    return item.name if hasattr(item, "name") else item.function.rpartition(":")[2]


def _build(cls: Any, values: dict, path: str, problems: list[str]) -> Any:
    hints = typing.get_type_hints(cls)
    known = [f.name for f in dataclasses.fields(cls)]
    for key in values:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            hint = f"; did you mean {path}{close[0]}?" if close else f"; known fields: {', '.join(known)}"
            problems.append(f"unknown field {path}{key}{hint}")
    kwargs = {}
    for field in dataclasses.fields(cls):
        where = path + field.name
        if values.get(field.name) is not None:
            kwargs[field.name] = _convert(hints[field.name], values[field.name], where, problems)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            problems.append(f"missing field {where} ({_type_name(hints[field.name])})")
    if problems:
        return None
    return cls(**kwargs)


def _convert(hint: Any, value: Any, where: str, problems: list[str]) -> Any:
    if dataclasses.is_dataclass(hint):
        if hasattr(value, "items"):
            return _build(hint, dict(value), where + ".", problems)
        if isinstance(value, hint):
            return value
        problems.append(f"{where} must be a group of fields ({hint.__name__}), got {value!r}")
        return None
    if typing.get_origin(hint) is tuple:
        if dataclasses.is_dataclass(typing.get_args(hint)[0]) and hasattr(value, "items"):
            return _named_items(typing.get_args(hint)[0], value, where, problems)
        if not isinstance(value, tuple | list):
            problems.append(f"{where} must be a list ({_type_name(hint)}), got {value!r}")
            return None
        item = typing.get_args(hint)[0]
        return tuple(_convert(item, v, f"{where}[{i}]", problems) for i, v in enumerate(value))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(hint, type) and isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    problems.append(f"{where} must be {_type_name(hint)}, got {value!r} ({type(value).__name__})")
    return None


def _named_items(cls: Any, values: Any, where: str, problems: list[str]) -> tuple:
    """A group of items by name, so that each can be reached from the command line; None removes an item."""
    named = any(f.name == "name" for f in dataclasses.fields(cls))
    items = []
    for key, value in values.items():
        if value is None:
            continue
        value = {"name": key, **dict(value)} if named and hasattr(value, "items") else value
        items.append(_convert(cls, value, f"{where}.{key}", problems))
    return tuple(items)


def _type_name(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) and not isinstance(hint, types.GenericAlias) else str(hint)
