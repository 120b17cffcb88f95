"""Model families: what a Hugging Face `config.json` says, and how its tensors are named.

One switchable Llama-type block (`model.py`) serves every family. A family is a set of switches and a list of names.

How a config is read
--------------------
Every key is read and its type checked. A key that changes the computation must have an implemented value; if it is
absent, the default of the family's official code counts. A key that cannot change the computation (initialization,
dropout, caching) is listed as harmless. Any other key is refused by name.
"""

from dataclasses import dataclass, field

from runtime.processes import Refused

FUSED = ("qkv", "out", "gate_up", "down")
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


# ---- keys and their values -------------------------------------------------------------------------------------------


class Only:
    """The implemented values of a key, instead of a type."""

    def __init__(self, *values):
        self.values = values


REQUIRED = object()
ABSENT = object()  # a harmless key: its type is checked, its value never used
_NOUNS = {int: "an integer", float: "a number", bool: "true or false", str: "a text", list: "a list", dict: "an object"}


def _is(value, kind) -> bool:
    if kind is bool or isinstance(value, bool):
        return kind is bool and isinstance(value, bool)
    return isinstance(value, (int, float) if kind is float else kind)


def _read(raw: dict, spec: dict) -> dict:
    """The values of the keys in `spec`, checked; raises Refused for the first key or value that is not implemented.

    spec: key -> (what, default). `what` is Only(values), a type, or a tuple (type, None) for a value that may be null.
    `default` is what the official code takes for an absent key, REQUIRED, or ABSENT for a harmless key.
    """
    for key, value in raw.items():
        if key not in spec:
            raise Refused(f"config.json has key {key!r} = {value!r}, which is not implemented here.")
    out = {}
    for key, (what, default) in spec.items():
        if key not in raw and default is ABSENT:
            continue
        if key not in raw and default is REQUIRED:
            raise Refused(f"config.json lacks the key {key!r}.")
        value = out[key] = raw.get(key, default)
        if isinstance(what, Only):
            if not any(value == v and type(value) is type(v) for v in what.values):
                absent = "" if key in raw else " (what its absence means)"
                allowed = " or ".join(map(repr, what.values))
                raise Refused(f"config.json: {key} = {value!r}{absent} is not implemented here, only {allowed}.")
            continue
        kinds = what if isinstance(what, tuple) else (what,)
        if not any(value is None if kind is None else _is(value, kind) for kind in kinds):
            nouns = " or ".join("null" if kind is None else _NOUNS[kind] for kind in kinds)
            raise Refused(f"config.json: {key} is {value!r}; it must be {nouns}.")
    return out


def _head_dim(d_model: int, n_heads: int) -> int:
    if n_heads < 1 or d_model % n_heads:
        raise Refused(f"config.json: model dimension {d_model} does not divide by {n_heads} heads.")
    return d_model // n_heads

# ---- families --------------------------------------------------------------------------------------------------------


# what every config may carry without changing what is computed at inference
_HARMLESS = {
    "model_type": (str, ABSENT), "architectures": ((list, None), ABSENT), "auto_map": ((dict, None), ABSENT),
    "transformers_version": ((str, None), ABSENT), "torch_dtype": ((str, None), ABSENT),
    "dtype": ((str, None), ABSENT), "use_cache": (bool, ABSENT), "initializer_range": (float, ABSENT),
    "attention_dropout": (float, ABSENT), "bos_token_id": ((int, None), ABSENT), "pad_token_id": ((int, None), ABSENT),
    "_name_or_path": (str, ABSENT), "_attn_implementation_autoset": (bool, ABSENT),
    "quantization_config": (dict, ABSENT),  # read by checkpoint/loading.py
}
_LLADA_KEYS = _HARMLESS | {
    "d_model": (int, REQUIRED), "n_layers": (int, REQUIRED), "n_heads": (int, REQUIRED),
    "n_kv_heads": ((int, None), None), "multi_query_attention": ((bool, None), None),
    "mlp_hidden_size": ((int, None), None), "mlp_ratio": (int, 4), "vocab_size": (int, REQUIRED),
    # a config must say these, because their official defaults (50304, true, 10000, 1e-5) fit no published model
    "embedding_size": ((int, None), REQUIRED), "weight_tying": (bool, REQUIRED), "rope_theta": (float, REQUIRED),
    "rms_norm_eps": (float, REQUIRED), "mask_token_id": (int, REQUIRED), "eos_token_id": ((int, None), None),
    "include_qkv_bias": ((bool, None), False), "rope_full_precision": (bool, True), "scale_logits": (bool, False),
    # switches with one implemented value, which an absent key may not have by the official defaults
    "rope": (Only(True), False), "alibi": (Only(False), False), "layer_norm_type": (Only("rms"), "default"),
    "block_type": (Only("llama"), "sequential"), "activation_type": (Only("silu"), "swiglu"),
    "layer_norm_with_affine": (Only(True), True), "bias_for_layer_norm": (Only(False, None), None),
    "include_bias": (Only(False), False), "attention_layer_norm": (Only(False), False),
    "input_emb_norm": (Only(False), False), "block_group_size": (Only(1), 1), "clip_qkv": (Only(None), None),
    # initialization, training, parts of features that are off, and the sequence length, which RoPE does not limit
    "attention_layer_norm_with_affine": (bool, ABSENT), "alibi_bias_max": (float, ABSENT),
    "flash_attention": (bool, ABSENT), "max_sequence_length": (int, ABSENT), "residual_dropout": (float, ABSENT),
    "tie_word_embeddings": (bool, ABSENT),  # weight_tying decides
    "embedding_dropout": (float, ABSENT), "init_device": ((str, None), ABSENT), "init_fn": (str, ABSENT),
    "init_std": (float, ABSENT), "init_cutoff_factor": ((float, None), ABSENT), "precision": ((str, None), ABSENT),
}


