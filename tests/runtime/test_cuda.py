"""The CUDA kernels without a GPU: compiled by nvcc where there is one, their sources run as C++ on the CPU (same
text, same launches), their indexing emulated in Python; on a GPU: `test_kernels_on_gpu.py`."""

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
from kernel_checks import (
    DTYPES,
    check_feedback,
    check_linear,
    check_nan,
    check_packed,
    check_plus,
    check_tac,
    layer,
)

import kernels
from runtime import cuda
from runtime.layers import TAC

HERE = Path(__file__).parent

NAMES = [name for names in cuda.PARTS.values() for name in names]


# ---- the sources compile -------------------------------------------------------------------------------------------


@pytest.mark.skipif(not shutil.which("nvcc"), reason="needs nvcc")
@pytest.mark.parametrize(("dtype", "architecture"), [(torch.float32, "sm_80"), (torch.bfloat16, "sm_90")])
def test_sources_compile_without_warnings_or_spills(tmp_path, dtype, architecture):
    file = tmp_path / "kernels.cu"
    file.write_text(cuda.source(dtype, *cuda.PARTS))
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
@pytest.mark.parametrize("part", cuda.PARTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_sources_compile_with_nvrtc_without_warnings_or_spills(dtype, part):
    library, program = nvrtc(), ctypes.c_void_p()
    code = cuda.source(dtype, part).encode()
    assert library.nvrtcCreateProgram(ctypes.byref(program), code, b"kernels.cu", 0, None, None) == 0
    options = (ctypes.c_char_p * 2)(b"--gpu-architecture=sm_90", b"--ptxas-options=-v")
    result, size = library.nvrtcCompileProgram(program, 2, options), ctypes.c_size_t()
    assert library.nvrtcGetProgramLogSize(program, ctypes.byref(size)) == 0
    text = ctypes.create_string_buffer(size.value)
    assert library.nvrtcGetProgramLog(program, text) == 0
    log = text.value.decode()
    assert result == 0, log
    assert "warning" not in log
    assert log.count("0 bytes spill stores, 0 bytes spill loads") == len(cuda.PARTS[part])
    library.nvrtcDestroyProgram(ctypes.byref(program))


# ---- the sources run, as C++ ---------------------------------------------------------------------------------------


def cpp_library(folder: Path, dtype, parts=tuple(cuda.PARTS), optimize="-O1"):
    lines = [f"#include \"{HERE / 'cuda_on_cpu.h'}\"", cuda.source(dtype, *parts)]
    for name in (name for part in parts for name in cuda.PARTS[part]):
        meets = "true" if name in ("quantize_rows", "feedback", "packed_product") else "false"
        lines.append(f"extern \"C\" void launch_{name}(int gx, int gy, int threads, void** args) "
                     f"{{ launch({name}, gx, gy, threads, {meets}, args); }}")
    source, library = folder / f"{cuda.TYPES[dtype]}.cpp", folder / f"{cuda.TYPES[dtype]}.so"
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
        getattr(libraries[dtype], f"launch_{name}")(grid[0], grid[1], threads or cuda.THREADS, pointers)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda, "THREADS", 16)  # few real threads; every loop and every grid gets longer
        patch.setattr(cuda, "WARPS", 2)
        patch.setattr(cuda, "_launch", launch)
        libraries |= {dtype: cpp_library(folder, dtype) for dtype in DTYPES}
        yield libraries


