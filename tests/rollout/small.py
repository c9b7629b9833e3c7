"""A small random policy on disk, samples, scripts and fakes: what the tests of rollouts, batches and training share.

Everything is made once per process and deterministic. Scripts are written as calls; `act` makes the turn's text.
"""

import dataclasses
import functools
import itertools
import json
import pathlib
import shutil
import tempfile
import threading
import time
import typing

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
from agent_fakes import DiscSegmenter, disc, make_image
from flax import nnx

from rsagent_jax.agent.environment import EnvState
from rsagent_jax.agent.tools import Finish, Segment, Zoom, render_call
from rsagent_jax.config.reward import RewardGroup, RewardTerm
from rsagent_jax.config.schema import (
    AgentConfig,
    BatchConfig,
    GrpoConfig,
    OptimConfig,
    PolicyConfig,
    SamplingConfig,
    SftConfig,
    TrainConfig,
)
from rsagent_jax.data import trajectories
from rsagent_jax.data.packing import Item
from rsagent_jax.data.processor import Processor
from rsagent_jax.models.qwen25_vl import convert
from rsagent_jax.models.qwen25_vl.compute import Compute
from rsagent_jax.models.qwen25_vl.config import Qwen25VLConfig, read_json
from rsagent_jax.models.qwen25_vl.model import Qwen25VL
from rsagent_jax.models.qwen25_vl.positions import merged_tokens, mrope_positions
from rsagent_jax.rollout import jobs
from rsagent_jax.rollout.driver import Driver
from rsagent_jax.rollout.engine import Engine
from rsagent_jax.rollout.policy import Task, TextPolicy
from rsagent_jax.tiny import vocab
from rsagent_jax.types import Batch, Completion, Sample, Status, Trajectory, Turn
from sam_bridge.types import SegmentReply

# Programs are compiled fast rather than well: compiling is most of the time of these tests.
jax.config.update("jax_disable_most_optimizations", True)

VOCAB = 512
AGENT = AgentConfig(prompt="brief", history_size=84)
COMPUTE = Compute()
BATCH = BatchConfig(rows=2, tokens=640, patches=320)
IMAGE = (1, 4, 4)  # the grid of the images of `trajectory`
SAMPLING = SamplingConfig(temperature=1.0, max_new_tokens=6, context=512, slots=3, patches=128)

_keep: list[tempfile.TemporaryDirectory] = []  # removed when the process ends


def assert_as_declared(boundary) -> None:
    """The arrays of a dataclass have the dtypes and shapes of its fields, an axis of one name being one length."""
    with jaxtyping.jaxtyped("context"):
        for name, hint in typing.get_type_hints(type(boundary)).items():
            assert not hasattr(hint, "dim_str") or isinstance(getattr(boundary, name), hint), (name, hint)


