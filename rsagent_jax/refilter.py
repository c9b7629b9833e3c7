"""Chooses from what `collect` stored, again and with other thresholds: the paper's filter study without collecting.

  python -m rsagent_jax.refilter --collected=runs/quickstart/collect --out=runs/study \
      --min_iou=0.8,0.85,0.9,0.95 [--max_turns=8]
      [--[no-]malformed] [--[no-]repeats] [--per_sample=1] [--root=OLD=NEW]

Writes <out>/iou-0.80, … each a set for --config.sft.trajectories with collect.json (what was dropped and why),
trajectories.jsonl and report/index.html, and prints a table. What is not said is as in the collection's own filter.
--root=OLD=NEW names the new place of pictures that the trajectories refer to.
"""

from rsagent_jax.runtime import command

if __name__ == "__main__":
    command.start_command()

import dataclasses
import pathlib

from rsagent_jax.collecting import filter
from rsagent_jax.config.build import build_config, to_dict
from rsagent_jax.config.schema import FilterConfig
from rsagent_jax.types import DataError


def main(
    *,
    collected: pathlib.Path,  # work directory of collect
    out: pathlib.Path,
    min_iou: str = "",  # thresholds with commas between, one set for each
    max_turns: int | None = None,
    malformed: bool | None = None,  # keep trajectories with malformed turns
    repeats: bool | None = None,  # keep trajectories with repeated actions
    per_sample: int | None = None,  # of several tries: how many good ones are kept
    root: str = "",  # OLD=NEW: pictures below OLD are now below NEW
) -> None:
    given = dict(max_turns=max_turns, malformed=malformed, repeats=repeats, per_sample=per_sample)
    given = {name: value for name, value in given.items() if value is not None}
    own = build_config(FilterConfig, to_dict(filter.read_rules(collected)) | given)
    thresholds = read_thresholds(min_iou) if min_iou else [own.min_iou]
    moved = tuple(root.split("=", 1)) if root else None
    if moved is not None and len(moved) != 2:
        raise DataError(f"--root={root} must be OLD=NEW")
    rows = []
    for threshold in thresholds:
        folder = out / f"iou-{threshold:.2f}"
        rules = dataclasses.replace(own, min_iou=threshold)
        rows.append((threshold, filter.write_kept_set(collected, folder, rules, moved=moved), folder))
    print("\n" + ", ".join(f"{key} {value}" for key, value in to_dict(own).items() if key != "min_iou"))
    print("min IoU    kept   share  mean IoU  turns  tokens")
    for threshold, f, folder in rows:
        share = f.kept / max(f.total, 1)
        print(f"{threshold:7.2f} {f.kept:7d} {share:7.1%} {f.iou:9.3f} {f.turns:6.2f} {f.tokens:7.0f}  {folder}")
    if lost := f.not_collected:
        why = ", ".join(f"{reason} {count}" for reason, count in lost.items())
        print(
            f"Not collected: {sum(lost.values())} of {f.total + sum(lost.values())} ({why}); shares are of the others"
        )


def read_thresholds(text: str) -> list[float]:
    """DataError for what is no share, or two that would be written to one folder."""
    try:
        values = [float(value) for value in text.split(",")]
    except ValueError:
        raise DataError(f"--min_iou={text} must be numbers, such as 0.8,0.9") from None
    if not all(0 <= v <= 1 and round(v, 2) == v for v in values) or len({*values}) < len(values):
        raise DataError(f"--min_iou={text} must be numbers from 0 to 1, each once and with two digits")
    return values
