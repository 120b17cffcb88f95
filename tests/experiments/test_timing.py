"""Times are taken in turns, and a roofline is the slower of two limits."""

import pytest
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


def test_times_are_the_quartiles_of_what_counts(monkeypatch):
    """A clock that a call sets forward: two warm-ups of 100 s, then 1 to 5 s."""
    clock, takes = [0.0], iter([100.0, 100.0, 1.0, 5.0, 2.0, 4.0, 3.0])
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])
    found = timing.measure({"f": lambda: clock.append(clock.pop() + next(takes))}, 5, torch.device("cpu"))
    assert found == {"f": {"low": 2.0, "median": 3.0, "high": 4.0}}


def test_what_fails_is_named_and_not_called_again(monkeypatch):
    called = []

    def fails(error):
        called.append(error)
        raise error

    errors = {"memory": torch.OutOfMemoryError("x"), "peer": RuntimeError("no kernel\nat line 3"), "mute": KeyError()}
    found = timing.measure({k: lambda e=e: fails(e) for k, e in errors.items()}, 3, torch.device("cpu"))
    assert found == {"memory": {"failed": "out of memory"}, "peer": {"failed": "RuntimeError: no kernel"},
                     "mute": {"failed": "KeyError"}}
    assert called == list(errors.values())


def test_short_work_counts_by_the_call(monkeypatch):
    called = []
    monkeypatch.setattr(timing, "measure", lambda functions, *_: {
        name: run() or {"median": 6.0, "low": 3.0, "high": 9.0} for name, run in functions.items()})
    calls = {"a": [lambda i=i: called.append(f"a{i}") for i in range(3)], "b": [lambda: called.append("b")]}
    assert timing.measure_each(calls, 1, torch.device("cpu")) == {
        "a": {"median": 2.0, "low": 1.0, "high": 3.0}, "b": {"median": 6.0, "low": 3.0, "high": 9.0}}
    assert called == ["a0", "a1", "a2", "b"]


def test_ceilings_are_what_the_fast_quartile_reached(monkeypatch):
    asked = []

    def measured(functions, repeats, device):
        asked.append(repeats)
        for function in functions.values():
            function()
        return {"copy": {"low": 0.5}, "float": {"low": 0.25}, "integer": {"low": 0.125}}

    monkeypatch.setattr(timing, "measure", measured)
    top = timing.ceilings(torch.device("cpu"), torch.bfloat16, 4)
    assert asked == [12]
    # a copy reads and writes 2^26 bytes; a product of 2048 takes 2 · 2048³ operations
    assert top == {"bytes_per_s": 2**28, "float_ops_per_s": 2**36, "integer_ops_per_s": 2**37}
    monkeypatch.setattr(timing, "measure", lambda *_: {"copy": {"failed": "out of memory"}})
    with pytest.raises(timing.Refused, match="limits cannot be measured: copy: out of memory"):
        timing.ceilings(torch.device("cpu"), torch.bfloat16, 4)


def test_limits_are_raised_to_what_work_reached():
    top = {"bytes_per_s": 10.0, "float_ops_per_s": 100.0, "integer_ops_per_s": 200.0}
    timing.reach(top, {"low": 2.0, "median": 1.0}, 30, 100, "float")
    assert top == {"bytes_per_s": 15.0, "float_ops_per_s": 100.0, "integer_ops_per_s": 200.0}
    timing.reach(top, {"low": 2.0, "median": 1.0}, 20, 600, "integer")
    assert top == {"bytes_per_s": 15.0, "float_ops_per_s": 100.0, "integer_ops_per_s": 300.0}
    timing.reach(top, {"failed": "out of memory"}, 10**9, 10**9, "float")
    assert top["float_ops_per_s"] == 100.0


def test_other_work_is_that_of_all_processors_less_our_own(tmp_path, monkeypatch):
    """Four processors, 100 ticks a second. In 10 s they work 18 s, of which this process and its children take 7."""
    def at(seconds, user, idle, *own):
        (tmp_path / "stat").write_text(f"cpu  {user} 10 100 {idle} 50 5 5 30 0 0\ncpu0 1 2 3\n")
        monkeypatch.setattr(timing.time, "perf_counter", lambda: seconds)
        monkeypatch.setattr(timing.os, "times", lambda: (*own, 999.0))
        return timing.clocks()

    monkeypatch.setattr(timing, "STAT", tmp_path / "stat")
    monkeypatch.setattr(timing.os, "sysconf", {"SC_CLK_TCK": 100}.get)
    monkeypatch.setattr(timing.os, "cpu_count", lambda: 4)
    before, after = at(5, 1000, 7000, 1, 1, 1, 1), at(15, 2800, 9200, 3, 2, 4, 2)
    assert timing.busy(before, after) == pytest.approx((18 - 7) / 40)
    assert timing.busy(before, at(15, 1000, 11000, 3, 2, 4, 2)) == 0  # ticks are coarser than our own times
    (tmp_path / "stat").unlink()
    assert timing.busy(before, timing.clocks()) is None
