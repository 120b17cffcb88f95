"""TAC, Section 3.3 and Appendix C: Equations 16-18 and 30 against independent float64 computations."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from references import TOLERANCE, orthogonal, randn, seeds

import starquant
from checkpoint.families import ModelConfig
from methods.tac import tac_ridge
from model import Block, cos_sin, rotate
from runtime import layers


class TestEq16:
    def test_equals_loops(self):
        q, k, v = (randn(2, 5, 4, seed=i) for i in range(3))
        got = starquant.attention_value(q, k, v)
        for b in range(2):
            for i in range(5):
                scores = [math.exp(float(q[b, i] @ k[b, j]) / math.sqrt(4)) for j in range(5)]
                for c in range(4):
                    want = sum(s * float(v[b, j, c]) for j, s in enumerate(scores)) / sum(scores)
                    assert float(got[b, i, c]) == pytest.approx(want, rel=1e-9, abs=1e-12)

    @pytest.mark.parametrize("kv_heads", [4, 2, 1])
    def test_equals_the_fused_attention_of_the_model(self, kv_heads):
        config = ModelConfig("llada", d_model=32, n_layers=1, n_heads=4, n_kv_heads=kv_heads, head_dim=8, d_ffn=16,
                             vocab_size=8, rope_theta=1e4, norm_eps=1e-5, mask_id=7)
        qkv = randn(2, 6, (4 + 2 * kv_heads) * 8)
        rope = cos_sin(torch.arange(6), config, torch.float32)
        fused = Block(config).attention(qkv, rope, None)
        for b in range(2):
            for head in range(4):
                group = head * kv_heads // 4  # consecutive heads share a key-value head
                at = [head * 8, 32 + group * 8, 32 + kv_heads * 8 + group * 8]
                q, k, v = (qkv[b, :, i : i + 8] for i in at)
                q, k = rotate(q, *rope), rotate(k, *rope)
                torch.testing.assert_close(fused[b, :, head * 8 : head * 8 + 8], starquant.attention_value(q, k, v),
                                           rtol=1e-9, atol=1e-9)


class TestEq17:
    def test_equals_the_column_vector_form(self):
        """z_b -> M_b z_b + d_b for each token and block, number by number."""
        z, M, bias = randn(5, 12), randn(3, 4, 4, seed=1), randn(3, 4, seed=2)
        got = starquant.tac_apply(z, M, bias)
        for n in range(5):
            for b in range(3):
                for i in range(4):
                    want = math.fsum(float(M[b, i, j]) * float(z[n, 4 * b + j]) for j in range(4)) + float(bias[b, i])
                    assert float(got[n, 4 * b + i]) == pytest.approx(want, rel=1e-9, abs=1e-12)

    def test_batches(self):
        z, M, bias = randn(2, 5, 12), randn(3, 4, 4, seed=1), randn(3, 4, seed=2)
        torch.testing.assert_close(starquant.tac_apply(z, M, bias)[1], starquant.tac_apply(z[1], M, bias), **TOLERANCE)

    def test_layer(self):
        z, M, bias = randn(2, 5, 12), randn(3, 4, 4, seed=1), randn(3, 4, seed=2)
        layer = layers.TAC(M, bias)
        assert layer(z.bfloat16()).dtype == torch.bfloat16
        torch.testing.assert_close(layer(z.float()).double(), starquant.tac_apply(z, M, bias), rtol=1e-5, atol=1e-5)


def paired(C, n=300, seed=0):
    """Correlated full-precision representations and a distorted copy, (n, C) each."""
    mix, mix2 = randn(C, C, seed=seed) + torch.eye(C), randn(C, C, seed=seed + 1) * 0.1 + torch.eye(C)
    z_fp = randn(n, C, seed=seed + 2) @ mix + randn(C, seed=seed + 3) * 3
    return z_fp, z_fp @ mix2 + 0.3 * randn(n, C, seed=seed + 4) + randn(C, seed=seed + 5)


def newton_sqrt(A):
    """Square root and inverse square root of a positive definite matrix by the Denman-Beavers iteration."""
    Y, Z = A, np.eye(len(A))
    for _ in range(60):
        Y, Z = (Y + np.linalg.inv(Z)) / 2, (Z + np.linalg.inv(Y)) / 2
    return Y, Z


EXACT = {"damping": 0.0, "smoothing": 0.0, "shrinkage": 0.0}


class TestEq18:
    def test_equals_an_independent_square_root(self):
        z_fp, z_q = paired(12)
        M, bias = starquant.tac_fit(z_fp, z_q, 4, damping=0.01, smoothing=0, shrinkage=0)
        for b in range(3):
            fp, q = (z[:, 4 * b : 4 * b + 4].numpy() for z in (z_fp, z_q))
            cov_fp, cov_q = (np.cov(z.T, bias=True) for z in (fp, q))
            lam = 0.01 * max(np.trace(cov_q) / 4, 1e-8)
            want = newton_sqrt(cov_fp)[0] @ newton_sqrt(cov_q + lam * np.eye(4))[1]
            np.testing.assert_allclose(M[b].numpy(), want, rtol=1e-8, atol=1e-10)
            np.testing.assert_allclose(bias[b].numpy(), fp.mean(0) - want @ q.mean(0), rtol=1e-8, atol=1e-9)

    def test_every_step_of_appendix_c(self):
        """The defaults, by numpy's eigendecomposition and singular values."""
        z_fp, z_q = paired(48, seed=7)
        M, bias = starquant.tac_fit(z_fp, z_q)
        assert M.shape == (3, 16, 16)
        for b in range(3):
            fp, q = (z[:, 16 * b : 16 * b + 16].numpy() for z in (z_fp, z_q))
            (lf, Qf), (lq, Qq) = (np.linalg.eigh(np.cov(z.T, bias=True)) for z in (fp, q))
            root = Qf @ np.diag(np.sqrt(lf)) @ Qf.T
            inverse = Qq @ np.diag(1 / np.sqrt(lq + 3e-4 * lq.mean())) @ Qq.T
            U, sigma, Vt = np.linalg.svd(root @ inverse)
            want = 0.45 * (U @ np.diag(0.85 * sigma + 0.15 * sigma.mean()) @ Vt) + 0.55 * np.eye(16)
            np.testing.assert_allclose(M[b].numpy(), want, rtol=1e-7, atol=1e-9)
            np.testing.assert_allclose(bias[b].numpy(), fp.mean(0) - want @ q.mean(0), rtol=1e-7, atol=1e-8)

    def test_restores_mean_and_covariance_without_damping_smoothing_shrinkage(self):
        z_fp, z_q = paired(12)
        z = starquant.tac_apply(z_q, *starquant.tac_fit(z_fp, z_q, 4, **EXACT)).numpy()
        for b in range(3):
            fp, corrected = z_fp[:, 4 * b : 4 * b + 4].numpy(), z[:, 4 * b : 4 * b + 4]
            np.testing.assert_allclose(np.cov(corrected.T, bias=True), np.cov(fp.T, bias=True), rtol=1e-8, atol=1e-9)
            np.testing.assert_allclose(corrected.mean(0), fp.mean(0), rtol=1e-9, atol=1e-9)

    @given(seed=seeds, damping=st.floats(0, 1), smoothing=st.floats(0, 1), shrinkage=st.floats(0, 1),
           C=st.sampled_from([5, 16, 34, 48]))
    def test_always_restores_the_mean(self, seed, damping, smoothing, shrinkage, C):
        z_fp, z_q = paired(C, n=64, seed=seed)
        M, bias = starquant.tac_fit(z_fp, z_q, 16, damping, smoothing, shrinkage)
        torch.testing.assert_close(starquant.tac_apply(z_q, M, bias).mean(0), z_fp.mean(0), rtol=1e-8, atol=1e-8)

    def test_identical_statistics_give_back_the_identity(self):
        z, _ = paired(12)
        M, bias = starquant.tac_fit(z, z.flip(0), 4, **EXACT)
        torch.testing.assert_close(M, torch.eye(4, dtype=torch.float64).expand(3, 4, 4), rtol=0, atol=1e-8)
        torch.testing.assert_close(bias, torch.zeros_like(bias), rtol=0, atol=1e-7)

    def test_identical_statistics_are_off_by_the_damping_only(self):
        """M = Σ^½ (Σ + λI)^−½ has the eigenvalues √(σ / (σ + λ)), at their lowest for the smallest σ."""
        z, _ = paired(12)
        M, _ = starquant.tac_fit(z, z, 4, damping=0.05, smoothing=0, shrinkage=0)
        for b in range(3):
            sigma = np.linalg.eigvalsh(np.cov(z[:, 4 * b : 4 * b + 4].numpy().T, bias=True))
            want = np.sqrt(sigma / (sigma + 0.05 * sigma.mean()))
            np.testing.assert_allclose(np.linalg.eigvalsh(M[b].numpy()), np.sort(want), rtol=1e-8)

    def test_single_token_and_constant_channels_stay_finite(self):
        for z_fp, z_q in ((torch.ones(1, 8), torch.zeros(1, 8)), (torch.ones(5, 8), randn(5, 8).float())):
            M, bias = starquant.tac_fit(z_fp, z_q, 4)
            assert bool(torch.isfinite(M).all() & torch.isfinite(bias).all())


