"""Times are taken in turns, and a roofline is the slower of two limits."""

import torch

from experiments import timing


def test_measurements_take_turns():
    order = []
    timing.measure({n: lambda n=n: order.append(n) for n in "ab"}, 3, torch.device("cpu"))
    assert "".join(order[-6:]) == "ababab"


def test_roofline_is_the_slower_of_the_two_limits():
    top = {"bytes_per_s": 10.0, "float_ops_per_s": 100.0, "integer_ops_per_s": 200.0}
    assert timing.roofline(top, 20, 100, "float") == 2
    assert timing.roofline(top, 20, 1000, "float") == 10
    assert timing.roofline(top, 20, 1000, "integer") == 5
