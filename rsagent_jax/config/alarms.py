"""The bounds beyond which train.py says in words what is going wrong (rsagent_jax/train/alarms.py, docs/alarms.md)."""

import dataclasses

from rsagent_jax.config.ranges import Count, Fraction, NotNegative, Text


@dataclasses.dataclass(frozen=True, kw_only=True)
class AlarmsConfig:
    """All are ours. Where 0 or 1 is said to switch one off, no figure can be beyond it."""

    steps: Count = 3  # in a row beyond a bound, for flat groups, one call, failures, truncation, entropy and images
    window: Count = 10  # steps whose mean is taken of the IoUs and the format reward
    again: Count = 10  # steps without it, after which an alarm is a new occurrence
    one_call: NotNegative = 1.05  # turns, or segment calls, per trajectory at most; 0 = off
    format_part: Text = "format"  # the reward group, or group/term, whose full value is 1
    format_full: NotNegative = 0.98  # mean of it from which it teaches nothing any more; above 1 = off
    iou_fall: Fraction = 0.05  # gIoU below its best window's, while the format reward is full; 1 = off
    parting: Fraction = 0.05  # one of gIoU and cIoU up, the other down, apart by as much; 1 = off
    explode: NotNegative = 10.0  # times its own running median, of the gradient's norm and of the KL; 0 = off
    median: Count = 50  # steps of that median; of fewer than 10 none is taken
    kl_floor: NotNegative = 0.01  # nats per token: a KL below it is never called exploding
    gap: NotNegative = 0.1  # nats per token: KL between the engine and the trainer; 0 = off
    stop_on_gap: bool = False  # such a gap ends the run, before the next step
    env_failed: Fraction = 0.1  # share of a step's trajectories that the segmenter failed; 1 = off
    reward_failed: Fraction = 0.1  # the same without a reward (grpo.on_reward_error = drop); 1 = off
    truncated: Fraction = 0.2  # share of turns cut by their budget, or of trajectories by theirs; 1 = off
    entropy: NotNegative = 0.01  # nats per sampled token at least; 0 = off
    image_tokens: Fraction = 0.9  # share of a step's tokens that images take; 1 = off
