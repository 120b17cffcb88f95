"""Configs and checkpoints: the real files, variants against an independent forward, refusals by name."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from calibrate import QuantConfig, quantize_model
from checkpoint.families import NAMES, read_config
from checkpoint.folder import INDEX, Checkpoint
from checkpoint.loading import expected_tensors
from model import DiffusionLM, load_model
from runtime.processes import Refused

FIXTURES = Path(__file__).parents[1] / "fixtures"
REAL = FIXTURES / "hf-configs"
LLADA, DREAM = (json.loads((FIXTURES / f / "config.json").read_text()) for f in ("llada", "dream"))
A2D = {"model_type": "a2d-qwen3", "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
       "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 80, "vocab_size": 64, "rms_norm_eps": 1e-6,
       "rope_theta": 1e6, "tie_word_embeddings": True, "attention_bias": False, "mask_token_id": 63,
       "layer_types": ["full_attention"] * 2, "max_window_layers": 28, "sliding_window": None, "eos_token_id": 62}
A2D_QWEN2 = {k: v for k, v in A2D.items() if k not in ("head_dim", "attention_bias")} | {"model_type": "a2d-qwen2"}


# ---- the real files ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "parameters"), [("LLaDA-8B-Instruct", 8_015_581_184),
                                                  ("Dream-7B-Instruct", 7_615_616_512)])
def test_real_config_and_index(name, parameters):
    """The config asks for exactly the tensors of the published index, and their bytes are its total_size."""
    c = read_config(json.loads((REAL / name / "config.json").read_text()))
    index = json.loads((REAL / name / INDEX).read_text())
    expected = expected_tensors(c)
    assert set(expected) == set(index["weight_map"])
    assert sum(math.prod(shape) for shape in expected.values()) == parameters
    assert 2 * parameters == index["metadata"]["total_size"]


def test_real_values():
    c = read_config(json.loads((REAL / "LLaDA-8B-Instruct" / "config.json").read_text()))
    assert (c.family, c.d_model, c.n_layers, c.n_heads, c.n_kv_heads, c.head_dim, c.d_ffn) == (
        "llada", 4096, 32, 32, 32, 128, 12288)
    assert (c.rope_theta, c.norm_eps, c.mask_id, c.eos_id, c.tied, c.qkv_bias, c.rope_fp32, c.logit_shift) == (
        5e5, 1e-5, 126336, 126081, False, False, True, False)
    c = read_config(json.loads((REAL / "Dream-7B-Instruct" / "config.json").read_text()))
    assert (c.family, c.d_model, c.n_layers, c.n_heads, c.n_kv_heads, c.head_dim, c.d_ffn) == (
        "dream", 3584, 28, 28, 4, 128, 18944)
    assert (c.rope_theta, c.norm_eps, c.mask_id, c.eos_id, c.tied, c.qkv_bias, c.rope_fp32, c.logit_shift) == (
        1e6, 1e-6, 151666, 151643, False, True, False, True)


@pytest.mark.parametrize(("name", "shards"), [("LLaDA-8B-Instruct", 6), ("Dream-7B-Instruct", 4)])
def test_missing_shards_are_named(name, shards):
    with pytest.raises(Refused, match=rf"lacks {shards} of {shards} shards.*model-00001-of-0000{shards}"):
        load_model(REAL / name, "cpu")


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


# ---- configs that are refused --------------------------------------------------------------------------------------

WRONG = [
    (LLADA, "rope", False), (LLADA, "alibi", True), (LLADA, "layer_norm_type", "default"),
    (LLADA, "layer_norm_with_affine", False), (LLADA, "bias_for_layer_norm", True), (LLADA, "include_bias", True),
    (LLADA, "attention_layer_norm", True), (LLADA, "input_emb_norm", True), (LLADA, "block_type", "sequential"),
    (LLADA, "activation_type", "swiglu"), (LLADA, "block_group_size", 4), (LLADA, "multi_query_attention", True),
    (LLADA, "rope_scaling", {"type": "yarn"}), (LLADA, "sliding_window", 128), (LLADA, "n_heads", "4"),
    (LLADA, "n_heads", 4.0), (LLADA, "n_heads", 0), (LLADA, "n_heads", -4), (LLADA, "n_heads", 3),
    (LLADA, "n_kv_heads", 3), (LLADA, "n_kv_heads", 0), (LLADA, "d_model", True), (LLADA, "d_model", None),
    (LLADA, "d_model", 10**9), (LLADA, "rope_theta", "5e5"), (LLADA, "rope_theta", 0), (LLADA, "rms_norm_eps", -1e-5),
    (LLADA, "rms_norm_eps", float("nan")), (LLADA, "weight_tying", 0), (LLADA, "weight_tying", None),
    (LLADA, "include_qkv_bias", "yes"), (LLADA, "rope_full_precision", None), (LLADA, "mask_token_id", None),
    (LLADA, "mask_token_id", 256), (LLADA, "mask_token_id", -1), (LLADA, "eos_token_id", ["248"]),
    (LLADA, "embedding_size", 128), (LLADA, "mlp_ratio", "4"), (LLADA, "head_dim", 32), (LLADA, "clip_qkv", 0),
    (LLADA, "attention_bias", True), (LLADA, "rope_scaling", {"factor": 4}), (LLADA, "is_decoder", True),
    (LLADA, "num_experts", 8), (LLADA, "partial_rotary_factor", 0.5),
    (DREAM, "use_sliding_window", True), (DREAM, "rope_scaling", {"rope_type": "yarn", "factor": 4.0}),
    (DREAM, "rope_scaling", {"type": "linear", "factor": 2.0}), (DREAM, "rope_scaling", {"rope_type": ["default"]}),
    (DREAM, "rope_parameters", {"rope_type": "default", "rope_theta": 5.0}),  # rope_theta says another number
    (DREAM, "rope_parameters", {"rope_type": "default", "partial_rotary_factor": 0.5}),
    (DREAM, "use_mrope", True), (DREAM, "hidden_act", "gelu"), (DREAM, "add_cross_attention", True),
    (DREAM, "hidden_size", 66), (DREAM, "num_key_value_heads", 3), (DREAM, "tie_word_embeddings", "false"),
    (DREAM, "block_size", 4), (DREAM, "head_dim", 32), (DREAM, "pruned_heads", {"0": [1]}),
    (A2D, "layer_types", ["full_attention", "sliding_attention"]), (A2D, "attention_bias", True),
    (A2D, "head_dim", 15), (A2D, "head_dim", None), (A2D, "rope_parameters", {"rope_theta": 1e6, "rope_type": "yarn"}),
    (A2D_QWEN2, "num_local_experts", 4),
]
# what a sentence says where it speaks of a quantity that the key determines
SAYS = {"mask_token_id": "mask_id", "rms_norm_eps": "norm_eps", "hidden_size": "model dimension", "n_heads": "heads",
        "n_kv_heads": "n_kv_heads|key-value heads", "num_key_value_heads": "key-value heads",
        "head_dim": "head dimension|head_dim", "rope_parameters": "partial_rotary_factor"}


@pytest.mark.parametrize(("base", "extra", "same"), [
    (LLADA, {"multi_query_attention": True, "n_kv_heads": None}, {"n_kv_heads": 1}),
    (LLADA, {"multi_query_attention": True, "n_kv_heads": 1}, {"n_kv_heads": 1}),
    (LLADA, {"tie_word_embeddings": True}, {}), (LLADA, {"head_dim": 16}, {}), (LLADA, {"embedding_size": None}, {}),
    (LLADA, {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, {}),
    *((DREAM, {"rope_scaling": default}, {}) for default in (
        None, {}, {"type": "default"}, {"rope_type": "default"}, {"rope_type": "default", "type": "default"})),
    *((DREAM, {"rope_parameters": default}, {}) for default in (
        None, {"rope_theta": 1e6, "rope_type": "default"}, {"rope_theta": 1e6}, {"partial_rotary_factor": 1.0})),
    (DREAM, {"head_dim": 16}, {}), (DREAM, {"head_dim": None}, {}), (DREAM, {"partial_rotary_factor": 1}, {}),
    (DREAM, {"attention_bias": False}, {}), (DREAM, {"attention_bias": True}, {}),
    (DREAM, {"layer_types": ["full_attention"] * 3}, {}), (A2D, {"layer_types": None}, {}),
    (A2D, {"eos_token_id": [62, 60]}, {}), (A2D, {"eos_token_id": []}, {"eos_token_id": None}),
    (A2D, {"attention_bias": None}, {}), (A2D_QWEN2, {"attention_bias": True}, {}), (A2D_QWEN2, {"head_dim": 12}, {})])
def test_what_says_what_is_the_case_anyway_is_accepted(base, extra, same):
    got, want = read_config(base | extra), read_config(base | same)
    assert replace(got, raw={}) == replace(want, raw={})


@pytest.mark.parametrize("base", [LLADA, DREAM, A2D, A2D_QWEN2])
@pytest.mark.parametrize("extra", [
    {"return_dict": True}, {"output_hidden_states": True}, {"tokenizer_class": "PreTrainedTokenizerFast"},
    {"_attn_implementation": "sdpa"}, {"attn_implementation": "flash_attention_2"}, {"unsloth_version": "2025.9.1"},
    {"unsloth_fixed": True}, {"id2label": {"0": "A"}}, {"label2id": {"A": 0}}, {"use_cache": None},
    {"pretraining_tp": 1}, {"model_max_length": 8192}, {"transformers.js_config": {"dtype": "q4"}},
    {"gradient_checkpointing": True}, {"quantization_config": None}, {"bos_token_id": [1, 2]}, {"torchscript": True},
    {"use_flash_attn_3": False}, {"their_adapter": None}, {"their_layers": {}}, {"their_name": ""}, {"their_list": []}])
def test_what_tools_add_is_accepted(base, extra):
    assert read_config(base | extra) == read_config(base)


WRITTEN = json.loads((FIXTURES / "transformers-configs.json").read_text())


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize(("version", "kind"), [(v, k) for v in WRITTEN for k in (
    "llada", "Dream", "a2d-qwen2", "a2d-qwen3") if k in WRITTEN[v] or not k.startswith("a2d")])
def test_what_transformers_writes_is_accepted(version, kind, whole):
    """`save_pretrained`, and a dump of the whole config with every default of that version of transformers."""
    base = {"llada": LLADA, "Dream": DREAM}.get(kind) or WRITTEN[version][kind] | {"mask_token_id": 63}
    if kind == "Dream" and version[0] == "5":  # beside rope_theta, which the official DreamConfig keeps
        base = base | {"rope_parameters": {"rope_theta": base["rope_theta"], "rope_type": "default"}}
    c = read_config((WRITTEN[version]["any"] if whole else {}) | base)
    assert c.raw["model_type"] == kind
    assert c.rope_theta == (5e5 if kind == "llada" else 1e6)
    assert not c.tied


def test_all_that_is_not_implemented_is_named_at_once():
    moe = {"num_experts": 64, "num_experts_per_tok": 8, "router_aux_loss_coef": 0.01, "attention_bias": True}
    with pytest.raises(Refused) as refusal:
        read_config(LLADA | moe | {"block_type": "sequential", "rope": False, "norm_topk_prob": False})
    assert str(refusal.value) == (
        "config.json asks for what is not implemented here: num_experts = 64, num_experts_per_tok = 8, "
        "router_aux_loss_coef = 0.01, attention_bias = True, rope = False (only True), block_type = 'sequential' "
        "(only 'llama').")
    with pytest.raises(Refused, match=r"^config\.json: d_model is '64', not an integer, n_heads is missing\.$"):
        read_config({k: v for k, v in LLADA.items() if k != "n_heads"} | {"d_model": "64"})


@pytest.mark.parametrize(("base", "key", "value"), WRONG)
def test_wrong_value_is_refused_by_name(base, key, value):
    """One sentence that names the key (or the quantity it determines)."""
    with pytest.raises(Refused, match=rf"^config\.json[^\n]*({key}|{SAYS.get(key, key)})[^\n]*\.$"):
        read_config(base | {key: value})


@pytest.mark.parametrize(("base", "key"), [
    *((LLADA, key) for key in ("d_model", "n_layers", "n_heads", "vocab_size", "mask_token_id", "rope",
                               "layer_norm_type", "block_type", "activation_type")),
    *((DREAM, key) for key in ("hidden_size", "num_hidden_layers", "intermediate_size", "mask_token_id"))])
def test_sizes_are_never_assumed_nor_defaults_that_are_not_implemented(base, key):
    with pytest.raises(Refused, match=f"{key}( is missing| = .*, which its absence means)"):
        read_config({k: v for k, v in base.items() if k != key})


@pytest.mark.parametrize(("base", "key", "default"), [
    (LLADA, "rope_theta", 10000.0), (LLADA, "rms_norm_eps", 1e-5), (LLADA, "weight_tying", True),
    (LLADA, "rope_full_precision", True), (LLADA, "scale_logits", False), (LLADA, "embedding_size", 256),
    (LLADA | {"mlp_hidden_size": None}, "mlp_ratio", 4), (DREAM, "rope_theta", 10000.0), (DREAM, "rms_norm_eps", 1e-6),
    (DREAM, "tie_word_embeddings", False), (DREAM, "hidden_act", "silu"), (A2D, "tie_word_embeddings", False),
    (A2D, "head_dim", 128), (A2D, "attention_bias", False)])
def test_an_absent_key_has_the_official_default(base, key, default):
    assert read_config({k: v for k, v in base.items() if k != key}) == read_config(base | {key: default})


def test_harmless_keys_change_nothing():
    silent = {"attention_dropout": 0.5, "init_std": 1, "max_sequence_length": 8, "flash_attention": True}
    assert read_config(LLADA | silent) == read_config(LLADA)
    silent = {"sliding_window": 4096, "max_window_layers": 1, "max_position_embeddings": 8, "use_cache": False}
    assert read_config(DREAM | silent) == read_config(DREAM)


def test_look_alikes_are_refused_by_name():
    with pytest.raises(Refused, match="block_size = 32"):  # DreamReasoner, a block-causal Qwen3
        read_config(DREAM | {"head_dim": 16, "block_size": 32, "architectures": ["DreamForCausalLM"]})
    with pytest.raises(Refused, match="'qwen2' is not supported: its config is that of a causal model"):
        read_config(A2D_QWEN2 | {"model_type": "qwen2"})
    for other in ({}, {"model_type": None}, {"model_type": ["llada"]}, {"model_type": "llada2_moe"}, []):
        with pytest.raises(Refused, match="is not supported"):
            read_config(other)


@settings(derandomize=True, deadline=None, max_examples=300)
@given(st.sampled_from((LLADA, DREAM, A2D)), st.data())
def test_any_json_value_is_read_or_refused(base, data):
    """No value of any key leads to a traceback other than Refused."""
    key = data.draw(st.sampled_from(sorted(base)))
    value = data.draw(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3)
                      | st.lists(st.integers(), max_size=2) | st.dictionaries(st.text(max_size=2), st.integers()))
    try:
        config = read_config(base | {key: value})
    except Refused:
        return
    assert config.raw[key] is value
    assert all(0 < n < 10**7 for shape in expected_tensors(replace(config, n_layers=1)).values() for n in shape)


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


@pytest.fixture
def sharded(tmp_path):
    """The LLaDA parity checkpoint in three shards, its layers scattered over them as on the hub."""
    folder = tmp_path / "sharded"
    folder.mkdir()
    tensors = load_file(FIXTURES / "llada" / "model.safetensors")
    files = [f"model-0000{i + 1}-of-00003.safetensors" for i in range(3)]
    place = {name: files[i % 3] for i, name in enumerate(sorted(tensors))}
    for file in files:
        save_file({k: v for k, v in tensors.items() if place[k] == file}, folder / file, {"format": "pt"})
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": place}))
    shutil.copy(FIXTURES / "llada" / "config.json", folder)
    return folder, tensors, place, files


def test_sharded_bf16_equals_one_file(sharded):
    model, whole = load_model(sharded[0], "cpu"), load_model(FIXTURES / "llada", "cpu")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), whole.parameters(), strict=True))
    stored = load_model(sharded[0], "cpu", torch.bfloat16)
    assert torch.equal(stored.embed.weight, sharded[1]["model.transformer.wte.weight"])


def test_broken_shards_are_named(sharded):
    folder, _, place, files = sharded

    def refuse(pattern):
        with pytest.raises(Refused, match=pattern):
            load_model(folder, "cpu")

    original = (folder / files[1]).read_bytes()
    (folder / files[1]).unlink()
    refuse(f"lacks 1 of 3 shards .*: {files[1]}")
    (folder / files[1]).write_bytes(original[:-100])
    refuse(f"{files[1]} is not a whole safetensors file")
    (folder / files[1]).write_bytes(original)

    index = json.loads((folder / INDEX).read_text())
    moved = next(k for k, v in place.items() if v == files[0])
    (folder / INDEX).write_text(json.dumps({"weight_map": index["weight_map"] | {moved: files[2]}}))
    refuse(f"holds '{moved}', which {INDEX} does not place there")
    (folder / INDEX).write_text(json.dumps({"weight_map": index["weight_map"] | {"more": files[2]}}))
    refuse("lists 'more'")
    (folder / INDEX).write_text(json.dumps({"weight_map": {moved: "../x.safetensors"}}))
    refuse("not a safetensors file in this folder")


@pytest.mark.parametrize(("change", "pattern"), [
    (lambda t: t.pop("model.transformer.ln_f.weight"), "lacks the tensor 'model.transformer.ln_f.weight'"),
    (lambda t: t.update(extra=torch.zeros(2)), "1 tensors that config.json does not explain, first 'extra'"),
    (lambda t: t.update({"model.transformer.ln_f.weight": torch.ones(63)}), r"has shape \[63\], .*asks for \[64\]"),
    (lambda t: t.update({"model.transformer.ln_f.weight": torch.ones(64, dtype=torch.int8)}), "has type I8"),
    (lambda t: t["model.transformer.ln_f.weight"].fill_(math.nan), "holds 64 NaN or Inf"),
])
def test_wrong_tensors_are_named(change, pattern, tmp_path):
    tensors = load_file(FIXTURES / "llada" / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    shutil.copy(FIXTURES / "llada" / "config.json", tmp_path)
    with pytest.raises(Refused, match=pattern):
        load_model(tmp_path, "cpu")


def test_quantized_by_another_tool_is_refused(tmp_path):
    random_checkpoint(tmp_path, LLADA | SMALL)
    raw = LLADA | SMALL | {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(Refused, match=r"quantized by another tool .*'gptq'"):
        load_model(tmp_path, "cpu")


def test_names_are_complete():
    """Every parameter of a model has a checkpoint name and every name a parameter, in each family."""
    for raw in (LLADA, DREAM, A2D, A2D_QWEN2):
        c = read_config(raw)
        with torch.device("meta"):
            model = DiffusionLM(c)
        stored = sum(math.prod(shape) for shape in expected_tensors(c).values())
        assert stored == sum(p.numel() for p in model.parameters())
        assert NAMES[c.family].head + ".weight" in expected_tensors(c) or c.tied
