"""Whether a CUDA kernel may be used: once per device it must compile, start and give what its readable twin gives."""

import warnings
from functools import cache
from unittest import mock

import torch

import kernels
from runtime import cpu, cuda
from runtime.cuda import Rotation, Sizes
from starquant import Across, Blocks, FakeQuantize, Kronecker, subspace_gates, tac_apply

FUSED_GLUE = True  # norms, rope and SiLU of both models by one kernel each; `eager_glue` turns it off
ONLY_BF16 = ("tac", "blocks", "fp8")


def usable(x, *parts: str) -> bool:
    """Whether the kernels of these parts serve activations x (..., K): on a GPU, fp32 or bf16, K a multiple of 16."""
    return (x.device.type == "cuda" and x.dtype in cuda.TYPES and x.numel() > 0 and x.shape[-1] % 16 == 0
            and all(ready(x.device.index, x.dtype, part) for part in parts))


def glues(x, *others) -> bool:
    """Whether the glue kernels serve x and others, contiguous and of one dtype: where no gradient is wanted and nothing
    is being compiled."""
    tensors = (x, *others)
    return (FUSED_GLUE and not torch.compiler.is_compiling()
            and all(t.dtype == x.dtype and t.is_contiguous() for t in tensors)
            and not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors)) and usable(x, "glue"))


def eager_glue():
    """A context, or a decorator, in which norms, rope and SiLU are the lines of model.py."""
    return mock.patch(f"{__name__}.FUSED_GLUE", False)


@cache
def ready(index: int, dtype, part: str | Sizes = "linear") -> bool:
    """Whether a part compiles on this device and its kernels equal their eager twins. It is tried once, and a warning
    says if not. Call it before a CUDA graph is captured; any warm-up forward does."""
    if (part in ONLY_BF16 and dtype != torch.bfloat16) or (
            part == "fp8" and torch.cuda.get_device_capability(index) < (8, 9)):
        return False
    if part not in ("glue", "gptq", "scales", "training") and kernels.backend("cuda") != "int_mm":
        return False  # said already
    try:
        wrong = self_check(torch.device("cuda", index), dtype, part)
        reason = wrong and f"{wrong} differs from its eager twin"
    except (RuntimeError, OSError, AttributeError, TypeError, ImportError) as error:
        torch.cuda.synchronize(index)  # an error that ended the CUDA context is raised again, and ends the run
        lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        telling = next((line for line in lines if "error" in line.lower() and not line.endswith(":")), lines[-1])
        reason = f"they do not compile or start here ({telling.strip()})"
    if reason:
        warnings.warn(f"Of the CUDA kernels {', '.join(cuda.kernels_of(part))} are not used, because {reason}; others, "
                      f"or plain PyTorch, serve instead (slower).", stacklevel=2)
    return not reason


def with_gradient(function, x, grad, *args):
    """What an autograd function makes of x, and the gradient of x by that of the result."""
    with torch.enable_grad():
        y = function.apply(x := x.detach().requires_grad_(), *args)
        return y.detach(), *torch.autograd.grad(y, x, grad)


def self_check(device, dtype, part: str | Sizes) -> str | None:
    """The first kernel of a part that differs from its eager twin, on a ragged number of tokens."""
    return next((name for name, right in _checks(device, dtype, part) if not right), None)


