"""The balance of a gate, against cases whose answer is known."""

import pytest
import torch

from experiments import gates
from starquant import Dense, leakage, linear, subspace_gates

D, D_S = 32, 4


def basis(seed=0):
    return torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(seed)))[0]


def draw(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_a_gate_of_channels_that_are_empty_costs_nothing_and_gains_nothing():
    P, weight = basis(), draw(8, D)
    gate, _ = subspace_gates(D, D_S, D_S)
    x = (draw(50, D) * gate) @ P.T  # nothing in the channels that the gate takes
    got = gates.gate_balance(x, Dense(P), gate, weight)
    assert got["leakage"] < 1e-10
    assert got["with_gate"] == pytest.approx(got["noise"], rel=1e-3)


def test_the_leakage_is_that_of_equation_28():
    P, weight, x = basis(), draw(8, D), draw(50, D, seed=2)
    gate, _ = subspace_gates(D, D_S, D_S)
    want = leakage(x, Dense(P), gate, weight).square().sum() / linear(x, weight).square().sum()
    assert gates.gate_balance(x, Dense(P), gate, weight)["leakage"] == pytest.approx(float(want), rel=1e-4)


def test_what_a_gate_loses_is_what_leaks_and_the_noise_that_is_left():
    """In orthogonal outputs (W = I) energies of different channels add up."""
    P, x = basis(), draw(200, D, seed=3)
    gate, _ = subspace_gates(D, D_S, D_S)
    got = gates.gate_balance(x, Dense(P), gate, torch.eye(D))
    # the range of a token shrinks a little where its extreme is gated away: so at most
    assert got["with_gate"] <= got["leakage"] + got["noise"] - got["gated_noise"] + 1e-6
    assert got["with_gate"] > got["leakage"]
    assert got["gated_noise"] == pytest.approx(got["noise"] * D_S / D, rel=0.3)


def test_the_summary_counts():
    row = {"noise": 1.0, "gated_noise": 0.1, "leakage": 0.05, "with_gate": 0.95}
    lost = {"noise": 1.0, "gated_noise": 0.1, "leakage": 0.5, "with_gate": 1.4}
    unforeseen = {"noise": 1.0, "gated_noise": 0.1, "leakage": 0.5, "with_gate": 0.9}
    last = gates.summarize({"any": [row, lost, unforeseen]}).splitlines()[-1]
    assert last.endswith("| 2 of 3 | 2 |")
