"""Which product serves: `torch._int_mm` where it is exact and, on a CPU, faster; the exact fallback elsewhere."""

import warnings
from functools import partial

import pytest
import torch
from conftest import checked_int_mm
from test_kernels import integers

import kernels

pytestmark = pytest.mark.usefixtures("strict_int_mm")


def faulty_int_mm(fault: str, a, b):
    """`torch._int_mm` as a device may get it wrong."""
    if fault == "refused":
        raise RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED")
    if fault == "lost":
        raise RuntimeError("CUDA error: launch failure")
    if fault == "transposed layout":
        return (a.long() @ b.t().reshape(b.shape).long()).to(torch.int32)
    exact = checked_int_mm(a, b)
    if fault == "saturates":
        return exact.clamp(-(2**15), 2**15 - 1)
    if fault == "wrong in large shapes":
        return exact + (a.shape[1] >= 512)
    assert fault == "wrong"
    exact[32:] = 0  # only rows beyond the first tile
    return exact


class TestBackend:
    @pytest.fixture(autouse=True)
    def fresh(self):
        kernels.backend.cache_clear()
        yield
        kernels.backend.cache_clear()

    @pytest.mark.parametrize("vnni", [True, False])
    def test_a_cpu_takes_the_product_that_its_instructions_make_fast(self, monkeypatch, vnni):
        """The one with int8 dot products `_int_mm`, the one without them fp32."""
        monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: vnni)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert kernels.backend("cpu") == ("int_mm" if vnni else "float")

    @pytest.mark.parametrize("fault", ["saturates", "wrong in large shapes", "refused"])
    def test_a_cpu_whose_product_fails_its_self_check_takes_the_float_route(self, monkeypatch, fault):
        """int8 dot products of the first kind saturate at 16 bit: right for 4-bit codes and wrong for 8-bit ones."""
        monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: True)
        monkeypatch.setattr(torch, "_int_mm", partial(faulty_int_mm, fault))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert kernels.backend("cpu") == "float"

    def test_a_device_that_passes_its_self_check_takes_int_mm(self):
        assert kernels.backend("cpu:0") == "int_mm"

    @pytest.mark.parametrize(("fault", "said"), [
        ("wrong", "gives wrong numbers for 33 x 24 times 24 x 40"), ("transposed layout", "gives wrong numbers for 33"),
        ("refused", "refuses every shape of its self-check"), ("lost", "fails .CUDA error: launch failure")])
    def test_a_device_that_fails_it_falls_back_with_one_warning(self, monkeypatch, fault, said):
        monkeypatch.setattr(torch, "_int_mm", partial(faulty_int_mm, fault))
        with pytest.warns(UserWarning, match=f"_int_mm {said}.* on cpu:0") as caught:
            assert kernels.backend("cpu:0") == "float"
        assert len(caught) == 1
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert kernels.backend("cpu:0") == "float"

    def test_an_error_that_ends_the_context_ends_the_run(self, monkeypatch):
        """Plain PyTorch could not go on; a failure that left the context alive is replaced."""
        def dead(*_):
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

        monkeypatch.setattr(kernels, "int_mm", dead)
        monkeypatch.setattr(torch.Tensor, "to", lambda self, *_: self)
        monkeypatch.setattr(torch.cuda, "synchronize", dead)
        with pytest.raises(RuntimeError, match="illegal memory access"):
            kernels.backend("cuda")
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
        with pytest.warns(UserWarning, match="fails .CUDA error: an illegal memory access.* on cuda"):
            assert kernels.backend("cuda") == "float"

    @pytest.mark.parametrize("refused", [32, 64, 288])
    @pytest.mark.parametrize("words", ["CUBLAS_STATUS_NOT_SUPPORTED", "mat2.size(1) needs to be greater than 0"])
    def test_a_refused_shape_of_the_self_check_does_not_switch_the_others_off(self, monkeypatch, refused, words):
        def choosy(a, b):
            if len(a) == refused:
                raise RuntimeError(words)
            return checked_int_mm(a, b)

        monkeypatch.setattr(torch, "_int_mm", choosy)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert kernels.backend("cpu:0") == "int_mm"

    def test_a_refused_shape_does_not_hide_a_wrong_one(self, monkeypatch):
        def faulty(a, b):
            if len(a) == 64 and a.shape[1] < 512:
                raise RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED")
            return checked_int_mm(a, b) + (a.shape[1] >= 512)

        monkeypatch.setattr(torch, "_int_mm", faulty)
        with pytest.warns(UserWarning, match="wrong numbers for 64 x 512"):
            assert kernels.backend("cpu:0") == "float"

    def test_a_shape_that_is_refused_later_falls_back_with_one_warning(self, monkeypatch):
        def choosy(a, b):
            if b.shape[1] == 48:
                raise RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED when calling cublasLtMatmul\nand more")
            return checked_int_mm(a, b)

        monkeypatch.setattr(torch, "_int_mm", choosy)
        monkeypatch.setattr(kernels, "backend", lambda device: "int_mm")
        monkeypatch.setattr(kernels, "_REFUSED", set())
        # the fallback, marked
        monkeypatch.setattr(kernels, "float_mm", lambda a, w, largest: a.long() @ w.long().t() + 1000)
        a, served, refused = integers(-8, 7, 5, 32), integers(-8, 7, 16, 32), integers(-8, 7, 48, 32)
        assert torch.equal(kernels.int_matmul(a, served).long(), a.long() @ served.long().t())
        want = a.long() @ refused.long().t() + 1000
        with pytest.warns(UserWarning, match=r"refuses 5 x 32 times 32 x 48 \(CUBLAS_STATUS_NOT_SUPPORTED [^\n]*\)"):
            assert torch.equal(kernels.int_matmul(a, refused), want)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert torch.equal(kernels.int_matmul(a, refused), want)
            assert torch.equal(kernels.int_matmul(a, served).long(), a.long() @ served.long().t())

    @pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"),
                                       RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"),
                                       RuntimeError("Expected all tensors to be on the same device, but found two"),
                                       RuntimeError("operation not permitted when stream is capturing")])
    def test_what_may_pass_is_not_a_refusal(self, monkeypatch, error):
        def hungry(a, b):
            raise error

        monkeypatch.setattr(torch, "_int_mm", hungry)
        monkeypatch.setattr(kernels, "backend", lambda device: "int_mm")
        monkeypatch.setattr(kernels, "_REFUSED", set())
        with pytest.raises(type(error), match=str(error)):
            kernels.int_matmul(integers(-8, 7, 5, 32), integers(-8, 7, 16, 32))
        assert not kernels._REFUSED

    def test_int_matmul_asks_the_backend(self, monkeypatch):
        a, w = integers(-8, 7, 3, 9), integers(-8, 7, 5, 9, seed=1)
        for name in ("int_mm", "float_mm"):
            monkeypatch.setattr(kernels, name, lambda *args, name=name, **kwargs: name)
        for chosen in ("int_mm", "float"):
            monkeypatch.setattr(kernels, "backend", lambda device, chosen=chosen: chosen)
            assert kernels.int_matmul(a, w) == {"int_mm": "int_mm", "float": "float_mm"}[chosen]
