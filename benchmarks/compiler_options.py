"""What the TPU compiler's options do to a training program, by what the compiler and the schedule say: nothing is run.

  python benchmarks/compiler_options.py [--aot=v6e-8] [--size=3b] [--sets="none,gather,…"] [--tower] [--out=FILE]

Compiles the gradients of an SFT micro-batch fully, once for each set of options and without any of
runtime/compiler_options.py: of the decoder alone, or with --tower of the vision tower as well. A row of the table:

exposed   seconds that a device waits for collectives, of all seconds of the links (aot/schedule.py)
step      operation after operation at the chip's peaks, with what is exposed
HBM       GiB read and written; peak: GiB at the fullest moment

Sets that were written to --out before are not compiled again. The last line is everything as JSON.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before jax is imported: the compiler is asked for, not a TPU

import jax  # noqa: E402

from rsagent_jax.aot import stages  # noqa: E402
from rsagent_jax.aot.report import analyse  # noqa: E402
from rsagent_jax.aot.topology import GIB, parse_topology  # noqa: E402
from rsagent_jax.config.build import build_config  # noqa: E402
from rsagent_jax.config.import_path import load_file  # noqa: E402
from rsagent_jax.config.schema import TrainConfig  # noqa: E402
from rsagent_jax.runtime import sharding  # noqa: E402
from rsagent_jax.runtime.compiler_options import OPTIONS  # noqa: E402

# Names: MaxText (benchmarks/xla_flags_library.py) and AXLearn (common/compiler_options.py).
FUSION = "xla_tpu_enable_async_collective_fusion"
GATHER = {"xla_enable_async_all_gather": "true", f"{FUSION}_fuse_all_gather": "true"}
SETS: dict[str, dict[str, str]] = {
    "none": {},
    "gather": GATHER,  # all-gathers begin early, and a chain of fusions carries them
    "gather + steps": GATHER
    | {FUSION: "true", f"{FUSION}_multiple_steps": "true", "xla_tpu_overlap_compute_collective_tc": "true"},
    "gather + reduce": GATHER | {f"{FUSION}_fuse_all_reduce": "true", f"{FUSION}_fuse_reduce_scatter": "true"},
    "gather + vmem": GATHER | {"xla_tpu_scoped_vmem_limit_kib": "65536"},
    "gather + pipelining": GATHER | {"xla_tpu_enable_ag_backward_pipelining": "true"},
    "gather + scheduler": GATHER | {"xla_tpu_enable_all_experimental_scheduler_features": "true"},
    "gather + data parallel": GATHER
    | {
        "xla_tpu_enable_data_parallel_all_reduce_opt": "true",
        "xla_tpu_data_parallel_opt_different_sized_ops": "true",
    },
    "gather + no einsum": GATHER | {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"},
    "sparse core": {  # all-gathers on the SparseCores of v6e
        "xla_tpu_enable_sparse_core_collective_offload_all_gather": "true",
        f"{FUSION}_fuse_all_gather": "false",
        "xla_tpu_use_tc_device_shape_on_sc": "true",
        "xla_sc_disable_megacore_partitioning": "true",
    },
    "no scheduler": {"xla_tpu_enable_latency_hiding_scheduler": "false"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--aot", default="v6e-8", help="a slice")
    parser.add_argument("--size", default="3b", help="of the policy")
    parser.add_argument("--sets", default=",".join(SETS), help=f"of {', '.join(SETS)}, or NAME=VALUE")
    parser.add_argument("--tower", action="store_true", help="the vision tower is trained, too")
    parser.add_argument("--out", default="", help="lines of JSON, added to")
    args = parser.parse_args()
    out = pathlib.Path(args.out) if args.out else None
    lines = [json.loads(line) for line in out.read_text().splitlines()] if out and out.exists() else []
    done = {line["set"]: line for line in lines if all(line[k] == getattr(args, k) for k in ("aot", "size", "tower"))}
    for name in args.sets.split(","):
        if name not in done:
            options = SETS[name] if name in SETS else dict([name.split("=")])
            done[name] = {"set": name, "aot": args.aot, "size": args.size, "tower": args.tower} | figures(args, options)
            if out:
                with out.open("a") as file:
                    file.write(json.dumps(done[name]) + "\n")
        print(row(done[name]), flush=True)
    print(json.dumps(list(done.values())))


def figures(args: argparse.Namespace, options: dict[str, str]) -> dict:
    """Of the program with these options and none of ours, or the compiler's error."""
    OPTIONS.clear()
    config = load_file(ROOT / "configs/sft_tpu.py").get_config()
    config.policy.weights, config.slice = f"Qwen2.5-VL-{args.size.upper()}-Instruct", args.aot
    config.sft.optim.freeze = () if args.tower else ("vision", "merger")
    topology, policy = parse_topology(args.aot), stages.policy_config(config.policy.weights)
    config = stages.fill_topology_defaults(build_config(TrainConfig, config), topology, policy)
    mesh = sharding.make_mesh(config.mesh, stages.devices(topology))
    jobs = {job.program: job for job in stages.stage_jobs(config, "sft", policy, mesh)}
    job, start = jobs["sft gradients"], time.perf_counter()
    try:
        compiled = (traced := job.trace()).lower().compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        return {"error": str(error).splitlines()[0]}
    work = stages.attention_flops(policy, stages.workload(config.sft.batch, policy, vision_trained=args.tower))
    report = analyse(traced, compiled, job, topology, work)
    return {
        "overlap": dataclasses.asdict(report.overlap),
        "hbm_traffic_bytes": report.hbm_traffic_bytes,
        "peak_hbm_bytes": report.peak_hbm_bytes,
        "compile_s": time.perf_counter() - start,
    }


def row(line: dict) -> str:
    if "error" in line:
        return f"| {line['set']} | {line['error'][:100]} |"
    o = line["overlap"]
    apart = f"{1e3 * o['exposed_s']:.1f} of {1e3 * o['collective_s']:.1f} ms | {1e3 * o['step_s']:.1f} ms"
    sizes = " | ".join(f"{line[key] / GIB:.2f}" for key in ("hbm_traffic_bytes", "peak_hbm_bytes"))
    return f"| {line['set']} | {apart} | {sizes} | {o['asynchronous']} and {o['synchronous']} |"


if __name__ == "__main__":
    main()
