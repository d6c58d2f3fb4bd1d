"""The convolution kernels in Triton: forward, input gradient and weight gradient as implicit matrix products.

All tensors are channels-last in memory: x [N, D, H, W, C], y [N, D', H', W', K], weights [K, T, R, S, C / groups]. A
convolution is the product of A [output pixels, taps x channels], gathered from x, with B [taps x channels, output
channels]. Sums are float32. Nothing is added atomically: the same call gives the same bits. Where float32 is multiplied
as TF32, activations are rounded to it here, and weights before (`round_to_tf32`): they are the same for every tile.

The input gradient is the same kernel: for each remainder of the stride it is a convolution of dy with every stride-th
tap, of stride 1, whose paddings and dilations may be negative and whose outputs lie stride apart (`conv3d.py`).
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = [
    "conv3d_boxes",
    "conv3d_packed",
    "conv3d_rows",
    "conv3d_tiled",
    "conv3d_weight_grad",
    "pad_channels",
    "reduce_parts",
    "round_to_tf32",
    "sum_parts",
]

# Sizes that only address arithmetic sees: one compiled kernel serves them all.
_GEOMETRY = (
    *("M", "D", "H", "W", "OD", "OH", "OW"),
    *("sd", "sh", "sw", "pd", "ph", "pw", "dd", "dh", "dw"),
)


@triton.jit
def _tile(pid, tiles_m, tiles_n, GROUP: tl.constexpr):
    """Tiles in groups of GROUP rows: what runs at the same time shares its operands in L2."""
    wide = GROUP * tiles_n
    first = pid // wide * GROUP
    rows = tl.minimum(tiles_m - first, GROUP)
    inside = pid % wide
    return first + inside % rows, inside // rows


@triton.jit
def _pixel(m, OD, OH, OW):
    """The number of an output pixel as (n, od, oh, ow)."""
    row = m // OW
    ow = m - row * OW
    plane = row // OH
    oh = row - plane * OH
    n = plane // OD
    od = plane - n * OD
    return n, od, oh, ow


@triton.jit
def _rounded(x, PRECISION: tl.constexpr):
    """What tensor cores are to multiply: float32 to the nearest TF32, ties away from zero, where they multiply TF32.

    Left to themselves they drop the last 13 bits, which is twice the error, and all of it towards zero.
    """
    if PRECISION == "tf32":
        bits = x.to(tl.int32, bitcast=True)
        nearest = ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
        x = tl.where((bits & 0x7FFFFFFF) < 0x7F800000, nearest, x)  # infinities and NaN stay what they are
    return x


@triton.jit
def _taps_inside(first, step, size, TAPS: tl.constexpr):
    """Bit i: tap i of this axis reads the input and not the padding."""
    bits = tl.zeros(first.shape, tl.int32)
    for i in tl.static_range(TAPS):
        at = first + i * step
        bits |= ((at >= 0) & (at < size)).to(tl.int32) << i
    return bits


@triton.jit
def _finish(
    acc,  # float32 [BM, BN]
    rows,  # [BM], where the pixels of y and the residual lie
    m_ok,
    k0,  # the first channel, within the group
    first,  # the group's first channel
    K,
    scale_ptr,
    bias_ptr,
    res_ptr,
    y_ptr,
    HAS_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RES: tl.constexpr,
    RELU: tl.constexpr,
):
    """y = act(acc * scale + bias + residual), rounded once."""
    BM: tl.constexpr = acc.shape[0]
    BN: tl.constexpr = acc.shape[1]
    if BM * BN >= 32768:
        # One half after the other: beside so many sums, a whole tile of the residual does not fit into the registers.
        low, high = tl.split(tl.permute(tl.reshape(acc, (BM, 2, BN // 2)), (0, 2, 1)))
        _columns(
            low,
            rows,
            m_ok,
            k0,
            first,
            K,
            scale_ptr,
            bias_ptr,
            res_ptr,
            y_ptr,
            HAS_SCALE,
            HAS_BIAS,
            HAS_RES,
            RELU,
        )
        _columns(
            high,
            rows,
            m_ok,
            k0 + BN // 2,
            first,
            K,
            scale_ptr,
            bias_ptr,
            res_ptr,
            y_ptr,
            HAS_SCALE,
            HAS_BIAS,
            HAS_RES,
            RELU,
        )
    else:
        _columns(
            acc,
            rows,
            m_ok,
            k0,
            first,
            K,
            scale_ptr,
            bias_ptr,
            res_ptr,
            y_ptr,
            HAS_SCALE,
            HAS_BIAS,
            HAS_RES,
            RELU,
        )


@triton.jit
def _columns(
    acc,
    rows,
    m_ok,
    k0,
    first,
    K,
    scale_ptr,
    bias_ptr,
    res_ptr,
    y_ptr,
    HAS_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RES: tl.constexpr,
    RELU: tl.constexpr,
):
    k = k0 + tl.arange(0, acc.shape[1])
    k_ok = k < K
    cols = first + k
    offsets = rows[:, None] + cols[None, :]
    mask = m_ok[:, None] & k_ok[None, :]
    if HAS_SCALE:
        acc *= tl.load(scale_ptr + cols, mask=k_ok, other=0.0)[None, :]
    if HAS_BIAS:
        acc += tl.load(bias_ptr + cols, mask=k_ok, other=0.0)[None, :]
    if HAS_RES:
        acc += tl.load(res_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    if RELU:
        acc = tl.where(acc < 0.0, 0.0, acc)  # not maximum: NaN stays NaN, as in torch
    tl.store(y_ptr + offsets, acc.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=[*_GEOMETRY, "wd", "wh", "ww", "w_first", "per_part"])
def conv3d_tiled(
    x_ptr,
    w_ptr,
    scale_ptr,
    bias_ptr,
    res_ptr,
    y_ptr,
    part_ptr,  # float32 [parts, M, channels of y], where SPLIT
    M,  # output pixels
    C,  # channels of x that a group sums over
    K,  # channels of y in a group
    x_pitch,  # elements between neighbouring pixels of x
    y_pitch,
    D,
    H,
    W,
    OD,
    OH,
    OW,
    sd,
    sh,
    sw,
    pd,
    ph,
    pw,
    dd,
    dh,
    dw,
    w_row,  # elements between the weight's rows [K]
    w_pitch,  # elements between its taps
    w_group,  # elements between its groups
    wd,  # which taps: (t * wd + r * wh + s * ww + w_first)-th
    wh,
    ww,
    w_first,
    yn,  # where the outputs lie, in elements
    yd,
    yh,
    yw,
    y_first,
    per_part,  # steps of the sum that one program takes
    T: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    POINTWISE: tl.constexpr,  # one tap, stride 1, no padding: a plain matrix product
    ROWS_SUM: tl.constexpr,  # the weight's rows are summed over (input gradient), not its columns
    EVEN_C: tl.constexpr,  # BK divides C
    DENSE: tl.constexpr,  # the outputs lie one after the other
    SPLIT: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RES: tl.constexpr,
    RELU: tl.constexpr,
    WIDE: tl.constexpr,  # offsets need 64 bits
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """One [BM, BN] tile of y: a loop over taps x blocks of BK channels.

    The loop is flat so that it is pipelined across taps. What a row adds to an address, and which taps of it fall on
    padding (a bit each), is computed before it; inside, a tap costs three scalar multiply-adds and three shifts a row.
    """
    group = tl.program_id(1)
    part = tl.program_id(2)
    pid_m, pid_n = _tile(tl.program_id(0), tl.cdiv(M, BM), tl.cdiv(K, BN), GROUP)
    if WIDE:
        pid_m = pid_m.to(tl.int64)
    m = pid_m * BM + tl.arange(0, BM)  # [BM]
    k = pid_n * BN + tl.arange(0, BN)  # [BN]
    c = tl.arange(0, BK)
    m_ok = m < M
    k_ok = k < K
    n, od, oh, ow = _pixel(m, OD, OH, OW)
    if POINTWISE:
        x_rows = m * x_pitch
    else:
        d0 = od * sd - pd
        h0 = oh * sh - ph
        w0 = ow * sw - pw
        x_rows = (((n * D + d0) * H + h0) * W + w0) * x_pitch  # negative rows are never read
        in_d = tl.where(m_ok, _taps_inside(d0, dd, D, T), 0)
        in_h = _taps_inside(h0, dh, H, R)
        in_w = _taps_inside(w0, dw, W, S)
    x_base = x_ptr + group * C
    w_base = w_ptr + group.to(tl.int64) * w_group
    a_ptrs = x_base + x_rows[:, None] + c[None, :]  # [BM, BK]
    if ROWS_SUM:
        b_ptrs = w_base + c[:, None] * w_row + k[None, :]  # [BK, BN]
    else:
        # Columns past the last are read from the first, and never stored: no mask.
        b_ptrs = w_base + tl.where(k_ok, k, 0)[None, :] * w_row + c[:, None]

    steps_c = tl.cdiv(C, BK)
    begin = part * per_part
    end = tl.minimum(begin + per_part, T * R * S * steps_c)
    tap = begin // steps_c
    c0 = (begin - tap * steps_c) * BK
    t = tap // (R * S)
    r = tap // S % R
    s = tap % S
    acc = tl.zeros((BM, BN), tl.float32)
    for _ in range(begin, end):
        if POINTWISE:
            ok = m_ok
            x_off = c0
        else:
            ok = ((in_d >> t) & (in_h >> r) & (in_w >> s) & 1) != 0
            pixels = (t * dd * H + r * dh) * W + s * dw
            if WIDE:
                pixels = pixels.to(tl.int64)
            x_off = pixels * x_pitch + c0
        w_off = (t * wd + r * wh + s * ww + w_first) * w_pitch
        if ROWS_SUM:
            w_off += c0 * w_row
        else:
            w_off += c0
        if EVEN_C:
            a = tl.load(a_ptrs + x_off, mask=ok[:, None], other=0.0)
            if ROWS_SUM:
                b = tl.load(b_ptrs + w_off, mask=k_ok[None, :], other=0.0)
            else:
                b = tl.load(b_ptrs + w_off)
        else:
            c_ok = c < C - c0
            a = tl.load(a_ptrs + x_off, mask=ok[:, None] & c_ok[None, :], other=0.0)
            b = tl.load(b_ptrs + w_off, mask=c_ok[:, None] & k_ok[None, :], other=0.0)
        acc = tl.dot(_rounded(a, PRECISION), b, acc, input_precision=PRECISION)
        c0 += BK
        wrap = (c0 >= C).to(tl.int32)
        c0 = c0 * (1 - wrap)
        s += wrap
        wrap = (s == S).to(tl.int32)
        s = s * (1 - wrap)
        r += wrap
        wrap = (r == R).to(tl.int32)
        r = r * (1 - wrap)
        t += wrap

    if SPLIT:
        cols = group * K + k
        mask = m_ok[:, None] & k_ok[None, :]
        # 64 bits: parts x outputs may pass 2^31 where the outputs do not
        rows = (part.to(tl.int64) * M + m) * y_pitch
        tl.store(part_ptr + rows[:, None] + cols[None, :], acc, mask=mask)
    else:
        if DENSE:
            rows = m * y_pitch
        else:
            rows = n * yn + od * yd + oh * yh + ow * yw + y_first
        _finish(
            acc,
            rows,
            m_ok,
            pid_n * BN,
            group * K,
            K,
            scale_ptr,
            bias_ptr,
            res_ptr,
            y_ptr,
            HAS_SCALE,
            HAS_BIAS,
            HAS_RES,
            RELU,
        )


@triton.jit(do_not_specialize=[*_GEOMETRY])
def conv3d_packed(
    x_ptr,
    w_ptr,
    scale_ptr,
    bias_ptr,
    res_ptr,
    y_ptr,
    M,
    K,
    x_pitch,
    y_pitch,
    D,
    H,
    W,
    OD,
    OH,
    OW,
    sd,
    sh,
    sw,
    pd,
    ph,
    pw,
    dd,
    dh,
    dw,
    w_row,
    w_group,
    C: tl.constexpr,  # channels of x in a group; constant, because the loop divides by it
    T: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RES: tl.constexpr,
    RELU: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """For few channels (stems): a block of the sum holds BK (tap, channel) pairs, whatever taps they are of.

    Takes any geometry: every element has its own address and its own bounds.
    """
    group = tl.program_id(1)
    pid_m, pid_n = _tile(tl.program_id(0), tl.cdiv(M, BM), tl.cdiv(K, BN), GROUP)
    if WIDE:
        pid_m = pid_m.to(tl.int64)
    m = pid_m * BM + tl.arange(0, BM)
    k = pid_n * BN + tl.arange(0, BN)
    m_ok = m < M
    k_ok = k < K
    n, od, oh, ow = _pixel(m, OD, OH, OW)
    d0 = tl.where(m_ok, od * sd - pd, D)[:, None]  # rows past the end lie outside, whatever the tap
    h0 = (oh * sh - ph)[:, None]
    w0 = (ow * sw - pw)[:, None]
    a_ptrs = x_ptr + group * C + (((n[:, None] * D + d0) * H + h0) * W + w0) * x_pitch  # [BM, 1]
    b_ptrs = w_ptr + group.to(tl.int64) * w_group + tl.where(k_ok, k, 0)[None, :] * w_row  # [1, BN]
    acc = tl.zeros((BM, BN), tl.float32)
    for i in range(0, tl.cdiv(T * R * S * C, BK)):
        j = i * BK + tl.arange(0, BK)
        j_ok = j < T * R * S * C
        tap = j // C
        td = (tap // (R * S) * dd)[None, :]
        rd = (tap // S % R * dh)[None, :]
        sd_ = (tap % S * dw)[None, :]
        d = d0 + td
        h = h0 + rd
        w = w0 + sd_
        ok = (d >= 0) & (d < D) & (h >= 0) & (h < H) & (w >= 0) & (w < W) & j_ok[None, :]
        pixels = (td * H + rd) * W + sd_  # [1, BK]
        if WIDE:
            pixels = pixels.to(tl.int64)
        a = tl.load(a_ptrs + (pixels * x_pitch + (j - tap * C)[None, :]), mask=ok, other=0.0)
        b = tl.load(b_ptrs + j[:, None], mask=j_ok[:, None], other=0.0)
        acc = tl.dot(_rounded(a, PRECISION), b, acc, input_precision=PRECISION)
    _finish(
        acc,
        m * y_pitch,
        m_ok,
        pid_n * BN,
        group * K,
        K,
        scale_ptr,
        bias_ptr,
        res_ptr,
        y_ptr,
        HAS_SCALE,
        HAS_BIAS,
        HAS_RES,
        RELU,
    )


@triton.jit(do_not_specialize=[*_GEOMETRY])
def conv3d_rows(
    x_ptr,
    w_ptr,
    scale_ptr,
    bias_ptr,
    res_ptr,
    y_ptr,
    M,
    K,
    y_pitch,
    D,
    H,
    W,
    OD,
    OH,
    OW,
    sd,
    sh,
    sw,
    pd,
    ph,
    pw,
    dd,
    dh,
    dw,  # 1
    C: tl.constexpr,  # channels of x and the weight, padded to a power of two
    T: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RES: tl.constexpr,
    RELU: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,  # at least S * C
    GROUP: tl.constexpr,
):
    """For few channels (stems): a block of the sum is a row of the kernel, whose taps and channels lie side by side.

    In x as in the weight, so that they are one address: what falls on padding to the left and right is known before the
    loop, and inside, a row of the kernel costs what a tap costs in `conv3d_tiled`. Channels that are a power of two
    make a pixel a whole number of words, which can be copied ahead of the sums.
    """
    pid_m, pid_n = _tile(tl.program_id(0), tl.cdiv(M, BM), tl.cdiv(K, BN), GROUP)
    if WIDE:
        pid_m = pid_m.to(tl.int64)
    m = pid_m * BM + tl.arange(0, BM)
    k = pid_n * BN + tl.arange(0, BN)
    j = tl.arange(0, BK)
    m_ok = m < M
    k_ok = k < K
    j_ok = j < S * C
    n, od, oh, ow = _pixel(m, OD, OH, OW)
    d0 = od * sd - pd
    h0 = oh * sh - ph
    w0 = ow * sw - pw
    w = w0[:, None] + (j // C)[None, :]
    in_w = m_ok[:, None] & j_ok[None, :] & (w >= 0) & (w < W)  # [BM, BK]
    in_d = _taps_inside(d0, dd, D, T)
    in_h = _taps_inside(h0, dh, H, R)
    a_ptrs = x_ptr + ((((n * D + d0) * H + h0) * W + w0) * C)[:, None] + j[None, :]
    b_ptrs = w_ptr + tl.where(k_ok, k, 0)[None, :] * (T * R * S * C) + j[:, None]
    acc = tl.zeros((BM, BN), tl.float32)
    for i in range(0, T * R):
        t = i // R
        r = i - t * R
        ok = ((in_d >> t) & (in_h >> r) & 1) != 0
        pixels = (t * dd * H + r * dh) * W
        if WIDE:
            pixels = pixels.to(tl.int64)
        a = tl.load(a_ptrs + pixels * C, mask=ok[:, None] & in_w, other=0.0)
        b = tl.load(b_ptrs + i * (S * C), mask=j_ok[:, None], other=0.0)
        acc = tl.dot(_rounded(a, PRECISION), b, acc, input_precision=PRECISION)
    _finish(
        acc,
        m * y_pitch,
        m_ok,
        pid_n * BN,
        0,
        K,
        scale_ptr,
        bias_ptr,
        res_ptr,
        y_ptr,
        HAS_SCALE,
        HAS_BIAS,
        HAS_RES,
        RELU,
    )


@triton.jit(do_not_specialize=["OD", "OH", "OW", "pd", "ph", "pw", "dd", "dh", "dw", "C"])
def conv3d_boxes(
    x_desc,  # [N, D, H, W, C], boxes [1, BD, BH, BW, BK]
    w_desc,  # [K, taps, C], boxes [BN, 1, BK]
    scale_ptr,
    bias_ptr,
    res_ptr,
    y_ptr,
    samples,
    C,
    K,
    y_pitch,
    OD,
    OH,
    OW,
    pd,
    ph,
    pw,
    dd,
    dh,
    dw,
    T: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RES: tl.constexpr,
    RELU: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    ROUNDED: tl.constexpr,  # the copies round float32 to TF32
    BD: tl.constexpr,
    BH: tl.constexpr,
    BW: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Stride 1: a tile is a box of outputs, and every tap of it one box of x, which the TMA unit copies.

    Boxes that reach beyond x are filled with zeros by the hardware, at both ends: padding costs nothing.
    """
    BM: tl.constexpr = BD * BH * BW
    tiles_d = tl.cdiv(OD, BD)
    tiles_h = tl.cdiv(OH, BH)
    tiles_w = tl.cdiv(OW, BW)
    tiles_m = samples * tiles_d * tiles_h * tiles_w
    pid_m, pid_n = _tile(tl.program_id(0), tiles_m, tl.cdiv(K, BN), GROUP)
    n, td, th, tw = _pixel(pid_m, tiles_d, tiles_h, tiles_w)
    d0 = td * BD - pd
    h0 = th * BH - ph
    w0 = tw * BW - pw
    k0 = pid_n * BN
    t = 0
    r = 0
    s = 0
    c0 = 0
    acc = tl.zeros((BM, BN), tl.float32)
    for _ in range(0, T * R * S * tl.cdiv(C, BK)):
        a = x_desc.load([n, d0 + t * dd, h0 + r * dh, w0 + s * dw, c0])
        b = w_desc.load([k0, (t * R + r) * S + s, c0])
        a = tl.reshape(a, (BM, BK))
        b = tl.reshape(b, (BN, BK))
        if not ROUNDED:
            a = _rounded(a, PRECISION)
        acc = tl.dot(a, tl.trans(b), acc, input_precision=PRECISION)
        c0 += BK
        wrap = (c0 >= C).to(tl.int32)
        c0 = c0 * (1 - wrap)
        s += wrap
        wrap = (s == S).to(tl.int32)
        s = s * (1 - wrap)
        r += wrap
        wrap = (r == R).to(tl.int32)
        r = r * (1 - wrap)
        t += wrap
    i = tl.arange(0, BM)
    od = td * BD + i // (BH * BW)
    oh = th * BH + i // BW % BH
    ow = tw * BW + i % BW
    if WIDE:
        n = n.to(tl.int64)
    rows = (((n * OD + od) * OH + oh) * OW + ow) * y_pitch
    m_ok = (od < OD) & (oh < OH) & (ow < OW)
    _finish(
        acc,
        rows,
        m_ok,
        k0,
        0,
        K,
        scale_ptr,
        bias_ptr,
        res_ptr,
        y_ptr,
        HAS_SCALE,
        HAS_BIAS,
        HAS_RES,
        RELU,
    )


