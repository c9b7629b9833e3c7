"""Writes docs/scaling.md: what fits on which slice, what bounds it, which remat policy to take.

  python -m rsagent_jax.aot.scaling --results=docs/scaling.jsonl --out=docs/scaling.md [--only=7b:v5e]

Every line of the table is one call of `train.py --aot`, so that anybody can repeat it. A call takes minutes; its report
is added to --results, and what stands there for rows of TOKENS is not compiled again. Interrupt and go on as you like.
"""

from __future__ import annotations

from rsagent_jax.runtime import command

if __name__ == "__main__":
    command.start_command()

import json
import pathlib
import subprocess
import sys
from collections.abc import Iterator

from rsagent_jax.aot.topology import GIB, TABLE, parse_topology
from rsagent_jax.runtime.journal import write_whole

FULLY = ":fully"  # ends the name of a line that was compiled without --aot_quick
TOKENS = 6144  # of a row and of a slot: configs/sft_tpu.py and grpo_tpu.py; lines of other lengths are compiled again
EARLIER = 4096  # of lines that do not say
SLOTS = {"v5e-16": 32, "v6e-8": 128, "v5p-8": 256}  # of a host, beside the training state of the 7B
WEIGHTS = {"3b": "Qwen2.5-VL-3B-Instruct", "7b": "Qwen2.5-VL-7B-Instruct", "72b": "Qwen2.5-VL-72B-Instruct"}


def calls() -> Iterator[tuple[str, list[str]]]:
    """(name, arguments of train.py) of every line, most wanted first."""
    for size in ("7b", "3b"):
        for stage, remat in (("sft", "full"), ("grpo", "full"), ("sft", "selective")):
            for name in TABLE:
                yield _call(size, name, stage, remat)
        if size == "7b":
            for name in ("v5p-256", "v6e-256"):
                yield _call("72b", name, "sft", "full")
    for name, slots in SLOTS.items():
        yield _rollout_call("7b", name, slots)
    for name in ("v6e-8", "v5e-16", "v5p-8"):
        yield _call("7b", name, "sft", "full", quick=False)


def _call(size: str, name: str, stage: str, remat: str, quick: bool = True) -> tuple[str, list[str]]:
    arguments = [
        f"--config=configs/{stage}_tpu.py",
        f"--config.policy.weights={WEIGHTS[size]}",
        f"--config.policy.remat={remat}",
        f"--config.slice={name}",
        f"--aot={name}",
        f"--aot_quick={str(quick).lower()}",
    ]
    arguments += ["--aot_only=grpo"] * (stage == "grpo")
    return f"{size}:{name}:{stage}:{remat}" + ("" if quick else FULLY), arguments


def _rollout_call(size: str, name: str, slots: int) -> tuple[str, list[str]]:
    arguments = [a for a in _call(size, name, "grpo", "full")[1] if not a.startswith("--aot_only")]
    arguments += [f"--config.grpo.sampling.slots={slots}"]
    return f"{size}:{name}:rollout:{slots}", [*arguments, "--aot_only=rollout"]


def compile_missing(results: pathlib.Path, only: str) -> None:
    lines = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    have = {line["name"] for line in lines if line.get("tokens") == TOKENS}
    for name, arguments in calls():
        if name in have or only not in name:
            continue
        done = subprocess.run([sys.executable, "train.py", *arguments], capture_output=True, text=True, check=False)
        if done.returncode not in (0, 3):
            print(
                f"{name}: {done.stderr.strip().splitlines()[-1] if done.stderr.strip() else 'failed'}", file=sys.stderr
            )
            continue
        reports = json.loads(done.stdout.splitlines()[-1])
        lines = [line for line in lines if line["name"] != name]
        lines.append({"name": name, "tokens": TOKENS, "arguments": arguments, "reports": reports})
        write_whole(results, "".join(json.dumps(line) + "\n" for line in lines))
        print(f"{name}: peak {max(r['peak_hbm_bytes'] for r in reports) / GIB:.2f} GiB", flush=True)


