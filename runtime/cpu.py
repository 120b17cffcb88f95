"""The quantized linear on a CPU, and on every device that the CUDA passes do not serve.

`linear(layer, x, state)` takes activations x (..., d) through the four steps of `runtime/layers.py`: transform,
quantize, multiply, finish. It is written for reading; the integers come from `kernels.py`.
"""

import torch
from einops import rearrange

import kernels


@torch.no_grad()  # rounding has no gradient
def linear(layer, x, state=None):
    """Eq. 13 for a `runtime.layers.QuantLinear`: x (..., d), state (...) -> (..., C) in the dtype of x.

    `state` may be None where no gate, mean or shift depends on it. A token with NaN comes out as NaN.
    """
    state = None if state is None else state.flatten()
    rows = layer.phi(x.reshape(-1, layer.in_features), state)  # (tokens, d) fp32
    codes, scale, zero = token_codes(rows, layer.abits, layer.clip, layer.feedback)  # (tokens, d) int8, (tokens, 1), …
    zero = zero.to(torch.int32)
    # Σ_k (X_c − z_x) W_c = Σ_k X_c W_c − z_x Σ_k W_c
    sums = kernels.int_matmul(codes, layer.codes()) - zero * layer.weight_sum  # (tokens, C) int32
    if layer.weight_zero is not None:
        # − z_w Σ_k (X_c − z_x)
        sums = sums - (codes.sum(-1, keepdim=True, dtype=torch.int32) - layer.in_features * zero) * layer.weight_zero
    # Ŷ = s_x s_w Σ_k (X_c − z_x)(W_c − z_w)
    y = sums.float() * scale * layer.weight_scale
    return layer.finish(y, state).to(x.dtype).reshape(*x.shape[:-1], -1)


def token_codes(x, bits: int, clip=None, feedback=None):
    """Each token on its own grid (Eqs. 2-4): x (M, K) -> codes (M, K) int8, centred, scale and zero (M, 1) fp32.

    clip (2,) shrinks the range of a token. Codes are rounded to nearest, or, where feedback (K/b, b, b) is given, by
    `feedback_codes`.
    """
    codes, scale, zero = kernels.quantize_rows(x, bits, clip)
    if feedback is not None:
        codes = feedback_codes(x.float(), scale, zero, feedback, bits)
    return codes, scale, zero


def fake_quantize_rows(x, bits: int, clip=None, feedback=None):
    """What the integers of `token_codes` stand for (Eq. 3): x (..., K) -> s (X_c − z), (..., K) fp32."""
    codes, scale, zero = token_codes(x.reshape(-1, x.shape[-1]), bits, clip, feedback)
    # X̂ = s (X_c − z)
    return (scale * (codes - zero)).reshape(x.shape)


def feedback_codes(x, scale, zero, feedback, bits: int):
    """Round x (M, K) fp32 by feedback on the grid of `kernels.quantize_rows` (scale, zero (M, 1)): codes (M, K) int8.

    The K channels form blocks of b; feedback V (K/b, b, b) in bf16 holds a matrix for each block, of which the part
    above the diagonal counts. The channels of a block are rounded one after another. What a channel loses, to rounding
    or because the grid ends, changes the channels of its block that are still open (`methods/plus.py` derives V). All
    tokens and all blocks take a step at once, in units of the tokens' scales.

    The error of a channel is rounded to bf16 first. A product of two bf16 numbers is exact in fp32, so a fused
    multiply-add gives the same bits as a product and a subtraction, on every device.
    """
    u = rearrange(x, "m (n b) -> b n m", n=len(feedback)).clone(memory_format=torch.contiguous_format)
    zero = zero.mT  # (1, M)
    u /= scale.mT
    V = rearrange(feedback.float(), "n i j -> i j n 1")
    low, high = -(2 ** (bits - 1)) - zero, 2 ** (bits - 1) - 1 - zero
    for i in range(len(V)):
        # r = clamp(⌊u_i⌉),  e = u_i − r,  u_j ← u_j − e V_ij for j > i
        r = torch.round(u[i]).clamp_(low, high)
        e = (u[i] - r).to(torch.bfloat16).float()
        u[i + 1 :].addcmul_(e, V[i, i + 1 :], value=-1)
        u[i] = r
    # X_c = r + z
    return rearrange(u.add_(zero), "b n m -> m (n b)").to(torch.int8)
