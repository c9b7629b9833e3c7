"""Every field a user can set, and the one function that turns a config file into these dataclasses.

A config file is Python with `get_config() -> ml_collections.ConfigDict`; `--config.a.b=v` overrides a leaf. `build`
checks the whole tree at once: a single DataError lists every unknown, missing or ill-typed field with the closest
match.
Fields marked (paper) carry the numbers of arXiv 2512.24023; every other default is ours.
"""

from __future__ import annotations

import dataclasses

from rsagent_jax.config_files import build, template, to_dict

__all__ = ["build", "template", "to_dict"]  # what a config file or an entry point needs stands in one place


@dataclasses.dataclass(frozen=True, kw_only=True)
class AgentConfig:
    """The environment: what the policy may do and when it ends."""

    max_turns: int = 8  # (paper)
    history_size: int = 384  # (paper) overlays of the history pool fit into this square, pixels
    prompt: str = "full"  # system prompt: "full" carries the JSON schema of every tool, "brief" is for tiny policies
    max_invalid: int = 3  # malformed calls in a row that end a trajectory
    max_repeats: int = 3  # same action in a row that ends a trajectory
    max_tokens: int = 0  # sampled tokens of a trajectory; 0 = as many as fit its context
    tool_deadline_s: float = 120.0  # a tool call that takes longer ends its trajectory as env_failed
    min_pixels: int = 0  # smart-resize limits of a view; 0 = those of the weights' preprocessor_config.json
    max_pixels: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class SegmenterConfig:
    """Where masks come from."""

    mode: str = "spawn"  # spawn: start and supervise a side-car; connect: use `addresses`; inprocess: no bridge
    backend: str = "grabcut"  # sam2: with `checkpoint` (spawn, inprocess); docs/sidecar.md
    checkpoint: str = ""  # sam2's .pt file, or "random" for a test
    model: str = ""  # sam2.1_large, sam2_tiny, …; "" = as the checkpoint's file name says
    device: str = "cpu"  # of sam2: cpu, cuda, cuda:0,cuda:1
    dtype: str = "float32"  # of sam2: or bfloat16
    multimask: str = "point"  # sam2's best of three masks for: a single click (point), never, always
    addresses: tuple[str, ...] = ()  # for connect; an image belongs to one of them while that one answers
    token_file: str = ""  # for connect: the file with the side-cars' token
    tls: bool = False  # for connect: encrypt, trusting the system's certificates
    tls_ca: str = ""  # for connect: encrypt, trusting the certificates in this PEM file
    timeout_s: float = 120.0  # deadline of one call
    wait_s: float = 60.0  # how long an unreachable side-car is waited for
    workers: int = 2  # tool calls at a time


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which samples; rsagent_jax.data.samples.open_samples opens them for every command."""

    root: str = ""
    dataset: str = "refcocog"  # refcoco | refcoco+ | refcocog | grefcoco | reasonseg | folder
    layout: str = "refer"  # of the RefCOCO family: refer (refs(*).p) | tfds (prepared TFDS ref_coco)
    split_by: str = "umd"  # of the RefCOCO family
    split: str = "train"
    unit: str = "sentence"  # RefCOCO family: sentence = every expression is a sample; reference = the first of each
    texts: str = "first"  # ReasonSeg: first | all paraphrases
    raw: bool = False  # RefCOCO family: the annotator's own text, not in lower case
    limit: int = 0  # 0 = all
    exclude: tuple[str, ...] = ()  # refcoco/unc/val, reasonseg/test, …: samples on their pictures are left out
    exclude_root: str = ""  # where those are; "" = root
    mix: tuple[MixPart, ...] = ()  # several sets by weight, in place of the one above


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixPart:
    """One set of a mix; its `data` without a root is under the mix's own."""

    name: str
    weight: float = 1.0  # share of the samples drawn, after division by the sum
    data: DataConfig = DataConfig()


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Device mesh; -1 takes what is left."""

    data: int = 1
    fsdp: int = -1
    tensor: int = 1  # 0 = as the slice's preset says


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW with linear warm-up, then a constant or cosine schedule."""

    lr: float = 1e-6
    warmup_steps: int = 0
    schedule: str = "constant"  # constant | cosine
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    offload: bool = False  # AdamW's moments stay in host memory between updates
    freeze: tuple[str, ...] = ()  # parts that are not trained: vision, merger, decoder, embed, head


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """The fixed shapes of a training batch."""

    rows: int = 16  # over the whole mesh; 0 = as the slice's preset says
    tokens: int = 1024  # T per row
    patches: int = 1024  # P per row, before merging


