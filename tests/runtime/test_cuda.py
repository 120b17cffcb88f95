"""The CUDA kernels without a GPU: nvcc and NVRTC compile them, and `ptx.py` runs them one instruction at a time, with
the block sizes of a GPU. On a GPU: `test_cuda_on_gpu.py`."""

import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import ptx
import pytest
import torch
from kernel_checks import (
    DTYPES,
    check_fake_quantize,
    check_feedback,
    check_linear,
    check_nan,
    check_plus,
    check_tac,
    layer,
)
from ptx_reader import by_nvrtc, kept, nvrtc

import kernels
import model
import starquant
from methods import sgat
from methods.gptq import gptq, hessian, shrunk_scale
from runtime import checks, cuda, products

FIXTURES = Path(__file__).parents[1] / "fixtures"
NAMES = [name for names in cuda.PARTS.values() for name in names]
# of LLaDA-8B (4096 and 12288 channels), of Dream-7B (3584), and what is not whole tiles
ROTATIONS = [cuda.Rotation(64, 64, 1), cuda.Rotation(96, 128, 1), cuda.Rotation(64, 64, 0), cuda.Rotation(192, 64, 0),
             cuda.Rotation(56, 64, 1), cuda.Rotation(56, 64, 0), cuda.Rotation(64, 64, 1, 1),
             cuda.Rotation(96, 128, 1, 2), cuda.Rotation(56, 64, 1, 1), cuda.Rotation(148, 128, 1, 2)]


# ---- the sources compile -------------------------------------------------------------------------------------------


