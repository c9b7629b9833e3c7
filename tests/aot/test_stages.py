"""What --aot compiles: the shapes, the memory that stays, the settings a slice decides, and the command itself."""

import dataclasses
import functools
import json
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from flax import nnx

from rsagent_jax.aot import stages
from rsagent_jax.aot.flops import model_flops
from rsagent_jax.aot.topology import devices, parse_topology
from rsagent_jax.config import slices
from rsagent_jax.config.import_path import load_file
from rsagent_jax.config.schema import (
    BatchConfig,
    GrpoConfig,
    LoraConfig,
    MeshConfig,
    OptimConfig,
    PolicyConfig,
    SamplingConfig,
    SftConfig,
    TrainConfig,
)
from rsagent_jax.config.validation import ValidationConfig, ValidationSet
from rsagent_jax.models.qwen25_vl import convert
from rsagent_jax.models.qwen25_vl.config import size_config
from rsagent_jax.runtime import command, sharding
from tests.aot.test_report import DESIGN
from tests.refusals import refused

ROOT = pathlib.Path(__file__).parents[2]
OPEN = TrainConfig(
    policy=PolicyConfig(weights="7b", remat=""),
    mesh=MeshConfig(tensor=0),
    sft=SftConfig(batch=BatchConfig(rows=0, tokens=4096, patches=14336)),
    grpo=GrpoConfig(batch=BatchConfig(rows=0, tokens=4096, patches=14336), kl=0.005),
)


