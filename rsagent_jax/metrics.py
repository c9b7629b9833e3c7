"""metrics.jsonl (one object per step) and TensorBoard events, side by side."""

from __future__ import annotations

import json
import math
import pathlib
import sys

import numpy as np

from rsagent_jax.types import DataError

# tensorboardX imports torch wherever it is installed, only to accept tensors; this side never loads torch.
_keep_out = "torch" not in sys.modules
if _keep_out:
    sys.modules["torch"] = None
try:
    from tensorboardX import SummaryWriter
finally:
    if _keep_out:
        del sys.modules["torch"]


class MetricsLog:
    """On resume, lines at or after the step that is run again are dropped, so each step stands once."""

    def __init__(self, workdir: pathlib.Path):
        self.path = workdir / "metrics.jsonl"
        self.events = SummaryWriter(str(workdir / "tensorboard"))

    def rewind(self, stage: str, step: int) -> None:
        """Forgets lines of `stage` after `step`."""
        if not self.path.exists():
            return
        lines = [line for line in self.path.read_text().splitlines() if line.strip()]
        kept = [line for line in lines if not ((r := json.loads(line))["stage"] == stage and r["step"] > step)]
        self.path.write_text("".join(line + "\n" for line in kept))

    def write(self, stage: str, step: int, values: dict[str, float]) -> None:
        """DataError naming the step when the loss is not finite: training on would only lose time."""
        values = {name: float(value) for name, value in values.items()}
        with self.path.open("a", encoding="utf-8") as file:
            finite = {k: v if math.isfinite(v) else None for k, v in values.items()}
            file.write(json.dumps({"step": step, "stage": stage, **finite}) + "\n")
        for name, value in values.items():
            self.events.add_scalar(f"{stage}/{name}", value, step)
        if not math.isfinite(values.get("loss", 0.0)):
            raise DataError(
                f"{stage} step {step}: the loss is {values['loss']}; lower the learning rate or see l2_grads"
            )

    def image(self, name: str, image: np.ndarray, step: int) -> None:
        """u8[h, w, 3], for TensorBoard."""
        self.events.add_image(name, image, step, dataformats="HWC")

    def close(self) -> None:
        self.events.close()
