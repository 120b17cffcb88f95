"""Bytes of a model that a method quantizes: what a calibration writes, and what a loaded model takes.

`checkpoint/storage.py` describes the tensors. Every method says in its `stored` which of them it has besides the
weight, its scales and the bias (`methods/__init__.py`).
"""

from dataclasses import replace
from math import prod

from checkpoint import storage
from checkpoint.families import NAMES, ModelConfig, linear_shapes
from checkpoint.folder import Checkpoint
from checkpoint.loading import expected_tensors
from methods import METHODS, QuantConfig
from methods.hadamard import exists
from methods.settings import Settings
from starquant import tac_block_size

# the part of a memory table that a stored tensor of a linear belongs to; factors of P and TAC have names of their own
PARTS = {"weight_packed": "linears", "weight_scale": "scales", "weight_zero": "scales", "bias": "scales",
         "clip": "centring", "mean": "centring", "shift": "centring", "feedback": "transforms", "weight": "norms"}


def stored_block(c: ModelConfig, config: Settings) -> storage.Block:
    """What one block stores after calibration with these settings."""
    linears = {name: stored_linear(config, C, d, name in ("qkv", "gate_up"), name == "qkv" and c.qkv_bias)
               for name, (C, d) in linear_shapes(c).items()}
    tac = tac_block_size(c.n_heads * c.head_dim, config.tac_block) if config.compensated else 0
    attention = {}
    if min(config.kv_bits, config.softmax_bits) < 16:
        static = config.diffusion_aware and config.kv_bits < 16
        attention = storage.attention(c, rotation=config.rotated and exists(c.head_dim), static=static)
    return storage.Block(linears, tac, attention)


def stored_linear(config: Settings, C: int, d: int, behind_norm: bool, bias: bool = False) -> storage.Linear:
    """What a linear with weight (C, d) stores; behind_norm: a norm makes its input, as that of qkv and gate_up."""
    return storage.Linear(C, d, config.wbits, zero=not config.symmetric, bias=bias,
                          **METHODS[config.method].stored(config, d, behind_norm))


def output_bytes(source: Checkpoint, config: Settings) -> list[int]:
    """Bytes of the tensors in each block's shard and, at last, in that of embedding, final norm and head.

    Equal to what is written, to the byte (tested for every method). What stays in 16 bit keeps its type.
    """
    c = source.config
    shards = storage.shards(c, [stored_block(c, config)] * c.n_layers, config.head_bits, config.embed_bits)
    return [sum(tensor._replace(dtype=source.dtypes.get(name, tensor.dtype)).nbytes for name, tensor in shard.items())
            for shard in shards]


def memory_table(c: ModelConfig, head_bits: int = 16, embed_bits: int | None = None, method: str = "starquant",
                 weights: str = "packed") -> dict[str, int]:
    """Bytes of a quantized model in memory by part, their `total`, and `sixteen_bit`, the same model in bf16.

    Weights only, with the method's default settings (the right half of Table 4). Activations and scratch come on top
    and are measured (`bench.py`). weights: "packed" or "int8" residency. What stays in 16 bit is bf16. Beside what is
    stored, a linear keeps an int32 sum for each row of its weight. A head tied to an integer embedding keeps its scales
    and these sums.
    """
    block = stored_block(c, QuantConfig(method))
    if weights == "int8":
        block = replace(block, linears={name: replace(linear, bits=8) for name, linear in block.linears.items()})
    table = dict.fromkeys(("linears", "scales", "transforms", "centring", "tac", "attention", "embedding", "head",
                           "norms"), 0)
    for name, tensor in block.tensors(c).items():
        part, _, suffix = name.partition(".")
        key = {"tac": "tac", "softmax_value": "attention"}.get(part) or PARTS.get(suffix, "transforms")
        table[key] += c.n_layers * tensor.nbytes
    table["scales"] += c.n_layers * 4 * sum(C for C, _ in linear_shapes(c).values())
    names, outer = NAMES[c.family], storage.outer(c, head_bits, embed_bits)
    for part, module in {"embedding": names.embed, "head": names.head, "norms": names.final_norm}.items():
        table[part] += sum(tensor.nbytes for name, tensor in outer.items() if name.startswith(f"{module}."))
    if head_bits < 16:
        table["head"] += 4 * c.vocab_size * (2 if c.tied else 1)
    return table | {"total": sum(table.values()), "sixteen_bit": 2 * sum(map(prod, expected_tensors(c).values()))}
