"""What this machine can do at most, measured: multiply-adds a second, and bytes a second."""

from __future__ import annotations

import ctypes
import math
import os
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

# fma: twelve independent chains keep two units with a latency of four or five cycles busy.
# amx: four accumulators, as products of two by two tiles; 16 rows of 64 bytes each.
# stream: reads only, as weights are.
_SOURCE = r"""
#if defined(__AVX512F__)
#define WIDTH 64
#else
#define WIDTH 32
#endif
typedef float V __attribute__((vector_size(WIDTH)));
static float sum(V v) { float t = 0; for (int i = 0; i < WIDTH / 4; ++i) t += v[i]; return t; }

float fma_chains(long n, float x, float y) {
  V s[12], a = (V){0} + x, b = (V){0} + y;
  for (int j = 0; j < 12; ++j) s[j] = b * (float)j;
  for (long i = 0; i < n; ++i)
#pragma GCC unroll 12
    for (int j = 0; j < 12; ++j) s[j] = s[j] * a + b;
  for (int j = 1; j < 12; ++j) s[0] += s[j];
  return sum(s[0]);
}
double fma_flops(void) { return 12 * 2 * WIDTH / 4; }

float stream(const float* p, long n) {
  V s[8] = {};
  for (long i = 0; i + 8 * WIDTH / 4 <= n; i += 8 * WIDTH / 4)
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) s[j] += *(const V*)(p + i + j * WIDTH / 4);
  for (int j = 1; j < 8; ++j) s[0] += s[j];
  return sum(s[0]);
}

#if defined(__AMX_BF16__) && defined(__linux__)
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
int amx_allowed(void) { return syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18) == 0; }
void amx_products(long n) {
  struct { unsigned char palette, start, rest[14]; unsigned short bytes[16]; unsigned char rows[16]; } c = {1};
  for (int i = 0; i < 8; ++i) { c.bytes[i] = 64; c.rows[i] = 16; }
  __asm__ volatile("" : : "r"(&c) : "memory");  // GCC 12 believes that only 8 bytes of it are read
  _tile_loadconfig(&c);
  _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
  _tile_zero(4); _tile_zero(5); _tile_zero(6); _tile_zero(7);
  for (long i = 0; i < n; ++i) {
    _tile_dpbf16ps(0, 4, 6); _tile_dpbf16ps(1, 4, 7); _tile_dpbf16ps(2, 5, 6); _tile_dpbf16ps(3, 5, 7);
  }
  _tile_release();
}
#else
int amx_allowed(void) { return 0; }
void amx_products(long n) { (void)n; }
#endif
double amx_flops(void) { return 4 * 2.0 * 16 * 16 * 32; }
"""


def _best(run: Callable[[], object], seconds: float) -> float:
    """The shortest of the calls that fit into `seconds`, at least three."""
    run()
    end, best, calls = time.perf_counter() + seconds, math.inf, 0
    while calls < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
        calls += 1
    return best


def _compiled() -> ctypes.CDLL | None:
    """The C functions above for this processor; None without a C compiler that knows it."""
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "peak.c"), Path(folder, "peak.so")
        source.write_text(_SOURCE)
        flags = ["-O3", "-march=native", "-ffp-contract=fast", "-shared", "-fPIC"]
        try:
            subprocess.run(
                [compiler, *flags, str(source), "-o", str(library)],
                check=True,
                capture_output=True,
                timeout=60,
            )
            code = ctypes.CDLL(str(library))
        except (OSError, subprocess.SubprocessError):
            return None
    code.fma_chains.restype = code.stream.restype = ctypes.c_float
    code.fma_flops.restype = code.amx_flops.restype = ctypes.c_double
    return code


def _together(calls: list[Callable[[], object]]) -> Callable[[], None]:
    """Runs C functions at once, each on a thread of its own."""

    def run() -> None:
        threads = [threading.Thread(target=call) for call in calls]
        for t in threads:
            t.start()
        for t in threads:
            t.join()

    return run


def matmul_flops(dtype: torch.dtype, seconds: float = 0.5) -> float:
    """FLOP/s of a square matrix product of torch."""
    n = 2048
    a, b = (torch.randn(n, n).to(dtype) for _ in range(2))
    out = torch.empty(n, n, dtype=dtype)
    return 2 * n**3 / _best(lambda: torch.mm(a, b, out=out), seconds)


def copy_bandwidth(mebibytes: int, seconds: float = 0.5) -> float:
    """Bytes a second, read and written, of torch's copy between two halves of `mebibytes`."""
    elements = mebibytes * 2**20 // 8
    a, b = torch.ones(elements), torch.ones(elements)
    return 8 * elements / _best(lambda: b.copy_(a), seconds)


def measure_peaks(dtypes: list[torch.dtype], seconds: float = 0.5) -> dict[str, float]:
    """FLOP/s and bytes a second by name, on torch's number of threads: what `roofs` takes its limits from.

    Without a C compiler only torch's own matrix product and copy are there.
    """
    peaks: dict[str, float] = {}
    code, count = _compiled(), torch.get_num_threads()
    if code is not None:
        steps = 2_000_000
        factors = ctypes.c_float(0.999), ctypes.c_float(0.001)
        run = _together([partial(code.fma_chains, ctypes.c_long(steps), *factors)] * count)
        peaks["fma_fp32"] = count * steps * code.fma_flops() / _best(run, seconds)
        if torch.bfloat16 in dtypes and code.amx_allowed():
            steps = 500_000
            run = _together([partial(code.amx_products, ctypes.c_long(steps))] * count)
            peaks["amx_bf16"] = count * steps * code.amx_flops() / _best(run, seconds)
        # small enough for most last caches, where the weights of a layer that is run again and again stay
        parts = torch.ones(count, 2**23 // count // 64 * 64)  # 32 MiB, one part a thread
        length = ctypes.c_long(parts.shape[1])
        run = _together([partial(code.stream, ctypes.c_void_p(part.data_ptr()), length) for part in parts])
        peaks["read_32MiB"] = parts.nbytes / _best(run, seconds)
    for dtype, name in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
        if dtype in dtypes:
            peaks[f"matmul_{name}"] = matmul_flops(dtype, seconds)
    peaks["copy_32MiB"] = copy_bandwidth(32, seconds)
    peaks["copy_1GiB"] = copy_bandwidth(1024, seconds)
    return peaks


def higher(one: dict[str, float], other: dict[str, float]) -> dict[str, float]:
    """The better of two measurements: a machine shared with others shows its peak only now and then."""
    return {name: max(value, other[name]) for name, value in one.items()}


def roofs(peaks: dict[str, float], arithmetic: torch.dtype) -> tuple[float, float]:
    """(FLOP/s, bytes/s) that no layer exceeds whose products are of this dtype.

    float32: multiply-adds in registers. bfloat16: tiles (AMX) where the processor has them, or what a matrix product
    reaches. The bandwidth is that of reading or copying within the last cache: a layer that is timed again and again
    finds its weights there.
    """
    names = ["fma_fp32", "matmul_fp32"]
    if arithmetic == torch.bfloat16:
        names += ["amx_bf16", "matmul_bf16"]
    bandwidths = ("read_32MiB", "copy_32MiB", "copy_1GiB")
    return max(peaks.get(name, 0.0) for name in names), max(peaks.get(name, 0.0) for name in bandwidths)
