"""Every field a user can set, and the one function that turns a config file into these dataclasses.

A config file is Python with `get_config() -> ml_collections.ConfigDict`; `--config.a.b=v` overrides a leaf. `build`
checks the whole tree at once: a single DataError lists every unknown, missing or ill-typed field with the closest
match.
Fields marked (paper) carry the numbers of arXiv 2512.24023; every other default is ours.
"""

import dataclasses
from typing import Annotated, Literal

from rsagent_jax.config import rules
from rsagent_jax.config.alarms import AlarmsConfig
from rsagent_jax.config.data import DataConfig, MetricConfig
from rsagent_jax.config.endpoint import EndpointConfig, RemoteConfig
from rsagent_jax.config.ranges import (
    Activations,
    BackendName,
    BelowOne,
    Count,
    CountOrZero,
    Devices,
    Fraction,
    Function,
    Mass,
    MeshAxis,
    NotNegative,
    Port,
    Positive,
    Range,
    Remat,
    Seed,
    Text,
)
from rsagent_jax.config.reward import DEFAULT_REWARD, RewardGroup
from rsagent_jax.config.validation import ValidationConfig
from sam_bridge.backends import DTYPES, MULTIMASK, SAM2_MODELS


@dataclasses.dataclass(frozen=True, kw_only=True)
class AgentConfig:
    """The environment: what the policy may do and when it ends."""

    max_turns: Count = 8  # (paper) turns of a trajectory
    history_size: Count = 384  # (paper) overlays of the history pool fit into this square, pixels
    # System prompt: "full" carries the JSON schema of every tool, "brief" is for tiny policies.
    prompt: Literal["full", "brief"] = "full"
    max_invalid: Count = 3  # malformed calls in a row that end a trajectory
    max_repeats: Annotated[int, Range(low=2)] = 3  # same action in a row that ends a trajectory
    max_tokens: CountOrZero = 0  # sampled tokens of a trajectory; 0 = as many as fit its context
    # Tokens of an ordinary turn, where max_new_tokens is not less (ours). A config in which a typical trajectory of
    # such turns cannot reach max_turns is refused, and a turn that would be left with less is the last one.
    typical_turn: Count = 150
    announce_last: bool = True  # the observation before the last turn says so, and names the best mask so far (ours)
    tool_deadline_s: Positive = 120.0  # a tool call that takes longer ends its trajectory as env_failed
    min_pixels: CountOrZero = 0  # smart-resize limits of a view; 0 = those of the weights' preprocessor_config.json
    max_pixels: CountOrZero = 0  # of a view at most; 0 as for min_pixels
    conflicts = rules.agent