def read_llada(raw: dict) -> ModelConfig:
    """LLaDA-8B-Base, -Instruct, LLaDA-1.5, and the embedded model (`model_type: llada`)."""
    c = _read(raw, _LLADA_KEYS)
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
        head_dim=_head_dim(c["d_model"], c["n_heads"]),
        d_ffn=c["mlp_ratio"] * c["d_model"] if c["mlp_hidden_size"] is None else c["mlp_hidden_size"],
        vocab_size=rows, rope_theta=c["rope_theta"], norm_eps=c["rms_norm_eps"], mask_id=c["mask_token_id"],
        eos_id=c["eos_token_id"], qkv_bias=bool(c["include_qkv_bias"]), tied=c["weight_tying"],
        rope_fp32=c["rope_full_precision"], logit_scale=c["d_model"] ** -0.5 if c["scale_logits"] else 1.0, raw=raw)


_QWEN_KEYS = _HARMLESS | {
    "hidden_size": (int, REQUIRED), "num_hidden_layers": (int, REQUIRED), "num_attention_heads": (int, REQUIRED),
    "num_key_value_heads": ((int, None), REQUIRED), "intermediate_size": (int, REQUIRED), "vocab_size": (int, REQUIRED),
    "mask_token_id": (int, REQUIRED), "eos_token_id": ((int, None), None), "rope_theta": (float, REQUIRED),
    "rms_norm_eps": (float, REQUIRED), "tie_word_embeddings": (bool, False), "hidden_act": (Only("silu"), "silu"),
    "rope_scaling": (Only(None, {"rope_type": "default"}), None), "use_sliding_window": (Only(False), False),
    "use_mrope": (Only(False), False),
    # the window is used only if use_sliding_window is true; RoPE does not limit the sequence length
    "sliding_window": ((int, None), ABSENT), "max_window_layers": ((int, None), ABSENT),
    "max_position_embeddings": (int, ABSENT),
}


def _qwen(c: dict, raw: dict, **switches) -> ModelConfig:
    heads, kv_heads = c["num_attention_heads"], c["num_key_value_heads"]
    return ModelConfig(**{
        "d_model": c["hidden_size"], "n_layers": c["num_hidden_layers"], "n_heads": heads,
        "n_kv_heads": heads if kv_heads is None else kv_heads,
        "head_dim": c["head_dim"] if c.get("head_dim") else _head_dim(c["hidden_size"], heads),
        "d_ffn": c["intermediate_size"], "vocab_size": c["vocab_size"], "rope_theta": c["rope_theta"],
        "norm_eps": c["rms_norm_eps"], "mask_id": c["mask_token_id"], "eos_id": c["eos_token_id"],
        "tied": c["tie_word_embeddings"], "rope_fp32": False, "raw": raw, **switches})


