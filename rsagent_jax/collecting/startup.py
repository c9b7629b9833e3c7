"""What collect and problems need, looked at before any time is spent; the cheapest first."""

from __future__ import annotations

import pathlib

from rsagent_jax.collecting import endpoint
from rsagent_jax.config.import_path import import_path
from rsagent_jax.config.schema import CollectConfig, ProblemsConfig
from rsagent_jax.data.processor import Processor
from rsagent_jax.models.qwen25_vl.load import policy_directory
from rsagent_jax.rollout.driver import pixel_limits
from rsagent_jax.rollout.startup import check_disk, check_policy, check_segmenter


def check_collect(config: CollectConfig, workdir: pathlib.Path) -> None:
    """The same of collect, with its teacher."""
    own = config.teacher.own
    if own.weights:
        print(check_policy(own.weights, config.agent, own.sampling, "teacher.own"))
    else:
        if import_path(config.teacher.function, ("config", "rng")) is endpoint.Remote:
            endpoint.check_endpoint(config.teacher.remote)
        pixel_limits(config.agent, Processor.load(policy_directory(config.processor)))
    check_disk(workdir)
    check_segmenter(config.segmenter)


def check_problems(config: ProblemsConfig, workdir: pathlib.Path) -> None:
    endpoint.check_endpoint(config.writer, "writer")
    check_disk(workdir)
