"""What the Hopper tests share."""


def geometry(p):
    """A ConvProblem as the bindings take it: n, c, in, k, kernel, stride, padding, dilation."""
    return [p.n, p.c, p.d, p.h, p.w, p.k, *p.kernel, *p.stride, *p.padding, *p.dilation]


def behind_channels(y):
    """What lies behind the channels of each pixel of a kernel's output, up to whole 16 bytes."""
    n, k, d, h, w = y.shape
    k += -k % 8
    return y.as_strided((n, d, h, w, k), (d * h * w * k, h * w * k, w * k, k, 1))[..., y.shape[1] :]
