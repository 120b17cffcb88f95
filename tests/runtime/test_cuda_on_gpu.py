"""The kernels on a GPU: the assertions of `kernel_checks.py`, away from the stand-ins that serve there."""

import pytest
import torch
from kernel_checks import (
    DTYPES,
    a_block,
    check_fake_quantize,
    check_feedback,
    check_linear,
    check_nan,
    check_plus,
    check_tac,
    check_tile,
    layer,
)
from references import fake_quantized

import kernels
import model
from checkpoint.families import read_config
from checkpoint.published import published
from methods.gptq import gptq, hessian
from runtime import checks, cuda, fusion, products

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


@pytest.fixture(autouse=True)
def nothing_is_refused(monkeypatch):
    """The exact fallback would give the same integers. fp8 products round before they add a bias: they are left out."""
    monkeypatch.setattr(products, "fp8_is_exact", lambda _: False)
    yield
    refused = set(kernels._REFUSED)
    kernels._REFUSED.clear()  # the next test is judged by itself
    assert not refused


@pytest.mark.parametrize("part", cuda.PARTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_kernels_are_in_use(dtype, part):
    assert checks.ready(torch.cuda.current_device(), torch.bfloat16 if part in checks.ONLY_BF16 else dtype, part)


@pytest.mark.parametrize("sizes", [(64, 64, 1), (96, 128, 1), (56, 64, 1), (64, 64, 0), (56, 64, 0), (192, 64, 0),
                                   (64, 64, 1, 1), (96, 128, 1, 2), (56, 64, 1, 1), (148, 128, 1, 2)])
def test_rotations_are_in_use(sizes):
    rotation, device = cuda.Rotation(*sizes), torch.device("cuda", torch.cuda.current_device())
    if rotation.shared > cuda.shared_memory(device):
        pytest.skip("needs more shared memory than a CUDA block has on this GPU")
    assert checks.ready(device.index, torch.bfloat16, rotation)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("B", "L"), [(1, 1), (2, 333), (4, 1024)])
def test_norm_rope_and_silu_of_llada(dtype, B, L):
    """One kernel each against PyTorch's operations: RoPE bit for bit, the others but for few last bits."""
    c, g = read_config(published("llada-8b", 1)), torch.Generator("cuda").manual_seed(0)
    with torch.device("meta"):
        block = model.Block(c)
    norm = model.RMSNorm(4096, 1e-5).to("cuda", dtype).requires_grad_(False)
    norm.weight.normal_(generator=g)
    x, qkv, gate_up = (torch.randn(B, L, n, generator=g, device="cuda").to(dtype) for n in (4096, 12288, 24576))
    rope = model.cos_sin(torch.arange(L, device="cuda"), c, dtype)
    got = norm(x), model.swiglu(gate_up), *block.heads(qkv, rope)
    with checks.eager_glue():
        want = norm(x), model.swiglu(gate_up), *block.heads(qkv, rope)
    for ours, theirs in zip(got[:2], want[:2], strict=True):
        assert torch.allclose(ours, theirs, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
        assert (ours != theirs).float().mean() < (0.01 if dtype == torch.bfloat16 else 1)
    assert all(map(torch.equal, got[2:], want[2:]))


def test_gptq_rounds_as_on_the_cpu():
    g = torch.Generator().manual_seed(0)
    weight, x = torch.randn(500, 300, generator=g), torch.randn(2000, 300, generator=g)
    H = hessian(x @ torch.randn(300, 300, generator=g))
    on_gpu = gptq(weight.cuda(), H.cuda(), 4)
    codes, scale = gptq(weight, H, 4)
    assert (on_gpu[0].cpu() != codes).float().mean() < 1e-3  # fp64, in another order
    assert torch.equal(on_gpu[1].cpu(), scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("M", "K", "N"), [(1, 64, 48), (33, 1056, 96), (128, 4096, 12288), (1000, 4096, 4096)])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("masked", [None, True, False])
def test_linear(dtype, M, K, N, packed, masked):
    check_linear("cuda", 0, M, K, N, dtype, 4, packed, masked, masked is None, True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("clipped", [True, False])
def test_feedback(dtype, clipped):
    check_feedback("cuda", 0, 1000, 64, dtype, 4, clipped)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("M", "K", "N"), [(1, 256, 32), (33, 1280, 96), (128, 4096, 12288), (256, 18944, 3584)])
@pytest.mark.parametrize("name", cuda.TILES)
def test_tiles(dtype, M, K, N, name):
    if cuda.TILES[name].GROUPS and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs Hopper")
    check_tile("cuda", cuda.TILES[name], M, K, N, dtype, None, True, True, True, True)
    check_tile("cuda", cuda.TILES[name], M, K, N, dtype, 2, extreme=not cuda.TILES[name].NIBBLES)


@pytest.mark.parametrize("M", [32, 256])
def test_the_faster_product_is_chosen_and_kept(M, monkeypatch):
    monkeypatch.setattr(products, "_FASTEST", {})
    check_linear("cuda", 0, M, 4096, 4096, torch.bfloat16, 4, True, None, False, True)
    (choice,) = products._FASTEST.items()
    check_linear("cuda", 0, M, 4096, 4096, torch.bfloat16, 4, True, None, False, True)
    assert list(products._FASTEST.items()) == [choice]
    check_linear("cuda", 0, M, 4096, 4096, torch.bfloat16, 4, False, None, False, True)  # int8: one way


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_stays_nan_in_its_token(dtype):
    check_nan("cuda", dtype)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("M", "K"), [(3, 16), (1024, 4096), (1024, 12288), (100, 18944)])
def test_fake_quantize(M, K, symmetric):
    check_fake_quantize("cuda", M, K, 4, symmetric)


def test_tac():
    check_tac("cuda", 1030, 256)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("masked", [None, True, False])
def test_starquant_plus_layer(dtype, masked):
    check_plus("cuda", dtype, masked)


@pytest.mark.parametrize("method", ["starquant", "starquant+"])
@pytest.mark.parametrize("length", [32, 300])
def test_a_block_is_the_same_in_fewer_kernels(method, length, monkeypatch):
    """But for a norm's sum, which has another order and may move a code by one."""
    block, inputs = a_block(method, torch.bfloat16, 4096, 12288, "cuda", length)
    assert fusion.serves(block, inputs[0])
    fused = block(*inputs)
    monkeypatch.setattr(fusion, "serves", lambda *_: False)
    want = block(*inputs)
    assert (fused - want).float().norm() < 0.01 * (want - inputs[0]).float().norm()


def test_layer_equals_its_fake_quantized_reference():
    linear, g = layer().cuda(), torch.Generator().manual_seed(0)
    x, state = torch.randn(2, 50, 64, generator=g).cuda(), (torch.rand(2, 50, generator=g) < 0.5).cuda()
    assert torch.allclose(linear(x, state), fake_quantized(linear, x, state), rtol=1e-4, atol=1e-4)
