"""One small data set on disk for the whole folder; tests that damage it take a copy."""

import shutil

import pytest

from rsagent_jax.tiny import scenes, synthetic


@pytest.fixture(scope="session")
def photos():
    return scenes.load_photos()


@pytest.fixture(scope="session")
def dataset(tmp_path_factory):
    root = tmp_path_factory.mktemp("refcoco") / "data"
    synthetic.write_dataset(root, train=24, val=6, test=4, seed=5, progress=False)
    return root


@pytest.fixture
def copied(dataset, tmp_path):
    return shutil.copytree(dataset, tmp_path / "copy")
