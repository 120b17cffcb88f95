"""The layers that run equal their readable references."""

import copy
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from references import fake_quantized
from test_kernels import integers, randn

import kernels
import starquant
from calibrate import QuantConfig, quantize_model
from model import load_model
from runtime.layers import Centre, Grid, QuantLinear, Weight, rebuilt
from starquant import Across, Blocks, Diagonal, Kronecker

pytestmark = pytest.mark.usefixtures("strict_int_mm")


def orthogonal(n, seed=0):
    return torch.from_numpy(np.linalg.qr(np.random.default_rng(seed).standard_normal((n, n)))[0]).float()


def factors(kind):
    diagonal = Diagonal(randn(24, seed=5).abs() + 0.5)
    kronecker = Kronecker(orthogonal(4, 1), orthogonal(6, 2))
    blocks = Blocks(torch.stack([orthogonal(8, s) * torch.linspace(0.5, 2, 8) for s in range(3)]))
    return {"none": [], "diagonal": [diagonal], "dense": [orthogonal(24)], "kronecker": [kronecker],
            "block-diagonal": [blocks], "two": [diagonal, kronecker],
            "across blocks": [blocks, Across(orthogonal(3))]}[kind]


KINDS = ("none", "diagonal", "dense", "kronecker", "block-diagonal", "two", "across blocks")


