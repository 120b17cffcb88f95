"""Each comparison method by its defining equation, on small random models and data."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from arguments import generator, linear_inputs
from hypothesis import given
from hypothesis import strategies as st

import calibrate
from calibrate import QuantConfig, quantize_block, quantize_model
from checkpoint.families import FUSED, read_config
from methods import METHODS, dllmquant, flat, settings_of
from methods.awq import AWQ_EXPONENTS, AWQ_SHRINK, awq_loss, awq_scale, fit_awq
from methods.dllmquant import cgq_weights, ia_aq, tmas_ratios
from methods.gptq import hessian
from methods.hadamard import rotation
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


def small_model(seed=0):
    """A random two-block model whose norm gains and weights are uneven, so that transforms matter."""
    model, g = DiffusionLM(read_config(SMALL)), generator(seed)
    for p in model.parameters():
        p.data = 1 + 0.3 * torch.randn(p.shape, generator=g) if p.ndim == 1 else (
            torch.randn(p.shape, generator=g) * p.shape[1] ** -0.5)
    return model.eval()


def tokens(n=16, length=12, seed=1):
    return torch.randint(0, 60, (n, length), generator=generator(seed))


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
