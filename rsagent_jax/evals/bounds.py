"""Rows that bound the truth, in place of a policy's: what the segmenter gives when the true mask chooses the prompts.

    box             the true box, the segmenter's one mask
    best_of_three   of the segmenter's three masks for the true box (or click) the one with the best IoU
    clicks          1 to `bound.clicks` clicks in the middle of the largest error, then the best mask so far
    untrained       the policy itself with weights that never saw the tools: no oracle, evaluate.py plays it as ever

The first three look at the truth. They act through the same environment and the same bridge on the same samples as a
policy does, in pixels of the original picture, and need neither weights nor an accelerator.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import itertools
from collections.abc import Iterable, Iterator

import numpy as np

from rsagent_jax.agent import environment
from rsagent_jax.agent.clicks import largest_part, middle, prompt_of
from rsagent_jax.agent.environment import EnvState
from rsagent_jax.agent.tools import render_call
from rsagent_jax.agent.views import PixelLimits
from rsagent_jax.config.schema import BoundConfig, EvalConfig
from rsagent_jax.masks import mask_iou
from rsagent_jax.rollout.policy import Task
from rsagent_jax.types import Finish, Sample, Segment, Trajectory
from sam_bridge.types import Segmenter, SegmentReply, SegmentRequest

ORACLES = ("box", "best_of_three", "clicks")
UNTRAINED = "untrained"
PROMPTS = ("box", "click")
# The view of the whole picture is the picture: an oracle is not to lose pixels to a resized view.
EXACT = PixelLimits(factor=1, min_pixels=1, max_pixels=1 << 40)


def title(bound: BoundConfig) -> str:
    """What results.json calls the row."""
    return {
        "": "policy",
        "box": "oracle: true box",
        "best_of_three": f"oracle: best of three masks, true {bound.prompt}",
        "clicks": f"oracle: best of {bound.clicks} clicks",
        UNTRAINED: "bound: untrained policy",
    }[bound.row]


def fill_bound_defaults(config: EvalConfig) -> EvalConfig:
    """With as many turns as the oracle takes, the one that commits included."""
    turns = config.bound.clicks + 1 if config.bound.row == "clicks" else 2
    return dataclasses.replace(config, agent=dataclasses.replace(config.agent, max_turns=turns))


def masks_of(segmenter: Segmenter) -> str:
    """Where best_of_three gets its masks: three of one prompt, or one of each of three prompts where the back end has
    only one for a prompt (grabcut)."""
    ramp = np.linspace(0, 255, 64).astype(np.uint8)
    image = np.stack([np.tile(ramp, (64, 1)), np.tile(ramp[:, None], (1, 64)), np.zeros((64, 64), np.uint8)], axis=-1)
    reply = segmenter.segment(image, SegmentRequest(box=(8.0, 8.0, 40.0, 40.0), candidates=True))
    return "three masks of one prompt" if reply.candidates else "one mask each of box, click and both"


def play(config: EvalConfig, segmenter: Segmenter, tasks: Iterable[Task]) -> Iterator[tuple[int, Trajectory, EnvState]]:
    """(number of the task, trajectory without tokens, final state) as they end, `segmenter.workers` at a time."""
    numbered, under_way = enumerate(tasks), {}
    with concurrent.futures.ThreadPoolExecutor(config.segmenter.workers) as pool:
        try:
            while True:
                for number, task in itertools.islice(numbered, 2 * config.segmenter.workers - len(under_way)):
                    under_way[pool.submit(_play, config, segmenter, task.sample)] = (number, task)
                if not under_way:
                    return
                ended, _ = concurrent.futures.wait(under_way, return_when=concurrent.futures.FIRST_COMPLETED)
                for future in ended:
                    number, task = under_way.pop(future)
                    state = future.result()
                    yield number, _trajectory(state, task), state
        finally:
            for future in under_way:  # nobody takes what is left any more
                future.cancel()


def _play(config: EvalConfig, segmenter: Segmenter, sample: Sample) -> EnvState:
    bound = config.bound
    if bound.row == "best_of_three":
        segmenter = _BestOfThree(segmenter, sample)
    act = _click if bound.row == "clicks" else _once
    state = environment.reset(sample.image, sample.query, config.agent, EXACT)
    while state.status is None:
        proposal = environment.propose(state, act(state, sample, bound))
        state = environment.apply_reply(state, proposal, environment.run_tool(segmenter, state, proposal))
    return state


def _trajectory(state: EnvState, task: Task) -> Trajectory:
    mask, mask_id = environment.final_mask(state)
    nothing = np.zeros(0)
    return Trajectory(
        task.sample.id, task.group_id, state.query, state.turns, state.masks, mask, mask_id, state.status,
        *(nothing,) * 5, (), {"tool": state.tool_seconds},
    )  # fmt: skip


# --- Who acts ---


def _once(state: EnvState, sample: Sample, bound: BoundConfig) -> str:
    """One prompt, then the end."""
    if not sample.gt_mask.any():
        return render_call(Finish(None), "The truth is empty.")
    if state.masks:
        return render_call(Finish(_best(state, sample)), "The oracle has one prompt.")
    use_box = bound.row == "box" or bound.prompt == "box"
    return render_call(prompt_of(state.view, sample.gt_mask, use_box), "The oracle prompts with the truth.")


def _click(state: EnvState, sample: Sample, bound: BoundConfig) -> str:
    """The next click; all earlier ones are said again, as the usual simulators of interactive segmentation do."""
    if not sample.gt_mask.any():
        return render_call(Finish(None), "The truth is empty.")
    judged = np.ones_like(sample.gt_mask) if sample.ignore_mask is None else ~sample.ignore_mask
    latest = state.masks[-1] if state.masks else None
    mask = np.zeros_like(sample.gt_mask) if latest is None else latest.mask
    missing, extra = (largest_part(r & judged) for r in (sample.gt_mask & ~mask, mask & ~sample.gt_mask))
    if len(state.masks) == bound.clicks or not (missing.any() or extra.any()):
        return render_call(Finish(_best(state, sample)), "The oracle takes the best mask.")
    positive = missing.sum() >= extra.sum()
    point = middle(state.view, missing if positive else extra)
    last = state.turns[-1].call if state.masks else Segment()
    refine = latest.id if latest is not None and latest.logits_id else None
    call = Segment(None, (*last.points, point), (*last.labels, int(positive)), refine)
    return render_call(call, "The oracle clicks on the largest error.")


def _best(state: EnvState, sample: Sample) -> int | None:
    """Id of the mask with the best IoU; None where there is none."""
    ious = [mask_iou(record.mask, sample) for record in state.masks]
    return state.masks[int(np.argmax(ious))].id if ious else None


class _BestOfThree:
    """A segmenter that answers with the best of its three masks; see `masks_of`."""

    def __init__(self, segmenter: Segmenter, sample: Sample):
        self.segmenter, self.sample = segmenter, sample

    def segment(self, image: np.ndarray, request: SegmentRequest) -> SegmentReply:
        reply = self.segmenter.segment(image, dataclasses.replace(request, candidates=True))
        masks = list(reply.candidates)
        if not masks:
            view, gt = environment.View.whole(*image.shape[:2], EXACT), self.sample.gt_mask
            box, click = (prompt_of(view, gt, use_box) for use_box in (True, False))
            point = view.to_original(np.array(click.points)).tolist()
            requests = [
                SegmentRequest(b, tuple(map(tuple, p)), (1,) * len(p))
                for b, p in ((box.box, []), (None, point), (box.box, point))
            ]
            masks = [self.segmenter.segment(image, r).mask for r in requests]
        if any(mask.shape != self.sample.gt_mask.shape for mask in masks):
            return reply  # the environment says what is wrong with it
        best = max(masks, key=lambda mask: mask_iou(mask, self.sample))
        return dataclasses.replace(reply, mask=best, logits_id="", candidates=())
