"""The quantized linear on a CPU, and on every other device that the CUDA passes do not serve.

`linear(layer, x, state)` takes tokens x (..., d) through the four steps of `runtime/layers.py`: transform, quantize,
multiply, finish.

The readable path
    It takes a few PyTorch operations for each step, with `kernels.py`. It runs on every device and defines the result.
    Its operations walk over the data many times; rounding by feedback takes b steps of several.

The compiled path
    `cpu_kernels.c` does all four steps in one call. Steps 2 to 4 give the same bits, because they take the same IEEE
    operations in the same order. Step 1 sums in the order of the channels, without rounding a product before it is
    added, as matrix libraries mostly do. Where one sums in another order, a sum may differ in its last bit, and the
    codes of a few channels by one. The system's C compiler compiles the file at first use, for the processor that it
    runs on, and the result is kept in the user's cache folder. `compiled` compares it with the readable path once in
    every process. Where there is no compiler, or no integer dot product in the processor, or any bit differs, the
    readable path serves and one warning says so. The file also serves calibration, with `rounding_losses`.

How the compiled path multiplies
    A thread takes 16 tokens at a time through steps 1 and 2, so that a vector holds the same channel of all of them.
    Then it takes 32 rows of the weight at a time, lays them out so that one instruction reads four channels of 16 rows,
    and multiplies all tokens by them while they are in its cache. A weight of four bits stays packed in memory, two
    codes a byte, and keeps its order:

    a row of the weight    [w1|w0] [w3|w2] [w5|w4] [w7|w6] …      the even channel is the lower half of a byte
    four bytes, << 4       [w0| 0] [w2| 0] [w4| 0] [w6| 0]        16 times the even codes, with their signs
    four bytes, & 0xf0     [w1| 0] [w3| 0] [w5| 0] [w7| 0]        16 times the odd codes
    a token's codes         x0 x2 x4 x6   x1 x3 x5 x7 …           in the same order; the sums are 16 times too large

    The instruction multiplies unsigned codes by signed ones. A token's codes are therefore X_int of Eq. 2, 0 to
    2^b − 1, where the readable path has X_int − 2^(b−1).
"""

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import warnings
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange

import kernels
from starquant import Across, Blocks, Diagonal, Kronecker, apply_basis, subspace_gates

SOURCE = Path(__file__).with_name("cpu_kernels.c")
# IEEE arithmetic as it stands in the source: no fused multiply-add of the compiler's own, integers that wrap around
FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fno-strict-aliasing",
         "-fwrapv", "-w", "-shared", "-fPIC", "-fopenmp")
WIDEST = 2**16  # channels: 16 · 8 · 255 times as much stays within int32
SMALL = 2**24  # multiplications, about 0.1 ms, that are not worth a second thread


def linear(layer, x, state=None):
    """Eq. 13 for a `runtime.layers.QuantLinear`: x (..., d), state (...) -> (..., C) in the dtype of x.

    `state` may be None where no gate, mean or shift depends on it. A token with NaN comes out as NaN.
    """
    tokens, state = x.reshape(-1, layer.in_features), None if state is None else state.reshape(-1)
    library = compiled() if serves(layer, tokens, state) else None
    y = readable(layer, tokens, state) if library is None else run(library, layer, tokens, state)
    return y.reshape(*x.shape[:-1], len(layer.weight_packed))

# ---- the readable path ---------------------------------------------------------------------------------------------


@torch.no_grad()  # rounding has no gradient
def readable(layer, x, state=None):
    """`linear` for x (M, d), state (M,): one operation after another, on any device."""
    codes, scale, zero = token_codes(layer.phi(x, state), layer.abits, layer.clip, layer.feedback)
    largest = 2 ** (layer.abits + layer.wbits - 2)
    y = kernels.scaled_product(codes, scale, zero, layer.codes(), layer.weight_scale, layer.weight_zero,
                               layer.weight_sum, largest)
    return layer.finish(y, state).to(x.dtype)


def token_codes(x, bits: int, clip=None, feedback=None):
    """Each token on its own grid (Eqs. 2-4): x (M, K) -> codes (M, K) int8, centred, scale and zero (M, 1) fp32.

    clip (2,) shrinks the range of a token. Codes are rounded to nearest, or, where feedback (K/b, b, b) is given, by
    `feedback_codes`.
    """
    codes, scale, zero = kernels.quantize_rows(x, bits, clip)
    if feedback is not None:
        codes = feedback_codes(x.float(), scale, zero, feedback, bits)
    return codes, scale, zero


