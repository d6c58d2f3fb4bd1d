"""The fused operations as Triton kernels.

Importing this package does not import Triton; importing its modules `conv3d`, `norm` and `pool` does.
"""
