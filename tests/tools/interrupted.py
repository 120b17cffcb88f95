"""Calibrations that end badly, each in a forked child of one process that has torch loaded (for test_output.py).

Called with a model's folder. Reads one JSON object a line, {"argv": [...], "out": folder, ...}, with at most one of
    "after": s          SIGKILL after s seconds
    "sight": true       SIGKILL as soon as a temporary file is seen in the folder
    "event": [name, n]  SIGKILL before the n-th file operation of a kind ("open" to write, "os.rename") in the folder
    "bytes": n          killed by the kernel (SIGXFSZ) when a file is to grow beyond n bytes
    "full": n           once a shard is in place, a disk on which no file may grow beyond n bytes
    "interrupt": true   Ctrl-C (SIGINT) once a shard is in place
and answers each with one: {"code": exit code or minus the signal, "seconds": s, "error": standard error}.
"""

import json
import os
import resource
import signal
import sys
import tempfile
import threading
import time
import traceback
from contextlib import redirect_stdout
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))
import torch
from arguments import fast
from tqdm import tqdm

import calibrate


def limit_files(size: int, deadly: bool) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL if deadly else signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def watch(job: dict) -> None:
    """Python announces the files that it opens and renames: there a job is ended, or its disk becomes full."""
    kind, left = job.get("event", (None, 0))

    def hook(event, args):
        nonlocal left
        if event not in ("open", "os.rename") or not str(args[0]).startswith(job["out"]):
            return
        if event == kind and (event != "open" or set(str(args[1])) & set("wa+")):
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
        if event == "os.rename" and str(args[1]).endswith(".safetensors"):
            if "full" in job:
                limit_files(job["full"], deadly=False)
            if "interrupt" in job and any(name.endswith(".safetensors") for name in os.listdir(job["out"])):
                os.kill(os.getpid(), signal.SIGINT)

    sys.addaudithook(hook)


def child(job: dict, errors: int) -> None:
    os.dup2(errors, 2)  # a pipe: the limits on files do not hold for it
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.stdout, sys.stderr = open(1, "w"), open(2, "w")  # noqa: SIM115 (the old ones know other files)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    code = 1
    try:
        if "bytes" in job:
            limit_files(job["bytes"], deadly=True)
        watch(job)
        code = calibrate.main(job["argv"])
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def seen(folder: str) -> bool:
    try:
        return any(name.startswith(".") for name in os.listdir(folder))
    except FileNotFoundError:
        return False


def run(job: dict) -> dict:
    (read, write), start = os.pipe(), time.perf_counter()
    pid = os.fork()
    if pid == 0:
        child(job, write)
    os.close(write)
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            break
        if ("after" in job and time.perf_counter() - start > job["after"]) or ("sight" in job and seen(job["out"])):
            os.kill(pid, signal.SIGKILL)
            _, status = os.waitpid(pid, 0)
            break
        time.sleep(0 if "sight" in job else 0.001)
    with open(read, errors="replace") as errors:
        return {"code": os.waitstatus_to_exitcode(status), "seconds": time.perf_counter() - start,
                "error": errors.read()}


def warm_up(model: str) -> None:
    """What a process imports and caches on first use, done once; without threads, which a fork would lose, and without
    tqdm's lock for all processes, which a child that is killed would never give back."""
    tqdm.set_lock(threading.RLock())
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tqdm.monitor_interval = 0
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        calibrate.main(["--model", model, "--out", f"{folder}/q", "--segments", "9", "--length", "24", *fast(epochs=0)])


if __name__ == "__main__":
    warm_up(sys.argv[1])
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), flush=True)
