"""policy.remat = "auto": which policy fits simulated devices with a limit that nobody has; and that all take one."""

import dataclasses
import json

import jax
import pytest

from rsagent_jax.aot import remat, stages
from rsagent_jax.aot.topology import parse_topology
from rsagent_jax.config.schema import MeshConfig
from rsagent_jax.runtime import processes, sharding
from rsagent_jax.train import run_identity
from tests.aot.test_stages import TINY

SFT = dataclasses.replace(TINY, stages=("sft",), policy=dataclasses.replace(TINY.policy, remat=remat.AUTO))
POLICY = stages.policy_config(SFT.policy.weights)


def with_remat(kind: str):
    return remat._with_remat(SFT, kind)


@pytest.mark.slow
def test_the_fastest_that_fits_is_taken_and_the_leanest_where_none_does(monkeypatch):
    """The real gradients, compiled for four simulated devices; the limits lie between what they need."""
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:4])
    needed = {kind: remat.gradient_bytes(with_remat(kind), "sft", POLICY, mesh) for kind in ("none", "full")}
    assert needed["none"] > needed["full"] > 0
    monkeypatch.setattr(remat, "KINDS", (*needed,))
    monkeypatch.setattr(remat, "gradient_bytes", lambda config, *_: needed[config.policy.remat])
    for kind, bytes_ in needed.items():
        limit = int(bytes_ / (1 - remat.SPARE)) + 1
        assert remat.choose_remat(SFT, POLICY, mesh, limit)[0] == kind
        assert remat.choose_remat(SFT, POLICY, mesh, bytes_)[0] == "full"  # nothing to spare for this kind
    assert "does not fit either: none" in remat.choose_remat(SFT, POLICY, mesh, 1)[1]


def test_a_stage_more_may_ask_for_a_leaner_one_and_a_refusal_by_the_compiler_is_no_fit(monkeypatch):
    found = {"sft": 1.0, "grpo": 5.0}
    monkeypatch.setattr(
        remat, "gradient_bytes", lambda config, stage, *_: found[stage] - (config.policy.remat == "full")
    )
    both = dataclasses.replace(SFT, stages=("sft", "grpo"))
    assert [remat.choose_remat(config, POLICY, None, 5)[0] for config in (SFT, both)] == ["none", "full"]
    found["grpo"] = float("inf")
    assert "none refused by the compiler, dots refused" in remat.choose_remat(both, POLICY, None, 5)[1]


def test_all_processes_take_the_leanest_of_theirs_and_a_run_that_goes_on_what_it_had(monkeypatch, capsys):
    assert remat.device_limit() is None  # of a CPU
    assert remat.settle_remat(SFT, POLICY, "").policy.remat == "full"
    assert "does not tell" in capsys.readouterr().out
    monkeypatch.setattr(remat, "choose_remat", lambda *_: ("dots", "it fits"))
    monkeypatch.setattr(processes, "exchange", lambda text: [text])
    assert remat.settle_remat(SFT, POLICY, "save:qkv").policy.remat == "dots"
    assert remat.settle_remat(SFT, POLICY, "attention").policy.remat == "attention"
    monkeypatch.setattr(processes, "exchange", lambda text: [text, text and "selective"])
    monkeypatch.setattr(processes, "all_or_none", lambda check: check())
    assert remat.settle_remat(SFT, POLICY, "").policy.remat == "selective"
    assert remat.settle_remat(with_remat("save:qkv"), POLICY, "full").policy.remat == "save:qkv"  # nothing is asked


def test_what_the_last_start_took_is_found_while_nothing_else_has_changed(tmp_path, monkeypatch):
    run_identity.record_start(tmp_path, with_remat("selective"), {}, remat.AUTO)
    assert run_identity.last_remat(tmp_path, SFT) == ""  # no checkpoint came of it
    monkeypatch.setattr(run_identity, "saved_steps", lambda workdir: {"sft": 1})
    assert run_identity.last_remat(tmp_path, SFT) == "selective"
    assert run_identity.last_remat(tmp_path, dataclasses.replace(SFT, seed=SFT.seed + 1)) == ""
    run_identity.record_start(tmp_path, with_remat("selective"), {}, "selective")
    assert run_identity.last_remat(tmp_path, SFT) == ""  # it was not found then, but asked for
    run_identity.record_start(tmp_path, with_remat("selective"), {}, remat.AUTO)
    monkeypatch.setattr(run_identity, "_devices", lambda: "8 x other")
    assert run_identity.last_remat(tmp_path, SFT) == ""
    assert json.loads((tmp_path / "config.json").read_text())["policy"]["remat"] == "selective"


@pytest.mark.slow
def test_for_a_slice_that_is_not_there_its_compiler_says_what_fits(monkeypatch):
    """The same slice with the memory that the fastest needs, none to spare, takes another."""
    topology, found, measured = parse_topology("v5e:2x2"), {}, remat.gradient_bytes

    def once(config, *args):
        kind = config.policy.remat
        found[kind] = found.get(kind) or measured(config, *args)
        return found[kind]

    monkeypatch.setattr(remat, "gradient_bytes", once)
    monkeypatch.setattr(remat, "KINDS", ("none", "full"))
    config, why = remat.remat_for_topology(SFT, topology)
    assert config.policy.remat == "none" and why.startswith("policy.remat = auto for v5e:2x2: none; none 0.")
    smaller = dataclasses.replace(topology.chip, hbm_bytes=int(found["none"]))
    config, why = remat.remat_for_topology(SFT, dataclasses.replace(topology, chip=smaller))
    assert config.policy.remat == "full" and found["none"] > found["full"]
    assert remat.remat_for_topology(config, topology) == (config, "")
