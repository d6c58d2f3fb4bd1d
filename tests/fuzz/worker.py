"""One child process of the fuzzer: runs cases, writes down each before it runs, and prints what is wrong as JSON lines.

The oracle is float64 through torch's own operators, which use no library kernel there.
"""

from __future__ import annotations

import argparse
import collections
import copy
import ctypes
import json
import math
import os
import random
import sys
import time
from dataclasses import replace

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import r3d_kernels as r3d
from r3d_kernels import _cpu_kernels, _layer, backends
from r3d_kernels._cpu_kernels import AmxCpu, DirectCpu
from r3d_kernels._kernel import Layer, Request, fp32_mode
from r3d_kernels._torch_kernels import OneDnn
from r3d_kernels.problems import ProblemTensors

try:
    from fuzz.geometry import Case, draw, edges
except ImportError:  # run as a file
    from geometry import Case, draw, edges

FLOAT32 = 5e-6
STRICT_FLOOR = 1e-6
BFLOAT16 = 2 * 2.0**-8
# Where the user allows coarser products with torch.set_float32_matmul_precision
PRECISION = {"highest": FLOAT32, "high": 3e-5, "medium": 1e-2}
# It rounds after every layer, and mean and shift of one channel may cancel: this is about garbage.
STOCK = {torch.float32: 1e-3, torch.bfloat16: 0.1}
_EITHER = 1.5e300  # stands for an output that may be finite or not


# ---- planted faults: what the fuzzer has to find ----


class _PlantedWrong(DirectCpu):
    """One output in a place that only some problems have is off."""

    name = "planted wrong"

    def run(self, pack, x, residual, request):
        y = super().run(pack, x, residual, request)
        if request.problem.out_size[2] % 4 == 3 and y.numel():
            y[..., -1] += 1.0
        return y


class _PlantedCrash(DirectCpu):
    name = "planted crash"

    def run(self, pack, x, residual, request):
        if request.problem.kernel == (3, 3, 3):
            os.abort()
        return super().run(pack, x, residual, request)


class _PlantedHang(DirectCpu):
    name = "planted hang"

    def run(self, pack, x, residual, request):
        if request.problem.kernel == (3, 3, 3):
            time.sleep(3600)
        return super().run(pack, x, residual, request)


class _PlantedOverread(DirectCpu):
    """Reads one byte behind its input."""

    name = "planted overread"

    def run(self, pack, x, residual, request):
        if x.numel() and x.is_contiguous():
            ctypes.string_at(x.data_ptr() + x.numel() * x.element_size(), 1)
        return super().run(pack, x, residual, request)


class _PlantedOverwrite(DirectCpu):
    """Writes to its input."""

    name = "planted overwrite"

    def run(self, pack, x, residual, request):
        y = super().run(pack, x, residual, request)
        x[..., -1:].add_(1.0)
        return y


class _OneDnnAnywhere(OneDnn):
    """oneDNN where it is not known to be right, too: what its list of geometries is made from."""

    name = "oneDNN anywhere"

    def can_run(self, request):
        p = request.problem
        if request.dtype not in (torch.float32, torch.bfloat16) or p.n == 0 or (p.groups != 1 and p.residual):
            return "torch has no such operator"
        if request.dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return "oneDNN has no bfloat16 on this processor"
        return None


class _EmulatedAmx(AmxCpu):
    """The AMX kernels in plain loops, which run on any processor."""

    def __init__(self, tile):
        super().__init__(tile)
        self.name += " in plain loops"

    def can_run(self, request):
        real = _cpu_kernels.describe
        _cpu_kernels.describe = lambda: {**real(), "isa": "amx"}
        try:
            return super().can_run(request)
        finally:
            _cpu_kernels.describe = real


def plant(fault: str | None) -> None:
    faults = {
        "wrong": _PlantedWrong,
        "crash": _PlantedCrash,
        "hang": _PlantedHang,
        "overread": _PlantedOverread,
        "overwrite": _PlantedOverwrite,
    }
    if fault in faults:
        backends.KERNELS.insert(0, faults[fault]())
    elif fault == "stale":
        _layer._key = lambda *args: [None]


# ---- what is wrong with a result ----


