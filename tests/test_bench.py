"""The benchmark on the CPU: its command, its tables, and the models and engines that it compares."""

import copy
import functools
import json
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tools.probe_int_mm import probe_int_mm

import bench
from checkpoint.families import FUSED
from experiments import peers, predict, timing, twins
from methods import QuantConfig
from methods.storage import stored_linear
from model import load_model
from runtime.layers import QuantLinear

ROOT = Path(__file__).parent.parent
MODELS = ("16-bit", "starquant", "starquant, int8", "starquant+", "starquant+, int8")
FIXTURES = {name: str(ROOT / "tests" / "fixtures" / name) for name in ("llada", "dream")}


# ---- bench.py ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def ceilings_once():
    """The limits of this machine are measured once for all runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "ceilings", functools.cache(bench.ceilings))
        yield


def test_one_run_ends_in_json(tmp_path, capsys):
    out = tmp_path / "r.json"
    arguments = ["--model", FIXTURES["dream"], "--repeats", "1", "--points", "1x16x1", "2x16x2", "--out", str(out),
                 "--device", "cpu"]
    assert bench.main(arguments) == 0
    text, progress = capsys.readouterr()
    machine, first, _ = progress.splitlines()  # sentences, no structures of Python
    assert machine.startswith(f"{FIXTURES['dream']}: 3 blocks on cpu, torch.float32; the machine reaches ")
    assert first.startswith("1 x 16, ms per step: 16-bit ")
    result = json.loads(text.splitlines()[-1])
    assert result == json.loads(out.read_text())
    assert [p["tokens_per_step"] for p in result["denoising"]] == [1, 2]
    for p in result["denoising"]:
        for name in MODELS:
            step = p["models"][name]["step_s"]
            assert 0 < step["low"] <= step["median"] <= step["high"]
            rate = p["batch"] * p["tokens_per_step"] / step["median"]
            assert p["models"][name]["tokens_per_s"] == pytest.approx(rate)
            assert p["models"][name]["roofline"] <= step["low"]
    assert {(r["linear"], r["M"]) for r in result["linears"]} == {(f, M) for f in FUSED for M in (32, 128, 512)}
    assert all(r[name]["roofline"] <= r[name]["low"] * (1 + 1e-12) for r in result["linears"] for name in MODELS)
    assert not timing.STAT.exists() or all(0 <= p["busy"] < 1 for p in result["denoising"])  # 0 on an idle machine
    assert result["seconds"] > sum(p["models"][name]["step_s"]["low"] for p in result["denoising"] for name in MODELS)
    for name, parts in result["shares"].items():
        assert sum(v for k, v in parts.items() if k != "step") == pytest.approx(parts["step"])
        assert ("TAC" in parts) == (name in ("starquant", "starquant, int8"))
        assert "transforms, gates, codes" not in parts  # on a CPU they are in "linears"
    for sizes in result["memory"].values():
        assert sizes["ratio"] == sizes["sixteen_bit"] / sizes["total"]
    assert f"| part of a step | {' | '.join(MODELS)} |" in text
    assert text.count("starquant+, int8, batch 2, length 16, 2 per step") == 1
    assert "Products that were the fastest" not in bench.tables(result)  # a CPU has no choice of them
    shown = bench.tables(result | {"products": {"32 x 64 -> 96, packed": "tiled 32"}})
    assert "residency of the weights: 32 x 64 -> 96, packed: tiled 32." in shown


@pytest.mark.parametrize("name", ["bench-cpu", "bench-cpu-llada-8b"])
def test_the_published_tables_are_those_of_the_published_numbers(name):
    numbers, page = (ROOT / "results" / f"{name}{end}" for end in (".json", ".md"))
    assert page.read_text().startswith(bench.tables(json.loads(numbers.read_text())) + "\n\nCommand: ")


def test_a_limit_that_a_linear_exceeds_is_raised_before_any_roofline(tmp_path, monkeypatch):
    """A copy and a square product that were a thousand times too slow change nothing."""
    monkeypatch.setattr(bench, "ceilings", lambda *_: {
        "bytes_per_s": 1.0, "float_ops_per_s": 1.0, "integer_ops_per_s": 1.0})
    out = tmp_path / "r.json"
    assert bench.main(["--model", FIXTURES["llada"], "--repeats", "2", "--points", "1x16x1", "--out", str(out),
                       "--device", "cpu"]) == 0
    result = json.loads(out.read_text())
    cells = [r[name] for r in result["linears"] for name in MODELS]
    assert all(c["roofline"] <= c["low"] * (1 + 1e-12) for c in cells)
    assert max(c["roofline"] / c["low"] for c in cells) == pytest.approx(1)  # of the fastest
    assert all(m["roofline"] <= m["step_s"]["low"] for m in result["denoising"][0]["models"].values())


@pytest.mark.parametrize("name", ["bench-cpu.json", "bench-cpu-llada-8b.json", "gpu-h200/bench.json"])
def test_no_published_roofline_is_above_what_was_measured(name):
    result = json.loads((ROOT / "results" / name).read_text())
    cells = [r[model] for r in result["linears"] for model in result["linear_models"]]
    cells += [m["step_s"] | m for p in result["denoising"] for m in p["models"].values() if "roofline" in m]
    assert len(cells) > 60
    assert all(c["roofline"] <= c["low"] * (1 + 1e-12) for c in cells)


def test_goals_are_counted_and_measured_as_the_page_says():
    """docs/performance.md, "Which goals were missed": the counts of --predict, and the times of the run on an H200."""
    page = (ROOT / "docs" / "performance.md").read_text().split("### Which goals were missed")[1]
    cells = [line.split("|")[2:4] for line in page.split("\n\n")[2].splitlines()[2:]]
    counted, measured = ([[float(n) for n in re.findall(r"(?<!\w)\d[\d.]*", row[i])] for row in cells] for i in (0, 1))
    points = bench.POINTS["cuda"]
    found = predict.predict("llada-8b", "h100", points)
    floors = {((row["batch"], row["length"]), row["model"]): row["floor_s"] for row in found["steps"]}
    run = json.loads((ROOT / "results" / "gpu-h200" / "bench.json").read_text())
    times = {((p["batch"], p["length"]), name): m["step_s"]["median"] for p in run["denoising"]
             for name, m in p["models"].items()}

    def ratios(times, one, other, digits=2, places=points):
        return [round(times[place[:2], one] / times[place[:2], other], digits) for place in places]

    for row, place in enumerate((points[0], points[2], points[3])):
        assert counted[row] == ratios(floors, "16-bit, eager glue", "starquant", places=[place])
        assert measured[row] == [ratio for name in ("starquant", "starquant, int8")
                                 for ratio in ratios(times, "16-bit, eager glue", name, places=[place])]
    assert counted[3] == ratios(floors, "16-bit", "starquant")
    assert measured[3] == ratios(times, "16-bit", "starquant") + ratios(times, "16-bit", "starquant, int8")
    assert counted[4] == [round(100 * (ratio - 1)) for ratio in ratios(floors, "starquant+", "starquant", 9)]
    assert measured[4] == [round(100 * (ratio - 1)) for ratio in ratios(times, "starquant+", "starquant", 9)]
    plus, _, full = found["calibration"]
    assert counted[5] == [round(32 * full["floor_s"] / 60, 1)]
    assert counted[6] == [round(32 * plus["floor_s"] / 60, 2), round(plus["peak_bytes"] / 1e9, 1)]


def test_other_work_is_said_as_it_was_measured():
    points = {"denoising": [{"busy": 0.004}, {"busy": 0.256}]}
    assert bench.other_work({"busy": 0.1249} | points) == (
        "Other work took 12 % of the machine's processors during the run, 26 % at the worst point.")
    assert bench.other_work({"busy": None, "denoising": [{"busy": None}]}) == ""
    assert bench.other_work({"busy": "The machine was busy."}) == "The machine was busy."  # an older run


def test_the_blocks_alone_are_timed_on_a_cpu():
    model = load_model(FIXTURES["llada"], device="cpu")
    seen = []
    engine = {"engine": lambda x, cos, sin: seen.append((x.shape, cos.shape, sin.shape))}
    seconds = bench.blocks_alone({"16-bit": model, "twin": twins.quantized_twin(model)}, engine, (1, 24), 2)
    assert all(seconds[name]["median"] > 0 for name in ("16-bit", "twin"))
    h = model.config.head_dim
    assert set(seen) == {((1, 24, model.config.d_model), (24, h), (24, h))}


def test_engines_that_are_not_installed_are_left_out_and_said(monkeypatch):
    for name in ("nncf", "onnxruntime"):
        monkeypatch.setitem(sys.modules, name, None)
    said = []
    assert peers.engines(load_model(FIXTURES["llada"], device="cpu"), said.append) == {}
    assert [line.split(" is left out")[0] for line in said] == ["OpenVINO W8A8", "OpenVINO W4A8", "onnxruntime W8A8"]
    assert all("ModuleNotFoundError" in line for line in said)


def test_the_usual_points_fit_the_models():
    tiny, wide = bench.parse([]), bench.parse(["--model", "llada-8b", "--random-weights"])
    positions = load_model("tiny", device="cpu").config.positions
    assert all(length <= positions for _, length, _ in bench.usual_points("cpu", tiny))
    assert (1, 512, 4) in bench.usual_points("cpu", wide)
    assert bench.usual_points("cuda", wide) == bench.usual_points("cuda", tiny)
    assert bench.usual_points("cpu", bench.parse(["--points", "2x16x2"])) == [(2, 16, 2)]


@pytest.mark.parametrize(("more", "dtype"), [([], torch.bfloat16), (["--dtype", "fp32"], torch.float32)])
def test_published_shapes_run_in_bf16(more, dtype, monkeypatch):
    def stop(*arguments):
        assert arguments[2] == dtype
        raise KeyboardInterrupt

    monkeypatch.setattr(bench, "random_model", stop)
    assert bench.main(["--model", "llada-8b", "--random-weights", "--device", "cpu", *more]) == 130


def test_peers_are_left_out_unless_asked_for():
    assert not bench.parse([]).peers
    assert bench.parse(["--peers"]).peers


@pytest.mark.parametrize(("arguments", "sentence"), [
    (["--model", "nowhere"], "neither a folder"), (["--model", "tiny", "--random-weights"], "shapes are known of"),
    (["--blocks", "2"], "needs --random-weights"), (["--gain", "40"], "--gain needs --write"),
    (["--model", "llada-8b", "--write", "new", "--repeats", "3"], "--write measures nothing"),
    (["--model", "llada-8b", "--random-weights", "--blocks", "33"], "between 1 and 32"),
    (["--repeats", "0"], "--repeats: must be at least 1"), (["--head-bits", "16", "--embed-bits", "4"], "needs"),
    (["--out", "missing-folder/x.json"], "does not exist"), (["--points", "1x8x4"], "at least"),
    (["--points", "abc"], "is not BATCHxLENGTHxTOKENS")])
def test_bad_input_is_one_sentence_and_exit_2(capsys, arguments, sentence):
    try:
        code = bench.main([*arguments, "--device", "cpu"])
    except SystemExit as stop:  # argparse's own way
        code = stop.code
    assert code == 2
    captured = capsys.readouterr()
    assert sentence in captured.err
    assert not captured.out


def test_running_out_of_memory_is_a_result():
    calls = []

    def hungry():
        calls.append(1)
        if len(calls) > 3:
            raise torch.OutOfMemoryError

    def starved():
        raise torch.OutOfMemoryError

    seconds = timing.measure({"hungry": hungry, "fine": lambda: None, "starved": starved}, 5, torch.device("cpu"))
    assert seconds["hungry"] == seconds["starved"] == {"failed": "out of memory"}
    assert seconds["fine"]["median"] >= 0
    assert bench.cell(seconds["starved"], 1, 2) == "out of memory"


def test_a_peer_that_fails_costs_its_own_cell_alone(tmp_path, capsys, monkeypatch):
    """It fails at the second point; the table and the file hold everything else."""
    def stubborn(model, log):
        twin, calls = copy.copy(model), []

        def hidden(ids, attention_mask=None):
            calls.append(ids.shape)
            if ids.shape[1] > 16:
                raise AssertionError("shape | not supported\nand a long trace")
            return model.hidden(ids, attention_mask)

        twin.hidden = hidden
        return {"peer": twin}

    monkeypatch.setattr(bench.peers, "models", stubborn)
    monkeypatch.setattr(bench, "linears", lambda *_: [])
    out = tmp_path / "r.json"
    assert bench.main(["--model", FIXTURES["llada"], "--repeats", "1", "--points", "1x16x1", "1x24x1", "--out",
                       str(out), "--device", "cpu", "--peers"]) == 0
    points = json.loads(out.read_text())["denoising"]
    assert "median" in points[0]["models"]["peer"]["step_s"]
    assert points[1]["models"]["peer"] == {"failed": "AssertionError: shape | not supported"}
    assert "AssertionError: shape / not supported |" in capsys.readouterr().out


def test_what_was_measured_is_kept_when_the_run_ends_early(tmp_path, monkeypatch, capsys):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(bench, "linears", stop)
    out = tmp_path / "r.json"
    arguments = ["--model", FIXTURES["llada"], "--repeats", "1", "--points", "1x16x1", "--out", str(out), "--device",
                 "cpu"]
    assert bench.main(arguments) == 130
    assert len(json.loads(out.read_text())["denoising"]) == 1
    assert capsys.readouterr().err.endswith(f"bench.py: interrupted. {out} holds what was measured.\n")
    monkeypatch.setattr(bench, "load_model", stop)
    assert bench.main(arguments) == 130
    assert capsys.readouterr().err == "bench.py: interrupted.\n"  # that file is of an earlier run


def test_a_tensor_that_wraps_others_counts_as_what_it_wraps():
    class Wrapped(torch.Tensor):
        @staticmethod
        def __new__(cls, codes, scale):
            return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)

        def __init__(self, codes, scale):
            self.codes, self.scale = codes, scale

        def __tensor_flatten__(self):
            return ["codes", "scale"], None

        @classmethod
        def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
            return args[0]  # detach, which a Parameter calls

    module = torch.nn.Module()
    module.weight = torch.nn.Parameter(Wrapped(torch.zeros(4, 6, dtype=torch.int8), torch.zeros(4)),
                                       requires_grad=False)
    assert twins.residents(module) == 4 * 6 + 4 * 4


def test_quantized_twin_shares_what_it_does_not_replace():
    model = load_model(FIXTURES["llada"], device="cpu").requires_grad_(False)
    ids = torch.tensor([[1, 2, 3, model.mask_id]])
    want = model(ids)
    twin = twins.quantized_twin(model, head_bits=16)
    assert twin.embed is model.embed
    assert twin.blocks[0].attn_norm is model.blocks[0].attn_norm
    assert all(isinstance(getattr(b, f), QuantLinear) for b in twin.blocks for f in FUSED)
    fast = twins.unpacked(twin)
    assert twin.blocks[0].qkv.packed
    assert not fast.blocks[0].qkv.packed
    assert torch.equal(fast(ids), twin(ids))
    assert torch.equal(model(ids), want)  # untouched


def test_plus_twin_has_the_form_of_starquant_plus():
    """As calibration would store it, on the integers of the other twin."""
    model = load_model("tiny", device="cpu").requires_grad_(False)
    twin = twins.quantized_twin(model, head_bits=16)
    plus, config = twins.plus_twin(twin), QuantConfig(method="starquant+")
    for fused in FUSED:
        linear, d = getattr(plus.blocks[1], fused), getattr(plus.blocks[1], fused).in_features
        assert linear.weight_packed is getattr(twin.blocks[1], fused).weight_packed
        want = stored_linear(config, len(linear.weight_scale), d, False).tensors()
        assert {k: tuple(v.shape) for k, v in linear.state_dict().items()} == {k: v.shape for k, v in want.items()}
        assert linear.feedback.shape == (d // 64, 64, 64)
        assert linear.mean.shape == (2, d)
        assert linear.d_m == 0
    assert isinstance(plus.blocks[1].tac, torch.nn.Identity)
    assert plus(torch.tensor([[1, 2, model.mask_id]])).isfinite().all()


@pytest.mark.usefixtures("strict_int_mm")
def test_probe_reads_what_int_mm_accepts():
    """Under Hopper's rules only multiples of 32, and only column-major, are good."""
    def strict(a, b, checked=torch._int_mm):
        try:
            return checked(a, b)
        except AssertionError as error:
            raise RuntimeError(str(error)) from None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "_int_mm", strict)
        accepted = probe_int_mm(torch.device("cpu"))
    assert accepted == {"column-major": {"M": [32, 64, 96, 1024], "K": [16, 32, 64], "N": [16, 32, 64]},
                        "row-major": {"M": [], "K": [], "N": []}}


def test_a_disk_too_small_for_the_weights_is_named_before_they_are_written(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10**9))
    assert bench.main(["--model", "llada-8b", "--blocks", "1", "--write", str(tmp_path / "w")]) == 2
    said = f"--write takes 2.508 GB, but {tmp_path} has 1 GB left; lower --blocks.\n"
    assert capsys.readouterr().err == f"bench.py: {said}"
    assert not (tmp_path / "w").exists()