class TestEq30:
    def test_equals_loops(self):
        z = randn(9, 6) * 2 + 1
        mu, cov = starquant.block_statistics(z, 3)
        for b in range(2):
            block = z[:, 3 * b : 3 * b + 3].tolist()
            means = [math.fsum(row[i] for row in block) / 9 for i in range(3)]
            for i in range(3):
                assert float(mu[b, i]) == pytest.approx(means[i], rel=1e-12)
                for j in range(3):
                    want = math.fsum(row[i] * row[j] for row in block) / 9 - means[i] * means[j]
                    assert float(cov[b, i, j]) == pytest.approx(want, rel=1e-9, abs=1e-12)

    def test_a_large_mean_does_not_cancel_the_covariance(self):
        z = randn(50, 4) * 1e-3 + 1e6
        _, cov = starquant.block_statistics(z, 4)
        np.testing.assert_allclose(cov[0].numpy(), np.cov(z.numpy().T, bias=True), rtol=1e-5, atol=1e-12)

    def test_half_precision_input_is_summed_in_float64(self):
        mu, cov = starquant.block_statistics(randn(5, 4).bfloat16(), 2)
        assert mu.dtype == cov.dtype == torch.float64


class TestBlockSize:
    @given(C=st.integers(1, 500), largest=st.integers(1, 64))
    def test_largest_divisor_not_above_the_default(self, C, largest):
        assert starquant.tac_block_size(C, largest) == max(g for g in range(1, largest + 1) if C % g == 0)

    @pytest.mark.parametrize(("C", "g"), [(4096, 16), (192, 16), (100, 10), (60, 15), (34, 2), (17, 1), (8, 8)])
    def test_appendix_c(self, C, g):
        assert starquant.tac_block_size(C) == g

    def test_tac_fit_follows_it(self):
        M, bias = starquant.tac_fit(*paired(60, n=80))
        assert M.shape == (4, 15, 15)
        assert bias.shape == (4, 15)


