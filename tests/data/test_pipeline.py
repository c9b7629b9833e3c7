"""The order is a function of seed, position and share; threads, processes and restarts do not show."""

import itertools
import operator
import os
import pathlib
import subprocess
import sys
import time

import grain
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rsagent_jax.data.pipeline import Pipeline
from rsagent_jax.runtime.processes import Share
from rsagent_jax.types import DataError, StorageError
from tests.refusals import refused

BASE = "assets/tiny-base"


def draw(n=23, take=6, times=9, **options):
    pipeline = Pipeline(range(n), **{"seed": 5} | options)
    return [pipeline.take(take) for _ in range(times)]


def test_every_epoch_is_another_permutation_and_the_order_is_that_of_the_seed():
    drawn = list(itertools.chain(*draw(n=18)))
    epochs = [drawn[i : i + 18] for i in range(0, 54, 18)]
    assert all(sorted(epoch) == list(range(18)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    # what SftSource and GrpoSource draw from
    order = grain.MapDataset.range(18).seed(5).shuffle().repeat()
    assert drawn == [int(order[i]) for i in range(54)]
    assert list(itertools.chain(*draw(n=18, seed=6))) != drawn


@settings(max_examples=6)
@given(st.sampled_from([1, 2, 3, 6]), st.integers(0, 8), st.sampled_from([1, 4]))
def test_hosts_divide_what_one_host_draws_from_any_position(hosts, done, threads):
    whole = draw()
    parts = []
    for index in range(hosts):
        pipeline = Pipeline(range(23), seed=5, share=Share(index, hosts), threads=threads)
        pipeline.restore({"position": 6 * done, "skipped": 0})
        parts.append([pipeline.take(6) for _ in range(9 - done)])
    for step, drawn in enumerate(whole[done:]):
        merged = [parts[i % hosts][step][i // hosts] for i in range(6)]
        assert merged == drawn


@pytest.mark.timeout(200)
def test_the_number_of_worker_processes_does_not_show():
    """With the transform, a checkpoint of one number of workers restored with another."""
    alone = Pipeline(range(23), operator.neg, seed=5)
    wanted = [alone.take(4) for _ in range(5)]
    pipeline = Pipeline(range(23), operator.neg, seed=5, workers=2, threads=1, ahead=4)
    assert [pipeline.take(4) for _ in range(3)] == wanted[:3]
    after = Pipeline(range(23), operator.neg, seed=5)
    after.restore(pipeline.state())
    assert [after.take(4) for _ in range(2)] == wanted[3:]


def odd_only(x):
    if x % 2 == 0:
        raise DataError(f"picture {x} is missing")
    return x


def test_what_cannot_be_read_is_counted_and_the_rest_is_kept():
    pipeline, whole = Pipeline(range(23), odd_only, seed=5), draw()
    for drawn in whole:
        before = pipeline.skipped
        assert pipeline.take(6) == [x for x in drawn if x % 2]
        assert pipeline.skipped - before == sum(x % 2 == 0 for x in drawn)
    assert pipeline.state() == {"position": 54, "skipped": sum(x % 2 == 0 for x in itertools.chain(*whole))}
    says = "none of the 1 samples drawn could be read; the first: sample 0: picture 0"
    refused(says, Pipeline([0], odd_only, seed=0).take, 1)
    refused("empty", Pipeline, [], seed=0)


class Named(list):
    """A source whose elements have ids, as data sets have."""

    @property
    def ids(self):
        return [f"s{x}" for x in self]


def odd(x):
    if x == 2:
        raise SystemError("AST constructor recursion depth mismatch")
    return x


@pytest.mark.parametrize("threads", [1, 4])
def test_any_other_exception_of_a_reader_is_no_skipped_sample_and_says_which_element_it_was(threads):
    named = (Named([0, 1, 2]), "sample", r"sample 2 \(s2\)"), (range(3), "runs/x, record", "runs/x, re")
    for source, what, name in named:
        with pytest.raises(RuntimeError, match=f"reading {name}.*: SystemError: AST constructor") as error:
            Pipeline(source, odd, seed=5, threads=threads, what=what).take(3)
        assert isinstance(error.value.__cause__, SystemError)


def test_a_reader_that_forgets_to_return_is_named():
    with pytest.raises(RuntimeError, match="reading sample [01]: TypeError: it is None"):
        Pipeline(range(2), lambda element: None, seed=0).draw(1)


def test_what_cannot_be_read_is_named_and_may_stop_the_command(capfd):
    pipeline = Pipeline(Named(range(23)), odd_only, seed=5)
    even = [x for x in itertools.chain(*draw()) if x % 2 == 0]
    for _ in range(9):
        pipeline.take(6)
    said = capfd.readouterr().err.splitlines()
    assert len(said) == 5 < pipeline.skipped
    assert [line.partition(";")[0] for line in said] == [
        f"skipped sample {x} (s{x}): picture {x} is missing" for x in even[:5]
    ]
    assert said[-1].endswith("; what follows is only counted")
    good = next(i for i, x in enumerate(itertools.chain(*draw())) if x % 2 == 0)  # elements before the first bad one
    pipeline = Pipeline(Named(range(23)), odd_only, seed=5, unreadable="stop")
    for _ in range(good):
        pipeline.take(1)
    refused(rf"^cannot be read: sample {even[0]} \(s{even[0]}\): picture {even[0]} is missing$", pipeline.take, 1)
    pipeline = Pipeline([0], odd_only, seed=0, unreadable="stop", what="record")
    refused("^cannot be read: record 0: picture 0", pipeline.take, 1)


def away_at_two(x):
    if x == 2:
        raise StorageError("gs://b/2.png: the bucket does not answer")
    return odd_only(x)


def test_a_bucket_that_does_not_answer_makes_no_sample_unreadable():
    pipeline = Pipeline(range(3), away_at_two, seed=5)
    with pytest.raises(StorageError, match="^cannot be read now: sample 2: gs://b/2.png: the bucket does not answer$"):
        pipeline.take(3)
    assert not pipeline.skipped


READS = """
import multiprocessing, time
from rsagent_jax.data.pipeline import Pipeline
if __name__ == "__main__":
    pipeline = Pipeline(range(23), seed=5, workers=1, threads=1)
    pipeline.take(1)
    print(multiprocessing.active_children()[0].pid, flush=True)
    time.sleep(60)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells who is there")
def test_no_reader_outlives_a_trainer_that_was_killed(tmp_path):
    (tmp_path / "reads.py").write_text(READS)
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    with subprocess.Popen([sys.executable, tmp_path / "reads.py"], stdout=subprocess.PIPE, env=environment) as trainer:
        reader = pathlib.Path("/proc", trainer.stdout.readline().decode().strip())
        assert reader.exists()
        trainer.kill()
    until = time.monotonic() + 60
    while reader.exists() and "\nState:\tZ" not in (reader / "status").read_text():
        assert time.monotonic() < until
        time.sleep(0.05)
