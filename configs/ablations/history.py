"""How large the overlays of the history are: 84, 112 and 140 pixels of one policy, which was trained with 112.

  python -m rsagent_jax.ablate --config=configs/ablations/history.py --workdir=runs/ablations/history

The paper's 384 pixels with 256 and 512 beside them, at the scale of the scenes' 112 pixels, rounded to whole patches.
One SFT, one run of GRPO, three evaluations.
"""

from configs.ablations._quickstart import ablation

ROOM = ("--config.sampling.context=1344", "--config.sampling.patches=128")  # for the largest


def get_config():
    variants = {"history-112": dict(says="112 pixels, as in training", evaluate=ROOM)}
    for size in (84, 140):
        evaluate = (*ROOM, f"--config.agent.history_size={size}")
        variants[f"history-{size}"] = dict(says=f"{size} pixels", trained="history-112", evaluate=evaluate)
    return ablation("History size", variants)
