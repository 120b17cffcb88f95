"""Each comparison method by its defining equation, on small random models and data."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import calibrate
from calibrate import QuantConfig, quantize_block, quantize_model
from checkpoint.families import FUSED, read_config
from methods import METHODS, dllmquant, flat, settings_of
from methods.awq import AWQ_EXPONENTS, AWQ_SHRINK, awq_loss, awq_scale, fit_awq
from methods.dllmquant import cgq_weights, ia_aq, tmas_ratios
from methods.gptq import damped, gptq, hessian, output_error, round_columns, shrunk_scale
from methods.hadamard import exists, hadamard, hartley, rotation, rotation_sizes, spread
from methods.rtn import Inputs
from methods.sgat import initial_basis
from model import DiffusionLM
from runtime.attention import QuantAttention, softmax_scores
from runtime.layers import QuantLinear
from starquant import Diagonal, Kronecker, apply_basis, attention_value, fake_quantize, fold_weight, quant_params
from tiny.train import CONFIG

ROTATED = ("quarot", "dllmquant++")  # K and V are rotated, and activations clipped
SMALL = CONFIG | {"d_model": 64, "n_layers": 2, "n_heads": 2, "n_kv_heads": 2, "mlp_hidden_size": 96, "vocab_size": 64,
                  "embedding_size": 64, "eos_token_id": 62, "pad_token_id": 62, "mask_token_id": 63}


def few(method, **values):
    """Settings of a method with one epoch of two steps, where it trains."""
    training = {"epochs": 1, "batch": 8} if "epochs" in settings_of(method) else {}
    return QuantConfig(method, **training, **values)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def small_model(seed=0):
    """A random two-block model whose norm gains and weights are uneven, so that transforms matter."""
    model, g = DiffusionLM(read_config(SMALL)), generator(seed)
    for p in model.parameters():
        p.data = 1 + 0.3 * torch.randn(p.shape, generator=g) if p.ndim == 1 else (
            torch.randn(p.shape, generator=g) * p.shape[1] ** -0.5)
    return model.eval()


def tokens(n=16, length=12, seed=1):
    return torch.randint(0, 60, (n, length), generator=generator(seed))


def linear_inputs(d=32, C=24, segments=8, length=16, seed=0, outlier=8.0):
    """(weight, Inputs) of one linear: correlated inputs with an outlier channel, 16-bit targets."""
    g = generator(seed)
    x = torch.randn(segments, length, d, generator=g) @ torch.randn(d, d, generator=g) / d**0.5
    x[..., 3] *= outlier
    weight = torch.randn(C, d, generator=g) / d**0.5
    state = torch.rand(segments, length, generator=g) < 0.5
    confidence = torch.rand(segments, length, generator=g)
    return weight, Inputs(x, x @ weight.T, state, confidence, 1 + 0.3 * torch.randn(d, generator=g))


class TestHadamard:
    @pytest.mark.parametrize("n", [1, 2, 4, 12, 16, 20, 24, 28, 36, 44, 56, 64, 96, 128, 148, 192, 576, 704])
    def test_entries_and_orthogonal_rows(self, n):
        H = hadamard(n)
        assert set(H.unique().tolist()) <= {-1, 1}
        assert torch.equal(H @ H.T, n * torch.eye(n, dtype=torch.int64))

    @pytest.mark.parametrize(("d", "sizes"), [(192, (12, 16)), (576, (24, 24)), (704, (16, 44)), (4096, (64, 64)),
                                              (12288, (96, 128)), (3584, (56, 64)), (18944, (128, 148))])
    def test_every_width_that_occurs_is_a_kronecker_product(self, d, sizes):
        assert rotation_sizes(d) == sizes
        P = rotation(d, generator())
        for factor, n in zip(P, sizes, strict=True):
            assert float((factor @ factor.T - torch.eye(n)).abs().max()) < 1e-12
        # an outlier in one channel comes out evenly spread
        one = torch.zeros(d, dtype=torch.float64)
        one[d // 3] = 1
        assert float((apply_basis(one, P).abs() - d**-0.5).abs().max()) < 1e-12

    @pytest.mark.parametrize("n", [1, 3, 5, 6, 9, 14, 37])
    def test_hartley_is_orthogonal_and_nearly_even_for_every_order(self, n):
        H = hartley(n)
        assert float((H @ H.T - torch.eye(n)).abs().max()) < 1e-12
        assert float(H.abs().max()) <= (2 / n) ** 0.5 + 1e-12

    @pytest.mark.parametrize("n", [1, 3, 9, 64])
    def test_spread_takes_hadamard_where_it_is_in_reach(self, n):
        P = spread(n, generator())
        assert float((P @ P.T - torch.eye(n)).abs().max()) < 1e-12
        assert (float((P.abs() - n**-0.5).abs().max()) < 1e-12) == exists(n)
        assert torch.equal(P.abs(), spread(n, generator(1)).abs())  # only the signs are random

    @pytest.mark.parametrize(("d", "sizes"), [(92, (4, 23)), (97, (1, 97)), (11008, (86, 128)), (13696, (107, 128))])
    def test_other_widths_are_rotated_by_factors_of_any_order(self, d, sizes):
        """QuaRot's own code has tables of order 172 for 11008 (Qwen2.5-3B), and nothing for 13696."""
        assert rotation_sizes(d) == sizes
        for factor, n in zip(rotation(d, generator()), sizes, strict=True):
            assert float((factor @ factor.T - torch.eye(n)).abs().max()) < 1e-12
        with pytest.raises(ValueError, match="92"):
            hadamard(92)


