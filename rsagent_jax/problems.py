"""Writes problems: a vision-language model behind an endpoint makes reasoning queries for objects with known masks.

  python -m rsagent_jax.problems --config=configs/problems.py --workdir=DIR --config.data.root=REFER \
      --config.writer.url=http://host:8000/v1 --config.writer.model=Qwen/Qwen2.5-VL-72B-Instruct [--shard=0/4]
  python -m rsagent_jax.collect … --config.data.dataset=folder --config.data.root=DIR --config.data.split=train

The model sees the picture, and the picture with the object marked. <workdir>/<split>.jsonl is a data set of its own
(dataset=folder, docs/data.md) whose pictures are named by path. Answers are kept in <workdir>/answers as they come: a
stopped command goes on where it was, and what failed is tried again. Without this step `collect` uses the data set's
own expressions.
"""

from rsagent_jax.runtime import command

if __name__ == "__main__":
    command.start_command()

import contextlib

import numpy as np

from rsagent_jax.collecting.problem_writer import ANSWERS, ProblemWriter, write_set
from rsagent_jax.config.schema import ProblemsConfig
from rsagent_jax.data.sets.open import open_samples
from rsagent_jax.rollout.endpoint import Endpoint, check_endpoint
from rsagent_jax.rollout.startup import check_disk
from rsagent_jax.runtime import journal
from rsagent_jax.runtime.journal import Journal
from rsagent_jax.runtime.processes import parse_share, tell_left
from rsagent_jax.types import DataError


def main(
    config: ProblemsConfig,
    *,
    workdir: str = "",  # directory for everything this command leaves behind
    shard: str = "0/1",  # i/n: every n-th object from the i-th on, counted from 0
) -> None:
    workdir, share = command.make_workdir(workdir), parse_share(shard, "--shard")
    check_endpoint(config.writer, "writer")
    check_disk(workdir)
    samples = open_samples(config.data)
    order = np.random.default_rng(config.seed).permutation(len(samples))[: config.limit or None].tolist()
    ids, settings = samples.ids, problems_resume_fingerprint(config) | {"planned": len(order)}
    current = journal.fingerprints(samples, {ids[k]: k for k in order})
    with contextlib.closing(Journal(workdir / ANSWERS, share, settings, current)) as answers:
        mine = [(ids[k], (uid, k)) for uid, k in list(enumerate(order))[share.index :: share.count]]
        writer = ProblemWriter(config, samples, workdir, answers)
        writer.run(answers.left(mine, "objects"), len(mine))
    print(f"  endpoint: {Endpoint.shared(config.writer, 'writer').told()}")
    done = journal.survey(workdir / ANSWERS, settings, current)
    failed = dict(writer.failures.counts)
    if failed and not done:
        raise DataError(f"nothing could be written ({failed}): {next(iter(writer.failures.examples.values()))[0]}")
    if (missing := len(order) - len(done) - sum(failed.values())) > 0:
        return tell_left(missing, "objects", share, workdir)
    write_set(workdir, config, failed, settings, current)


def problems_resume_fingerprint(config: ProblemsConfig) -> dict:
    """What an answer depends on: work that is taken up again must agree in it."""
    names = ("seed", "limit", "queries", "min_words", "max_words", "picture_size")
    groups = {name: journal.decisive_settings(getattr(config, name)) for name in ("writer", "data")}
    return {name: getattr(config, name) for name in names} | groups
