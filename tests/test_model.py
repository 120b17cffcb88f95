"""The model against what the reference implementations of LLaDA and Dream compute (tests/fixtures)."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from checkpoint import loading
from checkpoint.families import FUSED, ModelConfig
from model import DiffusionLM, Linear, RMSNorm, cos_sin, load_model, rotate
from runtime.processes import Refused
from runtime.sampling import denoise

FIXTURES = Path(__file__).parent / "fixtures"
REFERENCE = {f: load_file(FIXTURES / f / "parity.safetensors") for f in ("llada", "dream")}
LOGITS = {"rtol": 0, "atol": 1e-4}


@pytest.fixture(scope="module")
def models():
    """The tiny reference checkpoints, bf16 weights in fp32."""
    return {f: load_model(str(FIXTURES / f), "cpu", torch.float32) for f in REFERENCE}


@pytest.fixture(scope="module")
def llada(models):
    return models["llada"]


# ---- logits --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def assert_logits(model, ids, want, attention_mask=None, rows=slice(None)):
    got = model(ids, attention_mask)
    if model.config.logit_shift:  # the fixture holds Dream's raw logits: position i predicts token i + 1
        assert torch.equal(got[:, 0], got[:, 1])
        got, want = got[:, 1:], want[:, :-1]
        rows = rows if isinstance(rows, slice) else rows[:, 1:]  # those that predict a real token
    torch.testing.assert_close(got[rows], want[rows], **LOGITS)


@pytest.mark.parametrize(("family", "case"), [(f, k.removesuffix(".input_ids")) for f, tensors in REFERENCE.items()
                                              for k in tensors if k.startswith("fwd.") and k.endswith(".input_ids")])
def test_logits_equal_the_reference(models, family, case):
    reference = REFERENCE[family]
    assert_logits(models[family], reference[f"{case}.input_ids"], reference[f"{case}.logits"])


@pytest.mark.parametrize("family", REFERENCE)
def test_hidden_states_equal_the_reference(models, family):
    model, reference, seen = models[family], REFERENCE[family], []
    handles = [b.register_forward_pre_hook(lambda _, args: seen.append(args[0])) for b in model.blocks]
    with torch.no_grad():
        seen.append(model.hidden(reference["fwd.L7.B3.input_ids"]))
    for handle in handles:
        handle.remove()
    assert len(seen) == 4
    for i, hidden in enumerate(seen):
        torch.testing.assert_close(hidden, reference[f"fwd.L7.B3.hidden.{i}"], **LOGITS)


@pytest.mark.parametrize("family", REFERENCE)
def test_padded_batches_equal_the_reference(models, family):
    reference = REFERENCE[family]
    mask = reference["mask.attention_mask"]
    assert not mask.bool().all()
    # what Dream's reference predicts on padding is not meant to be compared
    rows = mask.bool() if family == "dream" else slice(None)
    assert_logits(models[family], reference["mask.input_ids"], reference["mask.logits"], mask, rows)


def test_dream_counts_positions_from_the_first_real_token(models):
    reference, model = REFERENCE["dream"], models["dream"]
    _, _, rope, mask = model.prepare(reference["mask.input_ids"], reference["mask.attention_mask"])
    want = cos_sin(reference["mask.position_ids"][:, None], model.config, torch.float32)
    assert all(torch.equal(*pair) for pair in zip(rope, want, strict=True))
    keep = reference["mask.attention_mask"].bool()
    assert torch.equal(mask[:, 0], keep[:, :, None] & keep[:, None])


@torch.no_grad()
def test_rows_that_see_nothing_are_zero_whatever_the_kernel_gives(models, monkeypatch):
    """Dream's rows of padding, from the last of which the first real token is predicted."""
    reference, model, attention = REFERENCE["dream"], models["dream"], F.scaled_dot_product_attention

    def fragile(q, k, v, attn_mask, **options):
        z = attention(q, k, v, attn_mask=attn_mask, **options)
        return z.masked_fill(~attn_mask.any(-1, keepdim=True), torch.nan)

    inputs = reference["mask.input_ids"], reference["mask.attention_mask"]
    want = model(*inputs)
    monkeypatch.setattr(F, "scaled_dot_product_attention", fragile)
    assert torch.equal(model(*inputs), want)


@pytest.mark.parametrize("family", REFERENCE)
def test_a_mask_of_ones_is_no_mask(models, family):
    ids = REFERENCE[family]["fwd.L7.B3.input_ids"]
    with torch.no_grad():
        assert torch.equal(models[family](ids, torch.ones_like(ids)), models[family](ids))


