"""Is it right? Every fused layer of a model on its own data: ours, the stock modules, float64; then the whole network.

`verify` runs the model once. Each fused layer is compared on the very tensors that it got, so one wrong kernel shows as
one wrong layer, however much its output spoils behind it. What is allowed is the promise of the package: see `allowed`.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree

from r3d_kernels import _check, _fork, backends
from r3d_kernels._promise import ROUNDING, STOCK_BROKEN, allowed
from r3d_kernels._report import LayerRow, NetworkRow, Report
from r3d_kernels.fusing import unfuse
from r3d_kernels.nn import LayerCall, is_plain_pool, max_pool3d, observed_by
from r3d_kernels.ops.clip import normalized_clip
from r3d_kernels.problems import ConvProblem

__all__ = ["LayerRow", "NetworkRow", "Report", "allowed", "stock_copy", "verify"]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _plain_name(name: str) -> str:
    """A module's name without what torch.compile wraps around it."""
    return name.replace("_orig_mod.", "")


# ------------------------------------------------------------------------------------------------------- measuring


class _Distance:
    """Relative L2 of something to a float64 reference, which comes sample by sample."""

    def __init__(self) -> None:
        self._squares = torch.zeros(2, dtype=torch.float64)
        self.wrong = ""  # why there is no such number

    def add(self, y: Tensor, want: Tensor) -> None:
        if y.shape != want.shape:
            self.wrong = f"has shape {list(y.shape)}, expected {list(want.shape)}"
            return
        parts = ((y.double() - want).square().sum(), want.square().sum())
        self._squares += torch.stack(parts).cpu()

    def value(self) -> float:
        if self.wrong:
            return math.inf
        error, norm = self._squares.sqrt().tolist()
        return error / (norm or 1.0)


def _not_finite(tensors: dict[str, Tensor]) -> str:
    """How many elements of each are no finite numbers, or ""."""
    counts = {
        name: t.numel() - int(t.isfinite().sum()) for name, t in tensors.items() if t.is_floating_point()
    }
    told = ", ".join(f"{name} {count} of {tensors[name].numel()}" for name, count in counts.items() if count)
    return f"not finite: {told}" if told else ""


class _Float64:
    """A layer in float64, from the modules' own parameters."""

    def __init__(self, call: LayerCall) -> None:
        def wide(t: Tensor | None) -> Tensor | None:
            return None if t is None else t.detach().double()

        conv, bn = call.conv, call.bn
        self.call = call
        self.weight, self.bias = wide(conv.weight), wide(conv.bias)
        self.norm = None
        if bn is not None:
            self.norm = tuple(map(wide, (bn.running_mean, bn.running_var, bn.weight, bn.bias)))

    def __call__(self, i: int) -> Tensor:
        """The output for sample i, [1, K, D', H', W']."""
        call, conv = self.call, self.call.conv
        x = call.x[i : i + 1]
        x = x.double() if call.clip is None else normalized_clip(x, *call.clip, torch.float64)
        y = F.conv3d(x, self.weight, self.bias, conv.stride, conv.padding, conv.dilation, conv.groups)
        if self.norm is not None:
            y = F.batch_norm(y, *self.norm, False, 0.0, call.bn.eps)
        if call.residual is not None:
            y = y + call.residual[i : i + 1].double()
        if call.activation == "relu":
            y = F.relu(y)
        return y if call.pool is None else call.pool.forward(y)


