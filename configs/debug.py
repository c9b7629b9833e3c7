"""The whole loop in under a minute: 4 SFT steps and 2 GRPO steps of the tiny base on a handful of scenes.

  python -m rsagent_jax.tiny.synthetic --out=runs/debug/data --train=24 --val=4 --test=4
  python -m rsagent_jax.collect --config=configs/collect_quickstart.py --workdir=runs/debug/collect \
      --config.data.root=runs/debug/data --config.limit=16
  python train.py --config=configs/debug.py --workdir=runs/debug/train

Four steps of SFT make a policy that still fails: GRPO's groups are flat, and its two steps mostly make no update
(counted as `no_update`).
"""

from configs import quickstart


def get_config():
    config = quickstart.get_config()
    config.sft.trajectories = "runs/debug/collect"
    config.sft.steps = 4
    config.sft.optim.warmup_steps = 2
    config.sft.trajectories_per_step = 4
    config.sft.batch.rows = 2
    config.grpo.data.root = "runs/debug/data"
    config.grpo.steps = 2
    config.grpo.optim.warmup_steps = 1
    config.grpo.minibatches = 1  # a checkpoint is named by its updates: one a step
    config.grpo.prompts = 2
    config.grpo.batch.rows = 2
    config.grpo.sampling.slots = 8
    return config
