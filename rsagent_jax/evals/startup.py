"""What evaluate.py needs, looked at before weights are loaded; the cheapest first."""

from __future__ import annotations

import pathlib

from rsagent_jax.config.schema import EvalConfig
from rsagent_jax.evals import bounds
from rsagent_jax.models.qwen25_vl.load import policy_directory
from rsagent_jax.rollout.startup import check_disk, check_policy, check_segmenter
from rsagent_jax.types import DataError


def check_evaluate(config: EvalConfig, workdir: pathlib.Path) -> None:
    """`config.policy.weights` are those that will be played, --weights included. Data is evaluate.py's to open."""
    check_disk(workdir)
    weights = config.policy.weights
    if config.bound.row == bounds.UNTRAINED and policy_directory(weights) != pathlib.Path(weights):
        raise DataError(f"bound.row is {bounds.UNTRAINED}, but {weights} is a checkpoint of train.py; give the weights")
    if config.bound.row not in bounds.ORACLES:
        print(check_policy(weights, config.agent, config.sampling))
    check_segmenter(config.segmenter)
