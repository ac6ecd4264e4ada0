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
# What two tests or two workers compile is compiled once: a fifth of the time. For one run only,
# unless the variable names a folder that stays.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="jopt-tests-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import jax
import pytest

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
