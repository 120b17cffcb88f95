"""Checkpoints as models: every variant of a family against an independent forward, tied heads, mask tokens, shards."""

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_families import A2D, A2D_QWEN2, DREAM, FIXTURES, LLADA, REAL

from calibrate import QuantConfig, quantize_model
from checkpoint.families import NAMES, read_config
from checkpoint.folder import INDEX, Checkpoint
from checkpoint.loading import expected_tensors
from model import DiffusionLM, load_model
from runtime.processes import Refused

# ---- variants against an independent forward in float64 ------------------------------------------------------------


def reference_logits(raw: dict, t: dict, ids, attention_mask=None):
    """A forward written from the facts about each family, one head and one row at a time; raw logits, not shifted."""
    llada, dream = raw["model_type"] == "llada", raw["model_type"] == "Dream"
    get = (lambda a, b: raw[a]) if llada else (lambda a, b: raw[b])
    d, heads, eps = get("d_model", "hidden_size"), get("n_heads", "num_attention_heads"), raw["rms_norm_eps"]
    groups = get("n_kv_heads", "num_key_value_heads") or heads
    h = raw.get("head_dim", d // heads)
    p = {k: v.double() for k, v in t.items()}
    n = ("model.transformer.blocks.{}.", "attn_norm", "ff_norm", "", "attn_out", "ff_proj", "up_proj", "ff_out",
         "model.transformer.wte", "model.transformer.ln_f", "model.transformer.ff_out") if llada else (
        "model.layers.{}.", "input_layernorm", "post_attention_layernorm", "self_attn.", "self_attn.o_proj",
        "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "model.embed_tokens", "model.norm", "lm_head")

    def norm(x, w):
        return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * p[w + ".weight"]

    def linear(x, w):
        return x @ p[w + ".weight"].T + p.get(w + ".bias", 0)

    def rotate(x, positions):  # (L, h): pairs (j, j + h/2) as complex numbers
        z = torch.complex(x[:, : h // 2], x[:, h // 2 :])
        j = torch.arange(h // 2, dtype=torch.float64)
        angle = positions.double()[:, None] / raw["rope_theta"] ** (2 * j / h)
        z = z * torch.polar(torch.ones_like(angle), angle)
        return torch.cat((z.real, z.imag), -1)

    rows = []
    for row, keep in zip(ids, torch.ones_like(ids) if attention_mask is None else attention_mask, strict=True):
        x = p[n[8] + ".weight"][row]
        positions = torch.arange(len(row))
        if dream and not keep.all():
            positions = torch.where(keep.bool(), keep.cumsum(0) - 1, 1)
        for i in range(get("n_layers", "num_hidden_layers")):
            b = n[0].format(i)
            y = norm(x, b + n[1])
            q, k, v = (linear(y, f"{b}{n[3]}{c}_proj") for c in "qkv")
            out = []
            for head in range(heads):
                g = head // (heads // groups)
                qh, kh, vh = q[:, head * h : head * h + h], k[:, g * h : g * h + h], v[:, g * h : g * h + h]
                if b + "self_attn.q_norm.weight" in p:
                    qh, kh = norm(qh, b + "self_attn.q_norm"), norm(kh, b + "self_attn.k_norm")
                scores = rotate(qh, positions) @ rotate(kh, positions).T / h**0.5
                scores[:, keep == 0] = -torch.inf
                out.append(scores.softmax(-1) @ vh)
            x = x + linear(torch.cat(out, -1), b + n[4])
            y = norm(x, b + n[2])
            gate = linear(y, b + n[5])
            x = x + linear(gate * torch.sigmoid(gate) * linear(y, b + n[6]), b + n[7])
        rows.append(norm(x, n[9]))
    x = torch.stack(rows)
    tied = raw["weight_tying"] if llada else raw["tie_word_embeddings"]
    logits = linear(x, n[8] if tied else n[10])
    return logits / d**0.5 if raw.get("scale_logits") else logits


SMALL = {"d_model": 48, "n_layers": 2, "n_heads": 4, "n_kv_heads": 4, "mlp_hidden_size": 80, "vocab_size": 64,
         "embedding_size": 64, "mask_token_id": 63, "eos_token_id": 62, "pad_token_id": 62}
SMALL_DREAM = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
               "intermediate_size": 80, "vocab_size": 64, "mask_token_id": 63, "eos_token_id": 62}
VARIANTS = {
    "llada": LLADA | SMALL,
    "llada grouped-query": LLADA | SMALL | {"n_kv_heads": 2},
    "llada multi-query": LLADA | SMALL | {"n_kv_heads": 1},
    "llada biases": LLADA | SMALL | {"include_qkv_bias": True, "n_kv_heads": 2},
    "llada tied": LLADA | SMALL | {"weight_tying": True},
    "llada larger embedding": LLADA | SMALL | {"embedding_size": 72, "mask_token_id": 70},
    "llada scaled, tied, larger": LLADA | SMALL | {"scale_logits": True, "weight_tying": True, "embedding_size": 72},
    "llada rope in model dtype": LLADA | SMALL | {"rope_full_precision": False, "rope_theta": 10000},
    "llada mlp ratio, null sizes": LLADA | SMALL | {"mlp_hidden_size": None, "n_kv_heads": None,
                                                    "embedding_size": None},
    "dream": DREAM | SMALL_DREAM,
    "dream tied": DREAM | SMALL_DREAM | {"tie_word_embeddings": True},
    "dream without grouping": DREAM | SMALL_DREAM | {"num_key_value_heads": None},
    "a2d qwen3": A2D,
    "a2d qwen3 untied": A2D | {"tie_word_embeddings": False},
    "a2d qwen2": A2D_QWEN2,
}


def random_checkpoint(folder, raw: dict, dtype=torch.bfloat16, seed=0, **config_file):
    """A checkpoint of this config in which every tensor is random, norms and biases too; its tensors."""
    g = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in expected_tensors(read_config(raw)).items():
        scale = 0.3 if len(shape) == 1 else shape[1] ** -0.5
        tensors[name] = ((len(shape) == 1 and "norm" in name) + scale * torch.randn(shape, generator=g)).to(dtype)
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(raw))
    return tensors


@pytest.mark.parametrize("variant", VARIANTS)
def test_variant_equals_independent_forward(variant, tmp_path):
    """In float64 up to the fp32 rope tables; with and without a left-padded row; loading, saving, loading again."""
    raw = VARIANTS[variant]
    tensors = random_checkpoint(tmp_path / "a", raw)
    model = load_model(tmp_path / "a", "cpu", torch.float64)
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 62, (2, 11), generator=g)
    ids[torch.rand(ids.shape, generator=g) < 0.5] = model.mask_id
    shift = raw["model_type"] == "Dream"
    padding = torch.ones_like(ids)
    padding[1, :4] = 0
    with torch.no_grad():
        for mask in (None, torch.ones_like(ids), padding):
            ours, theirs = model(ids, mask), reference_logits(raw, tensors, ids, mask)
            real = padding.bool() if mask is padding else padding.bool() | True
            if shift:
                ours, theirs, real = ours[:, 1:], theirs[:, :-1], real[:, :-1]
            assert ours.shape == theirs.shape
            torch.testing.assert_close(ours[real], theirs[real], atol=2e-5, rtol=0)
        where = ids == model.mask_id
        torch.testing.assert_close(model(ids, padding, where), model(ids, padding)[where], atol=1e-12, rtol=0)
        model.save(tmp_path / "b")
        again = load_model(tmp_path / "b", "cpu", torch.float64)
        assert torch.equal(again(ids), model(ids))
    assert again.config == model.config


def test_padding_changes_nothing_for_the_other_tokens(tmp_path):
    """A right-padded row has the logits of the row alone, in every family."""
    for i, variant in enumerate(("llada grouped-query", "dream", "a2d qwen3")):
        random_checkpoint(tmp_path / str(i), VARIANTS[variant])
        model = load_model(tmp_path / str(i), "cpu", torch.float64)
        ids = torch.randint(0, 62, (1, 9), generator=torch.Generator().manual_seed(2))
        padded = torch.cat((ids, torch.zeros(1, 5, dtype=torch.long)), 1)
        with torch.no_grad():
            alone, together = model(ids), model(padded, (torch.arange(14) < 9).long()[None])
        torch.testing.assert_close(together[:, :9], alone, atol=1e-10, rtol=0)


# ---- dLLM's Qwen models --------------------------------------------------------------------------------------------


def test_a2d_takes_its_mask_from_the_tokenizer_and_theta_from_either_place(tmp_path):
    newer = {k: v for k, v in A2D.items() if k != "rope_theta"}
    newer |= {"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}}
    assert read_config(newer) == read_config(A2D)
    random_checkpoint(tmp_path, A2D)
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in A2D.items() if k != "mask_token_id"}))
    with pytest.raises(Refused, match="mask token"):
        load_model(tmp_path, "cpu")
    (tmp_path / "added_tokens.json").write_text('{"<|mask|>": 63}')
    model = load_model(tmp_path, "cpu")
    assert model.mask_id == 63
    model.save(tmp_path / "saved")
    assert load_model(tmp_path / "saved", "cpu").mask_id == 63