class TestQuantLinear:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("bits", [2, 3, 4, 8])
    @pytest.mark.parametrize("gates", [(0, 0), (2, 3)])
    @pytest.mark.parametrize("with_bias", [False, True])
    @pytest.mark.parametrize("symmetric", [False, True])
    def test_equals_its_reference_and_eq13(self, kind, bits, gates, with_bias, symmetric):
        x, weight = randn(2, 5, 24), randn(7, 24, seed=1)
        state = torch.tensor([[1, 0, 1, 1, 0], [0, 0, 1, 0, 1]]).bool()
        bias = randn(7, seed=2) if with_bias else None
        layer = QuantLinear.fold(weight, factors(kind), *gates, abits=bits, wbits=bits, bias=bias, symmetric=symmetric)
        assert (layer.weight_zero is None) == symmetric
        y = layer(x, state)
        assert y.shape == (2, 5, 7)
        torch.testing.assert_close(y, fake_quantized(layer, x, state), rtol=1e-5, atol=1e-5)
        P = factors(kind) or Diagonal(torch.ones(24))
        want = starquant.sgat_linear(x, state, P, weight, *gates, bits, bits, bias, symmetric)
        torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("kind", KINDS)
    def test_many_bits_approach_the_full_precision_linear(self, kind):
        x, weight, bias = randn(64, 24), randn(7, 24, seed=1), randn(7, seed=2)
        layer, exact_y = QuantLinear.fold(weight, factors(kind), abits=8, wbits=8, bias=bias), F.linear(x, weight, bias)
        assert float((layer(x) - exact_y).norm() / exact_y.norm()) < 0.02

    def test_the_state_picks_the_gate(self):
        x, weight = randn(6, 24), randn(7, 24, seed=1)
        layer = QuantLinear.fold(weight, factors("dense"), 2, 3)
        mixed = layer(x, torch.tensor([1, 0, 1, 1, 0, 0]).bool())
        masked, unmasked = layer(x, torch.ones(6).bool()), layer(x, torch.zeros(6).bool())
        assert torch.equal(mixed[[0, 2, 3]], masked[[0, 2, 3]])
        assert torch.equal(mixed[[1, 4, 5]], unmasked[[1, 4, 5]])
        assert not torch.allclose(masked, unmasked, atol=1e-2)

    def test_asymmetric_weights(self):
        codes, zero = integers(-8, 7, 7, 24), integers(-8, 7, 7, dtype=np.int32)
        scale = randn(7).abs() + 0.1
        layer = QuantLinear(weight=Weight(codes, scale, zero), grid=Grid(), P=factors("kronecker"), d_m=1, d_u=1)
        x, state = randn(5, 24), torch.tensor([1, 0, 1, 0, 0]).bool()
        torch.testing.assert_close(layer.weight(), scale[:, None] * (codes.float() - zero[:, None]))
        torch.testing.assert_close(layer(x, state), fake_quantized(layer, x, state), rtol=1e-5, atol=1e-5)

    def test_both_backends_give_the_same_bits(self, monkeypatch):
        layer, x = QuantLinear.fold(randn(7, 24), factors("kronecker"), 1, 1), randn(5, 24, seed=1)
        state, outputs = torch.tensor([1, 0, 1, 0, 0]).bool(), []
        for chosen in ("int_mm", "float"):
            monkeypatch.setattr(kernels, "backend", lambda device, chosen=chosen: chosen)
            outputs.append(layer(x, state))
        assert torch.equal(*outputs)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_output_dtype_is_the_inputs(self, dtype):
        layer = QuantLinear.fold(randn(7, 24), factors("dense"), bias=randn(7, seed=2))
        x = randn(5, 24, seed=1).to(dtype)
        assert layer(x).dtype == fake_quantized(layer, x).dtype == dtype
        assert torch.equal(layer(x), layer(x.float()).to(dtype))

    @pytest.mark.parametrize("bits", [2, 3, 4, 8])
    def test_asymmetric_codes_fill_the_range_of_each_row(self, bits):
        weight = randn(7, 25) + 0.5
        layer = QuantLinear.fold(weight, wbits=bits, symmetric=False)
        assert (layer.codes().amin(1) == -(2 ** (bits - 1))).all()
        assert (layer.codes().amax(1) == 2 ** (bits - 1) - 1).all()
        torch.testing.assert_close(layer.weight(), starquant.fake_quantize(weight, bits))

    @pytest.mark.parametrize("bits", [2, 3, 4, 8])
    def test_codes_are_those_of_the_symmetric_quantizer(self, bits):
        weight = randn(7, 25)
        layer = QuantLinear.fold(weight, wbits=bits)
        largest = 2 ** (bits - 1) - 1
        want = torch.round(weight / (weight.abs().amax(1, keepdim=True) / largest))
        assert torch.equal(layer.codes().float(), want)
        assert int(layer.codes().abs().max()) == largest
        assert layer.weight_packed.numel() == (7 * 13 if bits <= 4 else 7 * 25)
        torch.testing.assert_close(layer.weight(), starquant.fake_quantize(weight, bits, symmetric=True))

    def test_packed_codes_come_with_their_width(self):
        layer = QuantLinear.fold(randn(7, 25))
        packed = layer.weight_packed.clone()
        packed[:, -1] |= 0x70  # nobody's code
        again = QuantLinear(weight=Weight(packed, layer.weight_scale, width=25), grid=Grid())
        assert torch.equal(again.weight_sum, layer.weight_sum)
        assert torch.equal(again(randn(5, 25)), layer(randn(5, 25)))
        for width in (None, 24, 27):
            with pytest.raises(ValueError, match="13 packed bytes do not hold"):
                QuantLinear(weight=Weight(packed, layer.weight_scale, width=width), grid=Grid())

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize(("wbits", "asymmetric", "with_bias"),
                             [(4, False, False), (4, True, True), (8, False, True), (3, True, False)])
    def test_rebuilt_from_its_tensors_bit_by_bit(self, kind, wbits, asymmetric, with_bias):
        half = 2 ** (wbits - 1)
        zero = integers(-half, half - 1, 7, dtype=np.int32) if asymmetric else None
        weight = Weight(integers(-half, half - 1, 7, 24), randn(7).abs(), zero, wbits)
        more = {"bias": randn(7, seed=3), "centre": Centre(randn(2, 24, seed=4), randn(2, 7, seed=5))}
        layer = QuantLinear(weight=weight, grid=Grid(), P=factors(kind), d_m=2, d_u=3, **more if with_bias else {})
        tensors = {k: v.clone() for k, v in layer.state_dict().items()}
        assert "weight_sum" not in tensors
        again = QuantLinear.from_tensors(tensors, 24, 2, 3, 4, wbits)
        assert again.kinds == layer.kinds
        assert list(again.state_dict()) == list(tensors)
        assert all(torch.equal(again.state_dict()[k], v) for k, v in tensors.items())
        assert torch.equal(again.weight_sum, layer.weight_sum)
        assert again.weight_packed.data_ptr() == tensors["weight_packed"].data_ptr()
        x, state = randn(5, 24), torch.tensor([1, 0, 1, 0, 0]).bool()
        assert torch.equal(again(x, state), layer(x, state))


