"""Reasoning queries for RefCOCOg's training objects, written by a vision-language model: the paper's first step.

  python -m rsagent_jax.problems --config=configs/problems.py --workdir=DIR --config.data.root=REFER \
      --config.writer.url=http://host:8000/v1 --config.writer.model=Qwen/Qwen2.5-VL-72B-Instruct

The pictures of RefCOCO's validation and test splits are left out. How many objects and queries there should be is ours:
the paper ends up with more than 5,000 trajectories.
"""

from configs.grpo_mix_tpu import HELD_OUT
from rsagent_jax.config.build import template
from rsagent_jax.config.schema import ProblemsConfig


def get_config():
    config = template(ProblemsConfig)
    config.limit = 10_000
    config.data.unit = "reference"  # an object is asked about once, not once for each of its expressions
    config.data.exclude = HELD_OUT
    return config
