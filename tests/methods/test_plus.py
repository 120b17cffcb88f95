"""starquant+: the balanced transform by its two defining properties, its cost, and what its parts minimize."""

import math

import pytest
import torch
from einops import rearrange
from hypothesis import given
from hypothesis import strategies as st
from references import diagonal_blocks, fake_quantized

from calibrate import quantize_model
from checkpoint.families import linear_shapes, read_config
from checkpoint.published import SHAPES
from methods import METHODS, QuantConfig, hadamard, plus
from methods.gptq import gptq, hessian, shrunk_scale
from methods.hadamard import rotation
from methods.plus import (
    CLIPS,
    EXPONENTS,
    aligned,
    balance,
    balanced_basis,
    best_clip,
    conditional_variance,
    evenly,
    exponent,
    feedback_matrix,
    in_order,
    rounding_order,
    state_means,
    unit_gain,
)
from methods.rtn import Inputs
from methods.storage import stored_linear
from model import load_model
from runtime.cpu import fake_quantize_rows
from runtime.layers import quantize_weight
from runtime.processes import Refused
from starquant import apply_basis, fake_quantize, fold_weight
from tiny import metrics, tasks

KINDS = ["dense", "block", "kronecker"]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def layer(d=64, C=48, n=512, seed=0, dtype=torch.float64):
    """Correlated inputs x (n, d) with uneven channels, and a weight (C, d)."""
    g = generator(seed)
    x = torch.randn(n, d, generator=g) @ torch.randn(d, d, generator=g) * torch.rand(d, generator=g).mul(3).exp()
    return x.to(dtype), (torch.randn(C, d, generator=g) / d**0.5).to(dtype)


def moment(t):
    return t.mT @ t


class TestFewTokens:
    def test_moments_lean_on_equal_variances_the_more_the_fewer_tokens_there_are(self):
        H = moment(layer(d=8)[0])
        assert torch.equal(plus.lean(H.clone(), 14 * 8), H)
        leant = plus.lean(H.clone(), 8)
        assert torch.allclose(leant - H, 0.13 * H.diagonal().mean() * torch.eye(8, dtype=H.dtype))
        few = plus.lean(H.clone(), 1)
        assert torch.linalg.cond(few) < torch.linalg.cond(leant) < torch.linalg.cond(H)

    def test_a_linear_fitted_to_few_tokens_holds_for_others(self, monkeypatch):
        """Output error on tokens that were not seen; without the prior it is 1.4 times as large."""
        x, weight = layer(d=64, C=48, n=4096, dtype=torch.float32)
        x, state = x[None], torch.arange(4096)[None] % 2 == 0

        def unseen_error():
            fitted, _ = METHODS["starquant+"].fit(weight, None, Inputs(x[:, :48], None, state[:, :48]),
                                                  QuantConfig("starquant+"), generator(), None)
            y = x[:, 48:] @ weight.mT
            return float((fitted(x[:, 48:], state[:, 48:]) - y).square().sum() / y.square().sum())

        leant = unseen_error()
        monkeypatch.setattr(plus, "lean", lambda H, tokens: H)
        assert leant < 0.8 * unseen_error()


