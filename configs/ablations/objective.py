"""Which objective: GRPO's, and what others changed of it.

  python -m rsagent_jax.ablate --config=configs/ablations/objective.py --workdir=runs/ablations/objective

One SFT, then seven runs of GRPO. All else, the learning rate too, is as it was found for GRPO.
"""

from configs.ablations._quickstart import ablation


def get_config():
    variants = {"grpo": dict(says="ratio by token, z-score of the group")}
    for name, says, overrides in (
        ("gspo", "ratio by sequence", ("ratio=gspo", "clip_low=3e-4", "clip_high=4e-4", "normalize=sequence")),
        ("cispo", "clipped ratio as a weight", ("ratio=cispo",)),
        ("sapo", "soft gate in place of the clip", ("ratio=sapo",)),
        ("clip-higher", "upper clip at 0.28 (DAPO)", ("clip_high=0.28",)),
        ("rloo", "leave-one-out advantage", ("advantage=loo",)),
        ("dr-grpo", "advantage less the mean, loss by a constant", ("advantage=mean", "normalize=constant")),
    ):
        variants[name] = dict(says=says, train=tuple(f"--config.grpo.{text}" for text in overrides))
    return ablation("Objective", variants)