@pytest.mark.parametrize(("size", "name"), [(size, name) for size in slices.PRESETS for name in slices.PRESETS[size]])
def test_every_preset_gives_a_mesh_that_splits_the_policy(size, name):
    """Every large parameter divides over the mesh, the tensor axes divide the heads, and a host has room for an engine
    or says that it has none."""
    policy, topology, preset = size_config(size), parse_topology(name), slices.PRESETS[size][name]
    grpo = dataclasses.replace(OPEN.grpo, sampling=SamplingConfig(tensor=0, slots=0))
    open_ = dataclasses.replace(OPEN, grpo=grpo)
    if topology.hosts > 16:
        says = f"grpo.prompts = 16 must be a multiple of the {topology.hosts} processes"
        refused(says, stages.fill_topology_defaults, open_, topology, policy)
        open_ = dataclasses.replace(OPEN, grpo=dataclasses.replace(grpo, prompts=topology.hosts))
    if not preset.slots:
        says = f"'{name}' has a preset of {size} for SFT alone"
        refused(says, stages.fill_topology_defaults, open_, topology, policy)
        open_ = dataclasses.replace(open_, stages=("sft",))
    config = stages.fill_topology_defaults(open_, topology, policy)
    assert config.mesh.tensor >= 1 and config.policy.remat
    assert config.sft.batch.rows == config.grpo.batch.rows == topology.devices // preset.tensor
    fake = np.array([None] * topology.devices, object)
    sizes = (config.mesh.data, topology.devices // config.mesh.tensor, config.mesh.tensor)
    mesh = type("Mesh", (), {"shape": dict(zip(sharding.AXES, sizes, strict=True)), "devices": fake})
    for path, v in nnx.to_flat_state(nnx.state(convert.abstract_model(policy), nnx.Param)):
        shape, names = v.get_value().shape, v.get_metadata("axes")
        spec = sharding.spec_of(shape, names, mesh)
        ruled = [sharding.RULES[n] for n in names]
        assert tuple(spec) == tuple(ruled) or np.prod(shape) < sharding.LARGE, path
    for tensor in (preset.tensor, preset.rollout_tensor):
        assert policy.text.num_key_value_heads % tensor == policy.vision.num_heads % tensor == 0
    assert topology.host.devices % preset.rollout_tensor == 0


def test_all_slices_are_those_with_a_preset_for_the_stages():
    def all_of(config):
        return [topology.name for topology in stages.topologies("all", config)]

    sft, large = dataclasses.replace(OPEN, stages=("sft",)), PolicyConfig(weights="72b")
    assert all_of(sft) == all_of(OPEN) == list(slices.PRESETS["7b"])
    assert all_of(dataclasses.replace(sft, policy=large)) == list(slices.PRESETS["72b"])
    assert "v6e-128" not in all_of(dataclasses.replace(OPEN, policy=large))
    tiny = dataclasses.replace(OPEN, policy=PolicyConfig(weights=str(ROOT / "assets/tiny-base")))
    refused("no slice has a preset for .*tiny-base'; name one", all_of, tiny)


def test_what_the_config_says_goes_before_the_preset():
    topology, policy = parse_topology("v5e-16"), size_config("7b")
    grpo = dataclasses.replace(OPEN.grpo, sampling=SamplingConfig(slots=0, tensor=0))
    open_ = dataclasses.replace(OPEN, grpo=grpo)
    found = stages.fill_topology_defaults(open_, topology, policy)
    assert (found.mesh.tensor, found.grpo.sampling.slots, found.grpo.sampling.tensor) == (2, 32, 4)
    grpo = dataclasses.replace(OPEN.grpo, sampling=SamplingConfig(slots=8, tensor=2))
    policy_ = PolicyConfig(weights="7b", remat="dots")
    said = dataclasses.replace(open_, mesh=MeshConfig(tensor=4), policy=policy_, grpo=grpo)
    said = stages.fill_topology_defaults(said, topology, policy)
    assert (said.mesh.tensor, said.policy.remat, said.sft.batch.rows) == (4, "dots", 4)
    assert (said.grpo.sampling.slots, said.grpo.sampling.tensor) == (8, 2)
    other = dataclasses.replace(open_, slice="v6e-8")
    refused("--aot=v5e-16, but slice is v6e-8", stages.fill_topology_defaults, other, topology, policy)
    same = dataclasses.replace(open_, slice="v5e-16")
    assert stages.fill_topology_defaults(same, parse_topology("v5e:4x4"), policy).mesh.tensor == 2


@pytest.mark.parametrize(
    ("change", "devices_", "hidden", "match"),
    [
        ({"slice": "v5e-12"}, 16, 3584, "'v5e-12' has no preset for 7b; there are v5e-8,.*mesh.tensor"),
        ({"slice": "v5e-16"}, 16, 1024, "no preset for hidden size 1024; there are none"),
        ({"mesh": MeshConfig(tensor=3)}, 16, 3584, "mesh.tensor = 3 does not divide 16 devices"),
        ({"sft": SftConfig(batch=BatchConfig(rows=6))}, 4, 3584, "sft.batch.rows = 6 must be a multiple.*4 groups"),
    ],
)
def test_what_cannot_be_settled_is_one_error(change, devices_, hidden, match):
    refused(match, slices.fill_slice_defaults, dataclasses.replace(OPEN, **change), hidden, devices_)


@pytest.mark.parametrize(
    ("weights", "hidden"),
    [("/x/Qwen2.5-VL-7B-Instruct", 3584), ("3b", 2048), ("assets/tiny-base", None), ("72B", 8192)],
)
def test_the_shape_comes_from_a_directory_or_from_a_size_in_the_name(weights, hidden):
    text = stages.policy_config(str(ROOT / weights) if hidden is None else weights).text
    assert text.hidden_size == (hidden or text.hidden_size)


def test_a_policy_without_a_shape_is_one_error():
    refused("'llama-13b' is no directory.*3b, 7b, 32b or 72b", stages.policy_config, "llama-13b")


def test_the_workload_fills_its_rows_without_padding():
    policy = size_config("7b")
    work = stages.workload(BatchConfig(rows=2, tokens=4096, patches=14336), policy, vision_trained=True)
    assert sum(h * w for h, w in work.images) == 14336 and len(work.images) == 9
    assert all(h % 8 == 0 and w % 8 == 0 for h, w in work.images)  # whole windows
    frozen = dataclasses.replace(work, vision_trained=False)
    assert model_flops(policy, frozen).total < model_flops(policy, work).total


TINY = TrainConfig(
    policy=PolicyConfig(weights=str(ROOT / "assets/tiny-base"), dtype="bfloat16", remat="full"),
    sft=SftConfig(batch=BatchConfig(rows=4, tokens=256, patches=128), trajectories_per_step=8),
    grpo=GrpoConfig(
        batch=BatchConfig(rows=4, tokens=256, patches=128), kl=0.1, sampling=SamplingConfig(context=256), prompts=1
    ),
)


def test_what_stays_on_the_device_counts(monkeypatch):
    """By hand: fp32 parameters split over 4 devices; moments are twice that, a sum of gradients once, a bf16 reference
    half; and the micro-batches that are not at work."""
    policy = stages.policy_config(TINY.policy.weights)
    mesh = sharding.make_mesh(MeshConfig(), devices(parse_topology("v5e:2x2")))
    model = convert.abstract_model(policy)
    leaves = jax.tree.leaves(nnx.state(model, nnx.Param)), jax.tree.leaves(sharding.param_shardings(model, mesh))
    split = sum(4 * leaf.size // (4 if "fsdp" in where.spec else 1) for leaf, where in zip(*leaves, strict=True))
    sft = list(stages.stage_jobs(TINY, "sft", policy, mesh))
    grpo = list(stages.stage_jobs(TINY, "grpo", policy, mesh))
    assert [j.program for j in sft] == ["sft gradients", "sft update"]
    assert [j.program for j in grpo] == ["grpo gradients", "grpo log-probs", "grpo update"]
    twice = dataclasses.replace(TINY, grpo=dataclasses.replace(TINY.grpo, epochs=2))
    programs = [j.program for j in stages.stage_jobs(twice, "grpo", policy, mesh)]
    assert programs == ["grpo gradients", "grpo log-probs", "grpo old log-probs", "grpo update"]
    # A row per device. Per token 4 bytes of each: id, segment, advantage, log-prob, image slot, three positions; a mask
    # of 1. Per patch 4 of each: pixels, two positions, segment.
    batch = 256 * (8 * 4 + 1) + 128 * (policy.vision.patch_dim + 3) * 4
    counts = 3 * 4  # optax counts steps in a few i32, whole on every device
    # two micro-batches: the other one and the sum stay
    assert sft[0].resident_bytes == pytest.approx(3 * split + batch, abs=counts)
    assert sft[1].resident_bytes == 2 * batch
    assert grpo[0].resident_bytes == pytest.approx(2.5 * split, abs=counts)  # one micro-batch, and the reference
    assert grpo[1].resident_bytes == pytest.approx(3 * split, abs=counts)
    assert grpo[2].resident_bytes == pytest.approx(0.5 * split + batch, abs=counts)
    frozen = dataclasses.replace(TINY, sft=dataclasses.replace(TINY.sft, optim=OptimConfig(freeze=("vision",))))
    assert next(stages.stage_jobs(frozen, "sft", policy, mesh)).resident_bytes < sft[0].resident_bytes


def test_a_name_that_no_program_has_is_an_error_and_one_of_a_single_stage_is_none(monkeypatch):
    monkeypatch.setattr(stages, "report_job", lambda job, *_: job.program)
    both, topology = dataclasses.replace(TINY, stages=("sft", "grpo")), parse_topology("v5e:2x2")
    assert stages.report_stages(both, topology, "rollout d") == ["rollout decode"]
    names = "no program has this in its name; there are sft .*gradients, .*grpo update, rollout .*decode"
    refused(f"--aot_only=rolout: {names}", stages.report_stages, both, topology, "rolout")
    engine = functools.partial(stages.compile_engine, SamplingConfig(context=256), TINY.policy.weights, "bfloat16")
    refused("--aot_only=decoed: no program.* there are rollout", engine, "v5e:2x2", "decoed")
    for file, flags in ("train.py", ["--aot_quick"]), ("train.py", ["--aot_only=x"]), ("evaluate.py", ["--aot_only=x"]):
        config = "configs/eval.py:refcoco-testA" if file == "evaluate.py" else "configs/sft_tpu.py"
        main = load_file(ROOT / file).main
        _, given = command.parse_arguments(main, [f"--config={config}", "--config.policy.weights=7b", *flags])
        refused("--aot=SLICE, such as --aot=v5e-16, is missing", main, **given)


def test_with_adapters_the_base_is_an_argument_and_its_tower_a_program():
    """By hand: a bf16 base, adapters of rank 8 with two moments, no reference; a seen batch instead of pixels."""
    config = dataclasses.replace(TINY, policy=dataclasses.replace(TINY.policy, lora=LoraConfig(rank=8)))
    policy = stages.policy_config(TINY.policy.weights)
    mesh = sharding.make_mesh(MeshConfig(), devices(parse_topology("v5e:2x2")))
    model, text = convert.abstract_model(policy), policy.text
    placed = convert.flat_state(sharding.param_shardings(model, mesh))
    sizes = {
        name: v.size // (4 if "fsdp" in placed[name].spec else 1) for name, v in convert.flat_params(model).items()
    }
    base, tower = 2 * sum(sizes.values()), 2 * sum(n for name, n in sizes.items() if name.startswith("vision"))
    d, kv, ff = text.hidden_size, text.num_key_value_heads * text.head_dim, text.intermediate_size
    # q and o have d at both ends, k and v, then gate, up and down; ends that are split over fsdp are those of size d
    split, whole = 7 * d // 4, d + 2 * kv + d + 3 * ff
    adapters = 4 * 8 * text.num_hidden_layers * (split + whole)
    seen = 256 * (8 * 4 + 1) + 128 * 3 * 4 + 32 * d * 2
    tower_job, gradients, update = stages.stage_jobs(config, "sft", policy, mesh)
    counts = 3 * 4
    assert [j.program for j in (tower_job, gradients, update)] == ["sft tower", "sft gradients", "sft update"]
    assert tower_job.resident_bytes == pytest.approx(3 * adapters + base - tower + seen, abs=counts)
    assert gradients.resident_bytes == pytest.approx(3 * adapters + tower + seen, abs=counts)
    assert update.resident_bytes == base + 2 * seen
    grpo = list(stages.stage_jobs(config, "grpo", policy, mesh))
    assert [j.program for j in grpo] == ["grpo tower", "grpo gradients", "grpo log-probs", "grpo update"]
    assert grpo[2].resident_bytes == pytest.approx(3 * adapters + tower, abs=counts)
    (read, *_), _ = grpo[1].trace().lower().args_info
    assert sum(np.prod(x.shape) for x in jax.tree.leaves(read)) == 8 * text.num_hidden_layers * (7 * d + whole)


def test_sft_with_a_validation_has_its_engine_beside_it():
    """Resident beside the engine's encode program: SFT's parameters and moments, a sixteenth of each on a device."""
    sampling = SamplingConfig(tensor=2, slots=8)
    config = dataclasses.replace(OPEN, stages=("sft",), grpo=dataclasses.replace(OPEN.grpo, sampling=sampling))
    topology, policy = parse_topology("v5e-16"), size_config("3b")

    def jobs(config):
        filled = stages.fill_topology_defaults(config, topology, policy)
        return {job.program: job for job in stages._config_jobs(filled, topology, policy)}

    alone = jobs(config)
    beside = jobs(dataclasses.replace(config, validation=ValidationConfig(sets=(ValidationSet(name="val"),))))
    parts = [f"weights {name}" for name in "others k mlp.down mlp.gate mlp.up norm1 norm2 o q v".split()]
    added = [f"validation rollout {name}" for name in (*parts, "encode", "append", "decode")]
    assert list(beside) == [*alone, *added] and all(name.startswith("sft ") for name in alone)
    state = 12 * sum(x.size for x in jax.tree.leaves(nnx.state(convert.abstract_model(policy), nnx.Param))) / 16
    assert beside[added[0]].resident_bytes == pytest.approx(state, rel=0.01)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_command_prints_a_table_and_the_reports_and_says_when_memory_is_short():
    def aot(*more):
        command = [sys.executable, "train.py", "--config=configs/quickstart.py", "--aot=v5e:2x2"]
        command += ["--config.stages=('sft',)", "--config.policy.dtype=bfloat16", "--config.policy.remat=full", *more]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
        return done.returncode, done.stdout, done.stderr

    rows = ("--config.sft.batch.rows=4", "--config.sft.batch.tokens=256", "--config.sft.batch.patches=128")
    code, out, err = aot(*rows)
    assert code == 0, err[-2000:]
    reports = json.loads(out.splitlines()[-1])
    assert [r["program"] for r in reports] == ["sft tower", "sft gradients", "sft update"]
    assert all(set(DESIGN) <= set(r) and r["fits"] and r["devices"] == 4 for r in reports)
    assert reports[1]["hlo_to_model_flops"] > 1.0 and not reports[1]["unknown_trip_counts"]
    assert "sft gradients" in out.splitlines()[2]

    huge = ("--config.sft.batch.rows=4", "--config.sft.batch.tokens=524288", "--config.sft.batch.patches=64")
    code, out, err = aot(*huge, "--config.policy.attention=plain")  # scores of half a million tokens squared
    assert code == 3, err[-2000:]
    first = json.loads(out.splitlines()[-1])[1]
    assert not first["fits"] and first["bound_by"] == "memory" and first["peak_hbm_bytes"] > first["hbm_bytes"] > 0

    code, out, err = aot(*rows, "--aot=v5x-16")
    assert code == 2 and "unknown TPU topology 'v5x-16'; did you mean" in err and "Traceback" not in err


def test_the_kernels_flops_are_those_of_the_tiles_that_the_rows_segments_share():
    """By hand for a row of 4,096 tokens and 14,336 patches: a view of 12 x 12 tiles of 512, eight overlays of 2 x 2."""
    policy = size_config("7b")
    work = stages.workload(BatchConfig(rows=8, tokens=4096, patches=14336), policy, vision_trained=True)
    flops = stages.attention_flops(policy, work)
    text, vision = (1, 28, 4096, 128), (1, 16, 14336, 80)
    tile = 2 * 512**2
    assert flops("splash_mha_fwd_segmented", ((8, 8), text)) == 2 * tile * 128 * 28 * (8 * 9 / 2)
    assert flops("splash_mha_dkv_segmented", (text,)) == 5 * tile * 128 * 28 * (8 * 9 / 2)  # one backward program
    images = 12 * 12 + 8 * 2 * 2
    assert flops("splash_mha_fwd_segmented", (vision,)) == 2 * tile * 80 * 16 * images
    assert flops("splash_mha_dq_segmented", (vision,)) == 3 * tile * 80 * 16 * images
    assert flops("splash_mha_dkv_segmented", (vision,)) == 4 * tile * 80 * 16 * images
    assert flops("other_kernel", (text,)) is None


@pytest.mark.parametrize(
    ("name", "size", "tensor", "slots"),
    [("v5e-8", "7b", 4, 128), ("v6e-8", "7b", 2, 256), ("v5p-8", "7b", 1, 512), ("v6e-8", "32b", 8, 64)],
)
def test_an_engine_alone_is_laid_out_by_the_kind_of_device(name, size, tensor, slots):
    """By the kinds that the compiler's devices call themselves; what a config says stands."""
    hidden, found = size_config(size).text.hidden_size, devices(parse_topology(name).host)
    fill = functools.partial(slices.fill_engine_defaults, hidden_size=hidden, devices=found)
    open_ = SamplingConfig(tensor=0, slots=0)
    assert (fill(open_).tensor, fill(open_).slots) == (tensor, slots)
    assert fill(SamplingConfig(tensor=2, slots=0)).slots % 2 == 0 and fill(SamplingConfig(tensor=2)).slots == 64
    assert slices.fill_engine_defaults(open_, 64, jax.devices()[:1]) == SamplingConfig(tensor=1, slots=64)


def test_an_engine_that_wants_more_devices_than_a_host_has_is_one_error():
    """A host of v6e-64 has four chips. The 72B has 137 GiB of weights; eight chips have 250, for these and what they
    are made of."""
    fill, found = slices.fill_engine_defaults, devices(parse_topology("v6e-64").host)
    refused("tensor = 8 must divide the 4 devices.*v6e-8", fill, SamplingConfig(tensor=0), 5120, found)
    says = "no engine of 72b fits a host of TPU v6 lite: take one of TPU v5, TPU7x"
    refused(says, fill, SamplingConfig(tensor=0), 8192, devices(parse_topology("v6e-8")))
