"""What a quantized model stores: the names, shapes and types of its tensors, described once.

`check_tensors` compares this description with the headers of a folder before the loader fills a model
(`checkpoint/loading.py`). The plan of a calibration and the table of memory sum its bytes (`methods/storage.py`). What
a method stores besides the weight is said beside its fit, in fields of `Linear`.

Every quantized linear is a `Linear` here. A block is its norms, its four linears and what attention stores. The outer
part is embedding, final norm and head. A folder has a shard for each block and one for the outer part, as `shards` has.
"""

from dataclasses import dataclass, field
from math import prod
from typing import NamedTuple

from checkpoint.families import NAMES, QK_NORMS, ModelConfig, linear_shapes, norm_names
from runtime.layers import factor_kinds, factor_names
from starquant import Across, Blocks, Dense, Diagonal, Factor, Kronecker

WIDTH = {"F64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "U8": 1, "I8": 1}  # bytes of safetensors' types


class Tensor(NamedTuple):
    """A tensor's shape, and its type as safetensors names it."""

    shape: tuple[int, ...]
    dtype: str = "F32"

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * WIDTH[self.dtype]


@dataclass(frozen=True)
class Linear:
    """What a QuantLinear with weight (C, d) stores."""

    C: int
    d: int
    bits: int = 4  # of the weight
    zero: bool = False  # asymmetric weights have zero points
    bias: bool = False
    clip: bool = False
    centred: bool = False  # the mean of each token state, and its output
    factors: tuple[Factor, ...] = ()  # of P, holding shapes in place of tensors: Kronecker((64, 64), (64, 64))
    factor_dtype: str = "F32"
    feedback: int = 0  # channels in a block of rounding by feedback, 0 for rounding to nearest

    def tensors(self) -> dict[str, Tensor]:
        """The stored tensors by their names behind the linear's own."""
        C, d, b = self.C, self.d, self.feedback
        parts = {**integers(C, d, self.bits),
                 "weight_zero": self.zero and Tensor((C,), "I32"), "bias": self.bias and Tensor((C,)),
                 "clip": self.clip and Tensor((2,)), "mean": self.centred and Tensor((2, d)),
                 "shift": self.centred and Tensor((2, C)), "feedback": b and Tensor((d // b, b, b), "BF16")}
        for i, factor in enumerate(self.factors):
            names = factor_names(i, type(factor))
            parts |= {name: Tensor(shape, self.factor_dtype) for name, shape in zip(names, factor, strict=True)}
        return {name: tensor for name, tensor in parts.items() if tensor}

    @classmethod
    def read(cls, shapes: dict, C: int, d: int, bits: int) -> "Linear":
        """The linear that a folder's tensors mean, from the shapes in their headers by the names of `tensors`.

        A folder does not say which optional parts a linear has; the names do. Where a shape does not fit, the
        description holds the one that would.
        """
        factors = []
        for i, kind in enumerate(factor_kinds(shapes, d)):
            n = _first(shapes[factor_names(i, kind)[0]], d, 1 if kind is Blocks else d)
            factors.append(kind(*{Diagonal: [(d,)], Dense: [(d, d)], Kronecker: [(n, n), (d // n, d // n)],
                                  Blocks: [(n, d // n, d // n)], Across: [(n, n)]}[kind]))
        return cls(C, d, bits, "weight_zero" in shapes, "bias" in shapes, "clip" in shapes,
                   "mean" in shapes or "shift" in shapes, tuple(factors),
                   feedback=d // _first(shapes["feedback"], d, 1) if "feedback" in shapes else 0)


def _first(shape, d: int, otherwise: int) -> int:
    """The first size of a shape where it divides d."""
    return shape[0] if shape and shape[0] and d % shape[0] == 0 else otherwise


def below(tensors: dict, prefix: str) -> dict:
    """The items whose names begin with `prefix`, by the rest of their names."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def integers(C: int, d: int, bits: int) -> dict[str, Tensor]:
    """Codes and scales of an integer matrix (C, d). Codes of at most 4 bits lie two a byte, row by row."""
    codes = Tensor((C, -(-d // 2)), "U8") if bits <= 4 else Tensor((C, d), "I8")
    return {"weight_packed": codes, "weight_scale": Tensor((C,))}


@dataclass(frozen=True)
class Block:
    """What a quantized block stores besides its norms."""

    linears: dict[str, Linear]
    tac: int = 0  # g, channels in a block of TAC, 0 without TAC
    attention: dict[str, Tensor] = field(default_factory=dict)  # of a QuantAttention

    def tensors(self, c: ModelConfig) -> dict[str, Tensor]:
        """All tensors of the block by their names behind the block's own. What stays in 16 bit is described as BF16."""
        out = {f"{theirs}.weight": Tensor((c.head_dim if ours in QK_NORMS else c.d_model,), "BF16")
               for ours, theirs in norm_names(c).items()}
        for name, linear in self.linears.items():
            out |= {f"{name}.{suffix}": tensor for suffix, tensor in linear.tensors().items()}
        if g := self.tac:
            n = c.n_heads * c.head_dim // g
            out |= {"tac.M": Tensor((n, g, g)), "tac.bias": Tensor((n, g))}
        return out | {f"softmax_value.{suffix}": tensor for suffix, tensor in self.attention.items()}

    @classmethod
    def read(cls, shapes: dict, c: ModelConfig, bits: int) -> "Block":
        """The block that a folder's tensors mean, from the shapes in their headers by the names of `tensors`."""
        linears = {name: Linear.read(below(shapes, f"{name}."), C, d, bits)
                   for name, (C, d) in linear_shapes(c).items()}
        tac, found, z = below(shapes, "tac."), below(shapes, "softmax_value."), c.n_heads * c.head_dim
        n = _first(tac.get("M"), z, 1) if tac else z
        return cls(linears, z // n if tac else 0,
                   attention(c, "rotation" in found, "value_scale" in found) if found else {})


def attention(c: ModelConfig, rotation: bool, static: bool) -> dict[str, Tensor]:
    """Tensors of a QuantAttention; `rotation`: it rotates the heads, `static`: V has a static scale per channel."""
    h, scale = c.head_dim, Tensor((c.n_kv_heads, 1, c.head_dim))
    return {"bits": Tensor((2,), "I32"), **({"rotation": Tensor((h, h))} if rotation else {}),
            **({"value_scale": scale, "value_zero": scale} if static else {})}


def outer(c: ModelConfig, head_bits: int = 16, embed_bits: int | None = None) -> dict[str, Tensor]:
    """Tensors of embedding, final norm and head. A head tied to the embedding stores nothing of its own."""
    names, V, D = NAMES[c.family], c.vocab_size, c.d_model

    def matrix(name, bits):
        tensors = integers(V, D, bits) if head_bits < 16 else {"weight": Tensor((V, D), "BF16")}
        return {f"{name}.{suffix}": tensor for suffix, tensor in tensors.items()}

    return (matrix(names.embed, embed_bits or head_bits) | {f"{names.final_norm}.weight": Tensor((D,), "BF16")}
            | ({} if c.tied else matrix(names.head, head_bits)))


def shards(c: ModelConfig, blocks: list[Block], head_bits: int = 16, embed_bits: int | None = None) -> list[dict]:
    """Every tensor of a quantized folder by its full name: a dictionary for each block, and one for the outer part."""
    prefixes = map(NAMES[c.family].block.format, range(len(blocks)))
    return [*({f"{prefix}.{name}": tensor for name, tensor in block.tensors(c).items()}
              for prefix, block in zip(prefixes, blocks, strict=True)), outer(c, head_bits, embed_bits)]