@triton.jit(do_not_specialize=["size"])
def pad_channels(
    x_ptr, y_ptr, size, C: tl.constexpr, PADDED: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr
):
    """[pixels, C] to [pixels, PADDED], with zeros; `size` is that of the result."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    c = i % PADDED
    x = tl.load(x_ptr + i // PADDED * C + c, mask=(i < size) & (c < C), other=0.0)
    tl.store(y_ptr + i, _rounded(x, PRECISION), mask=i < size)


@triton.jit
def round_to_tf32(x_ptr, y_ptr, size, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < size, other=0.0)
    tl.store(y_ptr + i, _rounded(x, "tf32"), mask=i < size)


@triton.jit(do_not_specialize=["M", "parts"])
def reduce_parts(
    part_ptr,  # float32 [parts, M, K]
    scale_ptr,
    bias_ptr,
    res_ptr,
    y_ptr,
    M,
    K,
    parts,
    HAS_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RES: tl.constexpr,
    RELU: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """The second half of a split sum: parts are added in their order, then the epilogue."""
    m = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    k0 = tl.program_id(1) * BN
    k = k0 + tl.arange(0, BN)
    mask = (m < M)[:, None] & (k < K)[None, :]
    offsets = (m * K)[:, None] + k[None, :]
    size = M.to(tl.int64) * K
    acc = tl.zeros((BM, BN), tl.float32)
    for i in range(0, parts):
        acc += tl.load(part_ptr + i * size + offsets, mask=mask, other=0.0)
    _finish(
        acc,
        m * K,
        m < M,
        k0,
        0,
        K,
        scale_ptr,
        bias_ptr,
        res_ptr,
        y_ptr,
        HAS_SCALE,
        HAS_BIAS,
        HAS_RES,
        RELU,
    )


@triton.jit(do_not_specialize=[*_GEOMETRY, "per_part"])
def conv3d_weight_grad(
    x_ptr,
    dy_ptr,
    dw_ptr,  # [K, taps, C], or float32 [parts, K, taps, C]
    M,
    C,  # channels of x in a group
    K,  # channels of y in a group
    x_pitch,
    y_pitch,
    D,
    H,
    W,
    OD,
    OH,
    OW,
    sd,
    sh,
    sw,
    pd,
    ph,
    pw,
    dd,
    dh,
    dw,
    part_size,  # elements of dw
    per_part,  # output pixels that one program sums over
    T: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    COLUMNS: tl.constexpr,  # of a tile: "tap", channels of one; "row", of taps and their channels; "pairs" of any
    PITCH: tl.constexpr,  # "row": channels of x, padded
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,  # output pixels of a step
    BN: tl.constexpr,  # columns: channels of x
    BK: tl.constexpr,  # rows: channels of y
):
    """One [BK, BN] tile of dw = dy^T x: a loop over output pixels.

    Where a pixel lies is divided out before the loop and added up inside.
    """
    group = tl.program_id(1)
    part = tl.program_id(2)
    tiles_k = tl.cdiv(K, BK)
    pid = tl.program_id(0)
    pid_n = pid // tiles_k
    k = (pid - pid_n * tiles_k) * BK + tl.arange(0, BK)
    k_ok = k < K
    if COLUMNS == "tap":
        steps_c = tl.cdiv(C, BN)
        tap = pid_n // steps_c
        c = (pid_n - tap * steps_c) * BN + tl.arange(0, BN)
        j_ok = c < C
        j = tap * C + c
        columns = c
    elif COLUMNS == "row":
        i = tl.arange(0, BN)
        s = i // PITCH
        tap = pid_n * S
        j_ok = (i < S * PITCH) & (i - s * PITCH < C)
        j = (tap + s) * C + (i - s * PITCH)
        columns = i
    else:
        j = pid_n * BN + tl.arange(0, BN)
        j_ok = j < T * R * S * C
        tap = j // C
        columns = j - tap * C
    td = tap // (R * S) * dd
    rd = tap // S % R * dh
    sd_ = tap % S * dw
    dy_cols = dy_ptr + group * K + k  # [BK]
    x_cols = x_ptr + columns  # [BN]
    if COLUMNS != "row":  # which has one group: its addresses are whole pixels, as far as the compiler knows
        x_cols += group * C
    begin = part * per_part
    end = tl.minimum(begin + per_part, M)
    n, od, oh, ow = _pixel(begin + tl.arange(0, BM), OD, OH, OW)
    # a step on, in pixels of each axis
    step_n, step_d, step_h, step_w = _pixel(BM, OD, OH, OW)
    acc = tl.zeros((BK, BN), tl.float32)
    for m0 in range(begin, end, BM):
        m = m0 + tl.arange(0, BM)
        m_ok = m < end
        if WIDE:
            m = m.to(tl.int64)
            n_ = n.to(tl.int64)
        else:
            n_ = n
        if COLUMNS == "pairs":
            d = (od * sd - pd)[:, None] + td[None, :]
            h = (oh * sh - ph)[:, None] + rd[None, :]
            w = (ow * sw - pw)[:, None] + sd_[None, :]
            ok = m_ok[:, None] & (d >= 0) & (d < D) & (h >= 0) & (h < H) & (w >= 0) & (w < W)
            x_offs = (((n_[:, None] * D + d) * H + h) * W + w) * x_pitch
            x = tl.load(x_cols[None, :] + x_offs, mask=ok & j_ok[None, :], other=0.0)
        else:
            d = od * sd - pd + td
            h = oh * sh - ph + rd
            ok = m_ok & (d >= 0) & (d < D) & (h >= 0) & (h < H)
            if COLUMNS == "tap":
                w = ow * sw - pw + sd_
                ok = ok & (w >= 0) & (w < W)
                mask = ok[:, None] & j_ok[None, :]
            else:
                w = ow * sw - pw
                across = w[:, None] + s[None, :]
                mask = ok[:, None] & (i < S * PITCH)[None, :] & (across >= 0) & (across < W)
            x_rows = ((n_ * D + d) * H + h) * W + w
            if COLUMNS == "row":
                x_rows *= PITCH  # a constant: what is copied at once has to be known
            else:
                x_rows *= x_pitch
            x = tl.load(x_cols[None, :] + x_rows[:, None], mask=mask, other=0.0)
        dy = tl.load(dy_cols[None, :] + (m * y_pitch)[:, None], mask=m_ok[:, None] & k_ok[None, :], other=0.0)
        acc = tl.dot(
            tl.trans(_rounded(dy, PRECISION)), _rounded(x, PRECISION), acc, input_precision=PRECISION
        )
        ow += step_w
        over = (ow >= OW).to(tl.int32)
        ow -= over * OW
        oh += step_h + over
        over = (oh >= OH).to(tl.int32)
        oh -= over * OH
        od += step_d + over
        over = (od >= OD).to(tl.int32)
        od -= over * OD
        n += step_n + over
    rows = (group * K + k).to(tl.int64) * (T * R * S * C) + part.to(tl.int64) * part_size
    tl.store(
        dw_ptr + rows[:, None] + j[None, :],
        acc.to(dw_ptr.dtype.element_ty),
        mask=k_ok[:, None] & j_ok[None, :],
    )


@triton.jit(do_not_specialize=["parts"])
def sum_parts(part_ptr, out_ptr, size, parts, BLOCK: tl.constexpr):
    """out = the sum of float32 [parts, size] in the order of the parts."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < size
    acc = tl.zeros((BLOCK,), tl.float32)
    for _ in range(0, parts):
        acc += tl.load(part_ptr + i, mask=mask, other=0.0)
        part_ptr += size
    tl.store(out_ptr + i, acc.to(out_ptr.dtype.element_ty), mask=mask)