class TestGPTQ:
    @given(st.integers(0, 10**6), st.sampled_from([2, 3, 4, 8]))
    def test_equals_the_optimal_brain_update(self, seed, bits):
        """One column at a time: round it, move the open ones by −err / [H⁻¹]_ii · [H⁻¹]_i: with the inverse of what is
        left of H recomputed from scratch each time."""
        g = generator(seed)
        x, W = torch.randn(40, 7, generator=g).double(), torch.randn(3, 7, generator=g).double()
        H = hessian(x)
        codes, scale = gptq(W, H, bits, damping=0.01, block=3)
        s, want, open_H = quant_params(W, bits, symmetric=True)[0], W.clone(), damped(H.clone(), 0.01)
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
        codes, scale = gptq(weight, H, bits)
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
        assert torch.equal(gptq(weight, H, 4, block=block)[0], gptq(weight, H, 4, block=32)[0])

    @pytest.mark.parametrize("rows", [1, 5, 24])
    def test_the_scale_search_takes_rows_in_parts(self, rows, monkeypatch):
        weight, inputs = linear_inputs()
        for H in (None, hessian(inputs.x.flatten(0, 1)).float()):
            whole = shrunk_scale(weight, 3, H)
            with monkeypatch.context() as patch:
                patch.setattr("methods.gptq.SEARCHED", rows * weight.shape[1])
                assert torch.equal(shrunk_scale(weight, 3, H), whole)

    def test_inputs_that_never_occur_are_dropped(self):
        weight, inputs = linear_inputs()
        x = inputs.x.flatten(0, 1).clone()
        x[:, 5] = 0
        assert not gptq(weight, hessian(x), 4)[0][:, 5].any()

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