class TestBalance:
    @given(st.integers(0, 10**6), st.sampled_from([2, 5, 16]), st.sampled_from(EXPONENTS))
    def test_second_moments_of_both_sides_are_powers_of_the_singular_values(self, seed, d, a):
        g = generator(seed)
        X, W = (torch.randn(3 * d, d, generator=g, dtype=torch.float64) for _ in range(2))
        T = balance(*aligned(moment(X), moment(W), damping=0.0), a)
        both = T @ moment(X) @ T.mT, torch.linalg.inv(T).mT @ moment(W) @ torch.linalg.inv(T)
        S = torch.linalg.svdvals(X @ W.mT)[:d]  # the singular values of L_wᵀ L_x are those of X Wᵀ
        for got, power in zip(both, (2 - 2 * a, 2 * a), strict=True):
            assert torch.allclose(got, torch.diag(S**power), rtol=1e-6, atol=1e-6 * float(S[0] ** power))

    def test_minimizes_the_product_of_the_energies(self):
        x, weight = layer(d=16)
        T = balance(*aligned(moment(x), moment(weight), damping=0.0), 0.5)

        def product(T):
            return float((x @ T.mT).square().sum() * (weight @ torch.linalg.inv(T)).square().sum())

        # its lower bound is the square of the nuclear norm of X Wᵀ
        least = float(torch.linalg.svdvals(x @ weight.mT).sum() ** 2)
        assert product(T) == pytest.approx(least, rel=1e-6)
        for seed in range(20):
            other = T + 0.05 * T.norm() / 16 * torch.randn(16, 16, generator=generator(seed), dtype=T.dtype)
            assert product(other) > least

    @pytest.mark.parametrize("kind", ["dense", "block"])
    def test_blind_to_the_scales_of_the_channels(self, kind, monkeypatch):
        """x · c and W / c are the same linear: the transformed activations and weights are the same too."""
        x, weight = layer(d=64, C=96)
        c = torch.rand(64, generator=generator(3), dtype=torch.float64).mul(4).exp()
        # damping and the prior of few tokens, shares of the mean diagonal, are what sees the scales: take them away
        monkeypatch.setattr(plus, "aligned", lambda a, b: aligned(a, b, damping=0.0))
        monkeypatch.setattr(plus, "lean", lambda moment, tokens: moment)
        H = rotation(64, generator()).dense()
        for apply, tensor, change in ((apply_basis, x, c), (fold_weight, weight, 1 / c)):
            moments = []
            for cx, cw, t in ((1, 1, tensor), (c, 1 / c, tensor * change)):
                P = balanced_basis(x * cx, weight * cw, kind, generator(), block=16)
                # singular vectors are unique up to their sign, so compare second moments before the rotation
                moments.append(moment(apply(t, P) @ H.mT).diagonal())
            assert torch.allclose(*moments, rtol=1e-6)

    @pytest.mark.parametrize("feedback", [True, False])
    def test_exponent_leaves_the_variance_to_the_side_with_more_bits(self, feedback):
        S = torch.linspace(-2, 2, 64, dtype=torch.float64).exp()[None]
        chosen = [exponent(S, wbits, 4, feedback) for wbits in (8, 4, 3, 2)]
        assert chosen == sorted(chosen, reverse=True)
        assert exponent(7 * S, 3, 4, feedback) == chosen[2]  # blind to the scale
        if feedback:  # both sides alike: each is rounded against the other
            assert chosen[1] == 0.5
            assert [exponent(S, 4 - n, 4) + exponent(S, 4, 4 - n) for n in (1, 2)] == pytest.approx([1, 1], abs=0.051)
        else:
            assert chosen[0] == 0.5
            assert chosen[-1] <= 0.4
            assert exponent(S, 2, 8, False) <= 0.3

    @pytest.mark.parametrize("spread", [0.0, 1.0, 2.0, 4.0])
    def test_conditional_variance_is_what_rotated_channels_have(self, spread):
        """Against the Cholesky factor that GPTQ itself uses, of Hadamard rotations of one diagonal."""
        spectrum = torch.linspace(-spread, spread, 192, dtype=torch.float64).exp()
        got = []
        for seed in range(5):
            order = torch.randperm(192, generator=generator(seed))
            H = rotation(192, generator(seed)).dense()
            U = torch.linalg.cholesky(torch.linalg.inv(H.mT @ (spectrum[order, None] * H)), upper=True)
            got.append(U.diagonal().pow(-2).mean())
        assert float(conditional_variance(spectrum)) == pytest.approx(float(sum(got)) / 5, rel=0.05)

    def test_conditional_variance_of_channels_half_of_which_are_never_used(self):
        spectrum = torch.tensor([1.0, 1e-60]).repeat_interleave(96)
        # the first half of the rotated channels tells all about the second; D(x) = (1/2 − x) / (1 − x) below x = 1/2
        assert float(conditional_variance(spectrum)) == pytest.approx(0.5 * (1 - math.log(2)), rel=1e-2)

    @pytest.mark.parametrize("feedback", [True, False])
    @pytest.mark.parametrize(("wbits", "abits"), [(2, 8), (3, 4), (8, 4), (4, 2)])
    def test_exponent_predicts_the_order_of_measured_errors(self, wbits, abits, feedback):
        """Of three shares it takes the one that quantizes best, with GPTQ and feedback as they run."""
        g = generator(4)
        S = torch.linspace(-3, 3, 64, dtype=torch.float64).exp()
        Q = [torch.linalg.qr(torch.randn(64, 64, generator=g, dtype=torch.float64))[0] for _ in range(2)]
        X = (torch.randn(2048, 64, generator=g, dtype=torch.float64) * S) @ Q[0]
        W = (torch.randn(256, 64, generator=g, dtype=torch.float64)) @ Q[1]
        H, errors = rotation(64, g).dense(), {}
        S, R = aligned(moment(X), moment(W))
        for a in (0.1, 0.4, 0.7):
            P = [balance(S, R, a).mT @ H]
            x, folded = apply_basis(X, P).float(), fold_weight(W, P).float()
            codes, scale = gptq(folded, hessian(x), wbits, shrunk_scale(folded, wbits))
            W_hat = scale[:, None] * codes
            y = fake_quantize_rows(x, abits, None, feedback_matrix(W_hat, 64) if feedback else None) @ W_hat.mT
            errors[a] = float((y - X.float() @ W.float().mT).square().mean())
        chosen = exponent(S[None], wbits, abits, feedback)
        assert abs(chosen - min(errors, key=errors.get)) <= 0.2, (chosen, errors)