@dataclasses.dataclass(frozen=True)
class RewardTerm:
    """One term of the reward."""

    function: str  # module:function(trajectory, sample) -> float
    weight: float = 1.0  # inside its group; negative for a cost


@dataclasses.dataclass(frozen=True)
class RewardGroup:
    """Terms weighted and added up, clipped to a range, then weighted in the total."""

    name: str
    weight: float  # in the total
    terms: tuple[RewardTerm, ...]
    clip: tuple[float, ...] = ()  # (low, high) of the sum of the terms; () = no clip


DEFAULT_REWARD = (
    RewardGroup("final", 1.0, (RewardTerm("rsagent_jax.rewards:final_iou"),)),  # group weight: (paper)
    RewardGroup(
        "process",
        0.5,  # (paper); everything below in this group is ours
        (
            RewardTerm("rsagent_jax.rewards:iou_gain", 1.0),
            RewardTerm("rsagent_jax.rewards:call_cost", -0.02),
            RewardTerm("rsagent_jax.rewards:novel_action", 0.1),
            RewardTerm("rsagent_jax.rewards:point_excess", -0.02),
            RewardTerm("rsagent_jax.rewards:overshoot", -1.0),
        ),
        clip=(-1.0, 1.0),
    ),
    RewardGroup("format", 0.2, (RewardTerm("rsagent_jax.rewards:format_ok"),)),  # group weight: (paper)
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How turns are sampled."""

    temperature: float = 1.0  # 0 = greedy
    max_new_tokens: int = 512  # per turn
    context: int = 8192  # tokens of a whole trajectory, images included
    slots: int = 64  # trajectories at a time
    patches: int = 4096  # patches of new images per slot and turn
    top_k: int = 0  # draw from the k likeliest tokens; 0 = from all
    top_p: float = 1.0  # draw from the likeliest tokens of this mass
    stop_ids: tuple[int, ...] = ()  # tokens that end a turn, besides the terminator
    chunk: int = 8  # decode steps per compiled call
    prefill: int = 64  # prompt tokens per lane and compiled call
    lanes: int = 0  # slots that append a prompt at a time; 0 = a quarter of the slots
    kv_dtype: str = ""  # of the cache: int8 halves it; "" = as the activations
    tensor: int = 1  # devices that share a slot's heads; must divide the devices of a process


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReadConfig:
    """How training reads what comes next (rsagent_jax/data/pipeline.py); changes nothing of what that is."""

    threads: int = 4  # samples decoded at a time, per process
    workers: int = 0  # processes that decode, beside each of train.py; 0 = threads only
    ahead: int = 16  # samples decoded before they are asked for


@dataclasses.dataclass(frozen=True, kw_only=True)
class SftConfig:
    """Supervised fine-tuning on stored trajectories."""

    trajectories: str = ""  # directory written by rsagent_jax.collect
    epochs: float = 2.0  # (paper)
    steps: int = 0  # 0 = as many as `epochs` gives
    trajectories_per_step: int = 128  # (paper) batch size
    read: ReadConfig = ReadConfig()
    batch: BatchConfig = BatchConfig()  # of one micro-batch
    optim: OptimConfig = OptimConfig(lr=2e-5)  # (paper)
    checkpoint_every: int = 0  # steps; 0 = only at the end


@dataclasses.dataclass(frozen=True, kw_only=True)
class GrpoConfig:
    """Group-relative policy optimisation."""

    steps: int = 100
    prompts: int = 16  # (paper) per step
    group: int = 4  # (paper) samples per prompt
    updates: int = 1  # optimiser steps per rollout
    advantage: str = "zscore"  # zscore | mean | loo
    ddof: int = 1
    ratio: str = "grpo"  # grpo | gspo | cispo
    clip_low: float = 0.2
    clip_high: float = 0.2
    kl: float = 0.0
    kl_estimator: str = "k3"
    normalize: str = "token"  # token | sequence | constant
    tis_clip: float = 2.0  # truncated importance sampling between engine and trainer; 0 = off
    drop_zero_variance: bool = True  # groups that have nothing to teach are not trained on
    min_spread: float = 0.0  # of a group's rewards; with less it counts as one of those
    mask_overlong: bool = False  # MAX_CONTEXT trajectories are not trained on
    # Of a step's trajectories that called the segmenter: where a larger share failed because of it, the run stops.
    max_env_failed: float = 0.5
    reward: tuple[RewardGroup, ...] = DEFAULT_REWARD
    data: DataConfig = DataConfig()
    read: ReadConfig = ReadConfig()
    batch: BatchConfig = BatchConfig()
    optim: OptimConfig = OptimConfig()
    sampling: SamplingConfig = SamplingConfig()
    checkpoint_every: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters on the decoder's linear maps, trained in place of all other parameters (ours; paper: none)."""

    rank: int = 0  # 0 = no adapters
    alpha: float = 32.0  # an adapter's product counts alpha / rank times
    targets: tuple[str, ...] = ("q", "k", "v", "o", "gate", "up", "down")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyConfig:
    """The policy's weights and numerics."""

    weights: str  # a Hugging Face directory, or a checkpoint directory of train.py
    dtype: str = "bfloat16"  # of activations; parameters stay fp32 in training
    # What the backward pass keeps: none (no remat) | full | attention | selective | dots | save:NAMES | offload:NAMES
    remat: str = "full"  # "" = as the slice's preset says
    attention: str = "auto"  # auto | plain | blocks | splash (TPU) | cudnn (GPU)
    # Of training: layers in a loop, compiled once. False compiles each of them: for a small policy on a CPU a faster
    # step (a seventh in benchmarks/train_step.py), since nothing is copied into and out of the loop's stacks.
    scan_layers: bool = True
    lora: LoraConfig = LoraConfig()  # of training; whoever loads its checkpoints gets merged weights


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """configs/*.py of train.py."""

    seed: int = 0
    stages: tuple[str, ...] = ("sft", "grpo")
    policy: PolicyConfig
    agent: AgentConfig = AgentConfig()
    segmenter: SegmenterConfig = SegmenterConfig()
    slice: str = ""  # v5e-16, v6e-64, …: decides what mesh.tensor, policy.remat and batch.rows leave open
    mesh: MeshConfig = MeshConfig()
    sft: SftConfig = SftConfig()
    grpo: GrpoConfig = GrpoConfig()
    cache_dir: str = ""  # compiled programs are kept here; "" = in the work directory
    profiler_port: int = 0  # every process serves jax.profiler on it (docs/tpu.md); 0 = none


@dataclasses.dataclass(frozen=True, kw_only=True)
class MetricConfig:
    """Conventions in which papers differ, beside data.unit and data.texts. The defaults are LISA's."""

    ignore_policy: str = "excluded"  # ignored pixels: excluded (LISA) | target (Seg-Zero) | background (LENS)
    empty_policy: str = "one"  # IoU where prediction and truth are empty: one (LISA) | zero | dropped (Seg-Zero)
    failure_policy: str = "zero"  # a broken tool: zero, with the whole truth as union | dropped (Seg-Zero)
    ending_policy: str = "mask"  # any other ending than finish: mask = its last one is judged | zero
    epsilon: float = 1e-5  # IoU = I / (U + epsilon); LISA's
    empty_below: int = 0  # a prediction of fewer pixels counts as empty


@dataclasses.dataclass(frozen=True, kw_only=True)
class BoundConfig:
    """A row that bounds the truth in place of the policy's own (rsagent_jax/evals/bounds.py)."""

    row: str = ""  # box | best_of_three | clicks: oracles, without a policy; untrained: the policy; "" = the policy
    prompt: str = "box"  # of best_of_three: the true box, or a click in its middle
    clicks: int = 8  # of clicks: tool calls before the best mask is taken


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """configs/eval_*.py of evaluate.py."""

    benchmark: str = "refcocog"
    seed: int = 0
    policy: PolicyConfig
    agent: AgentConfig = AgentConfig()
    segmenter: SegmenterConfig = SegmenterConfig()
    data: DataConfig = DataConfig(split="val")
    sampling: SamplingConfig = SamplingConfig(temperature=0.0)
    metric: MetricConfig = MetricConfig()
    bound: BoundConfig = BoundConfig()
    cache_dir: str = ""
    examples: int = 12  # trajectories shown in the report


@dataclasses.dataclass(frozen=True, kw_only=True)
class RemoteConfig:
    """An OpenAI-compatible endpoint, such as Qwen2.5-VL-72B behind vLLM."""

    url: str = ""  # such as http://host:8000/v1
    model: str = ""
    key_variable: str = "OPENAI_API_KEY"  # the environment variable that holds the key; may be unset
    temperature: float = 0.7
    max_tokens: int = 512  # per turn
    timeout_s: float = 120.0  # of one request, however slowly it trickles in
    retries: int = 5  # after a refusal, an error of the server, a time-out or half an answer
    backoff_s: float = 1.0  # before the first retry, doubled for each; a Retry-After of the server counts instead
    concurrent: int = 16  # requests at a time
    per_minute: float = 0.0  # requests; 0 = no limit of our own
    price_in: float = 0.0  # per million tokens, for the count of costs
    price_out: float = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class OwnConfig:
    """A policy of our own as the teacher, through the rollout engine: rejection sampling."""

    weights: str = ""  # a Hugging Face directory or checkpoints/<stage> of train.py; "" = teacher.function acts
    tries: int = 4  # trajectories per sample; filter.per_sample says how many of the good ones are kept
    dtype: str = "bfloat16"
    sampling: SamplingConfig = SamplingConfig()  # at temperature 0 all tries are the same


@dataclasses.dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """Who acts: the oracle, which looks at the true mask; rsagent_jax.agent.remote:Remote, which asks `remote`; or
    `own`."""

    function: str = "rsagent_jax.agent.teacher:Oracle"
    remote: RemoteConfig = RemoteConfig()
    own: OwnConfig = OwnConfig()
    box: float = 0.5  # share of first prompts that are boxes; the rest are clicks
    wrong_first: float = 0.25  # share of trajectories whose first guess is wrong on purpose


@dataclasses.dataclass(frozen=True, kw_only=True)
class FilterConfig:
    """Which trajectories are kept; all are stored, so that rsagent_jax.refilter can choose again."""

    min_iou: float = 0.9  # (paper) of the final mask
    max_turns: int = 8  # (paper)
    malformed: bool = False  # turns that could not be read or done are kept
    repeats: bool = False  # turns that do the same as the one before are kept
    per_sample: int = 1  # where a sample was tried several times: good trajectories that are kept, first tries first


@dataclasses.dataclass(frozen=True, kw_only=True)
class CollectConfig:
    """configs/collect_*.py of rsagent_jax.collect."""

    seed: int = 0
    limit: int = 0  # samples to try; 0 = all
    filter: FilterConfig = FilterConfig()
    concurrent: int = 32  # trajectories under way at a time
    records_per_file: int = 1000
    processor: str  # Hugging Face directory with the tokenizer and the image processor
    teacher: TeacherConfig = TeacherConfig()
    agent: AgentConfig = AgentConfig()
    segmenter: SegmenterConfig = SegmenterConfig()
    data: DataConfig = DataConfig()
    workers: int = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProblemsConfig:
    """configs/problems.py of rsagent_jax.problems."""

    seed: int = 0
    limit: int = 0  # objects to ask about; 0 = all
    writer: RemoteConfig = RemoteConfig(temperature=1.0)
    queries: int = 2  # for an object
    min_words: int = 5
    max_words: int = 40
    tries: int = 2  # answers of no use before an object is given up
    picture_size: int = 1024  # longer side of what the writer is shown, pixels
    data: DataConfig = DataConfig()
    workers: int = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class SegmentConfig:
    """configs/segment.py of rsagent_jax.segment: one picture, one sentence."""

    seed: int = 0
    policy: PolicyConfig
    agent: AgentConfig = AgentConfig()
    segmenter: SegmenterConfig = SegmenterConfig(workers=1)
    sampling: SamplingConfig = SamplingConfig(temperature=0.0, slots=1)
    cache_dir: str = ""  # compiled programs are kept here; "" = in the output directory
