"""The engine on 8 simulated devices: the trajectories of one device, and nothing on the way that need not be."""

import collections
import functools
import json
import math
import re

import jax
import numpy as np
import pytest

from rsagent_jax.rollout.engine import fill_sampling_defaults
from rsagent_jax.runtime import sharding
from tests.refusals import refused
from tests.rollout import on_mesh, small
from tests.simulated import run_simulated

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # for machines that do other things beside
LAYERS, WIDTH, SLOTS = 2, 64, 16
SHORT = dict(most_turns=2, warm=False, **on_mesh.ONE_BLOCK)
MESHES = {
    "8 x 1": dict(data=8, tensor=1, **SHORT),
    "4 x 2": dict(data=4, tensor=2, most_turns=4, warm=True),
    "2 x 4": dict(data=2, tensor=4, **SHORT),
    "2 x 2, int8": dict(data=2, tensor=2, kv_dtype="int8", weights_dtype="int8", **SHORT),
}


def run(job: dict) -> dict:
    """What on_mesh.py says about a job."""
    return json.loads(run_simulated(["-m", "tests.rollout.on_mesh", json.dumps(job)], devices=8).splitlines()[-1])


@functools.cache
def alone(most_turns: int, **sampling):
    """What one device plays."""
    engine = on_mesh.make_engine(1, 1, **sampling)
    return small.engine_trajectories(on_mesh.work(most_turns), on_mesh.SCRIPTS, eng=engine)


@pytest.fixture(scope="module", params=MESHES)
def played(request):
    """One run per mesh, which the tests below look at from their sides."""
    job = MESHES[request.param]
    return job, run({"what": "play", **job})


def test_trajectories_on_a_mesh_are_those_of_one_device(played):
    """Turns with and without images, a group that shares its opening, ends at different times."""
    job, got = played
    int8 = {name: job[name] for name in ("kv_dtype", "weights_dtype") if name in job}
    want = alone(2, **int8, **on_mesh.ONE_BLOCK) if int8 else alone(4)[: len(got["tokens"])]
    assert [len(t.turns) for t in want] == [2, 2, 2, 1, 4, 3][: 6 if job["most_turns"] == 4 else 4]
    assert len(want) == 4 or max(len(t.tokens) for t in want) > 256  # into a second block of the cache
    # The group's opening was read once in each lane that it is in: eight lanes have two slots each.
    assert got["copied"] == (1 if job["data"] == 8 else 2) * (int(want[0].loss_mask.argmax()) - 1)
    for tokens, logprobs, t in zip(got["tokens"], got["logprobs"], want, strict=True):
        np.testing.assert_array_equal(tokens, t.tokens)
        np.testing.assert_allclose(logprobs, t.logprobs, rtol=0, atol=1e-4)


