"""150 held-out scenes, greedy.

  python evaluate.py --config=configs/eval_quickstart.py --workdir=runs/mine-eval \
      --weights=runs/mine/checkpoints/grpo
"""

from rsagent_jax.config.build import template
from rsagent_jax.config.import_path import shipped
from rsagent_jax.config.schema import EvalConfig


def get_config():
    config = template(EvalConfig)
    config.benchmark = "synthetic scenes, test"
    config.policy.weights = shipped("assets/tiny-base")
    config.policy.dtype = "float32"
    config.policy.remat = "none"
    config.cache_dir = "runs/compiled"  # the three evaluations share their programs
    config.agent.prompt = "brief"
    config.agent.history_size = 112
    config.data.root = "runs/quickstart/data"
    config.data.dataset, config.data.split_by = "grefcoco", "unc"  # the scenes with absent targets
    config.agent.typical_turn = 48
    config.data.split = "test"
    config.data.unit = "reference"
    config.sampling.temperature = 0.0
    config.sampling.context = 896  # as in training
    config.sampling.max_new_tokens = 64
    config.sampling.slots = 24
    config.sampling.patches = 64
    return config
