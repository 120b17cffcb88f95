"""The benchmark on the CPU, the memory table against real tensors, and embedding and head in integers."""

import copy
import functools
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from arguments import quick
from hypothesis import given
from hypothesis import strategies as st
from references import fake_quantized
from tools.probe_int_mm import probe_int_mm

import bench
from calibrate import quantize_model
from checkpoint import published
from checkpoint.families import FUSED, NAMES, read_config
from checkpoint.folder import SINGLE, write_json, write_tensors
from checkpoint.loading import block_tensors, outer_tensors
from experiments import peers, predict, timing, twins
from methods import QuantConfig
from methods.rtn import quantize_outer
from methods.storage import memory_table, stored_linear
from model import DiffusionLM, load_model
from runtime.layers import QuantEmbedding, QuantLinear, quantize_weight

ROOT = Path(__file__).parent.parent
MODELS = ("16-bit", "starquant", "starquant, int8", "starquant+", "starquant+, int8")
FIXTURES = {name: str(ROOT / "tests" / "fixtures" / name) for name in ("llada", "dream")}


def quantized(name, head_bits=8, embed_bits=None):
    model = load_model(FIXTURES[name], device="cpu", dtype=torch.bfloat16).requires_grad_(False)
    return twins.quantized_twin(model, 0, head_bits, embed_bits)


# ---- memory --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(FIXTURES))
@pytest.mark.parametrize(("head_bits", "embed_bits"), [(16, None), (8, None), (8, 4)])
@pytest.mark.parametrize("weights", ["packed", "int8"])
def test_memory_table_counts_the_bytes_of_a_real_model(name, head_bits, embed_bits, weights):
    model = quantized(name, head_bits, embed_bits)
    model = twins.unpacked(model) if weights == "int8" else model
    sizes = memory_table(model.config, head_bits=head_bits, embed_bits=embed_bits, weights=weights)
    assert sizes["total"] == twins.residents(model)
    packed = [getattr(b, f).weight_packed.nbytes for b in model.blocks for f in FUSED]
    assert sizes["linears"] == sum(packed)
    assert sizes["sixteen_bit"] == twins.residents(load_model(FIXTURES[name], device="cpu", dtype=torch.bfloat16))
    plus = memory_table(model.config, head_bits=head_bits, embed_bits=embed_bits, weights=weights, method="starquant+")
    assert plus["total"] == twins.residents(twins.plus_twin(model))
    ids = torch.tensor([[1, 5, model.mask_id, 7]])
    assert torch.equal(twins.plus_twin(model)(ids), twins.plus_twin(quantized(name, head_bits, embed_bits))(ids))


@pytest.mark.parametrize("name", [*FIXTURES, "tiny"])
def test_memory_table_counts_the_bytes_of_a_calibrated_model(name):
    model = DiffusionLM(replace(load_model(FIXTURES.get(name, name), device="cpu").config, n_layers=1))
    tokens = torch.randint(0, 99, (4, 16), generator=torch.Generator().manual_seed(0))
    for method in ("starquant", "starquant+"):
        calibrated = quantize_model(model, tokens, quick(method, epochs=0))
        sixteen_bit = twins.residents(model.embed) + (not model.config.tied) * twins.residents(model.head)
        want = memory_table(model.config, method=method)
        assert twins.residents(calibrated) == want["total"] + fp32_norms(calibrated) + sixteen_bit // 2  # fp32 here


# bytes that the published index files state as total_size
@pytest.mark.parametrize(("name", "size"), [("llada-8b", 16031162368), ("dream-7b", 15231233024)])
def test_sixteen_bit_size_is_the_published_one(name, size):
    assert memory_table(read_config(published.SHAPES[name]))["sixteen_bit"] == size


@pytest.mark.parametrize(("name", "method", "embed_bits"), [
    ("llada-8b", "starquant", 8), ("llada-8b", "starquant", 4), ("dream-7b", "starquant", 4),
    ("llada-8b", "starquant+", 4), ("dream-7b", "starquant+", 4)])
def test_saving_at_published_shapes(name, method, embed_bits):
    """Dream with 8-bit embedding and head stays at 3.48x: its vocabulary is 14 % of the model, so 3.5x needs less;
    what `starquant+` adds needs it, too."""
    sizes = memory_table(read_config(published.SHAPES[name]), head_bits=8, embed_bits=embed_bits, method=method)
    assert sizes["sixteen_bit"] / sizes["total"] >= 3.5


# ---- embedding and head in integers --------------------------------------------------------------------------------