@dataclasses.dataclass(frozen=True, kw_only=True)
class SegmenterConfig:
    """Where masks come from."""

    # spawn: start and supervise a side-car; connect: use `addresses`; inprocess: no bridge
    mode: Literal["spawn", "connect", "inprocess"] = "spawn"
    backend: BackendName = "grabcut"  # sam2: with `checkpoint` (spawn, inprocess); docs/sidecar.md
    checkpoint: str = ""  # sam2's .pt file, a hub's org/name that has one, or "random" for a test
    model: Literal["", *SAM2_MODELS] = ""  # sam2.1_large, sam2_tiny, …; "" = as the checkpoint's file name says
    device: Devices = "cpu"  # of sam2: cpu, cuda, cuda:0,cuda:1
    dtype: Literal[*DTYPES] = "float32"  # of sam2: or bfloat16
    multimask: Literal[*MULTIMASK] = "point"  # sam2's best of three masks for: a single click (point), never, always
    addresses: tuple[Text, ...] = ()  # for connect; an image belongs to one of them while that one answers
    token_file: str = ""  # for connect: the file with the side-cars' token
    tls: bool = False  # for connect: encrypt, trusting the system's certificates
    tls_ca: str = ""  # for connect: encrypt, trusting the certificates in this PEM file
    timeout_s: Positive = 120.0  # deadline of one call
    wait_s: NotNegative = 60.0  # how long an unreachable side-car is waited for
    workers: Count = 2  # tool calls at a time
    give_up_after: CountOrZero = 16  # trajectories in a row failed by it, or by an endpoint, end the command; 0 = never
    conflicts = rules.segmenter


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Device mesh; -1 takes what is left."""

    data: MeshAxis = 1  # copies of the parameters; the rows are split over them
    fsdp: MeshAxis = -1  # parts of the parameters and of the rows
    tensor: CountOrZero = 1  # 0 = as the slice's preset says
    conflicts = rules.mesh


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW with linear warm-up, then a constant or cosine schedule."""

    lr: Positive = 1e-6  # learning rate after the warm-up
    warmup_steps: CountOrZero = 0  # updates in which the rate rises from 0
    schedule: Literal["constant", "cosine"] = "constant"  # of the rate after the warm-up
    b1: BelowOne = 0.9  # decay of the first moment
    b2: BelowOne = 0.999  # decay of the second moment
    eps: Positive = 1e-8  # added to the root of the second moment
    weight_decay: NotNegative = 0.0  # decoupled
    clip_norm: NotNegative = 1.0  # of the whole gradient; 0 = off
    offload: bool = False  # AdamW's moments stay in host memory between updates
    freeze: tuple[Literal["vision", "merger", "decoder", "embed", "head"], ...] = ()  # parts that are not trained


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """The fixed shapes of a training batch."""

    rows: CountOrZero = 16  # over the whole mesh; 0 = as the slice's preset says
    tokens: Count = 1024  # T per row
    patches: Count = 1024  # P per row, before merging


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How turns are sampled."""

    temperature: NotNegative = 1.0  # 0 = greedy
    max_new_tokens: Count = 512  # per turn
    context: Count = 8192  # tokens of a whole trajectory, images included
    slots: CountOrZero = 64  # trajectories at a time; 0, and 0 of tensor: as the slice's preset or the device says
    patches: Count = 4096  # patches of new images per slot and turn
    top_k: CountOrZero = 0  # draw from the k likeliest tokens; 0 = from all
    top_p: Mass = 1.0  # draw from the likeliest tokens of this mass
    # Tokens that end a turn, besides those of the weights' generation_config.json.
    stop_ids: tuple[CountOrZero, ...] = ()
    chunk: Count = 8  # decode steps per compiled call
    prefill: Count = 64  # prompt tokens per lane and compiled call
    lanes: CountOrZero = 0  # slots that append a prompt at a time; 0 = a quarter of the slots
    encode: Count = 1  # lanes of a row of devices whose new images the tower reads at a time
    kv_dtype: Literal["", "int8", "bfloat16", "float32"] = ""  # of the cache: int8 halves it; "" = as the activations
    # Of the decoder's kernels and head in the engine: int8, a scale per output, halves them (docs/grpo.md); "" = as the
    # activations.
    weights_dtype: Literal["", "int8"] = ""
    tensor: CountOrZero = 1  # devices that share a slot's heads; must divide the devices of a process
    conflicts = rules.sampling


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReadConfig:
    """How training reads what comes next (rsagent_jax/data/pipeline.py); changes nothing of what that is."""

    threads: Count = 4  # samples decoded at a time, per process
    workers: CountOrZero = 0  # processes that decode, beside each of train.py; 0 = threads only
    ahead: Count = 16  # samples decoded before they are asked for


@dataclasses.dataclass(frozen=True, kw_only=True)
class SftConfig:
    """Supervised fine-tuning on stored trajectories."""

    trajectories: str = ""  # directory written by rsagent_jax.collect
    epochs: Positive = 2.0  # (paper)
    steps: CountOrZero = 0  # 0 = as many as `epochs` gives
    trajectories_per_step: Count = 128  # (paper) batch size
    turns: Literal["all", "useful"] = (
        "all"  # that are trained: useful = without refused calls and masks no better (ours)
    )
    unreadable: Literal["skip", "stop"] = "skip"  # a trajectory that cannot be read, as data.unreadable
    read: ReadConfig = ReadConfig()
    batch: BatchConfig = BatchConfig()  # of one micro-batch
    optim: OptimConfig = OptimConfig(lr=2e-5)  # (paper)
    checkpoint_every: CountOrZero = 0  # steps; 0 = only at the end


@dataclasses.dataclass(frozen=True, kw_only=True)
class MockConfig:
    """Stored turns in place of the engine's (rsagent_jax/rollout/mock.py): to watch a run without its rollouts."""

    trajectories: str = ""  # a set that grpo.dump_every or rsagent_jax.collect wrote; "" = the engine plays
    turn_s: NotNegative = 0.0  # median seconds of a turn; 0 = none
    sigma: NotNegative = 0.5  # of the logarithm of a turn's seconds


