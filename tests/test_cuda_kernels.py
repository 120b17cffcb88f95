"""The CUDA kernels without a GPU: compiled by nvcc where there is one, their sources run as C++ on the CPU (same
text, same launches), their indexing emulated in Python; and the same assertions on the device where there is one."""

import ctypes
import ctypes.util
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import cuda_kernels
import kernels
from feedback import feedback_matrix
from layers import TAC, QuantLinear
from starquant import Kronecker, apply_basis, tac_apply

HERE = Path(__file__).parent

DTYPES = [torch.float32, torch.bfloat16]
NAMES = [name for names in cuda_kernels.PARTS.values() for name in names]


# ---- the sources compile -------------------------------------------------------------------------------------------


@pytest.mark.skipif(not shutil.which("nvcc"), reason="needs nvcc")
@pytest.mark.parametrize(("dtype", "architecture"), [(torch.float32, "sm_80"), (torch.bfloat16, "sm_90")])
def test_sources_compile_without_warnings_or_spills(tmp_path, dtype, architecture):
    file = tmp_path / "kernels.cu"
    file.write_text(cuda_kernels.source(dtype, *cuda_kernels.PARTS))
    done = subprocess.run(["nvcc", f"-arch={architecture}", "-cubin", "-Xptxas", "-v", "-Werror", "all-warnings",
                           "-o", str(tmp_path / "out"), str(file)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for name in NAMES:
        assert f"entry function '{name}'" in done.stderr
    assert done.stderr.count("0 bytes spill stores, 0 bytes spill loads") == len(NAMES)


def nvrtc():
    """NVRTC, which compiles the sources when they are used; PyTorch's CUDA builds bring it, its CPU builds do not."""
    found = [p for folder in map(Path, sys.path) for p in folder.glob("nvidia/*/lib/libnvrtc.so.*")]
    try:
        return ctypes.CDLL(str(found[0]) if found else ctypes.util.find_library("nvrtc") or "libnvrtc.so")
    except OSError:
        return None


@pytest.mark.skipif(nvrtc() is None, reason="needs NVRTC (pip install nvidia-cuda-nvrtc)")
@pytest.mark.parametrize("part", cuda_kernels.PARTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_sources_compile_with_nvrtc_without_warnings_or_spills(dtype, part):
    library, program = nvrtc(), ctypes.c_void_p()
    code = cuda_kernels.source(dtype, part).encode()
    assert library.nvrtcCreateProgram(ctypes.byref(program), code, b"kernels.cu", 0, None, None) == 0
    options = (ctypes.c_char_p * 2)(b"--gpu-architecture=sm_90", b"--ptxas-options=-v")
    result, size = library.nvrtcCompileProgram(program, 2, options), ctypes.c_size_t()
    assert library.nvrtcGetProgramLogSize(program, ctypes.byref(size)) == 0
    text = ctypes.create_string_buffer(size.value)
    assert library.nvrtcGetProgramLog(program, text) == 0
    log = text.value.decode()
    assert result == 0, log
    assert "warning" not in log
    assert log.count("0 bytes spill stores, 0 bytes spill loads") == len(cuda_kernels.PARTS[part])
    library.nvrtcDestroyProgram(ctypes.byref(program))


# ---- the sources run, as C++ ---------------------------------------------------------------------------------------


def cpp_library(folder: Path, dtype, parts=tuple(cuda_kernels.PARTS), optimize="-O1"):
    lines = [f"#include \"{HERE / 'cuda_on_cpu.h'}\"", cuda_kernels.source(dtype, *parts)]
    for name in (name for part in parts for name in cuda_kernels.PARTS[part]):
        meets = "true" if name in ("quantize_rows", "feedback", "packed_product") else "false"
        lines.append(f"extern \"C\" void launch_{name}(int gx, int gy, int threads, void** args) "
                     f"{{ launch({name}, gx, gy, threads, {meets}, args); }}")
    source, library = folder / f"{cuda_kernels.TYPES[dtype]}.cpp", folder / f"{cuda_kernels.TYPES[dtype]}.so"
    source.write_text("\n".join(lines))
    subprocess.run(["g++", "-std=c++20", optimize, "-ffp-contract=off", "-fno-strict-aliasing", "-shared", "-fPIC",
                    "-pthread", "-w", "-o", str(library), str(source)], check=True)
    return ctypes.CDLL(str(library))


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory, strict_int_mm):
    """Launches of `cuda_kernels` run its sources on the CPU; arguments are checked and passed as PyTorch does."""
    if not shutil.which("g++"):
        pytest.skip("needs g++")
    folder, libraries = tmp_path_factory.mktemp("cpp"), {}

    def launch(name, dtype, grid, args, threads=None):
        grid = (*grid, 1)
        assert 0 < grid[0] < 2**31
        assert 0 < grid[1] < 2**16
        values = []
        for a in args:
            assert isinstance(a, torch.Tensor) or -(2**31) <= a < 2**31
            values.append(ctypes.c_void_p(a.data_ptr()) if isinstance(a, torch.Tensor) else ctypes.c_int(a))
        pointers = (ctypes.c_void_p * len(args))(*(ctypes.cast(ctypes.byref(v), ctypes.c_void_p) for v in values))
        getattr(libraries[dtype], f"launch_{name}")(grid[0], grid[1], threads or cuda_kernels.THREADS, pointers)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda_kernels, "THREADS", 16)  # few real threads; every loop and every grid gets longer
        patch.setattr(cuda_kernels, "WARPS", 2)
        patch.setattr(cuda_kernels, "_launch", launch)
        libraries |= {dtype: cpp_library(folder, dtype) for dtype in DTYPES}
        yield libraries


def gated(x, state, d_m, d_u):
    K = x.shape[1]
    column = torch.arange(K, device=x.device)
    off = torch.where(state[:, None], column >= K - d_u, (column >= K - d_u - d_m) & (column < K - d_u))
    return x.masked_fill(off, 0)


def check_linear(device, seed, M, K, N, dtype, wbits, packed, masked, asymmetric, has_bias, width=None, clipped=False,
                 shifted=False):
    """One linear through the kernels against the eager twins: every integer and every output equal."""
    g = torch.Generator().manual_seed(seed)
    d_m, d_u = K // 5, K // 7
    x = (torch.randn(M, K, generator=g) * torch.randn(M, 1, generator=g).exp()).to(device, dtype)
    x[0] = 0
    state = torch.full((M,), masked, device=device) if masked is not None else (
        torch.rand(M, generator=g) < 0.5).to(device)
    half = 2 ** (wbits - 1)
    w = torch.randint(-half, half, (N, K), generator=g, dtype=torch.int8).to(device)
    w_scale = torch.rand(N, generator=g).to(device)
    bias = torch.randn(N, generator=g).to(device) if has_bias else None
    w_zero = w[:, 0].int() if asymmetric else None
    clip = torch.tensor([0.9, 0.7], device=device) if clipped else None
    shift = torch.randn(2, N, generator=g).to(device) if shifted else None
    rows = gated(x, state, d_m, d_u)
    codes, scale, zero = cuda_kernels.quantize_rows(x, state, d_m, d_u, 4, clip)
    want_codes, want_scale, want_zero = kernels.quantize_rows(rows, 4, clip)
    assert torch.equal(codes[:M], want_codes)
    assert not codes[M:].any()
    assert torch.equal(scale[:, None], want_scale)
    assert torch.equal(zero[:, None], want_zero.int())
    weight = kernels.pack_int4(w) if packed else w
    with pytest.MonkeyPatch.context() as patch:
        if width:
            patch.setattr(cuda_kernels, "slice_width", lambda *_: width)
        y = cuda_kernels.int_linear(x, state, d_m, d_u, weight, w_scale, kernels.row_sums(w), 4, packed, bias, w_zero,
                                    clip, None, shift)
    want = kernels.int_linear(rows, w, w_scale, kernels.row_sums(w), 4, wbits, bias, w_zero, "float", clip)
    want = want if shift is None else want + shift[state.long()]
    assert y.dtype == dtype
    assert torch.equal(y, want.to(dtype))


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
    codes, scale, zero = cuda_kernels.quantize_rows(x, None, 0, 0, bits, clip)
    cuda_kernels.feedback(x, V, scale, zero, codes, bits)
    assert torch.equal(codes[:M], kernels.feedback_codes(x.float(), scale[:, None], zero[:, None].float(), V, bits))
    assert not codes[M:].any()
    y = cuda_kernels.int_linear(x, None, 0, 0, kernels.pack_int4(w), ones, sums, bits, True, clip=clip, V=V)
    want = kernels.int_linear(x, w, ones, sums, bits, 4, None, None, "float", clip, V)
    assert torch.equal(y, want.to(dtype))


def check_packed(device, seed, M, K, N, dtype, bits, asymmetric, has_bias, shifted, extreme=False):
    """A linear by `packed_product` against its eager twin: every output equal."""
    g = torch.Generator().manual_seed(seed)
    x = (torch.randn(M, K, generator=g) * torch.randn(M, 1, generator=g).exp()).to(device, dtype)
    state = (torch.rand(M, generator=g) < 0.5).to(device)
    w = torch.randint(-8, 8, (N, K), generator=g, dtype=torch.int8)
    if extreme:  # the largest sum there is
        x, w = x.abs().add(1).clamp(max=1), torch.full_like(w, -8)
    w, w_scale = w.to(device), torch.rand(N, generator=g).to(device)
    bias = torch.randn(N, generator=g).to(device) if has_bias else None
    w_zero = w[:, 0].int() if asymmetric else None
    shift = torch.randn(2, N, generator=g).to(device) if shifted else None
    with pytest.MonkeyPatch.context() as patch:
        used = []
        patch.setattr(cuda_kernels, "few", lambda codes, N, dtype: True)
        patch.setattr(cuda_kernels, "fastest", lambda ways, key: used.append(len(ways)) or ways[0])
        y = cuda_kernels.int_linear(x, state, 0, 0, kernels.pack_int4(w), w_scale, kernels.row_sums(w), bits, True,
                                    bias, w_zero, None, None, shift)
    assert used == [2]
    want = kernels.int_linear(x, w, w_scale, kernels.row_sums(w), bits, 4, bias, w_zero, "float")
    assert torch.equal(y, (want if shift is None else want + shift[state.long()]).to(dtype))


def check_nan(device, dtype):
    """A token with NaN comes out as NaN, with feedback and without; the others as if it were not there."""
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(40, 128, generator=g), torch.randint(-8, 8, (32, 128), generator=g, dtype=torch.int8)
    x, w, V = x.to(device, dtype), w.to(device), feedback_matrix(torch.randn(128, 128, generator=g), 64).to(device)
    broken = x.clone()
    broken[3, 5], broken[17, 127], broken[18, 0] = torch.nan, torch.nan, torch.nan
    ones, sums, clip = torch.ones(32, device=device), kernels.row_sums(w), torch.full((2,), 0.9, device=device)
    for options in ({}, {"V": V}, {"clip": clip}):
        got, want = (cuda_kernels.int_linear(t, None, 0, 0, w, ones, sums, 4, False, **options) for t in (broken, x))
        nan = got.isnan()
        assert nan.any(-1).nonzero()[:, 0].tolist() == nan.all(-1).nonzero()[:, 0].tolist() == [3, 17, 18]
        assert torch.equal(got[~nan], want[~nan])


def check_plus(device, dtype, masked):
    """A whole linear of starquant+ through the kernels (centre, blocks, clip, feedback, the mean's output) against its
    eager twin."""
    linear, g = plus_layer().to(device), torch.Generator().manual_seed(1)
    x = torch.randn(2, 25, 128, generator=g).to(device, dtype)
    state = (torch.rand(2, 25, generator=g) < 0.5 if masked is None else torch.full((2, 25), masked)).to(device)
    rows = apply_basis((x - linear.mean[state.long()]).to(dtype), linear.basis(x)).flatten(0, 1)
    want = kernels.int_linear(rows, linear.codes(), linear.weight_scale, linear.weight_sum, 4, 4, linear.bias, None,
                              "float", linear.clip, linear.feedback)
    want = (want.reshape(2, 25, -1) + linear.shift[state.long()]).to(dtype)
    with pytest.MonkeyPatch.context() as patch:
        if device == "cpu":
            patch.setattr(cuda_kernels, "usable", lambda x, N, V=None: True)
        assert torch.equal(linear(x, state), want)
    if device == "cpu" and dtype == torch.float32:
        assert torch.equal(linear(x, state), want)  # eager


def plus_layer(K=128, N=48):
    g = torch.Generator().manual_seed(0)
    P = [torch.linalg.qr(torch.randn(*s, generator=g))[0].bfloat16() for s in ((K // 64, 64, 64), (K // 64, K // 64))]
    codes = torch.randint(-8, 8, (N, K), generator=g, dtype=torch.int8)
    centre = torch.randn(2, K, generator=g), torch.randn(2, N, generator=g)
    return QuantLinear(codes, torch.rand(N, generator=g), P, bias=torch.randn(N, generator=g), centre=centre,
                       clip=torch.full((2,), 0.9), feedback=feedback_matrix(codes.float(), 64))


def check_tac(device, dtype, rows, blocks):
    g = torch.Generator().manual_seed(rows)
    z = torch.randn(1, rows, blocks * 16, generator=g).to(device, dtype)
    M, d = (torch.randn(blocks, *s, generator=g).to(device) for s in ((16, 16), (16,)))
    want = tac_apply(z.double(), M.double(), d.double())
    # fp32 sums of 16 products; bf16 output adds half a unit in the last place of 8 bits
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 2**-8}[dtype] * (want.abs() + z.abs().max() * M.abs().max() * 16)
    assert ((cuda_kernels.tac(z, M, d) - want).abs() <= tolerance).all()


class TestOnCpu:
    """`int_linear` whole, under Hopper's rules for `_int_mm`."""

    pytestmark = pytest.mark.usefixtures("on_cpu")

    @pytest.mark.parametrize("part", cuda_kernels.PARTS)
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_self_check_accepts_the_kernels(self, dtype, part):
        assert cuda_kernels.self_check(torch.device("cpu"), dtype, part) is None

    @pytest.mark.parametrize(("name", "broken", "wrong"), [
        ("quantize_rows", "half = 1 << (bits - 1)", "half = 1 << bits"), ("quantize_rows", "clip[1]", "clip[0]"),
        ("unpack_int4", "0x5140", "0x5410"), ("centre", "(state[row] ? K : 0)", "(state[row] ? 0 : K)"),
        ("feedback", "-= e * w.x", "+= e * w.x"), ("epilogue", "zero[m] * wu", "zero[m] + wu"),
        ("epilogue", "(state[m] ? N : 0)", "0"), ("tac", "sum += m[j + i]", "sum += m[j]"),
        ("packed_product", "0x7531", "0x7513"), ("packed_product", "sum[j] >>= 4", "sum[j] >>= 3"),
        ("packed_product", "128 * warp; k", "0; k"), ("packed_product", "mma(c[1][j], a[1]", "mma(c[1][j], a[0]")])
    def test_self_check_names_a_broken_kernel(self, name, broken, wrong, on_cpu, tmp_path, monkeypatch):
        part = next(part for part, names in cuda_kernels.PARTS.items() if name in names)
        text, changed = cuda_kernels.SOURCE.read_text(), tmp_path / "kernels.cu"
        assert broken in text
        changed.write_text(text.replace(broken, wrong))
        monkeypatch.setattr(cuda_kernels, "SOURCE", changed)
        parts = ("linear", part) if part != "linear" else ("linear",)
        monkeypatch.setitem(on_cpu, torch.float32, cpp_library(tmp_path, torch.float32, parts, "-O0"))
        assert cuda_kernels.self_check(torch.device("cpu"), torch.float32, part) == name

    @given(st.integers(0, 2**16), st.integers(1, 40), st.integers(1, 20), st.integers(1, 6), st.sampled_from(DTYPES),
           st.booleans(), st.sampled_from([None, True, False]), st.booleans(), st.booleans(), st.booleans(),
           st.booleans())
    def test_any_shape(self, seed, M, K16, N16, dtype, packed, masked, asymmetric, has_bias, clipped, shifted):
        check_linear("cpu", seed, M, 16 * K16, 16 * N16, dtype, 4, packed, masked, asymmetric, has_bias,
                     clipped=clipped, shifted=shifted)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("masked", [None, True, False])
    def test_starquant_plus_layer(self, dtype, masked):
        check_plus("cpu", dtype, masked)

    @given(st.integers(0, 2**16), st.integers(1, 40), st.integers(1, 3), st.sampled_from(DTYPES),
           st.sampled_from([2, 4, 8]), st.booleans())
    def test_feedback(self, seed, M, blocks, dtype, bits, clipped):
        check_feedback("cpu", seed, M, blocks, dtype, bits, clipped)

    @given(st.integers(0, 2**16), st.integers(1, 70), st.integers(1, 5), st.integers(1, 2), st.sampled_from(DTYPES),
           st.sampled_from([2, 4, 8]), st.booleans(), st.booleans(), st.booleans())
    @settings(max_examples=25)
    def test_packed_product(self, seed, M, K128, N32, dtype, bits, asymmetric, has_bias, shifted):
        check_packed("cpu", seed, M, 128 * K128, 32 * N32, dtype, bits, asymmetric, has_bias, shifted)

    @pytest.mark.parametrize("bits", [4, 8])
    def test_packed_product_of_extreme_codes(self, bits):
        check_packed("cpu", 0, 3, 384, 32, torch.float32, bits, False, False, False, extreme=True)

    def test_packed_product_with_as_many_warps_as_on_a_gpu(self, on_cpu, tmp_path, monkeypatch):
        """With fewer chunks than warps, and with more."""
        monkeypatch.setattr(cuda_kernels, "WARPS", 8)
        monkeypatch.setitem(on_cpu, torch.float32, cpp_library(tmp_path, torch.float32, ("linear", "packed")))
        for K in (128, 1152):
            check_packed("cpu", 0, 5, K, 32, torch.float32, 4, True, True, True)

    def test_what_is_clipped_has_the_code_of_the_limit(self):
        """s = 1, z = 6 (a tie), limit 8.5: its code is 8 + 6 (a tie, too), where an unclipped 17 would end at 15."""
        x, clip = torch.zeros(1, 16), torch.tensor([1.0, 0.5])
        x[0, :2] = torch.tensor([17.0, -6.5])
        codes, scale, _ = cuda_kernels.quantize_rows(x, None, 0, 0, 4, clip)
        assert float(scale[0]) == 1
        assert int(codes[0, 0]) == int(kernels.quantize_rows(x, 4, clip)[0][0, 0]) == 14 - 8

    @pytest.mark.parametrize("packed", [True, False])
    def test_slices_along_n_and_rows_longer_than_a_block(self, packed):
        check_linear("cpu", 0, 5, 1056, 96, torch.bfloat16, 4, packed, None, True, True, width=32, shifted=True)

    def test_a_slice_that_int_mm_refuses_is_exact_as_well(self, monkeypatch):
        def choosy(a, b, checked=torch._int_mm):
            if b.shape[1] == 16:  # the last slice
                raise RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED")
            return checked(a, b)

        monkeypatch.setattr(torch, "_int_mm", choosy)
        monkeypatch.setattr(kernels, "_REFUSED", set())
        with pytest.warns(UserWarning, match="refuses 32 x 64 times 64 x 16"):
            check_linear("cpu", 3, 5, 64, 80, torch.bfloat16, 4, True, None, True, True, width=32)

    def test_eight_bit_weights(self):
        check_linear("cpu", 1, 33, 64, 48, torch.float32, 8, False, None, False, False)

    def test_more_columns_than_one_block_covers(self):
        check_linear("cpu", 2, 2, 16, 4 * cuda_kernels.THREADS + 16, torch.float32, 4, True, None, False, True)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_nan_stays_nan_in_its_token(self, dtype):
        check_nan("cpu", dtype)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(("rows", "blocks"), [(1, 1), (7, 3), (1030, 2), (3, 33)])
    def test_tac(self, dtype, rows, blocks):
        check_tac("cpu", dtype, rows, blocks)

    def test_bf16_rounding_is_pytorchs(self):
        values = torch.cat((torch.randn(1000), torch.tensor([0.0, -0.0, 3.4e38, 1e-40, 1 + 2**-8, 1 + 3 * 2**-8])))
        values = torch.cat((values, values.new_zeros(-len(values) % 8)))
        y = torch.empty(1, len(values), dtype=torch.bfloat16)
        ones = torch.ones(1, len(values), dtype=torch.int32)
        cuda_kernels.epilogue(ones, torch.ones(1), torch.zeros(1, dtype=torch.int32), None, values, ones[0], None, None,
                              y)
        assert torch.equal(y.view(torch.int16), values.to(torch.bfloat16)[None].view(torch.int16))


def test_slices_fit_the_cache():
    for M in (32, 128, 1024, 4096):
        for N, K in ((12288, 4096), (4096, 4096), (24576, 4096), (4096, 12288), (126464, 4096), (37888, 3584)):
            for packed in (True, False):
                width = cuda_kernels.slice_width(M, N, K, packed)
                assert 0 < width <= N
                assert width == N or width % 256 == 0
                busy = M * width <= cuda_kernels.WAVE  # narrower slices would leave multiprocessors idle
                assert width == N or busy or 4 * M * width <= cuda_kernels.L2_BYTES
                assert width == N or busy or not packed or K * width <= cuda_kernels.L2_BYTES
                assert width == N or (width + 256) * M > cuda_kernels.WAVE


# ---- indexing, emulated --------------------------------------------------------------------------------------------


def test_unpack_indexing():
    """Thread i takes 16 bytes and writes 32 codes, by the same word arithmetic, here in numpy on 32-bit words."""
    codes = torch.randint(-8, 8, (6, 64), dtype=torch.int8, generator=torch.Generator().manual_seed(0))
    words = kernels.pack_int4(codes).numpy().view("<u4").reshape(-1, 4)
    out = np.zeros(8 * len(words), "<u4")
    u = np.uint32

    def sign_extend(n):
        return (((n ^ u(0x08080808)) | u(0x80808080)) - u(0x08080808)) ^ u(0x80808080)

    def byte_perm(a, b, selector):
        pool = [a >> 8 * i & 255 for i in range(4)] + [b >> 8 * i & 255 for i in range(4)]
        return sum(pool[selector >> 4 * i & 7] << 8 * i for i in range(4))

    for i, thread in enumerate(words):
        for j, word in enumerate(thread):
            low = int(sign_extend(word & u(0x0F0F0F0F)))
            high = int(sign_extend((word >> u(4)) & u(0x0F0F0F0F)))
            out[8 * i + 2 * j] = byte_perm(low, high, 0x5140)
            out[8 * i + 2 * j + 1] = byte_perm(low, high, 0x7362)
    assert np.array_equal(out.view(np.int8), codes.numpy().ravel())


@pytest.mark.parametrize(("rows", "columns"), [(1, 8), (3, 1024), (2, 1032), (5, 2056)])
def test_every_element_belongs_to_one_thread(rows, columns):
    """quantize_rows (a block strides along its row), epilogue (4 columns a thread), tac (a column a thread)."""
    T = cuda_kernels.THREADS
    strided = [k + j for t in range(T) for k in range(4 * t, columns, 4 * T) for j in range(4)]
    assert sorted(strided) == list(range(columns))
    grid = cuda_kernels._blocks(columns // 4)
    fours = [n + j for y in range(grid) for t in range(T) if (n := 4 * (y * T + t)) < columns for j in range(4)]
    assert sorted(fours) == list(range(columns))
    walkers = max(1, min(rows, 1024 // cuda_kernels._blocks(columns)))
    walked = [(r, c) for x in range(walkers) for y in range(cuda_kernels._blocks(columns)) for t in range(T)
              if (c := y * T + t) < columns for r in range(x, rows, walkers)]
    assert sorted(walked) == [(r, c) for r in range(rows) for c in range(columns)]


def test_lanes_of_the_packed_product_meet_the_same_channels():
    """What lane 4 g + t of `packed_product` hands to `mma` for row and column g: every channel once, and in the places
    that are multiplied with each other, the same channel of both."""
    K, codes = 256, torch.arange(256).remainder(16).sub(8).to(torch.int8)
    packed = kernels.pack_int4(codes[None])[0].numpy()
    met = []
    for k in range(0, K, 128):
        for t in range(4):
            for s in range(4):
                x = [k + 32 * t + 8 * s + i for i in range(8)]  # channels in in[.][2 s] and in[.][2 s + 1]
                a = [x[i] for i in (0, 2, 4, 6)], [x[i] for i in (1, 3, 5, 7)]  # __byte_perm 0x6420 and 0x7531
                word = packed[k // 2 + 16 * t + 4 * s :][:4].astype(np.int32)
                b = (word << 4 & 0xF0).astype(np.uint8).view(np.int8), (word & 0xF0).astype(np.uint8).view(np.int8)
                for channels, values in zip(a, b, strict=True):
                    assert values.tolist() == [16 * int(codes[c]) for c in channels]
                    met += channels
    assert sorted(met) == list(range(K))


# ---- which product -------------------------------------------------------------------------------------------------


class TestFastest:
    @pytest.fixture(autouse=True)
    def timed(self, monkeypatch):
        monkeypatch.setattr(cuda_kernels, "_FASTEST", {})
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        monkeypatch.setattr(cuda_kernels, "_gpu_seconds", lambda way, device: self.timings.append(way) or way())
        self.timings = []

    def test_the_faster_one_is_kept_for_its_shape(self):
        ways, key = [lambda: 2.0, lambda: 1.0], ("cuda", 32, 64, 128)
        assert cuda_kernels.fastest(ways, key) is ways[1]
        assert self.timings == ways
        assert cuda_kernels.fastest(ways, key) is ways[1]
        assert len(self.timings) == 2
        later = [lambda: 1.0, lambda: 2.0]
        assert cuda_kernels.fastest(later, ("cuda", 64, 64, 128)) is later[0]
        assert cuda_kernels.fastest(later, key) is later[1]  # as its shape was
        assert cuda_kernels.fastest(later[:1], key) is later[0]  # the same shape with int8 residency

    def test_one_way_needs_no_clock(self):
        way = object()
        assert cuda_kernels.fastest([way], "key") is way
        assert not self.timings

    def test_nothing_is_timed_while_a_graph_is_recorded(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        ways = [lambda: 2.0, lambda: 1.0]
        assert cuda_kernels.fastest(ways, ("cuda",)) is ways[0]
        assert not self.timings
        assert not cuda_kernels._FASTEST  # and nothing is kept that was not timed


def test_the_packed_product_is_for_few_tokens_whole_chunks_and_gpus(monkeypatch):
    class Codes:
        def __init__(self, rows, K, is_cuda=True):
            self.shape, self.is_cuda, self.device = (rows, K), is_cuda, torch.device("cuda", 0)

    asked = []
    monkeypatch.setattr(cuda_kernels, "ready", lambda index, dtype, part: asked.append((index, dtype, part)) or True)
    assert cuda_kernels.few(Codes(cuda_kernels.FEW, 4096), 4096, torch.bfloat16)
    assert asked == [(0, torch.bfloat16, "packed")]
    for codes, N in ((Codes(cuda_kernels.FEW + 32, 4096), 4096), (Codes(32, 4160), 4096), (Codes(32, 4096), 4112),
                     (Codes(32, 4096, False), 4096)):
        assert not cuda_kernels.few(codes, N, torch.bfloat16)
    assert len(asked) == 1  # nothing is compiled that cannot serve
    monkeypatch.setattr(cuda_kernels, "ready", lambda *_: False)
    assert not cuda_kernels.few(Codes(32, 4096), 4096, torch.bfloat16)


# ---- the layers ----------------------------------------------------------------------------------------------------


def layer(K=64, N=48, seed=0, **kwargs):
    g = torch.Generator().manual_seed(seed)
    P = [Kronecker(*(torch.linalg.qr(torch.randn(8, 8, generator=g))[0] for _ in range(2)))]
    return QuantLinear.fold(torch.randn(N, K, generator=g), P, 4, 4, bias=torch.randn(N, generator=g), **kwargs)


def test_unpacked_weights_change_nothing_but_bytes():
    a, b = layer(), layer().unpack_weights()
    x, state = torch.randn(2, 5, 64), torch.rand(2, 5) < 0.5
    assert b.weight_packed.nbytes == 2 * a.weight_packed.nbytes
    assert torch.equal(a(x, state), b(x, state))
    assert all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())
    assert torch.equal(b.unpack_weights()(x, state), a(x, state))  # twice is once


@pytest.mark.parametrize("fill", [None, True, False])
def test_forward_through_the_kernels_equals_eager(on_cpu, monkeypatch, fill):
    linear, tac = layer(), TAC(torch.randn(3, 16, 16), torch.randn(3, 16))
    x = torch.randn(2, 5, 64)
    state = torch.rand(2, 5) < 0.5 if fill is None else torch.full((2, 5), fill)
    want = tac(linear(x, state))
    monkeypatch.setattr(cuda_kernels, "usable", lambda x, N, V=None: True)
    assert torch.allclose(tac(linear(x, state)), want, rtol=1e-5, atol=1e-5)
    assert torch.equal(linear.unpack_weights()(x, state), layer()(x, state))


def test_empty_batch():
    assert layer()(torch.randn(0, 64), torch.zeros(0, dtype=torch.bool)).shape == (0, 48)


def test_kernels_are_for_gpus_only():
    assert not cuda_kernels.usable(torch.randn(4, 64), 64)


def test_kernels_that_do_not_compile_are_said_with_the_compilers_words(monkeypatch):
    def launch(*_):
        raise RuntimeError('Compilation failed:\nkernels.cu(3): error: identifier "rintg" is undefined\n\n1 error')

    monkeypatch.setattr(cuda_kernels, "_launch", launch)
    monkeypatch.setattr(kernels, "backend", lambda device: "int_mm")
    monkeypatch.setattr(torch, "device", lambda *_: "cpu")
    said = r'epilogue, tac are not used, .* start here \(kernels.cu\(3\): error: identifier "rintg" is undefined\)'
    with pytest.warns(UserWarning, match=said):
        assert not cuda_kernels.ready.__wrapped__(0, torch.float32)