def _checks(device, dtype, part):
    """Names of kernels, and whether each gives what its eager twin does."""
    g, M, fp32, equal = torch.Generator().manual_seed(0), 19, torch.float32, torch.equal
    d_m, d_u, clip, state = 24, 40, torch.tensor([0.9, 0.8], device=device), (torch.arange(M) % 3 == 0).to(device)

    def normal(*shape, to=dtype):
        return torch.randn(*shape, generator=g).to(device, to)

    def integers(*shape, most=1, to=dtype):  # small ones, also times powers of two, have exact sums in any order
        return torch.randint(-most, most + 1, shape, generator=g).to(device, to)

    def entering(K, before):  # x and what comes before a linear, by kind, and what it makes of x: exact numbers
        rows = integers(M, K)
        if before == 0:
            return rows, None, rows
        if before == 1:  # x is -1 or 1, so that its norm halves it
            x, gain = torch.where(rows < 0, rows, 1), integers(K)
            return x, cuda.Before(gain, 3.0), x * gain / 2
        gate = 32 * integers(M, K)  # 0, 32, or so low that e^-gate is infinite
        return torch.cat((torch.where(gate < 0, -200, gate), rows), -1), cuda.Before(), gate.clamp(min=0) * rows

    def gated(rows):
        return rows * torch.where(state[:, None], *subspace_gates(rows.shape[1], d_m, d_u, device, rows.dtype))

    def same(got, rows):  # codes, scales and zero points, and zeros behind them
        want = zip(got, kernels.quantize_rows(gated(rows), 4, clip), strict=True)
        return not got[0][M:].any() and all(equal(a[:M].reshape(b.shape).to(b.dtype), b) for a, b in want)

    def unpacks(packed, w, kind):  # rows that end within a block of threads, and nothing behind them
        out = torch.zeros_like(w).view(kind)
        cuda.unpack(packed[:-1], out[:-1], dtype)
        return equal(out[:-1].float(), w[:-1].float()) and not out[-1].float().any()

    if part == "glue":
        x, gain, close = normal(2, 19, 288), normal(288), {"rtol": 2 * torch.finfo(dtype).eps, "atol": 1e-6}
        norm = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-5)
        yield "rms_norm", torch.allclose(cuda.rms_norm(x, gain, 1e-5), gain * norm.to(dtype), **close)
        silu = torch.nn.functional.silu(x[..., :144]) * x[..., 144:]
        yield "silu_up", torch.allclose(cuda.silu_up(x), silu, **close)
        for exact in (fp32, dtype):
            (cos, sin), heads = normal(2, 19, 16, to=exact), x.unflatten(-1, (9, 32))[:, :, :6].transpose(1, 2)
            first, second = heads.to(exact).chunk(2, -1)  # (B, 6, L, 16)
            want = torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(dtype)
            yield "rope", equal(cuda.rope(x, cos.repeat(1, 2), sin.repeat(1, 2), 6, 32), want)
    elif part == "tac":
        z, T, bias = integers(M, 96, most=8), normal(6, 16, 16, to=fp32), normal(6, 16, to=fp32)
        want = tac_apply(z.double(), T.double(), bias.double())
        yield part, ((cuda.tac(z, T, bias) - want).abs() <= 2**-8 * want.abs() + 0.01).all()
    elif part == "gptq":
        columns, scale = normal(21, 70, to=torch.float64), normal(70, to=torch.float64).abs() + 0.2
        R = (torch.eye(40, device=device) + normal(40, 40, to=fp32).triu(1) / 16).double()[3:24, 3:24]
        weight = columns + normal(21, 70, to=torch.float64) / 16
        codes = cuda.gptq_columns(columns, errors := weight.clone(), R, scale, 4)
        columns += R.triu(1).mT @ errors  # as each was when its turn came
        want = (columns / scale).round().clamp(-8, 7)
        yield "gptq_columns", equal(codes.double(), want) and torch.allclose(
            errors, weight - scale * want, rtol=1e-9, atol=1e-12)
    elif part == "scales":
        w, scales = normal(5, 300, to=fp32), normal(5, 11, to=fp32).abs() + 0.05
        yield "rounding_losses", torch.allclose(cuda.rounding_losses(w, scales, 4, 2.4).double(),
                                                cpu.exact_losses(w, scales, 4), rtol=1e-5)
    elif part == "training":
        x, grad = normal(M, 2576, to=fp32), normal(M, 2576, to=fp32)
        # zeros, one sign, both ends often, and both a half step beyond a code, so that the upper one is clamped
        x[0], x[1], x[2], x[3] = 0, x[1].abs(), x[2].sign(), x[3].clamp(-7.5, 7.5).mul(2).round().clamp(-15, 15) / 2
        x[3, :2] = torch.tensor([-7.5, 7.5], device=device)
        for symmetric in (False, True):
            got, ours = with_gradient(cuda.FakeQuantize, x, grad, 4, symmetric)
            want, theirs = with_gradient(FakeQuantize, x, grad, 4, symmetric, torch.finfo(fp32).max)
            yield "fake_quantize", equal(got, want)
            yield "fake_quantize_gradient", torch.allclose(ours, theirs, rtol=1e-5, atol=1e-4)
    elif part == "blocks":
        B, mean = integers(3, 64, 64) / 8, integers(2, 192, most=8, to=fp32)
        for silu, mu in ((False, mean), (False, None), (True, mean)):
            x, _, rows = entering(192, 2 * silu)
            rows = rows if mu is None else rows - mean[state.long()]
            want = Blocks(B.float()).apply(rows.float()).to(dtype)
            yield "centred_blocks", equal(cuda.centred_blocks(x, mu, state, B, silu), want)
    elif isinstance(part, Rotation):
        (x, before, rows), P = entering(part.N1 * part.N2, part.BEFORE), [integers(n, n) / 8 for n in part[:2]]
        factor = Kronecker(*P) if part.FIRST else Across(P[0])
        want = factor.to(torch.empty(0, device=device)).apply(rows.float()).to(dtype)
        y, *got = cuda.rotated_codes(part, x, factor, state, d_m, d_u, 4, clip, True, before=before)
        yield part.kernel, equal(y, gated(want))
        y, *got = cuda.rotated_codes(part, x, factor, state, d_m, d_u, 4, clip, before=before)
        yield part.kernel, same(got, want)
    elif part == "feedback":
        x, V = normal(M, 128), normal(2, 64, 64, to=torch.bfloat16)
        V = 0.3 * V.triu(1) + 16 * V.tril()  # only what is above the diagonal counts
        codes, scale, zero = cuda.quantize_rows(x, None, 0, 0, 4, clip, True)
        cuda.feedback(x, V, scale, zero, codes, 4)
        yield part, equal(codes[:M], cpu.token_codes(x, 4, clip, V)[0])
    else:  # products
        x, w = normal(M, 1280), integers(272, 1280, most=8, to=torch.int8).clamp(max=7)
        x[3] = 0
        w_sum, w_zero, packed = w.sum(-1, dtype=torch.int32), w[:, 0].int(), kernels.pack_int4(w)
        (w_scale, bias), shift, y = normal(2, 272, to=fp32), normal(2, 272, to=fp32), normal(M, 272)
        codes, scale, zero = cuda.quantize_rows(x, state, d_m, d_u, 4, clip)
        x_sum = codes[:M].sum(-1, dtype=torch.int32) - 1280 * zero
        residual = normal(M, 272)
        ends = cuda.Ends(scale, zero, x_sum, w_scale, w_sum, w_zero, bias, shift, state, residual)
        want = (kernels.int_linear(gated(x), w, w_scale, 4, w_zero, bias, clip) + shift[state.long()]).to(dtype)
        want = want + residual
        if part == "linear":
            yield "quantize_rows", same((codes, scale, zero), x)
            yield "unpack_int4", unpacks(packed, w, torch.int8)
            cuda.epilogue(kernels.product(lambda a, w: torch._int_mm(a, w.t()), codes, w, 2**6), ends, y)
            yield "epilogue", equal(y, want)
        elif part == "fp8":
            e4m3, *_ = cuda.quantize_rows(x, state, d_m, d_u, 4, clip, order="e4m3")
            sums = (y + bias + shift[state.long()]).to(dtype) + residual
            yield "unpack_e4m3", unpacks(packed, w, e4m3.dtype)
            yield "quantize_rows", equal(e4m3[:M].float(), (codes[:M] - zero[:, None]).float())
            yield "add_ends", equal(cuda.add_ends(y, bias, shift, state, residual), sums)
        else:
            paired, *_ = cuda.quantize_rows(x, state, d_m, d_u, 4, clip, order="paired")
            for splits in (1, 2):
                cuda.tiled_product(part, paired, packed, ends, y, splits)
                yield part.kernel, equal(y, want)
