"""How many samples a group has, at 64 trajectories a step; and dynamic sampling.

  python -m rsagent_jax.ablate --config=configs/ablations/group.py --workdir=runs/ablations/group

One SFT, then four runs of GRPO.
"""

from configs.ablations._quickstart import ablation


def get_config():
    variants = {"group-4": dict(says="16 prompts, 4 samples each (the paper's)")}
    for prompts, group in ((32, 2), (8, 8)):
        sizes = (f"--config.grpo.prompts={prompts}", f"--config.grpo.group={group}")
        variants[f"group-{group}"] = dict(says=f"{prompts} prompts, {group} samples each", train=sizes)
    refill = ("--config.grpo.refill=2",)
    variants["refill"] = dict(says="dynamic sampling: groups without spread are replaced, at most twice", train=refill)
    return ablation("Group size and dynamic sampling", variants)
