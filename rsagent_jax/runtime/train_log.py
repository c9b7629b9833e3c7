"""What a run logs: metrics.jsonl (one object per step) beside its loggers, and rollouts.jsonl.

A step's line of rollouts.jsonl holds all that was said, so they are a file to each ROTATE steps:

    rollouts.jsonl            steps 1 to 1000
    rollouts_0001000.jsonl    the thousand after step 1000, and so on

Those of before the newest checkpoint may be compressed or removed while the run goes on: no resume reads them.
"""

import json
import math
import pathlib
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from rsagent_jax.runtime.json_lines import keep_lines
from rsagent_jax.runtime.loggers import Logger
from rsagent_jax.runtime.paths import AppendFile
from rsagent_jax.types import DataError

ROTATE = 1000  # GRPO steps in a file of rollouts
FINITE = {"loss": "the loss", "l2_grads": "the gradient's norm", "l2_updates": "the update's norm"}


def rollouts_path(workdir: pathlib.Path, step: int) -> pathlib.Path:
    """The file with the line of this GRPO step; in the order of their names they are in the order of their steps."""
    after = max(step - 1, 0) // ROTATE * ROTATE
    return workdir / (f"rollouts_{after:07d}.jsonl" if after else "rollouts.jsonl")


class MetricsLog:
    """metrics.jsonl; rollouts.jsonl, one group of trajectories per GRPO step, for people. `loggers` get the same.

    On resume, lines after the step that is gone on from are dropped, so that each step stands once.
    """

    def __init__(self, workdir: pathlib.Path, loggers: Sequence[Logger] = ()):
        self.path, self.lines = workdir / "metrics.jsonl", {}
        self.loggers = list(loggers)
        self.counts: Counter[str] = Counter()  # since the start: steps, and what is to be said of them at the end

    def rewind(self, stage: str, step: int) -> None:
        """Forgets what `stage` logged after `step`, also on the loggers that have a `rewind`."""
        keep_lines(self.path, lambda row: row["stage"] != stage or row["step"] <= step)
        if stage == "grpo":
            first = rollouts_path(self.path.parent, step + 1)
            for path in sorted(self.path.parent.glob("rollouts*.jsonl")):
                if path.name >= first.name:
                    keep_lines(path, lambda row: row["step"] <= step)
        for logger in self.loggers:
            if hasattr(logger, "rewind"):
                logger.rewind(stage, step)

    def write(self, stage: str, step: int, values: dict[str, float]) -> None:
        """DataError naming the step when the loss, or the norm of the gradient or of the update, is not finite:
        training on would only lose time."""
        values = {name: float(value) for name, value in values.items()}
        self.counts["steps"] += step > 0  # 0: the validation before the first one
        self.counts.update({k: int(v) for k, v in values.items() if k == "no_update" or k.startswith("env_failed/")})
        finite = {k: v if math.isfinite(v) else None for k, v in values.items()}
        self._add(self.path, {"step": step, "stage": stage, **finite})
        for logger in self.loggers:
            logger.write(stage, step, values)
        for name, what in FINITE.items():
            if not math.isfinite(values.get(name, 0.0)):
                raise DataError(
                    f"{stage} step {step}: {what} is {values[name]}; lower the learning rate or see l2_grads. The last"
                    " checkpoint is as it was"
                )

    def examples(self, step: int, examples: dict[str, Any]) -> None:
        """What a GRPO step's first group said and got, as JSON values; nothing where there is none."""
        if examples:
            self._add(rollouts_path(self.path.parent, step), {"step": step, **examples})

    def _add(self, path: pathlib.Path, row: dict[str, Any]) -> None:
        if path not in self.lines:
            self.lines[path] = AppendFile(path)
        self.lines[path].add(json.dumps(row) + "\n")

    def failures(self) -> list[str]:
        """For the terminal: what was logged since the start and taught nothing, or was lost to a broken tool."""
        lost = {k.removeprefix("env_failed/"): n for k, n in self.counts.items() if k.startswith("env_failed/") and n}
        said = []
        if n := self.counts["no_update"]:
            said.append(f"{n} of {self.counts['steps']} steps made no update: nothing in them taught anything")
        if lost:
            by_kind = ", ".join(f"{kind} {n}" for kind, n in lost.items())
            said.append(f"{sum(lost.values())} trajectories ended because the segmenter failed: {by_kind}")
        return said

    def image(self, name: str, image: np.ndarray, step: int) -> None:
        """u8[h, w, 3], for those of the loggers that have an `image`."""
        for logger in self.loggers:
            if hasattr(logger, "image"):
                logger.image(name, image, step)

    def flush(self) -> None:
        """Before a checkpoint, from which nothing before it is logged again: of loggers that keep something back."""
        for logger in self.loggers:
            if hasattr(logger, "flush"):
                logger.flush()

    def close(self) -> None:
        for logger in self.loggers:
            logger.close()
        for file in self.lines.values():
            file.close()
