"""segment(box?, points?, labels?, refine?): a mask from a box, points or an earlier mask."""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, Self

import numpy as np

from rsagent_jax.agent.tools.base import BOX, MAX_POINTS, Malformed, Proposal, Tool, refuse_call, unknown_mask
from rsagent_jax.agent.views import View
from rsagent_jax.types import MaskRecord, ParseError
from sam_bridge.types import SegmentRequest


@dataclasses.dataclass(frozen=True)
class Segment(Tool):
    """At least a box, a point or a mask to refine."""

    box: tuple[float, float, float, float] | None = None
    points: tuple[tuple[float, float], ...] = ()
    labels: tuple[int, ...] = ()  # 1 object, 0 background; as many as points
    refine: int | None = None  # id of an earlier mask of this trajectory

    name = "segment"
    description = (
        "Make a mask from a box, points, or both; or correct an earlier mask. Returns its overlay, score and area."
    )
    properties: ClassVar = {
        "box": BOX,
        "points": {
            "type": "array",
            "items": {"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 2},
            "maxItems": MAX_POINTS,
            "description": "[[x, y], ...] in pixels of the current view",
        },
        "labels": {
            "type": "array",
            "items": {"type": "integer", "enum": [0, 1]},
            "description": "one per point: 1 object, 0 background; default all 1",
        },
        "refine": {"type": "integer", "description": "id of the mask to start from"},
    }

    @classmethod
    def read(cls, arguments: dict[str, Any]) -> Self:
        call = super().read(arguments)
        if arguments.get("labels") is None:
            call = dataclasses.replace(call, labels=(1,) * len(call.points))
        if len(call.labels) != len(call.points):
            raise Malformed("bad_value", "one label per point.")
        if call.box is None and not call.points and call.refine is None:
            raise Malformed("missing_argument", "segment needs a box, points or refine.")
        return call

    def propose(self, view: View, masks: Sequence[MaskRecord]) -> Proposal:
        box, points, clipped, logits_id = None, (), 0, ""
        if self.box is not None:
            (x1, y1, x2, y2), clipped = view.clip_box(self.box)
            if x1 >= x2 or y1 >= y2:
                return refuse_call(self, ParseError("empty_box", "the box has no area inside the view."), clipped)
            box = view.box_to_original((x1, y1, x2, y2))
        if self.points:
            points_view, outside = view.clip_points(np.array(self.points))
            clipped += outside
            # an enlarged view has places outside the centres of the outermost original pixels, by less than half a one
            points = np.clip(view.to_original(points_view), 0, np.array(view.size_original) - 1.0)
            points = tuple((x, y) for x, y in points.tolist())
        if self.refine is not None:
            error = unknown_mask(self.refine, masks)
            if error is None and not (logits_id := masks[self.refine - 1].logits_id):
                error = ParseError("no_logits", "this mask cannot be refined; give a new box or points.")
            if error is not None:
                return refuse_call(self, error, clipped)
        # Rounded, so that one place said in two views compares equal whatever the last bits of the affine are.
        action = ("segment", box and _round(box), tuple(map(_round, points)), self.labels, self.refine)
        request = SegmentRequest(box, points, self.labels, logits_id)
        return Proposal(self, request=request, clipped=clipped, action=action)


def _round(values: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(round(v, 2) for v in values)
