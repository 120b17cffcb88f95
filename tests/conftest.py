"""Shared settings: deterministic hypothesis, one thread, and a stand-in for `torch._int_mm` as strict as Hopper's."""

import json
import os
import shutil
import signal

import pytest
import torch
from arguments import fast
from hypothesis import settings
from safetensors.torch import load_file, save_file

import calibrate
import kernels
from checkpoint.families import read_config
from checkpoint.folder import INDEX, SINGLE, resolve
from model import DiffusionLM
from tiny import train

os.environ.setdefault("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody there: no test waits for a network
settings.register_profile("default", derandomize=True, deadline=None, max_examples=25)
settings.register_profile("thorough", parent=settings.get_profile("default"), max_examples=500)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))
signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts in the background ignores it
torch.set_num_threads(1)  # matrices are small here, sums have one order, and tests run side by side
os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start


def checked_int_mm(a, b):
    """`torch._int_mm` that refuses what Hopper (perhaps) refuses or silently gets wrong, and is exact for the rest."""
    assert a.ndim == b.ndim == 2, "operands must be matrices"
    assert a.dtype == b.dtype == torch.int8, "operands must be int8"
    (M, K), N = a.shape, b.shape[1]
    assert b.shape[0] == K, "inner dimensions differ"
    for name, size, of in (("M", M, 32), ("K", K, 16), ("N", N, 16)):
        assert size > 0, f"{name} is 0"
        assert size % of == 0, f"{name} = {size} is not a multiple of {of}"
    assert 0 not in a.stride() + b.stride(), "stride 0"
    (row, one), (one_b, column) = a.stride(), b.stride()
    assert one == 1, f"A is not row-major: strides {a.stride()}"
    assert row >= K, f"rows of A overlap: strides {a.stride()}"
    assert one_b == 1, f"B is not column-major: strides {b.stride()}"
    assert column >= K, f"columns of B overlap: strides {b.stride()}"
    return (a.long() @ b.long()).to(torch.int32)


@pytest.fixture(scope="module")
def strict_int_mm():
    """On the CPU, the product as a GPU takes it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "_int_mm", checked_int_mm)
        kernels.backend.cache_clear()  # what it found of the true product does not hold for the stand-in, nor back
        yield
    kernels.backend.cache_clear()


@pytest.fixture(scope="session")
def small_folder(tmp_path_factory):
    """A 2-layer model of random weights in LLaDA's layout, with the embedded model's tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "small"
    tiny = DiffusionLM(read_config(train.CONFIG | {"eos_token_id": 1022, "mask_token_id": 1023, "d_model": 64,
                                                   "n_layers": 2, "n_heads": 4, "n_kv_heads": 4,
                                                   "mlp_hidden_size": 96}))
    g = torch.Generator().manual_seed(0)
    for p in tiny.parameters():
        if p.ndim == 2:
            p.data.copy_(torch.randn(p.shape, generator=g) * p.shape[1] ** -0.5)
    tiny.save(folder, dtype=torch.bfloat16)
    for name in ("tokenizer.json", "training.json"):  # training.json: it is judged on, and calibrated with, our tasks
        shutil.copy(resolve("tiny") / name, folder)
    return folder


@pytest.fixture(scope="module")
def good(small_folder, tmp_path_factory):
    """A 16-bit folder, the same in three shards with checksums, and a quantized one."""
    base = tmp_path_factory.mktemp("good")
    shutil.copytree(small_folder, base / "model")
    shutil.copytree(small_folder, base / "sharded")
    tensors = load_file(base / "model" / SINGLE)
    (base / "sharded" / SINGLE).unlink()
    place = {name: f"model-0000{i % 3 + 1}-of-00003.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in set(place.values()):
        save_file({k: v for k, v in tensors.items() if place[k] == file}, base / "sharded" / file)
    (base / "sharded" / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": place}))
    assert calibrate.main(["--model", str(base / "model"), "--out", str(base / "quantized"), "--segments", "9",
                           "--length", "24", *fast(epochs=0)]) == 0
    return base


@pytest.fixture(scope="module")
def on_cpu(strict_int_mm):
    """Launches of `runtime.cuda` go to the interpreter of PTX; `_int_mm` is as strict as Hopper's."""
    import ptx  # which few tests need

    with ptx.interpreted():
        yield