class TestOnCpu:
    """`int_linear` whole, under Hopper's rules for `_int_mm`."""

    pytestmark = pytest.mark.usefixtures("on_cpu")

    @pytest.mark.parametrize("part", cuda.PARTS)
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_self_check_accepts_the_kernels(self, dtype, part):
        assert cuda.self_check(torch.device("cpu"), dtype, part) is None

    @pytest.mark.parametrize(("name", "broken", "wrong"), [
        ("quantize_rows", "half = 1 << (bits - 1)", "half = 1 << bits"), ("quantize_rows", "clip[1]", "clip[0]"),
        ("unpack_int4", "0x5140", "0x5410"), ("centre", "(state[row] ? K : 0)", "(state[row] ? 0 : K)"),
        ("feedback", "-= e * w.x", "+= e * w.x"), ("epilogue", "zero[m] * wu", "zero[m] + wu"),
        ("epilogue", "(state[m] ? N : 0)", "0"), ("tac", "sum += m[j + i]", "sum += m[j]"),
        ("packed_product", "0x7531", "0x7513"), ("packed_product", "sum[j] >>= 4", "sum[j] >>= 3"),
        ("packed_product", "128 * warp; k", "0; k"), ("packed_product", "mma(c[1][j], a[1]", "mma(c[1][j], a[0]")])
    def test_self_check_names_a_broken_kernel(self, name, broken, wrong, on_cpu, tmp_path, monkeypatch):
        part = next(part for part, names in cuda.PARTS.items() if name in names)
        text, changed = cuda.SOURCE.read_text(), tmp_path / "kernels.cu"
        assert broken in text
        changed.write_text(text.replace(broken, wrong))
        monkeypatch.setattr(cuda, "SOURCE", changed)
        parts = ("linear", part) if part != "linear" else ("linear",)
        monkeypatch.setitem(on_cpu, torch.float32, cpp_library(tmp_path, torch.float32, parts, "-O0"))
        assert cuda.self_check(torch.device("cpu"), torch.float32, part) == name

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
        monkeypatch.setattr(cuda, "WARPS", 8)
        monkeypatch.setitem(on_cpu, torch.float32, cpp_library(tmp_path, torch.float32, ("linear", "packed")))
        for K in (128, 1152):
            check_packed("cpu", 0, 5, K, 32, torch.float32, 4, True, True, True)

    def test_what_is_clipped_has_the_code_of_the_limit(self):
        """s = 1, z = 6 (a tie), limit 8.5: its code is 8 + 6 (a tie, too), where an unclipped 17 would end at 15."""
        x, clip = torch.zeros(1, 16), torch.tensor([1.0, 0.5])
        x[0, :2] = torch.tensor([17.0, -6.5])
        codes, scale, _ = cuda.quantize_rows(x, None, 0, 0, 4, clip)
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
        check_linear("cpu", 2, 2, 16, 4 * cuda.THREADS + 16, torch.float32, 4, True, None, False, True)

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
        cuda.epilogue(ones, torch.ones(1), torch.zeros(1, dtype=torch.int32), None, values, ones[0], None, None,
                              y)
        assert torch.equal(y.view(torch.int16), values.to(torch.bfloat16)[None].view(torch.int16))


def test_slices_fit_the_cache():
    for M in (32, 128, 1024, 4096):
        for N, K in ((12288, 4096), (4096, 4096), (24576, 4096), (4096, 12288), (126464, 4096), (37888, 3584)):
            for packed in (True, False):
                width = cuda.slice_width(M, N, K, packed)
                assert 0 < width <= N
                assert width == N or width % 256 == 0
                busy = M * width <= cuda.WAVE  # narrower slices would leave multiprocessors idle
                assert width == N or busy or 4 * M * width <= cuda.L2_BYTES
                assert width == N or busy or not packed or K * width <= cuda.L2_BYTES
                assert width == N or (width + 256) * M > cuda.WAVE


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
    T = cuda.THREADS
    strided = [k + j for t in range(T) for k in range(4 * t, columns, 4 * T) for j in range(4)]
    assert sorted(strided) == list(range(columns))
    grid = cuda._blocks(columns // 4)
    fours = [n + j for y in range(grid) for t in range(T) if (n := 4 * (y * T + t)) < columns for j in range(4)]
    assert sorted(fours) == list(range(columns))
    walkers = max(1, min(rows, 1024 // cuda._blocks(columns)))
    walked = [(r, c) for x in range(walkers) for y in range(cuda._blocks(columns)) for t in range(T)
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


# ---- the layers ----------------------------------------------------------------------------------------------------


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
    monkeypatch.setattr(cuda, "usable", lambda x, N, V=None: True)
    assert torch.allclose(tac(linear(x, state)), want, rtol=1e-5, atol=1e-5)
    assert torch.equal(linear.unpack_weights()(x, state), layer()(x, state))


def test_empty_batch():
    assert layer()(torch.randn(0, 64), torch.zeros(0, dtype=torch.bool)).shape == (0, 48)
