"""Eight CPU devices, strict promotion and a cache of compiled programs, before JAX starts."""

import atexit
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + (
    " --xla_force_host_platform_device_count=8"
)
import jax
import pytest

# What two tests compile is compiled once. For this process alone: files are not written in one
# step, so that another one could read a part, or be killed and leave one.
CACHE = tempfile.mkdtemp(prefix="jopt-tests-")
atexit.register(shutil.rmtree, CACHE, ignore_errors=True)
jax.config.update("jax_compilation_cache_dir", CACHE)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

SLOW = frozenset((pathlib.Path(__file__).parent / "slow.txt").read_text().splitlines())


GONE = pytest.StashKey[set[str]]()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Marks the tests listed in `slow.txt`."""
    names = {item.nodeid for item in items}
    files = {name.split("::")[0] for name in names}
    config.stash[GONE] = {name for name in SLOW if name.split("::")[0] in files} - names
    for item in items:
        if item.nodeid in SLOW:
            item.add_marker(pytest.mark.slow)


@pytest.fixture
def gone(pytestconfig: pytest.Config) -> set[str]:
    """Names in `slow.txt`, of files that are run, of tests that there are not."""
    return pytestconfig.stash[GONE]


@pytest.fixture(autouse=True)
def _strict_promotion() -> Iterator[None]:
    """Tests are strict; the examples of docstrings, which lie elsewhere, run as users run them."""
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture
def key() -> jax.Array:
    """A key for tests that need one."""
    return jax.random.key(0)


@pytest.fixture(autouse=True, scope="module")
def _forget_compiled_programs() -> Iterator[None]:
    """Programs compiled for one module are of no use to the next, and take gigabytes in the end."""
    yield
    jax.clear_caches()
