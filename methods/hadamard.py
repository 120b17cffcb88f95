"""Hadamard rotations of every width that occurs, built from two constructions (no tables).

A Hadamard matrix has entries ±1 and orthogonal rows; over √n it is the rotation that spreads one outlier evenly over n
channels. Orders multiply (Sylvester: H_2n = H_2 ⊗ H_n), and a prime q gives one of order q + 1 (q ≡ 3 mod 4, Paley I)
or 2(q + 1) (q ≡ 1 mod 4, Paley II). Together they reach 192, 576, 704, 4096, 12288 = 96 · 128 (LLaDA's FFN),
3584 = 56 · 64 and 18944 = 128 · 148 (Dream), the last of which QuaRot's tabulated orders do not.
"""

from functools import cache
from math import isqrt, pi

import torch

from starquant import Kronecker

H2 = torch.tensor([[1, 1], [1, -1]])


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % p for p in range(2, isqrt(n) + 1))


def _jacobsthal(q: int):
    """Q_ij = χ(i − j), χ the quadratic character modulo the prime q: 0 at 0, 1 at squares, −1 elsewhere. (q, q)"""
    chi = torch.full((q,), -1, dtype=torch.int64)
    chi[torch.arange(q) ** 2 % q] = 1
    chi[0] = 0
    i = torch.arange(q)
    return chi[(i[:, None] - i) % q]


@cache
def hadamard(n: int):
    """Hadamard matrix of order n, (n, n) int64 of ±1; ValueError where neither construction reaches n."""
    if n == 1:
        return torch.ones(1, 1, dtype=torch.int64)
    if n % 4 == 0 and _is_prime(n - 1):  # q = n − 1 ≡ 3 (mod 4)
        # Paley I: H = I + S,  S = [[0, 1ᵀ], [−1, Q]] skew-symmetric
        S = torch.zeros(n, n, dtype=torch.int64)
        S[0, 1:], S[1:, 0], S[1:, 1:] = 1, -1, _jacobsthal(n - 1)
        return torch.eye(n, dtype=torch.int64) + S
    q = n // 2 - 1
    if n % 4 == 0 and q % 4 == 1 and _is_prime(q):
        # Paley II: H = C ⊗ [[1, 1], [1, −1]] + I ⊗ [[1, −1], [−1, −1]],  C = [[0, 1ᵀ], [1, Q]] symmetric
        C = torch.ones(q + 1, q + 1, dtype=torch.int64)
        C[0, 0], C[1:, 1:] = 0, _jacobsthal(q)
        return torch.kron(C, H2) + torch.kron(torch.eye(q + 1, dtype=torch.int64), torch.tensor([[1, -1], [-1, -1]]))
    if n == 2 or n % 8 == 0:
        # Sylvester: H_n = H_2 ⊗ H_{n/2}
        return torch.kron(H2, hadamard(n // 2))
    raise ValueError(f"no Hadamard matrix of order {n} follows from the Sylvester and Paley constructions.")


def exists(n: int) -> bool:
    try:
        hadamard(n)
    except ValueError:
        return False
    return True


def rotation_sizes(d: int) -> tuple[int, int]:
    """(n1, n2), n1 n2 = d, n1 ≤ n2, both Hadamard orders, as close to √d as possible: 4096 -> 64, 64.

    Where no such two exist, or only two that cost much more (n2 > 256 n1), any orders are taken: 11008 -> 86, 128.
    """
    pairs = [(n, d // n) for n in range(isqrt(d), 0, -1) if d % n == 0]
    return next((p for p in pairs if p[1] <= 256 * p[0] and exists(p[0]) and exists(p[1])), pairs[0])


def rotation(d: int, generator: torch.Generator):
    """Randomized Hadamard rotation D1 H1 ⊗ D2 H2 of width d, orthogonal; float64. `spread` makes its factors.

    QuaRot draws one sign per channel; signs that factor as the Kronecker product does cost nothing at run time. D gives
    every input channel its sign, since row i of P is the image of channel i.
    """
    return Kronecker(*(spread(n, generator) for n in rotation_sizes(d)))


def hartley(n: int):
    """The discrete Hartley transform, orthogonal for every n, entries at most √2 times as large as 1/√n; float64."""
    # cas(2π i j / n) / √n,  cas = cos + sin
    i = torch.arange(n)
    angle = 2 * pi / n * (torch.outer(i, i) % n).double()
    return (angle.cos() + angle.sin()) / n**0.5


def spread(n: int, generator: torch.Generator):
    """An orthogonal matrix D H, which spreads every channel over all n; (n, n) float64. D holds random signs. H is a
    Hadamard matrix over √n, which spreads evenly, or the Hartley transform where none is in reach."""
    signs = torch.randint(2, (n, 1), generator=generator) * 2 - 1
    return signs * (hadamard(n).double() / n**0.5 if exists(n) else hartley(n))
