"""Whether GRPO learns as fast per step where trajectories go on under later weights (docs/grpo.md, a long tail).

  python -m rsagent_jax.ablate --config=configs/ablations/carry_over.py --workdir=runs/ablations/carry_over

One SFT, then two runs of GRPO. The quickstart's rollouts have no tail to speak of, so this asks for what older weights
cost and not for what carrying over saves.
"""

from configs.ablations._quickstart import ablation


def get_config():
    carry = ("--config.grpo.surplus=16", "--config.grpo.max_staleness=2")
    return ablation(
        "Carry-over",
        {
            "wait": dict(says="a step waits for all of its trajectories"),
            "carry-over": dict(says="twice as many groups in flight, at most two steps", train=carry),
        },
    )
