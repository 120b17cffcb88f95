"""The balance of a gate, against cases whose answer is known; models of which some gates are kept; the command."""

import copy
import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from calibrate import quantize_model
from experiments import gates
from experiments.cells import switch_gates_off
from methods import QuantConfig
from model import load_model
from runtime.layers import QuantLinear
from starquant import Dense, fold_weight, leakage, linear, subspace_gates
from tiny import tasks

D, D_S = 32, 4
GATE, _ = subspace_gates(D, D_S, D_S)


def draw(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def noisy(small_folder):
    return gates.text(load_model(str(small_folder), "cpu"), 0, "eval")[:8]


@pytest.fixture(scope="module")
def gated(small_folder, tmp_path_factory):
    """The folder of a small model with gates, whose P is drawn."""
    model, folder = load_model(str(small_folder), "cpu"), tmp_path_factory.mktemp("gated") / "gated-1.5"
    tokens, region = tasks.calibration_set(model.tokenizer, 4, 64, 0)
    quantize_model(model, tokens, QuantConfig(epochs=0, tac="none"), region).save(folder)
    shutil.copy(small_folder / "training.json", folder)
    return folder


def test_a_gate_of_channels_that_are_empty_costs_nothing_and_gains_nothing():
    got = gates.gate_balance(draw(50, D) * GATE, draw(8, D), GATE)
    assert got["leakage"] == got["gated_noise"] == 0
    assert got["with_gate"] == got["same_grid"] == got["noise"]


def test_the_leakage_is_that_of_equation_28():
    P, weight, x = torch.linalg.qr(draw(D, D, seed=0))[0], draw(8, D), draw(50, D, seed=2)
    want = leakage(x, Dense(P), GATE, weight).square().sum() / linear(x, weight).square().sum()
    got = gates.gate_balance(x @ P, fold_weight(weight, Dense(P)), GATE)
    assert got["leakage"] == pytest.approx(float(want), rel=1e-4)


def test_what_a_gate_loses_is_what_leaks_and_the_noise_that_is_left():
    """In orthogonal outputs (W = I) energies of different channels add up."""
    got = gates.gate_balance(draw(200, D, seed=3), torch.eye(D), GATE)
    assert got["same_grid"] == pytest.approx(got["leakage"] + got["noise"] - got["gated_noise"], rel=1e-4)
    # the range of a token shrinks a little where its extreme is gated away: so at most
    assert got["leakage"] < got["with_gate"] <= got["same_grid"] + 1e-6
    assert got["gated_noise"] == pytest.approx(got["noise"] * D_S / D, rel=0.3)


@given(st.integers(0, 10**6), st.integers(2, 8), st.floats(0, 1), st.floats(0, 100))
def test_on_the_same_grid_no_gate_pays_channel_by_channel(seed, bits, left, outlier):
    """Zero is on every grid: rounding leaves of a channel at most what it carries, however little that is."""
    z = draw(20, D, seed=seed) * (GATE + left * (1 - GATE))
    z[:, 0] += outlier
    got = gates.gate_balance(z, torch.eye(D), GATE, bits)
    assert got["gated_noise"] <= got["leakage"] * (1 + 1e-5)
    assert got["same_grid"] >= got["noise"] * (1 - 1e-5)


def test_a_gate_that_takes_an_outlier_which_no_output_reads_pays():
    z, folded = draw(50, D), torch.eye(D)
    z[:, -1], folded[-1, -1] = 100, 0
    got = gates.gate_balance(z, folded, GATE)
    assert got["with_gate"] < 0.5 * got["noise"] < got["same_grid"]


def test_less_energy_in_the_gated_channels_leaks_less():
    z, state, both = draw(50, D), torch.arange(50) % 2 == 0, subspace_gates(D, D_S, D_S)
    for part, whole in zip(*(gates.balances(z, state, torch.eye(D), both, left) for left in (0.01, 1)), strict=True):
        share = part["leakage"] / (1 - part["leakage"]) / (whole["leakage"] / (1 - whole["leakage"]))
        assert (part["state"], share) == (whole["state"], pytest.approx(0.01, rel=1e-3))


@torch.no_grad()
def test_a_model_keeps_the_gates_it_is_told_to(gated, noisy):
    """All of them: the model itself. None: the same as switched off. Those of one state: its tokens alone differ."""
    model = load_model(str(gated), "cpu")
    every = {(row["block"], row["linear"], row["state"]) for row in gates.own_gates(model, noisy)}
    assert len(every) == 16
    off = copy.deepcopy(model)
    switch_gates_off(off)

    def apart(a, b):  # sums in another order round a few values of many to the other side
        return float((a - b).square().mean() / b.square().mean())

    with_gates, without = model(noisy), off(noisy)
    assert apart(with_gates, without) > 0.02
    assert apart(gates.keeping(model, every)(noisy), with_gates) < 1e-3
    assert apart(gates.keeping(model, set())(noisy), without) < 1e-3
    x, state = draw(2, 5, 64), torch.tensor([[True, False, True, False, False]] * 2)
    qkv = gates.keeping(model, {(0, "qkv", "masked")}).blocks[0].qkv
    assert not isinstance(qkv, QuantLinear)  # a block on a GPU runs those in its own way
    one = qkv(x, state)
    assert apart(one[state], model.blocks[0].qkv(x, state)[state]) < 1e-3
    assert apart(one[~state], off.blocks[0].qkv(x, state)[~state]) < 1e-3


def test_the_command_lists_the_gates_of_a_quantized_folder(gated, tmp_path, capsys):
    assert gates.main(["--model", str(gated), "--out", str(tmp_path)]) == 0
    lines = (tmp_path / "gates-gated-1.5.md").read_text().splitlines()
    assert lines[2].startswith("| 0 | qkv | masked | ")
    assert len([line for line in lines if line.endswith(("yes |", "no |"))]) == 16
    assert "| 1 | down | unmasked | " in capsys.readouterr().out


def test_the_command_refuses_what_has_no_gates(small_folder, gated, tmp_path, capsys):
    model, plain, foreign = load_model(str(small_folder), "cpu"), tmp_path / "plain", tmp_path / "foreign"
    quantize_model(model, torch.zeros(2, 8, dtype=torch.long), QuantConfig("rtn")).save(plain)
    shutil.copy(small_folder / "training.json", plain)
    model.save(foreign)
    for options, sentence in ((["--model", str(plain)], "has no gates"), (["--model", str(foreign)], "is a 16-bit"),
                              (["--model", str(gated), "--stress", "4"], "--stress is for 16-bit models")):
        assert gates.main([*options, "--out", str(tmp_path)]) == 2
        assert sentence in capsys.readouterr().err


def test_the_summary_counts():
    row = {"noise": 1.0, "gated_noise": 0.1, "leakage": 0.05, "same_grid": 0.96, "with_gate": 0.95}
    lost = {"noise": 1.0, "gated_noise": 0.1, "leakage": 0.5, "same_grid": 1.4, "with_gate": 1.4}
    unforeseen = {"noise": 1.0, "gated_noise": 0.1, "leakage": 0.5, "same_grid": 1.4, "with_gate": 0.9}
    last = gates.summarize({"any": [row, lost, unforeseen]}).splitlines()[-1]
    assert last.endswith("| 2 of 3 | 1 | 2 |")
