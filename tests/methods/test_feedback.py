"""Rounding by feedback: its matrix by the least-squares problem behind it, its codes by a loop over one token, its gain
against rounding to nearest."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from references import diagonal_blocks, fake_quantized

from methods.flat import clip_range
from methods.gptq import damped, hessian
from methods.plus import feedback_matrix, inverse_factor, rounding_order
from runtime import cpu
from runtime.layers import Grid, QuantLinear, Weight
from starquant import fake_quantize, quant_params


def correlated(n, d, seed=0, decay=3.0):
    """Rows (n, d) whose second moment has a spectrum from e^−decay to e^decay, in a random basis; float64."""
    g = torch.Generator().manual_seed(seed)
    Q = torch.linalg.qr(torch.randn(d, d, generator=g, dtype=torch.float64))[0]
    scales = torch.linspace(-decay / 2, decay / 2, d, dtype=torch.float64).exp()
    return (torch.randn(n, d, generator=g, dtype=torch.float64) * scales) @ Q.mT


def error(x, x_hat, weight):
    """‖(x̂ − x) Wᵀ‖² a token."""
    return ((x_hat - x).double() @ weight.double().mT).square().sum(-1)


def test_moments_of_blocks_are_the_diagonal_blocks_of_the_whole_moment():
    x, weights = correlated(50, 12).float(), torch.rand(50)
    whole = hessian(x, weights, at_once=16)
    for size in (2, 3, 12):
        torch.testing.assert_close(hessian(x, weights, at_once=16, block=size), diagonal_blocks(whole, size), rtol=1e-5,
                                   atol=1e-5)


class TestMatrix:
    @given(st.integers(0, 10**6), st.sampled_from([2, 5, 8]), st.integers(1, 3))
    def test_each_row_is_the_least_squares_answer_to_an_error(self, seed, b, blocks):
        """With x̂_i − x_i = −e_i, the changes of the open channels that minimize ‖(−e_i, δ) Ŵᵀ‖² are −e_i V_ij."""
        weight = correlated(3 * b, b * blocks, seed)
        V = feedback_matrix(weight, b)
        moment = weight.mT @ weight
        for n in range(blocks):
            M = damped(moment[n * b : (n + 1) * b, n * b : (n + 1) * b].clone(), 0.01)
            for i in range(b - 1):
                # −e_i M_io + δ M_oo = 0
                want = -torch.linalg.solve(M[i + 1 :, i + 1 :], M[i + 1 :, i])
                torch.testing.assert_close(V[n, i, i + 1 :].double(), want, rtol=2**-8, atol=1e-9)
            assert V[n].tril().abs().max() == 0

    def test_orthogonal_channels_have_nothing_to_give(self):
        assert feedback_matrix(torch.eye(8).repeat(3, 1), 4).abs().max() == 0

    def test_a_channel_that_no_weight_reads(self):
        weight = correlated(16, 8)
        weight[:, 3] = 0
        V = feedback_matrix(weight, 8)
        assert V.isfinite().all()
        assert V[0, 3].abs().max() == V[0, :, 3].abs().max() == 0
        assert feedback_matrix(torch.zeros(4, 8), 8).abs().max() == 0

    def test_fine_steps_cost_what_the_factor_says(self):
        """s² / 12 Σ_i 1 / U_ii² a token, of M, up to its damping and V's precision."""
        weight, x = correlated(64, 16, 1, decay=2), torch.randn(4096, 16, dtype=torch.float64)
        V = feedback_matrix(weight, 16, damping=1e-9)
        codes, scale, zero = cpu.token_codes(x, 8, None, V)
        x_hat = scale * (codes - zero)
        U = inverse_factor(weight.mT @ weight, 1e-9)
        predicted = scale.square().mean() / 12 * U.diagonal().pow(-2).sum()
        measured = error(x.float(), x_hat, weight).mean()
        assert float(measured) == pytest.approx(float(predicted), rel=0.1)
        assert measured < 0.7 * error(x, fake_quantize(x.float(), 8), weight).mean()


