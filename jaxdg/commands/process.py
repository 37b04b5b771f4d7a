"""How the commands set up their process: compiled programs are kept from run to run and, on CPU,
memory from step to step.
"""

import contextlib
import ctypes
import os
import time

import jax

from jaxdg.data import cache

M_TRIM_THRESHOLD = -1
M_MMAP_MAX = -4  # of glibc's malloc.h
DAYS = 30


def set_up() -> None:
    """Called by a command before it computes anything, and after `jax.distributed` has started,
    where it does.

    Raises:
        ValueError: the environment asks for devices that are not there.
    """
    # Parameters, and what checkpoints hold, are float32; with JAX_ENABLE_X64 arrays made beside
    # them would be wider.
    jax.config.update("jax_enable_x64", False)
    keep_programs()
    if backend() == "cpu":
        keep_memory()


def backend() -> str:
    """What jax computes on: cpu, gpu, ..

    Raises:
        ValueError: there is nothing of what the environment asks for.
    """
    try:
        return jax.default_backend()
    except (
        RuntimeError,
        AssertionError,
    ) as error:  # jax has the latter where a platform was found and no device of it
        platforms = os.environ.get("JAX_PLATFORMS")
        asked = (
            f"JAX_PLATFORMS is {platforms}; unset it or set it to cpu"
            if platforms
            else "see JAX_PLATFORMS"
        )
        told = str(error).strip().split("\n")[0] or "jax names none"
        raise ValueError(f"jax finds no device to compute on ({told}); {asked}") from error


def keep_programs() -> None:
    """Has jax look up compiled programs under `cache.folder()`, so that only the first run of its
    kind compiles.

    What was not read for a month is deleted. `JAX_COMPILATION_CACHE_DIR` names another folder, in
    which nothing is deleted, and `JAX_ENABLE_COMPILATION_CACHE=false` turns it off. A read-only
    disk is no error.
    """
    if jax.config.values["jax_compilation_cache_dir"] is None:
        folder = cache.folder() / "programs"
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            for file in folder.iterdir():
                if file.stat().st_atime < time.time() - DAYS * 86_400:
                    file.unlink(missing_ok=True)
        if not os.access(folder, os.W_OK):
            return
        jax.config.update("jax_compilation_cache_dir", str(folder))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        # jax keeps what took a second; a start compiles a dozen programs of less.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def keep_memory() -> None:
    """Has glibc keep what is freed for the next step, which asks for as much again; other C
    libraries are left alone.

    Left to itself, glibc gives every large block back to the system, which clears its pages when
    they are touched anew: a sixth of the time of a step of `camvid_vit_tiny` on 2 CPU cores. The
    process then stays as large as it was at its largest.
    """
    library = ctypes.CDLL(None) if os.name == "posix" else None
    if hasattr(library, "gnu_get_libc_version"):
        library.mallopt(M_MMAP_MAX, 0)  # large blocks come from the heap, too
        library.mallopt(M_TRIM_THRESHOLD, -1)  # whose end is never given back
