"""One picture, one sentence. Seconds on 2 cores with the tiny policy.

  python -m rsagent_jax.segment photo.jpg "the red circle" --out=DIR [--weights=runs/quickstart/train/checkpoints/grpo]

`--config=configs/segment.py` (the default) is for the tiny policy of a quickstart, the one that comes with the package
(assets/tiny-agent) or your own. It was trained with the brief prompt on pictures of 112 x 112 pixels; larger ones are
shown to it at that size. `--config=configs/segment.py:full` is for
policies of full size: the prompt with the tools' schema, the paper's 384 px overlays, bfloat16.
"""

from rsagent_jax.config.build import template
from rsagent_jax.config.import_path import shipped
from rsagent_jax.config.schema import SegmentConfig


def get_config(policy: str = "tiny"):
    config = template(SegmentConfig)
    config.policy.weights = shipped("assets/tiny-agent")
    config.policy.remat = "none"
    if policy == "full":
        config.agent.max_pixels = 1_003_520
        config.sampling.context = 6144  # as in training
        config.sampling.tensor = 0  # devices that hold the policy together: as their kind says (config/slices.py)
        config.sampling.patches = 5632  # such a picture, its left-over windows in bins
        return config
    if policy != "tiny":
        raise ValueError(f"{policy!r} is unknown; use configs/segment.py or configs/segment.py:full")
    config.policy.dtype = "float32"
    config.agent.prompt = "brief"
    config.agent.history_size = 112
    config.agent.typical_turn = 48
    config.sampling.context = 896
    config.sampling.max_new_tokens = 64
    config.sampling.patches = 256  # a square takes 64; the rest is for long, narrow pictures
    return config