class TestDamping:
    @pytest.mark.parametrize("rho", [0.0, 3e-4, 0.5])
    def test_equals_the_formula(self, rho):
        cov = torch.stack([torch.diag(torch.tensor([1.0, 2, 3, 6])), torch.ones(4, 4)]).double()
        damped = starquant.damp(cov, rho)
        for b, mean in enumerate((3.0, 1.0)):
            np.testing.assert_allclose(damped[b].numpy(), cov[b].numpy() + rho * mean * np.eye(4), rtol=1e-12)

    def test_epsilon_is_the_least_mean(self):
        damped = starquant.damp(torch.zeros(1, 3, 3, dtype=torch.float64), 0.5)
        np.testing.assert_allclose(damped[0].numpy(), 0.5e-8 * np.eye(3), rtol=1e-12)


class TestMatrixPower:
    def test_square_roots(self):
        z, _ = paired(6)
        A = np.cov(z.numpy().T, bias=True)
        for p, want in zip((0.5, -0.5), newton_sqrt(A), strict=True):
            got = starquant.matrix_power(torch.from_numpy(A), p)
            np.testing.assert_allclose(got.numpy(), want, rtol=1e-8, atol=1e-9)

    def test_integer_powers(self):
        A = torch.stack([orthogonal(4, s) * torch.tensor([1.0, 2, 3, 4]) @ orthogonal(4, s).T for s in range(2)])
        torch.testing.assert_close(starquant.matrix_power(A, 3), A @ A @ A, **TOLERANCE)
        eye = torch.eye(4, dtype=torch.float64).expand(2, 4, 4)
        torch.testing.assert_close(starquant.matrix_power(A, -1) @ A, eye, **TOLERANCE)

    def test_eigenvalues_are_clamped(self):
        A = torch.diag(torch.tensor([4.0, 0.0, -1e-3])).double()
        want = torch.diag(torch.tensor([0.5, 1e6, 1e6])).double()
        torch.testing.assert_close(starquant.matrix_power(A, -0.5), want, rtol=1e-9, atol=1e-3)


