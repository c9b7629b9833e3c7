"""SFT of Qwen2.5-VL-7B with the paper's numbers: 2 epochs, lr 2e-5, batch 128.

Not run here: it needs weights and a TPU.

  python train.py --config=configs/sft_tpu.py --workdir=DIR \
      --config.policy.weights=/path/to/Qwen2.5-VL-7B-Instruct \
      --config.sft.trajectories=/path/to/collected
"""

from rsagent_jax.config import TrainConfig, template


def get_config():
    config = template(TrainConfig)
    config.stages = ("sft",)
    config.policy.weights = "Qwen2.5-VL-7B-Instruct"
    config.agent.max_pixels = 1_003_520  # 1,280 tokens for the first view (ours)
    config.sft.trajectories = "trajectories"
    config.sft.batch = dict(rows=16, tokens=8192, patches=16384)
    config.sft.optim.warmup_steps = 20
    config.sft.optim.schedule = "cosine"
    config.sft.checkpoint_every = 50
    return config
