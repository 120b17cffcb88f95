"""What the CUDA kernels are held against, on the CPU (`test_cuda.py`) and on a GPU (`test_cuda_on_gpu.py`): their eager
twins."""

from types import SimpleNamespace

import pytest
import torch

import kernels
import model
from checkpoint.families import FUSED, read_config
from experiments import twins
from methods.plus import feedback_matrix
from methods.sgat import random_orthogonal
from runtime import checks, cpu, cuda, products
from runtime.layers import Centre, Grid, QuantLinear, Weight, rebuilt
from starquant import Across, Blocks, FakeQuantize, Kronecker, apply_basis, tac_apply
from tiny import train

DTYPES = [torch.float32, torch.bfloat16]


def plant(monkeypatch, tmp_path, old: str, new: str) -> None:
    """A fault in the sources of the kernels."""
    texts = {name: getattr(cuda, name).read_text() for name in ("SOURCE", "PRODUCTS_SOURCE")}
    assert any(old in text for text in texts.values())
    for name, text in texts.items():
        (changed := tmp_path / name).write_text(text.replace(old, new))
        monkeypatch.setattr(cuda, name, changed)


def int_linear(x, state, d_m: int, d_u: int, weight, w_scale, w_sum, bits: int, packed: bool, bias=None, w_zero=None,
               clip=None, V=None, shift=None):
    """`products.linear` of transformed activations x (M, K) by tensors."""
    layer = SimpleNamespace(
        weight_packed=weight, weight_scale=w_scale, weight_sum=w_sum, weight_zero=w_zero, bias=bias, shift=shift,
        clip=clip, feedback=V, mean=None, d_m=d_m, d_u=d_u, abits=bits, wbits=4 if packed else 8, packed=packed,
        in_features=x.shape[1], basis=lambda x: [])
    return products.linear(layer, x, state)


def at_random(device, seed: int) -> dict:
    """Arguments of a draw on the device itself: what a GPU is held against takes a minute on one thread of a CPU."""
    return {"generator": torch.Generator(device).manual_seed(seed), "device": device}


def gated(x, state, d_m, d_u):
    K = x.shape[1]
    column = torch.arange(K, device=x.device)
    off = torch.where(state[:, None], column >= K - d_u, (column >= K - d_u - d_m) & (column < K - d_u))
    return x.masked_fill(off, 0)


def check_linear(device, seed, M, K, N, dtype, wbits, packed, masked, asymmetric, has_bias, width=None, clipped=False,
                 shifted=False):
    """One linear through the kernels against the eager twins: every integer and every output equal."""
    here = at_random(device, seed)
    d_m, d_u = K // 5, K // 7
    x = (torch.randn(M, K, **here) * torch.randn(M, 1, **here).exp()).to(dtype)
    x[0] = 0
    state = torch.rand(M, **here) < 0.5 if masked is None else torch.full((M,), masked, device=device)
    half = 2 ** (wbits - 1)
    w = torch.randint(-half, half, (N, K), dtype=torch.int8, **here)
    w_scale = torch.rand(N, **here)
    bias = torch.randn(N, **here) if has_bias else None
    w_zero = w[:, 0].int() if asymmetric else None
    clip = torch.tensor([0.9, 0.7], device=device) if clipped else None
    shift = torch.randn(2, N, **here) if shifted else None
    rows = gated(x, state, d_m, d_u)
    codes, scale, zero = cuda.quantize_rows(x, state, d_m, d_u, 4, clip)
    want_codes, want_scale, want_zero = kernels.quantize_rows(rows, 4, clip)
    assert torch.equal(codes[:M], want_codes)
    assert not codes[M:].any()
    assert torch.equal(scale[:, None], want_scale)
    assert torch.equal(zero[:, None], want_zero.int())
    weight = kernels.pack_int4(w) if packed else w
    with pytest.MonkeyPatch.context() as patch:
        if width:
            patch.setattr(products, "slice_width", lambda *_: width)
        y = int_linear(x, state, d_m, d_u, weight, w_scale, kernels.row_sums(w), 4, packed, bias, w_zero,
                                    clip, None, shift)
    want = kernels.int_linear(rows, w, w_scale, 4, w_zero, bias, clip)
    want = want if shift is None else want + shift[state.long()]
    assert y.dtype == dtype
    assert torch.equal(y, want.to(dtype))


def with_feedback(x, w, w_scale, bits, bias, clip, V):
    """`kernels.int_linear` of activations that are rounded by feedback."""
    codes, scale, zero = cpu.token_codes(x, bits, clip, V)
    y = (kernels.float_mm(codes, w) - zero.int() * kernels.row_sums(w)).float() * scale * w_scale
    return y if bias is None else y + bias


