"""GRPO as configs/grpo_tpu.py on a mix: the train splits of RefCOCO, RefCOCO+, RefCOCOg and ReasonSeg, without the
pictures of any of RefCOCO's validation and test splits (all of them are COCO train2014, so they overlap).

  python -m rsagent_jax.data_check --config=configs/grpo_mix_tpu.py --config.grpo.data.root=REFER \
      --config.grpo.data.mix.reasonseg.data.root=REASONSEG --out=runs/check
  python train.py --config=configs/grpo_mix_tpu.py --config.slice=v6e-8 --workdir=DIR \
      --config.policy.weights=DIR/of/sft/checkpoints/sft --config.grpo.data.root=REFER \
      --config.grpo.data.mix.reasonseg.data.root=REASONSEG

Weights are ours: the paper does not say what its GRPO is trained on. `--config.grpo.data.mix.reasonseg=None` leaves a
part out. A sample that cannot be read is skipped and counted (`unreadable` in metrics.jsonl).
"""

from ml_collections import ConfigDict

from configs import grpo_tpu

HELD_OUT = (
    *(f"{name}/unc/{split}" for name in ("refcoco", "refcoco+") for split in ("val", "testA", "testB")),
    "refcocog/umd/val",
    "refcocog/umd/test",
)


def part(weight: float, **data) -> ConfigDict:
    return ConfigDict(dict(weight=weight, data=dict(root="", **data)))


def get_config():
    config = grpo_tpu.get_config()
    config.grpo.data.exclude = HELD_OUT
    config.grpo.data.mix = ConfigDict(
        dict(
            refcoco=part(1.0, dataset="refcoco", split_by="unc"),
            refcoco_plus=part(1.0, dataset="refcoco+", split_by="unc"),
            refcocog=part(2.0, dataset="refcocog", split_by="umd"),
            reasonseg=part(0.1, dataset="reasonseg", texts="all"),  # 239 pictures: more would only repeat them
        )
    )
    config.grpo.read.threads = 8
    return config
