"""The quickstart: the tiny base learns the tool protocol by SFT, then to use the tools well by GRPO. CPU, minutes.

  python train.py --config=configs/quickstart.py --workdir=runs/mine

It reads what `make quickstart` left behind.
"""

from rsagent_jax.config.build import template
from rsagent_jax.config.import_path import shipped
from rsagent_jax.config.schema import TrainConfig


def get_config():
    config = template(TrainConfig)
    config.policy.weights = shipped("assets/tiny-base")
    config.policy.dtype = "float32"
    config.policy.remat = "none"
    config.cache_dir = "runs/compiled"
    config.agent.prompt = "brief"
    config.agent.history_size = 112
    config.agent.typical_turn = 48  # the oracle's take 32 to 61

    config.sft.trajectories = "runs/quickstart/collect"
    config.sft.trajectories_per_step = 3
    config.sft.epochs = 1.2
    config.sft.turns = "useful"
    config.sft.batch = dict(rows=1, tokens=896, patches=768)  # eight turns of 48 tokens take 887
    config.sft.optim.freeze = ("vision", "merger")
    config.sft.optim.lr = 8e-4
    config.sft.optim.warmup_steps = 30
    config.sft.optim.schedule = "cosine"
    config.sft.checkpoint_every = 200

    config.grpo.data.root = "runs/quickstart/data"
    config.grpo.data.dataset, config.grpo.data.split_by = "grefcoco", "unc"  # the scenes with absent targets
    config.grpo.steps = 24
    config.grpo.minibatches = 2
    config.grpo.min_spread = 0.05  # masks that differ by a few pixels teach nothing, but a z-score would blow them up
    config.grpo.batch = dict(rows=3, tokens=896, patches=768)
    config.grpo.optim.freeze = ("vision", "merger", "embed")  # words that drift lose the format first
    config.grpo.optim.lr = 1e-4
    config.grpo.optim.warmup_steps = 10
    config.grpo.optim.schedule = "cosine"
    config.grpo.sampling.temperature = 0.5  # at 0.75 every tenth call is malformed after so short an SFT
    config.grpo.sampling.context = 896
    config.grpo.sampling.max_new_tokens = 64
    config.grpo.sampling.slots = 24
    config.grpo.sampling.patches = 64
    config.grpo.checkpoint_every = 24
    return config
