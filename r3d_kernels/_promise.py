"""How far a result may be from float64: the promise of the package, as code."""

from __future__ import annotations

import torch

from r3d_kernels import backends

__all__ = ["ROUNDING", "STOCK_BROKEN", "allowed"]

FLOAT32_OP, FLOAT32_NETWORK = 5e-6, 1e-5
FLOAT64 = 1e-13
STRICT_FLOOR = 1e-6  # of R3D_KERNELS_FP32=strict, where the stock layer is within a few roundings
ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}
# Stock half precision that is this far off is not rounded but wrong (pytorch#169688), and no measure of anything.
STOCK_BROKEN = 0.1
# (layer, network) in float32 where the user allows coarser products; about three times what they make.
_TF32 = (1e-3, 1e-3)
_BF16_PRODUCTS = {"high": (3e-5, 1e-4), "medium": (1e-2, 5e-2)}  # of operands in two parts, in one


def _coarser(device: torch.device) -> tuple[float, float]:
    """What torch's own switches allow a float32 layer and network beyond the promise; zeros by default on a CPU."""
    if device.type == "cuda":
        return _TF32 if backends.tf32_allowed() else (0.0, 0.0)
    return _BF16_PRODUCTS.get(torch.get_float32_matmul_precision(), (0.0, 0.0))


def allowed(dtype: torch.dtype, stock: float, device: torch.device, *, network: bool = False) -> float:
    """The largest error, relative L2 against float64, that keeps the promise.

    float32: 5e-6 for a layer, 1e-5 for a network; more only where torch's switches ask for coarser products. With
    `R3D_KERNELS_FP32=strict` a layer may have twice the stock layer's error, or 1e-6. bfloat16 and float16: twice the
    stock error and one rounding of the output.

    Args:
        dtype: computed in.
        stock: the error of the stock modules in that dtype.
        device: computed on.
        network: of a whole network rather than a layer.
    """
    if dtype == torch.float64:
        return max(FLOAT64, 2 * stock)
    if dtype != torch.float32:
        # A wrong stock result excuses nothing.
        return 2 * stock + ROUNDING[dtype] if stock < STOCK_BROKEN else 2 * STOCK_BROKEN
    coarser = _coarser(device)
    if backends.fp32_mode() == "strict":
        if not network:
            return max(2 * stock, STRICT_FLOOR)
        return max(FLOAT32_NETWORK, 2 * stock if coarser[1] else 0.0)
    if not network:
        return max(FLOAT32_OP, coarser[0])
    return max(FLOAT32_NETWORK, 2 * stock + coarser[1] if coarser[1] else 0.0)
