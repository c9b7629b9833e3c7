"""Variants of one recipe, trained and evaluated and held against the first, by one command.

  python -m rsagent_jax.ablate --config=configs/ablations/reward.py --workdir=DIR [--config.seed=1 …]
  python -m rsagent_jax.ablate … --only=train-no-process,eval-no-process      these stages, done or not
  python -m rsagent_jax.ablate … --only=report                                none; the table of what is there

Every stage is a command of this project, run, skipped when done and resumed as rsagent_jax.reproduce does it. A variant
that fails is named and leaves its row empty; the others are run all the same, and the exit status is that of the first
that failed. Leaves table.md, summary.json and report/index.html.
"""

from rsagent_jax.runtime import command

if __name__ == "__main__":
    command.start_command()

import functools

from rsagent_jax.config.ablation import AblationConfig, recipe_of
from rsagent_jax.report.ablation import write_ablation
from rsagent_jax.reproduce import run_recipe


def main(
    config: AblationConfig,
    *,
    workdir: str = "",  # directory for everything this command leaves behind
    only: str = "",  # names of stages, with commas: these are run, done or not; report = none of them
) -> int:
    return run_recipe(recipe_of(config), workdir, only, functools.partial(write_ablation, config))