def check_feedback(device, seed, M, blocks, dtype, bits, clipped):
    """Feedback through the kernel against its eager twin: every integer equal."""
    g = torch.Generator().manual_seed(seed)
    K = 64 * blocks
    x = (torch.randn(M, K, generator=g) * torch.randn(M, 1, generator=g).exp()).to(device, dtype)
    x[0] = 0
    V = feedback_matrix(torch.randn(K, K, generator=g), 64).to(device)
    clip = torch.full((2,), 0.75, device=device) if clipped else None
    w = torch.randint(-8, 8, (32, K), generator=g, dtype=torch.int8).to(device)
    ones, sums = torch.ones(32, device=device), kernels.row_sums(w)
    codes, scale, zero = cuda.quantize_rows(x, None, 0, 0, bits, clip)
    cuda.feedback(x, V, scale, zero, codes, bits)
    assert torch.equal(codes[:M], cpu.feedback_codes(x.float(), scale[:, None], zero[:, None].float(), V, bits))
    assert not codes[M:].any()
    y = int_linear(x, None, 0, 0, kernels.pack_int4(w), ones, sums, bits, True, clip=clip, V=V)
    want = with_feedback(x, w, ones, bits, None, clip, V)
    assert torch.equal(y, want.to(dtype))


def paired(codes):
    """In every 32 channels the even ones before the odd ones."""
    return codes.unflatten(-1, (-1, 16, 2)).transpose(-2, -1).reshape(codes.shape).contiguous()


def check_tile(device, tile, M, K, N, dtype, splits=1, asymmetric=False, has_bias=False, shifted=False, added=False,
               extreme=False):
    """A product by `tile` against its formula, every output equal; the counters that its blocks meet at are 0 again."""
    here = at_random(device, M + N)
    codes = torch.zeros(kernels.multiple(M, 32), K, dtype=torch.int8, device=device)
    codes[:M] = torch.randint(-128 if extreme else -8, 128 if extreme else 8, (M, K), **here)
    w = torch.randint(-8, 8, (N, K), dtype=torch.int8, **here)
    if extreme:  # the largest sum there is
        codes[0], w[0] = -128, -8
    scale, zero = torch.rand(M, **here), torch.randint(-8, 8, (M,), dtype=torch.int32, **here)
    w_scale, w_sum, state = torch.rand(N, **here), kernels.row_sums(w), torch.rand(M, **here) < 0.5
    w_zero = torch.randint(-8, 8, (N,), dtype=torch.int32, **here) if asymmetric else None
    bias = torch.randn(N, **here) if has_bias else None
    shift = torch.randn(2, N, **here) if shifted else None
    x_sum = codes[:M].sum(-1, dtype=torch.int32) - K * zero if asymmetric else None
    residual = torch.randn(M, N, **here).to(dtype) if added else None
    ends = cuda.Ends(scale, zero, x_sum, w_scale, w_sum, w_zero, bias, shift, state, residual)
    y = torch.full((M, N), torch.nan, dtype=dtype, device=device)
    cuda.tiled_product(tile, paired(codes), kernels.pack_int4(w), ends, y, splits)
    acc = kernels.float_mm(codes[:M], w) - zero[:, None] * w_sum  # in fp64 where fp32 would round
    acc = acc - x_sum[:, None] * w_zero if asymmetric else acc
    want = acc.float() * scale[:, None] * w_scale
    want = want + bias if has_bias else want
    want = (want + shift[state.long()] if shifted else want).to(dtype)
    assert torch.equal(y, want + residual if added else want)
    assert not cuda._counters(y.device).any()


def check_nan(device, dtype):
    """A token with NaN comes out as NaN, with feedback and without; the others as if it were not there."""
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(20, 128, generator=g), torch.randint(-8, 8, (32, 128), generator=g, dtype=torch.int8)
    x, w, V = x.to(device, dtype), w.to(device), feedback_matrix(torch.randn(128, 128, generator=g), 64).to(device)
    broken = x.clone()
    broken[3, 5], broken[17, 127], broken[18, 0] = torch.nan, torch.nan, torch.nan
    ones, sums, clip = torch.ones(32, device=device), kernels.row_sums(w), torch.full((2,), 0.9, device=device)
    for options in ({}, {"V": V}, {"clip": clip}):
        got, want = (int_linear(t, None, 0, 0, w, ones, sums, 4, False, **options) for t in (broken, x))
        nan = got.isnan()
        assert nan.any(-1).nonzero()[:, 0].tolist() == nan.all(-1).nonzero()[:, 0].tolist() == [3, 17, 18]
        assert torch.equal(got[~nan], want[~nan])


def check_plus(device, dtype, masked):
    """A whole linear of starquant+ through the kernels (centre, blocks, clip, feedback, the mean's output) against its
    eager twin."""
    linear, g = plus_layer().to(device), torch.Generator().manual_seed(1)
    x = torch.randn(2, 25, 128, generator=g).to(device, dtype)
    state = (torch.rand(2, 25, generator=g) < 0.5 if masked is None else torch.full((2, 25), masked)).to(device)
    rows, P = (x - linear.mean[state.long()]).to(dtype).flatten(0, 1), linear.basis(x)
    if dtype == torch.bfloat16:  # sums of another order may round otherwise
        own = cuda.centred_blocks(x.flatten(0, 1), linear.mean, state.flatten(), P[0].B)
        assert torch.allclose(own.float(), P[0].apply(rows).float(), rtol=2**-7, atol=2**-12)
        rows, P = own, P[1:]
    rows = apply_basis(rows, P)
    want = with_feedback(rows, linear.codes(), linear.weight_scale, 4, linear.bias, linear.clip, linear.feedback)
    want = (want.reshape(2, 25, -1) + linear.shift[state.long()]).to(dtype)
    with pytest.MonkeyPatch.context() as patch:
        if device == "cpu":
            patch.setattr(products, "serves", lambda *_: True)
        assert torch.equal(linear(x, state), want)
    if device == "cpu" and dtype == torch.float32:
        assert torch.equal(linear(x, state), want)  # eager


