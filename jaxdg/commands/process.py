"""Sets up the process of a command: it caches compiled programs, rarely looks for garbage and, on
CPU, keeps freed memory.
"""

import contextlib
import ctypes
import gc
import os
import time

import jax

from jaxdg.data import cache

M_TRIM_THRESHOLD = -1
M_MMAP_MAX = -4  # of glibc's malloc.h
DAYS = 30


def set_up() -> None:
    """Sets up the process; to be called before any computation and after `jax.distributed` starts.

    Raises:
        ValueError: the environment asks for devices that do not exist.
    """
    # Parameters and checkpoints are float32; with JAX_ENABLE_X64 other arrays would be float64.
    jax.config.update("jax_enable_x64", False)
    keep_programs()
    look_for_garbage_less()
    if backend() == "cpu":
        keep_memory()


def backend() -> str:
    """The platform of jax: cpu, gpu, ..

    Raises:
        ValueError: the environment asks for devices that do not exist.
    """
    try:
        return jax.default_backend()
    except (RuntimeError, AssertionError) as error:  # jax asserts that a platform has a device
        advice = "see JAX_PLATFORMS"
        if platforms := os.environ.get("JAX_PLATFORMS"):
            advice = f"JAX_PLATFORMS is {platforms}; unset it or set it to cpu"
        reason = str(error).strip().split("\n")[0] or "jax names none"
        raise ValueError(f"jax finds no device to compute on ({reason}); {advice}") from error


def keep_programs() -> None:
    """Caches compiled programs under `cache.folder()`, so that only the first run compiles them.

    Programs that were not read for a month are deleted. `JAX_COMPILATION_CACHE_DIR` names another
    folder, in which nothing is deleted; `JAX_ENABLE_COMPILATION_CACHE=false` turns the cache off. A
    read-only disk is no error.
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
        # jax caches programs that took a second to compile; many take less.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def look_for_garbage_less() -> None:
    """Keeps Python from searching for reference cycles all the time while a program is traced.

    What was imported is never searched again. Tracing makes many objects that stay: to trace and
    lower the step of `camvid_vit_tiny` took 4.9 s of CPU time when they were looked at again and
    again, and 3.6 s since (November 2026).
    """
    gc.freeze()
    gc.set_threshold(200_000, 10, 10)


def keep_memory() -> None:
    """Lets glibc keep freed memory for the next step, which needs as much again.

    By default glibc returns every large block to the system, which clears its pages when they are
    used again. That takes a sixth of a step of `camvid_vit_tiny` on 2 CPU cores. The process keeps
    its largest size. Other C libraries are not changed.
    """
    library = ctypes.CDLL(None) if os.name == "posix" else None
    if hasattr(library, "gnu_get_libc_version"):
        library.mallopt(M_MMAP_MAX, 0)  # takes large blocks from the heap, too
        library.mallopt(M_TRIM_THRESHOLD, -1)  # never returns the end of the heap
