"""Where a run's figures go besides metrics.jsonl: TensorBoard, Weights & Biases, the terminal, or a class of your own.

`loggers` in the config names them. A logger is made with (workdir, config), the work directory and the resolved config
as JSON values, and has the two methods of `Logger`.
"""

import contextlib
import importlib
import os
import pathlib
import secrets
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from tqdm import tqdm

from rsagent_jax.config.import_path import closest, first_line, import_path
from rsagent_jax.runtime.local_copies import put_files
from rsagent_jax.runtime.paths import is_remote, make_directory, read_bytes, write_whole, writing
from rsagent_jax.types import DataError

SEND_S = 60  # seconds between two uploads of TensorBoard's events


class Logger(Protocol):
    def write(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """The figures of a step. A step that is gone on from after a kill is written again."""

    def close(self) -> None: ...


class TensorBoard:
    """Events in <workdir>/tensorboard/<stage>: a step's are on the disk when it has been logged.

    A stage that goes on after a step says so in its events, and those that a start before it wrote after that step
    count no longer. (TensorBoard forgets them of a whole directory, so each stage has its own.)
    """

    def __init__(self, workdir: pathlib.Path, config: Mapping[str, Any]):
        del config
        self.board, self.sent = workdir / "tensorboard", time.monotonic()
        # Events of a bucket are written here and go there once a minute.
        self.local = pathlib.Path(tempfile.mkdtemp()) if is_remote(workdir) else self.board
        self.files: dict[str, Any] = {}  # stage -> tensorboardX's EventsWriter
        self.done: dict[str, int] = {}  # stage -> the step that it goes on after

    def rewind(self, stage: str, step: int) -> None:
        """What `stage` logs next is of the steps after `step`."""
        if file := self.files.pop(stage, None):
            file.close()
        self.done[stage] = step

    def write(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        self._add(stage, step, [dict(tag=f"{stage}/{name}", simple_value=v) for name, v in values.items()])

    def image(self, name: str, image: np.ndarray, step: int) -> None:
        """u8[h, w, 3]; `name` begins with the stage's."""
        with _without_torch():
            from tensorboardX import summary
        stage = name.partition("/")[0]
        self._add(stage, step, [dict(tag=name, image=summary.image(name, image, dataformats="HWC").value[0].image)])

    def _add(self, stage: str, step: int, values: Sequence[dict[str, Any]]) -> None:
        # tensorboardX imports torch wherever it is installed, only to accept tensors; this side never loads torch. Its
        # SummaryWriter would write in a thread of its own, where a full disk is not noticed.
        with _without_torch():
            from tensorboardX.event_file_writer import EventsWriter
            from tensorboardX.proto.event_pb2 import Event, SessionLog
            from tensorboardX.proto.summary_pb2 import Summary
        with writing(self.board):
            if stage not in self.files:
                make_directory(self.local / stage)
                # TensorBoard reads files in the order of their names, and the clock may have gone back since the last.
                there = {file.name for board in (self.board, self.local) for file in (board / stage).glob("*")}
                self.files[stage] = EventsWriter(str(self.local / stage / f"events-{len(there):05d}"))
                start = SessionLog(status=SessionLog.START)
                self._event(stage, Event(step=self.done.get(stage, -1) + 1, session_log=start))
            self._event(stage, Event(step=step, summary=Summary(value=[Summary.Value(**v) for v in values])))
            self.files[stage].flush()
        if time.monotonic() - self.sent > SEND_S:
            self.flush()

    def _event(self, stage: str, event: Any) -> None:
        event.wall_time = time.time()
        self.files[stage].write_event(event)

    def flush(self) -> None:
        """The events, where they belong."""
        self.sent = time.monotonic()
        if self.local != self.board and self.files:
            put_files(self.local, self.board)

    def close(self) -> None:
        with writing(self.board):
            for file in self.files.values():
                file.close()
        self.flush()


@contextlib.contextmanager
def _without_torch():
    hidden = "torch" not in sys.modules
    if hidden:
        sys.modules["torch"] = None
    try:
        yield
    finally:
        if hidden:
            del sys.modules["torch"]


class WeightsAndBiases:
    """A run of W&B, whose id is kept in the work directory, so that the next start goes on with it.

    WANDB_MODE=offline keeps it on this disk. Its environment counts as everywhere: WANDB_PROJECT, WANDB_ENTITY,
    WANDB_MODE, WANDB_API_KEY.
    """

    def __init__(self, workdir: pathlib.Path, config: Mapping[str, Any]):
        try:
            wandb = importlib.import_module("wandb")  # an extra: not among the requirements
        except ImportError as error:
            raise DataError(
                f"loggers: wandb cannot be imported ({first_line(error)}): pip install -e '.[wandb]', or leave"
                " it out of loggers"
            ) from error
        project = os.environ.get("WANDB_PROJECT", "rsagent-jax")
        where = tempfile.mkdtemp() if is_remote(workdir) else str(workdir)
        name = pathlib.PurePath(str(workdir)).name
        file = workdir / "wandb_run.txt"
        if not file.exists():
            write_whole(file, secrets.token_hex(4))
        run = dict(id=read_bytes(file).decode().strip(), resume="allow", project=project, name=name)
        self.run = wandb.init(**run, dir=where, config=dict(config))
        for stage in ("sft", "grpo"):  # W&B's own step only counts up, which a run that is gone on with does not
            self.run.define_metric(f"{stage}/step")
            self.run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")

    def write(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        self.run.log({f"{stage}/{name}": value for name, value in values.items()} | {f"{stage}/step": step})

    def close(self) -> None:
        self.run.finish()


# (figure of a step, how the terminal shows it)
COLUMNS = (
    ("reward", "reward {:.3f}"),
    ("giou", "gIoU {:.3f}"),
    ("val/giou", "val gIoU {:.3f}"),
    ("turns", "turns {:.2f}"),
    ("loss", "loss {:.4f}"),
    ("seconds", "{:.1f} s"),
)


class Console:
    """A line a step, above tqdm's bar where there is one; the same without a terminal."""

    def __init__(self, workdir: pathlib.Path, config: Mapping[str, Any]):
        del workdir, config

    def write(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        shown = [form.format(values[name]) for name, form in COLUMNS if name in values]
        shown += ["no update"] * bool(values.get("no_update"))
        tqdm.write(f"{stage} step {step}: {'  '.join(shown)}")
        sys.stdout.flush()

    def close(self) -> None:
        pass


LOGGERS = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases, "console": Console}


def open_loggers(
    names: Sequence[str], workdir: pathlib.Path, config: Mapping[str, Any], *, lead: bool = True
) -> list[Logger]:
    """The loggers of these names, or paths file.py:Class. Of several processes the lead has all of them, the others
    TensorBoard alone, which has a directory of its own in `workdir`.

    DataError for a name that is neither, and for one of the user's that does not open.
    """
    made = []
    for name in names:
        factory = LOGGERS.get(name)
        if factory is None and ":" not in name:
            near = closest(name, LOGGERS, "{}")
            raise DataError(f"loggers: {name!r} is none of {', '.join(LOGGERS)}, nor file.py:Class{near}")
        factory = factory or import_path(name, ("workdir", "config"))
        if lead or factory is TensorBoard:
            made.append(factory(workdir, config))
    return made