def test_every_device_holds_its_slots_and_heads_alone(played):
    job, got = played
    whole, mine = got["cache"]
    places = 256 * (1 if "context" in job else 2)
    assert whole == [SLOTS, 4, 8, places] and mine == [SLOTS // job["data"], 4 // job["tensor"], 8, places]


def test_after_the_warm_up_a_mesh_compiles_nothing(played):
    job, got = played
    # three rungs, the copy, and each bucket with a piece, without, and with nothing else
    assert got["programs"] <= got["at_most"] == (7 if "context" in job else 10)
    if job["warm"]:
        assert got["compiled"] == 0 and got["programs"] == 10


def test_rows_send_each_other_one_bit_and_the_heads_of_a_row_only_what_they_add_up(played):
    """The bit: whether any row still samples, or has a new image. Else all would work on when nobody needs it.

    Over the tensor axis: after the embedding, and after the attention's and the MLP's last product of every layer, a
    sum of the row's hidden states; per token two numbers of the softmax, each device's best token and its score, and
    the log-prob of the one drawn (with the embedding's sum). No weight, no cache, no logits.
    """
    job, got = played
    data, tensor = job["data"], job["tensor"]
    slots, lanes = SLOTS // data, max(1, 4 // data)
    bit = ["all-reduce", "pred 1", data, True, 1]
    decode, append = [bit], []
    if tensor > 1:
        decode += [
            ["all-reduce", f"f32 {slots * WIDTH}", tensor, True, 2 * LAYERS],
            ["all-reduce", f"f32 {slots * WIDTH} f32 {slots}", tensor, True, 1],
            ["all-reduce", f"f32 {slots}", tensor, True, 2],
            ["all-gather", f"f32 {slots}", tensor, True, 1],
            ["all-gather", f"s32 {slots}", tensor, True, 1],
        ]
        prompt = lanes * job.get("prefill", 64) * WIDTH
        append.append(["all-reduce", f"f32 {prompt}", tensor, False, 2 * LAYERS + 1])
    assert counted(got["sent"]["decode"]) == sorted(decode)
    assert counted(got["sent"]["append"]) == sorted(decode + append)
    assert got["sent"]["copy"] == []
    encode = [(kind, shape) for kind, shape, *_ in got["sent"]["encode"]]
    assert ("all-reduce", "pred[]") in encode
    if tensor == 1:
        assert len(encode) == 1
    for kind, shape in encode:  # rows of one lane: its patches, or what they are merged to
        if shape != "pred[]":
            assert kind in ("all-reduce", "all-gather", "collective-permute")
            *rows, _ = (int(n) for n in shape[shape.index("[") + 1 : -1].split(","))
            assert math.prod(rows) in {128, 32}, shape


def counted(sent: list[list]) -> list[list]:
    """[kind, dtype and elements of what is sent, group, in a loop?, times]: [4, 1, 64] and [4, 64] are one thing."""
    total: collections.Counter = collections.Counter()
    for kind, shapes, group, looped, times in sent:
        parts = re.findall(r"(\w+)\[([\d,]*)\]", shapes)
        sizes = " ".join(f"{dtype} {math.prod(int(n) for n in dims.split(',') if n)}" for dtype, dims in parts)
        total[kind, sizes, group, looped] += times
    return sorted([*key, times] for key, times in total.items())


def test_weights_of_a_training_mesh_reach_the_rollout_mesh_without_needless_copies():
    """fsdp 4 to whole rows; then layouts that agree: only the decoder's layers, cut out of their stack, are new."""
    cases = [
        dict(train=dict(data=1, fsdp=4, tensor=2), data=4, tensor=2, dtype="float32"),
        dict(train=dict(data=2, fsdp=4, tensor=1), data=4, tensor=2, dtype="bfloat16"),
        dict(train=dict(data=4, fsdp=1, tensor=2), data=4, tensor=2, dtype="float32"),
        dict(train=dict(data=4, fsdp=1, tensor=2), data=4, tensor=2, dtype="bfloat16"),
    ]
    got = run({"what": "weights", "cases": cases})["cases"]
    for case in got:
        assert case["equal"] and case["placed"] and case["compiled"] == 0 and case["seconds"] > 0
        assert case["loaded"] == case["new"] > 0 and case["shared_layers"] == 0
        assert case["parts_equal"] and case["parts"] == 10 and case["beside"] < case["made"]
    other, cast, same, same_but_cast = (case["shared"] for case in got)
    assert same == got[0]["unstacked"] > 20 and cast == same_but_cast == 0
    assert 0 < other < same  # norms and biases are whole on every device in training, too


def test_a_tensor_axis_that_does_not_divide_the_key_value_heads_is_refused():
    mesh, policy = jax.sharding.AbstractMesh((1, 1, 8), sharding.AXES), small.model(**on_mesh.SHAPE).config
    says = "sampling.tensor = 8 must divide the policy's 4 key-value heads"
    refused(says, fill_sampling_defaults, on_mesh.SAMPLING, policy, mesh)
