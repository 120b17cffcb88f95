"""Configs: the real files, what tools write into them, and refusals by name."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoint.families import read_config
from checkpoint.folder import INDEX
from checkpoint.loading import expected_tensors
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
