"""Every list of this directory at once, from one SFT and held against one run of the recipe.

  python -m rsagent_jax.ablate --config=configs/ablations/all.py --workdir=runs/ablations/all

One SFT, 23 runs of GRPO and 33 evaluations: hours on 2 cores.
"""

from configs.ablations import carry_over, group, history, objective, reward, stages, turns
from configs.ablations._quickstart import ablation

BASE = "full"


def get_config():
    variants = {BASE: {"says": "the recipe"}}
    for part in (reward, stages, carry_over, group, objective, turns, history):
        own = {name: variant.to_dict() for name, variant in part.get_config().variants.items()}
        recipe = next(iter(own))  # of which each list has one of its own, some with more room
        for name, variant in own.items():
            if variant.get("trained", name) == recipe:
                variant["trained"] = BASE
            if name != recipe or variant.get("evaluate"):
                variants[name] = variant
    return ablation("All lists", variants)
