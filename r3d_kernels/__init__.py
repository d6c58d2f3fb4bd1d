"""Fused 3-D convolution networks for PyTorch."""

from r3d_kernels._version import __version__

__all__ = ["__version__"]
