"""The modules of a quantized model: the integer linear (Eq. 13), the integer embedding and TAC (Eq. 17).

What runs when an INT4 linear runs
----------------------------------
`QuantLinear.forward(x, state)` takes activations x (..., d) and the token states (...) and returns (..., C):

1. Transform. `phi` computes Φ_s(x) = x P G_s (Eq. 11): P is a product of factors (`starquant.Factor`), and the gate G_s
   zeroes the channels that belong to the other token state. Where the layer has a `mean`, a token first loses the mean
   of its state.
2. Quantize. Every token gets its own scale and zero point (Eq. 4) and becomes integers of `abits` bits (Eq. 2). `clip`
   narrows the token's range before that, and `feedback` rounds the channels against each other (`methods/plus.py`).
3. Multiply. The integers meet the packed weight, which all tokens share, and the sums are exact int32
   (`kernels.int_linear` has the formulas).
4. Finish. The sums are scaled back to real numbers; `finish` adds the bias and the output of the mean of step 1.

Two implementations do these steps: `runtime.products.linear` on a GPU that passes its self-checks, and
`runtime.cpu.linear` everywhere else. For the same transformed tokens both give the integers of `kernels.int_linear`.
Within a block on such a GPU, step 1 also does the norm or SiLU before it, and step 4 adds the block's input
(`runtime.fusion`).

Every quantization method of this project is a way to choose the tensors of a `QuantLinear` (`methods/`). Their names
are the names of the tensors in a checkpoint.
"""

import copy
from typing import NamedTuple

import torch
from torch import nn

import kernels
import starquant
from runtime import checks, cpu, cuda, products
from starquant import Across, Blocks, Dense, Diagonal, Kronecker, apply_basis, factors, subspace_gates, tac_apply


class Weight(NamedTuple):
    """An integer weight: codes (C, d) int8, centred, or packed two a byte, (C, ⌈d/2⌉) uint8, with `width` d; scale
    (C,); zero (C,) int32, centred, or None for symmetric weights."""

    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None = None
    bits: int = 4
    width: int | None = None


class Grid(NamedTuple):
    """How activations are rounded: their bits; clip (2,), factors by which a token's least and largest value shrink;
    feedback (d/b, b, b), the matrices of rounding by feedback."""

    bits: int = 4
    clip: torch.Tensor | None = None
    feedback: torch.Tensor | None = None


class Centre(NamedTuple):
    """The mean of each token state, (2, d), and its exact output μ Wᵀ, (2, C): row 0 unmasked, row 1 masked tokens."""

    mean: torch.Tensor | None = None
    shift: torch.Tensor | None = None


class Quantized(nn.Module):
    """A module that moves between devices as a whole, and whose tensors keep their types.

    A model may be cast to bf16. Its scales and transforms stay what they were fitted as.
    """

    def _apply(self, function, recurse=True):
        return super()._apply(lambda tensor: tensor.to(function(tensor[:0]).device), recurse)