class TestOrder:
    @given(st.integers(0, 10**6), st.integers(2, 12))
    def test_every_channel_has_the_least_variance_given_those_behind_it(self, seed, b):
        X = correlated(4 * b, b, seed)
        M = X.mT @ X
        order = rounding_order(M).tolist()
        assert sorted(order) == list(range(b))

        def conditional(i, behind):
            explained = M[i, behind] @ torch.linalg.solve(M[behind][:, behind], M[behind, i]) if behind else 0
            return float(M[i, i] - explained)

        for k in range(b):
            behind = order[b - k :]
            left = [conditional(i, behind) for i in order[: b - k]]
            assert left[-1] <= min(left) * (1 + 1e-6)

    def test_it_leaves_less_than_other_orders(self):
        X = correlated(64, 5, 3, decay=4)
        M = X.mT @ X

        def left(order):
            U = inverse_factor(M[order][:, order], 0)
            return float(U.diagonal().pow(-2).sum())

        every = sorted(left(torch.tensor(p)) for p in itertools.permutations(range(5)))
        assert left(rounding_order(M)) <= every[len(every) // 10]


class TestCodes:
    @given(st.integers(0, 10**6), st.sampled_from([2, 3, 4, 8]), st.sampled_from([1, 3, 4, 8]), st.integers(1, 3),
           st.booleans())
    def test_equal_a_loop_over_one_token(self, seed, bits, b, blocks, clipped):
        """In fp32 numbers, one operation after another: the same integers, whatever the clip."""
        x = correlated(4, b * blocks, seed).float()
        V = feedback_matrix(correlated(3 * b, b * blocks, seed + 1), b)
        clip = torch.tensor([0.7, 0.7]) if clipped else None
        codes, scale, zero = cpu.token_codes(x, bits, clip, V)
        levels, half = 2**bits - 1, 2 ** (bits - 1)
        for m, row in enumerate(x.numpy()):
            z, u = zero[m].numpy()[0] + np.float32(half), row / scale[m].numpy()[0]
            for i in range(len(row)):
                q = np.clip(np.round(u[i]) + z, 0, levels).astype(np.float32)
                assert int(codes[m, i]) == int(q) - half
                e = torch.tensor(u[i] - (q - z)).bfloat16().float().numpy()
                for j in range(i + 1, (i // b + 1) * b):
                    u[j] = u[j] - e * V[i // b, i % b, j % b].float().numpy()

    def test_the_grid_is_that_of_the_clipped_token(self):
        x, V, clip = correlated(16, 8).float(), feedback_matrix(correlated(24, 8, 1), 8), torch.tensor([0.8, 0.8])
        _, scale, zero = cpu.token_codes(x, 4, clip, V)
        want = quant_params(clip_range(x, clip), 4)
        assert torch.equal(scale, want[0])
        assert torch.equal(zero + 8, want[1])

    def test_without_feedback_in_the_matrix_they_are_the_nearest(self):
        x = correlated(64, 16).float()
        for V in (torch.zeros(2, 8, 8), torch.zeros(16, 1, 1)):
            assert torch.equal(cpu.token_codes(x, 4, None, V)[0], cpu.token_codes(x, 4)[0])

    def test_tokens_and_blocks_do_not_depend_on_each_other(self):
        x, V = correlated(8, 16).float(), feedback_matrix(correlated(48, 16, 1), 8)
        codes, scale, zero = cpu.token_codes(x, 4, None, V)
        assert torch.equal(cpu.token_codes(x[3:4], 4, None, V)[0], codes[3:4])
        for n in range(2):
            half = slice(8 * n, 8 * n + 8)
            assert torch.equal(cpu.feedback_codes(x[:, half], scale, zero, V[n : n + 1], 4), codes[:, half])

    def test_errors_are_bf16(self):
        """0.3 is 0.3008 in bf16: of 0.8004 less that remains 0.4996, which rounds down; on a grid of step 1."""
        x = torch.tensor([[0.3, 0.8004, 0.0, 15.0]])
        codes, scale, _ = cpu.token_codes(x, 4, None, torch.tensor([[[0.0, 1.0], [0.0, 0.0]]] * 2))
        assert scale.item() == 1
        assert (codes + 8).tolist() == [[0, 0, 0, 15]]

    def test_leaves_its_input_alone(self):
        for shape in ((1, 8), (5, 8)):
            x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
            before = x.clone()
            cpu.token_codes(x, 4, None, torch.full((1, 8, 8), 0.5))
            assert torch.equal(x, before)

    def test_empty_batch(self):
        codes, scale, _ = cpu.token_codes(torch.zeros(0, 8), 4, None, torch.zeros(1, 8, 8))
        assert codes.shape == (0, 8)
        assert scale.shape == (0, 1)

    @pytest.mark.parametrize(("bits", "least"), [(3, 0.75), (4, 0.65), (8, 0.5)])
    def test_it_beats_rounding_to_nearest_where_weights_are_correlated(self, bits, least):
        weight = correlated(96, 32, 1, decay=4)
        x, V = torch.randn(512, 32, generator=torch.Generator().manual_seed(2)), feedback_matrix(weight, 32)
        nearest = error(x, fake_quantize(x, bits), weight).mean()
        assert error(x, cpu.fake_quantize_rows(x, bits, None, V), weight).mean() < least * nearest


class TestLayer:
    @pytest.mark.parametrize("clipped", [False, True])
    def test_forward_is_its_reference_and_survives_saving(self, clipped):
        weight, x = correlated(12, 16).float(), torch.randn(3, 5, 16)
        clip = torch.tensor([0.9, 0.9]) if clipped else None
        plain = QuantLinear.fold(weight)
        layer = QuantLinear(weight=Weight(plain.codes(), plain.weight_scale),
                            grid=Grid(clip=clip, feedback=feedback_matrix(plain.weight(), 8)))
        torch.testing.assert_close(layer(x), fake_quantized(layer, x), rtol=1e-5, atol=1e-5)
        assert not torch.equal(layer(x), plain(x))
        tensors = layer.state_dict()
        assert tensors["feedback"].dtype == torch.bfloat16
        again = QuantLinear.from_tensors(tensors, 16, 0, 0, 4, 4)
        assert torch.equal(again(x), layer(x))
