"""From the source of CUDA kernels to their instructions: NVIDIA's compiler makes PTX, and `parse` reads it."""

import ctypes
import hashlib
import os
import re
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

KEPT = Path(__file__).parents[2] / ".pytest_cache" / "ptx"

# ---- compiling -----------------------------------------------------------------------------------------------------


def nvrtc() -> list:
    """The NVRTC libraries that PyTorch's CUDA builds bring."""
    found = (path for folder in map(Path, sys.path) for path in folder.glob("nvidia/*/lib/libnvrtc.so.*"))
    return [path for path in found if "alt" not in path.name]


def by_nvrtc(source: str, *options: str) -> tuple[str, str]:
    """(PTX, what the compiler says)."""
    lib, program = ctypes.CDLL(str(nvrtc()[0])), ctypes.c_void_p()

    def text(kind: str) -> str:
        size = ctypes.c_size_t()
        getattr(lib, f"nvrtcGet{kind}Size")(program, ctypes.byref(size))
        getattr(lib, f"nvrtcGet{kind}")(program, out := ctypes.create_string_buffer(size.value))
        return out.value.decode()

    assert lib.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernels.cu", 0, None, None) == 0
    given = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    status, log = lib.nvrtcCompileProgram(program, len(options), given), text("ProgramLog")
    if status:
        raise RuntimeError(log)
    ptx = text("PTX")
    lib.nvrtcDestroyProgram(ctypes.byref(program))
    return ptx, log


def compile_ptx(source: str, architecture="compute_90a") -> str:
    """PTX by NVRTC, or by nvcc."""
    if nvrtc():
        return by_nvrtc(source, f"--gpu-architecture={architecture}")[0]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernels.cu"
        file.write_text(source)
        subprocess.run(["nvcc", f"-arch={architecture}", "-ptx", "-o", f"{folder}/out.ptx", str(file)], check=True)
        return Path(f"{folder}/out.ptx").read_text()


@cache
def compiler() -> str:
    """What tells one compiler's output from another's."""
    return str(nvrtc()) if nvrtc() else subprocess.run(["nvcc", "--version"], capture_output=True, text=True,
                                                       check=True).stdout


def kept(compile_, *given) -> str:
    """compile_(*given), a text. The compiler takes longer than most runs, so what it gives is kept."""
    file = KEPT / hashlib.sha256(repr((*given, compiler())).encode()).hexdigest()
    if not file.is_file():
        KEPT.mkdir(parents=True, exist_ok=True)
        begun = file.with_suffix(f".{os.getpid()}")
        begun.write_text(compile_(*given))
        begun.replace(file)
    return file.read_text()


@cache
def compiled(source: str, architecture: str) -> dict:
    """The kernels of a source by name."""
    return parse(kept(compile_ptx, source, architecture))

# ---- reading -------------------------------------------------------------------------------------------------------


class Kernel:
    """One kernel: its parameters, its code by line, its labels, and where its shared variables lie.

    `extern __shared__` memory begins behind the others and is as large as the launch asks for.
    """

    def __init__(self, name, params, body):
        self.name, self.params, self.shared, self.shared_bytes = name, params, {}, 0
        self.code, self.labels = [], {}
        for line in body:
            line = line.split("//")[0].strip()
            if not line or line in "{}":
                continue
            if m := re.match(r"\.shared\s+\.align\s+(\d+)\s+\.b8\s+(\S+?)\[(\d+)\];", line):
                align = int(m[1])
                self.shared_bytes = -(-self.shared_bytes // align) * align
                self.shared[m[2]] = self.shared_bytes
                self.shared_bytes += int(m[3])
            elif m := re.match(r"\.shared\s+\.align\s+(\d+)\s+\.[bus](\d+)\s+(\w+);", line):
                align = int(m[1])
                self.shared_bytes = -(-self.shared_bytes // align) * align
                self.shared[m[3]] = self.shared_bytes
                self.shared_bytes += int(m[2]) // 8
            elif line.startswith("."):
                continue
            elif line.endswith(":"):
                self.labels[line[:-1]] = len(self.code)
            else:
                self.code.append(line.rstrip(";"))
        self.dynamic = self.shared["tiles"] = -(-self.shared_bytes // 128) * 128


def parse(ptx: str) -> dict:
    """Kernels of a module by name."""
    kernels = {}
    ptx = re.sub(r"\{([^{}\n]*)\}", lambda m: "<" + m[1] + ">", ptx)  # vectors are not blocks
    for m in re.finditer(r"\.entry\s+(\w+)\(\s*(.*?)\)\s*(?:\.\w+[^{\n]*\n)*\s*\{\n(.*?)\n\}\n", ptx, re.S):
        params = [p.split()[-1] for p in m[2].split(",") if p.strip()]
        body = re.sub(r"\n\s*(mma[^;]*);", lambda x: "\n" + " ".join(x[1].split()) + ";", m[3])
        kernels[m[1]] = Kernel(m[1], params, body.split("\n"))
    return kernels


def operands(text):
    out, depth, now = [], 0, ""
    for ch in text:
        depth += ch in "<[" or 0
        depth -= ch in ">]" or 0
        if ch == "," and not depth:
            out.append(now.strip())
            now = ""
        else:
            now += ch
    return [*out, now.strip()] if now.strip() else out
