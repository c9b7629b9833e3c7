"""The tiny base policy of the quickstart (assets/tiny-base).

python -m rsagent_jax.pretrain --config=configs/tiny_base.py --workdir=runs/tiny_base --out=assets/tiny-base
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        dict(
            seed=0,
            init="",  # a Hugging Face directory to go on from
            vocab_size=1024,
            hidden=128,
            layers=4,
            heads=4,
            kv_heads=2,
            mlp=384,
            vision_hidden=128,
            vision_layers=4,
            vision_mlp=256,
            eval_every=250,
            corner_weight=1.0,
            aux_weight=0.25,
            see=dict(steps=500, rows=64, lr=3e-3, warmup=50, tokens=64),
            ground=dict(steps=2000, rows=24, lr=2e-3, warmup=100, tokens=224),
        )
    )