class QuantLinear(Quantized):
    """Eq. 13 on integers, for every method; the module's docstring says what runs."""

    def __init__(self, *, weight: Weight, grid: Grid, P=(), d_m: int = 0, d_u: int = 0, bias=None,
                 centre: Centre | None = None):
        """P: a list of factors, () for none; d_m, d_u: channels of the gated subspaces (Eq. 9), 0 for no gates; bias
        (C,). A weight of at most 4 bits is stored packed. Factors in bf16 stay so, others are stored in fp32.

        ValueError if packed codes do not hold `weight.width` channels.
        """
        super().__init__()
        self.in_features, self.d_m, self.d_u = weight.width or weight.codes.shape[1], d_m, d_u
        self.abits, self.wbits, self.packed = grid.bits, weight.bits, weight.bits <= 4
        codes = weight.codes
        if codes.dtype == torch.uint8 and codes.shape[1] != (self.in_features + 1) // 2:
            raise ValueError(f"Rows of {codes.shape[1]} packed bytes do not hold {self.in_features} codes.")
        self.register_buffer("weight_packed", kernels.pack_int4(codes) if self.packed and codes.dtype == torch.int8
                             else codes)
        self.register_buffer("weight_scale", weight.scale.float())
        self.register_buffer("weight_zero", weight.zero)
        for name, tensor in {"bias": bias, "clip": grid.clip, **(centre or Centre())._asdict()}.items():
            self.register_buffer(name, None if tensor is None else tensor.float())
        self.register_buffer("feedback", None if grid.feedback is None else grid.feedback.bfloat16().contiguous())
        self.register_buffer("weight_sum", kernels.row_sums(codes, self.in_features), persistent=False)
        P = factors(list(P))
        self.kinds = [type(factor) for factor in P]
        for i, factor in enumerate(P):
            for name, tensor in zip(factor_names(i, type(factor)), factor, strict=True):
                tensor = tensor.detach() if tensor.dtype == torch.bfloat16 else tensor.detach().float()
                self.register_buffer(name, tensor.contiguous())
        self._converted = {}  # by dtype and device: what `basis` and `gates` return

    @classmethod
    def fold(cls, weight, P=(), d_m=0, d_u=0, abits=4, wbits=4, bias=None, symmetric=True):
        """Fold P into weight (C, d) (Eq. 12) and round it to nearest per output channel (Eqs. 2 and 4)."""
        folded = starquant.fold_weight(weight.float(), list(P))
        return cls(weight=quantize_weight(folded, wbits, symmetric), grid=Grid(abits), P=P, d_m=d_m, d_u=d_u, bias=bias)

    @classmethod
    def from_tensors(cls, tensors: dict, in_features: int, d_m: int, d_u: int, abits: int, wbits: int):
        """Rebuild from a state dict; its packed weight is taken as it is."""
        kinds, get = factor_kinds({name: tensor.shape for name, tensor in tensors.items()}, in_features), tensors.get
        P = [kind(*(tensors[name] for name in factor_names(i, kind))) for i, kind in enumerate(kinds)]
        weight = Weight(tensors["weight_packed"], tensors["weight_scale"], get("weight_zero"), wbits, in_features)
        return cls(weight=weight, grid=Grid(abits, get("clip"), get("feedback")), P=P, d_m=d_m, d_u=d_u,
                   bias=get("bias"), centre=Centre(get("mean"), get("shift")))

    # ---- what runs ----

    def forward(self, x, state=None):
        """x (..., d), state (...) -> (..., C) in x's dtype. `state` may be None where no gate or mean depends on it."""
        return products.linear(self, x, state) if products.serves(self, x) else cpu.linear(self, x, state)

    def phi(self, x, state=None):
        """Φ_s(x) of Eq. 11 for every token, (..., d) fp32; tokens lose the mean of their state first."""
        x = x.float()
        x = x if self.mean is None else x - self.mean[state.long()]
        x = apply_basis(x, self.basis(x))
        # Φ_s(X) = X P G_s
        return x * torch.where(state[..., None], *self.gates(x)) if self.d_m or self.d_u else x

    def finish(self, y, state=None):
        """y (..., C) + bias + μ_s Wᵀ, the output of the mean that `phi` took off."""
        y = y if self.bias is None else y + self.bias
        return y if self.shift is None else y + self.shift[state.long()]

    # ---- its parts, as tensors ----

    @property
    def P(self) -> list:
        """The factors of P, fp32."""
        return [factor.to(torch.float32) for factor in self._stored()]

    def basis(self, x) -> list:
        """The factors of P in the dtype and on the device of x."""
        return self._once("P", x, lambda: [factor.to(x) for factor in self._stored()])

    def gates(self, x):
        """The diagonals of G_m and G_u (Eq. 9), (d,) each, in the dtype and on the device of x."""
        sizes = self.in_features, self.d_m, self.d_u
        return self._once(f"G {sizes}", x, lambda: subspace_gates(*sizes, x.device, x.dtype))

    def codes(self):
        """Weight codes (C, d) int8."""
        # unpacked ones are int8, or fp8 numbers where `runtime.cuda` multiplies those
        return (kernels.unpack_int4(self.weight_packed, self.in_features) if self.packed
                else self.weight_packed.to(torch.int8))

    def weight(self):
        """W̃ dequantized, (C, d) fp32."""
        zero = 0 if self.weight_zero is None else self.weight_zero[:, None]
        return self.weight_scale[:, None] * (self.codes() - zero).float()

    def unpack_weights(self):
        """Keep int8 codes instead of packed ones: twice the memory, no unpacking per call. Saving packs them again."""
        self.weight_packed, self.packed = self.codes().contiguous(), False
        return self

    def _stored(self) -> list:
        return [kind(*(getattr(self, name) for name in factor_names(i, kind))) for i, kind in enumerate(self.kinds)]

    def _once(self, what: str, x, convert):
        """convert(), kept for the dtype and device of x. Earlier results stay: a recorded CUDA graph may read them."""
        key = what, x.dtype, x.device
        if key not in self._converted:
            self._converted[key] = convert()
        return self._converted[key]

    # ---- what nn.Module calls when it is printed or its tensors change ----

    def extra_repr(self):
        P = " · ".join(kind.__name__ for kind in self.kinds) or "none"
        gates = f"gates for {self.d_m} masked, {self.d_u} unmasked" if self.d_m or self.d_u else "no gates"
        return f"{self.in_features} -> {len(self.weight_scale)}, W{self.wbits}A{self.abits}, P: {P}, {gates}"

    def _apply(self, *args, **kwargs):
        self._converted.clear()
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        name = f"{prefix}weight_packed"
        if self.wbits <= 4 and not self.packed and name in state_dict:
            state_dict = state_dict | {name: kernels.unpack_int4(state_dict[name], self.in_features)}
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._converted.clear()
        self.weight_sum = kernels.row_sums(self.weight_packed if self.packed else self.codes(), self.in_features)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.wbits <= 4 and not self.packed:
            destination[prefix + "weight_packed"] = kernels.pack_int4(self.codes())

    def __getstate__(self):
        """A copy or a pickle converts for itself."""
        return self.__dict__ | {"_converted": {}}


