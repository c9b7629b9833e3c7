"""One trajectory as a strip of pictures: the question, each call with the overlay that came back, the ending.

python -m rsagent_jax.report.readme_picture --evaluation=runs/quickstart/eval-grpo --id=SAMPLE --out=docs/trajectory.png
"""

from __future__ import annotations

import argparse
import pathlib
import re
import sys
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


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--evaluation", required=True, help="work directory of evaluate.py")
    parser.add_argument("--id", required=True, help="sample id, as in predictions.jsonl")
    parser.add_argument("--out", required=True, type=pathlib.Path, help="a PNG file")
    options = parser.parse_args(arguments)
    try:
        examples = {example.id: example for example in load_evaluation(options.evaluation).examples}
        if options.id not in examples:
            raise DataError(f"{options.evaluation} has no trajectory of {options.id!r}")
        draw_readme_picture(replay(examples[options.id].record)).save(options.out)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