def read_dream(raw: dict) -> ModelConfig:
    """Dream-v0-Base, -Instruct, Dream-Coder, DiffuCoder (`model_type: Dream`)."""
    reasoner = "this is DreamReasoner's block-causal Qwen3 under Dream's model_type, which is not implemented here."
    if "block_size" in raw:
        raise Refused(f"config.json has key 'block_size': {reasoner}")
    c = _read({k: v for k, v in raw.items() if k != "head_dim"},
              _QWEN_KEYS | {"attention_bias": (bool, ABSENT)})  # its q, k, v have biases, whatever this says
    head_dim = _head_dim(c["hidden_size"], c["num_attention_heads"])
    if raw.get("head_dim", head_dim) != head_dim:
        raise Refused(f"config.json: head_dim = {raw['head_dim']!r} is not hidden_size / num_attention_heads = "
                      f"{head_dim}: {reasoner}")
    return _qwen(c, raw, family="dream", qkv_bias=True, positions_skip_padding=True, logit_shift=True)


def read_a2d(raw: dict) -> ModelConfig:
    """Qwen2 and Qwen3 made bidirectional by dLLM (`model_type: a2d-qwen2`, `a2d-qwen3`); logits are not shifted.

    Where the config has no `mask_token_id`, `folder.Checkpoint` has taken it from the tokenizer's files.
    """
    qwen3 = raw["model_type"] == "a2d-qwen3"
    newer = raw.get("rope_parameters")  # newer transformers write rope_theta in here
    flat = raw
    if isinstance(newer, dict) and newer.keys() == {"rope_theta", "rope_type"} and newer["rope_type"] == "default":
        flat = {k: v for k, v in raw.items() if k != "rope_parameters"} | {"rope_theta": newer["rope_theta"]}
    c = _read(flat, _QWEN_KEYS | {
        "tie_word_embeddings": (bool, REQUIRED), "layer_types": ((list, None), None),
        **({"head_dim": (int, REQUIRED), "attention_bias": (Only(False), False)} if qwen3 else {})})
    if set(c["layer_types"] or ()) - {"full_attention"}:
        raise Refused(f"config.json: layer_types = {c['layer_types']!r} is not implemented here, only "
                      f"'full_attention'.")
    return _qwen(c, raw, family="a2d", qkv_bias=not qwen3, qk_norm=qwen3)


READERS = {"llada": read_llada, "Dream": read_dream, "a2d-qwen2": read_a2d, "a2d-qwen3": read_a2d}


def read_config(raw: dict) -> ModelConfig:
    """A `config.json` as a ModelConfig; raises Refused with one sentence for anything that is not implemented."""
    kind = raw.get("model_type") if isinstance(raw, dict) else None
    if not isinstance(kind, str) or kind not in READERS:
        known = ", ".join(map(repr, READERS))
        why = ": its config is that of a causal model" if kind in ("qwen2", "qwen3", "llama") else ""
        raise Refused(f"config.json: model_type {kind!r} is not supported{why}; supported are {known}.")
    return READERS[kind](raw)


@dataclass(frozen=True)
class Names:
    """Checkpoint tensor names of a family. `linears`: our fused linear -> the tensors stacked in it, in order."""

    embed: str
    final_norm: str
    head: str
    block: str  # format string of the block index
    attn_norm: str
    ffn_norm: str
    linears: dict[str, tuple[str, ...]]
    q_norm: str = ""
    k_norm: str = ""


_QWEN_NAMES = Names(
    "model.embed_tokens", "model.norm", "lm_head",
    "model.layers.{}", "input_layernorm", "post_attention_layernorm",
    {"qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "out": ("self_attn.o_proj",),
     "gate_up": ("mlp.gate_proj", "mlp.up_proj"), "down": ("mlp.down_proj",)},
    q_norm="self_attn.q_norm", k_norm="self_attn.k_norm")
NAMES = {
    "llada": Names(
        "model.transformer.wte", "model.transformer.ln_f", "model.transformer.ff_out",
        "model.transformer.blocks.{}", "attn_norm", "ff_norm",
        {"qkv": ("q_proj", "k_proj", "v_proj"), "out": ("attn_out",), "gate_up": ("ff_proj", "up_proj"),
         "down": ("ff_out",)}),
    "dream": _QWEN_NAMES,
    "a2d": _QWEN_NAMES,
}


def linear_shapes(c: ModelConfig) -> dict[str, tuple[int, int]]:
    """(C, d) of the weights of a block's four fused linears."""
    heads, kv = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
    return {"qkv": (heads + 2 * kv, c.d_model), "out": (c.d_model, heads), "gate_up": (2 * c.d_ffn, c.d_model),
            "down": (c.d_model, c.d_ffn)}


def norm_names(c: ModelConfig) -> dict[str, str]:
    """The norms of a block: our attribute -> the checkpoint's name."""
    ours = ("attn_norm", "ffn_norm", "q_norm", "k_norm") if c.qk_norm else ("attn_norm", "ffn_norm")
    return {name: getattr(NAMES[c.family], name) for name in ours}