class TestSmoothing:
    @pytest.mark.parametrize("eta", [0.0, 0.15, 1.0])
    def test_singular_values_move_to_their_mean_and_directions_stay(self, eta):
        U, V, sigma = orthogonal(5), orthogonal(5, 1), np.array([5.0, 3, 2, 1.5, 0.5])
        M = (U * torch.from_numpy(sigma) @ V.T)[None]
        want = U.numpy() @ np.diag((1 - eta) * sigma + eta * 2.4) @ V.numpy().T
        np.testing.assert_allclose(starquant.smooth_singular_values(M, eta)[0].numpy(), want, rtol=1e-9, atol=1e-10)

    def test_each_block_has_its_own_mean(self):
        M = torch.stack([torch.eye(3), 9 * torch.eye(3)]).double()
        torch.testing.assert_close(starquant.smooth_singular_values(M, 0.5), M, **TOLERANCE)


class TestShrinkage:
    @pytest.mark.parametrize("alpha", [0.0, 0.55, 1.0])
    def test_equals_loops(self, alpha):
        M = randn(2, 3, 3)
        got = starquant.shrink_to_identity(M, alpha)
        for b in range(2):
            for i in range(3):
                for j in range(3):
                    want = (1 - alpha) * float(M[b, i, j]) + (alpha if i == j else 0)
                    assert float(got[b, i, j]) == pytest.approx(want, abs=1e-12)

    def test_alpha_one_leaves_the_mean_correction(self):
        z_fp, z_q = paired(8)
        M, bias = starquant.tac_fit(z_fp, z_q, 4, shrinkage=1.0)
        torch.testing.assert_close(M, torch.eye(4, dtype=torch.float64).expand(2, 4, 4), rtol=0, atol=1e-12)
        torch.testing.assert_close(bias.flatten(), z_fp.mean(0) - z_q.mean(0), **TOLERANCE)


class TestRidge:
    """Not in the paper: the paired least-squares map."""

    def test_equals_numpys_least_squares_per_block(self):
        z_fp, z_q = paired(12)
        z_fp = z_fp + torch.roll(z_q, 1, 1) @ orthogonal(12)  # correlated, by a map that is not symmetric
        M, bias = tac_ridge(z_fp, z_q, 4, damping=0.0)
        for b in range(3):
            fp, q = (z[:, 4 * b : 4 * b + 4].numpy() for z in (z_fp, z_q))
            want, *_ = np.linalg.lstsq(np.c_[q, np.ones(len(q))], fp, rcond=None)
            np.testing.assert_allclose(M[b].numpy(), want[:4].T, rtol=1e-8, atol=1e-10)
            np.testing.assert_allclose(bias[b].numpy(), want[4], rtol=1e-8, atol=1e-9)

    def test_damping_is_that_of_appendix_c(self):
        """As many more rows √(N λ) I without a target: ridge regression as plain least squares."""
        z_fp, z_q = paired(4)
        M, _ = tac_ridge(z_fp, z_q, 4, damping=0.3)
        fp, q = (z.numpy() - z.numpy().mean(0) for z in (z_fp, z_q))
        lam = 0.3 * np.trace(np.cov(q.T, bias=True)) / 4
        want, *_ = np.linalg.lstsq(np.r_[q, np.sqrt(len(q) * lam) * np.eye(4)], np.r_[fp, np.zeros((4, 4))], rcond=None)
        np.testing.assert_allclose(M[0].numpy(), want.T, rtol=1e-8, atol=1e-10)