def scaling_page(lines: list[dict]) -> str:
    """The Markdown of the whole page from the results' lines."""
    out = [HEAD.strip(), ""]
    by = {line["name"]: line for line in lines}
    for stage, title in (("sft", "SFT"), ("grpo", "GRPO")):
        for size in WEIGHTS:
            names = [name for name, _ in calls() if name.startswith(f"{size}:") and f":{stage}:" in name]
            rows = [_row(name, by[name]) for name in names if name in by and not name.endswith(FULLY)]
            if rows:
                out += [f"## {title}, {size.upper()}", "", *COLUMNS, *rows, ""]
    rollouts = [_rollout_row(name, by[name]) for name, _ in calls() if ":rollout:" in name and name in by]
    if rollouts:
        out += ["## Rollouts, 7B", "", ROLLOUT_HEAD.strip(), "", *ROLLOUT_COLUMNS, *rollouts, ""]
    pairs = [(name, name.removesuffix(FULLY)) for name in by if name.endswith(FULLY)]
    fully = [f for f, quick in pairs if quick in by and by[f].get("tokens") == by[quick].get("tokens")]
    if fully:
        pairs = [_row(n, by[n], how) for f in fully for n, how in ((f, "fully"), (f.removesuffix(FULLY), "quick"))]
        out += ["## Compiled fully and with --aot_quick: SFT, 7B", "", *COLUMNS, *pairs, ""]
    missing = [name for name, _ in calls() if by.get(name, {}).get("tokens") != TOKENS]
    if missing:
        out += [f"## Not compiled yet with {TOKENS:,} tokens", "", ", ".join(f"`{name}`" for name in missing), ""]
    return "\n".join(out)


COLUMNS = (
    (
        "| slice | remat | tokens | peak GiB | of | fits | compiled / model FLOPs | ICI GiB | projected s | MFU"
        " | bound by |"
    ),
    "|---|---|---|---|---|---|---|---|---|---|---|",
)


def _row(name: str, line: dict, how: str = "") -> str:
    _, where, _, remat = name.removesuffix(FULLY).split(":")
    first = line["reports"][0]
    peak = max(r["peak_hbm_bytes"] for r in line["reports"])
    fits = "yes" if all(r["fits"] for r in line["reports"]) else "**no**"
    tokens = f"{line.get('tokens', EARLIER):,}"
    cells = [
        where,
        f"{remat}, {how}" if how else remat,
        tokens,
        f"{peak / GIB:.2f}",
        f"{first['hbm_bytes'] / GIB:.2f}",
        fits,
    ]
    if first["projected_step_s"]:
        cells += [
            f"{first['hlo_to_model_flops']:.2f}",
            f"{sum(first['collective_bytes'].values()) / GIB:.1f}",
            f"{first['projected_step_s']:.2f}",
            f"{first['projected_mfu']:.0%}",
            first["bound_by"],
        ]
    else:
        cells += ["-"] * 4 + ["memory"]
    return "| " + " | ".join(cells) + " |"


ROLLOUT_COLUMNS = (
    (
        "| slice | tensor | tokens a slot | slots a host (a device) | weights | cache | training | peak GiB | of | fits"
        " | GiB a step | ratio | projected tokens/s a host | a slice |"
    ),
    "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
)


def _rollout_row(name: str, line: dict) -> str:
    _, where, _, _ = name.split(":")
    reports = {r["program"].removeprefix("rollout "): r for r in line["reports"]}
    decode, fullest = reports["decode"], max(line["reports"], key=lambda r: r["peak_hbm_bytes"])
    d, topology = decode["decoding"], parse_topology(where)
    a_device = d["slots"] * d["tensor"] // d["devices"]
    cells = [where, str(d["tensor"]), f"{d['places']:,}", f"{d['slots']} ({d['slots'] / d['devices']:g})"]
    sizes = (d["weight_bytes"], a_device * d["slot_bytes"], d["training_bytes"])
    cells += [f"{size / GIB:.2f}" for size in sizes]
    peak = f"{fullest['peak_hbm_bytes'] / GIB:.2f} ({fullest['program'].removeprefix('rollout ')})"
    fits = "yes" if all(r["fits"] for r in line["reports"]) else "**no**"
    cells += [peak, f"{decode['hbm_bytes'] / GIB:.2f}", fits]
    if d["step_bytes"]:
        rate = d["projected_tokens_per_s"]
        cells += [f"{d['step_bytes'] / GIB:.2f}", f"{d['step_bytes'] / d['needed_bytes']:.2f}", f"{rate:.0f}"]
        cells.append(f"{rate * topology.devices / d['devices']:.0f}")
    else:
        cells += ["-"] * 4
    return "| " + " | ".join(cells) + " |"


