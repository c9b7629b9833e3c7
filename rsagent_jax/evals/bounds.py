"""Rows that bound the truth, in place of a policy's: what the segmenter gives when the true mask chooses the prompts.

    box             the true box, the segmenter's one mask
    best_of_three   of the segmenter's three masks for the true box (or click) the one with the best IoU
    clicks          1 to `bound.clicks` clicks in the middle of the largest error, then the best mask so far
    untrained       the policy itself with weights that never saw the tools: no oracle, evaluate.py plays it as ever

The first three look at the truth. They act through the same environment and the same bridge on the same samples as a
policy does, in pixels of the original picture, and need neither weights nor an accelerator.
"""

import dataclasses

import numpy as np

from rsagent_jax.agent import environment
from rsagent_jax.agent.clicks import largest_part, middle, prompt_of
from rsagent_jax.agent.environment import EnvState
from rsagent_jax.agent.tools import Finish, Segment, render_call
from rsagent_jax.agent.views import PixelLimits
from rsagent_jax.config.schema import BoundConfig, EvalConfig
from rsagent_jax.masks import mask_iou
from rsagent_jax.rollout.driver import Driver
from rsagent_jax.rollout.policy import ByteProcessor, Task, TextPolicy
from rsagent_jax.types import Sample
from sam_bridge.types import Segmenter, SegmentReply, SegmentRequest

ORACLES = ("box", "best_of_three", "clicks")
UNTRAINED = "untrained"
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
    """With as many turns as the oracle takes, the one that commits included, of any length, and the whole picture as
    its view."""
    turns = config.bound.clicks + 1 if config.bound.row == "clicks" else 2
    agent = dataclasses.replace(config.agent, max_turns=turns, max_tokens=0, min_pixels=0, max_pixels=0)
    return dataclasses.replace(config, agent=agent)


def masks_of(segmenter: Segmenter) -> str:
    """Where best_of_three gets its masks: three of one prompt, or one of each of three prompts where the back end has
    only one for a prompt (grabcut)."""
    ramp = np.linspace(0, 255, 64).astype(np.uint8)
    image = np.stack([np.tile(ramp, (64, 1)), np.tile(ramp[:, None], (1, 64)), np.zeros((64, 64), np.uint8)], axis=-1)
    reply = segmenter.segment(image, SegmentRequest(box=(8.0, 8.0, 40.0, 40.0), candidates=True))
    return "three masks of one prompt" if reply.candidates else "one mask each of box, click and both"


def oracle_driver(config: EvalConfig, segmenter: Segmenter) -> Driver:
    """Plays the row that `config.bound` names."""
    bound, processor, workers = config.bound, ByteProcessor(EXACT), config.segmenter.workers
    write = _click if bound.row == "clicks" else _once
    if bound.row == "best_of_three":
        segmenter = _BestOfThree(segmenter)

    def act(task: Task, state: EnvState) -> str:
        if not task.sample.gt_mask.any():
            return render_call(Finish(None), "The truth is empty.")
        if isinstance(segmenter, _BestOfThree) and not state.masks:  # the turn that ends it asks for none
            segmenter.expected[id(task.sample.image)] = task.sample
        return write(state, task.sample, bound)

    policy = TextPolicy(act, processor, slots=2 * workers, threads=workers)
    return Driver(policy, segmenter, processor, config.agent, workers=workers)


def _once(state: EnvState, sample: Sample, bound: BoundConfig) -> str:
    """One prompt, then the end."""
    if state.masks:
        return render_call(Finish(_best(state, sample)), "The oracle has one prompt.")
    call = prompt_of(state.view, sample.gt_mask, use_box="box" in (bound.row, bound.prompt))
    return render_call(call, "The oracle prompts with the truth.")


def _click(state: EnvState, sample: Sample, bound: BoundConfig) -> str:
    """The next click; all earlier ones are said again, as the usual simulators of interactive segmentation do."""
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

    def __init__(self, segmenter: Segmenter):
        self.segmenter = segmenter
        self.expected: dict[int, Sample] = {}  # by the id() of the picture that is asked about next

    def segment(self, image: np.ndarray, request: SegmentRequest) -> SegmentReply:
        sample = self.expected.pop(id(image))
        reply = self.segmenter.segment(image, dataclasses.replace(request, candidates=True))
        masks = list(reply.candidates)
        if not masks:
            view, gt = environment.View.whole(*image.shape[:2], EXACT), sample.gt_mask
            box, click = (prompt_of(view, gt, use_box) for use_box in (True, False))
            point = view.to_original(np.array(click.points)).tolist()
            for b, p in ((box.box, []), (None, point), (box.box, point)):
                prompt = SegmentRequest(b, tuple(map(tuple, p)), (1,) * len(p))
                masks.append(self.segmenter.segment(image, prompt).mask)
        if any(mask.shape != sample.gt_mask.shape for mask in masks):
            return reply  # the environment says what is wrong with it
        best = max(masks, key=lambda mask: mask_iou(mask, sample))
        return dataclasses.replace(reply, mask=best, logits_id="", candidates=())
