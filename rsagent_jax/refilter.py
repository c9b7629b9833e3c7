"""Chooses from what `collect` stored, again and with other thresholds: the paper's filter study without collecting.

  python -m rsagent_jax.refilter --collected=runs/x --out=runs/study --min_iou=0.8,0.85,0.9,0.95 [--max_turns=8]
      [--[no-]malformed] [--[no-]repeats] [--per_sample=1] [--root=OLD=NEW]

Writes <out>/iou-0.80, … each a set for --config.sft.trajectories with collect.json (what was dropped and why),
trajectories.jsonl and report/index.html, and prints a table. What is not said is as in the collection's own filter.
--root=OLD=NEW names the new place of pictures that the trajectories refer to.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import sys
from collections.abc import Sequence

from rsagent_jax.collecting import filter
from rsagent_jax.config.build import build_config, to_dict
from rsagent_jax.config.schema import FilterConfig
from rsagent_jax.types import DataError


def main(arguments: Sequence[str] | None = None) -> int:
    """0, or 2 with one line on stderr."""
    parser = argparse.ArgumentParser(prog="python -m rsagent_jax.refilter", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--collected", type=pathlib.Path, required=True, metavar="DIR", help="work directory of collect"
    )
    parser.add_argument("--out", type=pathlib.Path, required=True, metavar="DIR")
    parser.add_argument("--min_iou", help="thresholds with commas between, one set for each")
    parser.add_argument("--max_turns", type=int)
    switch = argparse.BooleanOptionalAction
    parser.add_argument("--malformed", action=switch, help="keep trajectories with malformed turns")
    parser.add_argument("--repeats", action=switch, help="keep trajectories with repeated actions")
    parser.add_argument("--per_sample", type=int, help="of several tries: how many good ones are kept")
    parser.add_argument("--root", metavar="OLD=NEW", help="pictures below OLD are now below NEW")
    options = parser.parse_args(arguments)
    try:
        names = ("max_turns", "malformed", "repeats", "per_sample")
        said = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
        own = build_config(FilterConfig, to_dict(filter.read_rules(options.collected)) | said)
        thresholds = [own.min_iou] if options.min_iou is None else read_thresholds(options.min_iou)
        moved = tuple(options.root.split("=", 1)) if options.root else None
        if moved is not None and len(moved) != 2:
            raise DataError(f"--root={options.root} must be OLD=NEW")
        rows = []
        for threshold in thresholds:
            rules = dataclasses.replace(own, min_iou=threshold)
            out = options.out / f"iou-{threshold:.2f}"
            found = filter.write_kept_set(options.collected, out, rules, moved=moved)
            rows.append((threshold, found, out))
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n" + ", ".join(f"{key} {value}" for key, value in to_dict(own).items() if key != "min_iou"))
    print("min IoU    kept   share  mean IoU  turns  tokens")
    for threshold, f, out in rows:
        share = f.kept / max(f.total, 1)
        print(f"{threshold:7.2f} {f.kept:7d} {share:7.1%} {f.iou:9.3f} {f.turns:6.2f} {f.tokens:7.0f}  {out}")
    return 0


def read_thresholds(text: str) -> list[float]:
    """DataError for what is no share, or two that would be written to one folder."""
    try:
        values = [float(value) for value in text.split(",")]
    except ValueError:
        raise DataError(f"--min_iou={text} must be numbers, such as 0.8,0.9") from None
    if not all(0 <= v <= 1 and round(v, 2) == v for v in values) or len({*values}) < len(values):
        raise DataError(f"--min_iou={text} must be numbers from 0 to 1, each once and with two digits")
    return values


if __name__ == "__main__":
    sys.exit(main())
