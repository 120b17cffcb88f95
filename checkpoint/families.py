"""Model families: what a Hugging Face `config.json` says, and how its tensors are named.

One switchable Llama-type block (`model.py`) serves every family. A family is a dictionary of keys and a list of names.

A key of the family must have a value of its type, or one of the values that are implemented. If it is absent,
the default of the family's official code counts. Any other key is accepted if it cannot change what is computed
(`HARMLESS`), or if its value is null, false or empty: then what it names is off. All keys that are left are refused by
name, in one sentence.
"""

import reprlib
from dataclasses import dataclass, field
from typing import NamedTuple

from runtime.processes import Refused

FUSED, QK_NORMS = ("qkv", "out", "gate_up", "down"), ("q_norm", "k_norm")
ALIASES = {
    "llada-8b": "GSAI-ML/LLaDA-8B-Base",
    "llada-8b-instruct": "GSAI-ML/LLaDA-8B-Instruct",
    "llada-1.5": "GSAI-ML/LLaDA-1.5",
    "dream-7b": "Dream-org/Dream-v0-Base-7B",
    "dream-7b-instruct": "Dream-org/Dream-v0-Instruct-7B",
}


@dataclass(frozen=True)
class ModelConfig:
    """Architecture and special ids of one masked-diffusion transformer."""

    family: str  # "llada" | "dream" | "a2d"
    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int  # < n_heads: grouped-query attention
    head_dim: int
    d_ffn: int
    vocab_size: int  # rows of embedding and head (LLaDA's embedding_size)
    rope_theta: float
    norm_eps: float
    mask_id: int
    eos_id: int | None = None
    qkv_bias: bool = False
    qk_norm: bool = False  # RMSNorm on every head of q and k before RoPE (Qwen3)
    tied: bool = False  # the head is the embedding
    rope_fp32: bool = True  # rotate q, k in fp32 (LLaDA) or in the model's dtype (Dream, Qwen)
    positions_skip_padding: bool = False  # padding has no position and attends to nothing (Dream)
    logit_shift: bool = False  # raw logits of position i predict token i + 1 (Dream)
    logit_scale: float = 1.0
    raw: dict = field(default_factory=dict, compare=False, repr=False)  # config.json as it was read

    def __post_init__(self):
        for name in ("d_model", "n_layers", "n_heads", "n_kv_heads", "head_dim", "d_ffn", "vocab_size"):
            # the bound on layers keeps the list of the tensors short, however absurd the config
            if not 0 < getattr(self, name) < (10**4 if name == "n_layers" else 10**7):
                raise Refused(f"config.json: {name} is {getattr(self, name)!r}; it must be a positive integer of "
                              f"a plausible size.")
        for name in ("rope_theta", "norm_eps"):
            if not 0 < getattr(self, name) < 1e30:
                raise Refused(f"config.json: {name} is {getattr(self, name)!r}; it must be a positive number.")
        if self.n_heads % self.n_kv_heads:
            raise Refused(f"config.json: {self.n_heads} heads do not share {self.n_kv_heads} key-value heads.")
        if self.head_dim % 2:
            raise Refused(f"config.json: head dimension {self.head_dim} is odd, so RoPE cannot rotate its halves.")
        for name in ("mask_id", "eos_id"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < self.vocab_size:
                raise Refused(f"config.json: {name} is {value!r}, outside the vocabulary of {self.vocab_size}.")

    @property
    def positions(self) -> int | None:
        """The longest sequence that config.json speaks of. RoPE has no limit, but the model saw no longer one."""
        n = self.raw.get("max_sequence_length", self.raw.get("max_position_embeddings"))
        return n if type(n) is int and n > 0 else None

# ---- keys and their values -------------------------------------------------------------------------------------------


# what transformers (4.38 to 5.x), trainers and other tools write, whatever the value
HARMLESS = frozenset("""
    model_type architectures auto_map transformers_version transformers.js_config torch_dtype dtype use_bfloat16
    _name_or_path name_or_path tokenizer_class model_max_length problem_type finetuning_task task_specific_params
    id2label label2id num_labels use_cache return_dict output_attentions output_hidden_states torchscript
    tf_legacy_loss chunk_size_feed_forward pretraining_tp _attn_implementation attn_implementation
    _attn_implementation_autoset _attn_implementation_internal _experts_implementation gradient_checkpointing
    unsloth_version unsloth_fixed quantization_config
    bos_token_id pad_token_id sep_token_id cls_token_id unk_token_id decoder_start_token_id forced_bos_token_id
    forced_eos_token_id suppress_tokens begin_suppress_tokens bad_words_ids prefix
    do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p typical_p
    repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size min_length max_length
    exponential_decay_length_penalty num_return_sequences output_scores return_dict_in_generate remove_invalid_values
    initializer_range attention_dropout hidden_dropout residual_dropout embedding_dropout init_device init_fn init_std
    init_cutoff_factor precision flash_attention max_sequence_length max_position_embeddings""".split())  # noqa: SIM905
REQUIRED = object()
_NOUNS = {int: "an integer", float: "a number", bool: "true or false"}


def _read(raw: dict, keys: dict) -> dict:
    """The values of `keys`; Refused for what is not implemented, missing or of a wrong type.

    keys: key -> type, (type, default) or ([implemented values], default). A null counts as absent where the default
    is null, zero or false.
    """
    raw, values, wrong = _plain(raw), {}, []
    # null, false and empty values mean that what they stand for is off
    other = [f"{key} = {reprlib.repr(value)}" for key, value in raw.items()
             if (value or type(value) in (int, float)) and key not in HARMLESS and key not in keys]
    for key, entry in keys.items():
        kind, default = entry if isinstance(entry, tuple) else (entry, REQUIRED)
        value = values[key] = default if raw.get(key) is None and not default else raw.get(key, default)
        if isinstance(kind, list):
            if not any(value == v and type(value) is type(v) for v in kind):
                absent = "" if key in raw else ", which its absence means"
                other.append(f"{key} = {reprlib.repr(value)}{absent} (only {kind[0]!r})")
        elif value is REQUIRED:
            wrong.append(f"{key} is missing")
        elif value is not default and (not isinstance(value, (int, float) if kind is float else kind)
                                       or isinstance(value, bool) != (kind is bool)):
            wrong.append(f"{key} is {reprlib.repr(value)}, not {_NOUNS[kind]}")
    if other:
        raise Refused(f"config.json asks for what is not implemented here: {', '.join(other)}.")
    if wrong:
        raise Refused(f"config.json: {', '.join(wrong)}.")
    return values


def _plain(raw: dict) -> dict:
    """The config in one spelling: default RoPE and full attention are not mentioned, and there is one eos_token_id."""
    for key in ("rope_scaling", "rope_parameters"):
        rope = raw.get(key)
        if isinstance(rope, dict) and all(rope.get(k, "default") == "default" for k in ("rope_type", "type")):
            said = {k: v for k, v in rope.items() if k not in ("rope_type", "type")}
            if said.keys() <= {"rope_theta", "partial_rotary_factor"} and all(
                    raw.get(k) in (None, v) for k, v in said.items()):
                raw = {k: v for k, v in raw.items() if k != key} | said
    layers, eos = raw.get("layer_types"), raw.get("eos_token_id")
    if isinstance(layers, list) and all(layer == "full_attention" for layer in layers):
        raw = {k: v for k, v in raw.items() if k != "layer_types"}
    return raw | {"eos_token_id": (eos or [None])[0]} if isinstance(eos, list) else raw


def _head_dim(d_model: int, n_heads: int, told: int | None = None) -> int:
    if n_heads < 1 or d_model % n_heads:
        raise Refused(f"config.json: model dimension {d_model} does not divide by {n_heads} heads.")
    if told not in (None, d_model // n_heads):
        raise Refused(f"config.json: head_dim = {told} is not implemented here, only {d_model} / {n_heads} heads.")
    return d_model // n_heads


# ---- families --------------------------------------------------------------------------------------------------------


_ANY = {"partial_rotary_factor": ([1.0, 1], 1.0), "head_dim": (int, None), "eos_token_id": (int, None),
        "mask_token_id": int, "vocab_size": int}
_LLADA = _ANY | {
    "d_model": int, "n_layers": int, "n_heads": int, "n_kv_heads": (int, None), "multi_query_attention": (bool, None),
    "mlp_hidden_size": (int, None), "mlp_ratio": (int, 4), "embedding_size": (int, None), "weight_tying": (bool, True),
    "rope": ([True], False), "rope_theta": (float, 1e4), "rope_full_precision": (bool, True),
    "rms_norm_eps": (float, 1e-5), "include_qkv_bias": (bool, False), "scale_logits": (bool, False),
    "layer_norm_type": (["rms"], "default"), "layer_norm_with_affine": ([True], True), "block_group_size": ([1], 1),
    "block_type": (["llama"], "sequential"), "activation_type": (["silu"], "swiglu"),
    # parts of features that are off; weight_tying decides in place of tie_word_embeddings
    "attention_layer_norm_with_affine": (bool, True), "alibi_bias_max": (float, 8.0),
    "tie_word_embeddings": (bool, False)}
_QWEN = _ANY | {
    "hidden_size": int, "num_hidden_layers": int, "num_attention_heads": int, "num_key_value_heads": (int, None),
    "intermediate_size": int, "rope_theta": (float, 1e4), "rms_norm_eps": (float, 1e-6),
    "tie_word_embeddings": (bool, False), "hidden_act": (["silu"], "silu"),
    # sizes of a window that only use_sliding_window would open
    "sliding_window": (int, None), "max_window_layers": (int, None)}


def read_llada(raw: dict) -> ModelConfig:
    """LLaDA-8B-Base, -Instruct, LLaDA-1.5, and the embedded model (`model_type: llada`)."""
    c = _read(raw, _LLADA)
    rows = c["vocab_size"] if c["embedding_size"] is None else c["embedding_size"]
    if rows < c["vocab_size"]:
        raise Refused(f"config.json: embedding_size {rows} is below vocab_size {c['vocab_size']}.")
    told = {None: c["n_kv_heads"], True: 1, False: c["n_heads"]}[c["multi_query_attention"]]
    n_kv_heads = c["n_heads"] if told is None else told
    if c["n_kv_heads"] not in (None, n_kv_heads):
        raise Refused(f"config.json: multi_query_attention = {c['multi_query_attention']} contradicts n_kv_heads = "
                      f"{c['n_kv_heads']}.")
    return ModelConfig(
        family="llada", d_model=c["d_model"], n_layers=c["n_layers"], n_heads=c["n_heads"], n_kv_heads=n_kv_heads,
        head_dim=_head_dim(c["d_model"], c["n_heads"], c["head_dim"]),
        d_ffn=c["mlp_ratio"] * c["d_model"] if c["mlp_hidden_size"] is None else c["mlp_hidden_size"],
        vocab_size=rows, rope_theta=c["rope_theta"], norm_eps=c["rms_norm_eps"], mask_id=c["mask_token_id"],
        eos_id=c["eos_token_id"], qkv_bias=c["include_qkv_bias"], tied=c["weight_tying"],
        rope_fp32=c["rope_full_precision"], logit_scale=c["d_model"] ** -0.5 if c["scale_logits"] else 1.0, raw=raw)


def read_qwen(raw: dict) -> ModelConfig:
    """Dream-v0, Dream-Coder, DiffuCoder (`model_type: Dream`), and Qwen2 and Qwen3 made bidirectional by dLLM."""
    dream, qwen3 = raw["model_type"] == "Dream", raw["model_type"] == "a2d-qwen3"
    # Qwen2's q, k and v have biases, whatever attention_bias says; Qwen3's have none, and true is refused there
    c = _read(raw, _QWEN | ({"head_dim": (int, 128)} if qwen3 else {"attention_bias": (bool, True)}))
    d, heads, kv_heads, told = (c[k] for k in ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim"))
    return ModelConfig(
        family="dream" if dream else "a2d", d_model=d, n_layers=c["num_hidden_layers"], n_heads=heads,
        n_kv_heads=heads if kv_heads is None else kv_heads,
        head_dim=_head_dim(d, heads, told) if dream or told is None else told, d_ffn=c["intermediate_size"],
        vocab_size=c["vocab_size"], rope_theta=c["rope_theta"], norm_eps=c["rms_norm_eps"], mask_id=c["mask_token_id"],
        eos_id=c["eos_token_id"], qkv_bias=not qwen3, qk_norm=qwen3, tied=c["tie_word_embeddings"], rope_fp32=False,
        positions_skip_padding=dream, logit_shift=dream, raw=raw)


READERS = {"llada": read_llada, "Dream": read_qwen, "a2d-qwen2": read_qwen, "a2d-qwen3": read_qwen}


def read_config(raw: dict) -> ModelConfig:
    """A `config.json` as a ModelConfig; raises Refused with one sentence for anything that is not implemented."""
    kind = raw.get("model_type") if isinstance(raw, dict) else None
    if not isinstance(kind, str) or kind not in READERS:
        known = ", ".join(map(repr, READERS))
        why = ": its config is that of a causal model" if kind in ("qwen2", "qwen3", "llama") else ""
        raise Refused(f"config.json: model_type {kind!r} is not supported{why}; supported are {known}.")
    return READERS[kind](raw)


class Names(NamedTuple):
    """Checkpoint tensor names of a family."""

    embed: str
    final_norm: str
    head: str
    block: str  # format string of the block index
    norms: dict[str, str]  # ours -> theirs
    linears: dict[str, tuple[str, ...]]  # our fused linear -> the tensors stacked in it, in order


_QWEN_NAMES = Names(
    "model.embed_tokens", "model.norm", "lm_head", "model.layers.{}",
    {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
     "q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm"},
    {"qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "out": ("self_attn.o_proj",),
     "gate_up": ("mlp.gate_proj", "mlp.up_proj"), "down": ("mlp.down_proj",)})
_LLADA_NAMES = Names(
    "model.transformer.wte", "model.transformer.ln_f", "model.transformer.ff_out", "model.transformer.blocks.{}",
    {"attn_norm": "attn_norm", "ffn_norm": "ff_norm"},
    {"qkv": ("q_proj", "k_proj", "v_proj"), "out": ("attn_out",), "gate_up": ("ff_proj", "up_proj"),
     "down": ("ff_out",)})
NAMES = {"llada": _LLADA_NAMES, "dream": _QWEN_NAMES, "a2d": _QWEN_NAMES}


def part_sizes(c: ModelConfig) -> dict[str, list[int]]:
    """Rows that each checkpoint tensor takes in a block's four fused linears."""
    kv = c.n_kv_heads * c.head_dim
    return {"qkv": [c.n_heads * c.head_dim, kv, kv], "out": [c.d_model], "gate_up": [c.d_ffn, c.d_ffn],
            "down": [c.d_model]}


def linear_shapes(c: ModelConfig) -> dict[str, tuple[int, int]]:
    """(C, d) of the weights of a block's four fused linears, in the order of `FUSED`."""
    inputs = {"qkv": c.d_model, "out": c.n_heads * c.head_dim, "gate_up": c.d_model, "down": c.d_ffn}
    return {name: (sum(sizes), inputs[name]) for name, sizes in part_sizes(c).items()}


def norm_names(c: ModelConfig) -> dict[str, str]:
    """The norms of a block: our attribute -> the checkpoint's name."""
    return {ours: theirs for ours, theirs in NAMES[c.family].norms.items() if c.qk_norm or ours not in QK_NORMS}
