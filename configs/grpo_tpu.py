"""GRPO of Qwen2.5-VL-7B with the paper's numbers: 16 prompts x 4 samples, lr 1e-6, 8 turns.

Not run here: it needs weights and a TPU.

  python train.py --config=configs/grpo_tpu.py --workdir=DIR --config.policy.weights=DIR/of/sft/checkpoints/sft \
      --config.grpo.data.root=/path/to/refcoco

Clip range, KL (Seg-Zero's 5e-3, k3) and every reward sub-term are ours; the paper does not give them.
"""

from rsagent_jax.config import TrainConfig, template


def get_config():
    config = template(TrainConfig)
    config.stages = ("grpo",)
    config.policy.weights = "runs/sft/checkpoints/sft"
    config.agent.max_pixels = 1_003_520
    config.segmenter.mode = "connect"
    config.segmenter.addresses = ("127.0.0.1:50051",)
    config.grpo.steps = 1000
    config.grpo.kl = 5e-3
    config.grpo.data.root = "refer"
    config.grpo.batch = dict(rows=16, tokens=8192, patches=16384)
    config.grpo.sampling.patches = 5632
    config.grpo.checkpoint_every = 20
    return config