class TestAWQ:
    def test_the_exponent_minimizes_its_objective(self):
        weight, inputs = linear_inputs(outlier=30.0)
        fitted, record = METHODS["awq"].fit(weight, None, inputs, QuantConfig(method="awq"), generator(), None)
        x = inputs.x.flatten(0, 1).double()

        def loss(r):
            s = awq_scale(x.abs().mean(0), r)
            return float((x @ (fake_quantize(weight * s.float(), 4, True) / s - weight).T.double()).square().sum())

        losses = [loss(r) for r in AWQ_EXPONENTS]
        assert losses[AWQ_EXPONENTS.index(record["exponent"])] == pytest.approx(min(losses), rel=1e-4)
        assert min(losses) < losses[0]
        s = awq_scale(x.abs().mean(0), record["exponent"]).float()
        assert torch.allclose(1 / fitted.P[0].d, s, rtol=1e-4)

    def test_rounding_by_gptq_keeps_the_range_of_every_channel(self):
        weight, inputs = linear_inputs(outlier=30.0)
        nearest, second = (fit_awq(weight, None, inputs, QuantConfig(method), generator(), None)[0]
                           for method in ("awq", "dllmquant+"))
        assert torch.equal(second.weight_scale, nearest.weight_scale)
        x = inputs.x.flatten(0, 1)
        errors = [(apply_basis(x, f.P) @ f.weight().T - inputs.y.flatten(0, 1)).norm() for f in (second, nearest)]
        assert errors[0] < 0.9 * errors[1]

    def test_the_grids_are_those_of_its_code(self):
        assert [20 * r for r in AWQ_EXPONENTS] == pytest.approx(list(range(20)))
        assert [20 * f for f in AWQ_SHRINK] == pytest.approx(list(range(20, 10, -1)))

    def test_objective_is_the_output_error(self):
        weight, inputs = linear_inputs()
        x, s = inputs.x.flatten(0, 1).double(), torch.rand(32, generator=generator()) + 0.5
        error = fake_quantize(weight * s, 4, symmetric=True) / s - weight
        want = 2 * (x @ error.T.double()).square().sum(-1).mean()
        assert float(awq_loss(weight, s, hessian(x), 4)) == pytest.approx(float(want), rel=1e-6)

    def test_no_worse_than_rounding(self):
        weight, inputs = linear_inputs(outlier=30.0)
        x = inputs.x.flatten(0, 1)
        config = QuantConfig(method="awq", abits=8)
        fitted = METHODS["awq"].fit(weight, None, inputs, config, generator(), None)[0]
        effective = apply_basis(torch.eye(32), fitted.P) @ fitted.weight().T
        rounded = fake_quantize(weight, 4, symmetric=True).T
        assert (x @ effective - inputs.y.flatten(0, 1)).norm() < (x @ rounded - inputs.y.flatten(0, 1)).norm()