def raw_config(hidden: int = 32, layers: int = 2, heads: int = 2, kv_heads: int = 2) -> dict:
    """config.json: the shipped base's in other sizes, with windows of 56 pixels: an image of 112 has several."""
    raw, ids, head = read_json(vocab.BASE / "config.json"), tokenizer().get_vocab(), hidden // heads
    special = dict(bos="endoftext", eos="im_end", image="image_pad", video="video_pad")
    special |= {name: name for name in ("vision_start", "vision_end")}
    vision = dict(hidden_size=32, intermediate_size=48, num_heads=min(heads, 4), out_hidden_size=hidden, window_size=56)
    sizes = dict(num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads)
    return raw | {
        "torch_dtype": "float32",
        "vocab_size": VOCAB,
        "hidden_size": hidden,
        "intermediate_size": 48,
        **sizes,
        "rope_scaling": {"type": "mrope", "mrope_section": [head // 8, head // 8, head // 4]},
        "tie_word_embeddings": False,
        **{f"{name}_token_id": ids[f"<|{token}|>"] for name, token in special.items()},
        "vision_config": raw["vision_config"] | vision | {"depth": 2, "fullatt_block_indexes": [1]},
    }


@functools.cache
def tokenizer():
    return vocab.build_tokenizer(VOCAB)


@functools.cache
def weights(hidden: int = 32, layers: int = 2, heads: int = 2, kv_heads: int = 2) -> pathlib.Path:
    """A Hugging Face directory with random weights that now and then end a turn."""
    _keep.append(folder := tempfile.TemporaryDirectory())
    path = pathlib.Path(folder.name)
    vocab.save_tokenizer(tokenizer(), path, 56 * 56, 112 * 112)
    raw = raw_config(hidden, layers, heads, kv_heads)
    model, rng = convert.abstract_model(Qwen25VLConfig.from_hf(raw)), np.random.default_rng(0)
    values = {k: rng.normal(k.endswith("scale"), 0.2, v.shape) for k, v in convert.flat_params(model).items()}
    values["decoder.lm_head"][raw["eos_token_id"]] *= 6
    values = {k: jnp.asarray(v, jnp.float32) for k, v in values.items()}
    convert.save_model(convert.with_params(model, values), path, raw)
    return path


def policy_files(directory: pathlib.Path, changes: dict[str, dict] | None = None) -> pathlib.Path:
    """The JSON files of `weights` without the tensors; `changes`: of values, None removes one, by file name."""
    for path in weights().glob("*.json"):
        shutil.copyfile(path, directory / path.name)
    for name, values in (changes or {}).items():
        raw = json.loads((directory / name).read_text()) | values
        (directory / name).write_text(json.dumps({key: value for key, value in raw.items() if value is not None}))
    return directory


@functools.cache
def processor() -> Processor:
    return Processor.load(weights())


def model(**shape: int) -> Qwen25VL:
    """A fresh copy: training donates parameters. `shape`: of `raw_config`."""
    return convert.load_model(weights(**shape), Qwen25VLConfig.from_hf(raw_config(**shape)))


def eager_params():
    """Parameters of the same policy, which now also samples the image token every few tokens."""
    network = model()
    values = convert.flat_params(network)
    gain = np.ones((VOCAB, 1), np.float32)
    gain[processor().image_id] = 6.0
    return split(convert.with_params(network, values | {"decoder.lm_head": values["decoder.lm_head"] * gain}))[1]


def engine(seed: int = 0, **sampling) -> Engine:
    settings = dataclasses.replace(SAMPLING, **sampling)
    return Engine(model(), settings, processor().terminator_id, "float32", jax.random.key(seed))


def sample(i: int, h: int = 112, w: int = 112) -> Sample:
    return Sample(f"s{i}", make_image(h, w, seed=i), f"disc number {i}", disc(h, w, w / 2, h / 2, 14))


def task(i: int, uid: int | None = None, h: int = 112, w: int = 112) -> Task:
    return Task(sample(i, h, w), i, i if uid is None else uid)


def store(directory: pathlib.Path, tasks: list[Task], scripts: dict) -> pathlib.Path:
    """Plays the scripts and stores the trajectories as SFT reads them."""
    policy, writer = TextPolicy(scripted(scripts), processor()), trajectories.RecordWriter(directory)
    for t, state in Driver(policy, DiscSegmenter(), processor(), AGENT).run(tasks):
        writer.write(trajectories.encode_by_reference(state, "", {}, t))
    writer.close({})
    return directory


def click(x: float, y: float, refine: int | None = None) -> str:
    return render_call(Segment(points=((x, y),), labels=(1,), refine=refine), "I click.")


def zoom(*box: float) -> str:
    return render_call(Zoom(box=box), "I look closer.")


def finish(mask_id: int | None) -> str:
    return render_call(Finish(mask_id=mask_id), "Done.")


THREE_IMAGES = (click(30, 40), zoom(20, 20, 90, 80), click(50, 40), finish(2))


def scripted(scripts: dict[str, list[str] | tuple[str, ...]]):
    """`act` of a TextPolicy: each sample's turns by its id."""

    def act(task: Task, state: EnvState) -> str:
        return scripts[task.sample.id][len(state.turns)]

    return act


class EchoDriver(Driver):
    """The policy's own ids go into the trajectory, the environment hears a script: a random policy calls no tools."""

    def __init__(self, *args, script, **kwargs):
        super().__init__(*args, **kwargs)
        self.script = script

    def _add(self, run, completion: Completion) -> str:
        super()._add(run, completion)
        return self.script(run.task, run.state)

    def take_up(self, run):
        run = super().take_up(run)
        if run.text:  # of a turn whose tool is asked again
            run.text = self.script(run.task, run.state)
            run.acts = functools.partial(self._act, run.state, run.text, *run.acts.args[2:])
        return run


def count_compiles() -> list[str]:
    """A list that grows with every program that is compiled from now on."""
    found = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, seconds, **_: found.append(name) if "backend_compile" in name else None
    )
    return found


class ToolClock:
    """For the deadlines of tools: `skip` makes overdue whatever runs then, and what is only slow never is."""

    def __init__(self, monkeypatch):
        self.ahead = 0.0
        monkeypatch.setattr(jobs, "time", self)

    def monotonic(self) -> float:
        return time.monotonic() + self.ahead

    def skip(self) -> None:
        self.ahead += 1000.0


class BrokenSegmenter(DiscSegmenter):
    """Hangs until `woken`, after `hung`, raises, or answers with garbage, as `how` says of a picture's shape."""

    def __init__(self, how: dict[tuple[int, int], str]):
        super().__init__()
        self.how, self.woken, self.hung = how, threading.Event(), lambda: None

    def segment(self, image, request):
        how = self.how.get(image.shape[:2])
        if how is None:
            return super().segment(image, request)
        if how == "hangs":
            self.hung()
            self.woken.wait(60)
        if how == "raises":
            raise RuntimeError("out of cheese")
        return SegmentReply(np.zeros((3, 3), bool), 0.5) if how == "small" else None


class SlowSegmenter(DiscSegmenter):
    """Waits `delay_s` for pictures of one size; keeps how many calls ran at a time."""

    def __init__(self, delay_s: float, slow_shape: tuple[int, int]):
        super().__init__()
        self.delay_s, self.slow_shape = delay_s, slow_shape
        self.lock, self.running, self.most = threading.Lock(), 0, 0

    def segment(self, image, request):
        with self.lock:
            self.running += 1
            self.most = max(self.most, self.running)
        try:
            time.sleep(self.delay_s if image.shape[:2] == self.slow_shape else 0)
            with self.lock:
                return super().segment(image, request)
        finally:
            with self.lock:
                self.running -= 1


class IdleSegmenter(SlowSegmenter):
    """Its time begins when the driver has nothing to do but to wait for it. `jobs` stands in place of the driver's."""

    def __init__(self, delay_s: float, slow_shape: tuple[int, int]):
        super().__init__(delay_s, slow_shape)
        self.idle = threading.Event()

    def jobs(self, workers: int, deadline_s: float) -> jobs.Jobs:
        made = jobs.Jobs(workers, deadline_s)
        take = made.take
        made.take = lambda *, wait: (wait and self.idle.set(), take(wait=wait))[1]
        return made

    def segment(self, image, request):
        self.idle.clear()
        self.idle.wait(60)
        return super().segment(image, request)


def item(trajectory: Trajectory, advantage: float = 0.0) -> Item:
    t = trajectory
    return Item(t.tokens, t.positions, t.loss_mask, t.logprobs, t.patches, t.grids, advantage)


def places_of(batch: Batch, trajectory: Trajectory) -> np.ndarray:
    """bool[B, T]: where the batch has it, which must be once."""
    rows = np.arange(len(batch.tokens))[:, None]
    segments = itertools.product(range(len(rows)), range(1, batch.segment_ids.max() + 1))
    places = ((rows == row) & (batch.segment_ids == segment) for row, segment in segments)
    (found,) = [here for here in places if np.array_equal(batch.tokens[here], trajectory.tokens)]
    return found


def random_item(seed: int, texts: tuple[int, ...], grids=(), advantage: float = 0.0) -> Item:
    """Text, image, text, …: texts[i] random ids before image i. About half of the text ids count as sampled."""
    rng, image = np.random.default_rng(seed), processor().config.image_token_id
    parts = [rng.integers(0, 400, n) for n in texts]
    images = [np.full(merged_tokens(g), image) for g in grids]
    tokens = np.concatenate([p for pair in itertools.zip_longest(parts, images, fillvalue=[]) for p in pair])
    tokens = tokens.astype(np.int32)
    sampled = (rng.random(len(tokens)) < 0.5) & (tokens != image)
    sampled[0] = False
    size = (sum(int(np.prod(g)) for g in grids), processor().config.vision.patch_dim)
    patches = rng.normal(size=size).astype(np.float32)
    logprobs = np.where(sampled, rng.normal(-2, 0.3, len(tokens)), 0).astype(np.float32)
    positions, _ = mrope_positions(tokens, tuple(grids), image)
    return Item(tokens, positions, sampled, logprobs, patches, tuple(grids), advantage)


def flat(state) -> dict[str, np.ndarray]:
    """Parameters or adapters by dotted path, on the host."""
    return {name: np.asarray(value) for name, value in convert.flat_state(state).items()}


def train_config(
    stored, prompts: int, rows: int, optim: OptimConfig, steps: int, *, sampling=(), **grpo
) -> TrainConfig:
    """Both stages of a tiny policy in fp32; `grpo`: what else its group says."""
    batch = BatchConfig(rows=rows, tokens=400, patches=128)
    shared = dict(steps=steps, batch=batch, optim=optim)
    return TrainConfig(
        seed=3,
        policy=PolicyConfig(weights=str(weights()), dtype="float32", remat="none"),
        agent=AGENT,
        sft=SftConfig(trajectories=str(stored), **shared),
        grpo=GrpoConfig(
            prompts=prompts,
            group=2,
            kl=0.05,
            reward=(RewardGroup("words", 1.0, (RewardTerm("tests.rollout.small:word_count"),)),),
            sampling=dataclasses.replace(SAMPLING, patches=64, **dict(sampling)),
            **shared,
            **grpo,
        ),
    )


def split(network: Qwen25VL):
    return nnx.split(network, nnx.Param)


def word_count(trajectory: Trajectory, sample: Sample) -> float:
    """A reward that differs between any two trajectories: a stand-in named in configs."""
    return float(np.mean(trajectory.tokens[trajectory.loss_mask])) / VOCAB


def engine_trajectories(
    tasks, scripts, seed: int = 0, eng: Engine | None = None, segmenter=None, **sampling
) -> list[Trajectory]:
    """Trajectories of the random policy in an environment that hears `scripts`.

    No last turn is announced, so that a larger context changes nothing of them.
    """
    eng, agent = eng or engine(seed, **sampling), dataclasses.replace(AGENT, announce_last=False)
    driver = EchoDriver(eng, segmenter or DiscSegmenter(), processor(), agent, workers=2, script=scripted(scripts))
    return [t for t, _ in driver.run(tasks)]


def trajectory(
    i: int, radius: float, n: int = 20, status=Status.FINISHED, group: int = 0, images: int = 1
) -> Trajectory:
    """One turn of `n` sampled tokens after `images` images of 16 patches; the mask is a disc of `radius`."""
    image_id = processor().image_id
    tokens = np.array([7] + [image_id] * images * merged_tokens(IMAGE) + [11 + i] * n, np.int32)
    mask = disc(56, 56, 28, 28, radius)
    return Trajectory(
        sample_id=f"s{i}",
        group_id=group,
        query="q",
        turns=(Turn("", Finish(None), None, None),) if n else (),
        masks=(),
        final_mask=mask,
        final_mask_id=None,
        status=status,
        tokens=tokens if n else np.zeros(0, np.int32),
        positions=mrope_positions(tokens, (IMAGE,) * images, image_id)[0] if n else np.zeros((3, 0), np.int32),
        loss_mask=tokens == 11 + i if n else np.zeros(0, bool),
        logprobs=np.where(tokens == 11 + i, -1.5, 0).astype(np.float32) if n else np.zeros(0, np.float32),
        patches=np.ones((16 * images, 1176), np.float32) if n else np.zeros((0, 1176), np.float32),
        grids=(IMAGE,) * images if n else (),
        seconds={"tool": 0.5, "policy": 0.1},
    )
