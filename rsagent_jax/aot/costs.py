"""Hours and chip-hours of each stage on a slice, projected from compiled programs. No TPU ran any of it.

  python -m rsagent_jax.aot.costs [--prices=v5e=1.5,v6e=3] [--mfu=0.4] [--bandwidth=0.5] [--out=docs/tpu.md]

Reads the lines that aot/scaling.py compiled for rows of its TOKENS and prints a table in Markdown; with --out it takes
the place of the table on that page. A stage is the work of the full-size configs:

  SFT         5,000 trajectories, 2 epochs, batches of 128, a full row each
  GRPO        1,000 steps of 16 prompts x 4 samples: rollouts, gradients and the reference's log-probs of a full row
              each, an update; without the wait for tools
  evaluation  each of the 58,436 sentences and texts of RefCOCO, RefCOCO+, RefCOCOg (UMD) and ReasonSeg once: one policy
  collection  10,000 trajectories, of which half have to pass the filter for 5,000 (a guess)

A trajectory is the typical one of agent/budget.py: 8 turns of 150 tokens about a 1920 x 1080 picture, seven masks.

A training program takes its roofline (aot/report.py), or its model FLOPs at `mfu` of the peak if that is longer.
Rollouts take their roofline over `bandwidth`, because HBM bounds them.
"""

from rsagent_jax.runtime import command

if __name__ == "__main__":
    command.start_command()

import dataclasses
import math
import pathlib
from collections.abc import Iterator

from rsagent_jax.aot.scaling import ENGINE, TOKENS, read_results
from rsagent_jax.aot.topology import CHIPS, Topology, parse_topology
from rsagent_jax.config.ranges import Mass
from rsagent_jax.config.slices import PRESETS
from rsagent_jax.types import DataError

BEGIN, END = "<!-- python -m rsagent_jax.aot.costs --out=docs/tpu.md -->", "<!-- end of costs -->"
SFT_TRAJECTORIES, EPOCHS, BATCH = 5_000, 2, 128  # the paper's, and of trajectories "more than 5,000"
GRPO_STEPS, GRPO_TRAJECTORIES = 1_000, 16 * 4  # the paper's batch; of steps configs/grpo_tpu.py's
# RefCOCO and RefCOCO+ val, testA and testB, RefCOCOg val and test, ReasonSeg val and test; data_check.py has the source
EVALUATED = (10_834 + 5_657 + 5_095) + (10_758 + 5_726 + 4_889) + (4_896 + 9_602) + (200 + 779)
COLLECTED = 10_000
# A trajectory's tokens that are sampled and that are appended, and patches of its eight images (1,222 + 7 x 112 tokens)
SAMPLED, APPENDED, PATCHES = 8 * 150, 4_477 - 8 * 150, 4 * (1_222 + 7 * 112)
PLAYING = {f"rollout {name}" for name in ("weights", "encode", "append", "decode")}
PIECE, BUFFER = 64, 6_144  # sampling.prefill and sampling.patches of the configs


@dataclasses.dataclass(frozen=True)
class Assumptions:
    """What a compiler cannot tell."""

    mfu: float = 0.4  # of the bf16 peak that training reaches
    bandwidth: float = 0.5  # of the HBM's, and with it of the roofline, that rollouts reach


@dataclasses.dataclass(frozen=True)
class Cost:
    size: str
    stage: str
    slice: str
    unit_seconds: float  # of a step in training, of a trajectory in evaluation and collection, over the whole slice
    hours: float
    programs: str  # that were compiled


def program_seconds(report: dict, topology: Topology, assumed: Assumptions) -> float:
    """Of one run of a training program."""
    peak = report["devices"] * topology.chip.bf16_flops
    return max(report["projected_step_s"], report["model_flops"] / (assumed.mfu * peak))


def step_seconds(line: dict, topology: Topology, micro_batches: int, assumed: Assumptions) -> float:
    """Of a training step: every program for each micro-batch, the update once."""
    runs = [1 if r["program"].endswith(" update") else micro_batches for r in line["reports"]]
    each = [program_seconds(r, topology, assumed) for r in line["reports"]]
    return sum(n * seconds for n, seconds in zip(runs, each, strict=True))


