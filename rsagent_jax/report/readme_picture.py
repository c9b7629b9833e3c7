"""One trajectory as a strip of pictures: the question, each call with the overlay that came back, the ending.

python -m rsagent_jax.report.readme_picture --evaluation=runs/quickstart/eval-grpo --id=SAMPLE --out=docs/trajectory.png
"""

from rsagent_jax.runtime import command

if __name__ == "__main__":
    command.start_command()

import pathlib
import textwrap

import numpy as np

from rsagent_jax.agent.environment import opening_observation, reset
from rsagent_jax.agent.replay import replay
from rsagent_jax.agent.tools import call_json
from rsagent_jax.report.evaluation import load_evaluation
from rsagent_jax.report.page import thought_of
from rsagent_jax.types import DataError


def main(
    *,
    evaluation: str,  # work directory of evaluate.py
    id: str,  # of a sample, as in predictions.jsonl
    out: pathlib.Path,  # a PNG file
) -> None:
    from matplotlib.figure import Figure

    examples = {example.id: example for example in load_evaluation(evaluation).examples}
    if id not in examples:
        raise DataError(f"{evaluation} has no trajectory of {id!r}")
    state = replay(examples[id].record)
    start = reset(state.image, state.query, state.config, state.limits)
    frames = [(opening_observation(start).image, f'"{state.query}"')]
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
    figure.savefig(out, bbox_inches="tight")
