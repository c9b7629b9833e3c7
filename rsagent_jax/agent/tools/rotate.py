"""rotate(quarter_turns): the current view, turned."""

import dataclasses
from typing import ClassVar

from rsagent_jax.agent.tools.base import Proposal, Tool, go_to


@dataclasses.dataclass(frozen=True)
class Rotate(Tool):
    quarter_turns: int  # counter-clockwise, 1..3

    name = "rotate"
    description = "Turn the current view counter-clockwise by quarter turns."
    properties: ClassVar = {"quarter_turns": {"type": "integer", "enum": [1, 2, 3]}}
    required = ("quarter_turns",)
    changes_view = True

    def propose(self, view, masks) -> Proposal:
        return go_to(self, view.rotate(self.quarter_turns))
