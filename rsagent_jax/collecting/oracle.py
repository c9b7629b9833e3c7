"""An oracle that sees the true mask and acts with the real tools: trajectories for SFT without a large model.

It stands in for the paper's Qwen2.5-VL-72B and is a substitute, not the same thing. Its clicks follow the usual
simulator of interactive segmentation: the middle of the largest wrong region, positive where the mask misses the object
and negative where it covers too much. Of missing parts it takes those of some size from left to right, as long as the
largest is larger than what is covered too much. Its thoughts are short templates.
"""

import numpy as np

from rsagent_jax.agent.clicks import first_part, largest_part, middle, prompt_of
from rsagent_jax.agent.environment import EnvState
from rsagent_jax.agent.prompts import sanitize
from rsagent_jax.agent.tools import Finish, ResetView, Segment, render_call
from rsagent_jax.agent.views import View
from rsagent_jax.config.schema import TeacherConfig
from rsagent_jax.masks import iou
from rsagent_jax.types import MaskRecord

# A mask with less of it in the target was a wrong guess: a new prompt is shorter than a repair.
RESTART_INSIDE = 0.5
RESTART_IOU = 0.5  # as well, where there are no logits to add to
PATIENCE = 2  # masks without a better IoU before it gives up and commits the best one
MAX_NAME_CHARS = 60  # longer queries are called "the target" in thoughts

# Whether it is there is said right after its name, then where, as in grounding: a small policy looks for what it has
# just named. What is done comes last, right before the call that does it.
_HERE = "{Name} is here"
_ABSENT = "{Name} is not here"
_AGAIN = "That is not {name}"
_MISSING = "A part of {name} is missing"
_EXTRA = "The mask is more than {name}"
_DONE = "The mask fits {name}"
_BEST = "This is the best mask of {name}"
_LOST = "I need the whole image"


class Oracle:
    """One per trajectory: what it does depends on its generator, the state and the true mask only."""

    def __init__(self, config: TeacherConfig, rng: np.random.Generator):
        self.config, self.rng = config, rng
        hasty = config.hasty > 0 and rng.random() < config.hasty
        self.good = config.enough if hasty else config.good

    def act(self, state: EnvState, gt_mask: np.ndarray) -> str:
        """The next assistant turn; `gt_mask` is bool[h, w] in original pixels."""
        if not gt_mask.any():
            return self._say(_ABSENT, state, Finish(None))
        ious = [iou(record.mask, gt_mask) for record in state.masks]
        best = int(np.argmax(ious)) if ious else -1
        if ious and ious[best] >= self.good:
            return self._say(_DONE, state, Finish(state.masks[best].id))
        if ious and (state.last or len(ious) - 1 - best >= PATIENCE):
            return self._say(_BEST, state, Finish(state.masks[best].id))
        if state.view != View.whole(*gt_mask.shape, state.limits):
            return self._say(_LOST, state, ResetView())
        if not ious:
            wrong = not state.turns and self.rng.random() < self.config.wrong_first
            use_box = self.rng.random() < self.config.box
            target = self._elsewhere(state.image, gt_mask, use_box) if wrong else gt_mask
            return self._say(_HERE, state, _prompt(state.view, target, use_box))
        latest = state.masks[-1]
        if (latest.mask & gt_mask).sum() <= RESTART_INSIDE * latest.mask.sum() or not (
            latest.logits_id or ious[-1] >= RESTART_IOU
        ):
            # A box has no doubt about size, so it is the second try whatever the first one was; then a click.
            use_box = self.config.box > 0 and len(ious) % 2 == 1
            call = _prompt(state.view, gt_mask, use_box)
            if call == state.turns[-1].call:
                call = _prompt(state.view, gt_mask, not use_box)
            return self._say(_AGAIN, state, call)
        return self._repair(state, gt_mask, latest)

    def _repair(self, state: EnvState, gt_mask: np.ndarray, latest: MaskRecord) -> str:
        missing, extra = gt_mask & ~latest.mask, largest_part(latest.mask & ~gt_mask)
        positive = largest_part(missing).sum() >= extra.sum()
        point, label = middle(state.view, first_part(missing) if positive else extra), 1 if positive else 0
        last = state.turns[-1].call
        if latest.logits_id:
            call = Segment(points=(point,), labels=(label,), refine=latest.id)
        elif isinstance(last, Segment):  # no logits to start from: say the last prompt again, with one click more
            call = Segment(last.box, (*last.points, point), (*last.labels, label))
        else:
            call = prompt_of(state.view, gt_mask, use_box=True)
        return self._say(_MISSING if positive else _EXTRA, state, call)

    def _elsewhere(self, image: np.ndarray, gt_mask: np.ndarray, use_box: bool) -> np.ndarray:
        """bool[h, w], the region of a plausible mistake: the box moved aside, or a conspicuous spot of background."""
        wrong = np.zeros_like(gt_mask)
        if use_box:
            (h, w), (ys, xs) = gt_mask.shape, np.nonzero(gt_mask)
            box_h, box_w = int(np.ptp(ys)) + 1, int(np.ptp(xs)) + 1
            angle = self.rng.uniform(0, 2 * np.pi)
            y1 = int(np.clip(ys.min() + np.sin(angle) * box_h, 0, h - box_h))
            x1 = int(np.clip(xs.min() + np.cos(angle) * box_w, 0, w - box_w))
            wrong[y1 : y1 + box_h, x1 : x1 + box_w] = True
            return wrong
        background = np.argwhere(~gt_mask)
        if not len(background):
            return gt_mask
        # of some random spots the one whose colour is farthest from the usual: most often another object
        spots = background[self.rng.integers(len(background), size=16)]
        usual = np.median(image.reshape(-1, 3), axis=0)
        wrong[tuple(spots[int(np.argmax(np.abs(image[spots[:, 0], spots[:, 1]] - usual).sum(1)))])] = True
        return wrong

    def _say(self, thought: str, state: EnvState, call) -> str:
        name = _name(state.query)
        said = thought.format(name=name, Name=name[0].upper() + name[1:])
        return render_call(call, f"{said}; {_act(call)}.")


def _prompt(view: View, target: np.ndarray, use_box: bool) -> Segment:
    """A box around the target, or a click on the first of its parts."""
    return prompt_of(view, target if use_box else first_part(target), use_box)


def _act(call) -> str:
    """What a thought says that it will do, and where."""
    if isinstance(call, ResetView):
        return "I go back"
    if isinstance(call, Finish):
        return "I finish"
    if call.box is None:
        return f"{[round(v) for v in call.points[-1]]}; I click"
    return f"{[round(v) for v in call.box]}; I draw a box" + (" and click" if call.points else "")


def _name(query: str) -> str:
    """The query as a noun in a sentence."""
    name = sanitize(query).rstrip(".!?,;: ")
    if not name or len(name) > MAX_NAME_CHARS or sanitize(query).endswith("?"):
        return "the target"
    return name if name.lower().startswith(("the ", "a ", "an ", "every ")) else f"the {name}"