def fake_quantize_rows(x, bits: int, clip=None, feedback=None):
    """What the integers of `token_codes` stand for (Eq. 3): x (..., K) -> s (X_c − z), (..., K) fp32."""
    codes, scale, zero = token_codes(x.reshape(-1, x.shape[-1]), bits, clip, feedback)
    # X̂ = s (X_c − z)
    return (scale * (codes - zero)).reshape(x.shape)


def feedback_codes(x, scale, zero, feedback, bits: int):
    """Round x (M, K) fp32 by feedback on the grid of `kernels.quantize_rows` (scale, zero (M, 1)): codes (M, K) int8.

    The K channels form blocks of b; feedback V (K/b, b, b) in bf16 holds a matrix for each block, of which the part
    above the diagonal counts. The channels of a block are rounded one after another. What a channel loses, to rounding
    or because the grid ends, changes the channels of its block that are still open (`methods/plus.py` derives V). All
    tokens and all blocks take a step at once, in units of the tokens' scales.

    The error of a channel is rounded to bf16 first. A product of two bf16 numbers is exact in fp32, so a fused
    multiply-add gives the same bits as a product and a subtraction, on every device.
    """
    u = rearrange(x, "m (n b) -> b n m", n=len(feedback)).clone(memory_format=torch.contiguous_format)
    zero = zero.mT  # (1, M)
    u /= scale.mT
    V = rearrange(feedback.float(), "n i j -> i j n 1")
    low, high = -(2 ** (bits - 1)) - zero, 2 ** (bits - 1) - 1 - zero
    for i in range(len(V)):
        # r = clamp(⌊u_i⌉),  e = u_i − r,  u_j ← u_j − e V_ij for j > i
        r = torch.round(u[i]).clamp_(low, high)
        e = (u[i] - r).to(torch.bfloat16).float()
        u[i + 1 :].addcmul_(e, V[i, i + 1 :], value=-1)
        u[i] = r
    # X_c = r + z
    return rearrange(u.add_(zero), "b n m -> m (n b)").to(torch.int8)

# ---- the compiled path ---------------------------------------------------------------------------------------------

POINTER, NUMBER = ctypes.c_void_p, ctypes.c_long
TENSORS = ("weight_packed", "weight_scale", "bias", "clip", "mean", "shift", "weight_sum", "weight_zero", "feedback")


class Factor(ctypes.Structure):
    """`Factor` of cpu_kernels.c: the address of its matrices, how many channels they mix, and which."""

    _fields_ = [("T", POINTER), *((name, NUMBER) for name in ("n", "step", "next"))]


class Layer(ctypes.Structure):
    """`Layer` of cpu_kernels.c: sizes of a QuantLinear and the addresses of its tensors, null for one that it lacks."""

    _fields_ = [*((name, NUMBER) for name in ("K", "N", "d_m", "d_u", "block", "bits", "packed", "factors")),
                *((name, POINTER) for name in ("P", *TENSORS))]


def serves(layer, x, state) -> bool:
    """Whether cpu_kernels.c is written for these tokens x (M, d) of this layer."""
    if not x.is_cpu or x.dtype not in (torch.float32, torch.bfloat16) or layer.in_features > WIDEST:
        return False
    return not needs_state(layer) or (state is not None and state.dtype == torch.bool and len(state) == len(x))


def needs_state(layer) -> bool:
    """Whether a token's state changes what a layer makes of it."""
    return bool(layer.d_m or layer.d_u or layer.mean is not None or layer.shift is not None)


def run(library, layer, x, state):
    """The result of `readable`, by the compiled function."""
    about, M = described(layer), len(x)
    x, state = x.contiguous(), state.contiguous() if needs_state(layer) else None
    y = torch.empty(M, about.N, dtype=x.dtype)
    threads = torch.get_num_threads() if M * about.K * about.N > SMALL else 1
    if library.linear(ctypes.byref(about), x.data_ptr(), None if state is None else state.data_ptr(), y.data_ptr(), M,
                      x.dtype == torch.bfloat16, threads):
        raise MemoryError(f"no memory for the codes of {M} tokens of {about.K} channels.")
    return y


def rounding_losses(library, weight, scales, bits: int, norm: float):
    """`methods.gptq.rounding_losses` without H: weight (C, d), contiguous scales (C, n), both fp32 -> (C, n)."""
    (C, d), weight, losses = weight.shape, weight.contiguous(), torch.empty_like(scales)
    threads = torch.get_num_threads() if d * losses.numel() > SMALL else 1
    library.rounding_losses(weight.data_ptr(), scales.data_ptr(), losses.data_ptr(), C, d, scales.shape[1], bits, norm,
                            threads)
    return losses