class TestDLLMQuant:
    @pytest.mark.parametrize("n", [10, 20, 128, 130, 7])
    def test_tmas_proportions_hold_exactly(self, n):
        ratios = tmas_ratios(n, generator())
        assert len(ratios) == n
        assert ((ratios > 0) & (ratios <= 1)).all()
        counts = [int(((ratios > i / 4) & (ratios <= (i + 1) / 4)).sum()) for i in range(4)]
        assert all(abs(c - n * share) < 1 for c, share in zip(counts, (0.3, 0.2, 0.2, 0.3), strict=True))
        if n % 10 == 0:
            assert counts == [3 * n // 10, n // 5, n // 5, 3 * n // 10]

    def test_tmas_is_used_in_calibration(self):
        ids = tokens(40, 400)
        for method, low in (("dllmquant++", 12), ("quarot", 10)):
            noisy = calibrate.masked_copies(ids, None, 63, QuantConfig(method=method))
            assert int(((noisy == 63).float().mean(-1) < 0.25).sum()) == pytest.approx(low, abs=1)

    def test_uniform_certainty_is_gptq(self, monkeypatch):
        """Equal weights scale H and its damping alike, so that CGQ's rounding is GPTQ's."""
        weight, inputs = linear_inputs()
        config = QuantConfig(method="quarot")
        monkeypatch.setattr(dllmquant, "CGQ_UNMASKED", 1.0)
        uniform = inputs._replace(confidence=torch.full_like(inputs.confidence, 0.25))
        want = METHODS["quarot"].fit(weight, None, inputs, config, generator(), None)[0]
        got = METHODS["dllmquant++"].fit(weight, None, uniform, config, generator(), None)[0]
        assert torch.equal(got.weight_packed, want.weight_packed)
        other = METHODS["dllmquant++"].fit(weight, None, inputs, config, generator(), None)[0]
        assert not torch.equal(other.weight_packed, want.weight_packed)

    def test_certainty_hessian(self):
        _, inputs = linear_inputs()
        x, want = inputs.x.flatten(0, 1).double(), 0
        for x_j, masked, conf in zip(x, inputs.state.flatten(), inputs.confidence.flatten().tolist(), strict=True):
            w = (1.0 if masked else 0.7) + math.sqrt(conf)
            want = want + 2 / len(x) * torch.outer(w * x_j, w * x_j)
        got = hessian(x, cgq_weights(inputs.state, inputs.confidence).flatten())
        assert torch.allclose(got, want, rtol=1e-5)

    def test_ia_aq_scale_minimizes_its_loss(self):
        g = generator()
        q, k, v = (torch.randn(3, n, 10, 8, generator=g) for n in (4, 2, 2))
        v = v.pow(3)
        A = softmax_scores(q, k)
        scale, zero = ia_aq(A, v, 4)
        full, want = (t[:, None, :, 0] for t in quant_params(v.permute(1, 3, 0, 2).flatten(2), 4))  # a channel a row
        assert torch.equal(zero, want)
        A_group = A.view(3, 2, 2, 10, 10)

        def loss(s):
            """Per channel: ‖A (V̂ − V)‖² over all heads that share this V."""
            error = s * ((torch.round(v / s) + zero).clamp(0, 15) - zero) - v
            return (A_group @ error[:, :, None]).double().square().sum((0, 2, 3))

        losses = torch.stack([loss(alpha * full) for alpha in dllmquant.IA_AQ_GRID])
        assert torch.allclose(loss(scale), losses.amin(0), rtol=1e-4)
        assert (losses.amin(0) < losses[0]).any()


class TestQuantAttention:
    @pytest.mark.parametrize("rotated", [False, True])
    def test_without_quantizers_it_is_eq_16(self, rotated):
        g = generator()
        q, k, v = (torch.randn(2, n, 6, 8, generator=g) for n in (4, 2, 2))
        P = rotation(8, g).dense().float() if rotated else None
        z = QuantAttention((16, 16), P)(q, k, v)
        want = attention_value(q, *(t.repeat_interleave(2, 1) for t in (k, v)))
        assert torch.allclose(z, want, atol=1e-5)

    def test_masked_keys_do_not_count_and_bits_do(self):
        g = generator()
        q, k, v = (torch.randn(1, 2, 6, 8, generator=g) for _ in range(3))
        mask = torch.tensor([0, 0, 1, 1, 1, 1], dtype=torch.bool)[None, None, None]
        exact = QuantAttention((16, 16))(q, k, v, mask)
        assert torch.allclose(exact, attention_value(q, k[:, :, 2:], v[:, :, 2:]), atol=1e-5)
        errors = [float((QuantAttention((bits, bits))(q, k, v, mask) - exact).norm()) for bits in (3, 4, 6, 8)]
        assert errors == sorted(errors, reverse=True)
        assert 0 < errors[-1] < 0.1 * errors[0]

    @pytest.mark.parametrize("method", ["rtn", "quarot", "dllmquant+", "dllmquant++"])
    def test_calibration_puts_it_in_and_the_state_dict_holds_it(self, method):
        config = QuantConfig(method=method, kv_bits=4, softmax_bits=8)
        q = quantize_model(small_model(), tokens(), config)
        for block in q.blocks:
            again = QuantAttention(**block.softmax_value.state_dict())
            heads = [torch.randn(1, 2, 5, 32, generator=generator(i)) for i in range(3)]
            assert torch.equal(again(*heads), block.softmax_value(*heads))
            assert (block.softmax_value.value_scale is not None) == ("dllmquant" in method)
            assert (block.softmax_value.rotation is not None) == (method in ROTATED)


class TestAllMethods:
    @pytest.mark.parametrize("method", list(METHODS))
    def test_every_linear_of_every_block_is_quantized_and_better_bits_help(self, method):
        model, ids = small_model(), tokens()
        noisy = torch.where(torch.rand(ids.shape, generator=generator(2)) < 0.5, 63, ids)
        want, errors = model(noisy), []
        for bits in (4, 8):
            q = quantize_model(model, ids, few(method, wbits=bits, abits=bits))
            for block, name in itertools.product(q.blocks, FUSED):
                linear = getattr(block, name)
                assert isinstance(linear, QuantLinear)
                assert int(linear.codes().abs().max()) <= 2 ** (bits - 1)
                assert linear.codes().unique().numel() > 2 ** (bits - 1)
            errors.append(float(((q(noisy) - want).norm() / want.norm()).detach()))
        # gates take a share of the energy away that no bits bring back
        gated = method in ("freeact", "starquant")
        assert errors[1] < (0.9 if gated else 0.2) * errors[0]
        assert errors[0] < 1

    @pytest.mark.parametrize("method", list(METHODS))
    def test_every_setting_of_a_method_has_a_part_in_the_result(self, method, monkeypatch):
        """A method has no setting that it does not read; reading another's would be an AttributeError."""
        read, config = set(), few(method, kv_bits=8, **({"tac": "ridge"} if method == "starquant+" else {}))
        monkeypatch.setattr(type(config), "__getattribute__",
                            lambda self, name: (read.add(name), object.__getattribute__(self, name))[1])
        quantize_model(small_model(), tokens(), config)
        monkeypatch.undo()
        assert settings_of(method).keys() <= read

    @pytest.mark.parametrize("ratio", [0, 0.25, 0.5, 0.75, 1])
    @pytest.mark.parametrize("method", ["rtn", "awq", "gptq", "quarot", "flatquant", "dllmquant+", "dllmquant++"])
    def test_transform_is_exact_before_quantization(self, method, ratio):
        weight, inputs = linear_inputs()
        fitted = METHODS[method].fit(weight, None, inputs, few(method), generator(), lambda _: None)
        fitted, x = fitted[0], inputs.x
        state = torch.rand(x.shape[:2], generator=generator(9)) < ratio
        y = fitted.phi(x, state) @ fold_weight(weight, fitted.P).T if fitted.P else x @ weight.T
        assert float((y - inputs.y).norm() / inputs.y.norm()) < 2e-6

    @pytest.mark.parametrize("ratio", [0, 0.25, 0.5, 0.75, 1])
    def test_gated_transform_is_exact_where_the_subspaces_are_empty(self, ratio):
        """FreeAct's basis with tokens that live in their own state's subspace (Eq. 25)."""
        weight, inputs = linear_inputs()
        fitted = METHODS["freeact"].fit(weight, None, inputs, few("freeact"), generator(),
                                    lambda _: None)[0]
        state = torch.rand(inputs.x.shape[:2], generator=generator(9)) < ratio
        assert fitted.d_m == fitted.d_u == 1
        diagonal, P = fitted.P
        x = apply_basis(fitted.phi(inputs.x, state), [Kronecker(*(f.mT for f in P)), Diagonal(1 / diagonal.d)])
        y = fitted.phi(x, state) @ fold_weight(weight, fitted.P).T
        assert torch.allclose(y, x @ weight.T, atol=1e-4)

    @pytest.mark.parametrize("method", ["awq", "gptq", "quarot", "flatquant", "dllmquant+", "dllmquant++"])
    def test_beats_rounding_on_a_layer_with_outliers(self, method):
        weight, inputs = linear_inputs(d=64, C=64, outlier=30.0)
        config = QuantConfig(method=method, abits=8 if "awq" in method or method in ("gptq", "dllmquant+") else 4)

        def error(name):
            fit = METHODS[name].fit(weight, None, inputs, config, generator(), lambda _: None)[0]
            return float((fit(inputs.x, inputs.state) - inputs.y).norm())

        assert error(method) < error("rtn")


@pytest.mark.parametrize("method", ROTATED)
def test_quarot_clips_where_bits_are_few(method):
    weight, inputs = linear_inputs()
    for abits, clip in ((4, [0.9, 0.9]), (3, [0.9, 0.9]), (8, None)):
        config = QuantConfig(method=method, abits=abits)
        fitted = METHODS[method].fit(weight, None, inputs, config, generator(), lambda _: None)[0]
        assert fitted.clip is None if clip is None else fitted.clip.tolist() == pytest.approx(clip)


class TestFlat:
    def test_without_gates_and_clipping_starquant_is_flatquant(self, monkeypatch):
        """d_m = d_u = 0: the same orthogonal Kronecker basis, trained on the same loss, gives the same integers."""
        class Bare(flat.FlatParameters):
            """P alone: no diagonal, and clip factors of 1."""

            def forward(self):
                (_, P), *clips = super().forward()
                return [P], *map(torch.ones_like, clips)

        monkeypatch.setattr(flat, "FlatParameters", Bare)
        weight, inputs = linear_inputs()
        config = QuantConfig(state_fraction=0, epochs=3)
        star = METHODS["starquant"].fit(weight, None, inputs, config, generator(), lambda _: None)
        flat_ = flat.fit_flat(weight, None, inputs, config, generator(), lambda _: None)
        assert flat_[1] == pytest.approx(star[1])
        for a, b in zip(star[0].P[0], flat_[0].P[0], strict=True):
            assert torch.allclose(a, b, atol=1e-6)
        assert torch.equal(star[0].weight_packed, flat_[0].weight_packed)

    def test_starts_at_the_given_transform(self):
        start = initial_basis(32, "kronecker", generator()).to(torch.float32)
        P, clip_x, clip_w = flat.FlatParameters(start, 24, torch.full((32,), 2.0))()
        assert torch.equal(P[0].d, torch.full((32,), 2.0))
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(P[1], start, strict=True))
        assert torch.allclose(clip_w, torch.full((24, 2), 0.98201), atol=1e-5)
        assert clip_x.shape == (2,)

    def test_training_lowers_the_loss_and_moves_everything(self):
        weight, inputs = linear_inputs(outlier=20.0)
        config = QuantConfig(method="flatquant", lr=5e-3, epochs=6)
        fitted, record = METHODS["flatquant"].fit(weight, None, inputs, config, generator(), lambda _: None)
        assert record["best"] < 0.9 * record["start"]
        assert not torch.allclose(fitted.clip, torch.full((2,), 0.98201), atol=1e-4)
        singular = torch.linalg.svdvals(fitted.P[1].P1)
        assert float(singular.max() - singular.min()) > 1e-3  # invertible, no longer orthogonal
        loss = (fitted(inputs.x[7:], inputs.state[7:]) - inputs.y[7:]).square().sum(-1).mean()
        assert float(loss / inputs.y.square().sum(-1).mean()) == pytest.approx(record["best"], rel=1e-3)

    @given(st.integers(0, 10**6), st.sampled_from([2, 4, 8]))
    def test_clamping_is_clipping_the_range(self, seed, bits):
        g = generator(seed)
        x, clip = torch.randn(5, 16, generator=g), 0.5 + 0.5 * torch.rand(2, generator=g)
        low, high = x.amin(-1, keepdim=True) * clip[0], x.amax(-1, keepdim=True) * clip[1]
        scale = (high - low) / (2**bits - 1)
        zero = torch.round(-low / scale)
        want = scale * ((torch.round(x / scale) + zero).clamp(0, 2**bits - 1) - zero)
        got = fake_quantize(flat.clip_range(x, clip), bits)
        # a value on the border of a cell may round either way after clamping
        close = (got - want).abs() < 1e-5
        assert float(close.float().mean()) > 0.95
        assert float(((got - want).abs() / scale).max()) < 1 + 1e-4


