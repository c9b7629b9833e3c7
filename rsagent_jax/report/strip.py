"""One trajectory as a strip of pictures: the question, each call with the overlay that came back, the ending."""

import textwrap
from typing import TYPE_CHECKING

import numpy as np

from rsagent_jax.agent.environment import EnvState, opening_observation
from rsagent_jax.agent.tools import call_json
from rsagent_jax.report.page import thought_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_strip(state: EnvState) -> "Figure":
    """A figure with a picture per turn behind that of the question; the turn's thought and call stand below it."""
    from matplotlib.figure import Figure

    frames = [(opening_observation(state).image, f'"{state.query}"')]
    for turn in state.turns:
        caption = f"{thought_of(turn.text)}\n{call_json(turn.call) if turn.call else 'malformed'}"
        frames.append((turn.observation.image if turn.observation else None, caption))
    figure = Figure((2.9 * len(frames), 3.8), layout="constrained")
    for axes, (image, caption) in zip(figure.subplots(1, len(frames), squeeze=False)[0], frames, strict=True):
        axes.imshow(np.full((1, 1, 3), 238, np.uint8) if image is None else image)
        if image is None:
            axes.text(0.5, 0.5, str(state.status), ha="center", va="center", size=14, transform=axes.transAxes)
        lines = [piece for line in caption.splitlines() for piece in textwrap.wrap(line, 44)]
        axes.set_xlabel("\n".join(lines), loc="left", size=8, parse_math=False)
        axes.set(xticks=[], yticks=[])
    return figure
