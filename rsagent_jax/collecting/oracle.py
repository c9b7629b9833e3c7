"""An oracle that sees the true mask and acts with the real tools: trajectories for SFT without a large model.

It stands in for the paper's Qwen2.5-VL-72B and is a substitute, not the same thing. Its clicks follow the usual
simulator of interactive segmentation: the middle of the largest wrong region, positive where the mask misses the object
and negative where it covers too much. Its thoughts are short templates.
"""

import numpy as np

from rsagent_jax.agent.clicks import largest_part, middle, prompt_of
from rsagent_jax.agent.environment import EnvState
from rsagent_jax.agent.prompts import sanitize
from rsagent_jax.agent.tools import Finish, ResetView, Segment, render_call
from rsagent_jax.agent.views import View
from rsagent_jax.config.schema import TeacherConfig
from rsagent_jax.masks import iou
from rsagent_jax.types import MaskRecord

GOOD_IOU = 0.9  # (paper) the filter of the trajectories, so better masks are not worth a turn
RESTART_IOU = 0.5  # below this the guess was wrong: a new prompt is shorter than a repair
PATIENCE = 2  # masks without a better IoU before it gives up and commits the best one
MAX_NAME_CHARS = 60  # longer queries are called "the target" in thoughts

# Whether it is there is said right after its name: a small policy decides where it has just looked for these words.
_CLICK = ("{Name} is here; I click on it.", "{Name} is here; I click on its middle.")
_BOX = ("{Name} is here; I draw a box.", "{Name} is here; I box it.")
_ABSENT = ("{Name} is not here.", "{Name} is not here; I finish.")
# A wrong guess is announced as a guess, so that what is learnt from it does not blur the sure first actions.
_GUESS = ("Perhaps this is {name}; I try.", "Maybe {name} is here; I try.")
_AGAIN = ("That is not {name}; I try again.", "The mask is wrong; I look for {name} again.")
_MISSING = ("The mask misses a part; I add a click.", "A part of {name} is missing; I add it.")
_EXTRA = ("The mask covers too much; I mark the background.", "This part is not {name}; I remove it.")
_DONE = ("The mask fits {name}; I finish.", "The mask covers {name}. Done.")
_BEST = ("It does not get better; I take the best mask.", "This is the best mask of {name}; I finish.")


class Oracle:
    """One per trajectory: what it does depends on its generator, the state and the true mask only."""

    def __init__(self, config: TeacherConfig, rng: np.random.Generator):
        self.config, self.rng = config, rng

    def act(self, state: EnvState, gt_mask: np.ndarray) -> str:
        """The next assistant turn; `gt_mask` is bool[h, w] in original pixels."""
        if not gt_mask.any():
            return self._say(_ABSENT, state, Finish(None))
        ious = [iou(record.mask, gt_mask) for record in state.masks]
        best = int(np.argmax(ious)) if ious else -1
        if ious and ious[best] >= GOOD_IOU:
            return self._say(_DONE, state, Finish(state.masks[best].id))
        if ious and (state.last or len(ious) - 1 - best >= PATIENCE):
            return self._say(_BEST, state, Finish(state.masks[best].id))
        if state.view != View.whole(*gt_mask.shape, state.limits):
            return self._say(("I need the whole image.",), state, ResetView())
        if not ious:
            wrong = not state.turns and self.rng.random() < self.config.wrong_first
            use_box = self.rng.random() < self.config.box
            target = self._elsewhere(state.image, gt_mask, use_box) if wrong else gt_mask
            thoughts = _GUESS if wrong else _BOX if use_box else _CLICK
            return self._say(thoughts, state, prompt_of(state.view, target, use_box))
        if ious[-1] < RESTART_IOU:
            # A box has no doubt about size, so it is the second try whatever the first one was; then a click.
            return self._say(_AGAIN, state, prompt_of(state.view, gt_mask, use_box=len(ious) % 2 == 1))
        return self._repair(state, gt_mask, state.masks[-1])

    def _repair(self, state: EnvState, gt_mask: np.ndarray, latest: MaskRecord) -> str:
        missing, extra = largest_part(gt_mask & ~latest.mask), largest_part(latest.mask & ~gt_mask)
        positive = missing.sum() >= extra.sum()
        point, label = middle(state.view, missing if positive else extra), 1 if positive else 0
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

    def _say(self, variants: tuple[str, ...], state: EnvState, call) -> str:
        name = _name(state.query)
        thought = variants[int(self.rng.integers(len(variants)))]
        return render_call(call, thought.format(name=name, Name=name[0].upper() + name[1:]))


def _name(query: str) -> str:
    """The query as a noun in a sentence."""
    name = sanitize(query).rstrip(".!?,;: ")
    if not name or len(name) > MAX_NAME_CHARS or sanitize(query).endswith("?"):
        return "the target"
    return name if name.lower().startswith(("the ", "a ", "an ")) else f"the {name}"