def _wrong(
    y: Tensor,
    want: Tensor,
    before: Tensor,
    magnitude: float,
    limit: float,
    poisoned: bool,
    few: bool = False,
) -> str | None:
    """None, or what is wrong. want: float64; before: the same before the activation."""
    if y.shape != want.shape:
        return f"shape {list(y.shape)}, expected {list(want.shape)}"
    y = y.double()
    settled = before != _EITHER
    if poisoned and not bool(settled.all()):
        y, want, before = y[settled], want[settled], before[settled]
    if poisoned:  # may spread over the tile of a minimal-filtering kernel, but must not vanish
        lost = int((want.isnan() & ~y.isnan() | want.isinf() & y.isfinite()).sum())
        if lost:
            return f"{lost} of {int((~want.isfinite()).sum())} outputs that are not finite came out finite"
        rest = want.isfinite() & y.isfinite()
        y, want, before = y[rest], want[rest], before[rest]
    if not bool(y.isfinite().all()):
        return f"{int((~y.isfinite()).sum())} outputs are not finite"
    distance, size = float((y - want).norm()), _size(want, before, magnitude, few)
    error = distance / size if size else distance
    return None if error <= limit else f"relative L2 error {error:.1e}, allowed {limit:.1e}"


def _size(want: Tensor, before: Tensor, magnitude: float, few: bool = False) -> float:
    """What errors are relative to."""
    size = float(want.norm())
    if few or want.numel() < 64 or int((want != 0).sum()) < 32:
        # A handful of outputs may cancel to nearly nothing: the size of the terms is the scale then.
        size = max(size, float(before.norm()), magnitude)
    # Where a ReLU leaves next to nothing, the errors are still those of what there was before it.
    return max(size, float(before.norm()) / 4)


def _written(t: ProblemTensors, was: list[Tensor | None]) -> str | None:
    """Which input is no longer what it was, bit by bit."""
    for name, now, before in zip(("x", "weight", "residual"), (t.x, t.weight, t.residual), was, strict=True):
        if before is not None:
            bits = torch.int32 if now.dtype == torch.float32 else torch.int16
            if not torch.equal(now.view(bits), before.view(bits)):
                return f"wrote to {name}"
    return None


class _Oracle:
    def __init__(self, case: Case, t: ProblemTensors) -> None:
        p = case.problem
        linear = replace(p, activation=None)
        self.before = linear.reference(t)
        if case.poison is not None and case.poison[0] == "weight":
            # A tap that falls on padding may be multiplied by zero, as float64 does, or left out, as
            # library kernels do.
            bad = (~t.weight.isfinite()).double()
            inside = F.conv3d(
                torch.ones_like(t.x, dtype=torch.float64),
                bad,
                None,
                p.stride,
                p.padding,
                p.dilation,
                p.groups,
            )
            self.before[(inside == 0) & ~self.before.isfinite()] = _EITHER
        self.want = F.relu(self.before) if p.activation == "relu" else self.before
        scale = t.gamma.double() / (t.running_var.double() + t.eps).sqrt()
        sizes = F.conv3d(
            t.x.double().abs(), t.weight.double().abs(), None, p.stride, p.padding, p.dilation, p.groups
        )
        self.magnitude = float((sizes * scale.abs().view(-1, 1, 1, 1)).nan_to_num(0, 0, 0).norm())

    def limit(self, case: Case, stock: Tensor | None) -> float:
        if case.dtype == torch.bfloat16:
            return BFLOAT16
        if fp32_mode() == "strict" and stock is not None and self.want.numel():
            error = float((stock.double() - self.want).norm()) / (
                _size(self.want, self.before, self.magnitude) or 1.0
            )
            return max(2 * error, STRICT_FLOOR) if math.isfinite(error) else FLOAT32
        return PRECISION[torch.get_float32_matmul_precision()]


