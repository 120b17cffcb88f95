"""Memory of a model, exactly, from its configuration: what Table 4's right half comes from.

Weights only, as they lie on the device: every linear at its bits, with what its scales, zero-point sums, transforms and
corrections add. Activations and scratch come on top and are measured (`bench.py`).
"""

from math import prod

from checkpoint.families import NAMES, ModelConfig, linear_shapes, norm_names
from checkpoint.folder import Checkpoint
from methods import DLLMQUANT, ROTATED, QuantConfig
from methods.hadamard import exists, hadamard_sizes
from methods.quarot import quarot_clip
from methods.sgat import kronecker_sizes
from starquant import tac_block_size

WIDTH = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


def code_bytes(rows: int, columns: int, bits: int) -> int:
    """Codes of at most 4 bits lie two a byte, row by row; wider ones take a byte each."""
    return rows * (-(-columns // 2) if bits <= 4 else columns)


def factor_shapes(config, d: int, behind_norm: bool) -> list[tuple[int, ...]]:
    """Shapes of the factors of P that a method stores for a linear of width d; `behind_norm`: qkv and gate_up."""
    def square(sizes):
        return [(n, n) for n in sizes]

    match config.method:
        case "awq" | "dllmquant+":
            return [(d,)]
        case "quarot" | "dllmquant++":
            return [(d,)] * behind_norm + square(hadamard_sizes(d))
        case "flatquant" | "freeact":
            return [(d,), *square(kronecker_sizes(d))]
        case "starquant":
            return {"dense": [(d, d)], "kronecker": square(kronecker_sizes(d)), "none": []}[config.transform]
        case "starquant+":
            if config.balance == "kronecker":
                return square(hadamard_sizes(d))
            b = d if config.balance == "dense" else tac_block_size(d, config.balance_block)
            return square([d]) if b == d else [(d // b, b, b), (d // b, d // b)]
    return []


def transform_bytes(config, d: int, behind_norm: bool = False) -> int:
    """Bytes of P and of feedback for a linear of width d: in bf16 of `starquant+`, in fp32 of the others."""
    factors = factor_shapes(config, d, behind_norm)
    numbers = sum(map(prod, factors))
    if config.method != "starquant+":
        return 4 * numbers
    # feedback: a matrix for each block, as wide as those of P
    width = factors[-1][0] if config.balance == "kronecker" else factors[0][-1]
    return 2 * (numbers + d * width * (config.rounding == "feedback"))


def memory_table(c: ModelConfig, weight_bits: int = 4, head_bits: int = 16, embed_bits: int | None = None,
                 method: str = "starquant", weights: str = "packed") -> dict[str, int]:
    """Bytes of a quantized model by part, their `total`, and `sixteen_bit`, the same model in bf16.

    method: "starquant" (Kronecker product and TAC) or "starquant+" (blocks of 64), as their defaults are. weights:
    "packed" or "int8" residency. Norm gains, and embedding and head at 16 bits, are bf16. A tied head costs its channel
    scales' sums only.
    """
    if method not in ("starquant", "starquant+"):
        raise ValueError(f"the bytes of {method!r} are not known here; starquant and starquant+ are.")
    shapes, embed_bits, plus = linear_shapes(c), embed_bits or head_bits, method == "starquant+"
    weight_bits = 8 if weights == "int8" else weight_bits
    rows, widths = (sum(size) for size in zip(*shapes.values(), strict=True))
    z, norms = c.n_heads * c.head_dim, (2 * c.n_layers + 1) * c.d_model * 2
    bias = shapes["qkv"][0] * c.qkv_bias
    V, D = c.vocab_size, c.d_model
    outer = V * D

    table = {
        "linears": c.n_layers * sum(code_bytes(*shape, weight_bits) for shape in shapes.values()),
        # per output channel: scale fp32, row sum int32; biases fp32
        "scales": c.n_layers * (8 * rows + 4 * bias),
        "transforms": c.n_layers * sum(transform_bytes(QuantConfig(method=method), d) for _, d in shapes.values()),
        # the mean of either state and its output, and clipping, fp32
        "centring": c.n_layers * 4 * (2 * (widths + rows) + 2 * len(shapes)) * plus,
        # M and d of each block of g channels: z (g + 1) numbers in fp32
        "tac": c.n_layers * 4 * z * (tac_block_size(z) + 1) * (not plus),
        "embedding": 2 * outer if embed_bits == 16 else code_bytes(V, D, embed_bits) + 4 * V,
        "head": 2 * outer if head_bits == 16 else code_bytes(V, D, head_bits) + 8 * V,
        "norms": norms,
    }
    if c.tied:
        table["head"] = 0 if head_bits == 16 else 8 * V
    total = sum(table.values())
    linears = c.n_layers * (sum(r * k for r, k in shapes.values()) + bias)
    return table | {"total": total, "sixteen_bit": 2 * (linears + outer * (1 if c.tied else 2)) + norms}


def output_bytes(source: Checkpoint, config, compensated: bool) -> tuple[list[int], int]:
    """Bytes of the tensors in each block's shard and in the last shard (embedding, final norm, head).

    `compensated`: the method stores TAC. Equal to what is written, to the byte (tested for every method).
    """
    c, names = source.config, NAMES[source.config.family]

    def stored(name):
        return prod(source.shapes[name]) * WIDTH[source.dtypes[name]]

    linears, h = 0, c.head_dim
    for fused, (rows, d) in linear_shapes(c).items():
        numbers = rows * (1 + (not config.symmetric) + (fused == "qkv" and c.qkv_bias))  # scales, zeros, biases
        clipped = config.method in ("flatquant", "freeact", "starquant+") or (
            config.method in ROTATED and quarot_clip(config.abits))
        numbers += 2 * bool(clipped)
        numbers += 2 * (d + rows) * (config.method == "starquant+" and config.centre != "none")
        linears += code_bytes(rows, d, config.wbits) + transform_bytes(config, d, fused in ("qkv", "gate_up"))
        linears += 4 * numbers
    z = c.n_heads * h
    linears += 4 * z * (tac_block_size(z, config.tac_block) + 1) if compensated else 0
    if min(config.kv_bits, config.softmax_bits) < 16:
        static = config.method in DLLMQUANT and config.kv_bits < 16
        linears += 8 + 4 * h * h * (config.method in ROTATED and exists(h)) + 8 * c.n_kv_heads * h * static
    blocks = [linears + sum(stored(f"{names.block.format(i)}.{n}.weight") for n in norm_names(c).values())
              for i in range(c.n_layers)]
    if config.head_bits == 16:
        outer = [names.embed, names.final_norm, *([] if c.tied else [names.head])]
        return blocks, sum(stored(f"{n}.weight") for n in outer)
    V, D, bits = c.vocab_size, c.d_model, config.head_bits if c.tied else config.embed_bits or config.head_bits
    head = 0 if c.tied else code_bytes(V, D, config.head_bits) + 4 * V
    return blocks, code_bytes(V, D, bits) + 4 * V + head + 2 * D
