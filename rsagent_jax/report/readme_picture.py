"""The picture of a trajectory in the README, from an evaluation.

python -m rsagent_jax.report.readme_picture --evaluation=runs/quickstart/eval-grpo --id=SAMPLE --out=docs/trajectory.png
"""

from rsagent_jax.runtime import command

if __name__ == "__main__":
    command.start_command()

import pathlib

from rsagent_jax.agent.replay import replay
from rsagent_jax.report.evaluation import load_evaluation
from rsagent_jax.report.strip import draw_strip
from rsagent_jax.types import DataError


def main(
    *,
    evaluation: str,  # work directory of evaluate.py
    id: str,  # of a sample, as in predictions.jsonl
    out: pathlib.Path,  # a PNG file
) -> None:
    examples = {example.id: example for example in load_evaluation(evaluation).examples}
    if id not in examples:
        raise DataError(f"{evaluation} has no trajectory of {id!r}")
    draw_strip(replay(examples[id].record)).savefig(out, bbox_inches="tight")