# What `grpo.advantage` may be, and its function in train/advantages.py.
ADVANTAGES = {"zscore": "group_zscore", "mean": "mean_only", "loo": "leave_one_out"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class GrpoConfig:
    """Group-relative policy optimisation."""

    steps: Count = 100  # rollouts, each followed by epochs * minibatches updates
    prompts: Count = 16  # (paper) per step
    group: Annotated[int, Range(low=2)] = 4  # (paper) samples per prompt
    epochs: Count = 1  # passes over a rollout's batch
    minibatches: Count = 1  # parts of that batch, an optimiser step each
    advantage: Literal[*ADVANTAGES] = "zscore"  # of a group: z-score, less the mean, leave-one-out
    ddof: Annotated[int, Range(low=0, high=1)] = 1  # of the standard deviation in zscore and in advantage_scale
    # Divides by the standard deviation of all the step's rewards, or of all its advantages (docs/grpo.md).
    advantage_scale: Literal["none", "rewards", "advantages"] = "none"
    turn_credit: tuple[Text, ...] = ()  # reward groups that are earned turn by turn, such as ("process",)
    ratio: Literal["grpo", "gspo", "cispo", "sapo"] = "grpo"  # by token, GSPO by sequence, CISPO and SAPO: docs/grpo.md
    clip_low: BelowOne = 0.2  # the ratio is clipped below 1 - this
    clip_high: NotNegative = 0.2  # and above 1 + this
    tau_pos: Positive = 1.0  # sapo: how fast the gradient fades with the ratio, where the advantage is positive
    tau_neg: Positive = 1.05  # and where it is not
    entropy: NotNegative = 0.0  # weight of the entropy bonus; 0 = none
    kl: NotNegative = 0.0  # weight of the divergence from the reference; 0 = no reference
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"  # of that divergence
    normalize: Literal["token", "sequence", "constant"] = "token"  # what the loss is divided by
    tis_clip: NotNegative = 2.0  # truncated importance sampling between engine and trainer; 0 = off
    drop_zero_variance: bool = True  # groups that have nothing to teach are not trained on
    refill: CountOrZero = 0  # rounds at most in which other prompts are played in place of such groups; 0 = none
    # Groups in flight beyond `prompts`. What is not done when `prompts` groups are goes on under the weights of the
    # next steps, at most max_staleness of them; 0 and 0 = a step waits for all that it began.
    surplus: CountOrZero = 0
    max_staleness: CountOrZero = 0  # steps that a group may take
    curriculum: BelowOne = 0.0  # chance to pass over a sample whose last group was perfect, by how well it did; 0 = off
    min_spread: NotNegative = 0.0  # of a group's rewards; with less it counts as one of those
    mask_overlong: bool = True  # trajectories that ended by their budget of tokens are not trained on
    # Of a step's trajectories that called the segmenter: where a larger share failed because of it, the run stops.
    max_env_failed: Fraction = 0.5
    reward: tuple[RewardGroup, ...] = DEFAULT_REWARD  # groups of terms (docs/rewards.md)
    # A term that raises, is late or returns what is no reward: stop, or drop the trajectory from its group and count.
    on_reward_error: Literal["stop", "drop"] = "stop"
    data: DataConfig = DataConfig()
    read: ReadConfig = ReadConfig()
    batch: BatchConfig = BatchConfig(tokens=8192)  # a row holds at least a whole trajectory: sampling.context
    optim: OptimConfig = OptimConfig()
    sampling: SamplingConfig = SamplingConfig()
    mock: MockConfig = MockConfig()  # for tests of everything but the engine; what is learned means nothing
    checkpoint_every: CountOrZero = 0  # steps; 0 = only at the end
    dump_every: CountOrZero = 0  # steps whose every trajectory is kept, for SFT, replay and --replay; 0 = none
    dump_keep: CountOrZero = 0  # newest dumps that stay; 0 = all

    @property
    def updates(self) -> int:
        """Optimiser steps per rollout."""
        return self.epochs * self.minibatches


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters on the decoder's linear maps, trained in place of all other parameters (ours; paper: none)."""

    rank: CountOrZero = 0  # 0 = no adapters
    alpha: Positive = 32.0  # an adapter's product counts alpha / rank times
    # linear maps that get an adapter
    targets: tuple[Literal["q", "k", "v", "o", "gate", "up", "down"], ...] = ("q", "k", "v", "o", "gate", "up", "down")
    conflicts = rules.lora


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyConfig:
    """The policy's weights and numerics."""

    weights: Text  # a Hugging Face directory, a hub's org/name[@revision], or checkpoints/<stage> of train.py
    dtype: Activations = "bfloat16"  # of activations; parameters stay fp32 in training
    # What the backward pass keeps: none (no remat) | full | attention | selective | dots | save:NAMES | offload:NAMES
    # auto: the fastest of none, dots, selective, attention, full that fits, found by compiling (aot/remat.py)
    remat: Remat = "full"  # "" = as the slice's preset says
    # splash: TPU; cudnn, cudnn_causal, triton: GPU (models/qwen25_vl/attention.py)
    attention: Literal["auto", "plain", "blocks", "splash", "cudnn", "cudnn_causal", "triton"] = "auto"
    # Of training: layers in a loop, compiled once. False compiles each of them: for a small policy on a CPU a faster
    # step (a seventh in benchmarks/train_step.py), since nothing is copied into and out of the loop's stacks.
    scan_layers: bool = True
    lora: LoraConfig = LoraConfig()  # of training; whoever loads its checkpoints gets merged weights
    # Who writes the turns of an evaluation or of segment: engine, or openai: served at `policy.remote`
    # (docs/serving.md); of `weights` only tokenizer and image settings are read then.
    backend: Literal["engine", "openai"] = "engine"
    remote: EndpointConfig = EndpointConfig()
    conflicts = rules.policy


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """configs/*.py of train.py."""

    seed: Seed = 0  # of everything random
    stages: tuple[Literal["sft", "grpo"], ...] = ("sft", "grpo")  # in this order; one may be left out
    policy: PolicyConfig
    agent: AgentConfig = AgentConfig()
    segmenter: SegmenterConfig = SegmenterConfig()
    slice: str = ""  # v5e-16, v6e-64, …: decides what mesh.tensor, policy.remat and batch.rows leave open
    mesh: MeshConfig = MeshConfig()
    sft: SftConfig = SftConfig()
    grpo: GrpoConfig = GrpoConfig()
    alarms: AlarmsConfig = AlarmsConfig()
    validation: ValidationConfig = ValidationConfig()
    # Where figures go besides metrics.jsonl: tensorboard, wandb (an extra), console, or file.py:Class (docs/extend.md).
    loggers: tuple[Text, ...] = ("tensorboard", "console")
    # Of checkpoints, beside sft.checkpoint_every and grpo.checkpoint_every, and validation.keep_best:
    checkpoint_minutes: NotNegative = 0.0  # one is saved at the latest so long after the last; 0 = by steps alone
    keep_last: Count = 2  # newest ones of a stage that are kept
    keep_every: CountOrZero = 0  # steps: those of every so many are kept for good; 0 = none
    # From SIGTERM to the end of the process, whatever it does by then (docs/training.md). launch, reproduce and
    # deploy/compose.yaml kill what takes longer than 28 to 40.
    preemption_s: Positive = 25.0
    # What takes so long the first time, or a tenth of it later, hangs, and the run ends (docs/training.md); 0 = never.
    hang_minutes: NotNegative = 60.0
    cache_dir: str = ""  # compiled programs are kept here; "" = in the work directory
    profiler_port: Port = 0  # every process serves jax.profiler to its machine on it (docs/tpu.md); 0 = none
    conflicts = rules.train_rules

    @property
    def plays(self) -> bool:
        """Whether an engine and a segmenter are opened: SFT has them for its validation, in the shapes of GRPO's."""
        return "grpo" in self.stages or bool(self.validation.sets)

    @property
    def slowest_answer_s(self) -> float:
        """Seconds that a tool or a reward may take, by deadlines of their own."""
        return max([self.agent.tool_deadline_s, *(t.deadline_s for group in self.grpo.reward for t in group.terms)])


@dataclasses.dataclass(frozen=True, kw_only=True)
class BoundConfig:
    """A row that bounds the truth in place of the policy's own (rsagent_jax/evals/bounds.py)."""

    # box, best_of_three, clicks: oracles, without a policy; untrained: the policy; "" = the policy
    row: Literal["", "box", "best_of_three", "clicks", "untrained"] = ""
    prompt: Literal["box", "click"] = "box"  # of best_of_three: the true box, or a click in its middle
    clicks: Annotated[int, Range(low=1, high=16)] = 8  # of clicks: tool calls before the best mask is taken


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """configs/eval_*.py of evaluate.py."""

    benchmark: str = ""  # its name in results.json; "" = that of its samples, such as refcoco/unc/testA
    seed: Seed = 0  # of sampling; the bootstrap's is always 0
    policy: PolicyConfig
    agent: AgentConfig = AgentConfig()
    segmenter: SegmenterConfig = SegmenterConfig()
    data: DataConfig = DataConfig(split="val")
    sampling: SamplingConfig = SamplingConfig(temperature=0.0)
    metric: MetricConfig = MetricConfig()
    bound: BoundConfig = BoundConfig()
    cache_dir: str = ""  # compiled programs are kept here; "" = in the work directory
    examples: CountOrZero = 12  # trajectories shown in the report
    hang_minutes: NotNegative = 60.0  # as train.py's
    conflicts = rules.evaluation

    @property
    def slowest_answer_s(self) -> float:
        served = self.policy.backend == "openai"
        return self.agent.tool_deadline_s + (self.policy.remote.slowest_answer_s if served else 0.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OwnConfig:
    """A policy of our own as the teacher, through the rollout engine: rejection sampling."""

    weights: str = ""  # as policy.weights; "" = teacher.function acts
    tries: Count = 4  # trajectories per sample; filter.per_sample says how many of the good ones are kept
    dtype: Activations = "bfloat16"  # of activations
    sampling: SamplingConfig = SamplingConfig()  # at temperature 0 all tries are the same
    conflicts = rules.own


@dataclasses.dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """Who acts: the oracle, which looks at the true mask; rsagent_jax.collecting.endpoint:Remote, which asks `remote`;
    or `own`."""

    function: Function = "rsagent_jax.collecting.oracle:Oracle"  # module:function or file.py:function of (config, rng)
    remote: RemoteConfig = RemoteConfig()
    own: OwnConfig = OwnConfig()
    box: Fraction = 0.5  # share of first prompts that are boxes; the rest are clicks
    wrong_first: Fraction = 0.25  # share of trajectories whose first guess is wrong on purpose (see sft.turns)
    hasty: Fraction = 0.0  # share of trajectories that commit to a mask of IoU `enough` already, and so may stop early
    enough: Fraction = 0.4  # less than `good`, and no less than the filter asks for
    good: Fraction = 0.9  # IoU of a mask that it commits to: the filter's, since better ones are not worth a turn


@dataclasses.dataclass(frozen=True, kw_only=True)
class FilterConfig:
    """Which trajectories are kept; all are stored, so that rsagent_jax.refilter can choose again."""

    min_iou: Fraction = 0.9  # (paper) of the final mask
    max_turns: Count = 8  # (paper)
    malformed: bool = False  # turns that could not be read or done are kept
    repeats: bool = False  # turns that do the same as the one before are kept
    per_sample: Count = 1  # where a sample was tried several times: good trajectories that are kept, first tries first


@dataclasses.dataclass(frozen=True, kw_only=True)
class CollectConfig:
    """configs/collect_*.py of rsagent_jax.collect."""

    seed: Seed = 0  # of the order of samples and of the teacher
    limit: CountOrZero = 0  # samples to try; 0 = all
    filter: FilterConfig = FilterConfig()
    concurrent: Count = 32  # trajectories under way at a time
    records_per_file: Count = 1000  # in a file of the kept set
    processor: Text  # Hugging Face directory or a hub's org/name with the tokenizer and the image processor
    teacher: TeacherConfig = TeacherConfig()
    agent: AgentConfig = AgentConfig()
    segmenter: SegmenterConfig = SegmenterConfig()
    data: DataConfig = DataConfig()
    hang_minutes: NotNegative = 60.0  # as train.py's
    conflicts = rules.collect_rules

    @property
    def slowest_answer_s(self) -> float:
        remote = self.teacher.remote
        return self.agent.tool_deadline_s + (remote.slowest_answer_s if remote.url else 0.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProblemsConfig:
    """configs/problems.py of rsagent_jax.problems."""

    seed: Seed = 0  # of the order of objects
    limit: CountOrZero = 0  # objects to ask about; 0 = all
    writer: RemoteConfig = RemoteConfig(temperature=1.0)
    queries: Count = 2  # for an object
    min_words: Count = 5  # of a query
    max_words: Count = 40  # of a query
    tries: Count = 2  # answers of no use before an object is given up
    picture_size: Count = 1024  # longer side of what the writer is shown, pixels
    data: DataConfig = DataConfig()
    conflicts = rules.problems_rules


@dataclasses.dataclass(frozen=True, kw_only=True)
class SegmentConfig:
    """configs/segment.py of rsagent_jax.segment: one picture, one sentence."""

    seed: Seed = 0  # of sampling
    policy: PolicyConfig
    agent: AgentConfig = AgentConfig()
    segmenter: SegmenterConfig = SegmenterConfig(workers=1)
    sampling: SamplingConfig = SamplingConfig(temperature=0.0, slots=1)
    cache_dir: str = ""  # compiled programs are kept here; "" = in the output directory
    conflicts = rules.segmenting
