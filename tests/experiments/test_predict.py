"""A denoising step counted without a GPU: exact where that can be worked out by hand, and beside an H200's numbers."""

import json

import pytest
import torch

import bench
from experiments import predict
from model import load_model

D, FFN, HEAD = 4096, 12288, 128  # of LLaDA-8B
SHAPES = ((3 * D, D), (D, D), (2 * FFN, D), (D, FFN))  # C, d of its linears


@pytest.fixture(scope="module")
def rows():
    result = predict.predict("llada-8b", "h200", [(1, 32, 1), (4, 1024, 4)])
    return {(row["batch"], row["length"], row["model"]): row for row in result["steps"]}


@pytest.fixture(scope="module")
def blocks():
    """What one more block of a model counts, at 1 x 32 tokens on an H200."""
    gpu = predict.GPUS["h200"]
    with predict.pretended(predict.Count(gpu)):
        one, two = predict.models("llada-8b", 1), predict.models("llada-8b", 2)
    return {name: predict.step(two[name], gpu, 1, 32, 1) - predict.step(one[name], gpu, 1, 32, 1) for name in one}


@pytest.mark.parametrize(("name", "launches"), [
    # two norms of 8, rope of 13, SiLU of 2; or one each. Four linears, attention, two additions
    ("16-bit, eager glue", 2 * 8 + 14 + 2 + 4 + 1 + 2), ("16-bit", 2 + 1 + 1 + 4 + 1 + 2),
    # codes and a product for each linear, and TAC; or centring and blocks, codes (and once a rotation of its own),
    # feedback and a product
    ("starquant", 2 + 1 + 1 + 4 * 2 + 1 + 1 + 2), ("starquant+", 2 + 1 + 1 + 4 * 4 + 1 + 1 + 2)])
def test_launches_of_a_block(blocks, name, launches):
    assert blocks[name]["launches"] == launches
    assert blocks[name]["waits"] == 0


def test_bytes_of_a_16_bit_block_are_those_of_every_operation(blocks):
    M, elements = 32, 0
    elements += sum(C * d + M * (C + d) for C, d in SHAPES)
    elements += 2 * (2 * M * D + D) + 2 * 3 * M * D  # norms and their gains; residual additions
    elements += M * 3 * D + 4 * M * HEAD + M * 2 * D + 4 * M * D  # rope: qkv, cos and sin in fp32, q and k; attention
    elements += 3 * M * FFN  # SiLU
    assert blocks["16-bit"]["bytes"] == 2 * elements
    assert blocks["16-bit"]["bf16_flop"] == 2 * M * sum(C * d for C, d in SHAPES) + 4 * M * M * D


def test_quantized_weights_take_a_quarter(blocks):
    weights = sum(C * d for C, d in SHAPES)
    more = {name: blocks[name]["bytes"] - size * weights
            for name, size in (("16-bit", 2), ("starquant", 0.5), ("starquant+", 0.5))}
    assert 0 < more["16-bit"] < more["starquant"] < more["starquant+"] < 0.6 * weights  # sums of split tiles among them
    assert blocks["starquant"]["int8_flop"] == 2 * 32 * weights


@pytest.mark.parametrize(("point", "launches"), [
    ((1, 32), (1293, 390, 557, 813)), ((4, 1024), (1293, 390, 815, 1071))])
def test_launches_of_a_step(rows, point, launches):
    assert tuple(row["launches"] for key, row in rows.items() if key[:2] == point) == launches


def test_peaks_are_those_measured_and_floors_are_never_above_the_time(rows):
    for row in rows.values():
        assert row["peak_bytes"] == pytest.approx(row["measured"]["peak_bytes"], rel=0.01)
        assert row["floor_s"] < row["measured"]["step_s"]["median"]
        assert row["waits"] == 1  # at which positions the head runs


def test_dream_on_an_a40_by_the_command(tmp_path, capsys):
    out = tmp_path / "predicted.json"
    command = ["--model", "dream-7b", "--predict", "--gpu", "a40", "--points", "1x64x4", "--out", str(out)]
    assert bench.main(command) == 0
    assert capsys.readouterr().out.startswith("PREDICTED, NOT MEASURED")
    result = json.loads(out.read_text())
    assert result["predicted"]
    steps = {row["model"]: row for row in result["steps"]}
    assert not any(row["measured"] for row in steps.values())
    assert 2 * steps["starquant"]["floor_s"] < steps["16-bit"]["floor_s"] < steps["16-bit, eager glue"]["floor_s"]


@pytest.mark.parametrize("wrong", [["--gpu", "a40"], ["--predict", "--peers"], ["--predict", "--gpu", "tpu"]])
def test_what_cannot_be_predicted_is_said(wrong, capsys):
    with pytest.raises(SystemExit, match="2"):
        bench.main(wrong)
    assert "bench.py: " in capsys.readouterr().err
    assert bench.main(["--predict", "--model", "tiny"]) == 2
    assert "shapes are known of" in capsys.readouterr().err


def test_nothing_stays_pretended():
    assert not torch.zeros(1).is_cuda
    assert load_model("tiny", "cpu")(torch.zeros(1, 4, dtype=torch.long)).isfinite().all()
