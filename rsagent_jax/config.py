"""Every field a user can set, and the one function that turns a config file into these dataclasses.

A config file is Python with `get_config() -> ml_collections.ConfigDict`; `--config.a.b=v` overrides a leaf. `build` checks
the whole tree at once: a single DataError lists every unknown, missing or ill-typed field with the closest match.
Fields marked (paper) carry the numbers of arXiv 2512.24023; every other default is ours.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from typing import Any, TypeVar

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
    tensor: int = 1


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
    freeze: tuple[str, ...] = ()  # parts that are not trained: vision, merger, decoder, embed, head


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """The fixed shapes of a training batch."""

    rows: int = 16
    tokens: int = 1024  # T per row
    patches: int = 1024  # P per row, before merging


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardTerm:
    """One term of the reward, `module:function(trajectory, sample) -> float`."""

    function: str
    weight: float = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardGroup:
    """Terms added up, clipped to a range (empty: not clipped), then weighted."""

    name: str
    weight: float = 1.0
    terms: tuple[RewardTerm, ...] = ()
    clip: tuple[float, ...] = ()


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
    batch: BatchConfig = BatchConfig()
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
    drop_zero_variance: bool = True
    mask_overlong: bool = False  # MAX_CONTEXT trajectories are not trained on
    reward: tuple[RewardGroup, ...] = ()
    data: DataConfig = DataConfig()
    batch: BatchConfig = BatchConfig()
    optim: OptimConfig = OptimConfig()
    sampling: SamplingConfig = SamplingConfig()
    checkpoint_every: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyConfig:
    """The policy's weights and numerics."""

    weights: str  # a Hugging Face directory, or a checkpoint directory of train.py
    dtype: str = "bfloat16"  # of activations; parameters stay fp32 in training
    remat: str = "full"  # none | full | dots


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """configs/*.py of train.py."""

    seed: int = 0
    stages: tuple[str, ...] = ("sft", "grpo")
    policy: PolicyConfig
    agent: AgentConfig = AgentConfig()
    segmenter: SegmenterConfig = SegmenterConfig()
    mesh: MeshConfig = MeshConfig()
    sft: SftConfig = SftConfig()
    grpo: GrpoConfig = GrpoConfig()
    cache_dir: str = ""  # compiled programs are kept here; "" = in the work directory


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


def build(cls: type[T], values: Any) -> T:
    """Turns a ConfigDict (or dict) into `cls`, or raises one DataError that lists everything that is wrong."""
    problems: list[str] = []
    result = _build(cls, dict(values), "", problems)
    if problems:
        raise DataError("config: " + "; ".join(problems) if len(problems) == 1 else
                        "config has %d problems:\n  - %s" % (len(problems), "\n  - ".join(problems)))
    return result


def to_dict(config: Any) -> Any:
    """The resolved config as plain JSON values, to be saved beside checkpoints and results."""
    if dataclasses.is_dataclass(config):
        return {f.name: to_dict(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, tuple | list):
        return [to_dict(v) for v in config]
    return config


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
        if field.name in values:
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


def _type_name(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) and not isinstance(hint, types.GenericAlias) else str(hint)