ROLLOUT_HEAD = """
Every process runs the engine of `rsagent_jax/rollout` on the devices of its own host, so these programs are compiled
for one host: 4 devices of v5e-16, 8 of v6e-8, 4 of v5p-8. All figures are per device unless said otherwise.

- Tensor: devices that share a slot's heads, the smallest power of two at which weights and the slots for a step's
  trajectories fit (16 prompts x 4 samples, shared by the hosts). Tokens a slot: of live context, as many as a
  trajectory may have. Slots a host: compiled at this number; room for a piece of a prompt is added.
- Weights and cache: the engine's, bf16. Training: what train.py holds on the device meanwhile: fp32 parameters, AdamW
  moments and the reference policy in bf16. It gives the engine's memory back before the update, and the batches and the
  copy that the weights were made from before the rollout.
- Peak: the fullest of four programs, training included: the weights from the training parameters, the vision tower on a
  full buffer of every lane, a macro-step with a piece of prompt in every lane, one without. (A fifth program appends a
  piece and samples nothing; it is the first part of the third.)
- GiB a step: HBM traffic of a decode step, reads and writes, with every slot full of live tokens. Ratio: that over
  what must be read: the decoder's weights and head once, and the live cache. The target is 1.15 at most.
- Projected tokens/s: slots over the time of a decode step by the bound below, at full slots of live tokens, tools
  and prompts left out. **No device ran it.** Shorter contexts read less, prompts and waiting for tools take more.
"""


HEAD = """
# What fits where

Generated by `python -m rsagent_jax.aot.scaling`; do not edit. Nothing here was run on a TPU: the TPU compiler compiled
the real programs of `train.py` for a described slice (`train.py --config=configs/sft_tpu.py --aot=v6e-8 --aot_quick`),
and these are its figures.

- `--aot_quick` leaves out what the compiler does for speed alone, and takes a fifth of the time. FLOPs and bytes sent
  are those of the full compilation. HBM traffic is higher, and with it the projected time where that bounds it; peak
  memory is lower by up to a tenth. Lines compiled both ways stand in the last section: leave that much room.
  The tightest, gradients of GRPO for the 7B on v5e-16, compiled fully: 15.54 of 15.75 GiB.
- A row is one sequence that fills it. `tokens` says of how many: those of 6,144 (text, images of 16,384 patches) are
  what configs/sft_tpu.py and grpo_tpu.py ask for now; those of 4,096 (14,336 patches; of rollouts, 8,192) stand from
  earlier versions of the project. A longer row needs more: GRPO of the 7B on v5e-16, with one row per device, went from
  14.14 to 15.22 GiB, so there a pair of devices shares a row now. Repeat a line before you rent by it:
  `python -m rsagent_jax.aot.scaling --only=7b:v5e-64`.
- A micro-batch has one row per device, or per pair of devices on v5e-16 and slices of 256 (`mesh.tensor = 2`).
- Peak: the fullest of the stage's programs (gradients of a micro-batch, log-probabilities of the reference policy,
  update), with what stays on the device meanwhile. fp32 parameters and AdamW moments, bf16 activations, all parameters
  trained. The rollout's programs have a section of their own: the engine's weights and cache are gone by the update.
- Compiled / model FLOPs, ICI traffic, time and MFU: of one micro-batch's gradients. Model FLOPs halve causal attention,
  include the vision tower, and count a row without padding; a real batch has some. remat `full` computes the forward
  pass twice: 1.33 at best. `selective` keeps the results of attention and of the MLP's two wide products.
- The projected time is the largest of arithmetic at peak, HBM traffic and ICI traffic at full bandwidth, as if they
  overlapped entirely. It is a bound, not a forecast: well-tuned text models reach 45 to 65% MFU.
"""


def main(
    *,
    results: str = "docs/scaling.jsonl",  # one report per line; read, and added to
    out: str = "docs/scaling.md",  # the page to write
    only: str = "",  # compile only what has this in its name (size:slice:stage:remat)
    compile: bool = True,  # --nocompile: only write the page from what is there
) -> None:
    results, out = pathlib.Path(results), pathlib.Path(out)
    if compile:
        compile_missing(results, only)
    lines = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    out.write_text(scaling_page(lines) + "\n", encoding="utf-8")
    print(f"wrote {out}: {len(lines)} of {len(list(calls()))} lines")
