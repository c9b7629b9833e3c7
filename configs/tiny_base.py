"""The tiny base of the quickstart (assets/tiny-base): 2 million parameters, able to ground. 90 minutes on 2 cores.

  python -m rsagent_jax.tiny.pretrain --config=configs/tiny_base.py --workdir=runs/tiny_base --out=runs/tiny_base/base
  python -m rsagent_jax.tiny.pretrain --config=configs/tiny_base.py:absent --workdir=runs/absent --out=runs/absent/base
  python -m rsagent_jax.tiny.pretrain --config=configs/tiny_base.py:several --workdir=runs/s --out=assets/tiny-base

Each goes on from the one before: what is not there; then all of a kind, and what a mask drawn over the scene lacks. The
file that ships was made by them (seed 0), but the third in three goes of 600, 450 and 600 steps: the first without
masks, the second without telling the attention head to look at a mask's object, which it did not learn from
(assets/tiny-base-training.jsonl is the log of all). What it can do, by free decoding on 256 unseen scenes, a minute:

  python -m rsagent_jax.tiny.pretrain --config=configs/tiny_base.py --config.init=assets/tiny-base \
      --config.see.steps=0 --config.ground.steps=0 --workdir=runs/x --out=runs/x/out
"""

from rsagent_jax.config.build import template
from rsagent_jax.config.pretrain import PretrainConfig


def get_config(part: str = ""):
    config = template(PretrainConfig)
    if part == "absent":  # the heads of the auxiliary losses are gone by now, so those stay out
        config.update(
            init="runs/tiny_base/base", absent_share=0.2, presence_share=0.6, aux_weight=0.0, corner_weight=0.0
        )
        config.see.steps = 0
        config.ground.update(steps=400, rows=16, lr=1e-3, warmup=30, list_share=0.2)
    elif part == "several":
        config.update(
            init="runs/absent/base",
            absent_share=0.15,
            presence_share=0.35,
            several_share=0.5,
            marked_share=0.45,
            aux_weight=0.0,
            corner_weight=0.0,
        )
        config.see.steps = 0
        config.ground.update(steps=1200, rows=16, lr=1e-3, warmup=30, list_share=0.3)
    elif part:
        raise ValueError(f"{part!r} is unknown; use configs/tiny_base.py, configs/tiny_base.py:absent or :several")
    return config