@pytest.mark.parametrize(("family", "mean"), [("llada", 0.041), ("dream", 0.030)])
def test_bf16_model_is_as_far_from_fp32_as_the_reference(family, mean):
    model, reference = load_model(str(FIXTURES / family), "cpu", torch.bfloat16), REFERENCE[family]
    with torch.no_grad():
        got = model(reference["fwd.L7.B3.input_ids"])
    assert got.dtype == torch.bfloat16
    want = reference["fwd.L7.B3.logits"]
    got, want = (got[:, 1:], want[:, :-1]) if family == "dream" else (got, want)
    assert mean / 2 < float((got.float() - want).abs().mean()) < mean * 1.5


# ---- parts ---------------------------------------------------------------------------------------------------------


def tiny_config(**changes):
    values = {"family": "llada", "d_model": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "head_dim": 8,
              "d_ffn": 48, "vocab_size": 20, "rope_theta": 100.0, "norm_eps": 1e-5, "mask_id": 19}
    return ModelConfig(**values | changes)


class TestRope:
    @given(seed=st.integers(0, 1000), theta=st.floats(10, 1e6))
    def test_equals_plane_rotations(self, seed, theta):
        """Coordinates j and j + h/2 are a plane, turned by position · θ^(−2j/h)."""
        x = torch.from_numpy(np.random.default_rng(seed).standard_normal((1, 2, 5, 8)))
        positions = torch.tensor([0, 1, 2, 7, 50])
        got = rotate(x, *cos_sin(positions, tiny_config(rope_theta=theta), torch.float32))
        for head in range(2):
            for i, position in enumerate(positions.tolist()):
                for j in range(4):
                    angle = position * theta ** (-2 * j / 8)
                    a, b = float(x[0, head, i, j]), float(x[0, head, i, j + 4])
                    want = (a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle))
                    assert float(got[0, head, i, j]) == pytest.approx(want[0], abs=2e-5)
                    assert float(got[0, head, i, j + 4]) == pytest.approx(want[1], abs=2e-5)

    @pytest.mark.parametrize("theta", [10000.0, 500000.0, 1e6])
    def test_frequencies_are_the_official_ones_to_the_last_bit(self, theta):
        """1.0 / (theta ** (arange(0, h, 2).float() / h)): one unit in the last place is seen at position 4000."""
        positions = torch.arange(4096)
        cos, sin = cos_sin(positions, tiny_config(rope_theta=theta, head_dim=128), torch.float32)
        inverse = 1.0 / (theta ** (torch.arange(0, 128, 2).float() / 128))
        angle = torch.cat([torch.outer(positions.float(), inverse)] * 2, -1)
        assert torch.equal(cos, angle.cos())
        assert torch.equal(sin, angle.sin())

    def test_scores_depend_on_distance_only(self):
        q, k = torch.randn(2, 1, 1, 1, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        config = tiny_config()

        def score(i, j):
            turned = [rotate(x, *cos_sin(torch.tensor([p]), config, torch.float32)) for x, p in ((q, i), (k, j))]
            return float((turned[0] * turned[1]).sum())

        assert score(3, 1) == pytest.approx(score(9, 7), abs=1e-5)
        assert score(3, 1) != pytest.approx(score(1, 3), abs=1e-2)

    def test_llada_rotates_in_fp32_and_dream_in_the_models_dtype(self):
        for fp32, dtype in ((True, torch.float32), (False, torch.bfloat16)):
            cos, _ = cos_sin(torch.arange(3), tiny_config(rope_fp32=fp32), torch.bfloat16)
            assert cos.dtype == dtype


class TestRMSNorm:
    @given(seed=st.integers(0, 1000), eps=st.sampled_from([1e-6, 1e-5, 0.1]))
    def test_equals_float64(self, seed, eps):
        rng = np.random.default_rng(seed)
        x, gain = rng.standard_normal((3, 6)) * rng.choice([1e-3, 1, 100]), rng.standard_normal(6)
        norm = RMSNorm(6, eps)
        norm.weight.data = torch.from_numpy(gain).float()
        with torch.no_grad():
            got = norm(torch.from_numpy(x).float())
        for row, want in zip(got.double().numpy(), x, strict=True):
            np.testing.assert_allclose(row, gain * want / np.sqrt((want**2).sum() / 6 + eps), rtol=1e-5)

    def test_rounds_to_bf16_before_the_gain(self):
        x, gain = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)).bfloat16(), 1.7109375
        norm = RMSNorm(64, 1e-5).bfloat16()
        norm.weight.data.fill_(gain)
        y = x.float()
        y = (y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt()).bfloat16()
        with torch.no_grad():
            assert torch.equal(norm(x), gain * y)


