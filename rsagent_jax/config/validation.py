"""Validation in a training run: which sets, how often, what is kept. rsagent_jax/train/validation.py does it."""

import dataclasses
from typing import Annotated, Literal

from rsagent_jax.config import rules
from rsagent_jax.config.data import DataConfig, MetricConfig
from rsagent_jax.config.ranges import CountOrZero, Form


@dataclasses.dataclass(frozen=True, kw_only=True)
class ValidationSet:
    """One set of samples, which training never sees."""

    name: Annotated[str, Form(r"[\w.+-]+", "a name without blanks and slashes, such as testA")]
    data: DataConfig = DataConfig(split="val")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ValidationConfig:
    """Before step 1, every `every` steps and at the end of a stage. Shapes are those of grpo.sampling, in SFT too."""

    sets: tuple[ValidationSet, ...] = ()  # none = no validation
    every: CountOrZero = 0  # steps; 0 = only before step 1 and at the end
    greedy: bool = True  # else as grpo.sampling draws
    metric: MetricConfig = MetricConfig()  # as evaluate.py has it
    keep: CountOrZero = 4  # trajectories of a set that are kept each time, in the trajectory format
    # The figure whose best checkpoint is kept beside the newest two: val/FIGURE, the mean over the sets, or
    # val/SET/FIGURE. With it every validation is followed by a checkpoint. "" = the newest two only.
    keep_best: Annotated[str, Form(r"|val/.+", "val/FIGURE or val/SET/FIGURE, such as val/giou")] = "val/giou"
    best_mode: Literal["max", "min"] = "max"  # of that figure
    early_stop: CountOrZero = 0  # validations in a row without a new best that end a stage; 0 = never
    conflicts = rules.validation
