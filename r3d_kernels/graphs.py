"""A whole forward pass as one CUDA graph: at batch 1 the launches of a network cost more than its work."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from r3d_kernels import backends
from r3d_kernels._layer import layer_packs
from r3d_kernels.ops.conv3d_sm90 import own_counters

__all__ = ["GraphedModel", "graphed"]

_WARM_UP = 3  # eager passes before the capture: kernels are chosen, weights packed, libraries set up


class _Captured:
    """One graph with its input and output buffers."""

    def __init__(self, model: nn.Module, example: Tensor) -> None:
        device = example.device
        self.input = torch.empty_like(example, memory_format=torch.preserve_format).copy_(example)
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            for _ in range(_WARM_UP):
                model(self.input)
        torch.cuda.current_stream(device).wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        # "thread_local": by default a cudaMalloc in any other thread would spoil the capture.
        capture = torch.cuda.graph(self._graph, stream=side, capture_error_mode="thread_local")
        with own_counters(device) as self._counters, capture:
            self._output = model(self.input)
        if not isinstance(self._output, Tensor):
            raise TypeError(f"model: expected one that returns a tensor, got {type(self._output).__name__}")
        self._done = torch.cuda.Event()
        # The graph reads packed weights by address: they live as long as it does.
        self._packs = [layer_packs(module) for module in model.modules()]

    def replay(self, x: Tensor) -> Tensor:
        stream = torch.cuda.current_stream(x.device)
        stream.wait_event(self._done)  # the last replay, if it was on another stream
        self.input.copy_(x)
        self._graph.replay()
        y = self._output.clone()
        self._done.record(stream)
        return y

    def release(self) -> None:
        """Waits for the last replay: its memory, packed weights too, may be another tensor's from here on."""
        self._done.synchronize()


class _Watched:
    """Tells whether a module, its parts, parameters or buffers have changed; every replay asks, so it is cheap."""

    def __init__(self, model: nn.Module) -> None:
        modules = list(model.modules())
        # the dictionaries themselves: going through a network's modules takes longer than a replay of its graph
        self._parts = [m._modules for m in modules]
        self._tensors = [d for m in modules for d in (m._parameters, m._buffers)]
        self._normalising = [m for m in modules if hasattr(m, "clip_mean")]
        self._were = self._now_parts()

    def _now_parts(self) -> list[Any]:
        return [list(d.values()) for d in self._parts]

    def version(self) -> Any:
        """Something that differs after a change; None where other modules are part of it now."""
        if self._now_parts() != self._were:
            return None
        tensors = [t for d in self._tensors for t in d.values() if t is not None]
        try:
            versions = [t._version for t in tensors]
        except RuntimeError:  # made in inference mode, where nothing is counted
            versions = [0 if t.is_inference() else t._version for t in tensors]
        clips = [(m.clip_mean, m.clip_std) for m in self._normalising]
        return [t.data_ptr() for t in tensors], versions, clips


def _require_cuda(example: Tensor) -> None:
    if not example.is_cuda:
        raise ValueError(
            f"example: expected a tensor on a CUDA device, where graphs are, got one on {example.device}"
        )


class GraphedModel:
    """Calls `model` through CUDA graphs, one for every input shape, dtype and layout that comes.

    Graphs are captured at the first call with a shape (and with torch's and our switches as they are), kept for the
    `max_shapes` used last, and captured again after a parameter or buffer of the model has changed. Safe to call from
    several threads and streams. The answer is a tensor of its own. No gradient flows.

    Args:
        model: in evaluation mode, on a CUDA device; its forward takes and returns one tensor.
        example: an input; its shape is captured at once.
        max_shapes: graphs kept, each with its own activations' memory.

    Raises:
        TypeError: where model is no module, or takes or returns something other than a tensor.
        ValueError: for a CPU example, a model in training mode, max_shapes below 1.
    """

    def __init__(self, model: nn.Module, example: Tensor, *, max_shapes: int = 4) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
        if not isinstance(example, Tensor):
            raise TypeError(f"example: expected a tensor, got {type(example).__name__}")
        if not isinstance(max_shapes, int) or isinstance(max_shapes, bool) or max_shapes < 1:
            raise ValueError(f"max_shapes: expected an integer >= 1, got {max_shapes!r}")
        _require_cuda(example)
        self.model = model
        self.max_shapes = max_shapes
        self._watched = _Watched(model)
        self._graphs: OrderedDict[Any, _Captured] = OrderedDict()
        self._version: Any = None
        self._lock = threading.Lock()
        self(example)

    def _parameters_version(self) -> Any:
        version = self._watched.version()
        if version is None:
            self._watched = _Watched(self.model)
            version = self._watched.version()
            self._version = None  # equal tensors in other modules
        return version

    def __call__(self, x: Tensor) -> Tensor:
        if not isinstance(x, Tensor):
            raise TypeError(f"x: expected a tensor, got {type(x).__name__}")
        _require_cuda(x)
        if self.model.training:
            raise ValueError("model: expected evaluation mode, got training mode: call model.eval() first")
        autocast = torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda")
        settings = (backends.current_backend(), backends.fp32_mode(), backends.tf32_allowed(), autocast)
        key = (x.shape, x.dtype, x.device, x.stride(), settings)
        # Buffers made in inference mode could not be written outside of it.
        with self._lock, torch.inference_mode(False), torch.no_grad():
            version = self._parameters_version()
            if version != self._version:
                self._keep(0)
                self._version = version
            captured = self._graphs.get(key)
            if captured is None:
                self._keep(self.max_shapes - 1)
                captured = self._graphs[key] = _Captured(self.model, x)
            self._graphs.move_to_end(key)
            return captured.replay(x)

    def _keep(self, most: int) -> None:
        """Drops the graphs used longest ago until so many are left."""
        while len(self._graphs) > most:
            _, oldest = self._graphs.popitem(last=False)
            oldest.release()

    def __repr__(self) -> str:
        shapes = [list(key[0]) for key in self._graphs]
        return f"GraphedModel({type(self.model).__name__}, shapes={shapes}, max_shapes={self.max_shapes})"


def graphed(model: nn.Module, example: Tensor, *, max_shapes: int = 4) -> GraphedModel:
    """`model` as a callable that replays CUDA graphs; see `GraphedModel`."""
    return GraphedModel(model, example, max_shapes=max_shapes)