def _wide_conv(conv: nn.Conv3d, dtype: torch.dtype, x: Tensor) -> Tensor:
    """`conv` as it would be in half precision if that were right: products and sums in float32, rounded once."""

    def rounded(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.to(dtype).float()

    geometry = (conv.stride, conv.padding, conv.dilation, conv.groups)
    with torch.autocast(x.device.type, enabled=False):
        return F.conv3d(rounded(x), rounded(conv.weight), rounded(conv.bias), *geometry).to(dtype)


def _stock(call: LayerCall, convolve: Callable[[Tensor], Tensor]) -> Tensor:
    """The stock modules of a layer in the layer's dtype. By `.forward`: no hook is to take this for the user's call."""
    x = call.x
    if call.clip is not None:
        x = normalized_clip(x, *call.clip, call.dtype())
    y = convolve(x)
    if call.bn is not None:
        y = call.bn.forward(y)
    if call.residual is not None:
        y = y + call.residual
    if call.activation == "relu":
        y = F.relu(y)
    return y if call.pool is None else call.pool.forward(y)


def _is_unsafe(problem: ConvProblem, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether torch's own convolution must not even be called."""
    return dtype == torch.bfloat16 and device.type == "cpu" and problem.torch_bf16_is_unsafe()


class _Recorder:
    """Runs the calls of fused layers, compares each and keeps a row of it."""

    def __init__(self, model: nn.Module) -> None:
        self.rows: list[LayerRow] = []
        self.fused = False  # whether any layer was to run fused
        self.dtypes: list[torch.dtype] = []
        self.unsafe: list[str] = []  # convolutions that stock bfloat16 must not be asked for
        self._names = {id(module): _plain_name(name) for name, module in model.named_modules()}

    def __call__(self, call: LayerCall) -> Tensor:
        if call.pool is not None and not is_plain_pool(call.pool):
            # a module of its own then, which may return indices too, or whatever its hooks like
            return max_pool3d(self(call._replace(pool=None)), call.pool, fused=call.fused)
        why = call.why_stock()
        y = call.run()
        self.fused |= call.fused
        with torch.no_grad():
            self.rows.append(self._told(call, why) if why is not None else self._compared(call, y))
        return y

    def _name(self, conv: nn.Module) -> str:
        return self._names.get(id(conv), "(not a part of the model)")

    def _told(self, call: LayerCall, why: str) -> LayerRow:
        """Of a layer whose modules ran: nothing of ours to compare, and calling them again might change them."""
        name = self._name(call.conv)
        try:
            residual = call.residual is not None
            problem = ConvProblem.from_module(call.conv, call.x.shape, residual, call.activation)
            dtype = call.dtype()
        except (AttributeError, TypeError, ValueError):  # no convolution of torch's
            return LayerRow(name, "", _name(call.x.dtype), "torch", "", None, None, None, True, why)
        if _is_unsafe(problem, dtype, call.x.device):
            self.unsafe.append(name)
        return LayerRow(name, str(problem), _name(dtype), "torch", "", None, None, None, True, why)

    def _compared(self, call: LayerCall, y: Tensor) -> LayerRow:
        name, dtype, device = self._name(call.conv), call.dtype(), call.x.device
        kernel = call.kernel()
        residual = call.residual is not None
        problem = ConvProblem.from_module(call.conv, call.x.shape, residual, call.activation)
        self.dtypes.append(dtype)
        head = (
            name,
            str(problem),
            _name(dtype),
            "" if kernel is None else kernel.backend,
            "?" if kernel is None else backends.full_name(kernel),
        )
        if problem.n == 0:
            return LayerRow(*head, None, None, None, True, "the batch is empty: nothing to compare")
        notes = []
        rounded = partial(_wide_conv, call.conv, dtype)
        if _is_unsafe(problem, dtype, device):
            self.unsafe.append(name)
            stock = _stock(call, rounded)
            notes.append("stock convolution in float32, torch's bfloat16 is unsafe here")
        else:
            stock = _stock(call, call.conv.forward)
        error, stock_error, broken = self._errors(call, y, stock)
        limit = allowed(dtype, stock_error, device)
        if dtype in (torch.bfloat16, torch.float16) and not stock_error < STOCK_BROKEN:
            # Cancellation can do that too: what else than a wrong convolution is in it?
            _, other, _ = self._errors(call, y, _stock(call, rounded))
            least = min(filter(math.isfinite, (stock_error, other)), default=STOCK_BROKEN)
            limit = 2 * least + ROUNDING[dtype]
            if other < STOCK_BROKEN:
                notes.append(f"stock {_name(dtype)} is wrong here: measured by one that sums in float32")
        notes += filter(None, (broken,))
        ok = not broken and math.isfinite(error) and error <= limit
        if y.dtype != dtype:
            ok = False
            notes.append(f"returned {y.dtype}, expected {dtype}")
        if not ok and not broken and stock_error > limit:
            notes.append("the stock modules miss it too")
        given = {"input": call.x, **({"residual": call.residual} if residual else {})}
        notes += filter(None, (_not_finite({**given, "ours": y, "stock": stock}),))
        return LayerRow(*head, error, stock_error, limit, ok, "; ".join(notes))

    @staticmethod
    def _errors(call: LayerCall, y: Tensor, stock: Tensor) -> tuple[float, float, str]:
        """Errors of ours and of stock, and what is wrong with our output's shape."""
        ours, theirs = _Distance(), _Distance()
        with torch.autocast(call.x.device.type, enabled=False):
            exact = _Float64(call)
            # A CPU's float64 convolution unfolds its whole input in memory: one sample at a time.
            for i in range(call.x.shape[0]):
                want = exact(i)
                ours.add(y[i : i + 1], want)
                theirs.add(stock[i : i + 1], want)
        if len(y) != len(stock):
            ours.wrong = f"has {len(y)} samples, expected {len(stock)}"
        return ours.value(), theirs.value(), f"the output {ours.wrong}" if ours.wrong else ""


# ------------------------------------------------------------------------------------------------- the whole network


def stock_copy(model: nn.Module) -> nn.Module:
    """A copy of the model, weights and hooks included, whose layers all run through their stock modules."""
    copied = unfuse(copy.deepcopy(model))
    for module in copied.modules():  # somebody's own with a switch of that name
        if getattr(module, "fused", None) is True:
            module.fused = False
    return copied


def _result(output: Any) -> Tensor | str:
    """The one floating tensor that a model returned, or why there is none."""
    leaves = [leaf for leaf in _pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
    if len(leaves) != 1 or not leaves[0].is_floating_point():
        return f"not compared: the model returns {len(leaves)} tensors, not one of floating numbers"
    return leaves[0]


def _looks_separable(model: nn.Module, x: Tensor, y: Tensor) -> bool:
    """Whether the samples of a batch have nothing to do with each other, as far as one can see."""
    if not (x.dim() and y.dim() and 1 < len(x) == len(y)):
        return False
    return not any(
        m.training or (isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is None)
        for m in model.modules()
    )


def _float64(model: nn.Module, x: Tensor, separately: bool) -> Tensor | str:
    """What the model returns in float64; `separately` takes less memory."""
    double = stock_copy(model).double()
    x = x.double() if x.is_floating_point() else x
    with torch.autocast(x.device.type, enabled=False):
        if not separately:
            return _result(double(x))
        parts = [_result(double(sample)) for sample in x.split(1)]
        return next((part for part in parts if isinstance(part, str)), None) or torch.cat(parts)


def _stock_result(
    model: nn.Module, x: Tensor, unsafe: list[str], channels_last: bool = False
) -> Tensor | str:
    stock = stock_copy(model)
    if channels_last:
        for p in stock.parameters():
            if p.dim() == 5:
                p.data = p.data.contiguous(memory_format=torch.channels_last_3d)
        x = x.contiguous(memory_format=torch.channels_last_3d) if x.dim() == 5 else x
    modules = {_plain_name(name): module for name, module in stock.named_modules()}
    for name in unsafe:
        if name in modules:
            modules[name].forward = partial(_wide_conv, modules[name], torch.bfloat16)
    return _result(stock(x))


def _compare_network(model: nn.Module, x: Tensor, output: Any, recorder: _Recorder) -> NetworkRow:
    def told(why: str) -> NetworkRow:
        return NetworkRow(*head, None, None, None, True, None, why)

    head: tuple[tuple[int, ...], str] = ((), "")
    y = _result(output)
    if isinstance(y, str):
        return told(y)
    # bfloat16 layers in front of float32 logits (autocast) give the logits of bfloat16
    halves = [d for d in (y.dtype, *recorder.dtypes) if d in (torch.bfloat16, torch.float16)]
    dtype = max(halves, key=ROUNDING.__getitem__) if halves else y.dtype
    head = (tuple(y.shape), _name(dtype))
    if y.numel() == 0:
        return told("the batch is empty: nothing to compare")
    stock = _stock_result(model, x, recorder.unsafe)
    if isinstance(stock, str):
        return told(stock)

    # A model may let samples depend on each other in a way that does not show: then the batch as a whole decides.
    for separately in (True, False) if _looks_separable(model, x, y) else (False,):
        try:
            want = _float64(model, x, separately)
        except (RuntimeError, TypeError, ValueError) as e:  # a model that names another dtype in its code
            return told(f"not compared: it does not run in float64 ({str(e).splitlines()[0]})")
        if isinstance(want, str):
            return told(want)
        ours, theirs = _Distance(), _Distance()
        ours.add(y, want)
        theirs.add(stock, want)
        error, stock_error = ours.value(), theirs.value()
        limit = allowed(dtype, stock_error, y.device, network=True)
        ok = math.isfinite(error) and error <= limit
        if ok:
            break

    notes = [_not_finite({"output": y})]
    if ours.wrong:
        notes.append(f"the output {ours.wrong}")
    elif not ok and stock_error > limit:
        notes.append("the stock modules miss it too")
    elif not ok and all(row.ok for row in recorder.rows):
        # What is not ours may be less exact in the layout that our layers leave: torch's group norm on a CPU is.
        other = _stock_result(model, x, recorder.unsafe, channels_last=True)
        if isinstance(other, Tensor) and other.shape == want.shape:
            theirs = _Distance()
            theirs.add(other, want)
            if theirs.value() > limit:
                notes.append(
                    f"the stock modules have {theirs.value():.1e} in channels_last_3d, our layers' layout"
                )
    top1 = None
    if y.dim() == 2 and y.shape == want.shape:
        top1 = (int((y.argmax(1) == want.argmax(1)).sum()), len(y))
    return NetworkRow(*head, error, stock_error, limit, ok, top1, "; ".join(filter(None, notes)))


# --------------------------------------------------------------------------------------------------------- verify


def _check_arguments(model: object, example_input: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    _check.tensor(example_input, "example_input")
    if model.training:
        raise ValueError("model: expected evaluation mode, got training mode: call model.eval()")
    places = {p.device for p in model.parameters()}
    if len(places) == 1 and example_input.device not in places:
        raise ValueError(
            f"example_input: expected a tensor on {places.pop()}, where the parameters are, "
            f"got one on {example_input.device}"
        )


def _eagerly(model: nn.Module) -> contextlib.AbstractContextManager[object]:
    """Inside a graph of torch.compile nobody sees a layer."""
    compiled = any(m._compiled_call_impl is not None or hasattr(m, "_orig_mod") for m in model.modules())
    return _force_eager() if compiled else contextlib.nullcontext()


_stance = (
    _fork.Lock()
)  # the stance is the whole process's: two threads that put it back in turn would leave it eager


@contextlib.contextmanager
def _force_eager() -> Iterator[None]:
    with _stance, torch.compiler.set_stance("force_eager"):
        yield


def verify(model: nn.Module, example_input: Tensor) -> Report:
    """Compares every fused layer of a model, and the whole of it, with the stock modules and with float64.

    The model runs once as it is, without gradients; each fused layer is computed again on what it got, by its stock
    modules in the same dtype and in float64. Then copies of the model run: stock, and in float64 (which takes the
    memory of the weights in float64, and the time of a slow network). The model itself is left as it was; its forward
    hooks run in the copies too. A layer whose modules ran (hooks on them, `fused=False`, ...) is listed with the reason
    and compared with nothing. Only what the calling thread runs is looked at. What
    torch.compile has compiled of the model runs eagerly.

    Args:
        model: in evaluation mode, with layers that run fused: a network of this package with ``fused=True``, or any
            other behind `r3d_kernels.fuse`.
        example_input: what the model takes: ``[N, C, D, H, W]`` on the device of its parameters, in their dtype
            (float32, bfloat16, float16, float64), or uint8 where it takes that. Real clips tell more than noise.

    Returns:
        A `Report`: ``report.ok``, ``print(report)``, ``report.to_dict()``, ``report.layers``, ``report.network``. What
        is allowed: see `r3d_kernels.verifying.allowed`.

    Raises:
        TypeError: `model` is no module, `example_input` no tensor.
        ValueError: the model is in training mode, `example_input` on another device, or no fused layer ran.
    """
    _check_arguments(model, example_input)
    recorder = _Recorder(model)
    with torch.no_grad(), _eagerly(model):
        with observed_by(recorder):
            output = model(example_input)
        if not recorder.fused:
            raise ValueError(
                "model: expected layers that run fused, found none: set model.fused = True (or create it with "
                "fused=True), or call r3d_kernels.fuse(model)"
            )
        network = _compare_network(model, example_input, output, recorder)
    return Report(
        layers=tuple(recorder.rows),
        network=network,
        device=str(example_input.device),
        threads=torch.get_num_threads(),
        torch_version=torch.__version__,
        input=f"{'x'.join(map(str, example_input.shape))} {_name(example_input.dtype)}",
    )
