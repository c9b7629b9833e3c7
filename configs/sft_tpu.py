"""SFT of Qwen2.5-VL with the paper's numbers: 2 epochs, lr 2e-5, batch 128.

Not run here: it needs weights and a TPU. Whether it fits a slice is for --aot to say, before one is rented.

  python train.py --config=configs/sft_tpu.py --config.slice=v6e-8 --workdir=DIR \
      --config.policy.weights=/path/to/Qwen2.5-VL-7B-Instruct --config.sft.trajectories=/path/to/collected
  python train.py --config=configs/sft_tpu.py --aot=v6e-8

With adapters the 7B goes on a v5e-8 (docs/tpu.md): add --config.slice=v5e-8 --config.policy.lora.rank=16.
"""

from rsagent_jax.config.build import template
from rsagent_jax.config.schema import TrainConfig


def get_config():
    config = template(TrainConfig)
    config.stages = ("sft",)
    config.policy.weights = "Qwen/Qwen2.5-VL-7B-Instruct"
    config.policy.remat = ""  # this, mesh.tensor and batch.rows: as the slice's preset says
    config.mesh.tensor = 0
    config.agent.max_pixels = 1_003_520  # 1,280 tokens for the first view (ours)
    # Of validation.sets alone: SFT calls none. GRPO's side-car, not GrabCut, the default.
    config.segmenter.mode = "connect"
    config.segmenter.addresses = ("127.0.0.1:50051",)
    config.segmenter.workers = 8
    config.sft.trajectories = "trajectories"
    # As many tokens as configs/grpo_tpu.py plays with. Patches for two views and six overlays, or one and eight (ours):
    # an overlay takes 832 places for its 784 patches, a view up to 5,440 (sides of 1 to 4). What does not fit is
    # counted.
    config.sft.batch = dict(rows=0, tokens=6144, patches=16384)
    config.sft.optim.warmup_steps = 20
    config.sft.optim.schedule = "cosine"
    config.sft.checkpoint_every = 50
    return config
