"""CUDA graphs without a GPU: what is recorded and replayed, with CUDA's part played by a second run over the inputs."""

from contextlib import contextmanager
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch

from model import load_model
from runtime.graphs import GraphedModel

FIXTURES = Path(__file__).parents[1] / "fixtures"


def test_graphed_model_is_the_model_away_from_cuda():
    class Model:
        mask_id = 7

        def hidden(self, ids, attention_mask=None):
            return ids * 2

        def forward(self, ids, attention_mask=None):
            return self.hidden(ids, attention_mask) + 1

    graphed = GraphedModel(Model())
    assert graphed.mask_id == 7
    assert graphed(torch.tensor([3])).item() == 7


class PretendsCuda(torch.Tensor):
    is_cuda = True


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_graph_replays_from_its_own_inputs(family, monkeypatch):
    """Recording and replaying, CUDA's part played by a second run over the recorded inputs: every kind of mask, new
    values in old shapes, and each shape recorded once as long as it stays."""
    model = load_model(FIXTURES / family, device="cpu").requires_grad_(False)
    graphed, recorded = GraphedModel(model), []

    class Graph:
        def __init__(self):
            recorded.append([tuple(t.shape) for t in graphed.inputs])

        def replay(self):
            graphed.output.copy_(graphed._hidden())

    for name in ("Stream", "current_stream", "stream", "graph", "device"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: MagicMock())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    g = torch.Generator().manual_seed(0)
    left, hole = torch.ones(2, 9, dtype=torch.long), torch.ones(2, 9, dtype=torch.long)
    left[0, :3], hole[1, 4] = 0, 0
    for mask in (None, torch.ones_like(left), left, hole, left.bool(), None):
        ids = torch.randint(0, model.mask_id + 1, (2, 9), generator=g)
        got = graphed(ids.as_subclass(PretendsCuda), mask).as_subclass(torch.Tensor)
        assert torch.equal(got, model(ids, mask))
    assert [len(shapes) for shapes in recorded] == [1, 4, 1]
    graphed(torch.zeros(1, 5, dtype=torch.long).as_subclass(PretendsCuda))
    assert recorded[-1] == [(1, 5)]


def test_a_step_that_cannot_be_recorded_runs_without_a_graph(monkeypatch):
    model = load_model(FIXTURES / "llada", device="cpu").requires_grad_(False)
    for name in ("Stream", "current_stream", "stream", "CUDAGraph", "device"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: MagicMock())

    def refuse(_):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    restored = []
    monkeypatch.setattr(torch.cuda, "graph", refuse)
    monkeypatch.setattr(torch.cuda, "set_stream", restored.append)
    graphed, ids = GraphedModel(model), torch.zeros(1, 5, dtype=torch.long)
    with pytest.warns(UserWarning, match=r"as a CUDA graph \(operation not permitted when stream is capturing\)"):
        got = graphed(ids.as_subclass(PretendsCuda)).as_subclass(torch.Tensor)
    assert torch.equal(got, model(ids))
    assert len(restored) == 1
    assert torch.equal(graphed(ids.as_subclass(PretendsCuda)).as_subclass(torch.Tensor), model(ids))  # said once


def test_a_graph_is_recorded_and_replayed_on_the_device_of_its_model(monkeypatch):
    """Which need not be the current one: streams, graphs and launches belong to the current device."""
    model = load_model(FIXTURES / "llada", device="cpu").requires_grad_(False)
    graphed, current, done = GraphedModel(model), ["cuda:0"], []

    @contextmanager
    def device(of):
        before, current[0] = current[0], of
        yield
        current[0] = before

    class Graph:
        def __init__(self):
            done.append(("recorded", current[0]))

        def replay(self):
            done.append(("replayed", current[0]))

    for name in ("Stream", "current_stream", "stream", "graph"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: MagicMock())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "device", device)
    ids = torch.zeros(1, 5, dtype=torch.long).as_subclass(PretendsCuda)
    graphed.hidden(ids)
    assert done == [("recorded", ids.device), ("replayed", ids.device)]
    assert current == ["cuda:0"]
