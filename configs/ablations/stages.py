"""What each stage of training gives: both, SFT alone, GRPO alone, neither.

  python -m rsagent_jax.ablate --config=configs/ablations/stages.py --workdir=runs/ablations/stages

One SFT, two runs of GRPO, four evaluations.
"""

from configs.ablations._quickstart import SFT, ablation


def get_config():
    base = ("--config.policy.weights={weights}",)
    return ablation(
        "Stages",
        {
            "both": dict(says="SFT, then GRPO"),
            "sft-only": dict(says="SFT", weights=SFT),
            "grpo-only": dict(says="GRPO from the base", train=base),
            "neither": dict(says="the base", weights="{weights}"),
        },
    )