class TestBasis:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("weighted", [False, True])
    def test_exact_before_quantization(self, kind, weighted):
        x, weight = layer(dtype=torch.float32)
        weights = torch.rand(len(x), generator=generator(1)) if weighted else None
        P = balanced_basis(x, weight, kind, generator(), weights, 32)
        phi, folded = apply_basis(x, P), fold_weight(weight, P)
        y = x @ weight.mT
        assert float((phi @ folded.mT - y).norm() / y.norm()) < 1e-5

    @pytest.mark.parametrize("kind", KINDS)
    def test_quantizes_better_than_the_rotation_alone(self, kind):
        x, weight = layer(dtype=torch.float32)

        def error(P):
            phi, folded = fake_quantize(apply_basis(x, P), 4), fake_quantize(fold_weight(weight, P), 4, symmetric=True)
            return float((phi @ folded.mT - x @ weight.mT).norm())

        H = rotation(64, generator()).to(torch.float32)
        assert error(balanced_basis(x, weight, kind, generator(), None, 32)) < 0.9 * error([H])

    def test_weights_count_tokens(self):
        """Weight 2 on some tokens is having them twice."""
        x, weight = layer(d=32)
        twice = torch.arange(len(x)) % 3 == 0
        for kind in KINDS:
            a = balanced_basis(x, weight, kind, generator(), torch.where(twice, 2.0, 1.0))
            b = balanced_basis(torch.cat((x, x[twice])), weight, kind, generator())
            ya, yb = (apply_basis(x, P).square().sum() for P in (a, b))
            za, zb = (fold_weight(weight, P).square().sum() for P in (a, b))
            assert float(ya * za) == pytest.approx(float(yb * zb), rel=1e-6)

    @pytest.mark.parametrize(("model", "percent"), [("llada-8b", 2.5), ("dream-7b", 3.9)])
    def test_costs_at_most_four_percent_of_the_linears(self, model, percent):
        """Multiplications a token of a block, of what is calibrated by default: blocks, across blocks, feedback."""
        shapes, config = linear_shapes(read_config(SHAPES[model])).values(), QuantConfig(method="starquant+")
        ours = 0
        for _, d in shapes:
            ((_, b, _),), (across,) = stored_linear(config, 1, d, False).factors
            ours += d * (b + across[0] + (b - 1) / 2)
        assert 100 * ours / sum(rows * d for rows, d in shapes) == pytest.approx(percent, abs=0.05)
        # these are the factors, and across blocks there is a Hadamard matrix for each of these widths
        P = balanced_basis(torch.randn(8, 128), torch.randn(4, 128), "block", generator())
        assert [tuple(p[-1].shape) for p in P] == [p[-1] for p in stored_linear(config, 1, 128, False).factors]
        assert all(hadamard.exists(d // config.balance_block) for _, d in shapes)

    @pytest.mark.parametrize("kind", KINDS)
    def test_in_order_permutes_inside_the_blocks_and_leaves_nothing_to_order(self, kind):
        x, weight = layer(dtype=torch.float32)
        P = balanced_basis(x, weight, kind, generator(), None, 32)
        ordered = in_order(P, weight)
        b = P[0][-1].shape[-1]
        old, new = (rearrange(apply_basis(x, p), "t (n b) -> b n t", b=b) for p in (P, ordered))
        same = (old[:, None] - new).abs().amax((-1, -2)) < 1e-4 * x.abs().max()
        assert same.sum(0).tolist() == same.sum(1).tolist() == [1] * b  # the same channels, in all blocks alike
        folded = fold_weight(weight, ordered).double()
        assert rounding_order(diagonal_blocks(folded.mT @ folded, b).mean(0)).tolist() == list(range(b))


class TestFit:
    def test_few_tokens_stand_for_all_with_their_own_weights(self):
        x = torch.arange(20.0).view(10, 2)
        few, weights = evenly(x, torch.arange(10.0), most=4)
        assert few.tolist() == [[0, 1], [6, 7], [12, 13], [18, 19]]
        assert weights.tolist() == [0, 3, 6, 9]
        assert evenly(x, None, 100)[1].tolist() == [1] * 10

    @pytest.mark.parametrize("bits", [3, 8])
    def test_clip_minimizes_the_output_error_over_its_grid(self, bits):
        x, weight = layer(dtype=torch.float32)
        weights, rounded = torch.rand(len(x), generator=generator(2)), quantize_weight(weight, bits)
        c = float(best_clip(x, rounded, 3, weights)[0])

        def error(c):
            # the range of every token times c
            low, high = x.amin(-1, keepdim=True).clamp(max=0) * c, x.amax(-1, keepdim=True).clamp(min=0) * c
            x_hat = fake_quantize(torch.minimum(torch.maximum(x, low), high), 3)
            W = rounded.scale[:, None] * rounded.codes
            return float((((x_hat - x) @ W.mT).double().square().sum(-1) * weights).sum())

        errors = [error(k) for k in CLIPS]
        assert error(c) == pytest.approx(min(errors), rel=1e-5)
        assert min(errors) < errors[0]

    @pytest.mark.parametrize("ratio", [0, 0.25, 0.5, 0.75, 1])
    @pytest.mark.parametrize("kind", KINDS)
    def test_fits_at_every_mask_ratio_and_beats_quarot_on_correlated_inputs(self, kind, ratio):
        x, weight = layer(dtype=torch.float32)
        x = x.view(8, 64, 64)
        state = torch.rand(8, 64, generator=generator(4)) < ratio
        inputs = Inputs(x, x @ weight.mT, state)
        errors = {}
        for method in ("starquant+", "quarot"):
            config = QuantConfig(method, **({"balance": kind, "balance_block": 32} if method == "starquant+" else {}))
            fitted, _ = METHODS[method].fit(weight, None, inputs, config, generator(), None)
            exact = fitted.finish(fitted.phi(x, state) @ fold_weight(weight, fitted.P).mT, state)
            assert float((exact - inputs.y).norm() / inputs.y.norm()) < 1e-5
            errors[method] = float((fitted(x, state) - inputs.y).norm())
        assert errors["starquant+"] < 0.95 * errors["quarot"]

    @pytest.mark.parametrize("kind", KINDS)
    def test_the_weight_is_folded_with_the_transform_as_it_is_stored(self, kind, monkeypatch):
        """In bf16: bf16 activations meet these very numbers, without a conversion."""
        x, weight = layer(dtype=torch.float32)
        inputs, folded = Inputs(x[None], (x @ weight.mT)[None], torch.ones(1, len(x), dtype=torch.bool)), []
        monkeypatch.setattr(plus, "gptq", lambda W, *rest: (folded.append(W), gptq(W, *rest))[1])
        config = QuantConfig(method="starquant+", balance=kind, balance_block=32)
        fitted, _ = METHODS["starquant+"].fit(weight, None, inputs, config, generator(), None)
        assert torch.equal(folded[0], fold_weight(weight, fitted.P))
        stored = [v for k, v in fitted.state_dict().items() if k.startswith("transform_")]
        assert {v.dtype for v in stored} == {torch.bfloat16}
        used = [p for factor in fitted.basis(x.bfloat16()) for p in factor]
        assert [p.data_ptr() for p in used] == [v.data_ptr() for v in stored]

    @pytest.mark.parametrize("kind", KINDS)
    def test_feedback_pays(self, kind):
        """On inputs and weights with spectra of their own; it is fitted to the weight as it was rounded."""
        x, weight = layer(dtype=torch.float32)
        inputs, errors = Inputs(x[None], (x @ weight.mT)[None], torch.ones(1, len(x), dtype=torch.bool)), {}
        for rounding in ("feedback", "nearest"):
            config = QuantConfig(method="starquant+", balance=kind, balance_block=32, rounding=rounding, gain="none")
            fitted, _ = METHODS["starquant+"].fit(weight, None, inputs, config, generator(), None)
            errors[rounding] = float((fitted(inputs.x, inputs.state) - inputs.y).norm())
            if rounding == "feedback":
                assert torch.equal(fitted.feedback, feedback_matrix(fitted.weight(), fitted.feedback.shape[-1]))
            else:
                assert fitted.feedback is None
        assert errors["feedback"] < {"kronecker": 0.97}.get(kind, 0.9) * errors["nearest"]  # its blocks are of 8

    def test_centring_is_exact_and_leaves_shared_parts_without_error(self):
        """Masked tokens that are all alike, as in the first layer, come out exactly whatever the bits."""
        x, weight = layer(dtype=torch.float32)
        x, state = x.view(8, 64, 64).clone(), torch.rand(8, 64, generator=generator(4)) < 0.5
        x[state] = x[0, 0].clone()
        y = x @ weight.mT
        for bits in (2, 4):
            config = QuantConfig(method="starquant+", wbits=bits, abits=bits)
            fitted, _ = METHODS["starquant+"].fit(weight, None, Inputs(x, y, state), config, generator(), None)
            assert torch.allclose(fitted(x, state)[state], y[state], rtol=1e-5, atol=1e-4)
            assert torch.allclose(fake_quantized(fitted, x, state), fitted(x, state), rtol=1e-4, atol=1e-3)
            assert not torch.allclose(fitted(x, state)[~state], y[~state], rtol=1e-2, atol=1e-2)

    def test_the_exponent_is_chosen_by_the_bits_unless_given(self):
        x, weight = layer(dtype=torch.float32)
        inputs = Inputs(x[None], (x @ weight.mT)[None], torch.ones(1, len(x), dtype=torch.bool))

        def energy(**setting):
            """mean(S^(2−2a)) mean(S^2a), least at a = 1/2 and the same at a and 1 − a."""
            config = QuantConfig(method="starquant+", centre="none", rounding="nearest", **setting)
            fitted, _ = METHODS["starquant+"].fit(weight, None, inputs, config, generator(), None)
            return float(apply_basis(x, fitted.P).square().sum() * fold_weight(weight, fitted.P).square().sum())

        even = energy(exponent=0.5)
        assert energy(wbits=8) == pytest.approx(even, rel=1e-3)
        assert even < energy() < energy(wbits=3) < energy(exponent=0.0)
        assert energy(exponent=0.0) == pytest.approx(energy(exponent=1.0), rel=0.05)  # up to the damping
        with pytest.raises(Refused, match=r"exponent 1\.5 is not between -1 and 1"):
            energy(exponent=1.5)

    @pytest.mark.parametrize("state", [True, False])
    def test_means_of_a_state_that_never_occurs_are_zero(self, state):
        x, _ = layer()
        means = state_means(x, torch.full((len(x),), state))
        assert torch.allclose(means[int(state)], x.mean(0))
        assert means[int(not state)].abs().max() == 0

    def test_centring_by_state_pays_where_the_states_differ(self):
        x, weight = layer(dtype=torch.float32)
        x, state = x.view(8, 64, 64), torch.rand(8, 64, generator=generator(4)) < 0.5
        x = x + 3 * x.std() * torch.where(state[..., None], *torch.randn(2, 64, generator=generator(5)))
        errors = {}
        for centre in ("state", "joint", "none"):
            config = QuantConfig(method="starquant+", centre=centre)
            fitted, _ = METHODS["starquant+"].fit(weight, None, Inputs(x, x @ weight.mT, state), config,
                                                        generator(), None)
            errors[centre] = float((fitted(x, state) - x @ weight.mT).norm())
        assert errors["state"] < 0.9 * errors["joint"]
        assert errors["joint"] < errors["none"]


class TestGain:
    @given(st.integers(0, 10**6))
    def test_slope_of_every_channel_is_one_afterwards(self, seed):
        g = generator(seed)
        y, noise = (torch.randn(50, 6, generator=g, dtype=torch.float64) for _ in range(2))
        weights, y_hat = torch.rand(50, generator=g).double(), y * torch.linspace(0.6, 1.3, 6) + 0.05 * noise
        corrected = unit_gain(y, y_hat, weights) * y_hat
        for c in range(6):
            slope = sum(float(w * a * b) for w, a, b in zip(weights, corrected[:, c], y[:, c], strict=True))
            assert slope == pytest.approx(sum(float(w * b * b) for w, b in zip(weights, y[:, c], strict=True)))

    def test_a_channel_that_is_lost_keeps_its_scale(self):
        y = torch.tensor([[1.0, 1.0, 0.0, 1.0], [1.0, 2.0, 0.0, 1.0]])
        y_hat = torch.tensor([[0.4, 0.5, 1.0, -1.0], [0.4, 1.2, 1.0, 0.5]])
        assert unit_gain(y, y_hat, torch.ones(2)).tolist() == [1.0, pytest.approx(5 / 2.9), 1.0, 1.0]

    def test_gptq_shrinks_and_the_fitted_linear_does_not(self):
        x, weight = layer(dtype=torch.float32, n=4096)
        inputs = Inputs(x[None], (x @ weight.mT)[None], torch.arange(len(x))[None] % 3 == 0)
        slopes = {}
        for gain in ("unit", "none"):
            config = QuantConfig(method="starquant+", wbits=2, gain=gain)
            fitted, _ = METHODS["starquant+"].fit(weight, None, inputs, config, generator(), None)
            state, masked = inputs.state, inputs.state[0]
            y, y_hat = (t[0] - state_means(t[0], masked)[masked.long()] for t in (inputs.y, fitted(inputs.x, state)))
            weights = torch.where(masked, config.mask_weight, 1.0)[:, None]
            slopes[gain] = (weights * y_hat * y).sum(0) / (weights * y * y).sum(0)
        assert slopes["none"].mean() < 0.92
        assert torch.allclose(slopes["unit"], torch.ones(48), atol=2e-3)

    def test_it_pays_behind_many_layers(self):
        """What a single output does not show: of the embedded model it halves the divergence at 2-bit weights."""
        model, divergence = load_model("tiny", "cpu"), {}
        model.blocks = model.blocks[:3]
        tokens, region = tasks.calibration_set(model.tokenizer, 4, 64, 0)
        (ids, where), *_ = metrics.nelbo_set(model.tokenizer, 8, 0)
        for gain in ("unit", "none"):
            config = QuantConfig(method="starquant+", wbits=2, gain=gain, rounding="nearest")
            judged = quantize_model(model, tokens, config, region)
            divergence[gain] = float(metrics.losses(judged, ids, where, 1, reference=model)["kl"].mean())
        assert divergence["unit"] < 0.7 * divergence["none"]
