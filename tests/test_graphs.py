"""Whole passes as CUDA graphs, without a GPU: what is refused, which graphs are kept, when they are made again."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import r3d_kernels as r3d
from r3d_kernels import graphs
from r3d_kernels._layer import layer_packs, state_of


class Recorded:
    """Stands in for a captured graph: replays into one buffer, as the real one does."""

    made = released = 0

    def __init__(self, model: nn.Module, example: torch.Tensor) -> None:
        Recorded.made += 1
        self.model = copy.deepcopy(model)  # a graph sees the weights' values at its capture

    def replay(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x)

    def release(self) -> None:
        Recorded.released += 1


@pytest.fixture
def recorded(monkeypatch):
    monkeypatch.setattr(graphs, "_Captured", Recorded)
    monkeypatch.setattr(graphs, "_require_cuda", lambda example: None)
    monkeypatch.setattr(Recorded, "made", 0)
    monkeypatch.setattr(Recorded, "released", 0)
    return Recorded


def layer() -> nn.Module:
    return nn.Sequential(nn.Conv3d(3, 4, 1), nn.BatchNorm3d(4)).eval()


def clip(n: int = 1) -> torch.Tensor:
    return torch.randn(n, 3, 2, 4, 4)


@pytest.mark.parametrize("make", [lambda m, x: m.graphed(x), graphs.graphed], ids=["method", "function"])
def test_a_cpu_is_refused_by_name(make):
    model = r3d.ResNet3D(5, depth=10).eval()
    with pytest.raises(ValueError, match=r"example: expected a tensor on a CUDA device.*got one on cpu"):
        make(model, torch.randn(1, 3, 8, 32, 32))


def test_wrong_arguments(recorded):
    with pytest.raises(TypeError, match=r"model: expected an nn.Module, got function"):
        graphs.graphed(clip, clip())
    with pytest.raises(TypeError, match="example: expected a tensor, got list"):
        graphs.graphed(layer(), [1])
    for wrong in (0, True, 2.0):
        with pytest.raises(ValueError, match="max_shapes: expected an integer >= 1"):
            graphs.graphed(layer(), clip(), max_shapes=wrong)
    with pytest.raises(ValueError, match="expected evaluation mode"):
        graphs.graphed(layer().train(), clip())
    with pytest.raises(TypeError, match="x: expected a tensor"):
        graphs.graphed(layer(), clip())(None)
    assert recorded.made == 1


def test_one_graph_for_each_shape_dtype_and_layout(recorded):
    model = layer()
    call = graphs.graphed(model, clip())
    inputs = [clip(), clip(2), clip().contiguous(memory_format=torch.channels_last_3d)]
    with torch.no_grad():
        for _ in range(2):
            for x in inputs:
                assert torch.equal(call(x), model(x))
    assert recorded.made == 3
    assert not call(clip()).requires_grad
    assert "max_shapes=4" in repr(call)


def test_the_shapes_used_last_are_kept(recorded):
    call = graphs.graphed(layer(), clip(1), max_shapes=2)
    for n in (2, 1, 3, 1):  # 2 is the oldest when 3 comes
        call(clip(n))
    assert recorded.made == 3
    assert recorded.released == 1
    call(clip(2))
    assert recorded.made == 4
    assert recorded.released == 2  # a graph that is dropped may still run
    assert len(call._graphs) == 2


def test_switches_make_graphs_of_their_own(recorded):
    call, x = graphs.graphed(layer(), clip()), clip()
    with r3d.backend("torch"):
        call(x)
    assert recorded.made == 2
    with torch.inference_mode():
        y = call(x)
    assert recorded.made == 2
    assert not y.is_inference()


@pytest.mark.parametrize(
    "change", ["weight", "statistic", "move", "parameter", "module", "new module", "buffer"]
)
def test_changed_parameters_are_captured_again(recorded, change):
    model = layer()
    call = graphs.graphed(model, clip())
    x, before = clip(), recorded.made
    with torch.no_grad():
        if change == "weight":
            model[0].weight.mul_(2)
        elif change == "statistic":
            model[1].running_mean.add_(1)
        elif change == "move":
            model[0].weight.data = model[0].weight.data * 3
        elif change == "parameter":
            model[0].weight = nn.Parameter(model[0].weight * 3)
        elif change == "module":
            model[0] = nn.Conv3d(3, 4, 1)
        elif change == "new module":
            model.append(nn.ReLU())
        else:
            model[1].running_mean = torch.ones(4)
        assert torch.equal(call(x), model(x))
        assert torch.equal(call(x), model(x))
    assert recorded.made == before + 1
    assert recorded.released == 1


def test_a_model_of_inference_tensors(recorded):
    with torch.inference_mode():
        model = layer()
    call, x = graphs.graphed(model, clip()), clip()
    with torch.no_grad():
        assert torch.equal(call(x), model(x))
        assert recorded.made == 1
        model[0].weight = nn.Parameter(torch.ones(4, 3, 1, 1, 1))
        assert torch.equal(call(x), model(x))
    assert recorded.made == 2


def test_the_packs_of_a_layer_can_be_held(monkeypatch):
    fused = r3d.ConvBNAct3d(3, 4, 1).eval()
    assert layer_packs(fused.conv) == []
    with torch.inference_mode():
        fused(clip())
    (pack,) = layer_packs(fused.conv)
    state_of(fused.conv).forget()
    assert pack is not None
    assert layer_packs(fused.conv) == []
