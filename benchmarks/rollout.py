"""Rollouts on the CPU: the engine, prefilling every turn anew, and transformers' generate on the same work.

  python benchmarks/rollout.py [--parts=turns,latency,decode,logprobs] [--toy]

A random Qwen2.5-VL of about 100 million parameters in fp32 (vocabulary 32,000) plays with the real driver, environment,
processor and overlays. What it samples (greedy, 32 tokens a turn) goes into its context; the environment hears a
script: seven clicks and a finish, a view of 448 x 448 at the start, an overlay of 168 x 168 after every click. That is
a fifth of a real trajectory (a view of 1,300 tokens, overlays of 196, turns of 100 to 200), in the same proportions.

turns    16 trajectories of 8 turns, 16 at a time; each side in a process of its own, after a run that compiles
  engine        the KV cache lives as long as the trajectory
  reprefill     the same engine, which gets the whole context, images included, at every turn; continuous
                batching too, pieces of 256 tokens
  transformers  Qwen2_5_VLForConditionalGeneration.generate with its cache and sdpa, all 16 turns in one batch
latency  a tool that takes 0.5 s; 32 trajectories, throughput against the engine without latency and half the slots
  hidden        twice as many slots
  synchronous   the same slots, but a step waits until every live trajectory has its observation
decode   ms a token in a cache of 1k and of 8k places with 1k of live context, then with more of it
logprobs the engine's log-probs beside the trainer's, in bf16, with cache or weights or both in int8; of the tiny agent
         on its scenes

The run fails unless all sides' greedy tokens agree (two tokens nearly tied may differ, and what follows them).
vs_reprefill, vs_generate: tokens sampled per second of ours / theirs. On a busy machine read cpu_s instead of seconds.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before jax is imported

import numpy as np  # noqa: E402

from benchmarks._policy_step import QUICK, decode_macro_step, import_torch, raw_config  # noqa: E402
from benchmarks._rollout_policies import Reprefill, Synchronous, Transformers  # noqa: E402
from benchmarks.train_step import GLIBC, random_model  # noqa: E402

PARTS = ("turns", "latency", "decode", "logprobs")
SIDES = ("engine", "reprefill", "transformers")
AGREE = 0.9


@dataclasses.dataclass(frozen=True)
class Work:
    """What is played: sizes of the real run and of the toy."""

    tasks: int = 16
    slots: int = 16
    turns: int = 8
    new_tokens: int = 32
    context: int = 1440
    prefill: int = 96  # tokens of an overlay and its text: a piece takes them whole
    view: int = 448  # pixels
    overlay: int = 168
    tool_s: float = 0.5

    @property
    def patches(self) -> int:
        """Of one turn's new images: the view fills its windows of 8 x 8."""
        return (self.view // 14) ** 2

    @property
    def all_patches(self) -> int:
        """Of a whole trajectory: an overlay has at most 12 x 12, in three bins of 8 x 8."""
        return self.patches + (self.turns - 1) * 192

    @property
    def sizes(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in ("slots", "context", "patches", "new_tokens")}

    @classmethod
    def of(cls, options: argparse.Namespace) -> Work:
        sizes = dict(tasks=3, slots=3, turns=3, new_tokens=4, context=512, view=112, overlay=56)
        return cls(**sizes, tool_s=0.02) if options.toy else cls()


############################## The model and the work ##############################


def write(directory: pathlib.Path, work: Work, *, toy: bool) -> int:
    """A Hugging Face directory whose policy never samples a special token; returns its parameters."""
    from rsagent_jax.models.qwen25_vl import convert
    from rsagent_jax.models.qwen25_vl.config import Qwen25VLConfig
    from rsagent_jax.tiny import vocab

    tokenizer = vocab.build_tokenizer(512)
    vocab.save_tokenizer(tokenizer, directory, 56 * 56, work.view**2)
    ids = tokenizer.get_vocab()
    special = dict(bos="endoftext", eos="im_end", pad="endoftext", image="image_pad", video="video_pad")
    special |= {name: name for name in ("vision_start", "vision_end")}
    raw = raw_config(toy=toy) | {f"{name}_token_id": ids[f"<|{token}|>"] for name, token in special.items()}
    model = random_model(Qwen25VLConfig.from_hf(raw))
    values = convert.flat_params(model)
    embedding = "decoder.embed"
    never = np.array(sorted(ids[token] for token in vocab.SPECIAL))
    # The head is the embedding's: a row of zeros gives a logit of 0, far below the largest of 32,000.
    values[embedding] = values[embedding].at[never].set(0.0)
    convert.save_model(convert.with_params(model, values), directory, raw)
    return sum(int(np.prod(v.shape)) for v in values.values())


class Discs:
    """A disc around the click, after `delay_s`."""

    def __init__(self, delay_s: float):
        self.delay_s = delay_s

    def segment(self, image, request):
        from sam_bridge.types import SegmentReply

        time.sleep(self.delay_s)
        ys, xs = np.mgrid[: image.shape[0], : image.shape[1]]
        ((x, y),) = request.points
        return SegmentReply((xs - x) ** 2 + (ys - y) ** 2 <= 900, 0.9, "", {"total": self.delay_s})


def scripted(policy, segmenter, processor, work: Work, count: int):
    """A driver: ids go into the trajectory as they were sampled, the environment hears clicks and, in the last turn, a
    finish. count: of uids that click in different places."""
    from rsagent_jax.agent.tools import Finish, Segment, render_call
    from rsagent_jax.config.schema import AgentConfig
    from rsagent_jax.rollout.driver import Driver

    class Scripted(Driver):
        def _add(self, run, completion):
            super()._add(run, completion)
            turn = len(run.state.turns)
            if turn == work.turns - 1:
                return render_call(Finish(mask_id=None), "Done.")
            spot = (work.view * (turn + 1.0) / (work.turns + 1), work.view * (run.task.uid % count + 1.0) / (count + 1))
            return render_call(Segment(points=(spot,), labels=(1,), refine=None), "I click.")

    agent = AgentConfig(prompt="brief", history_size=work.overlay, max_turns=work.turns)
    return Scripted(policy, segmenter, processor, agent, workers=max(4, policy.slots))


def make_sample(work: Work, i: int):
    from rsagent_jax.types import Sample

    image = np.random.default_rng(i).integers(0, 256, (work.view, work.view, 3), dtype=np.uint8)
    return Sample(f"s{i}", image, f"disc number {i}", np.zeros((work.view, work.view), bool))


def play(policy, processor, work: Work, delay_s: float = 0.0, tasks: int = 0) -> dict:
    """Seconds, processor seconds, and the sampled ids i32[N, T] of all trajectories."""
    from rsagent_jax.rollout.policy import Task

    count = tasks or work.tasks
    driver = scripted(policy, Discs(delay_s), processor, work, count)
    samples = [Task(make_sample(work, i), i, i) for i in range(count)]
    start, cpu = time.perf_counter(), time.process_time()
    trajectories = [t for t, _ in driver.run(samples)]
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    ids = [t.tokens[t.loss_mask] for t in trajectories]
    if any(len(t.turns) != work.turns for t in trajectories):
        raise SystemExit(f"a trajectory ended early: {[(len(t.turns), t.status.name) for t in trajectories]}")
    tokens = sum(map(len, ids))
    out = {"seconds": seconds, "cpu_s": cpu, "tokens": tokens, "tokens_per_s": tokens / seconds}
    out |= {"context": max(len(t.tokens) for t in trajectories)}
    return out | {"tool_wait": driver.metrics()["rollout/tool_wait"], "ids": np.stack(ids).tolist()}


############################## The sides ##############################


def engine(directory: pathlib.Path, processor, work: Work, **changes):
    import jax

    from rsagent_jax.config.schema import SamplingConfig
    from rsagent_jax.models.qwen25_vl import convert
    from rsagent_jax.rollout.engine import Engine

    settings = dict(temperature=0.0, max_new_tokens=work.new_tokens, context=work.context, slots=work.slots)
    settings |= {"patches": work.patches, "prefill": work.prefill, **changes}
    model = convert.load_model(directory, processor.config)
    # No terminator: every turn takes all its tokens, on all sides.
    overlay = processor.square(work.overlay)
    out = Engine(model, SamplingConfig(**settings), 1 << 30, "float32", jax.random.key(0), overlay=overlay)
    out.warm_up()
    return out


############################## The parts ##############################


def turns(side: str, directory: pathlib.Path, processor, work: Work) -> dict:
    if side == "engine":
        policy = engine(directory, processor, work)
    elif side == "reprefill":
        policy = Reprefill(engine(directory, processor, work, patches=work.all_patches, prefill=256))
    else:
        # Synchronous: the driver would offer it the turns one by one, as their tools end.
        policy = Synchronous(Transformers(directory, **work.sizes))
    if side == "transformers":
        play(policy, processor, work, tasks=1)  # its first call is slower
    return play(policy, processor, work)


def latency(directory: pathlib.Path, processor, work: Work) -> dict:
    half, tasks = work.slots // 2 or 1, 2 * work.tasks
    few, many = (engine(directory, processor, work, slots=n) for n in (half, 2 * half))
    rows = {
        "no latency, half the slots": play(few, processor, work, tasks=tasks),
        "no latency": play(many, processor, work, tasks=tasks),
        "hidden": play(many, processor, work, work.tool_s, tasks),
        "half the slots": play(few, processor, work, work.tool_s, tasks),
        "synchronous": play(Synchronous(many), processor, work, work.tool_s, tasks),
    }
    for row in rows.values():
        row.pop("ids")
    base = rows["no latency, half the slots"]["tokens_per_s"]
    shares = {name: rows[row]["tokens_per_s"] / base for name, row in (("hidden", "hidden"), ("sync", "synchronous"))}
    return {"rows": rows, "latency_hidden": shares["hidden"], "latency_synchronous": shares["sync"]}


def decode(directory: pathlib.Path, processor, work: Work, toy: bool) -> dict:
    """Seconds of a decode step, the median of macro-steps that take turns."""
    slots, steps, repeats = (2, 4, 2) if toy else (8, 16, 9)
    small, large = (512, 1024) if toy else (1024, 8192)
    lives = [small >> 1, small - steps, 2 * small - steps, *(() if toy else (4 * small - steps, large - steps))]
    runs = {}
    for cache in (small, large):
        e = engine(directory, processor, work, context=cache, slots=slots, chunk=steps, prefill=steps)
        runs |= {(cache, live): decode_macro_step(e, live) for live in lives if live + steps <= cache}
    seconds = {key: [] for key in runs}
    for _ in range(repeats + 1):
        for key, run in runs.items():
            start = time.perf_counter()
            count = run()
            seconds[key].append((time.perf_counter() - start) / count)
    median = {key: statistics.median(values[1:]) for key, values in seconds.items()}
    rows = [
        {"cache": c, "live": n, "ms": 1e3 * s, "min_ms": 1e3 * min(seconds[c, n][1:])} for (c, n), s in median.items()
    ]
    live = small - steps
    return {"rows": rows, "large_vs_small_cache": median[large, live] / median[small, live]}


############################## The table ##############################


def one(options: argparse.Namespace) -> dict:
    """What the process of one side or part prints."""
    from rsagent_jax.data.processor import Processor

    directory, work = pathlib.Path(options.dir), Work.of(options)
    if options.side == "transformers":  # before the processor, which would hide torch from transformers
        import_torch()
    processor = Processor.load(directory)
    if options.side in SIDES:
        return turns(options.side, directory, processor, work)
    if options.side == "latency":
        return latency(directory, processor, work)
    if options.side == "logprobs":
        from benchmarks import _rollout_logprobs

        return {"logprobs": _rollout_logprobs.compare(options.toy)}
    return decode(directory, processor, work, options.toy)


def child(side: str, directory: str, options: argparse.Namespace) -> dict:
    command = [sys.executable, __file__, f"--side={side}", f"--dir={directory}", *(["--toy"] if options.toy else [])]
    env = {**os.environ, **GLIBC, "HF_HUB_OFFLINE": "1", **({"XLA_FLAGS": QUICK} if options.toy else {})}
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{side} failed; what it said stands above")
    return json.loads(done.stdout.splitlines()[-1])


def agreement(a: list[list[int]], b: list[list[int]], turn: int) -> float:
    """Of turns whose earlier ones agree, how many agree: after two tokens nearly tied, contexts differ."""
    same = np.array(
        [[x[i : i + turn] == y[i : i + turn] for i in range(0, len(x), turn)] for x, y in zip(a, b, strict=True)]
    )
    before = np.concatenate([np.ones((len(same), 1), bool), np.logical_and.accumulate(same, 1)[:, :-1]], 1)
    return float(same[before].mean())


def compare_turns(directory: str, options: argparse.Namespace) -> dict:
    rows = {side: child(side, directory, options) for side in SIDES}
    ids = {side: row.pop("ids") for side, row in rows.items()}
    agree = {side: agreement(ids["engine"], ids[side], Work.of(options).new_tokens) for side in SIDES[1:]}
    print(f"{'':14}{'seconds':>9}{'cpu_s':>9}{'tokens/s':>10}   turns that agree with the engine's")
    for side, row in rows.items():
        print(
            f"{side:14}{row['seconds']:9.2f}{row['cpu_s']:9.2f}{row['tokens_per_s']:10.1f}   {agree.get(side, 1):.1%}"
        )
    if not min(agree.values()) >= AGREE:
        raise SystemExit(f"the sides do not sample the same: {agree}")
    rates = {side: row["tokens_per_s"] for side, row in rows.items()}
    cpu = {side: row["cpu_s"] for side, row in rows.items()}
    return {
        "vs_reprefill": rates["engine"] / rates["reprefill"],
        "vs_generate": rates["engine"] / rates["transformers"],
        "vs_reprefill_cpu": cpu["reprefill"] / cpu["engine"],
        "vs_generate_cpu": cpu["transformers"] / cpu["engine"],
        "agree": agree,
        "turns": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--toy", action="store_true", help="a tiny model and little work: checks, times nothing")
    for name in ("side", "dir"):
        parser.add_argument(f"--{name}", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        print(json.dumps(one(options)))
        return
    parts = options.parts.split(",")
    if wrong := set(parts) - set(PARTS):
        raise SystemExit(f"--parts: {', '.join(wrong)} is none of {', '.join(PARTS)}")
    summary = {"load": os.getloadavg()[0], "cores": len(os.sched_getaffinity(0))}
    with tempfile.TemporaryDirectory() as directory:
        summary["parameters"] = write(pathlib.Path(directory), Work.of(options), toy=options.toy)
        if "turns" in parts:
            summary |= compare_turns(directory, options)
        if "latency" in parts:
            found = child("latency", directory, options)
            for name, row in found.pop("rows").items():
                print(
                    f"{name:28}{row['seconds']:9.2f} s{row['tokens_per_s']:10.1f} tokens/s, {row['tool_wait']:.0%} idle"
                )
            summary |= found
        if "decode" in parts:
            found = child("decode", directory, options)
            for row in found["rows"]:
                print("cache {cache:5} live {live:5} {ms:9.2f} ms a decode step, {min_ms:.2f} at best".format(**row))
            summary |= {"large_vs_small_cache": found["large_vs_small_cache"], "decode": found["rows"]}
        if "logprobs" in parts:
            found = child("logprobs", directory, options)
            print(f"{'nats from the trainer':24}{'mean':>10}{'max':>10}{'KL':>11}{'ess':>9}{'tokens':>8}")
            for name, r in found["logprobs"].items():
                figures = f"{r['mean']:10.5f}{r['max']:10.4f}{r['kl']:11.2e}{r['ess']:9.5f}{r['tokens']:8.0f}"
                print(f"{name:24}{figures}")
            summary |= found
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
