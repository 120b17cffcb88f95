"""Memory of a model, exactly, from its configuration: what Table 4's right half comes from.

Weights only, as they lie on the device: every linear at its bits, with what its scales, zero-point sums, transforms and
corrections add. Activations and scratch come on top and are measured (`bench.py`).
"""

from families import ModelConfig, linear_shapes
from sgat import kronecker_sizes
from starquant import tac_block_size


def code_bytes(rows: int, columns: int, bits: int) -> int:
    """Codes of at most 4 bits lie two a byte, row by row; wider ones take a byte each."""
    return rows * (-(-columns // 2) if bits <= 4 else columns)


def memory_table(c: ModelConfig, weight_bits: int = 4, head_bits: int = 16, embed_bits: int | None = None,
                 transform: str | None = "kronecker", tac: bool = True, weights: str = "packed") -> dict[str, int]:
    """Bytes of a quantized model by part, their `total`, and `sixteen_bit`, the same model in bf16.

    transform: "kronecker", "dense" or None, one per fused linear, fp32. weights: "packed" or "int8" residency.
    Norm gains, and embedding and head at 16 bits, are bf16. A tied head costs its channel scales' sums only.
    """
    shapes, embed_bits = linear_shapes(c), embed_bits or head_bits
    weight_bits = 8 if weights == "int8" else weight_bits
    basis = {"kronecker": lambda d: sum(n * n for n in kronecker_sizes(d)), "dense": lambda d: d * d, None: lambda d: 0}
    rows = sum(r for r, _ in shapes.values())
    z, norms = c.n_heads * c.head_dim, (2 * c.n_layers + 1) * c.d_model * 2
    bias = shapes["qkv"][0] * c.qkv_bias
    V, D = c.vocab_size, c.d_model
    outer = V * D
    table = {
        "linears": c.n_layers * sum(code_bytes(*shape, weight_bits) for shape in shapes.values()),
        # per output channel: scale fp32, row sum int32; biases fp32
        "scales": c.n_layers * (8 * rows + 4 * bias),
        "transforms": c.n_layers * 4 * sum(basis[transform](columns) for _, columns in shapes.values()),
        # M and d of each block of g channels: z (g + 1) numbers in fp32
        "tac": c.n_layers * 4 * z * (tac_block_size(z) + 1) * tac,
        "embedding": 2 * outer if embed_bits == 16 else code_bytes(V, D, embed_bits) + 4 * V,
        "head": 2 * outer if head_bits == 16 else code_bytes(V, D, head_bits) + 8 * V,
        "norms": norms,
    }
    if c.tied:
        table["head"] = 0 if head_bits == 16 else 8 * V
    total = sum(table.values())
    linears = c.n_layers * (sum(r * k for r, k in shapes.values()) + bias)
    return table | {"total": total, "sixteen_bit": 2 * (linears + outer * (1 if c.tied else 2)) + norms}
