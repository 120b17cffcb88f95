"""GPTQ against the optimal brain update that it stands for, and the search for scales against trying every one."""

import itertools

import pytest
import torch
from arguments import generator, linear_inputs
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_cpu import compiled

from methods import QuantConfig
from methods.gptq import (
    damped,
    fit_gptq,
    gptq,
    hessian,
    output_error,
    round_columns,
    rounding_losses,
    shrunk_scale,
    turned,
)
from runtime import cpu
from starquant import fake_quantize, quant_params


class TestGPTQ:
    @given(st.integers(0, 10**6), st.sampled_from([2, 3, 4, 8]))
    def test_equals_the_optimal_brain_update(self, seed, bits):
        """One column at a time: round it, move the open ones by −err / [H⁻¹]_ii · [H⁻¹]_i: with the inverse of what is
        left of H recomputed from scratch each time."""
        g = generator(seed)
        x, W = torch.randn(40, 7, generator=g).double(), torch.randn(3, 7, generator=g).double()
        H = hessian(x)
        codes, scale = gptq(W, H.clone(), bits, damping=0.01, block=3)
        s, want, open_H = quant_params(W, bits, symmetric=True)[0], W.clone(), damped(H, 0.01)
        for i in range(7):
            inverse = torch.linalg.inv(open_H[i:, i:])
            q = s[:, 0] * round_columns(want[:, i : i + 1], s, bits)[:, 0]
            want[:, i:] -= ((want[:, i] - q) / inverse[0, 0])[:, None] * inverse[0]
            assert torch.allclose(want[:, i], q, atol=1e-9)
        assert torch.allclose(scale[:, None].double() * codes, want, atol=1e-5)

    @pytest.mark.parametrize("bits", [3, 4])
    def test_beats_rounding_in_its_own_norm(self, bits):
        weight, inputs = linear_inputs(d=48, C=64)
        H = hessian(inputs.x.flatten(0, 1))
        codes, scale = gptq(weight, H.clone(), bits)
        error = output_error(scale[:, None] * codes - weight.double(), H).sum()
        nearest = output_error((fake_quantize(weight, bits, symmetric=True) - weight).double(), H).sum()
        assert error < 0.8 * nearest

    def test_diagonal_hessian_is_rounding_to_nearest(self):
        weight, _ = linear_inputs()
        codes, scale = gptq(weight, torch.diag(torch.rand(32, generator=generator()) + 0.1), 4)
        assert torch.allclose(scale[:, None] * codes, fake_quantize(weight, 4, symmetric=True), atol=1e-6)

    @pytest.mark.parametrize("block", [1, 5, 128])
    def test_blocks_do_not_change_the_result(self, block):
        weight, inputs = linear_inputs()
        H = hessian(inputs.x.flatten(0, 1))
        assert torch.equal(gptq(weight, H.clone(), 4, block=block)[0], gptq(weight, H, 4, block=32)[0])

    @given(st.integers(1, 9), st.integers(1, 4))
    def test_a_matrix_is_turned_in_its_place(self, d, at_once):
        A = torch.randn(2, d, d, generator=generator())
        want = A.flip(-2, -1)
        for matrix in (A.clone(), A.clone().mT.contiguous().mT):  # by rows and, as Cholesky factors are, by columns
            assert torch.equal(turned(matrix, at_once), want)
            assert torch.equal(matrix, want)

    def test_inputs_that_never_occur_are_dropped(self):
        weight, inputs = linear_inputs()
        x = inputs.x.flatten(0, 1).clone()
        x[:, 5] = 0
        assert not gptq(weight, hessian(x), 4)[0][:, 5].any()


@pytest.fixture(params=[pytest.param(True, marks=compiled, id="compiled"), pytest.param(False, id="readable")])
def way(request, monkeypatch):
    """The function of cpu_kernels.c, where there is one, and the readable one."""
    library = cpu.load() if request.param else None
    monkeypatch.setattr(cpu, "compiled", lambda: library)


@pytest.mark.usefixtures("way")
class TestScales:
    @given(st.integers(0, 10**6), st.integers(1, 5), st.integers(1, 70), st.sampled_from([2, 3, 4, 8]),
           st.floats(1e-6, 1e6))
    @settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
    def test_losses_are_those_of_their_formula(self, seed, C, d, bits, size):
        weight = size * torch.randn(C, d, generator=generator(seed))
        weight[0, : d // 2] = 0
        scales = quant_params(weight, bits, symmetric=True)[0] * torch.tensor([1.0, 0.71, 0.05])
        losses = rounding_losses(weight, scales, bits)
        for c, i in itertools.product(range(C), range(3)):
            error = scales[c, i] * round_columns(weight[c], scales[c, i], bits) - weight[c]
            assert float(losses[c, i]) == pytest.approx(float(error.double().abs().pow(2.4).sum()), rel=2e-5, abs=1e-36)

    def test_a_fit_takes_the_scales_that_it_searched(self):
        weight, inputs = linear_inputs()
        fitted, _ = fit_gptq(weight, None, inputs, QuantConfig("quarot"), generator(), None, search=True)
        assert torch.equal(fitted.weight_scale, shrunk_scale(weight, 4)[:, 0])

    def test_scales_of_another_form_are_the_same_numbers(self):
        weight, scales = torch.randn(3, 8, generator=generator()), torch.rand(2, 3, generator=generator()).add(0.1).T
        losses = rounding_losses(weight, scales.contiguous(), 4)
        assert torch.equal(rounding_losses(weight, scales, 4), losses)
        assert torch.allclose(rounding_losses(weight, scales.double(), 4), losses)
        assert torch.equal(rounding_losses(weight, scales[:1], 4)[0], losses[0])  # one row of them serves all rows

    @pytest.mark.parametrize("rows", [1, 5, 24])
    def test_rows_are_taken_in_parts(self, rows, monkeypatch):
        weight, inputs = linear_inputs()
        for H in (None, hessian(inputs.x.flatten(0, 1)).float()):
            whole = shrunk_scale(weight, 3, H)
            with monkeypatch.context() as patch:
                patch.setattr("methods.gptq.SEARCHED", rows * weight.shape[1])
                assert torch.equal(shrunk_scale(weight, 3, H), whole)

    def test_scale_search_finds_the_best_of_its_grid(self):
        weight, inputs = linear_inputs()
        H, grid = hessian(inputs.x.flatten(0, 1)), (1.0, 0.9, 0.8)
        for moment in (None, H):
            found, full = shrunk_scale(weight.double(), 3, moment, grid), quant_params(weight.double(), 3, True)[0]

            def loss(scale, moment=moment):
                error = scale * round_columns(weight.double(), scale, 3) - weight
                return error.abs().pow(2.4).sum(-1) if moment is None else output_error(error, moment)

            best = torch.stack([loss(f * full) for f in grid]).amin(0)
            assert torch.allclose(loss(found), best)
            assert (best < loss(full)).any()
        found = shrunk_scale(weight, 3) / quant_params(weight, 3, True)[0]
        assert 0.2 < float(found.min()) < float(found.max()) <= 1  # GPTQ's own grid shrinks
