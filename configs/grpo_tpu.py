"""GRPO of Qwen2.5-VL-7B with the paper's numbers: 16 prompts x 4 samples, lr 1e-6, 8 turns.

Not run here: it needs weights and a TPU. Whether it fits a slice is for --aot to say, before one is rented.

  python train.py --config=configs/grpo_tpu.py --config.slice=v6e-8 --workdir=DIR \
      --config.policy.weights=DIR/of/sft/checkpoints/sft --config.grpo.data.root=/path/to/refcoco
  python train.py --config=configs/grpo_tpu.py --config.policy.weights=7b --aot=v6e-8

Clip range, KL (Seg-Zero's 5e-3, k3) and every reward sub-term are ours; the paper does not give them.
"""

from rsagent_jax.config.build import template
from rsagent_jax.config.schema import TrainConfig


def get_config():
    config = template(TrainConfig)
    config.stages = ("grpo",)
    config.policy.weights = "runs/sft/checkpoints/sft"
    config.policy.remat = ""  # this, mesh.tensor and batch.rows: as the slice's preset says
    config.mesh.tensor = 0
    config.agent.max_pixels = 1_003_520
    config.segmenter.mode = "connect"
    config.segmenter.addresses = ("127.0.0.1:50051",)
    config.segmenter.workers = 8
    config.grpo.steps = 1000
    config.grpo.kl = 5e-3
    config.grpo.data.root = "refer"
    # Eight turns of up to 358 tokens about a 1920x1080 picture, or of 150 with one zoom (agent/budget.py; ours), and as
    # many in configs/sft_tpu.py, eval.py and segment.py:full. A row holds the images of a view, a zoom and six masks.
    config.grpo.batch = dict(rows=0, tokens=6144, patches=16384)
    config.grpo.sampling.context = 6144
    config.grpo.sampling.patches = 6144
    config.grpo.sampling.tensor = 0  # this and the slots of a host: as the slice's preset says
    config.grpo.sampling.slots = 0
    config.grpo.checkpoint_every = 20
    return config