def test_tied_head_saved_twice_must_be_the_embedding(tmp_path):
    tensors = random_checkpoint(tmp_path, A2D)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    load_model(tmp_path, "cpu")
    tensors["lm_head.weight"][3, 3] += 1
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(Refused, match=r"embedding and head are tied, but 'lm_head.weight' differs"):
        load_model(tmp_path, "cpu")


def test_a_tied_model_may_hold_its_one_matrix_under_the_name_of_the_head(tmp_path):
    tensors = random_checkpoint(tmp_path, A2D)
    embed = tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, tmp_path / "model.safetensors")
    model = load_model(tmp_path, "cpu", torch.bfloat16)
    assert torch.equal(model.embed.weight, embed)
    assert model.head.weight is model.embed.weight
    quantized = quantize_model(load_model(tmp_path, "cpu"), torch.zeros(2, 4, dtype=torch.long), QuantConfig("rtn"))
    quantized.save(tmp_path / "q")
    assert load_model(tmp_path / "q", "cpu").embed.weight.shape == embed.shape


@pytest.mark.parametrize("raw", [A2D | {"mask_token_id": None}, {k: v for k, v in A2D.items() if k != "mask_token_id"}])
def test_a_mask_token_that_one_file_of_the_tokenizer_knows(raw, tmp_path):
    random_checkpoint(tmp_path, A2D)
    (tmp_path / "config.json").write_text(json.dumps(raw))
    (tmp_path / "tokenizer_config.json").write_text('{"mask_token": null}')
    (tmp_path / "added_tokens.json").write_text('{"<|MASK|>": 61}')
    with pytest.raises(Refused, match=r"no mask_token_id, and tokenizer_config\.json, .* list no '<\|mask\|>'"):
        load_model(tmp_path, "cpu")
    (tmp_path / "special_tokens_map.json").write_text('{"mask_token": {"content": "<|MASK|>"}}')
    assert Checkpoint(tmp_path).config.mask_id == 61


