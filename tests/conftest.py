"""What holds for every test: the CPU, no network, no deadline on one example (a busy machine is no failure).

transformers and sam2 import torchvision, whose compiled operators may not load beside a CPU build of torch; it then
fails while it describes `nms`. Declared before, the operators exist without a body, and nothing here calls them. Only
the first import of torchvision triggers this: tests without torch do not pay for it.
"""

import importlib.machinery
import os
import pathlib
import shutil
import sys

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before jax is imported; subprocesses inherit it
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import hypothesis
import jaxtyping._typeguard
import pytest

from rsagent_jax.types import Completion, Prompt

# The shapes and dtypes that these modules declare are checked where a test calls them; not with JAXTYPING_DISABLE=1.
CHECKED = (
    "data.packing",
    "models.qwen25_vl.attention",
    "models.qwen25_vl.logprobs",
    "models.qwen25_vl.positions",
    "train.advantages",
    "train.losses",
)
jaxtyping.install_import_hook([f"rsagent_jax.{name}" for name in CHECKED], "jaxtyping._typeguard.typechecked")
for boundary in (Completion, Prompt):
    jaxtyping.jaxtyped(boundary, typechecker=jaxtyping._typeguard.typechecked)

hypothesis.settings.register_profile("rsagent", deadline=None)
hypothesis.settings.load_profile("rsagent")


def pytest_collection_modifyitems(items):
    """Files with slow tests first: of two workers, neither is left with a long one at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


KEPT = []  # a library's declarations go when it does


class DeclareOperators:
    """Sees torchvision's import coming, and leaves the import itself to the others."""

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name == "transformers":  # rsagent_jax hides torch from it; here other tests need its models, too
            for hidden in [key for key in ("torch", "torchvision") if sys.modules.get(key, key) is None]:
                del sys.modules[hidden]
        if name == "torchvision" and cls in sys.meta_path:
            sys.meta_path.remove(cls)
            declare_operators()


def declare_operators() -> None:
    spec = importlib.machinery.PathFinder.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return
    import torch

    if hasattr(torch.ops.torchvision, "nms"):  # sam_bridge/backends/sam2.py has done it
        return
    try:
        torch.ops.load_library(pathlib.Path(spec.origin).parent / "_C.so")
    except OSError:
        KEPT.append(torch.library.Library("torchvision", "DEF"))
        for operator in ("nms", "qnms"):
            KEPT[0].define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


sys.meta_path.insert(0, DeclareOperators)


@pytest.fixture(scope="session")
def photos():
    from rsagent_jax.tiny import scenes

    return scenes.load_photos()


@pytest.fixture(scope="session")
def dataset(tmp_path_factory):
    """One small data set in the layout of RefCOCO; tests that damage it take `copied`."""
    from rsagent_jax.tiny import synthetic

    root = tmp_path_factory.mktemp("refcoco") / "data"
    synthetic.write_dataset(root, train=24, val=6, test=4, seed=5, progress=False)
    return root


@pytest.fixture
def copied(dataset, tmp_path):
    return shutil.copytree(dataset, tmp_path / "copy")


@pytest.fixture
def imports_restored():
    """What a test imports from files of its own is forgotten after it."""
    modules, places = dict(sys.modules), list(sys.path)
    yield
    sys.modules.clear()
    sys.modules.update(modules)
    sys.path[:] = places
