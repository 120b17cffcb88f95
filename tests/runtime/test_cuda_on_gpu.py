"""The kernels on a GPU: the assertions of `kernel_checks.py`, away from the stand-ins that serve there."""

import pytest
import torch
from kernel_checks import (
    DTYPES,
    check_feedback,
    check_linear,
    check_nan,
    check_packed,
    check_plus,
    check_tac,
    layer,
)
from references import fake_quantized

import kernels
from runtime import cuda

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


@pytest.fixture(autouse=True)
def nothing_is_refused():
    """The exact fallback would give the same integers."""
    yield
    refused = set(kernels._REFUSED)
    kernels._REFUSED.clear()  # the next test is judged by itself
    assert not refused


@pytest.mark.parametrize("part", cuda.PARTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_kernels_are_in_use(dtype, part):
    assert cuda.ready(torch.cuda.current_device(), dtype, part)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("M", "K", "N"), [(1, 64, 48), (33, 1056, 96), (128, 4096, 12288), (1000, 4096, 4096)])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("masked", [None, True, False])
def test_linear(dtype, M, K, N, packed, masked):
    check_linear("cuda", 0, M, K, N, dtype, 4, packed, masked, masked is None, True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("clipped", [True, False])
def test_feedback(dtype, clipped):
    check_feedback("cuda", 0, 1000, 64, dtype, 4, clipped)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("M", "K", "N"), [(1, 128, 32), (33, 1152, 96), (128, 4096, 12288), (256, 18944, 3584)])
@pytest.mark.parametrize("asymmetric", [True, False])
def test_packed_product(dtype, M, K, N, asymmetric):
    check_packed("cuda", 0, M, K, N, dtype, 4, asymmetric, True, True)
    check_packed("cuda", 0, M, K, N, dtype, 8, asymmetric, False, False, extreme=True)


@pytest.mark.parametrize("M", [32, 256])
def test_the_faster_product_is_chosen_and_kept(M, monkeypatch):
    monkeypatch.setattr(cuda, "_FASTEST", {})
    check_linear("cuda", 0, M, 4096, 4096, torch.bfloat16, 4, True, None, False, True)
    (choice,) = cuda._FASTEST.items()
    check_linear("cuda", 0, M, 4096, 4096, torch.bfloat16, 4, True, None, False, True)
    assert list(cuda._FASTEST.items()) == [choice]
    check_linear("cuda", 0, M, 4096, 4096, torch.bfloat16, 4, False, None, False, True)  # int8: one way


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_stays_nan_in_its_token(dtype):
    check_nan("cuda", dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_tac(dtype):
    check_tac("cuda", dtype, 1030, 256)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("masked", [None, True, False])
def test_starquant_plus_layer(dtype, masked):
    check_plus("cuda", dtype, masked)


def test_layer_equals_its_fake_quantized_reference():
    linear = layer().cuda()
    x, state = torch.randn(2, 50, 64, device="cuda"), torch.rand(2, 50, device="cuda") < 0.5
    assert torch.allclose(linear(x, state), fake_quantized(linear, x, state), rtol=1e-4, atol=1e-4)
