"""zoom(box): a part of the current view, enlarged."""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

from rsagent_jax.agent.tools.base import BOX, Proposal, Tool, go_to
from rsagent_jax.agent.views import View
from rsagent_jax.types import MaskRecord


@dataclasses.dataclass(frozen=True)
class Zoom(Tool):
    box: tuple[float, float, float, float]

    name = "zoom"
    description = "Crop the current view to a box and enlarge it."
    properties: ClassVar = {"box": BOX}
    required = ("box",)
    changes_view = True

    def propose(self, view: View, masks: Sequence[MaskRecord]) -> Proposal:
        return go_to(self, view.zoom(self.box), view.clip_box(self.box)[1])
