"""Which part of the reward does what: each group off, each alone, each term of the process reward off.

  python -m rsagent_jax.ablate --config=configs/ablations/reward.py --workdir=runs/ablations/reward

One SFT, then 12 runs of GRPO with the tiny policy on CPU.
"""

from configs.ablations._quickstart import ablation

GROUPS = ("final", "process", "format")
TERMS = ("iou_gain", "call_cost", "novel_action", "point_excess", "overshoot")


def without(*names: str) -> tuple[str, ...]:
    return tuple(f"--config.grpo.reward.{name}=None" for name in names)


def get_config():
    variants = {"full": dict(says="1.0 final + 0.5 process + 0.2 format")}
    variants |= {f"no-{g}": dict(says=f"without the {g} reward", train=without(g)) for g in GROUPS}
    for g in GROUPS:
        others = without(*(other for other in GROUPS if other != g))
        variants[f"only-{g}"] = dict(says=f"the {g} reward alone", train=others)
    for term in TERMS:
        name = f"no-{term.replace('_', '-')}"
        variants[name] = dict(says=f"process reward without {term}", train=without(f"process.terms.{term}"))
    return ablation("Reward terms", variants)