def ptxas(source, *options) -> str:
    """What ptxas says of every kernel; warnings are errors."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernels.cu"
        file.write_text(source)
        done = subprocess.run(["nvcc", *options, "-o", f"{folder}/out", str(file)], capture_output=True, text=True,
                              check=False)
    assert done.returncode == 0, done.stderr
    return done.stderr


def compile_cubin(source, architecture) -> str:
    return kept(ptxas, source, f"-arch={architecture}", "-cubin", "-Xptxas", "-v", "-Werror", "all-warnings")


@pytest.mark.skipif(not shutil.which("nvcc"), reason="needs nvcc")
@pytest.mark.parametrize(("dtype", "architecture"), [(torch.float32, "sm_80"), (torch.bfloat16, "sm_90")])
def test_sources_compile_without_warnings_or_spills(dtype, architecture):
    said = compile_cubin(cuda.source(dtype, *cuda.PARTS), architecture)
    for name in NAMES:
        assert f"entry function '{name}'" in said
    assert said.count("0 bytes spill stores, 0 bytes spill loads") == len(NAMES)


@pytest.mark.skipif(not shutil.which("nvcc"), reason="needs nvcc")
@pytest.mark.parametrize("rotation", ROTATIONS)
def test_rotations_compile_without_warnings_or_spills(rotation):
    said = compile_cubin(cuda.source(torch.bfloat16, rotation), "sm_90")
    # a few, so that another block fits beside it; SiLU needs more
    assert sum(map(int, re.findall(r"(\d+) bytes spill", said))) < (32 if rotation.BEFORE < 2 else 160)
    assert rotation.shared < 227 * 1024
    assert rotation.threads <= 1024


@pytest.mark.skipif(not nvrtc(), reason="needs NVRTC (pip install nvidia-cuda-nvrtc)")
@pytest.mark.parametrize("part", cuda.PARTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_sources_compile_with_nvrtc_without_warnings_or_spills(dtype, part):
    _, log = by_nvrtc(cuda.source(dtype, part), "--gpu-architecture=sm_90", "--ptxas-options=-v")
    assert "warning" not in log
    assert log.count("0 bytes spill stores, 0 bytes spill loads") == len(cuda.PARTS[part])


# ---- the kernels run -----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("on_cpu")
class TestOnCpu:
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_ragged_linears(self, dtype):
        check_linear("cpu", 0, 33, 1056, 96, dtype, 4, True, None, True, True, width=32, clipped=True, shifted=True)
        check_linear("cpu", 1, 1, 64, 48, dtype, 8, False, True, False, False)

    def test_rows_and_columns_longer_than_a_block(self):
        check_linear("cpu", 2, 2, 4112, 16, torch.bfloat16, 4, True, False, False, True)
        check_linear("cpu", 2, 2, 16, 4 * cuda.THREADS + 16, torch.float32, 4, True, None, False, True)

    @pytest.mark.parametrize(("dtype", "bits"), [(torch.float32, 8), (torch.bfloat16, 4)])
    def test_feedback(self, dtype, bits):
        check_feedback("cpu", 0, 7, 1, dtype, bits, bits == 4)

    def test_more_tokens_than_a_block_of_feedback(self, monkeypatch):
        monkeypatch.setattr(cuda, "THREADS", 32)
        check_feedback("cpu", 1, 33, 1, torch.bfloat16, 4, True)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("masked", [None, True])
    def test_starquant_plus_layer(self, dtype, masked):
        check_plus("cpu", dtype, masked)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_nan_stays_nan_in_its_token(self, dtype):
        check_nan("cpu", dtype)

    @pytest.mark.parametrize(("rows", "blocks"), [(1, 1), (39, 17)])
    def test_tac(self, rows, blocks):
        check_tac("cpu", rows, blocks)

    @pytest.mark.parametrize("symmetric", [True, False])
    @pytest.mark.parametrize(("M", "K", "bits"), [(1, 16, 4), (5, 2064, 4), (3, 48, 2), (3, 80, 8)])
    def test_fake_quantize(self, M, K, bits, symmetric):
        check_fake_quantize("cpu", M, K, bits, symmetric)

    @pytest.mark.parametrize("symmetric", [True, False])
    def test_fake_quantize_of_numbers_of_any_size(self, symmetric):
        """Every exponent up to the largest one, whose grid may end beyond it, and rows with NaN and Inf."""
        g = torch.Generator().manual_seed(0)
        x = torch.randn(64, 64, generator=g).clamp(-1.9, 1.9) * 2.0 ** torch.linspace(-145, 127, 64)[:, None].round()
        x[5, 3], x[6, 3], x[7, 3] = torch.nan, torch.inf, -torch.inf
        got, ours = checks.with_gradient(cuda.FakeQuantize, x, torch.ones(64, 64), 4, symmetric)
        want, theirs = checks.with_gradient(starquant.FakeQuantize, x, torch.ones(64, 64), 4, symmetric,
                                            torch.finfo(torch.float32).max)
        assert torch.equal(got.isnan(), want.isnan())
        assert torch.equal(got.nan_to_num(3), want.nan_to_num(3))
        finite = theirs.isfinite().all(-1)
        assert finite.sum() == 60  # not with NaN or Inf, nor of numbers whose sum is none
        assert torch.allclose(ours[finite], theirs[finite], rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("symmetric", [True, False])
    def test_a_basis_is_trained_through_the_kernels_as_without(self, symmetric, monkeypatch):
        g = torch.Generator().manual_seed(0)
        x, weight, state = torch.randn(6, 4, 32, generator=g), torch.randn(16, 32, generator=g), torch.rand(6, 4) < 0.5
        start, fits, launched = sgat.initial_basis(32, "kronecker", g).to(x), [], []
        monkeypatch.setattr(cuda, "_launch", lambda name, *rest, launch=cuda._launch: (launched.append(name),
                                                                                       launch(name, *rest)))
        for through in (False, True):
            monkeypatch.setattr(checks, "usable", lambda x, part, through=through: through)
            fits.append(sgat.fit_sgat(x, x @ weight.mT, state, weight, start, 2, 2, epochs=2, batch=3,
                                      symmetric=symmetric, generator=torch.Generator().manual_seed(0))[1])
        assert launched.count("fake_quantize") == 2 * (3 + 2 * 2)  # weights and activations: held out, and trained on
        assert launched.count("fake_quantize_gradient") == 2 * 2 * 2
        assert fits[1] == pytest.approx(fits[0], rel=1e-4)
        assert fits[1]["last"] != fits[1]["start"]

    def test_what_is_clipped_has_the_code_of_the_limit(self):
        """s = 1, z = 6 (a tie), limit 8.5: its code is 8 + 6 (a tie, too), where an unclipped 17 would end at 15."""
        x, clip = torch.zeros(1, 16), torch.tensor([1.0, 0.5])
        x[0, :2] = torch.tensor([17.0, -6.5])
        codes, scale, _ = cuda.quantize_rows(x, None, 0, 0, 4, clip)
        assert float(scale[0]) == 1
        assert int(codes[0, 0]) == int(kernels.quantize_rows(x, 4, clip)[0][0, 0]) == 14 - 8

    @pytest.mark.parametrize("bits", [2, 4, 8])
    def test_codes_of_any_size_of_numbers_are_those_of_true_divisions(self, bits):
        """Every exponent, numbers that are halfway between two codes, and tokens that are too small or too large for a
        division by the reciprocal."""
        g = torch.Generator().manual_seed(bits)
        x = torch.randn(64, 64, generator=g)
        x[::2] = torch.randint(-2**bits, 2**bits, (32, 64), generator=g) / 2  # ties
        x[::2, 0], x[::2, 1] = 2.0**bits - 1, 0
        x = x * 2.0 ** torch.linspace(-140, 120, 64)[:, None].round()
        x[0] = 0
        codes, scale, zero = cuda.quantize_rows(x, None, 0, 0, bits)
        want = kernels.quantize_rows(x, bits)
        assert torch.equal(scale[:, None], want[1])
        assert torch.equal(zero[:, None], want[2].int())
        assert torch.equal(codes, want[0])

    @pytest.mark.parametrize("architecture", ["compute_90a", "compute_75"])
    def test_bf16_rounding_is_pytorchs(self, architecture, monkeypatch):
        """By the instruction of sm_80 and later, and by the integers of GPUs before."""
        monkeypatch.setattr(cuda, "_launch", ptx.launcher(architecture))
        nan = torch.tensor([0x7FC00000, 0x7F800001, -0x400000, -1], dtype=torch.int32).view(torch.float32)
        values = torch.cat((torch.randn(1000), nan, torch.tensor(
            [0.0, -0.0, 3.4e38, 1e-40, torch.inf, -torch.inf, 1 + 2**-8, 1 + 3 * 2**-8])))
        values = torch.cat((values, values.new_zeros(-len(values) % 8)))
        y = torch.empty(1, len(values), dtype=torch.bfloat16)
        ones = torch.ones(1, len(values), dtype=torch.int32)
        cuda.epilogue(ones, cuda.Ends(torch.ones(1), torch.zeros(1, dtype=torch.int32), None, values, ones[0]), y)
        want = values.to(torch.bfloat16)[None]
        assert torch.equal(y.isnan(), want.isnan())
        assert torch.equal(y.nan_to_num(3).view(torch.int16), want.nan_to_num(3).view(torch.int16))

    def test_a_slice_that_int_mm_refuses_is_exact_as_well(self, monkeypatch):
        def choosy(a, b, checked=torch._int_mm):
            if b.shape[1] == 16:  # the last slice
                raise RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED")
            return checked(a, b)

        monkeypatch.setattr(torch, "_int_mm", choosy)
        monkeypatch.setattr(kernels, "_REFUSED", set())
        with pytest.warns(UserWarning, match="refuses 32 x 64 times 64 x 16"):
            check_linear("cpu", 3, 5, 64, 80, torch.bfloat16, 4, True, None, True, True, width=32)

    @pytest.mark.parametrize("fill", [None, True, False])
    def test_forward_through_the_kernels_equals_eager(self, monkeypatch, fill):
        linear, x = layer(), torch.randn(2, 5, 64)
        state = torch.rand(2, 5) < 0.5 if fill is None else torch.full((2, 5), fill)
        want = linear(x, state)
        monkeypatch.setattr(products, "serves", lambda *_: True)
        assert torch.allclose(linear(x, state), want, rtol=1e-5, atol=1e-5)
        assert torch.equal(linear.unpack_weights()(x, state), layer()(x, state))

    def test_codes_of_a_kronecker_layer_in_bf16(self):
        """Fused into one kernel or not: a code may move by one where the order of a sum decides, and in few places."""
        linear, g = layer(K=24 * 64, sizes=(24, 64)), torch.Generator().manual_seed(0)
        x, state = torch.randn(6, 24 * 64, generator=g).bfloat16(), torch.rand(6, generator=g) < 0.5
        codes, scale, zero = products.codes(linear, x, state)
        rows = x.float() @ linear.P[0].to(torch.bfloat16).dense().float()
        rows = rows * torch.where(state[:, None], *linear.gates(rows))
        want = kernels.quantize_rows(rows, 4)
        assert torch.allclose(scale[:, None], want[1], rtol=0.02)
        off = (codes[:6].int() - zero[:, None] - (want[0].int() - want[2].int())).abs()
        assert off.max() <= 1
        assert (off > 0).float().mean() < 0.03

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("family", ["llada", "dream"])
    def test_norm_rope_and_silu_of_a_model(self, family, dtype, monkeypatch):
        """RoPE bit for bit, with both kinds of tables, grouped heads and positions that skip padding. A norm's sum has
        another order, and e^x another last bit."""
        m = model.load_model(FIXTURES / family, "cpu", dtype).requires_grad_(False)
        block, c, g = m.blocks[0], m.config, torch.Generator().manual_seed(0)
        qkv = torch.randn(2, 7, block.qkv.weight.shape[0], generator=g).to(dtype)
        x, gate_up = torch.randn(2, 7, c.d_model, generator=g).to(dtype), torch.randn(2, 7, 2 * c.d_ffn, generator=g)
        gate_up, keep = gate_up.to(dtype), torch.ones(2, 7, dtype=torch.long)
        keep[1, :3] = 0
        ropes = [m.context(torch.zeros(2, 7, dtype=torch.long), mask)[0] for mask in (None, keep)]
        eager = [block.attn_norm(x), model.swiglu(gate_up), *(t for rope in ropes for t in block.heads(qkv, rope))]
        launched = []
        monkeypatch.setattr(cuda, "_launch", lambda name, *rest, launch=cuda._launch: (launched.append(name),
                                                                                       launch(name, *rest)))
        monkeypatch.setattr(checks, "glues", lambda *_: True)
        norm, silu = block.attn_norm(x), model.swiglu(gate_up)
        turned = [t for rope in ropes for t in block.heads(qkv, rope)]
        assert launched == ["rms_norm", "silu_up", "rope", "rope"]
        assert torch.allclose(norm, eager[0], rtol=2 * torch.finfo(dtype).eps)
        assert torch.allclose(silu, eager[1], rtol=2 * torch.finfo(dtype).eps)
        assert all(map(torch.equal, turned, eager[2:]))

    def test_gptq_rounds_as_without_a_kernel(self, monkeypatch):
        class SaysCuda(torch.Tensor):
            is_cuda = True

        g = torch.Generator().manual_seed(0)
        weight, x = torch.randn(70, 80, generator=g), torch.randn(500, 80, generator=g)
        H = hessian(x @ torch.randn(80, 80, generator=g))
        codes, scale = gptq(weight, H.clone(), 4)
        got = [t.as_subclass(torch.Tensor) for t in gptq(weight.as_subclass(SaysCuda), H, 4)]
        assert torch.equal(got[0], codes)
        assert torch.equal(got[1], scale)
        launched = []
        monkeypatch.setattr(cuda, "_launch", lambda name, *rest, launch=cuda._launch: (launched.append(name),
                                                                                       launch(name, *rest)))
        fast = shrunk_scale(weight.as_subclass(SaysCuda), 4).as_subclass(torch.Tensor)
        assert torch.equal(fast, shrunk_scale(weight, 4))
        assert launched == ["rounding_losses"]


# ---- the layers ----------------------------------------------------------------------------------------------------


def test_unpacked_weights_change_nothing_but_bytes():
    a, b = layer(), layer().unpack_weights()
    x, state = torch.randn(2, 5, 64), torch.rand(2, 5) < 0.5
    assert b.weight_packed.nbytes == 2 * a.weight_packed.nbytes
    assert torch.equal(a(x, state), b(x, state))
    assert all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())
    assert torch.equal(b.unpack_weights()(x, state), a(x, state))  # twice is once


def test_empty_batch():
    assert layer()(torch.randn(0, 64), torch.zeros(0, dtype=torch.bool)).shape == (0, 48)
