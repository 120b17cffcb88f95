"""Whether kernels may be used: the self-check accepts the right ones and names a broken one, and the interpreter of PTX
finds what values do not show."""

import ptx
import pytest
import torch
from kernel_checks import plant

import kernels
from runtime import checks, cuda

READY = checks.ready.__wrapped__
SMALL = [cuda.Rotation(24, 64, 1), cuda.Rotation(16, 128, 1), cuda.Rotation(24, 64, 0), cuda.Rotation(20, 64, 1)]
BEFORE = [cuda.Rotation(n1, n2, 1, before) for n1, n2 in ((24, 64), (16, 128)) for before in (1, 2)]  # norm, SiLU


@pytest.mark.usefixtures("on_cpu")
class TestSelfCheck:
    @pytest.mark.parametrize(("part", "dtype"), [(part, torch.bfloat16) for part in (*cuda.PARTS, *SMALL, *BEFORE)] + [
        (part, torch.float32) for part in ("linear", "feedback", "glue")])
    def test_self_check_accepts_the_kernels(self, part, dtype):
        assert checks.self_check(torch.device("cpu"), dtype, part) is None

    @pytest.mark.parametrize("part", ["linear", "glue", "feedback"])
    def test_self_check_accepts_them_on_a_gpu_without_instructions_for_bf16(self, part, monkeypatch):
        monkeypatch.setattr(cuda, "_launch", ptx.launcher("compute_75"))
        assert checks.self_check(torch.device("cpu"), torch.bfloat16, part) is None

    @pytest.mark.parametrize(("part", "name", "broken", "wrong"), [
        ("linear", "quantize_rows", "clip[1]", "clip[0]"), ("blocks", "centred_blocks", "(state[row] ? K : 0)", "0"),
        ("linear", "epilogue", "(state[m] ? N : 0)", "0"), ("glue", "rms_norm", "__fmul_rn(v[j], factor)", "v[j]"),
        ("glue", "rope", "-second[a]", "second[a]"), ("glue", "silu_up", "expf(-v[j])", "expf(v[j])"),
        ("tac", "tac", "4 * (g / 2) + 2 * j", "2 * (g / 2) + 4 * j"),
        ("gptq", "gptq_columns", "int j = i + 1; j < GPTQ_BLOCK", "int j = i + 2; j < GPTQ_BLOCK"),
        ("feedback", "feedback", "+ j > k / FEEDBACK_BLOCK", "+ j >= k / FEEDBACK_BLOCK"),
        ("feedback", "feedback", "rounded(__fsub_rn(v[i], r), (const bf16*)0)", "__fsub_rn(v[i], r)"),
        ("feedback", "feedback", "blockIdx.y * FEEDBACK_BLOCK * FEEDBACK_BLOCK", "0"),
        ("linear", "unpack_int4", "in[j] >> 4 &", "in[j] >> 3 &"),
        ("linear", "unpack_int4", "| 0x80808080u) - 0x08080808u", "| 0x80808080u)"),
        ("fp8", "unpack_e4m3", "n ^ 0x8888u", "n"), ("fp8", "unpack_e4m3", "sign << 1", "sign"),
        ("fp8", "add_ends", "(state[m] ? N : 0)", "0"), ("fp8", "add_ends", "j < 4 && bias", "j < 3 && bias"),
        ("scales", "rounding_losses", "half - 1);\n            sum", "half);\n            sum"),
        ("linear", "epilogue", "rounded(v[j], y), r[j]", "v[j], r[j]"),
        ("fp8", "add_ends", "j < 4 && residual", "false"),
        ("blocks", "centred_blocks", "at + K, v", "at, v"), (BEFORE[2], "rotated_codes", "part ? 0 : sum", "sum"),
        (BEFORE[0], "rotated_codes", "gain + row * N2 + 32 * (i / 2)", "gain + row * N2 + 16 * (i / 2)"),
        ("training", "fake_quantize", "bits - symmetric", "bits"),
        ("training", "fake_quantize", "see(symmetric ? fabsf(v[j]) : v[j])", "see(v[j])"),
        ("training", "fake_quantize", "inside ? q : most, s", "q, s"),
        ("training", "fake_quantize_gradient", "inside ? v[j] : 0", "v[j]"),
        ("training", "fake_quantize_gradient", "-d_high - d_zero", "-d_high"),
        ("training", "fake_quantize_gradient", "__fdiv_rn(d_high, sum[3])", "d_high"),
        ("training", "fake_quantize_gradient", "symmetric && x[j] < 0 ? -to_high", "false ? -to_high"),
        (SMALL[0], "rotated_codes", "gates && k + 2 * j >= from", "false && k + 2 * j >= from")])
    def test_self_check_names_a_broken_kernel(self, part, name, broken, wrong, tmp_path, monkeypatch):
        plant(monkeypatch, tmp_path, broken, wrong)
        assert checks.self_check(torch.device("cpu"), torch.bfloat16, part) == name

    @pytest.mark.parametrize(("part", "old", "new"), [
        # races, out of bounds, what is never written: their values may be right by chance
        ("linear", "__syncthreads();\n        for (int w = 0; w < WARPS_OF", "for (int w = 0; w < WARPS_OF"),
        ("linear", "if (n >= width) return;", ""), ("tac", "r + 8 < rows ? ", "true ? "),
        ("blocks", "row < M ? ", "true ? "),
        ("feedback", "__syncthreads();\n    int m", "int m"), ("feedback", "if (m >= M) return;", ""),
        ("linear", "if (i >= count) return;", ""), ("fp8", "if (i >= count) return;", ""),
        ("linear", "i = blockIdx.x * THREADS + threadIdx.x", "i = threadIdx.x"),
        ("fp8", "i = blockIdx.x * THREADS + threadIdx.x", "i = threadIdx.x"),
        ("fp8", "if (n >= N) return;", ""), ("fp8", "int m = blockIdx.x, n", "int m = blockIdx.x / 2, n"),
        ("blocks", "THREADS);\n            __syncthreads();", "THREADS);"),
        ("gptq", "    __syncthreads();\n    int c", "    int c"), ("glue", "__syncthreads();\n    sum = 0", "sum = 0"),
        ("training", "    __syncthreads();\n    if (!saw_an_end) return;", "    if (!saw_an_end) return;"),
        ("training", "    if (threadIdx.x == 0) {\n        ends", "    {\n        ends"),
        ("training", "ends[2 * blockIdx.x] = range.low", "ends[blockIdx.x] = range.low"),
        ("training", "k < K; k += 4 * ROW_THREADS) {", "k <= K; k += 4 * ROW_THREADS) {"),
        ("scales", "    __syncthreads();\n    int i", "    int i"), ("scales", "first + i < n ? scales[first + i] : 1",
                                                                     "scales[first + i]"),
        (SMALL[1], "column / 64 * 64", "0"),
        (SMALL[0], "    __syncthreads();\n    for (int m = b", "    for (int m = b"),
        (SMALL[0], "#endif\n        __syncthreads();", "#endif"), 
        (SMALL[0], "if (row >= N1) continue;\n            if (y)", "if (y)"), (SMALL[3], "column + j < N1 ?", "true ?"),
        (BEFORE[0], "if (row >= N1) continue;\n            normed8", "normed8"),
        (BEFORE[1], "store8(between + 8 * i / N2 * PITCH", "store8(between + 8 * i / N2 * N2"),
        (BEFORE[3], "__syncthreads();  // all have read", "// all have read")])
    def test_the_interpreter_finds_planted_faults(self, part, old, new, tmp_path, monkeypatch):
        plant(monkeypatch, tmp_path, old, new)
        with pytest.raises(ptx.Fault):
            checks.self_check(torch.device("cpu"), torch.bfloat16, part)