def factor_names(i: int, kind) -> list[str]:
    """Names of the stored tensors of factor i: transform_0, or transform_0P1 and transform_0P2."""
    return [f"transform_{i}{field if len(kind._fields) > 1 else ''}" for field in kind._fields]


def factor_kinds(shapes: dict, d: int) -> list:
    """Kinds of the factors of P that a QuantLinear of width d stores, from its tensors' shapes by name.

    A file does not name kinds; the names and shapes of the tensors tell them.
    """
    kinds = []
    while (name := f"transform_{len(kinds)}") in shapes or f"{name}P1" in shapes:
        shape = shapes.get(name)
        kinds.append(Kronecker if shape is None else {1: Diagonal, 3: Blocks}.get(
            len(shape), Dense if shape[:1] == (d,) else Across))
    return kinds


class QuantEmbedding(Quantized):
    """An embedding of integer rows with one scale each; a look-up dequantizes the rows it takes, and only those."""

    def __init__(self, weight_packed, scale, width: int, bits=8, dtype=torch.float32):
        """weight_packed (V, D) int8 or, up to 4 bits, (V, ⌈D/2⌉) uint8; scale (V,); width D; the output has dtype."""
        super().__init__()
        self.width, self.bits, self.dtype = width, bits, dtype
        self.register_buffer("weight_packed", weight_packed)
        self.register_buffer("weight_scale", scale.float())

    @classmethod
    def fold(cls, weight, bits: int):
        """Round an embedding (V, D) to nearest."""
        codes, scale = quantize_weight(weight, bits)[:2]
        return cls(kernels.pack_int4(codes) if bits <= 4 else codes, scale, weight.shape[1], bits, weight.dtype)

    def _apply(self, function, recurse=True):
        self.dtype = function(torch.empty(0, dtype=self.dtype)).dtype
        return super()._apply(function, recurse)

    def forward(self, ids):
        """ids (...) -> (..., D)."""
        rows = self.weight_packed[ids]
        rows = kernels.unpack_int4(rows, self.width) if self.bits <= 4 else rows
        # X̂ = s X_int
        return (self.weight_scale[ids][..., None] * rows).to(self.dtype)


def quantize_weight(weight, bits: int, symmetric: bool = True) -> Weight:
    """weight (C, d) rounded to nearest, each row on its own grid (Eqs. 2 and 4), in pieces that fit into the caches."""
    parts, half = [], 2 ** (bits - 1)
    for part in weight.split(4096):
        scale, zero_point = starquant.quant_params(part.float(), bits, symmetric)
        codes = starquant.quantize(part.float(), scale, zero_point, bits) - half
        parts.append((codes.to(torch.int8), scale[:, 0], (zero_point[:, 0] - half).to(torch.int32)))
    codes, scale, zero = map(torch.cat, zip(*parts, strict=True))
    return Weight(codes, scale, None if symmetric else zero, bits)


class TAC(Quantized):
    """Eq. 17 as a layer between softmax·V and the attention output projection: M (B, g, g), bias (B, g).

    The same correction could be applied to V, because the rows of the softmax sum to one. After softmax·V it costs no
    more, and it also serves grouped queries (Dream), where heads share a V but not a correction.
    """

    def __init__(self, M, bias):
        super().__init__()
        self.register_buffer("M", M.float().contiguous())
        self.register_buffer("bias", bias.float().contiguous())

    def extra_repr(self):
        return "{} blocks of {} channels".format(*self.M.shape)

    def forward(self, z):
        if self.M.shape[-1] == cuda.TAC_BLOCK and checks.usable(z, "tac"):
            return cuda.tac(z, self.M, self.bias)
        return tac_apply(z.float(), self.M, self.bias).to(z.dtype)


def rebuilt(module: nn.Module, **children) -> nn.Module:
    """A shallow copy of a module with some children replaced; every other part is shared, nothing is copied."""
    new = copy.copy(module)
    new._modules = {**module._modules, **children}
    return new
