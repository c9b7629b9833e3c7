import jax
import pytest


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """A directory for what several runs of a module compile, as on a user's machine."""
    directory = str(tmp_path_factory.mktemp("compiled"))
    settings = {"jax_compilation_cache_dir": directory, "jax_persistent_cache_min_compile_time_secs": 0.0}
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    yield directory
    for name, value in before.items():
        jax.config.update(name, value)
