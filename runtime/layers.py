"""What runs: the folded integer linear (Eq. 13), the integer embedding and TAC (Eq. 17) as modules, one runtime for all
methods. Each has its readable counterpart in `starquant.py`; tests compare them."""

import torch
from torch import nn

import kernels
from runtime import cuda
from starquant import (
    Kronecker,
    apply_basis,
    clip_range,
    fake_quantize,
    fold_weight,
    in_dtype,
    linear,
    quant_params,
    quantize,
    state_gate,
    tac_apply,
)


class QuantLinear(nn.Module):
    """Eq. 13 on integers: gate by token state, transform, per-token codes, one shared packed weight.

    Every method of this project is a way to fit one: `P` is a list of factors (see `apply_basis`), empty for none;
    d_m = d_u = 0 means no gates; `clip` narrows every token's range (`clip_range`); `centre` takes the mean of a
    token's state off before P and adds that mean's output μ_s Wᵀ behind the integers, exactly; `feedback` rounds
    activations by feedback (`feedback.py`). Weight codes of at most 4 bits are stored two a byte, wider ones as int8.
    """

    def __init__(self, codes, scale, P=(), d_m=0, d_u=0, abits=4, wbits=4, bias=None, zero=None, clip=None,
                 centre=(None, None), feedback=None, in_features=None):
        """codes (C, d) int8 centred, or packed, (C, ⌈d/2⌉) uint8 with in_features d; scale (C,) fp32, bias (C,), zero
        (C,) int32 centred or None (symmetric), clip (2,) or None, centre (μ (2, d), μ Wᵀ (2, C)), row 0 of unmasked,
        row 1 of masked tokens, feedback (d/b, b, b).

        Factors of P in bf16 stay so, others are kept in fp32.
        """
        super().__init__()
        self.in_features, self.d_m, self.d_u = in_features or codes.shape[1], d_m, d_u
        self.abits, self.wbits = abits, wbits
        if codes.dtype == torch.uint8 and codes.shape[1] != (self.in_features + 1) // 2:
            raise ValueError(f"Rows of {codes.shape[1]} packed bytes do not hold {self.in_features} codes.")
        self.packed, self._bases = wbits <= 4, {}
        to_pack = self.packed and codes.dtype == torch.int8
        self.register_buffer("weight_packed", kernels.pack_int4(codes) if to_pack else codes)
        self.register_buffer("weight_scale", scale.float())
        self.register_buffer("weight_zero", zero)
        self.register_buffer("bias", None if bias is None else bias.float())
        for name, tensor in (("clip", clip), ("mean", centre[0]), ("shift", centre[1])):
            self.register_buffer(name, None if tensor is None else tensor.float())
        self.register_buffer("feedback", None if feedback is None else feedback.to(torch.bfloat16).contiguous())
        self.register_buffer("weight_sum", kernels.row_sums(codes, self.in_features), persistent=False)
        self.kinds = []  # "kronecker" or "matrix", one per factor
        for i, factor in enumerate(P):
            parts = factor._asdict() if isinstance(factor, Kronecker) else {"": factor}
            self.kinds.append("kronecker" if isinstance(factor, Kronecker) else "matrix")
            for name, tensor in parts.items():
                tensor = tensor.detach() if tensor.dtype == torch.bfloat16 else tensor.detach().float()
                self.register_buffer(f"transform_{i}{name}", tensor.contiguous())

    @classmethod
    def fold(cls, weight, P=(), d_m=0, d_u=0, abits=4, wbits=4, bias=None, symmetric=True):
        """Fold P into weight (C, d) and round to nearest per output channel (Eqs. 4 and 12)."""
        folded = fold_weight(weight.float(), list(P)) if P else weight.float()
        codes, scale, zero = quantize_weight(folded, wbits, symmetric)
        return cls(codes, scale, P, d_m, d_u, abits, wbits, bias, zero)

    @classmethod
    def from_tensors(cls, tensors: dict, in_features: int, d_m: int, d_u: int, abits: int, wbits: int):
        """Rebuild from a state dict; its packed weight is taken as it is."""
        P = []
        for i in range(len(tensors)):
            if f"transform_{i}P1" in tensors:
                P.append(Kronecker(tensors[f"transform_{i}P1"], tensors[f"transform_{i}P2"]))
            elif f"transform_{i}" in tensors:
                P.append(tensors[f"transform_{i}"])
        return cls(tensors["weight_packed"], tensors["weight_scale"], P, d_m, d_u, abits, wbits, tensors.get("bias"),
                   tensors.get("weight_zero"), tensors.get("clip"), (tensors.get("mean"), tensors.get("shift")),
                   tensors.get("feedback"), in_features)

    def _stored(self) -> list:
        return [Kronecker(getattr(self, f"transform_{i}P1"), getattr(self, f"transform_{i}P2"))
                if kind == "kronecker" else getattr(self, f"transform_{i}") for i, kind in enumerate(self.kinds)]

    @property
    def P(self) -> list:
        """The factors, fp32."""
        return in_dtype(self._stored(), torch.float32)

    def codes(self):
        """Weight codes (C, d) int8."""
        return kernels.unpack_int4(self.weight_packed, self.in_features) if self.packed else self.weight_packed

    def unpack_weights(self):
        """Keep int8 codes instead of packed ones: twice the memory, no unpacking per call. Saving packs them again."""
        self.weight_packed, self.packed = self.codes().contiguous(), False
        return self

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.wbits <= 4 and not self.packed:
            destination[prefix + "weight_packed"] = kernels.pack_int4(self.weight_packed)

    def weight(self):
        """W̃ dequantized, (C, d) fp32."""
        zero = 0 if self.weight_zero is None else self.weight_zero[:, None]
        return self.weight_scale[:, None] * (self.codes() - zero).float()

    def basis(self, x) -> list:
        """P in x's dtype and on its device, converted once."""
        key = x.dtype, x.device
        if key not in self._bases:
            self._bases[key] = in_dtype(self._stored(), x)  # beside the others: a recorded CUDA graph may read those
        return self._bases[key]

    def centred(self, x, state):
        """x − μ_s of every token's state s."""
        # in fp32: what `shifted` adds is the output of this mean, not of one rounded to bf16
        return x if self.mean is None else (x - self.mean[state.long()]).to(x.dtype)

    def shifted(self, y, state):
        """y + μ_s Wᵀ of every token's state s: what `centred` took off."""
        return y if self.shift is None else y + self.shift[state.long()]

    def transformed(self, x, state):
        """Φ_s(x) of Eq. 11 for every token, centred first where `centre` was given; fp32."""
        P = self.P

        def rows(x, state=None):
            x = apply_basis(self.centred(x.float(), state), P)
            return x * state_gate(state, self.in_features, self.d_m, self.d_u) if self.d_m or self.d_u else x

        states = () if state is None else (state.flatten(),)
        return kernels.by_rows(rows, x.reshape(-1, self.in_features), *states).reshape(x.shape)

    def rows(self, x, state):
        """x centred and transformed in its own dtype, (M, d), for the CUDA kernels, which gate and quantize."""
        x = x if self.mean is None else cuda.centre(x, self.mean, state)
        return apply_basis(x, self.basis(x)).reshape(-1, self.in_features)

    def forward(self, x, state=None):
        """x (..., d), state (...) -> (..., C) in x's dtype, through integer accumulators.

        The CUDA kernels take x P in x's own dtype (bf16: tensor cores); elsewhere the transform is fp32.
        """
        C, flat = self.weight_packed.shape[0], None if state is None else state.flatten().contiguous()
        if cuda.usable(x, C, self.feedback):
            y = cuda.int_linear(self.rows(x, state), flat, self.d_m, self.d_u, self.weight_packed,
                                        self.weight_scale, self.weight_sum, self.abits, self.packed, self.bias,
                                        self.weight_zero, self.clip, self.feedback, self.shift)
        else:
            rows = self.transformed(x, state).reshape(-1, self.in_features)
            y = kernels.int_linear(rows, self.weight_packed, self.weight_scale, self.weight_sum, self.abits, self.wbits,
                                   self.bias, self.weight_zero, None, self.clip, self.feedback, self.shift, flat,
                                   x.dtype)
        return y.reshape(*x.shape[:-1], C)

    def reference(self, x, state=None):
        """The same through fake quantization; equal to `forward` up to fp32 rounding (tested)."""
        rows = self.transformed(x, state)
        if self.feedback is None:
            rows = fake_quantize(rows if self.clip is None else clip_range(rows, self.clip), self.abits)
        else:
            rows = kernels.fake_quantize_rows(rows, self.abits, self.clip, self.feedback)
        y = linear(rows, self.weight())
        return self.shifted(y if self.bias is None else y + self.bias, state).to(x.dtype)


