"""zoom(box): a part of the current view, enlarged."""

import dataclasses
from typing import ClassVar

from rsagent_jax.agent.tools.base import BOX, Proposal, Tool, go_to


@dataclasses.dataclass(frozen=True)
class Zoom(Tool):
    box: tuple[float, float, float, float]

    name = "zoom"
    description = "Crop the current view to a box and enlarge it."
    properties: ClassVar = {"box": BOX}
    required = ("box",)
    changes_view = True

    def propose(self, view, masks) -> Proposal:
        return go_to(self, view.zoom(self.box), view.clip_box(self.box)[1])