def turns(P, K: int):
    """Matrices (n, n) or (K / n, n, n) of the factors of P, and how far apart the n channels are that they mix."""
    for factor in P:
        if isinstance(factor, Kronecker):
            yield from ((factor.P1, len(factor.P2)), (factor.P2, 1))
        elif isinstance(factor, Diagonal):
            yield factor.d[:, None, None], 1
        else:
            yield factor[0], K // len(factor[0]) if isinstance(factor, Across) else 1


def filled(T):
    """Matrices T (..., n, n) in fp32, their rows filled up with zeros to whole eights."""
    n, T = T.shape[-1], T.float()
    return (F.pad(T, (0, -n % 8)) if n % 8 else T).contiguous()


def described(layer) -> Layer:
    """The layer as the C code sees it, kept with the layer for as long as it has the same tensors.

    The C code has copies of P and feedback; where these change in place after a call, it goes on with what they were.
    ValueError for gates that do not fit, and for a tensor of another size than the C code reads.
    """
    buffers = list(layer._buffers.values())
    identity = (layer.abits, layer.d_m, layer.d_u, layer.packed,
                *((id(t), t if t is None else t.data_ptr()) for t in buffers))
    about = layer._converted.get("C")
    if about is None or about.identity != identity:
        K, N, packed = layer.in_features, len(layer.weight_packed), layer.packed
        block = 0 if layer.feedback is None else layer.feedback.shape[-1]
        apply_basis(torch.empty(0, K), layer.P)  # ValueError for a factor that does not fit
        subspace_gates(K, layer.d_m, layer.d_u)  # and for gates
        sizes = (N * ((K + 1) // 2 if packed else K), N, N, 2, 2 * K, 2 * N, N, N, K * block)
        dtypes = {"weight_sum": torch.int32, "weight_zero": torch.int32,
                  "weight_packed": torch.uint8 if packed else torch.int8}
        kept = {name: tensor.to("cpu", dtypes.get(name, torch.float32)).contiguous() for name in TENSORS
                if (tensor := getattr(layer, name)) is not None}
        for name, size in zip(TENSORS, sizes, strict=True):
            if name in kept and kept[name].numel() != size:
                shape = tuple(kept[name].shape)
                raise ValueError(f"{name} of shape {shape} does not fit a linear of {K} to {N} channels.")
        if block:
            kept["feedback"] = filled(kept["feedback"])
        matrices = [(filled(T), step) for T, step in turns(layer.P, K)]
        array = (Factor * len(matrices))(*((T.data_ptr(), T.shape[-2], step, T[0].numel() if T.ndim == 3 else 0)
                                           for T, step in matrices))
        about = Layer(K, N, layer.d_m, layer.d_u, block, layer.abits, packed, len(array), ctypes.addressof(array),
                      **{name: tensor.data_ptr() for name, tensor in kept.items()})
        about.tensors = buffers, kept, matrices, array  # they live as long as their addresses are used
        about.identity = identity
        layer._converted["C"] = about  # whole, since other threads may take it from now on
    return about


@cache
def compiled():
    """cpu_kernels.c as a library that agrees with `readable` in every bit, or None, said once, where there is none."""
    try:
        if agrees(library := load()):
            return library
        reason = "its results differ from those of the readable path"
    except (OSError, RuntimeError, AttributeError, subprocess.SubprocessError) as error:
        reason = str(error)
    warnings.warn(f"runtime/cpu_kernels.c does not serve ({reason}); quantized linears take the readable path, which "
                  "gives the same numbers more slowly.", stacklevel=2)
    return None


def compiler() -> list[str]:
    """The command of the C compiler: $CC where it is set, else cc, gcc or clang. OSError if there is none."""
    try:
        named = shlex.split(os.environ.get("CC", ""))
    except ValueError as error:
        raise OSError(f"$CC cannot be read ({error})") from None
    for command in [named] if named else [["cc"], ["gcc"], ["clang"]]:
        if path := shutil.which(command[0]):
            return [path, *command[1:]]
    raise OSError(f"there is no C compiler named {named[0]}" if named else "there is no C compiler")


def load():
    """The library from the cache folder, where it is compiled first if it is not there or damaged.

    Its name holds a hash of everything that it depends on. Its last 32 bytes are the hash of the others.
    """
    command = [*compiler(), *FLAGS]
    file = os.stat(command[0])
    identity = (SOURCE.read_bytes(), command, file.st_size, file.st_mtime_ns, processor())
    name = f"cpu-{hashlib.sha256(repr(identity).encode()).hexdigest()[:32]}.so"
    with cache_folder() as folder:
        path = folder / name
        if not intact(path):
            with tempfile.TemporaryDirectory(dir=folder) as room:
                built = Path(room) / name
                build(command, built)
                built.write_bytes(built.read_bytes() + hashlib.sha256(built.read_bytes()).digest())
                ctypes.CDLL(built)  # OSError for what is no library
                built.replace(path)
        library = ctypes.CDLL(path)
    library.linear.argtypes = [*[POINTER] * 4, NUMBER, ctypes.c_int, ctypes.c_int]
    library.rounding_losses.argtypes = [*[POINTER] * 3, *[NUMBER] * 3, ctypes.c_int, ctypes.c_float, ctypes.c_int]
    return library


def build(command, path):
    """Compile the source. RuntimeError with the compiler's first message."""
    result = subprocess.run([*command, str(SOURCE), "-o", str(path), "-lm"], capture_output=True, text=True,
                            errors="replace", timeout=300)
    if result.returncode:
        messages = [line for line in result.stderr.splitlines() if "error" in line]
        raise RuntimeError(f"{command[0]}: {(messages or [f'exit code {result.returncode}'])[0]}")


def intact(path) -> bool:
    content = path.read_bytes() if path.exists() else b""
    return hashlib.sha256(content[:-32]).digest() == content[-32:]


def processor() -> str:
    """What tells this machine's instructions from another's, for whom the same folder may be mounted."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() + platform.machine()
    return "".join(next((line for line in lines if line.startswith(key)), "") for key in ("model name", "flags"))


@contextmanager
def cache_folder():
    """The user's folder for compiled code, or a temporary one where others could write to it or it cannot be made."""
    root = os.environ.get("XDG_CACHE_HOME", "")
    try:
        folder = (Path(root) if os.path.isabs(root) else Path.home() / ".cache") / "star-quant"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        about = folder.stat()
        private = about.st_uid == os.getuid() and not about.st_mode & 0o022 and os.access(folder, os.W_OK)
    except (OSError, RuntimeError):
        private = False
    if private:
        yield folder
    else:
        with tempfile.TemporaryDirectory(prefix="star-quant-") as folder:
            yield Path(folder)


def exact_losses(weight, scales, bits: int, norm: float = 2.4):
    """Σ_k |s q − w_k|^p by its formula, for self-checks: weight (C, d), scales (C, n) -> (C, n) float64."""
    w, s = weight[:, None], scales[..., None]
    return (s * (w / s).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) - w).double().abs().pow(norm).sum(-1)


def agrees(library) -> bool:
    """Whether the library gives the bits of `readable`, for awkward shapes and all tensors that a layer may have, and
    the losses of a search up to their rounding.

    Whole numbers go through the transform, whose sums are then exact in every order.
    """
    from runtime import layers  # which takes `linear` from here

    g = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=g)

    def whole(*shape):
        return torch.randint(-2, 3, shape, generator=g).float()

    factors = [Diagonal(whole(144)), Kronecker(whole(9, 9), whole(16, 16)), Blocks(whole(6, 24, 24).bfloat16())]
    for M, K, N, bits, symmetric, b, P, draw in ((37, 144, 70, 4, True, 24, factors, whole),
                                                 (5, 45, 33, 8, False, 0, [], normal)):
        layer = layers.QuantLinear(
            weight=layers.quantize_weight(normal(N, K), bits, symmetric), P=P, d_m=K // 8, d_u=K // 16, bias=normal(N),
            grid=layers.Grid(bits, torch.tensor([0.8, 0.9]), 0.1 * normal(K // b, b, b) if b else None),
            centre=layers.Centre(draw(2, K), normal(2, N)))
        state = torch.rand(M, generator=g) < 0.5
        for x in (draw(M, K), draw(M, K).bfloat16()):
            if not torch.equal(run(library, layer, x, state), readable(layer, x, state)):
                return False
    w, scales = normal(5, 300), normal(5, 11).abs() + 0.05
    losses = rounding_losses(library, w, scales, 4, 2.4).double()
    return torch.allclose(losses, exact_losses(w, scales, 4), rtol=1e-5)
