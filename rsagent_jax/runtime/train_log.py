"""What a run logs: metrics.jsonl (one object per step) beside its loggers, and rollouts.jsonl."""

import json
import math
import pathlib
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from rsagent_jax.runtime.journal import damaged
from rsagent_jax.runtime.loggers import Logger
from rsagent_jax.runtime.paths import AppendFile, read_lines, write_lines
from rsagent_jax.types import DataError


class MetricsLog:
    """metrics.jsonl; rollouts.jsonl, one group of trajectories per GRPO step, for people. `loggers` get the same.

    On resume, lines after the step that is gone on from are dropped, so that each step stands once.
    """

    def __init__(self, workdir: pathlib.Path, loggers: Sequence[Logger] = ()):
        self.path, self.rollouts = workdir / "metrics.jsonl", workdir / "rollouts.jsonl"
        self.lines = {path: AppendFile(path) for path in (self.path, self.rollouts)}
        self.loggers = list(loggers)
        self.counts: Counter[str] = Counter()  # since the start: steps, and what is to be said of them at the end

    def rewind(self, stage: str, step: int) -> None:
        """Forgets what `stage` logged after `step`. DataError naming the line if one cannot be read."""
        keep_lines(self.path, lambda row: row["stage"] != stage or row["step"] <= step)
        if stage == "grpo":
            keep_lines(self.rollouts, lambda row: row["step"] <= step)

    def write(self, stage: str, step: int, values: dict[str, float]) -> None:
        """DataError naming the step when the loss is not finite: training on would only lose time."""
        values = {name: float(value) for name, value in values.items()}
        self.counts["steps"] += step > 0  # 0: the validation before the first one
        self.counts.update({k: int(v) for k, v in values.items() if k == "no_update" or k.startswith("env_failed/")})
        finite = {k: v if math.isfinite(v) else None for k, v in values.items()}
        self.lines[self.path].add(json.dumps({"step": step, "stage": stage, **finite}) + "\n")
        for logger in self.loggers:
            logger.write(stage, step, values)
        if not math.isfinite(values.get("loss", 0.0)):
            loss = f"{stage} step {step}: the loss is {values['loss']}"
            raise DataError(f"{loss}; lower the learning rate or see l2_grads")

    def examples(self, step: int, examples: dict[str, Any]) -> None:
        """What a GRPO step's first group said and got, as JSON values; nothing where there is none."""
        if examples:
            self.lines[self.rollouts].add(json.dumps({"step": step, **examples}) + "\n")

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

    def close(self) -> None:
        for logger in self.loggers:
            logger.close()
        for file in self.lines.values():
            file.close()


def keep_lines(path: pathlib.Path, keep: Callable[[dict[str, Any]], bool]) -> None:
    """Drops the lines of a file of JSON objects that `keep` does not want, and a last one that was half written.

    The file changes as a whole or not at all; one that is not there is left so. DataError naming a damaged line.
    """
    if not path.exists():
        return
    content = read_lines(path)
    *lines, rest = content.split(b"\n")
    try:
        whole = isinstance(json.loads(rest), dict)
    except ValueError:
        whole = False
    if whole:  # but for its newline
        lines.append(rest)
    elif rest:
        print(f"{path}: the last line was half written, by a run that was killed, and is cut off")
    kept = []
    for number, line in enumerate(lines, start=1):
        try:
            if line.strip() and keep(json.loads(line)):
                kept.append(line + b"\n")
        except (ValueError, KeyError, TypeError) as error:
            raise damaged(f"{path}, line {number}", error) from None
    if b"".join(kept) != content:
        write_lines(path, b"".join(kept))
