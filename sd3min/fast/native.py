"""`kernels.c`, compiled for this very CPU when it is first needed, and called without a copy.

Where there is no C compiler, or the CPU lacks AVX512-BF16, there is no library and PyTorch does it.
"""

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from sd3min.files import whole

SOURCE = Path(__file__).with_name("kernels.c")
FLAGS = ("-O3", "-march=native", "-fopenmp", "-shared", "-fPIC")

Pointer, Whole, Real = ctypes.c_void_p, ctypes.c_long, ctypes.c_float
FUNCTIONS = {
    "begin": [],
    "modulate": [Pointer] * 4 + [Whole] * 4 + [Real],
    "add_gated": [Pointer] * 3 + [Whole] * 4,
    "gelu": [Pointer, Whole],
    "activate": [Pointer] * 4 + [Whole] * 2,
    "normalise_heads": [Pointer] * 3 + [Whole] * 2 + [Real],
    "shorten": [Pointer] * 2 + [Whole],
    "quantise": [Pointer] * 3 + [Whole] * 2,
    "rescale": [Pointer] * 3 + [Whole] * 2,
    "linear": [Pointer] * 4 + [Whole] * 5,
    "attention": [Pointer] * 4 + [Whole] * 4 + [Real],
}


def cache() -> Path:
    """Where libraries are kept from one run to the next."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sd3min"


def cpu() -> str:
    """What this CPU can do, so that a cache on a shared disk holds a library for each."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line for line in lines if line.startswith("flags")), "")


def compiled(flags: Sequence[str] = FLAGS) -> Path:
    """The library's path; OSError or CalledProcessError where it cannot be made."""
    compiler = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc")
    if compiler is None:
        raise OSError("there is no C compiler")
    made_of = "".join([SOURCE.read_text(), cpu(), compiler, *flags])
    path = cache() / f"kernels-{hashlib.sha256(made_of.encode()).hexdigest()[:16]}.so"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole(path) as part:
            command = [compiler, *flags, str(SOURCE), "-o", str(part), "-lm"]
            subprocess.run(command, check=True, capture_output=True, text=True)
    return path


def loaded(path: Path) -> ctypes.CDLL:
    """A library with the types of its functions, served by torch's OpenMP; OSError without AMX."""
    library = ctypes.CDLL(str(path))
    for name, arguments in FUNCTIONS.items():
        getattr(library, name).argtypes = arguments
    if library.begin():
        raise OSError("the system does not give AMX's registers")
    return library


@functools.cache
def library() -> ctypes.CDLL | None:
    """The library, or None, with one warning, where this machine cannot have it."""
    try:
        return loaded(compiled())
    except (OSError, RuntimeError, subprocess.CalledProcessError) as error:  # or there is no home
        lines = getattr(error, "stderr", None) or str(error)
        reason = next((line for line in lines.splitlines() if "error" in line), lines.strip())
        message = f"PyTorch does what sd3min's own loops would do faster ({reason})"
        warnings.warn(message, RuntimeWarning, stacklevel=2)
        return None


def serves(tensor: Tensor) -> bool:
    """Whether a tensor is for the library: rows of 16, 32, … values without a gap, in bfloat16."""
    on_cpu = tensor.dtype == torch.bfloat16 and tensor.device.type == "cpu"
    fits = tensor.is_contiguous() and tensor.shape[-1] % 16 == 0
    return on_cpu and fits and library() is not None


def call(name: str, *arguments: Tensor | int | float) -> None:
    """Call a function, with tensors as pointers to values; MemoryError where it has no memory."""
    values = [a.data_ptr() if isinstance(a, Tensor) else a for a in arguments]
    if getattr(library(), name)(*values):
        raise MemoryError(f"there is no memory for {name}")


def trim() -> None:
    """Hand freed memory back to the system, which glibc would keep between what is in use."""
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "malloc_trim"):
        ctypes.CDLL(None).malloc_trim(0)
