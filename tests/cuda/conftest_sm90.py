"""What the Hopper tests share."""


def geometry(p):
    """A ConvProblem as the bindings take it: n, c, in, k, kernel, stride, padding, dilation."""
    return [p.n, p.c, p.d, p.h, p.w, p.k, *p.kernel, *p.stride, *p.padding, *p.dilation]
