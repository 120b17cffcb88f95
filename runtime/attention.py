"""softmax(Q Kᵀ / √h) V with K, V and the softmax output quantized.

The paper leaves the bits of this product open. Its Fig. 3 compares against a QuaRot* that keeps it in 16 bit, and so do
all methods here by default; `--set kv_bits=4` and `--set softmax_bits=4` ask for less. The quantization is simulated,
since its error is what is studied here, not its speed.
"""

import torch

from runtime.layers import Quantized
from starquant import dequantize, fake_quantize, quantize


def softmax_scores(q, k, mask=None):
    """A = softmax(Q Kᵀ / √h): q (B, H, L, h), k (B, H_kv, L, h) -> (B, H, L, L); a row that may see nothing is 0.

    mask: bool, True where a query (row) may see a key (column), or None.
    """
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = q.float() @ k.float().mT / q.shape[-1] ** 0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return torch.softmax(scores, -1).nan_to_num(0)


class QuantAttention(Quantized):
    """Eq. 16 between quantizers.

    K has a scale per token and head, V the same or a static scale per channel, the softmax output one per row. Bits of
    16 leave an operand as it is. `rotation` (h, h), orthogonal, is applied to q, k and v, as QuaRot does with a
    Hadamard matrix. It cancels in Q Kᵀ, and behind the product it is taken off again.
    """

    def __init__(self, bits, rotation=None, value_scale=None, value_zero=None):
        """bits (2,): of K and V, and of the softmax output. value_scale, value_zero (H_kv, 1, h): from `ia_aq`."""
        super().__init__()
        bits = torch.as_tensor(bits, dtype=torch.int32)
        self.kv_bits, self.softmax_bits = bits.tolist()  # read once: inside a CUDA graph nothing can be
        self.register_buffer("bits", bits)  # for the file
        self.register_buffer("rotation", rotation)
        self.register_buffer("value_scale", value_scale)
        self.register_buffer("value_zero", value_zero)

    def extra_repr(self):
        return f"K and V in {self.kv_bits} bits, softmax in {self.softmax_bits}"

    def rotated(self, *heads):
        return [t.float() if self.rotation is None else t.float() @ self.rotation for t in heads]

    def forward(self, q, k, v, mask=None):
        """q (B, H, L, h), k, v (B, H_kv, L, h), mask (B, 1, 1 or L, L) or None -> (B, H, L, h) in q's dtype."""
        dtype, kv_bits, softmax_bits = q.dtype, self.kv_bits, self.softmax_bits
        q, k, v = self.rotated(q, k, v)
        if kv_bits < 16:
            k = fake_quantize(k, kv_bits)
            static = self.value_scale is not None
            v = dequantize(quantize(v, self.value_scale, self.value_zero, kv_bits), self.value_scale,
                           self.value_zero) if static else fake_quantize(v, kv_bits)
        A = softmax_scores(q, k, mask)
        A = fake_quantize(A, softmax_bits) if softmax_bits < 16 else A
        z = A @ v.repeat_interleave(q.shape[1] // v.shape[1], 1)
        return (z if self.rotation is None else z @ self.rotation.mT).to(dtype)
