"""Set-up of every test: eight emulated devices, runtime shape checks, and where the shared real
files are.
"""

import atexit
import gc
import importlib
import importlib.metadata
import os
from pathlib import Path
import shutil
import tempfile

# XLA reads its flags once, before the first import of jax. Two cores drive eight devices slowly, so
# collectives need patience.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    " --xla_cpu_collective_call_warn_stuck_timeout_seconds=300"
    " --xla_cpu_collective_call_terminate_timeout_seconds=600"
)
os.environ["JAX_PLATFORMS"] = "cpu"
# Compiling is most of what the tests do. XLA optimises a program as always, LLVM does not. Slow
# tests compute more than they compile: for them the variable is set to 0.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# XLA's older emitter compiles in little more than half the time. An unknown flag ends the process,
# so it is given to the version alone that is known to have it.
if os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] == "1" and importlib.metadata.version(
    "jaxlib"
).startswith("0.10."):
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"
# What commands keep for their next run, compiled programs above all, is kept for this session's
# tests alone.
if "JAXDG_CACHE" not in os.environ:
    os.environ["JAXDG_CACHE"] = tempfile.mkdtemp(prefix="jaxdg_tests_")
    atexit.register(shutil.rmtree, os.environ["JAXDG_CACHE"], ignore_errors=True)
# What one test compiles serves the next, also in processes that tests start.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.environ["JAXDG_CACHE"] + "/tests")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")

import jax
from jaxtyping import install_import_hook
import pytest

install_import_hook("jaxdg", "beartype.beartype")

importlib.import_module("jaxdg.commands.process").look_for_garbage_less()

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden"


def shared(variable: str, default: str, relative: str) -> Path:
    """A file or folder of the shared real data; skips the test, saying why, where it is absent."""
    path = Path(os.environ.get(variable, ROOT.parent / "shared" / default)) / relative
    if not path.exists():
        pytest.skip(f"{path} is absent; set {variable} to the folder that holds {relative}")
    return path


@pytest.fixture(scope="session")
def data_path():
    """`data_path("camvid")`: real data below `JAXDG_DATA`."""
    return lambda relative="": shared("JAXDG_DATA", "data", relative)


@pytest.fixture(scope="session")
def weights_path():
    """`weights_path("vit_tiny_patch16_224.safetensors")`: real weights below `JAXDG_WEIGHTS`."""
    return lambda relative="": shared("JAXDG_WEIGHTS", "weights", relative)


@pytest.fixture
def optimized():
    """A test's programs are compiled as a user's are, for what rounds too differently otherwise."""
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture
def broken_reads_forgotten():
    """What Orbax leaves of reads that failed is collected here, and not while another test runs.

    The test ignores `PytestUnraisableExceptionWarning`: its coroutines end with an exception then.
    """
    yield
    gc.collect()


@pytest.fixture(params=["cpu", "default"])
def platform(request, monkeypatch):
    """The CPU's way of computing, then that of all other platforms."""

    def chosen(*args, **ways):
        return ways[request.param](*args)

    monkeypatch.setattr(jax.lax, "platform_dependent", chosen)
    jax.clear_caches()
    yield request.param
    jax.clear_caches()


@pytest.fixture(scope="session")
def golden():
    """The folder of small reference outputs."""
    return GOLDEN