def plus_layer(K=128, N=48):
    g = torch.Generator().manual_seed(0)
    blocks, across = (torch.linalg.qr(torch.randn(*s, generator=g))[0] for s in ((K // 64, 64, 64), (K // 64, K // 64)))
    P = [Blocks(blocks.bfloat16()), Across(across.bfloat16())]
    codes = torch.randint(-8, 8, (N, K), generator=g, dtype=torch.int8)
    centre = Centre(torch.randn(2, K, generator=g), torch.randn(2, N, generator=g))
    weight = Weight(codes, torch.rand(N, generator=g))
    grid = Grid(4, torch.full((2,), 0.9), feedback_matrix(codes.float(), 64))
    return QuantLinear(weight=weight, grid=grid, P=P, bias=torch.randn(N, generator=g), centre=centre)


def check_tac(device, rows, blocks):
    g = torch.Generator().manual_seed(rows)
    z = torch.randn(1, rows, blocks * 16, generator=g).to(device, torch.bfloat16)
    M, d = (torch.randn(blocks, *s, generator=g).to(device) for s in ((16, 16), (16,)))
    want = tac_apply(z.double(), M.double(), d.double())
    # 16 bits of M; the output adds half a unit in the last place of 8 bits
    assert ((cuda.tac(z, M, d) - want).abs() <= 2**-8 * (want.abs() + z.abs().max() * M.abs().max() * 16)).all()


def check_fake_quantize(device, M, K, bits, symmetric):
    """Q(x) and its gradient against `starquant.FakeQuantize`: the rows bit for bit, the sums of their gradient in
    another order; where every sum is exact, the gradient bit for bit, too."""
    here, limit = at_random(device, K + bits), torch.finfo(torch.float32).max
    end = 2 ** (bits - 1) - (1 if symmetric else 0.5)  # s = 1: ties, ends that occur often, half a step beyond a code
    whole = (torch.randint(-(2**bits), 2**bits, (M, K), **here) / 2).clamp(-end, end)
    whole[:, 0], whole[:, 1] = end, -end
    one_sign = torch.randn(M, K, **here).abs()
    for x, exact in ((torch.randn(M, K, **here) * torch.randn(M, 1, **here).exp(), False), (one_sign, False),
                     (-one_sign, False), (torch.zeros(M, K, device=device), True), (whole, True)):
        grad = torch.randint(-8, 9, (M, K), **here).float() if exact else torch.randn(M, K, **here)
        got, ours = checks.with_gradient(cuda.FakeQuantize, x, grad, bits, symmetric)
        want, theirs = checks.with_gradient(FakeQuantize, x, grad, bits, symmetric, limit)
        assert torch.equal(got, want)
        # an end gets a sum of K products, each as large as x, over s
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=0 if exact else 2e-6 * K**0.5)


def layer(K=64, N=48, seed=0, sizes=(8, 8), **kwargs):
    g = torch.Generator().manual_seed(seed)
    P = [Kronecker(*(torch.linalg.qr(torch.randn(n, n, generator=g))[0] for n in sizes))]
    return QuantLinear.fold(torch.randn(N, K, generator=g), P, 4, 4, bias=torch.randn(N, generator=g), **kwargs)


def a_block(method, dtype, d=512, ffn=1024, device="cpu", length=5):
    """A quantized block of random weights, and its inputs x (1, length, d), state, rope."""
    g, config = torch.Generator().manual_seed(0), read_config(train.CONFIG | {
        "d_model": d, "n_layers": 1, "n_heads": 8, "n_kv_heads": 8, "mlp_hidden_size": ffn})
    block = model.Block(config)
    for p in block.parameters():
        p.data = torch.randn(p.shape, generator=g) * (p.shape[1] ** -0.5 if p.ndim == 2 else 1)
    new = {}
    for name in FUSED:
        weight = getattr(block, name).weight
        factors = [random_orthogonal(n, g).float() for n in (weight.shape[1] // 64, 64)]
        new[name] = QuantLinear.fold(weight, [Kronecker(*factors)], weight.shape[1] // 32, weight.shape[1] // 32)
        new[name] = new[name] if method == "starquant" else twins._plus(new[name], g)
    block = rebuilt(block, **new).to(device, dtype).requires_grad_(False)
    x, state = torch.randn(1, length, d, generator=g).to(device, dtype), torch.rand(1, length, generator=g) < 0.5
    return block, (x, state.to(device), model.cos_sin(torch.arange(length, device=device), config, dtype))
