"""A command's parameters are its flags; help comes from the sources; a config file is held against its command."""

import contextlib
import pathlib
import subprocess
import sys
import types

import pytest

from rsagent_jax.config.ranges import CountOrZero
from rsagent_jax.config.schema import EvalConfig, SegmentConfig, TrainConfig
from rsagent_jax.runtime import command
from rsagent_jax.runtime.help import field_rows
from tests.refusals import refused

ROOT = pathlib.Path(__file__).parents[2]
ROOMS = [f"rsagent_jax.{name}" for name in ("aot.costs", "aot.scaling", "data.get", "tiny.pretrain", "tiny.synthetic")]
MODULES = [f"rsagent_jax.{p.stem}" for p in (ROOT / "rsagent_jax").glob("*.py") if "start_command" in p.read_text()]
HEAVY = ("jax", "flax", "torch", "transformers", "openai", "orbax", "grain", "tensorflow_datasets", "matplotlib")


def line(main, *argv):
    return command.parse_arguments(main, argv)


def wrong(main, *argv) -> str:
    return refused(".", line, main, *argv)


def test_help_of_every_command_needs_nothing_heavy_and_ends_with_0():
    assert len(MODULES) == 14
    names = [*MODULES, *ROOMS, "rsagent_jax.report.readme_picture", "train.py", "evaluate.py"]
    code = (
        "import sys\nfrom rsagent_jax.runtime import command\n"
        f"for name in {names!r}:\n    print('COMMAND', name)\n    assert command.run_command(name, ['--help']) == 0\n"
        f"print('LOADED', *[name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    pages = dict(page.split("\n", 1) for page in done.stdout.split("COMMAND ")[1:])
    assert done.stdout.endswith("LOADED\n") and list(pages) == names
    assert all("Flags:\n  --" in page for page in pages.values())
    train = pages["train.py"]
    for text in (
        "--config=", "--workdir=", "--aot_quick ", "configs/grpo_tpu.py", "GRPO of Qwen2.5-VL-7B",
        "--config.grpo.optim.lr=1e-06", "--config.grpo.kl_estimator=k3", "k1 | k2 | k3", "--config.sft.epochs=2.0",
        "--config.grpo.reward.NAME", "final, process, format", "--config.policy.weights= ",
    ):  # fmt: skip
        assert text in train, text
    assert "configs/eval.py" not in train and "configs/eval.py" in pages["evaluate.py"]
    assert "IMAGE " in pages["rsagent_jax.segment"] and "--config=configs/segment.py" in pages["rsagent_jax.segment"]


def test_a_run_as_a_script_or_a_module_answers_help():
    for argv in (["train.py"], ["-m", "rsagent_jax.collect"]):
        done = subprocess.run([sys.executable, *argv, "--help"], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0 and "--config.seed=0" in done.stdout and not done.stderr


@pytest.mark.parametrize("cls", command.OWNERS)
def test_every_field_says_what_it_is(cls):
    assert not [name for name, _, text in field_rows(cls) if not text.strip()]


def test_flags_are_parameters():
    def main(image: str, /, *rest: pathlib.Path, out: pathlib.Path, samples: CountOrZero = 4, fast: bool = False,
             dtype: str | None = None, turns: int | None = None):  # fmt: skip
        pass

    assert line(main, "a", "b", "--out=~/x", "--nofast", "--turns", "3") == (
        ["a", pathlib.Path("b")],
        dict(out=pathlib.Path("~/x").expanduser(), samples=4, fast=False, dtype=None, turns=3),
    )
    assert line(main, "--fast", "--out=x", "--", "--dtype=y")[0] == ["--dtype=y"]
    assert line(main, "--fast", "--out=x", "a")[1]["fast"] is True
    assert wrong(main, "--out=x") == "IMAGE is missing; the arguments are: IMAGE"
    assert wrong(main, "a") == "command line: missing flag --out (Path)"
    assert wrong(main, "a", "--out=x", "--sample=3") == "command line: unknown flag --sample; did you mean --samples?"
    assert wrong(main, "a", "--out=x", "--samples=-1") == "command line: --samples must be at least 0, got -1"
    assert "must be true or false" in wrong(main, "a", "--out=x", "--fast=perhaps")
    assert wrong(main, "a", "--out=x", "--dtype=") == "--dtype= is empty: give a value, or leave it out"


def test_a_users_function_cannot_end_a_command_with_success(tmp_path, capsys):
    command_file = tmp_path / "mine.py"
    command_file.write_text("import sys\n\ndef main():\n    sys.exit(0)\n")
    assert command.run_command(str(command_file), []) == 1
    assert capsys.readouterr().err == f"error: {command_file}, line 4 ended Python with status 0\n"


def test_a_work_directory_has_one_command(tmp_path):
    for own in command.LEFT:
        assert command.make_workdir(str(tmp_path / own), own=own).is_dir()
        (tmp_path / own / own).mkdir()
        assert command.make_workdir(str(tmp_path / own), own=own) == tmp_path / own
    says = r"--workdir=\S+/attempts holds what rsagent_jax.collect left there .attempts/.; give a directory of its own"
    refused(says, command.make_workdir, str(tmp_path / "attempts"), own="shards")


def train(config: TrainConfig, *, workdir: str = ""):
    pass


def test_did_you_mean_stays_in_the_stage_that_was_meant():
    def hint(name: str) -> str:
        return wrong(train, "--config=configs/quickstart.py", f"--config.{name}=1").partition("; ")[2]

    assert "sft" not in hint("grpo.trajectories") and "grpo" not in hint("sft.grup")  # only the other has them
    assert hint("sft.zzz").startswith("known fields: ")
    assert hint("grpo.optm.lr") == "did you mean --config.grpo.optim.lr?"
    assert hint("sft.learn.lr") == "did you mean --config.sft.optim.lr?"
    assert hint("lr") == "did you mean --config.sft.optim.lr or --config.grpo.optim.lr?"
    assert hint("grop.steps") == "did you mean --config.grpo.steps?"


def test_a_config_of_another_command_is_said():
    def evaluate(config: EvalConfig):
        pass

    def segment(query: str, /, config: SegmentConfig = "configs/segment.py"):
        pass

    for main, file, owner, wanted in (
        (train, "eval.py", "evaluate.py", "train.py"),
        (evaluate, "segment.py", "rsagent_jax.segment", "evaluate.py"),
        (evaluate, "quickstart.py", "train.py", "evaluate.py"),
        (train, "tiny_base.py", "rsagent_jax.tiny.pretrain", "train.py"),
    ):
        said = wrong(main, f"--config=configs/{file}")
        assert said == f"configs/{file} is a config of {owner}; here one of {wanted} is needed"
    assert line(segment, "it")[1]["config"].sampling.slots == 1
    assert "is a config of evaluate.py" in wrong(segment, "it", "--config=configs/eval.py")


def test_commands_whose_work_is_kept_have_a_limit_for_what_hangs(monkeypatch):
    """Seconds for what is done the first time, and for the answer that takes longest: the tool's deadline of 120 s, and
    three tries of a remote teacher of 120 s each, with pauses of a minute."""
    given = []
    monkeypatch.setattr(command.WATCHDOG, "limited", lambda *limits: given.append(limits) or contextlib.nullcontext())
    remote = "--config.teacher.remote.url=http://x --config.teacher.remote.model=m --config.teacher.remote.retries=2"
    for name, flags in (
        (f"{ROOT}/train.py", "--config=configs/debug.py"),
        (f"{ROOT}/evaluate.py", "--config=configs/eval_quickstart.py"),
        ("rsagent_jax.collect", f"--config=configs/collect_quickstart.py {remote}"),
        ("rsagent_jax.doctor", "--config=configs/debug.py --config.slice=none"),
    ):
        assert command.run_command(name, [*flags.split(), "--config.hang_minutes=2"]) == 2  # no work directory
    assert given == [(120.0, 120.0), (120.0, 120.0), (120.0, 120.0 + 3 * 120 + 2 * 60), (0.0, 0.0)]


def test_the_directory_that_a_command_writes_to(tmp_path):
    assert command.make_workdir(str(tmp_path / "a/b")).is_dir()
    refused("--out=DIR is required", command.make_workdir, "", "out")
    (tmp_path / "file").write_text("")
    refused(f"{tmp_path}/file/x cannot be written to", command.make_workdir, f"{tmp_path}/file/x", "out")
    refused("s3://b/x is neither a path of this machine nor gs://", command.make_workdir, "s3://b/x", "out")


def test_a_reader_that_has_gone_ends_a_command_quietly():
    for flush in (True, False):
        body = f"def main():\n    print(1, flush={flush})\n"
        start = (
            f"import sys; from rsagent_jax.runtime import command\n{body}\nsys.modules['m'] = sys.modules[__name__]\n"
        )
        argv = [sys.executable, "-c", f"{start}command._exit(command.run_command('m', []))"]
        child = subprocess.Popen(argv, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        child.stdout.close()
        assert (child.wait(), child.stderr.read()) == (command.NO_READER, b"")


def test_a_pipe_of_anything_else_stays_visible(monkeypatch):
    def main():
        raise BrokenPipeError("of a side-car")

    monkeypatch.setitem(sys.modules, "broken", types.SimpleNamespace(main=main))
    with pytest.raises(BrokenPipeError, match="side-car"):
        command.run_command("broken", [])


def test_ctrl_c_inside_a_destructor_is_not_lost(tmp_path):
    (tmp_path / "held.py").write_text(
        "import signal, time\n"
        "class Held:\n"
        "    def __del__(self):\n"
        "        signal.raise_signal(signal.SIGINT)\n"
        "def main(*, seconds: float = 60.0) -> None:\n"
        "    Held()\n"
        "    time.sleep(seconds)\n"
    )
    code = (
        "import signal, sys\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from rsagent_jax.runtime import command\nsys.exit(command.run_command(sys.argv[1], []))"
    )
    argv = [sys.executable, "-c", code, str(tmp_path / "held.py")]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=50)
    assert (done.returncode, done.stderr) == (130, "stopped\n")
