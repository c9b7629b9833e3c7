"""How many turns an evaluation allows: 1, 2, 4, 8 and 12 of one policy, which was trained with 8.

  python -m rsagent_jax.ablate --config=configs/ablations/turns.py --workdir=runs/ablations/turns

One SFT, one run of GRPO, five evaluations. The context has room for 12 turns in all of them.
"""

from configs.ablations._quickstart import ablation

CONTEXT = "--config.sampling.context=1344"


def get_config():
    variants = {"turns-8": dict(says="8 turns, as in training", evaluate=(CONTEXT,))}
    for turns in (1, 2, 4, 12):
        evaluate = (CONTEXT, f"--config.agent.max_turns={turns}")
        says = f"{turns} turn{'s' * (turns > 1)}"
        variants[f"turns-{turns}"] = dict(says=says, trained="turns-8", evaluate=evaluate)
    return ablation("Turns", variants)