class QuantEmbedding(nn.Module):
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
        codes, scale, _ = quantize_weight(weight, bits)
        return cls(kernels.pack_int4(codes) if bits <= 4 else codes, scale, weight.shape[1], bits, weight.dtype)

    def forward(self, ids):
        """ids (...) -> (..., D)."""
        rows = self.weight_packed[ids]
        rows = kernels.unpack_int4(rows, self.width) if self.bits <= 4 else rows
        # X̂ = s X_int
        return (self.weight_scale[ids][..., None] * rows).to(self.dtype)


def quantize_weight(weight, bits: int, symmetric: bool = True):
    """Round-to-nearest codes (C, d) int8 and scales (C,) fp32 of each row of weight, in pieces; for asymmetric rows
    their zero points (C,) int32, else None. Codes and zero points are centred, less 2^(b−1)."""
    codes, scales, zeros, half = [], [], [], 2 ** (bits - 1)
    for part in weight.split(4096):
        scale, zero_point = quant_params(part.float(), bits, symmetric)
        codes.append((quantize(part.float(), scale, zero_point, bits) - half).to(torch.int8))
        scales.append(scale[:, 0])
        zeros.append((zero_point[:, 0] - half).to(torch.int32))
    return torch.cat(codes), torch.cat(scales), None if symmetric else torch.cat(zeros)


class TAC(nn.Module):
    """Eq. 17 as a layer between softmax·V and the attention output projection.

    `tac_value` could do the same before softmax·V. Z and V are equally large, so it costs the same pass over the same
    bytes; after softmax·V it also serves grouped queries (Dream), where heads share a V but not a correction.
    """

    def __init__(self, M, bias):
        super().__init__()
        self.register_buffer("M", M.float().contiguous())
        self.register_buffer("bias", bias.float().contiguous())

    def forward(self, z):
        if self.M.shape[-1] == cuda.TAC_BLOCK and cuda.usable(z, z.shape[-1]):
            return cuda.tac(z, self.M, self.bias)
        return tac_apply(z.float(), self.M, self.bias).to(z.dtype)