class Worker:
    def __init__(self, progress: str | None, skip: set[str], only: str | None) -> None:
        self.fd = None if progress is None else os.open(progress, os.O_WRONLY | os.O_CREAT, 0o600)
        self.skip, self.only = skip, only
        self.counts: collections.Counter[str] = collections.Counter()  # runs by kernel
        self.emulated = [_EmulatedAmx(k.tile) for k in backends.KERNELS if isinstance(k, AmxCpu)]

    def note(self, case: object, number: str, kernel: str) -> bool:
        """Writes down what runs next; False where it is to be left out."""
        key = f"{number} {kernel}"
        if key in self.skip or (self.only is not None and self.only not in kernel):
            return False
        if self.fd is not None:
            told = {"key": key, "case": str(case), "kernel": kernel, "edges": self.edges_of(case)}
            os.pwrite(self.fd, json.dumps(told).encode().ljust(1000), 0)
        return True

    @staticmethod
    def edges_of(case: object) -> list[str]:
        return edges(case.problem) if isinstance(case, Case) else []

    def tell(self, case: object, kernel: str, what: str) -> None:
        told = {"finding": "wrong", "case": str(case), "kernel": kernel, "what": what}
        print(json.dumps(told | {"edges": self.edges_of(case)}), flush=True)

    def convolution(self, case: Case) -> None:
        os.environ["R3D_KERNELS_MEMORY"] = case.memory
        torch.set_num_threads(case.threads)
        p, t = case.problem, case.tensors()
        was = [None if v is None else v.clone() for v in (t.x, t.weight, t.residual)]
        request = Request(p, case.dtype, torch.device("cpu"), torch.get_num_threads())
        oracle = _Oracle(case, t)
        poisoned = case.poison is not None
        norm = (t.running_mean, t.running_var, t.gamma, t.beta, t.eps)
        layer = Layer.of(t.weight, None, norm)
        stock = next(k for k in backends.KERNELS if k.name == "stock")
        plain = None
        if p.n and (self.note(case, case.number, "stock") or fp32_mode() == "strict"):  # a measure then
            plain = stock.run(stock.pack(layer, request), t.x, t.residual, request)
            self.counts["stock"] += 1
            most = max(STOCK[case.dtype], oracle.limit(case, None))
            if what := _wrong(plain, oracle.want, oracle.before, oracle.magnitude, most, poisoned):
                self.tell(case, "stock", what)
        limit = oracle.limit(case, plain)
        for kernel in (*backends.KERNELS, *(self.emulated if p.macs < 60_000 else ())):
            if kernel.name == "stock" or kernel.can_run(request) is not None:
                continue
            if not self.note(case, case.number, kernel.name):
                continue
            y = kernel.run(kernel.pack(layer, request), t.x, t.residual, request)
            self.counts[kernel.name] += 1
            if what := _wrong(y, oracle.want, oracle.before, oracle.magnitude, limit, poisoned):
                self.tell(case, kernel.name, what)
            if what := _written(t, was):
                self.tell(case, kernel.name, what)
                return  # what follows would be compared with something else
        if self.note(case, case.number, "API"):
            self.api(case, t, oracle, limit)

    def api(self, case: Case, t: ProblemTensors, oracle: _Oracle, limit: float) -> None:
        p = case.problem
        os.environ["R3D_KERNELS_TUNE"] = "1" if case.tuned else "0"
        module = r3d.ConvBNAct3d(
            p.c, p.k, p.kernel, p.stride, p.padding, p.dilation, p.groups, activation=p.activation, eps=t.eps
        ).eval()
        module.conv.weight = nn.Parameter(t.weight)
        for name, value in (("weight", t.gamma), ("bias", t.beta)):
            setattr(module.bn, name, nn.Parameter(value))
        module.bn.running_mean, module.bn.running_var = t.running_mean, t.running_var
        with torch.inference_mode():
            for _ in range(2):  # the long way, then that of later calls
                y = module(t.x, t.residual)
                self.counts["API"] += 1
                if what := _wrong(
                    y, oracle.want, oracle.before, oracle.magnitude, limit, case.poison is not None
                ):
                    self.tell(
                        case, f"API, {r3d.explain(module)[0].kernel if r3d.explain(module) else ''}", what
                    )

    def state(self, seed: int, index: int) -> None:
        """A layer whose parameters change in random ways between calls: every result is that of the parameters now."""
        number = f"state {seed}:{index}"
        r = random.Random(number)
        torch.manual_seed(r.getrandbits(32))
        os.environ["R3D_KERNELS_MEMORY"] = r.choice(("lean", "fast"))
        os.environ["R3D_KERNELS_TUNE"] = "0"
        c, k = r.choice((3, 8, 16, 64)), r.choice((8, 16, 64))
        module = r3d.ConvBNAct3d(c, k, 3, 1, 1, bias=r.random() < 0.3).eval()
        x = torch.randn(1, c, 2, 4, 4)
        backend = r.choice(("auto", "auto", "torch", "cpu"))
        cast = r.random() < 0.3
        done: list[str] = []
        for _ in range(5):
            with (
                torch.inference_mode(),
                r3d.backend(backend),
                torch.autocast("cpu", torch.bfloat16, enabled=cast),
            ):
                y = module(x)
            conv, bn = module.conv, module.bn
            with torch.no_grad():
                bias = None if conv.bias is None else conv.bias.double()
                z = F.conv3d(x.double(), conv.weight.double(), bias, padding=1)
                named = (bn.running_mean, bn.running_var, bn.weight, bn.bias)
                before = F.batch_norm(z, *(v.double() for v in named), False, 0.0, bn.eps)
            self.counts["state"] += 1
            limit = 4 * BFLOAT16 if cast else FLOAT32
            if what := _wrong(y, F.relu(before), before, float(before.norm()), limit, False):
                self.tell(f"{number} c{c}k{k} {backend}{' autocast' if cast else ''}", " > ".join(done), what)
                return
            name, change = r.choice(list(_CHANGES.items()))
            done.append(name)
            change(module, r)

    def pools(self, seed: int, index: int) -> None:
        number = f"pool {seed}:{index}"
        r = random.Random(number)
        torch.manual_seed(r.getrandbits(32))
        kernel = [r.choice((1, 2, 3, 3, 4)) for _ in range(3)]
        padding = [r.randint(0, f // 2) for f in kernel]
        stride = [r.randint(1, 3) for _ in range(3)]
        size = [max(f - 2 * p, r.choice(_POOL_SIZES)) for f, p in zip(kernel, padding, strict=True)]
        x = torch.randn(r.randint(0, 2), r.choice((1, 3, 8, 17, 64)), *size)
        if x.numel() and r.random() < 0.2:
            x.view(-1)[r.randrange(x.numel())] = r.choice((float("nan"), float("inf"), float("-inf")))
        x = x.to(r.choice((torch.float32, torch.bfloat16)))
        case = f"{number} {list(x.shape)} f{kernel} s{stride} p{padding} {x.dtype}"
        if self.note(case, number, "max-pool") and x.numel():
            y = r3d.ops.max_pool3d(x, kernel, stride, padding)
            want = F.max_pool3d(x.double(), kernel, stride, padding)
            self.counts["max-pool"] += 1
            if not torch.equal(y.double().nan_to_num(7e300), want.nan_to_num(7e300)):
                self.tell(case, "max-pool", "other maxima than torch's")
        if self.note(case, number, "head") and x.numel():
            weight = torch.randn(r.choice((1, 5, 33)), x.shape[1]).to(x.dtype)
            y = r3d.ops.avg_pool_linear(x, weight)
            before = x.double().mean((2, 3, 4)) @ weight.double().T
            size = float(
                (x.double().abs().mean((2, 3, 4)) @ weight.double().abs().T).nan_to_num(0, 0, 0).norm()
            )
            self.counts["head"] += 1
            limit = FLOAT32 if x.dtype == torch.float32 else BFLOAT16
            few = x.shape[0] * x.shape[1] < 64  # means, which all outputs share
            if what := _wrong(y, before, before, size, limit, True, few):
                self.tell(case, "head", what)


_POOL_SIZES = (1, 2, 3, 5, 8, 13)


def _slices(module: nn.Module, r: random.Random) -> None:
    module.conv.weight.data[:, r.randrange(module.conv.in_channels) :: 2] *= 0.2


def _one_index(module: nn.Module, r: random.Random) -> None:
    weight = module.conv.weight.data
    axis = r.randrange(5)
    weight.select(axis, r.randrange(weight.shape[axis])).mul_(-0.5)


def _trained(module: nn.Module, r: random.Random) -> None:
    """A step of training: a forward that moves the statistics, an optimizer that moves the parameters."""
    with torch.enable_grad():
        module.train()
        optimizer = torch.optim.SGD(module.parameters(), lr=0.3)
        module(torch.randn(2, module.conv.in_channels, 2, 3, 3)).square().mean().backward()
        optimizer.step()
        module.eval()
        module.zero_grad()


def _through_double(module: nn.Module, r: random.Random) -> None:
    module.double()
    module.conv.weight.data.mul_(0.3)
    module.float()


def _other_memory(module: nn.Module, r: random.Random) -> None:
    with torch.no_grad():
        module.conv.weight.set_(torch.randn_like(module.conv.weight))


def _shared(module: nn.Module, r: random.Random) -> None:
    """A deep copy's parameters, then writes to what it was copied from."""
    other = copy.deepcopy(module)
    module.conv.weight.data = other.conv.weight.data
    other.conv.weight.data.neg_()


def _transposed(module: nn.Module, r: random.Random) -> None:
    a, b = r.sample((2, 3, 4), 2)
    module.conv.weight.data = module.conv.weight.data.transpose(a, b)


def _restrided(module: nn.Module, r: random.Random) -> None:
    beta = torch.randn(2 * module.bn.num_features)
    module.bn.bias.data = beta[: module.bn.num_features]
    module(torch.zeros(1, module.conv.in_channels, 1, 1, 1))
    module.bn.bias.data = beta[::2]  # begins where it began


def _reversed_in_place(module: nn.Module, r: random.Random) -> None:
    module.conv.weight.data.copy_(module.conv.weight.data.flip(r.choice((0, 1, 2, 3, 4))))


def _other_state(module: nn.Module, r: random.Random) -> None:
    module.load_state_dict(
        {k: torch.rand_like(v) if v.is_floating_point() else v for k, v in module.state_dict().items()}
    )


def _swapped(module: nn.Module, r: random.Random) -> None:
    torch.utils.swap_tensors(module.conv.weight, nn.Parameter(torch.randn_like(module.conv.weight)))


_CHANGES = {
    "weight.data[:, i::2] *=": _slices,
    "weight.data[one index of an axis] *=": _one_index,
    "a step of training": _trained,
    "double and back": _through_double,
    "weight.set_": _other_memory,
    "memory of a copy": _shared,
    "weight.data = transposed": _transposed,
    "weight.data.copy_(flipped)": _reversed_in_place,
    "weight.mul_": lambda m, r: torch.no_grad()(m.conv.weight.mul_)(-0.5),
    "weight = Parameter": lambda m, r: setattr(
        m.conv, "weight", nn.Parameter(torch.randn_like(m.conv.weight))
    ),
    "weight.data = other": lambda m, r: setattr(m.conv.weight, "data", torch.randn_like(m.conv.weight)),
    "load_state_dict": _other_state,
    "swap_tensors": _swapped,
    "running_mean.data.add_": lambda m, r: m.bn.running_mean.data.add_(1.0),
    "running_var.mul_": lambda m, r: m.bn.running_var.mul_(3.0),
    "one element of gamma.data": lambda m, r: m.bn.weight.data[r.randrange(m.bn.num_features)].neg_(),
    "beta.data = every second": lambda m, r: setattr(
        m.bn.bias, "data", torch.randn(2 * m.bn.num_features)[::2]
    ),
    "beta.data = other strides": _restrided,
    "eps": lambda m, r: setattr(m.bn, "eps", r.choice((1e-5, 1e-3, 0.5))),
    "numpy": lambda m, r: m.conv.weight.detach().numpy().__imul__(0.7),
    "channels_last": lambda m, r: m.to(memory_format=torch.channels_last_3d),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--cases", type=int, default=100)
    parser.add_argument("--mode", choices=("convolution", "state", "pools"), default="convolution")
    parser.add_argument("--only", help="run kernels with this in their name")
    parser.add_argument("--plant", choices=("wrong", "crash", "hang", "overread", "overwrite", "stale"))
    parser.add_argument("--unlisted", action="store_true", help="oneDNN beyond its list of geometries, too")
    parser.add_argument("--precision", choices=PRECISION, default="highest")
    parser.add_argument("--until", type=float, help="time.time() at which to stop")
    parser.add_argument("--progress", help="a file that names what runs now")
    parser.add_argument("--skip", action="append", default=[])
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision(options.precision)
    plant(options.plant)
    if options.unlisted:
        backends.KERNELS.insert(0, _OneDnnAnywhere())
    worker = Worker(options.progress, set(options.skip), options.only)
    with torch.no_grad():
        end = options.first + options.cases
        for index in range(options.first, end):
            if options.until is not None and time.time() > options.until:
                end = index
                break
            if options.mode == "convolution":
                worker.convolution(draw(options.seed, index))
            elif options.mode == "state":
                if worker.note(f"state {options.seed}:{index}", f"state {options.seed}:{index}", "state"):
                    worker.state(options.seed, index)
            else:
                worker.pools(options.seed, index)
            if index % 20 == 0:
                print(json.dumps({"at": index + 1, "runs": worker.counts}), flush=True)
    print(json.dumps({"at": end, "runs": worker.counts, "done": True}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
