"""Model families: what a Hugging Face `config.json` says, and how its tensors are named.

One switchable Llama-type block (`model.py`) serves every family; a family is a set of switches and a table of names.
Every key of a config is read: a key that changes the computation must have an implemented value, a key that cannot
change it (initialization, training, caching) is listed as harmless, and anything else is refused by name.
"""

from dataclasses import dataclass, field

ALIASES = {
    "llada-8b": "GSAI-ML/LLaDA-8B-Base",
    "llada-8b-instruct": "GSAI-ML/LLaDA-8B-Instruct",
    "llada-1.5": "GSAI-ML/LLaDA-1.5",
    "dream-7b": "Dream-org/Dream-v0-Base-7B",
    "dream-7b-instruct": "Dream-org/Dream-v0-Instruct-7B",
}


class ConfigError(ValueError):
    """A config that this project cannot run; the message is one sentence that names the key."""


@dataclass(frozen=True)
class ModelConfig:
    """Architecture and special ids of one masked-diffusion transformer."""

    family: str  # "llada" | "dream"
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
    tied: bool = False  # the head is the embedding
    rope_fp32: bool = True  # rotate q, k in fp32 (LLaDA) or in the model's dtype (Dream)
    logit_shift: bool = False  # raw logits of position i predict token i + 1 (Dream)
    logit_scale: float = 1.0
    raw: dict = field(default_factory=dict, compare=False, repr=False)  # config.json as it was read

    def __post_init__(self):
        for name in ("d_model", "n_layers", "n_heads", "n_kv_heads", "head_dim", "d_ffn", "vocab_size"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 10**7:
                raise ConfigError(f"config.json: {name} is {value!r}; it must be a positive integer.")
        for name in ("rope_theta", "norm_eps"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e30:
                raise ConfigError(f"config.json: {name} is {value!r}; it must be a positive number.")
        if self.n_heads % self.n_kv_heads:
            raise ConfigError(f"config.json: {self.n_heads} heads do not share {self.n_kv_heads} key-value heads.")
        if self.head_dim % 2:
            raise ConfigError(f"config.json: head dimension {self.head_dim} is odd, so RoPE cannot rotate its halves.")
        for name in ("mask_id", "eos_id"):
            value = getattr(self, name)
            if value is None and name == "eos_id":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < self.vocab_size:
                raise ConfigError(f"config.json: {name} is {value!r}, outside the vocabulary of {self.vocab_size}.")


def _read(raw: dict, spec: dict, harmless: set[str]) -> dict:
    """Values of `spec`'s keys. spec: key -> default, REQUIRED, or Only(values): the values that are implemented."""
    unknown = [k for k in raw if k not in spec and k not in harmless and not k.startswith("_")]
    if unknown:
        raise ConfigError(f"config.json has key {unknown[0]!r} = {raw[unknown[0]]!r}, which is not implemented here.")
    out = {}
    for key, rule in spec.items():
        if key not in raw and rule is REQUIRED:
            raise ConfigError(f"config.json lacks the key {key!r}.")
        if isinstance(rule, Only):
            value = raw.get(key, rule.values[0])
            if not any(value is v or (value == v and type(value) is type(v)) for v in rule.values):
                allowed = " or ".join(map(repr, rule.values))
                raise ConfigError(f"config.json: {key} = {value!r} is not implemented here, only {allowed}.")
            out[key] = value
        else:
            out[key] = raw.get(key, rule)
    return out


class Only:
    """The implemented values of a key, the default first."""

    def __init__(self, *values):
        self.values = values


REQUIRED = object()
_COMMON = {"architectures", "auto_map", "transformers_version", "torch_dtype", "dtype", "use_cache", "model_type",
           "initializer_range", "quantization_config", "bos_token_id"}
_LLADA_HARMLESS = _COMMON | {"init_device", "init_fn", "init_std", "init_cutoff_factor", "precision", "mlp_ratio",
                             "flash_attention", "max_sequence_length", "pad_token_id", "attention_dropout",
                             "residual_dropout", "embedding_dropout", "alibi_bias_max", "bias_for_layer_norm_"}


def _integer_division(a, b, what: str) -> int:
    if not isinstance(a, int) or not isinstance(b, int) or b <= 0 or a % b:
        raise ConfigError(f"config.json: {what} {a!r} does not divide by {b!r} heads.")
    return a // b


def read_llada(raw: dict) -> ModelConfig:
    """LLaDA-8B-Base, -Instruct, LLaDA-1.5, and the embedded model (`model_type: llada`)."""
    c = _read(raw, {
        "d_model": REQUIRED, "n_layers": REQUIRED, "n_heads": REQUIRED, "n_kv_heads": None, "mlp_hidden_size": REQUIRED,
        "vocab_size": REQUIRED, "embedding_size": None, "mask_token_id": REQUIRED, "eos_token_id": None,
        "rope_theta": REQUIRED, "rms_norm_eps": REQUIRED, "weight_tying": REQUIRED, "include_qkv_bias": False,
        "rope": Only(True), "alibi": Only(False), "rope_full_precision": True, "layer_norm_type": Only("rms"),
        "layer_norm_with_affine": Only(True), "bias_for_layer_norm": Only(False, None),
        "attention_layer_norm": Only(False), "attention_layer_norm_with_affine": Only(True, False),
        "input_emb_norm": Only(False), "include_bias": Only(False), "activation_type": Only("silu"),
        "block_type": Only("llama"), "block_group_size": Only(1), "multi_query_attention": Only(None, False),
        "scale_logits": Only(False, True), "clip_qkv": Only(None),
    }, _LLADA_HARMLESS)
    rows = c["embedding_size"] or c["vocab_size"]
    if isinstance(rows, int) and isinstance(c["vocab_size"], int) and rows < c["vocab_size"]:
        raise ConfigError(f"config.json: embedding_size {rows} is below vocab_size {c['vocab_size']}.")
    return ModelConfig(
        family="llada", d_model=c["d_model"], n_layers=c["n_layers"], n_heads=c["n_heads"],
        n_kv_heads=c["n_heads"] if c["n_kv_heads"] is None else c["n_kv_heads"],
        head_dim=_integer_division(c["d_model"], c["n_heads"], "d_model"), d_ffn=c["mlp_hidden_size"], vocab_size=rows,
        rope_theta=c["rope_theta"], norm_eps=c["rms_norm_eps"], mask_id=c["mask_token_id"], eos_id=c["eos_token_id"],
        qkv_bias=bool(c["include_qkv_bias"]), tied=bool(c["weight_tying"]), rope_fp32=bool(c["rope_full_precision"]),
        logit_scale=c["d_model"] ** -0.5 if c["scale_logits"] else 1.0, raw=raw)


def read_dream(raw: dict) -> ModelConfig:
    """Dream-v0-Base, -Instruct, Dream-Coder, DiffuCoder (`model_type: Dream`)."""
    c = _read(raw, {
        "hidden_size": REQUIRED, "num_hidden_layers": REQUIRED, "num_attention_heads": REQUIRED,
        "num_key_value_heads": REQUIRED, "intermediate_size": REQUIRED, "vocab_size": REQUIRED,
        "mask_token_id": REQUIRED, "eos_token_id": None, "rope_theta": REQUIRED, "rms_norm_eps": REQUIRED,
        "tie_word_embeddings": False, "hidden_act": Only("silu"), "rope_scaling": Only(None),
        "use_sliding_window": Only(False), "use_mrope": Only(False),
    }, _COMMON | {"max_position_embeddings", "max_window_layers", "sliding_window", "attention_dropout",
                  "pad_token_id"})
    return ModelConfig(
        family="dream", d_model=c["hidden_size"], n_layers=c["num_hidden_layers"], n_heads=c["num_attention_heads"],
        n_kv_heads=c["num_key_value_heads"],
        head_dim=_integer_division(c["hidden_size"], c["num_attention_heads"], "hidden_size"),
        d_ffn=c["intermediate_size"], vocab_size=c["vocab_size"], rope_theta=c["rope_theta"],
        norm_eps=c["rms_norm_eps"], mask_id=c["mask_token_id"], eos_id=c["eos_token_id"], qkv_bias=True,
        tied=bool(c["tie_word_embeddings"]), rope_fp32=False, logit_shift=True, raw=raw)


READERS = {"llada": read_llada, "Dream": read_dream}


def read_config(raw: dict) -> ModelConfig:
    """A `config.json` as a ModelConfig; raises ConfigError with one sentence for anything that is not implemented."""
    kind = raw.get("model_type") if isinstance(raw, dict) else None
    if kind not in READERS:
        known = " and ".join(map(repr, READERS))
        raise ConfigError(f"config.json: model_type {kind!r} is not supported, only {known}.")
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


NAMES = {
    "llada": Names(
        "model.transformer.wte", "model.transformer.ln_f", "model.transformer.ff_out",
        "model.transformer.blocks.{}", "attn_norm", "ff_norm",
        {"qkv": ("q_proj", "k_proj", "v_proj"), "out": ("attn_out",), "gate_up": ("ff_proj", "up_proj"),
         "down": ("ff_out",)}),
    "dream": Names(
        "model.embed_tokens", "model.norm", "lm_head",
        "model.layers.{}", "input_layernorm", "post_attention_layernorm",
        {"qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "out": ("self_attn.o_proj",),
         "gate_up": ("mlp.gate_proj", "mlp.up_proj"), "down": ("mlp.down_proj",)}),
}
