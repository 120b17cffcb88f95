"""The model and the sampler against what the reference implementations of LLaDA and Dream compute (tests/fixtures)."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

import model as model_module
from checkpoint import loading
from checkpoint.families import FUSED, ModelConfig
from model import DiffusionLM, Linear, RMSNorm, load_model, rope_table, rotate, stream, write
from runtime import sampling
from runtime.processes import Refused
from runtime.sampling import denoise, generate

FIXTURES = Path(__file__).parent / "fixtures"
REFERENCE = {f: load_file(FIXTURES / f / "parity.safetensors") for f in ("llada", "dream")}
GENERATIONS = json.loads((FIXTURES / "llada" / "parity.json").read_text())["generate"]
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
    _, _, table, mask = model.prepare(reference["mask.input_ids"], reference["mask.attention_mask"])
    want = rope_table(reference["mask.position_ids"][:, None], model.config, torch.float32)
    assert all(torch.equal(*pair) for pair in zip(table, want, strict=True))
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
        got = rotate(x, *rope_table(positions, tiny_config(rope_theta=theta), torch.float32))
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
        cos, sin = rope_table(positions, tiny_config(rope_theta=theta, head_dim=128), torch.float32)
        inverse = 1.0 / (theta ** (torch.arange(0, 128, 2).float() / 128))
        angle = torch.cat([torch.outer(positions.float(), inverse)] * 2, -1)
        assert torch.equal(cos, angle.cos())
        assert torch.equal(sin, angle.sin())

    def test_scores_depend_on_distance_only(self):
        q, k = torch.randn(2, 1, 1, 1, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        config = tiny_config()

        def score(i, j):
            turned = [rotate(x, *rope_table(torch.tensor([p]), config, torch.float32)) for x, p in ((q, i), (k, j))]
            return float((turned[0] * turned[1]).sum())

        assert score(3, 1) == pytest.approx(score(9, 7), abs=1e-5)
        assert score(3, 1) != pytest.approx(score(1, 3), abs=1e-2)

    def test_llada_rotates_in_fp32_and_dream_in_the_models_dtype(self):
        for fp32, dtype in ((True, torch.float32), (False, torch.bfloat16)):
            cos, _ = rope_table(torch.arange(3), tiny_config(rope_fp32=fp32), torch.bfloat16)
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


# ---- sampler -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", GENERATIONS)
def test_generations_equal_the_reference(llada, case):
    reference, spec = REFERENCE["llada"], GENERATIONS[case]
    if spec["seed"] is not None:
        torch.manual_seed(spec["seed"])
    out = generate(llada, reference[f"gen.{case}.prompt"], spec["steps"], spec["gen_length"], spec["block_length"],
                   cfg_scale=spec.get("cfg_scale", 0.0), algorithm=spec.get("remasking", "low_confidence"),
                   attention_mask=reference.get(f"gen.{case}.attention_mask"))
    assert torch.equal(out, reference[f"gen.{case}.out"])


def test_suffix_greedy_prediction_equals_the_reference(llada):
    """Six masks after a prefix, one per step, the most confident first."""
    prefix, continuation = (REFERENCE["llada"][f"greedy.{k}"] for k in ("prefix", "continuation"))
    assert torch.equal(generate(llada, prefix[None], 6, 6)[0, len(prefix):], continuation)


class TestDenoise:
    PROMPT = torch.arange(1, 6).repeat(2, 1)

    @pytest.mark.parametrize(("steps", "length", "block", "counts"), [
        (5, 12, None, [3, 3, 2, 2, 2]), (12, 12, 12, [1] * 12), (1, 7, 7, [7]), (9, 12, 4, [2, 1, 1] * 3),
        (4, 8, 4, [2, 2, 2, 2]), (8, 4, 4, [1, 1, 1, 1, 0, 0, 0, 0])])
    @pytest.mark.parametrize("algorithm", ["low_confidence", "random"])
    def test_commits_so_many_tokens_block_by_block(self, llada, steps, length, block, counts, algorithm):
        before = torch.cat((self.PROMPT, torch.full((2, length), llada.mask_id)), 1)
        seen, g = list(denoise(llada, self.PROMPT, steps, length, block, algorithm=algorithm,
                               generator=torch.Generator().manual_seed(0))), block or length
        assert [s.index for s in seen] == list(range(steps))
        for i, step in enumerate(seen):
            assert step.committed.sum(1).tolist() == [counts[i]] * 2
            # only masks are committed, only what is committed changes, and it is no mask afterwards
            assert torch.equal(step.ids[~step.committed], before[~step.committed])
            assert bool((before[step.committed] == llada.mask_id).all())
            assert bool((step.ids[step.committed] != llada.mask_id).all())
            # only inside the current block; every block before it is finished
            start = 5 + i // (steps * g // length) * g
            columns = step.committed.any(0).nonzero()[:, 0]
            assert bool(((columns >= start) & (columns < start + g)).all())
            assert not bool((before[:, :start] == llada.mask_id).any())
            before = step.ids
        assert not bool((before == llada.mask_id).any())
        assert torch.equal(before[:, :5], self.PROMPT)

    def test_commits_the_most_confident_prediction(self, llada):
        first = next(denoise(llada, self.PROMPT[:1], 6, 6))
        ids = torch.cat((self.PROMPT[:1], torch.full((1, 6), llada.mask_id)), 1)
        with torch.no_grad():
            probabilities = np.exp(llada(ids)[0].double().numpy())
        best = (probabilities / probabilities.sum(1, keepdims=True)).max(1)[5:]
        assert first.committed[0].nonzero().item() == 5 + best.argmax()
        assert first.ids[0, 5 + best.argmax()] == probabilities[5 + best.argmax()].argmax()

    @given(blocks=st.integers(1, 4), steps=st.integers(1, 25), length=st.integers(1, 20))
    def test_block_schedule(self, blocks, steps, length):
        """Blocks left to right; in each, every token is committed, the remainder in the first steps."""
        schedule = list(sampling.block_schedule(5, steps * blocks, length * blocks, length))
        assert [end for end, _ in schedule] == [5 + length * (b + 1) for b in range(blocks) for _ in range(steps)]
        for b in range(blocks):
            row = [count for _, count in schedule[b * steps : (b + 1) * steps]]
            assert sum(row) == length
            assert max(row) - min(row) <= 1
            assert row == sorted(row, reverse=True)

    @pytest.mark.parametrize(("arguments", "message"), [
        ({"steps": 0, "gen_length": 8}, "at least 1"), ({"steps": 4, "gen_length": 0}, "at least 1"),
        ({"steps": 4, "gen_length": 8, "block_length": -1}, "at least 1"),
        ({"steps": 4, "gen_length": 8, "block_length": 3}, "gen_length 8 is not a multiple of block_length 3"),
        ({"steps": 5, "gen_length": 8, "block_length": 4}, "steps 5 is not a multiple of the 2 blocks"),
        ({"steps": 4, "gen_length": 8, "algorithm": "greedy"}, "algorithm 'greedy' is not one of")])
    def test_wrong_arguments_are_named(self, llada, arguments, message):
        with pytest.raises(ValueError, match=message):
            generate(llada, self.PROMPT, **arguments)

    def test_a_predicted_mask_commits_nothing(self):
        biased = load_model(str(FIXTURES / "llada"), "cpu", torch.float32)
        ids = torch.cat((self.PROMPT, torch.full((2, 4), biased.mask_id)), 1)
        with torch.no_grad():  # a head that answers [MASK] whenever it is asked
            biased.head.weight[biased.mask_id] = biased.hidden(ids)[:, 5:].mean((0, 1)) * 10
            assert bool((biased(ids)[:, 5:].argmax(-1) == biased.mask_id).all())
        for step in denoise(biased, self.PROMPT, 4, 4):
            assert torch.equal(step.ids, ids)
            assert not step.committed.any()

    def test_end_of_text_can_be_suppressed(self):
        biased = load_model(str(FIXTURES / "llada"), "cpu", torch.float32)
        eos = biased.config.eos_id
        with torch.no_grad():  # a head that answers end-of-text whenever it may
            hidden = biased.hidden(torch.cat((self.PROMPT, torch.full((2, 4), biased.mask_id)), 1))
            biased.head.weight[eos] = hidden[:, 5:].mean((0, 1)) * 10
        assert bool((generate(biased, self.PROMPT, 4, 4) == eos).any())
        assert not bool((generate(biased, self.PROMPT, 4, 4, logits_eos_inf=True) == eos).any())

    def test_temperature_is_seeded(self, llada):
        def sample(seed, temperature):
            return generate(llada, self.PROMPT, 8, 8, temperature=temperature,
                            generator=torch.Generator().manual_seed(seed))

        assert torch.equal(sample(0, 1.0), sample(0, 1.0))
        assert not torch.equal(sample(0, 1.0), sample(1, 1.0))
        assert torch.equal(sample(0, 0.0), sample(1, 0.0))

    @pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
    def test_gumbel_max_samples_the_softmax_at_a_temperature(self, temperature):
        logits, n = torch.tensor([1.0, 0.0, -1.0, 2.0]), 40_000
        g = torch.Generator().manual_seed(0)
        noise = torch.rand(n, 4, dtype=torch.float64, generator=g)
        picks = sampling.gumbel_max(logits.expand(n, 4), temperature, noise).argmax(-1)
        frequency = np.bincount(picks.numpy(), minlength=4) / n
        p = np.exp(logits.double().numpy() / temperature)
        p /= p.sum()
        assert np.abs(frequency - p).max() < 4 * (0.25 / n) ** 0.5


class TestGuidance:
    def test_formula(self, llada):
        ids = torch.cat((torch.arange(1, 6).repeat(2, 1), torch.full((2, 4), llada.mask_id)), 1)
        empty = ids.clone()
        empty[:, :5] = llada.mask_id
        with torch.no_grad():
            conditional, unconditional = llada(ids).double(), llada(empty).double()
            for scale in (0.5, 2.0):
                got = sampling.guided_logits(llada, ids, ids != llada.mask_id, scale)
                want = unconditional + (scale + 1) * (conditional - unconditional)
                torch.testing.assert_close(got.double(), want, rtol=0, atol=2e-4)
            assert torch.equal(sampling.guided_logits(llada, ids, ids != llada.mask_id, 0.0), llada(ids))

    def test_padding_stays_hidden_in_both_halves(self, llada):
        ids = torch.cat((torch.arange(1, 6).repeat(2, 1), torch.full((2, 4), llada.mask_id)), 1)
        mask = torch.ones(2, 9, dtype=torch.long)
        mask[1, :2] = 0
        other = ids.clone()
        other[1, :2] = 77
        with torch.no_grad():
            outputs = [sampling.guided_logits(llada, i, ids != llada.mask_id, 1.0, mask)[1, 2:] for i in (ids, other)]
        torch.testing.assert_close(*outputs)

    def test_the_model_runs_once_per_step_on_twice_the_batch(self, llada):
        sizes = []
        handle = llada.embed.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
        generate(llada, TestDenoise.PROMPT, 4, 4)
        generate(llada, TestDenoise.PROMPT, 4, 4, cfg_scale=1.0)
        handle.remove()
        assert sizes == [2] * 4 + [4] * 4


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


@pytest.fixture(scope="module")
def tiny():
    return load_model("tiny", "cpu")


class TestWrite:
    TEXTS = ("Ann has 4 boxes of 6 eggs. Then Ann sells 5. How many eggs?\n", "Ben has 3 pens.\n")

    def test_a_batch_is_what_each_text_gets_alone(self, tiny):
        alone = [write(tiny, text, gen_length=24) for text in self.TEXTS]
        assert alone[0] == "4*6=24\n24-5=19\n#### 19"
        assert write(tiny, list(self.TEXTS), gen_length=24) == alone
        ids = torch.tensor([tiny.tokenizer.encode(self.TEXTS[1]).ids])
        out = generate(tiny, ids, None, 24, threshold=0.9)[0, ids.shape[1] :].tolist()
        end = out.index(tiny.config.eos_id)
        assert write(tiny, self.TEXTS[1], 24, threshold=0.9) == tiny.tokenizer.decode(out[:end])

    def test_a_stream_fills_in_what_is_masked(self, tiny):
        parts = list(stream(tiny, self.TEXTS[0], gen_length=24))
        assert len(parts) == 24
        assert parts[0].count("░") >= 20
        assert parts[-1] == write(tiny, self.TEXTS[0], gen_length=24)

    def test_a_question_goes_through_the_chat_template(self, tiny, monkeypatch):
        seen = []
        monkeypatch.setattr(model_module, "denoise", lambda m, ids, *a, **k: seen.append(ids) or iter(()))
        list(stream(tiny, "How many?", chat=True))
        want = "<|startoftext|><|start_header_id|>user<|end_header_id|>\n\nHow many?<|eot_id|><|start_header_id|>" \
               "assistant<|end_header_id|>\n\n"
        assert tiny.tokenizer.decode(seen[0][0].tolist(), skip_special_tokens=False) == want

    @pytest.mark.parametrize("texts", [None, 3, [], [3], "", ["a", ""], {"a": 1}])
    def test_what_are_no_texts_is_refused(self, tiny, texts):
        with pytest.raises(Refused, match="texts must be a text or a list of texts"):
            write(tiny, texts)

    def test_a_model_without_a_tokenizer_is_named(self, models):
        with pytest.raises(Refused, match=r"has no tokenizer\.json"):
            write(models["llada"], "x")


def test_a_type_is_given_by_name_or_as_torch_has_it(tmp_path):
    assert load_model("tiny", "cpu", "bf16").norm.weight.dtype == torch.bfloat16
    assert load_model("tiny", "cpu", torch.float64).norm.weight.dtype == torch.float64
    for wrong in ("int4", torch.int8, 16):
        with pytest.raises(Refused, match="is neither bf16 nor fp32"):
            load_model("tiny", "cpu", wrong)