@given(st.integers(0, 2**16), st.integers(1, 20), st.integers(1, 33), st.sampled_from([4, 8]))
def test_embedding_rounds_each_row_to_its_own_grid(seed, V, D, bits):
    weight = torch.randn(V, D, generator=torch.Generator().manual_seed(seed))
    ids = torch.arange(V).flip(0)[None]
    codes, scale, zero = quantize_weight(weight, bits)[:3]
    assert zero is None
    out = QuantEmbedding.fold(weight, bits)(ids)[0]
    assert torch.equal(out, scale.flip(0)[:, None] * codes.flip(0))
    assert ((out - weight.flip(0)).abs() <= scale.flip(0)[:, None] * 0.5001).all()


@pytest.mark.parametrize("name", list(FIXTURES))
@pytest.mark.parametrize("embed_bits", [None, 4])
def test_integer_head_survives_a_checkpoint(tmp_path, name, embed_bits):
    model = load_model(FIXTURES[name], device="cpu").requires_grad_(False)
    model = twins.quantized_twin(model, 0, 8, embed_bits)
    write_quantized(model, tmp_path, embed_bits or 8)
    for weights in ("packed", "int8"):
        again = load_model(tmp_path, device="cpu", weights=weights)
        ids = torch.tensor([[1, 5, model.mask_id, 7, model.mask_id]])
        assert torch.equal(again(ids), model(ids))
        assert twins.residents(again) == memory_table(model.config, head_bits=8, embed_bits=embed_bits,
                                                      weights=weights)["total"] + fp32_norms(again)


def fp32_norms(model) -> int:
    """Norm gains are fp32 in a model loaded for the CPU: two bytes more each than the table counts."""
    return sum(2 * m.weight.numel() for m in model.modules() if type(m).__name__ == "RMSNorm")


def write_quantized(model, folder, embed_bits):
    c, tensors = model.config, outer_tensors(model)
    for i, block in enumerate(model.blocks):
        tensors |= block_tensors(block, i)
    write_tensors(folder / SINGLE, tensors)
    gates = {f: {"d_m": getattr(model.blocks[0], f).d_m, "d_u": getattr(model.blocks[0], f).d_u} for f in FUSED}
    write_json(folder / "config.json", c.raw | {"quantization_config": {
        "weight_bits": 4, "activation_bits": 4, "head_bits": 8, "embed_bits": embed_bits,
        "linears": gates}})


def test_integer_head_is_the_float_head_up_to_two_8_bit_roundings():
    model = load_model(FIXTURES["llada"], device="cpu").requires_grad_(False)
    hidden = model.hidden(torch.arange(40)[None] % 200)
    want, head = model.head(hidden), quantize_outer(model).head
    got = head(hidden)
    assert torch.allclose(got, fake_quantized(head, hidden), rtol=1e-5, atol=1e-5 * float(want.abs().max()))
    # a uniform 8-bit grid over 6.5 standard deviations leaves (6.5 / 255)² / 12 of the energy: 43 dB, twice: 40 dB
    assert 10 * (want.square().sum() / (want - got).square().sum()).log10() > 37


def test_tied_head_shares_the_embedding():
    model = load_model(FIXTURES["llada"], device="cpu").requires_grad_(False)
    model.config = copy.copy(model.config)
    object.__setattr__(model.config, "tied", True)
    model.head.weight = model.embed.weight
    quantize_outer(model, 8)
    assert model.head.weight_packed is model.embed.weight_packed
    assert not any(k.startswith(NAMES["llada"].head) for k in outer_tensors(model))


LOAD = """
import resource, sys, torch
from model import load_model
torch.set_num_threads(1)
load_model(sys.argv[1], device="cpu", dtype=torch.bfloat16)  # libraries and buffers that stay
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
model = load_model(sys.argv[2], device="cpu", dtype=torch.bfloat16)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux only")
def test_peak_while_loading(tmp_path):
    """The process grows by at most 1.2x of the model, counting the file's pages, which a CPU maps into it, too."""
    raw = published.LLADA_8B | {"d_model": 512, "n_heads": 8, "n_kv_heads": 8, "n_layers": 24, "mlp_hidden_size": 1536,
                          "vocab_size": 16000, "embedding_size": 16000, "mask_token_id": 15000, "eos_token_id": 1}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(published.SHAPES, "small", raw)
        model = twins.random_model("small", torch.device("cpu"), torch.bfloat16, 0)
    model = twins.quantized_twin(model)
    write_quantized(model, tmp_path, 8)
    done = subprocess.run([sys.executable, "-c", LOAD, FIXTURES["llada"], str(tmp_path)], cwd=ROOT, check=True,
                          capture_output=True, text=True)
    assert int(done.stdout) * 1024 <= 1.2 * twins.residents(model)


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
    assert 0 < max(p["busy"] for p in result["denoising"]) < 1 or not timing.STAT.exists()
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
