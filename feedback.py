"""Rounding by feedback, beyond the paper: activations rounded against the weights, as GPTQ rounds weights against the
activations.

Of a token's rounding error e = x̂ − x only e Ŵᵀ is seen, so what counts is e M eᵀ with M = ŴᵀŴ, not ‖e‖². GPTQ's rule
minimizes it greedily: round channel after channel, and after each one change those still open by what makes up best
for its error,

    e_i = x_i − x̂_i,   x_j ← x_j − e_i V_ij, j > i,   V_ij = U_ij / U_ii,   M⁻¹ = UᵀU, U upper triangular

The error of channel i then costs 1 / U_ii², the variance that M gives it beyond what the channels after it can make up,
instead of M_ii: errors are pushed into the directions that the weights hardly see. The grid, the integers and their
product stay what they were.

Here it runs for every token at run time, so it is confined to diagonal blocks of M, as wide as those of the balance:
d (b − 1) / 2 multiplications a token for blocks of b. Blocks and tokens do not depend on each other (`kernels.py`; on a
GPU a thread takes one of each, `cuda_kernels.py`). They are few but in fp32, away from the tensor cores: by an H200's
peak rates (67 TFLOP/s against 1979 of int8) a tenth of the time of LLaDA-8B's integer products, by its instructions (a
read of shared memory for every four) rather a fifth. Not yet measured.
"""

import torch
from einops import rearrange

from gptq import inverse_factor


def diagonal_blocks(matrix, size: int):
    """(d, d) -> (d / size, size, size)."""
    blocks = rearrange(matrix, "(n i) (m j) -> n m i j", i=size, j=size)
    return blocks.diagonal(dim1=0, dim2=1).movedim(-1, 0)


def block_moments(weight, size: int):
    """The diagonal blocks of WᵀW for a weight (C, d), (d / size, size, size) float64, without the rest of it."""
    blocks = rearrange(weight, "c (n b) -> n c b", b=size).double()
    return blocks.mT @ blocks


def feedback_matrix(weight, size: int, damping: float = 0.01):
    """V (d / size, size, size), zero on and below the diagonal, for the weight (C, d) as it will be used; bf16."""
    U = inverse_factor(block_moments(weight, size), damping)
    # V_ij = U_ij / U_ii
    return (U / U.diagonal(dim1=-2, dim2=-1)[..., None]).triu(1).to(torch.bfloat16)


def rounding_order(moment):
    """Order of the channels of a second moment (b, b) in which feedback leaves little, as indices (b,).

    From the last channel, which nothing follows, to the first: each time the one of least variance given those behind
    it. The product of these variances is det M in any order, and so their sum is least when they are even. They fall on
    the way to the first channel, so the small ones are taken while much is left (sorted Cholesky).
    """
    M, order = moment.clone(), []
    left = torch.ones(len(M), dtype=torch.bool, device=M.device)
    for _ in range(len(M)):
        i = int(torch.where(left, M.diagonal(), torch.inf).argmin())
        order.append(i)
        left[i] = False
        # what channel i explains of the others
        M = M - torch.outer(M[:, i], M[i]) / M[i, i]
    return torch.tensor(order[::-1], device=M.device)
