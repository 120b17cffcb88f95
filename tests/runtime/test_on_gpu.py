"""Everything above the kernels on a GPU: graphs, calibration by every method, checkpoints, figures, tables, benchmark.

Skipped without one; STARQUANT_GPU_TESTS_ON=cpu runs the same lines on the CPU, which shows that they run.
"""

import json
import os
from pathlib import Path

import pytest
import torch
from arguments import fast, quick

import bench
import calibrate
from experiments import figures
from methods import METHODS
from model import generate, load_model
from tiny import metrics, tasks

DEVICE = os.environ.get("STARQUANT_GPU_TESTS_ON", "cuda")
pytestmark = [pytest.mark.cuda,
              pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="needs a GPU")]


def calibrated(model, **setting):
    tokens, region = tasks.calibration_set(model.tokenizer, 16, 64, 0)
    return calibrate.quantize_model(model, tokens, quick(**setting), region)


@pytest.fixture(scope="module")
def tiny():
    return load_model("tiny", DEVICE, torch.float32)


@pytest.mark.parametrize("setting", [None, {}, {"method": "starquant+"}, {"method": "quarot", "kv_bits": 4},
                                     {"method": "rtn", "head_bits": 8, "softmax_bits": 4}])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("cfg_scale", [0.0, 1.0])
def test_graphs_change_nothing(tiny, tmp_path, setting, padded, cfg_scale):
    """The same kernels on the same numbers: the tokens are equal, whether or not the steps are replayed."""
    model = tiny if setting is None else calibrated(tiny, **setting)
    ids, mask = metrics.encode_prompts(model.tokenizer, tasks.problems("math", "eval", 4, 0))
    ids, mask = (t.to(DEVICE) for t in (ids, mask if padded else torch.ones_like(mask)))
    one, two = (generate(model, ids, steps=8, gen_length=16, attention_mask=mask, cfg_scale=cfg_scale, cuda_graph=graph)
                for graph in (True, False))
    assert torch.equal(one, two)


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_padding_does_not_reach_what_it_pads_in_bf16(family):
    """Attention with a mask in bf16 takes kernels that fp32 never meets."""
    model = load_model(Path(__file__).parents[1] / "fixtures" / family, DEVICE, torch.bfloat16)
    g = torch.Generator().manual_seed(0)
    ids, mask = torch.randint(model.config.vocab_size, (2, 40), generator=g), torch.ones(2, 40, dtype=torch.long)
    ids, mask[1, 27:] = ids.to(DEVICE), 0
    with torch.no_grad():
        padded, alone = model.hidden(ids, mask.to(DEVICE)), model.hidden(ids[1:, :27])
    assert padded.isfinite().all()
    # numbers up to 4 in 8 bits through a few layers: 0.05 and 0.09 on a CPU; without a mask it is 4
    assert (padded[1, :27] - alone[0]).abs().max() < 0.3


@pytest.mark.parametrize("method", METHODS)
def test_every_method_calibrates_and_its_checkpoint_is_the_model(tmp_path, method, capsys):
    """By the command, with activations in files; the error of every linear is that of the same run on the CPU."""
    records = []
    for device, folder in ((DEVICE, tmp_path / "a"), ("cpu", tmp_path / "b")):
        spill = tmp_path / f"spill-{device}"
        spill.mkdir(exist_ok=True)
        assert calibrate.main([*fast("--method", method), "--segments", "8", "--problems", "2", "--out", str(folder),
                               "--dtype", "fp32", "--device", device, "--spill", str(spill), "--set", "kv_bits=8"]) == 0
        capsys.readouterr()
        records.append([fit["error"] for block in json.loads((folder / "starquant.json").read_text())["blocks"]
                        for fit in block["linears"].values()])
    assert torch.allclose(*map(torch.tensor, records), rtol=0.15)  # chaotic to some percent
    ids = torch.arange(20, device=DEVICE)[None]
    logits = load_model(tmp_path / "a", DEVICE)(ids)
    assert torch.isfinite(logits).all()
    assert (generate(load_model(tmp_path / "a", DEVICE), ids, steps=4, gen_length=8) != 1023).all()


def test_figures(tmp_path):
    for number in ("1", "4", "5"):
        figures.make(number, tmp_path, "tiny", device=DEVICE)


def test_benchmark_with_peers(tmp_path):
    out = tmp_path / "r.json"
    assert bench.main(["--model", "tiny", "--device", DEVICE, "--points", "2x64x4", "--repeats", "2", "--peers",
                       "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    assert all("failed" not in result["denoising"][0]["models"][name] for name in ("16-bit", *bench.QUANTIZED))
    assert not [r for r in result["linears"] for name in result["linear_models"] if "failed" in r[name]]