def test_kernels_are_for_gpus_only():
    assert not checks.usable(torch.randn(4, 64), "linear")


def test_kernels_that_do_not_compile_are_said_with_the_compilers_words(monkeypatch):
    def launch(*_):
        raise RuntimeError('Compilation failed:\nkernels.cu(3): error: identifier "rintg" is undefined\n\n1 error')

    monkeypatch.setattr(cuda, "_launch", launch)
    monkeypatch.setattr(kernels, "backend", lambda device: "int_mm")
    monkeypatch.setattr(torch, "device", lambda *_: "cpu")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)  # no earlier kernel has failed
    said = r'epilogue are not used, .* start here \(kernels.cu\(3\): error: identifier "rintg" is undefined\)'
    with pytest.warns(UserWarning, match=said):
        assert not READY(0, torch.float32)


@pytest.mark.parametrize("why", ["off", "cpu", "gradient", "dtype"])
def test_glue_is_eager_where_a_kernel_cannot_serve(why, monkeypatch):
    monkeypatch.setattr(checks, "ready", lambda *_: True)
    monkeypatch.setattr(torch.Tensor, "device", torch.device("cpu" if why == "cpu" else "cuda:0"))
    x, gain = torch.randn(3, 32), torch.ones(32)
    assert checks.glues(x, gain) == (why != "cpu")
    if why == "off":
        with checks.eager_glue():
            assert not checks.glues(x, gain)
        assert checks.glues(x, gain)
    assert not checks.glues(x, gain.requires_grad_() if why == "gradient" else gain.bfloat16())


def test_an_error_that_ends_the_context_ends_the_run(monkeypatch):
    """A kernel that does not start is replaced; after an illegal access every later call fails, under other names."""
    def dead(*_):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(kernels, "backend", lambda _: "int_mm")
    monkeypatch.setattr(checks, "self_check", dead)
    monkeypatch.setattr(torch.cuda, "synchronize", dead)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        READY(0, torch.float32, "linear")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    with pytest.warns(UserWarning, match="do not compile or start here"):
        assert not READY(0, torch.float32, "linear")