def test_a_block_diffusion_model_is_taken_for_its_sibling_with_a_word(tmp_path):
    random_checkpoint(tmp_path / "Qwen3-0.6B-diffusion-BD3LM-v0.1", A2D)
    with pytest.warns(UserWarning, match="block-diffusion model"):
        load_model(tmp_path / "Qwen3-0.6B-diffusion-BD3LM-v0.1", "cpu")


# ---- shards --------------------------------------------------------------------------------------------------------


def test_sharded_bf16_equals_one_file(tmp_path):
    """The LLaDA parity checkpoint in three shards, its layers scattered over them as on the hub."""
    tensors = load_file(FIXTURES / "llada" / "model.safetensors")
    place = {name: f"model-0000{i % 3 + 1}-of-00003.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in set(place.values()):
        save_file({k: v for k, v in tensors.items() if place[k] == file}, tmp_path / file, {"format": "pt"})
    (tmp_path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": place}))
    shutil.copy(FIXTURES / "llada" / "config.json", tmp_path)
    model, whole = load_model(tmp_path, "cpu"), load_model(FIXTURES / "llada", "cpu")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), whole.parameters(), strict=True))
    stored = load_model(tmp_path, "cpu", torch.bfloat16)
    assert torch.equal(stored.embed.weight, tensors["model.transformer.wte.weight"])


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, "fp8"])
def test_a_model_is_saved_in_no_type_that_does_not_load(dtype, tmp_path):
    with pytest.raises(Refused, match="is neither bf16 nor fp32, nor another floating-point type of 16 bits or more"):
        load_model("tiny", "cpu").save(tmp_path / "m", dtype)
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize(("name", "shards"), [("LLaDA-8B-Instruct", 6), ("Dream-7B-Instruct", 4)])
def test_missing_shards_are_named(name, shards):
    with pytest.raises(Refused, match=rf"lacks {shards} of {shards} shards.*model-00001-of-0000{shards}"):
        load_model(REAL / name, "cpu")


def test_names_are_complete():
    """Every parameter of a model has a checkpoint name and every name a parameter, in each family."""
    for raw in (LLADA, DREAM, A2D, A2D_QWEN2):
        c = read_config(raw)
        with torch.device("meta"):
            model = DiffusionLM(c)
        stored = sum(math.prod(shape) for shape in expected_tensors(c).values())
        assert stored == sum(p.numel() for p in model.parameters())
        assert NAMES[c.family].head + ".weight" in expected_tensors(c) or c.tied
