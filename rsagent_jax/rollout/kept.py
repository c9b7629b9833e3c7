"""Trajectories as far as they have come, as records: what a rollout that was stopped goes on from.

A record (data/npz.py) holds every token with its log-prob and the version of the weights that drew it, those of the
turn under way as well, and what the tools have answered (agent/replay.py). What the policy was shown is made again. A
tool that was running, or that failed, as it does when it is stopped along with the trainer, is asked again.
"""

import functools
import json
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

from rsagent_jax.agent.environment import EnvState
from rsagent_jax.agent.replay import replay, state_to_json
from rsagent_jax.data.npz import pack_record, read_arrays
from rsagent_jax.rollout.driver import NO_TOKENS, Driver, Run
from rsagent_jax.rollout.policy import Task
from rsagent_jax.runtime.image_files import checksum
from rsagent_jax.types import Completion, Status, Trajectory
from sam_bridge.types import Segmenter, SegmenterError, SegmentRequest

T = TypeVar("T")
NAMES = ("tokens", "positions", "sampled", "logprobs", "versions")


def ended_run(task: Task, trajectory: Trajectory, state: EnvState) -> Run:
    """A trajectory that has ended, as what the driver made it of."""
    t = trajectory
    parts = [(t.tokens, t.positions, t.loss_mask, t.logprobs, t.versions)]
    return Run(task, state=state, parts=parts, policy_seconds=t.seconds["policy"])


def pack_run(run: Run) -> bytes | None:
    """The record; None where there is nothing that would not come out the same when it is begun anew."""
    arrays = {name: np.concatenate(part, -1) for name, part in zip(NAMES, zip(*run.parts, strict=True), strict=True)}
    if run.state is None or not (len(arrays["tokens"]) or run.begun):
        return None
    if run.begun:
        begun = {"tokens": run.begun.tokens, "logprobs": run.begun.logprobs, "versions": run.versions}
        arrays |= {f"begun_{name}": array for name, array in begun.items()}
    about = {"uid": run.task.uid, "id": run.task.sample.id, "picture": checksum(run.state.image)}
    about |= {"turns": int(np.diff(arrays["sampled"], prepend=0).clip(0).sum()) if len(arrays["tokens"]) else 0}
    return pack_record(about | {"replay": _open_again(run.state), "seconds": run.policy_seconds}, arrays)


def record_about(record: bytes) -> dict:
    """Its uid, how many turns were drawn (`turns`) and how it ended (`status`, None: not yet). ValueError, KeyError or
    TypeError for a damaged one."""
    about = json.loads(read_arrays(record)["header"].tobytes())
    return {name: about[name] for name in ("uid", "turns")} | {"status": json.loads(about["replay"])["status"]}


def take_up(records: dict[int, bytes], tasks: Sequence[Task], driver: Driver) -> list[Run]:
    """Of these tasks' records, by uid, which are taken out."""
    found = [(task, records.pop(task.uid)) for task in tasks if task.uid in records]
    return [run for task, record in found if (run := unpack_run(record, task, driver))]


def unpack_run(record: bytes, task: Task, driver: Driver) -> Run | None:
    """For the driver's `play`; None where the task's sample is another by now."""
    arrays = read_arrays(record)
    about = json.loads(arrays["header"].tobytes())
    if (about["id"], about["picture"]) != (task.sample.id, checksum(task.sample.image)):
        return None
    asked: list[SegmentRequest] = []
    state = replay(about["replay"], task.sample.image, asked.append)
    cuts = np.flatnonzero(np.diff(arrays["sampled"])) + 1
    split = [np.split(arrays[name], cuts, axis=-1) for name in NAMES]
    run = Run(task, state=state, policy_seconds=about["seconds"])
    run.parts = [(*NO_TOKENS, np.zeros(0, np.int32)), *(part for part in zip(*split, strict=True) if len(part[0]))]
    if "begun_tokens" in arrays:
        run.begun = Completion(arrays["begun_tokens"], arrays["begun_logprobs"], False)
        run.versions = arrays["begun_versions"]
    run = driver.take_up(run)
    if run.acts:
        run.acts = functools.partial(_ask_again, driver.segmenter, task.sample.image, asked, run.acts)
    return run


def _ask_again(segmenter: Segmenter, image: np.ndarray, asked: Sequence[SegmentRequest], act: Callable[[], T]) -> T:
    """On a host thread, for a segmenter that was started anew: an id names how a mask is made, so a mask that a later
    turn refines is there again."""
    for request in asked:
        try:
            segmenter.segment(image, request)
        except Exception as error:  # noqa: BLE001 - the turn that needs it is told
            if not (isinstance(error, SegmenterError) and error.kind.callers_fault):
                break
    return act()


def _open_again(state: EnvState) -> str:
    """Its replay; without the turn that a failing tool has ended, which is drawn and not answered."""
    record = json.loads(state_to_json(state))
    if state.status is Status.ENV_FAILED:
        record["status"] = None
        if len(state.turns) and "failure" in (record["turns"][-1]["reply"] or {}):
            record["last"] = record["turns"].pop().get("last", False)
    return json.dumps(record)
