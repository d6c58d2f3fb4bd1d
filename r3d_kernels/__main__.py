"""`python -m r3d_kernels`: the same as the console script `r3d-kernels`."""

from r3d_kernels.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
