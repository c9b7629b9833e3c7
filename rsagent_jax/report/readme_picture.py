"""One trajectory as a strip of pictures: the question, each call with the overlay that came back, the ending.

python -m rsagent_jax.report.readme_picture --evaluation=runs/quickstart/eval-grpo --id=SAMPLE --out=docs/trajectory.png
"""

from __future__ import annotations

from rsagent_jax.runtime import command

if __name__ == "__main__":
    command.start_command()

import pathlib
import re
import textwrap

from PIL import Image, ImageDraw

from rsagent_jax.agent.environment import opening_observation, reset
from rsagent_jax.agent.replay import replay
from rsagent_jax.agent.tools import call_json
from rsagent_jax.report.evaluation import load_evaluation
from rsagent_jax.types import DataError, Turn

SIDE, TEXT, LINE = 280, 92, 14  # pixels: a picture, the text below it, a line of text


def draw_readme_picture(state) -> Image.Image:
    """`state` is the final EnvState of a trajectory."""
    start = reset(state.image, state.query, state.config, state.limits)
    frames = [(opening_observation(start).image, f'"{state.query}"')]
    frames += [(turn.observation.image if turn.observation else None, _caption(turn)) for turn in state.turns]
    canvas = Image.new("RGB", (len(frames) * (SIDE + 8) - 8, SIDE + TEXT), "white")
    draw = ImageDraw.Draw(canvas)
    for i, (picture, caption) in enumerate(frames):
        x = i * (SIDE + 8)
        if picture is not None:
            canvas.paste(Image.fromarray(picture).resize((SIDE, SIDE), Image.Resampling.LANCZOS), (x, 0))
        else:
            draw.rectangle((x, 0, x + SIDE, SIDE), fill="#eeeeee")
            draw.text((x + SIDE // 2, SIDE // 2), str(state.status), fill="black", anchor="mm", font_size=18)
        lines = [piece for line in caption.splitlines() for piece in textwrap.wrap(line, 44)]
        for n, line in enumerate(lines):
            draw.text((x, SIDE + 6 + n * LINE), line, fill="black", font_size=12)
    return canvas


def _caption(turn: Turn) -> str:
    thought = re.search(r"<think>(.*?)</think>", turn.text, re.DOTALL)
    return f"{thought.group(1) if thought else ''}\n{call_json(turn.call) if turn.call else 'malformed'}"


def main(
    *,
    evaluation: str,  # work directory of evaluate.py
    id: str,  # of a sample, as in predictions.jsonl
    out: pathlib.Path,  # a PNG file
) -> None:
    examples = {example.id: example for example in load_evaluation(evaluation).examples}
    if id not in examples:
        raise DataError(f"{evaluation} has no trajectory of {id!r}")
    draw_readme_picture(replay(examples[id].record)).save(out)
