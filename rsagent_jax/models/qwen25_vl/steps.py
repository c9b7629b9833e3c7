"""Which step of a stage's checkpoints is meant: checkpoints/<stage>, or checkpoints/<stage>@best, @last, @STEP."""

import math
import pathlib
from typing import Any

import orbax.checkpoint as ocp

from rsagent_jax.models.qwen25_vl.config import read_json
from rsagent_jax.types import DataError
from sam_bridge import hub

SCORE = "score"  # in a step's metrics: what the best one is chosen by, the larger the better; null = not measured
MEASURE = "measure"  # beside it: of what; only scores of one measure compare
LAST, BEST = "last", "best"


def score_of(metrics: dict[str, Any], measure: str | None = None) -> float:
    """-inf for a checkpoint that was not measured, or not by `measure`."""
    score = metrics.get(SCORE)
    return -math.inf if score is None or metrics.get(MEASURE) != measure else score


def split_step(weights: str | pathlib.Path) -> tuple[str, str]:
    """("runs/x/checkpoints/grpo", "best") of "runs/x/checkpoints/grpo@best"; "last" where nothing is said.

    A hub's org/name@revision stays whole.
    """
    weights = str(weights)
    directory, at, step = weights.rpartition("@")
    if not at or not (step in (LAST, BEST) or step.isdecimal()):
        return weights, LAST
    return (weights, LAST) if hub.is_repository(weights) and not pathlib.Path(directory).exists() else (directory, step)


def find_step(path: pathlib.Path, step: str = LAST) -> int:
    """The number of the finished checkpoint that `step` means in a stage's directory. DataError without it."""
    steps = sorted(ocp.utils.checkpoint_steps(path))
    if not steps:
        raise DataError(f"{path} holds no finished checkpoint; run train.py until one is saved")
    if step == LAST:
        return steps[-1]
    if step == BEST:
        found = {number: _metrics(path / str(number)) for number in steps}
        if not (measured := [m for m in found.values() if m.get(SCORE) is not None]):
            raise DataError(
                f"{path}@best: none of its checkpoints ({', '.join(map(str, steps))}) was validated; give @last or a"
                " step, or train with validation.sets and validation.keep_best"
            )
        measure = measured[-1].get(MEASURE)  # the latest one
        return max(steps, key=lambda number: (score_of(found[number], measure), number))
    if int(step) not in steps:
        raise DataError(f"{path}@{step}: there is no such checkpoint; there are {', '.join(map(str, steps))}")
    return int(step)


def _metrics(step: pathlib.Path) -> dict[str, Any]:
    file = step / "metrics" / "metrics"
    return read_json(file) if file.exists() else {}