@pytest.mark.parametrize("shift", [False, True])
def test_confidence_is_that_of_the_model(shift):
    """Dream's logits are shifted by a position."""
    model, ids = small_model(), tokens()
    model.config = replace(model.config, logit_shift=shift)
    noisy = torch.where(torch.rand(ids.shape, generator=generator(2)) < 0.5, 63, ids)
    got = calibrate.prediction_confidence(model, model.blocks, noisy)
    assert torch.allclose(got, torch.softmax(model(noisy), -1).amax(-1), atol=1e-5)


def test_a_channel_that_its_norm_closes_is_not_divided_by_its_gain():
    """Nor are all of them, where a norm closes all."""
    (weight, inputs), config, gains = linear_inputs(), QuantConfig("quarot"), torch.full((2, 32), 1000.0)
    gains[0, 3:5], gains[1] = torch.tensor([0, 1e-4]), 0
    for gain, want in zip(gains, ([1e-3, 1e-3, 1e-3, 1, 1] + 27 * [1e-3], 32 * [1]), strict=True):
        fitted, _ = METHODS["quarot"].fit(weight, None, inputs._replace(gain=gain), config, generator(), None)
        assert fitted.P[0].d.tolist() == pytest.approx(want)


def test_gain_reaches_the_fit_and_is_taken_out():
    """QuaRot rotates what the norm yields before its gain: with an outlier gain the transformed tokens stay flat."""
    model = small_model()
    model.blocks[0].attn_norm.weight.data[5] *= 50
    ids = tokens()
    x, state, rope, _ = model.prepare(ids)
    block, *_ = quantize_block(model.blocks[0], x.detach(), x.detach(), state, rope, QuantConfig(method="quarot"), 0)
    normed = model.blocks[0].attn_norm(x)
    plain = normed / model.blocks[0].attn_norm.weight
    phi = block.qkv.phi(normed, state)
    assert torch.allclose(phi.norm(dim=-1), plain.norm(dim=-1), rtol=1e-4)