class TestPhi:
    @pytest.mark.parametrize("kind", KINDS)
    def test_is_eq11_of_centred_tokens(self, kind):
        mean, state = randn(2, 24, seed=3), torch.arange(15).reshape(3, 5) % 3 == 0
        layer = QuantLinear(weight=Weight(integers(-8, 7, 7, 24), torch.ones(7)), grid=Grid(), P=factors(kind), d_m=2,
                            d_u=3, centre=Centre(mean, randn(2, 7)))
        x = randn(3, 5, 24, seed=1)
        want = starquant.transform(x - mean[state.long()], factors(kind), starquant.state_gate(state, 24, 2, 3))
        assert torch.equal(layer.phi(x, state), want)
        assert layer.phi(x.bfloat16(), state).dtype == torch.float32

    def test_finish_adds_the_bias_and_what_centring_took_off(self):
        bias, shift, y, state = randn(7), randn(2, 7, seed=1), randn(5, 7, seed=2), torch.tensor([1, 0, 0, 1, 0]).bool()
        weight = Weight(integers(-8, 7, 7, 24), torch.ones(7))
        layer = QuantLinear(weight=weight, grid=Grid(), bias=bias, centre=Centre(randn(2, 24), shift))
        assert torch.equal(layer.finish(y, state), torch.stack([row + bias + shift[int(s)] for row, s in
                                                                zip(y, state, strict=True)]))
        assert QuantLinear(weight=weight, grid=Grid()).finish(y) is y


class TestConvertedTensors:
    """P in another dtype is made once, and never outlives the tensors it was made of."""

    x, state = randn(5, 24, seed=1), torch.tensor([1, 0, 1, 0, 0]).bool()

    def layer(self, seed=0):
        layer = QuantLinear.fold(randn(7, 24, seed=seed), factors("two"), 2, 3)
        return layer, layer(self.x, self.state)

    def test_are_made_once(self, monkeypatch):
        layer, y = self.layer()
        monkeypatch.setattr(starquant.Factor, "to", None)
        monkeypatch.setattr("runtime.layers.subspace_gates", None)
        assert torch.equal(layer(self.x, self.state), y)

    def test_a_cast_changes_nothing(self):
        layer, y = self.layer()
        layer.to(torch.bfloat16)
        fresh = QuantLinear.from_tensors(layer.state_dict(), 24, 2, 3, 4, 4)
        assert torch.equal(layer(self.x, self.state), fresh(self.x, self.state))
        assert torch.equal(layer(self.x, self.state), y)

    def test_follow_the_tensors_that_are_loaded(self):
        (layer, _), (other, _) = self.layer(), self.layer(seed=9)
        other_tensors = {k: v * 2 if k.startswith("transform") else v for k, v in other.state_dict().items()}
        layer.load_state_dict(other_tensors)
        fresh = QuantLinear.from_tensors(other_tensors, 24, 2, 3, 4, 4)
        assert torch.equal(layer(self.x, self.state), fresh(self.x, self.state))
        assert torch.equal(layer.weight_sum, other.weight_sum)

    @pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
    def test_are_not_copied(self, duplicate):
        layer, y = self.layer()
        again = duplicate(layer)
        assert not again._converted
        assert torch.equal(again(self.x, self.state), y)
        assert list(again.state_dict()) == list(layer.state_dict())


def test_rebuilt_shares_what_it_does_not_replace():
    old = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 2))
    other = torch.nn.Identity()
    new = rebuilt(old, **{"1": other})
    assert new[0] is old[0]
    assert new[1] is other
    assert old[1] is not other


@pytest.mark.parametrize("setting", [{"method": "starquant", "epochs": 0}, {"method": "quarot", "kv_bits": 4},
                                     {"method": "rtn", "head_bits": 8}])
def test_a_model_that_is_cast_keeps_its_scales(small_folder, tmp_path, setting):
    tokens = torch.randint(1000, (4, 12), generator=torch.Generator().manual_seed(0))
    model = quantize_model(load_model(small_folder, "cpu"), tokens, QuantConfig(**setting))
    model.save(tmp_path / "q")
    want = load_model(tmp_path / "q", "cpu", torch.bfloat16)(tokens)
    got = model.to(torch.bfloat16)(tokens)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, want)


@pytest.mark.parametrize("method", ["rtn", "starquant+"])
def test_an_int8_model_loads_what_it_saves(small_folder, tmp_path, method):
    tokens = torch.randint(1000, (4, 12), generator=torch.Generator().manual_seed(0))
    quantize_model(load_model(small_folder, "cpu"), tokens, QuantConfig(method)).save(tmp_path / "q")
    model = load_model(tmp_path / "q", "cpu", weights="int8")
    want = model(tokens)
    model.load_state_dict(model.state_dict())
    assert torch.equal(model(tokens), want)
