"""The numeric promise of the package, as code. The oracle is float64 through the pure-torch reference."""

from __future__ import annotations

import torch
from torch import Tensor

FLOAT32_OP = 5e-6
FLOAT32_NETWORK = 1e-5
ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def relative_error(y: Tensor, reference: Tensor) -> float:
    """Relative L2 error against a float64 reference."""
    assert reference.dtype == torch.float64
    norm = reference.norm().item()
    return (y.double() - reference).norm().item() / (norm or 1.0)


def assert_keeps_promise(
    y: Tensor,
    reference: Tensor,
    stock: Tensor | None = None,
    float32_limit: float = FLOAT32_OP,
    magnitude: float = 0.0,
) -> None:
    """float32: at most `float32_limit`. Half precisions: twice the stock error, plus the output's rounding."""
    assert y.shape == reference.shape
    assert torch.isfinite(y).all()
    error = relative_error(y, reference)
    if reference.numel() < 64 and magnitude:
        # A handful of outputs may cancel to nearly nothing, where no relative error means anything: the sum of the
        # terms' magnitudes (their norm) is the scale then.
        error *= reference.norm().item() / max(reference.norm().item(), magnitude)
    if y.dtype == torch.float32:
        assert error <= float32_limit, f"relative L2 error {error:.2e} > {float32_limit:.0e}"
    else:
        limit = 2 * (relative_error(stock, reference) if stock is not None else 0.0) + ROUNDING[y.dtype]
        assert error <= limit, f"relative L2 error {error:.2e} > {limit:.2e}"
