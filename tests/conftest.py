"""Shared settings: deterministic hypothesis, few threads, and a stand-in for `torch._int_mm` as strict as Hopper's."""

import os

import pytest
import torch
from hypothesis import settings

settings.register_profile("default", derandomize=True, deadline=None, max_examples=25)
settings.register_profile("thorough", parent=settings.get_profile("default"), max_examples=500)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))
torch.set_num_threads(min(2, torch.get_num_threads()))


def checked_int_mm(a, b):
    """`torch._int_mm` that refuses what Hopper refuses or silently gets wrong, and is exact for the rest."""
    assert a.ndim == b.ndim == 2, "operands must be matrices"
    assert a.dtype == b.dtype == torch.int8, "operands must be int8"
    (M, K), N = a.shape, b.shape[1]
    assert b.shape[0] == K, "inner dimensions differ"
    assert M > 0 and M % 32 == 0, f"M = {M} is not a multiple of 32"
    assert K > 0 and K % 8 == 0, f"K = {K} is not a multiple of 8"
    assert N > 0 and N % 8 == 0, f"N = {N} is not a multiple of 8"
    assert 0 not in a.stride() + b.stride(), "stride 0"
    assert a.stride(1) == 1 and a.stride(0) >= K, f"A is not row-major: strides {a.stride()}"
    assert b.stride(0) == 1 and b.stride(1) >= K, f"B is not column-major: strides {b.stride()}"
    return (a.long() @ b.long()).to(torch.int32)


@pytest.fixture(scope="module")
def strict_int_mm():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "_int_mm", checked_int_mm)
        yield
