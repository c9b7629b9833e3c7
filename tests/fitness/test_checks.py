"""Each check of `rsagent_jax.doctor` finds a machine fit, and finds what is wrong where something is."""

import contextlib
import dataclasses
import pathlib
import shutil
import socket
import threading
import types
import typing

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from rsagent_jax.aot.topology import CHIPS
from rsagent_jax.config.schema import PolicyConfig, SegmenterConfig
from rsagent_jax.fitness import checks, kernels, machine, places, segmenting, speed
from rsagent_jax.fitness.checks import Check, run_checks
from rsagent_jax.fitness.finding import Examined, Finding, Verdict
from rsagent_jax.models.qwen25_vl import attention
from rsagent_jax.types import DataError
from sam_bridge import check
from sam_bridge.types import About, SegmentReply
from tests.loopback_hub import serve_hub

pytestmark = pytest.mark.slow

OK, SLOW, WRONG, NOT_RUN = Verdict


def with_(examined, **fields) -> Examined:
    return dataclasses.replace(examined, config=dataclasses.replace(examined.config, **fields))


def told(findings: list[Finding]) -> list[tuple[Verdict, str]]:
    assert all(f.remedy for f in findings if f.verdict in (SLOW, WRONG))
    return [(f.verdict, f"{f.figure} ({f.against}) {f.remedy}") for f in findings]


def only(findings: list[Finding]) -> tuple[Verdict, str]:
    (one,) = told(findings)
    return one


def of_table(name: str, examined: Examined) -> list[Finding]:
    """As the command runs it: what it raises is a line."""
    return run_checks(examined, 120, lambda _: None, [c for c in checks.CHECKS if c.name == name])[0]


# ---------------------------------------------------------------------------------------------- what there is


def test_versions_are_those_of_the_requirements(examined, tmp_path, monkeypatch):
    assert only(machine.check_versions(examined))[0] is OK
    (tmp_path / "requirements.txt").write_text("jax==0.1.2\nnumpy==9.9\n")
    monkeypatch.setattr(machine, "shipped", lambda name: str(tmp_path / name))
    verdict, said = only(machine.check_versions(examined))
    assert verdict is WRONG and "requirements.txt: jax 0.1.2, numpy 9.9" in said and "pip install -r" in said


def test_devices_are_those_of_the_slice_and_of_the_host(examined, tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "DEV", tmp_path)
    assert only(machine.check_devices(examined)) == (OK, "1 x cpu, 1 on each of 1 hosts (the config names no slice) ")
    verdict, said = only(machine.check_devices(with_(examined, slice="v6e-8")))
    assert verdict is WRONG and "slice v6e-8: 8 x v6e" in said and "--config.slice" in said
    chips = [types.SimpleNamespace(device_kind="TPU v6 lite", platform="tpu")] * 8
    with monkeypatch.context() as patch:
        patch.setattr(jax, "devices", lambda: chips)
        patch.setattr(jax, "local_devices", lambda: chips)
        assert only(machine.check_devices(with_(examined, slice="v6e-8")))[0] is OK
        assert only(machine.check_devices(with_(examined, slice="v5e-8")))[0] is WRONG
    (tmp_path / "vfio").mkdir()
    (tmp_path / "vfio" / "0").touch()
    verdict, said = only(machine.check_devices(examined))
    assert verdict is WRONG and f"this host has {tmp_path}/vfio/0" in said and "jax[tpu]" in said


def test_a_mesh_that_does_not_divide_is_wrong(examined):
    assert only(machine.check_mesh(examined))[0] is OK
    three = dataclasses.replace(examined.config.mesh, data=3)
    verdict, said = only(of_table("mesh", with_(examined, mesh=three)))
    assert verdict is WRONG and "does not cover 1 devices" in said and "docs/tpu.md" in said


def test_a_full_disk_is_wrong(examined, monkeypatch):
    assert only(machine.check_space(examined))[0] is OK
    assert only(machine.check_space(dataclasses.replace(examined, workdir=None)))[0] is NOT_RUN
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=10 << 20))
    verdict, said = only(machine.check_space(examined))
    assert verdict is WRONG and "0.01 GiB free" in said and "another --workdir" in said


# ---------------------------------------------------------------------------------------------- far away


