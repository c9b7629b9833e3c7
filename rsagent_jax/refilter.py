"""Chooses from what `collect` stored, again and with other thresholds: the paper's filter study without collecting.

  python -m rsagent_jax.refilter --collected=runs/x --out=runs/study --min_iou=0.8,0.85,0.9,0.95 [--max_turns=8]
      [--malformed] [--repeats] [--per_sample=1] [--root=OLD=NEW]

Writes <out>/iou-0.80, … each a set for --config.sft.trajectories with collect.json (what was dropped and why),
trajectories.jsonl and report/index.html, and prints a table. --root=OLD=NEW names the new place of pictures that the
trajectories refer to.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
from collections.abc import Sequence

from rsagent_jax.config import FilterConfig
from rsagent_jax.evals import filtering
from rsagent_jax.types import DataError


def main(arguments: Sequence[str] | None = None) -> int:
    """0, or 2 with one line on stderr."""
    parser = argparse.ArgumentParser(prog="python -m rsagent_jax.refilter", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--collected", type=pathlib.Path, required=True, metavar="DIR", help="work directory of collect"
    )
    parser.add_argument("--out", type=pathlib.Path, required=True, metavar="DIR")
    parser.add_argument("--min_iou", default="0.8,0.85,0.9,0.95", help="thresholds, one set for each")
    parser.add_argument("--max_turns", type=int, default=8)
    parser.add_argument("--malformed", action="store_true", help="keep trajectories with malformed turns")
    parser.add_argument("--repeats", action="store_true", help="keep trajectories with repeated actions")
    parser.add_argument("--per_sample", type=int, default=1, help="of several tries: how many good ones are kept")
    parser.add_argument("--root", metavar="OLD=NEW", help="pictures below OLD are now below NEW")
    options = parser.parse_args(arguments)
    try:
        try:
            thresholds = [float(value) for value in options.min_iou.split(",")]
        except ValueError:
            raise DataError(f"--min_iou={options.min_iou} must be numbers, such as 0.8,0.9") from None
        moved = tuple(options.root.split("=", 1)) if options.root else None
        if moved is not None and len(moved) != 2:
            raise DataError(f"--root={options.root} must be OLD=NEW")
        rows = []
        for threshold in thresholds:
            rules = FilterConfig(
                min_iou=threshold,
                max_turns=options.max_turns,
                malformed=options.malformed,
                repeats=options.repeats,
                per_sample=options.per_sample,
            )
            out = options.out / f"iou-{threshold:.2f}"
            found = filtering.write(options.collected, out, rules, moved=moved)
            rows.append((threshold, found, out))
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\nmin IoU    kept   share  mean IoU  turns  tokens")
    for threshold, f, out in rows:
        share = f.kept / max(f.total, 1)
        print(f"{threshold:7.2f} {f.kept:7d} {share:7.1%} {f.iou:9.3f} {f.turns:6.2f} {f.tokens:7.0f}  {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
