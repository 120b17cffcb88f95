"""What every command shares: its arguments, its end, its device, free memory, and the processes of one run.

Commands
    `Parser` reads arguments. `run` calls the command and turns what a user can mend into one sentence and an exit code.
    What a user can mend is raised as `Refused`. Any other error is a fault of the program and stays a traceback.

Several processes
    torchrun starts one process per GPU (or several on a CPU). Without torchrun there is one process. Work is divided by
    index (`i % world() == rank()`). Python objects are gathered, so that every process ends with all results.
"""

import argparse
import atexit
import json
import math
import os
import re
import sys
import tempfile
import time
import warnings
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

NARROW = 512  # channels of a model that one thread calibrates
AT_ONCE = 16  # sequences in a forward pass: on a CPU they stay in the caches; no mask or draw depends on it


class Refused(ValueError):  # noqa: N818 (a verdict on the input, not a fault of the program)
    """What a user can mend. The message is one sentence that names what is wrong and says what to do about it."""


class Parser(argparse.ArgumentParser):
    """argparse without the usage text in front of its errors. It refuses arguments that are empty or no UTF-8."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.register("type", Path, home_path)

    def parse_args(self, args=None, namespace=None):
        given = sys.argv[1:] if args is None else args
        for flag, text in zip(["", *given], given, strict=False):
            if re.fullmatch(r"(--[\w-]+=)?", text):  # what an unset variable of the shell leaves
                self.error(f"nothing is given for {text[:-1] or flag}")
            if any("\ud800" <= letter <= "\udfff" for letter in text):
                self.error(f"{text!r} is no text in UTF-8")
        return super().parse_args(args, namespace)

    def error(self, message):
        self.exit(2, f"{self.prog}: {message.rstrip('.')}; --help lists what there is.\n")


def home_path(text: str) -> Path:
    """The path, with the home folder for ~, which a shell leaves in --out=~/x. The ~name of nobody stays as it is."""
    return Path(os.path.expanduser(text))


def at_least(least: int, below: int = 10**6):
    """The type of a flag that takes a whole number. So many things as the usual bound forbids would fill the memory."""
    def number(text: str) -> int:
        if not least <= int(text) < below:
            raise argparse.ArgumentTypeError(f"must be at least {least} and below {below}")
        return int(text)

    return number


def positive(text: str) -> float:
    """The type of a flag that takes a finite number above 0."""
    if not 0 < float(text) < math.inf:
        raise argparse.ArgumentTypeError("must be above 0 and finite")
    return float(text)


def run(program: str, function, args, smaller: str = "--batch-size", kept=str) -> int:
    """Exit code of the command `function(args)`, whose result is printed as the last line of standard output, as JSON.

    A refusal, a failure of the file system and lost memory give 2 and one sentence on standard error; Ctrl-C gives 130,
    and a pipe that nobody reads any more gives 141 without a word.
    smaller: the flags that lower the memory a run needs. kept(): a sentence that says what an interrupted run leaves.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever started the program
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 (as long as the process lives)
        if hasattr(stream := getattr(sys, name), "reconfigure"):  # what stands in for a terminal may not have it
            stream.reconfigure(errors="replace")  # a terminal may lack a character, such as ░
    warnings.formatwarning = lambda message, *_, **__: f"{program}: {message}\n"  # without a line of the source
    try:
        result = function(args)
        if rank() == 0:
            print(json.dumps(result))
        sys.stdout.flush()
        return 0
    except BrokenPipeError:  # whoever read the output, such as head, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for what Python writes when it ends
        return 141  # as the shell says of SIGPIPE
    except Refused as error:
        code, said = 2, str(error)
    except (MemoryError, RuntimeError) as error:
        # on a CPU, torch reports lost memory as a plain RuntimeError
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        first_line = (str(error) or "the system gives no details").splitlines()[0].rstrip(".")
        code, said = 2, f"out of memory ({first_line}); lower {smaller}."
    except OSError as error:  # a full disk, a file or folder that may not be read or written
        where = f": {error.filename}" if error.filename else ""
        code, said = 2, f"{error.strerror or error}{where}. {kept()}"
    except KeyboardInterrupt:
        code, said = 130, f"interrupted. {kept()}"
    print(f"{program}: {said.rstrip()}", file=sys.stderr)
    return code


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def launched() -> int:
    """How many processes torchrun started; other programs set a part of its variables."""
    names = {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    return int(os.environ["WORLD_SIZE"]) if names <= os.environ.keys() else 1


def start(device: torch.device) -> torch.device:
    """Join the processes that torchrun started; returns the device of this process. They exchange no tensors, and more
    processes than GPUs share these."""
    if launched() == 1 or dist.is_initialized():
        return device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        torch.cuda.set_device(device)
    # a process may wait very long for others whose share takes longer
    dist.init_process_group("gloo", timeout=timedelta(days=7))
    atexit.register(lambda: dist.is_initialized() and dist.destroy_process_group())
    return device


def gather(value) -> list:
    """Every process's value, in the order of ranks, on every process."""
    if world() == 1:
        return [value]
    values = [None] * world()
    dist.all_gather_object(values, value)
    return values


class Bar(tqdm):
    """tqdm's bar on standard error, which the first process alone shows. Where that is no terminal, it is a line every
    30 s of plain text without control characters, so that a log stays short and readable."""

    SECONDS = 30

    def __init__(self, *args, **options):
        self.due = time.monotonic() + self.SECONDS
        super().__init__(*args, **{"file": sys.stderr, "disable": rank() > 0} | options)

    def display(self, msg=None, pos=None):
        if self.fp.isatty():
            return super().display(msg, pos)
        # `close` disables the bar, then shows it and ends the line, or hides it behind msg ""
        if msg is None and (self.disable or time.monotonic() >= self.due):
            self.due = time.monotonic() + self.SECONDS
            print(self, file=self.fp, end="" if self.disable else "\n", flush=True)
        return False

    def clear(self, *args, **options):
        if self.fp.isatty():
            super().clear(*args, **options)


def watched(items, what: str):
    """The items; a bar shows how far they are once they take more than two seconds."""
    return Bar(items, desc=what, delay=2, leave=False)


def first(function):
    """function() runs on the first process alone; all processes get its value, or its error."""
    value = None
    if rank() == 0:
        try:
            value = function()
        except Exception as error:  # the others must not wait for a value that will not come
            value = error
    value = gather(value)[0]
    if isinstance(value, Exception):
        raise value
    return value


def batches(n: int, at_once: int = AT_ONCE) -> list[slice]:
    """0 to n as slices of `at_once`; the last may be shorter."""
    return [slice(i, min(i + at_once, n)) for i in range(0, n, at_once)]


def free_memory(device: torch.device) -> int | None:
    """Bytes of memory that a device can still give, None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    limits = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    return min([*limits, *cgroup_free()], default=None)


def cgroup_free(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> list[int]:
    """Bytes left under each memory limit that a container or batch system sets for this process.

    Without them a run in such a place would be killed half way instead of refused. Clusters still have both versions.
    """
    try:
        groups = [line.split(":", 2)[2].lstrip("/") for line in own.read_text().splitlines()
                  if line.startswith("0::") or ":memory:" in line]
    except OSError:
        return []
    out = []
    for version, limit, used, cache in (("", "memory.max", "memory.current", "inactive_file"),
                                        ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes",
                                         "total_inactive_file")):
        for here in {root / version / group for group in ("", *groups)}:
            try:
                # the pages of files that were read count as used, but they go when memory is asked for
                kept = dict(line.split() for line in (here / "memory.stat").read_text().splitlines()).get(cache, 0)
                out.append(max(int((here / limit).read_text()) - int((here / used).read_text()) + int(kept), 0))
            except (OSError, ValueError):  # no such group, or "max": no limit
                continue
    return out


def writable(path: Path, flag: str) -> Path:
    """`path` itself, or the deepest folder above it that exists. Refused if nothing can be written there."""
    home = next(p for p in (path, *path.absolute().parents) if os.path.lexists(p))
    try:
        tempfile.TemporaryFile(dir=home).close()
    except OSError as error:
        raise Refused(f"{flag} {path}: nothing can be written to {home} ({error.strerror}); choose another.") from None
    return home


def writable_file(path: Path, flag: str) -> None:
    """Refused if no file can be written there. The folder may be missing."""
    if path.is_dir():
        raise Refused(f"{flag} {path} is a folder; give a file.")
    writable(path.parent, flag)


def pick_device(device: str) -> torch.device:
    """The device of that name; "auto" is cuda if there is one, else cpu. Refused if it is not there."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=device).item()  # a device such as "meta" exists but holds no number
    except (RuntimeError, AssertionError, ValueError):
        raise Refused(f"device {device!r} is not available here; use auto, cpu or, on a GPU, cuda.") from None
    return torch.device(device)


def pick_dtype(dtype, device: torch.device) -> torch.dtype:
    """The type of 16-bit weights, by its name (bf16, fp32) or as torch has it; None is bf16 on a GPU, fp32 on a CPU."""
    usual = torch.bfloat16 if device.type == "cuda" else torch.float32
    found = {None: usual, "bf16": torch.bfloat16, "fp32": torch.float32}.get(dtype, dtype)
    if not isinstance(found, torch.dtype) or not found.is_floating_point or found.itemsize < 2:
        raise Refused(f"dtype {dtype!r} is neither bf16 nor fp32, nor another floating-point type of 16 bits or more.")
    return found


@contextmanager
def threads_for(width: int):
    """Inside, one thread computes for a model of at most NARROW channels, unless OMP_NUM_THREADS is set.

    Threads wait for one another after every operation. On an idle machine two took 0.8 to 1.1 times as long as one to
    calibrate (`results/quickstart.md`). Beside other work they took 20 times as long.
    """
    threads = torch.get_num_threads()
    if width <= NARROW and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def synchronize(device) -> None:
    """Wait until a GPU has done what it was told to do; called before a clock is read."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_bytes(device) -> int:
    """Most bytes this process ever held, on the GPU if the run is there, else in main memory (0: unknown)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