@pytest.fixture
def hub(monkeypatch):
    """asked(examined, weights, **options of the loopback hub) with org/name on it."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)

    def asked(examined, weights: str, **options) -> tuple[Verdict, str]:
        with serve_hub(files={"org/name": {"config.json": b"{}"}, "org/bare": {}}, **options) as served:
            monkeypatch.setenv("HF_ENDPOINT", served.url)
            return hub_says(examined, weights)

    return asked


def hub_says(examined, weights: str) -> tuple[Verdict, str]:
    policy = dataclasses.replace(examined.config.policy, weights=weights)
    return only(of_table("hub", with_(examined, policy=policy)))


def test_a_hub_is_asked_for_what_the_config_names(examined, hub):
    assert only(places.check_hub(examined)) == (NOT_RUN, "not used: no weights are given as org/name () ")
    for name in ("org/name", "org/name@main", "org/bare"):  # the last has no config.json, and may be read
        assert hub(examined, name)[0] is OK
    for name, error, options in (
        ("org/name", "GatedRepo", dict(gated=True, token="t")),
        ("org/none", "RepositoryNotFound", {}),
        ("org/name@v2", "RevisionNotFound", {}),
    ):
        verdict, said = hub(examined, name, **options)
        assert verdict is WRONG and error in said and name in said and "HF_TOKEN" in said, said


def test_a_hub_is_not_asked_where_it_must_not_be(examined, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert hub_says(examined, "org/name") == (NOT_RUN, "HF_HUB_OFFLINE is set: it is not asked () ")


def test_a_hub_that_does_not_answer_is_wrong(examined, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with socket.socket() as free:  # bound, and nobody listens
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{free.getsockname()[1]}")
        verdict, said = hub_says(examined, "org/name")
    assert verdict is WRONG and "org/name on http://127.0.0.1:" in said and "HF_ENDPOINT" in said


def test_a_bucket_is_looked_for(examined, tmp_path, monkeypatch):
    assert only(places.check_buckets(examined))[0] is NOT_RUN
    sft = dataclasses.replace(examined.config.sft, trajectories="gs://ours/collected")
    remote = with_(examined, sft=sft)
    monkeypatch.setattr(epath, "Path", lambda name: pathlib.Path(name.replace("gs:/", str(tmp_path))))
    verdict, said = only(of_table("bucket", remote))
    assert verdict is WRONG and "does not exist" in said and "gs://ours/collected" in said and "service account" in said
    (tmp_path / "ours").mkdir()
    verdict, said = only(of_table("bucket", remote))
    assert verdict is OK and "is not there yet" in said


# ---------------------------------------------------------------------------------------------- how fast


def test_a_device_far_below_its_nominal_figures_is_slow(examined, monkeypatch):
    monkeypatch.setattr(speed, "matmul_flops", lambda dtype: (90e12, 100e12))
    monkeypatch.setattr(speed, "memory_bandwidth", lambda: (700e9,))
    half = with_(examined, policy=dataclasses.replace(examined.config.policy, dtype="bfloat16"))
    assert only(speed.check_matmul(half))[0] is OK and only(speed.check_bandwidth(half))[0] is OK
    monkeypatch.setattr(speed, "chip_of", lambda device: CHIPS["v5e"])  # 197 TFLOP/s, 819 GB/s
    verdict, said = only(speed.check_matmul(half))
    assert verdict is SLOW and "90 TFLOP/s to 100 on 2 devices (197 nominal)" in said
    assert only(speed.check_bandwidth(half))[0] is OK
    monkeypatch.setattr(speed, "memory_bandwidth", lambda: (700e9, 300e9))
    assert only(speed.check_bandwidth(half))[0] is SLOW


def test_what_is_measured_is_what_was_done(monkeypatch):
    """By a clock of our own: a chain of 8 products of 1024 x 1024 in 1 s, 4 passes over 256 MiB in 2 s."""
    seconds = []
    monkeypatch.setattr(speed, "fastest", lambda run: (jax.block_until_ready(run()), seconds[0])[1])
    for cached in (speed.matmul_flops, speed.memory_bandwidth):
        cached.cache_clear()
    seconds[:] = [1.0]
    assert speed.matmul_flops("float32") == (8 * 2 * 1024**3,)
    seconds[:] = [2.0]
    assert speed.memory_bandwidth() == (4 * 2 * 2**28 / 2,)
    for cached in (speed.matmul_flops, speed.memory_bandwidth):
        cached.cache_clear()


# ---------------------------------------------------------------------------------------------- what is computed


def test_a_wrong_attention_kernel_is_found(examined, monkeypatch):
    assert {verdict for verdict, _ in told(kernels.check_kernels(examined))} == {OK}
    ours = attention._blocks

    def wrong(segments, causal, q, k, v):  # the values right, a gradient not
        o = ours(segments, causal, q, k, v)
        return o + (1e-3 * k.sum() - jax.lax.stop_gradient(1e-3 * k.sum()))

    monkeypatch.setattr(attention, "_blocks", wrong)
    assert {verdict for verdict, _ in told(kernels.check_kernels(examined))} == {WRONG}
    monkeypatch.setattr(attention, "_blocks", lambda *args: ours(*args) * jnp.nan)
    assert all(verdict is WRONG and "inf" in said for verdict, said in told(kernels.check_kernels(examined)))


def test_the_kernels_of_each_platform_are_all_that_the_config_may_name():
    found = {p: kernels.kernels_of(p, "bfloat16") for p in ("tpu", "gpu", "cpu")}
    gpu = ["blocks", "triton", "cudnn", "cudnn_causal"]
    assert found == {"tpu": ["blocks", "splash"], "gpu": gpu, "cpu": ["blocks"]}
    assert kernels.kernels_of("gpu", "float32") == ["blocks", "triton"]
    assert kernels.kernels_of("gpu", "bfloat16", "auto") == ["blocks", "cudnn"]  # what nobody asked for is not judged
    assert kernels.kernels_of("gpu", "bfloat16", "triton") == ["blocks", "triton", "cudnn"]
    named = set(typing.get_args(typing.get_type_hints(PolicyConfig)["attention"]))
    assert named == {"auto", "plain"}.union(*found.values())


# ---------------------------------------------------------------------------------------------- the segmenter


class Fixed:
    """The same mask for every prompt, or the next of several."""

    def __init__(self, *masks, way_s=0.0, identity="fixed"):
        self.masks, self.way_s, self.about, self.asked = masks, way_s, About("fixed", identity), 0

    def segment(self, image, request):
        self.asked += 1
        return SegmentReply(self.masks[self.asked % len(self.masks)], 0.9, "", {"total": 0.01, "transport": self.way_s})


def asked(examined, monkeypatch, segmenter):
    examined = with_(examined, stages=("grpo",))
    monkeypatch.setattr(segmenting, "open_segmenter", lambda config: contextlib.nullcontext(segmenter))
    return told(segmenting.check_masks(examined))


def test_a_segmenter_with_other_masks_is_wrong_and_one_far_away_is_slow(examined, monkeypatch):
    _, disc = check.own_image()
    good, far = asked(examined, monkeypatch, Fixed(disc, way_s=0.2))
    assert good[0] is OK and far[0] is SLOW and "200.0 of them on the way" in far[1] and "nearer" in far[1]
    bad, near = asked(examined, monkeypatch, Fixed(np.roll(disc, 150, axis=1)))
    assert bad[0] is WRONG and "0.7 at least" in bad[1] and "sam_bridge.check" in bad[1] and near[0] is OK
    unequal, _ = asked(examined, monkeypatch, Fixed(disc, disc | np.roll(disc, 1, axis=1)))
    assert unequal[0] is WRONG and "equal prompts give unequal masks" in unequal[1]
    random, _ = asked(examined, monkeypatch, Fixed(~disc, identity="sam2 random"))
    assert random[0] is OK and "not judged" in random[1]
    named, _ = asked(examined, monkeypatch, Fixed(~disc, identity="my_random_forest 1"))
    assert named[0] is WRONG and "0.7 at least" in named[1]


def test_the_real_segmenter_finds_the_disc_and_an_absent_one_is_wrong(examined):
    assert only(segmenting.check_masks(examined))[0] is NOT_RUN  # SFT without validation calls none
    here = with_(examined, segmenter=SegmenterConfig(mode="inprocess"), stages=("grpo",))
    assert [verdict for verdict, _ in told(segmenting.check_masks(here))] == [OK, OK]
    away = with_(here, segmenter=SegmenterConfig(mode="connect", addresses=("127.0.0.1:9",), wait_s=0.1))
    verdict, said = only(of_table("segmenter", away))
    assert verdict is WRONG and "127.0.0.1:9" in said and "docs/sidecar.md" in said


# ---------------------------------------------------------------------------------------------- all of them


def test_a_check_that_raises_or_hangs_is_a_line_and_the_others_go_on(examined):
    woken, heard = threading.Event(), []

    def raises(_):
        raise DataError("half of it is gone\nand more")

    def hangs(_):
        woken.wait(60)
        return []

    fine = Finding("fine", OK, "1")
    table = (Check("a", raises, "mend a"), Check("b", hangs, "mend b"), Check("c", lambda _: [fine], "mend c"))
    findings, still_hangs = run_checks(examined, 2.0, heard.append, table)
    woken.set()
    assert still_hangs and heard == ["a", "b", "c"] and findings[2] == fine
    assert [f.verdict for f in findings] == [WRONG, WRONG, OK]
    assert [f.remedy for f in findings] == ["do as it says; else mend a", "mend b", ""]
    assert findings[0].figure == "DataError: half of it is gone" and "no answer within" in findings[1].figure


def test_what_stops_many_checks_is_said_once(examined):
    three = dataclasses.replace(examined.config.mesh, data=3)
    table = [c for c in checks.CHECKS if c.name in ("mesh", "training step")]
    mesh, step = run_checks(with_(examined, mesh=three), 60, lambda _: None, table)[0]
    assert mesh.verdict is WRONG and (step.verdict, step.figure) == (NOT_RUN, "for want of: mesh")


def test_every_check_says_what_to_do_where_it_raises():
    names = [c.name for c in checks.CHECKS]
    assert len(set(names)) == len(names) == 13 and all(c.remedy for c in checks.CHECKS)
