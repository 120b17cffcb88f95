"""The products of INT4 weights without a GPU: their kernels run one instruction at a time, and which of them serves."""

import pytest
import torch

from runtime import cuda


class TestFastest:
    @pytest.fixture(autouse=True)
    def timed(self, monkeypatch):
        monkeypatch.setattr(cuda, "_FASTEST", {})
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        monkeypatch.setattr(cuda, "_gpu_seconds", lambda way, device: self.timings.append(way) or way())
        self.timings = []

    def test_the_fastest_one_is_kept_for_its_shape(self):
        calls, key = {"a": lambda: 2.0, "b": lambda: 1.0}, ("cuda", torch.float32, 32, 96, 128, True)
        assert cuda.fastest(calls, key) == "b"
        assert self.timings == list(calls.values())
        assert cuda.fastest(calls, key) == "b"
        assert len(self.timings) == 2
        later = {"a": lambda: 1.0, "b": lambda: 2.0}
        assert cuda.fastest(later, (*key[:2], 64, *key[3:])) == "a"
        assert cuda.fastest(later, key) == "b"  # as its shape was
        assert cuda.chosen() == {"32 x 128 -> 96, packed": "b", "64 x 128 -> 96, packed": "a"}

    def test_one_way_needs_no_clock(self):
        assert cuda.fastest({"only": object()}, "key") == "only"
        assert not self.timings

    def test_nothing_is_timed_while_a_graph_is_recorded(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert cuda.fastest({"a": lambda: 1.0, "b": lambda: 2.0}, ("cuda",)) == "b"  # the one that always serves
        assert not self.timings
        assert not cuda._FASTEST  # and nothing is kept that was not timed

    def test_a_way_without_memory_is_not_taken(self):
        def fails():
            raise torch.OutOfMemoryError

        assert cuda.fastest({"a": fails, "b": lambda: 2.0}, ("cuda", 1)) == "b"
        assert cuda.fastest({"a": lambda: 2.0, "b": fails}, ("cuda", 2)) == "a"
        assert cuda.fastest({"a": fails, "b": fails}, ("cuda", 3)) == "b"


def test_the_packed_product_is_for_few_tokens_whole_chunks_and_gpus(monkeypatch):
    class Rows:
        dtype = torch.bfloat16

        def __init__(self, M, K, is_cuda=True):
            self.shape, self.is_cuda, self.device = (M, K), is_cuda, torch.device("cuda", 0)

    asked = []
    monkeypatch.setattr(cuda, "ready", lambda index, dtype, part: asked.append((index, dtype, part)) or True)
    assert cuda.few(Rows(cuda.FEW, 4096), 4096)
    assert asked == [(0, torch.bfloat16, "packed")]
    for rows, N in ((Rows(cuda.FEW + 1, 4096), 4096), (Rows(32, 4160), 4096), (Rows(32, 4096), 4112),
                    (Rows(32, 4096, False), 4096)):
        assert not cuda.few(rows, N)
    assert len(asked) == 1  # nothing is compiled that cannot serve
    monkeypatch.setattr(cuda, "ready", lambda *_: False)
    assert not cuda.few(Rows(32, 4096), 4096)
