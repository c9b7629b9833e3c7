"""How trajectories come to their mask: does a wrong first one get corrected, and does an act do what its thought says.

    first_iou   mean IoU of the first mask, over the trajectories that made one
    recovery    of those whose first mask is below 0.5, the share that ends at 0.8 or more
    harm        the reverse: of those whose first mask is 0.8 or more, the share that ends below 0.5
    calls       segment calls of a trajectory, mean
    agreement   of the turns whose thought names an act ("I box it", "I finish"), the share that does one of those named

All are None where there is nothing to count, and what the segmenter or the endpoint failed is not counted. IoU is the
metric's, but for its `empty_policy`: a mask where nothing is to be found has 0, none has 1, and committing to none
after one is a recovery.
"""

import dataclasses
import json
import re
from collections.abc import Sequence
from typing import Any

from rsagent_jax.agent.tools import Segment, parse
from rsagent_jax.config.schema import MetricConfig
from rsagent_jax.evals.metrics import judge, mask_ious
from rsagent_jax.evals.records import Record
from rsagent_jax.types import ParseError, ToolCall

WRONG, RIGHT = 0.5, 0.8  # IoU below which a mask is wrong, and from which it is right

# What a thought says for an act: a verb of the one who acts, since pictures hold boxes and points of their own.
ACTS = {
    "box": r"\bI(?:'ll| will)? box\b|\b(?:draw|put|place|use|set|give|with)\b[^.;]{0,20}\bbox\b",
    "click": r"\bclick(?:ing)?\b|\b(?:add|put|place|use|set|give)\b[^.;]{0,20}\bpoints?\b|\bI mark\b",
    "zoom": r"\bzoom(?:ing)?\b|\b(?:look|see)\b[^.;]{0,12}\bcloser\b",
    "rotate": r"\brotat(?:e|ing)\b",
    "reset_view": r"\bI go back\b|\b(?:need|see|back to)\b[^.;]{0,6}\bwhole image\b|\breset\b",
    "finish": r"\bI(?:'ll| will)? (?:finish|commit|submit)\b|\b(?:let me|to) (?:finish|commit)\b|\bdone\b",
}
_PATTERNS = {act: re.compile(words, re.IGNORECASE) for act, words in ACTS.items()}


@dataclasses.dataclass(frozen=True)
class Behaviour:
    """Of one trajectory."""

    ious: tuple[float, ...]  # of every mask, in the order in which they were made
    iou: float  # of the final mask
    calls: int  # of segment, refused ones included
    spoken: int  # turns whose thought names an act
    agreeing: int  # those that do it


def behaviour(texts: Sequence[str], ious: Sequence[float], iou: float, query: str = "") -> Behaviour:
    """texts: the assistant's turns as `Turn.text` has them; ious: of every mask in order; iou: of the final one; query:
    whose words name no act."""
    calls = [parse(text) for text in texts]
    said = [named_acts(text, query) for text in texts]
    spoken = [(acts, call) for acts, call in zip(said, calls, strict=True) if acts]
    agreeing = sum(bool(acts & acts_of(call)) for acts, call in spoken)
    return Behaviour(tuple(ious), iou, sum(isinstance(call, Segment) for call in calls), len(spoken), agreeing)


def recorded_behaviour(record: Record, rules: MetricConfig) -> Behaviour:
    """Of an evaluated sample that did not fail, its masks judged by `rules`."""
    rules = dataclasses.replace(rules, empty_policy="one")
    texts = [turn["text"] for turn in json.loads(record.example["record"])["turns"]]
    ious, iou = mask_ious(record.counts, record.masks, rules), judge(record.counts, rules).iou
    return behaviour(texts, ious, iou, record.example["query"])


def named_acts(text: str, query: str = "") -> set[str]:
    """The acts that a turn's thought names, by patterns of English: other languages and other words count for none."""
    thought = text.partition("<think>")[2].partition("</think>")[0]
    thought = re.sub(re.escape(query), " ", thought, flags=re.IGNORECASE) if query else thought
    return {act for act, pattern in _PATTERNS.items() if pattern.search(thought)}


def acts_of(call: ToolCall | ParseError) -> set[str]:
    """What a call does, in the words of ACTS; nothing where it is malformed."""
    if isinstance(call, ParseError):
        return set()
    if isinstance(call, Segment):
        return {act for act, given in (("box", call.box is not None), ("click", call.points)) if given}
    return {call.name}


def summarize_behaviours(found: Sequence[Behaviour]) -> dict[str, Any]:
    """The figures above, and how many trajectories or turns each is a share of. JSON-ready."""
    made = [b for b in found if b.ious]
    wrong, right = [b for b in made if b.ious[0] < WRONG], [b for b in made if b.ious[0] >= RIGHT]
    spoken = sum(b.spoken for b in found)
    return {
        "first_iou": _share(sum(b.ious[0] for b in made), len(made)),
        "first_masks": len(made),
        "recovery": _share(sum(b.iou >= RIGHT for b in wrong), len(wrong)),
        "first_wrong": len(wrong),
        "harm": _share(sum(b.iou < WRONG for b in right), len(right)),
        "first_right": len(right),
        "calls": _share(sum(b.calls for b in found), len(found)),
        "agreement": _share(sum(b.agreeing for b in found), spoken),
        "acts_named": spoken,
    }


def _share(part: float, whole: int) -> float | None:
    return part / whole if whole else None