def rollout_seconds(line: dict, trajectories: float, assumed: Assumptions) -> float:
    """For a host to play so many typical trajectories: encoding images, appending prompts in pieces, decoding.

    Slots are filled again as they come free. Fewer trajectories than slots take a whole trajectory's decode steps.
    """
    program = {r["program"].removeprefix("rollout "): r for r in line["reports"]}
    d, run = program["decode"]["decoding"], {name: r["projected_step_s"] for name, r in program.items()}
    lanes = max(d["devices"] // d["tensor"], d["slots"] // 4)
    encoded = trajectories * PATCHES / (lanes * BUFFER)
    pieces = trajectories * APPENDED / (lanes * PIECE)
    decoded = max(1.0, trajectories / d["slots"]) * SAMPLED / d["steps"]
    # `append` decodes as well, which `decoded` counts already.
    piece = max(0.0, run["append"] - run["decode"])
    return (encoded * run["encode"] + pieces * piece + decoded * run["decode"]) / assumed.bandwidth


def costs(lines: list[dict], assumed: Assumptions) -> Iterator[Cost]:
    """Of each stage, size and slice with a preset whose programs are among the lines, fit, and have rows of TOKENS."""
    of_rows = [line for line in lines if line.get("tokens") == TOKENS]
    fit = {x["name"]: x for x in of_rows if all(r["fits"] and r["projected_step_s"] for r in x["reports"])}
    for name, line in fit.items():
        size, where, stage, *rest = name.split(":")
        topology, preset = parse_topology(where), PRESETS[size].get(where)
        if stage == ENGINE and _whole(line):  # as evaluate.py has it: more slots than beside a trainer
            for what, count in (("evaluation", EVALUATED), ("collection", COLLECTED)):
                seconds = rollout_seconds(line, count / _hosts(topology, line), assumed) / count
                yield Cost(size, what, where, seconds, count * seconds / 3600, _engine(line))
        elif stage == "sft" and preset and rest == [preset.remat]:
            updates = math.ceil(EPOCHS * SFT_TRAJECTORIES / BATCH)
            micro_batches = math.ceil(BATCH / (topology.devices // preset.tensor))
            seconds = step_seconds(line, topology, micro_batches, assumed)
            yield Cost(size, "SFT", where, seconds, updates * seconds / 3600, f"remat {preset.remat}")
        elif stage == "grpo" and preset and (played := _played(size, topology, fit)):
            micro_batches = math.ceil(GRPO_TRAJECTORIES / (topology.devices // preset.tensor))
            made = (r["projected_step_s"] for r in played["reports"] if r["program"].startswith("rollout weights"))
            weights = sum(made) / assumed.bandwidth
            seconds = step_seconds(line, topology, micro_batches, assumed) + weights
            seconds += rollout_seconds(played, GRPO_TRAJECTORIES / _hosts(topology, played), assumed)
            programs = f"remat {rest[0]}, {_engine(played)}"
            yield Cost(size, "GRPO", where, seconds, GRPO_STEPS * seconds / 3600, programs)


def _hosts(topology: Topology, line: dict) -> float:
    """How many of the engines that a line was compiled for the slice has."""
    return topology.devices / line["reports"][0]["devices"]


def _engine(line: dict) -> str:
    """Of which kind, and of how many slots a host."""
    slots = next(r["decoding"]["slots"] for r in line["reports"] if r["decoding"])
    return f"{line['name'].split(':')[2]} of {slots} slots"


def _played(size: str, topology: Topology, lines: dict[str, dict]) -> dict | None:
    """The line of a slice's rollouts, else of a smaller one's of the same kind of chip."""
    for start in (f"{size}:{topology.name}:", f"{size}:{topology.chip.name}-"):
        for name, line in lines.items():
            if name.startswith(start) and ":rollout:" in name and _whole(line):
                return line
    return None


def _whole(line: dict) -> bool:
    """Whether an engine's line has all its programs."""
    return {" ".join(r["program"].split()[:2]) for r in line["reports"]} >= PLAYING


def costs_table(found: list[Cost], prices: dict[str, float]) -> str:
    """In Markdown, by size and stage; the price of a chip-hour is the reader's."""
    head = ["size", "stage", "slice", "seconds a step or trajectory", "hours", "chip-hours", "compiled"]
    head[-1:-1] = ["cost"] * bool(prices)
    order = {"SFT": 0, "GRPO": 1, "evaluation": 2, "collection": 3}
    found = sorted(found, key=lambda c: (int(c.size[:-1]), order[c.stage], c.slice))
    rows = []
    for cost in found:
        topology = parse_topology(cost.slice)
        chip_hours = cost.hours * math.prod(topology.shape)
        row = [cost.size.upper(), cost.stage, cost.slice, f"{cost.unit_seconds:.3g}", f"{cost.hours:.3g}"]
        row += [f"{chip_hours:,.3g}" if chip_hours < 1000 else f"{chip_hours:,.0f}"]
        if prices:
            price = prices.get(topology.chip.name)
            row += [f"{chip_hours * price:,.0f}" if price else "-"]
        rows.append([*row, cost.programs])
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def parse_prices(text: str) -> dict[str, float]:
    """`v5e=1.5,v6e=3`: the price of a chip-hour by kind of chip. DataError for anything else."""
    prices = {}
    for part in filter(None, text.split(",")):
        name, _, price = part.partition("=")
        try:
            prices[name] = float(price)
        except ValueError:
            prices[name] = math.nan
        if name not in CHIPS or not 0 < prices[name] < math.inf:
            raise DataError(f"--prices: {part!r} is no KIND=PRICE of a chip-hour; kinds are {', '.join(CHIPS)}")
    return prices


def main(
    *,
    results: str = "docs/scaling.jsonl",  # what aot/scaling.py compiled
    prices: str = "",  # of a chip-hour by kind, such as v5e=1.5,v6e=3 in a currency of yours; none: chip-hours alone
    mfu: Mass = 0.4,  # share of the bf16 peak that training is assumed to reach
    bandwidth: Mass = 0.5,  # share of the roofline that rollouts are assumed to reach
    out: str = "",  # a page with the table's marks, in whose place it goes
) -> None:
    priced, assumed = parse_prices(prices), Assumptions(mfu, bandwidth)
    found = list(costs(read_results(pathlib.Path(results)), assumed))
    if not found:
        raise DataError(f"{results} has no line with rows of {TOKENS} tokens; make some with rsagent_jax.aot.scaling")
    table = costs_table(found, priced)
    print(table)
    if out:
        page = pathlib.Path(out)
        text = page.read_text(encoding="utf-8") if page.exists() else ""
        if BEGIN not in text or END not in text:
            raise DataError(f"{out} has no place for the table: a line {BEGIN!r} and after it {END!r}")
        above, below = text.partition(BEGIN)[0], text.rpartition(END)[2]
        page.write_text(f"{above}{BEGIN}\n\n{table}\n\n{END}{below}", encoding="utf-8")