# ---- token state ---------------------------------------------------------------------------------------------------


class TestState:
    @pytest.fixture
    def seen(self, llada):
        """(name, state) of every call of a linear inside the blocks."""
        calls, handles = [], []
        for name, module in llada.named_modules():
            if isinstance(module, Linear) and name != "head":
                handles.append(module.register_forward_pre_hook(
                    lambda _, args, name=name: calls.append((name, args[1]))))
        yield calls
        for handle in handles:
            handle.remove()

    def names(self, model):
        return [f"blocks.{i}.{linear}" for i in range(model.config.n_layers) for linear in FUSED]

    @pytest.mark.parametrize("masked", [[], [0], [1, 4, 5], range(7)])
    def test_every_linear_receives_it(self, llada, seen, masked):
        ids = torch.arange(14).reshape(2, 7)
        ids[0, list(masked)] = llada.mask_id
        with torch.no_grad():
            llada(ids)
        assert [name for name, _ in seen] == self.names(llada)
        for _, state in seen:
            assert state.dtype == torch.bool
            assert state[0].nonzero()[:, 0].tolist() == list(masked)
            assert not state[1].any()

    def test_follows_the_denoising(self, llada, seen):
        prompt = REFERENCE["llada"]["gen.semi_32_b8.prompt"]
        before = torch.cat((prompt, torch.full((1, 8), llada.mask_id)), 1)
        for step in denoise(llada, prompt, 4, 8):
            assert [name for name, _ in seen] == self.names(llada)
            for _, state in seen:
                assert torch.equal(state, before == llada.mask_id)
            before = step.ids
            seen.clear()


# ---- saving --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", REFERENCE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_and_loaded_again_bit_by_bit(models, family, dtype, tmp_path):
    """The fixture's weights are bf16, so both dtypes hold them exactly."""
    model, ids = models[family], REFERENCE[family]["fwd.L7.B3.input_ids"]
    model.save(tmp_path, dtype)
    again = load_model(str(tmp_path), "cpu", torch.float32)
    assert again.config == model.config
    with torch.no_grad():
        assert torch.equal(again(ids), model(ids))
    saved, original = (load_file(f / "model.safetensors") for f in (tmp_path, FIXTURES / family))
    assert {k: v.shape for k, v in saved.items()} == {k: v.shape for k, v in original.items()}
    assert all(v.dtype == dtype for v in saved.values())
    assert all(torch.equal(saved[k].float(), v.float()) for k, v in original.items())


def test_names_and_shapes_are_those_a_checkpoint_must_have(models):
    for family, model in models.items():
        original = load_file(FIXTURES / family / "model.safetensors")
        assert loading.expected_tensors(model.config) == {k: tuple(v.shape) for k, v in original.items()}


def test_tied_head_is_the_embedding():
    torch.manual_seed(0)
    model = DiffusionLM(tiny_config(tied=True))
    assert model.head.weight is model.embed.weight
    ids = torch.tensor([[1, 19, 3]])
    with torch.no_grad():
        torch.testing.assert_close(model(ids), model.hidden(ids) @ model.embed.weight.T)
        scaled = DiffusionLM(tiny_config(tied=True, logit_scale=0.25))
        scaled.load_state_dict(model.state_dict())
        torch.testing.assert_close(scaled(ids), model(ids) / 4)


def test_a_type_is_given_by_name_or_as_torch_has_it(tmp_path):
    assert load_model("tiny", "cpu", "bf16").norm.weight.dtype == torch.bfloat16
    assert load_model("tiny", "cpu", torch.float64).norm.weight.dtype == torch.float64
    load_model("tiny", "cpu").save(tmp_path / "m", "fp32")
    assert load_file(tmp_path / "m" / "model.safetensors")["model.transformer.ln_f.weight"].dtype == torch.float32
    for wrong in ("int4", torch.int8, 16):
        with pytest.raises(Refused, match="is neither bf16 nor fp32"):
            load_model("tiny", "cpu", wrong)
        with pytest.raises(Refused, match="is neither bf16 nor fp32"):
            load_model("tiny", "cpu").save(tmp_path / "none", wrong)
    assert not (tmp_path / "none").exists()
