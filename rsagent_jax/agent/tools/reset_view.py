"""reset_view(): the whole image again."""

import dataclasses
from typing import ClassVar

from rsagent_jax.agent.tools.base import Proposal, Tool, go_to


@dataclasses.dataclass(frozen=True)
class ResetView(Tool):
    name = "reset_view"
    description = "Go back to the view of the whole image."
    properties: ClassVar = {}
    changes_view = resets_view = True

    def propose(self, view, masks) -> Proposal:
        return go_to(self, view.reset())
