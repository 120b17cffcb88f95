"""Nothing is lost: killed at any moment, interrupted, out of disk, a calibration goes on to the same bytes."""

import fcntl
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from arguments import fast

from calibration.output import quantization_config
from checkpoint.families import read_config
from checkpoint.folder import sha256
from methods import QuantConfig
from model import DiffusionLM


class Runner:
    """Real runs of calibrate.py in processes of their own, see interrupted.py."""

    def __init__(self, model):
        self.model = model
        server = Path(__file__).parents[1] / "tools" / "interrupted.py"
        self.server = subprocess.Popen([sys.executable, server, model], text=True,
                                       stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def __call__(self, out, *more, model=None, **end):
        argv = ["--model", str(model or self.model), "--out", str(out), "--segments", "9", "--length", "24",
                *fast(*more, epochs=0)]
        job = {"argv": argv, "out": str(out), **end}
        self.server.stdin.write(json.dumps(job) + "\n")
        self.server.stdin.flush()
        return json.loads(self.server.stdout.readline())


@pytest.fixture(scope="module")
def five_blocks(small_folder, tmp_path_factory):
    folder = shutil.copytree(small_folder, tmp_path_factory.mktemp("five") / "model")
    raw = json.loads((folder / "config.json").read_text()) | {"n_layers": 5}
    torch.manual_seed(0)
    DiffusionLM(read_config(raw)).save(folder, torch.bfloat16)
    return folder


@pytest.fixture(scope="module")
def calibration(five_blocks):
    runner = Runner(five_blocks)
    yield runner
    runner.server.stdin.close()
    assert runner.server.wait(timeout=60) == 0


@pytest.fixture(scope="module")
def whole(calibration, tmp_path_factory):
    """(name -> checksum of the files of an uninterrupted run, its seconds)."""
    out = tmp_path_factory.mktemp("whole") / "q"
    result = calibration(out)
    assert result["code"] == 0, result["error"]
    return checksums(out), result["seconds"]


def checksums(out) -> dict[str, str]:
    """Of everything but starquant.json, which holds seconds."""
    return {p.name: sha256(p) for p in out.iterdir() if p.name != "starquant.json"}


def visible(out) -> dict[str, str]:
    return {k: v for k, v in checksums(out).items() if not k.startswith(".")} if out.exists() else {}


def temporary(out) -> set:
    return {(p.name, p.stat().st_mtime_ns) for p in out.iterdir() if p.name[0] == "."} if out.exists() else set()


def shards(files) -> set[str]:
    return {name for name in files if name.endswith(".safetensors")}


def endings(seconds: float):
    """Ways to be killed, forever: at random times, and while files are written, synchronized and renamed."""
    rng = random.Random(0)
    while True:
        yield {"after": rng.uniform(0, 0.5 * seconds)}
        yield {"event": ("os.rename", rng.randrange(3))}
        yield {"after": rng.uniform(0, 0.5 * seconds)}
        yield {"event": ("open", rng.randrange(6))}
        yield {"sight": True}
        yield {"bytes": rng.choice((300, 2500, 100_000))}


def test_killed_twenty_times_ends_bit_identical(calibration, whole, tmp_path):
    reference, seconds = whole
    assert len(shards(reference)) == 6
    kills, while_writing, runs, before, old = 0, 0, itertools.count(), {}, set()
    out = tmp_path / str(next(runs))
    for end in endings(seconds):
        result = calibration(out, "--resume", **end)
        assert result["code"] in (0, -9, -25), result["error"]
        after = visible(out)
        assert shards(before) <= shards(after)  # no finished block is lost
        # nothing half-written under a final name
        assert {k: v for k, v in after.items() if k in reference} == {k: reference[k] for k in after}
        if result["code"]:
            kills += 1
            while_writing += bool(temporary(out) - old)
            before, old = after, temporary(out)
        state = out / "starquant.json"
        if result["code"] == 0 or (state.exists() and json.loads(state.read_text())["complete"]):  # killed at the exit
            assert checksums(out) == reference
            out, before, old = tmp_path / str(next(runs)), {}, set()
        if kills >= 20:
            break
    assert while_writing >= 5
    assert calibration(out, "--resume")["code"] == 0
    assert checksums(out) == reference  # and no temporary file is left
    print(f"{kills} kills, {while_writing} while a file was written, {next(runs)} runs completed")


def test_ctrl_c_says_how_to_go_on(calibration, whole, tmp_path):
    out = tmp_path / "q"
    result = calibration(out, interrupt=True)
    assert result["code"] == 130
    last = result["error"].strip().splitlines()[-1]
    assert last == (f"calibrate.py: interrupted. Finished blocks are in {out}; continue with the same command and "
                    f"--resume.")
    assert "Traceback" not in result["error"]
    assert calibration(out, "--resume")["code"] == 0
    assert checksums(out) == whole[0]


@pytest.mark.parametrize("size", [20_000, 100_000])
def test_a_full_disk_loses_no_finished_block(size, calibration, whole, tmp_path):
    """No room for the next block, for the last shard."""
    out = tmp_path / "q"
    result = calibration(out, full=size)
    assert result["code"] == 2, result["error"]
    last = result["error"].strip().splitlines()[-1]
    assert "File too large" in last
    assert f"Finished blocks are in {out}; continue with the same command and --resume." in last
    assert "Traceback" not in result["error"]
    assert len(shards(visible(out))) == (5 if size == 100_000 else 1)
    assert calibration(out, "--resume")["code"] == 0
    assert checksums(out) == whole[0]


def test_a_folder_written_to_by_others_stays(calibration, whole, tmp_path):
    """What a killed run left is cleaned up, files of other programs are not touched, not even by --overwrite."""
    out = tmp_path / "q"
    assert calibration(out, event=("os.rename", 3))["code"] == -9
    (out / "notes.txt").write_text("mine")
    assert any(p.name.startswith(".") for p in out.iterdir())
    assert calibration(out, "--overwrite", event=("os.rename", 1))["code"] == -9
    assert not shards(visible(out))
    assert calibration(out, "--resume")["code"] == 0
    assert (out / "notes.txt").read_text() == "mine"
    assert {k: v for k, v in checksums(out).items() if k != "notes.txt"} == whole[0]


def test_in_bf16_it_goes_on_to_the_same_bytes(calibration, tmp_path):
    """Finished blocks are read as they were computed."""
    whole, out, bf16 = tmp_path / "whole", tmp_path / "q", ("--dtype", "bf16")
    assert calibration(whole, *bf16)["code"] == 0
    assert calibration(out, *bf16, event=("os.rename", 3))["code"] == -9
    assert calibration(out, *bf16, "--resume")["code"] == 0
    assert checksums(out) == checksums(whole)


def test_the_config_names_the_format_of_the_codes(five_blocks):
    """Two codes a byte, up to 4 bits."""
    c = read_config(json.loads((five_blocks / "config.json").read_text()))
    formats = [quantization_config(asdict(QuantConfig("rtn", wbits=b)), c, {})["format"] for b in (2, 4, 5, 8)]
    assert formats == ["int4-packed", "int4-packed", "int8", "int8"]


@pytest.fixture(scope="module")
def stopped(calibration, five_blocks, tmp_path_factory):
    """A run of an own copy of the model, killed after two blocks: (model folder, output folder)."""
    base = tmp_path_factory.mktemp("stopped")
    shutil.copytree(five_blocks, base / "model")
    assert calibration(base / "q", model=base / "model", event=("os.rename", 3))["code"] == -9
    assert len(shards(visible(base / "q"))) == 2
    return base / "model", base / "q"


@pytest.mark.parametrize(("arguments", "words"), [
    (["--method", "rtn"], "method was 'starquant' and is 'rtn'"),
    (["--wbits", "3"], ": wbits was 4 and is 3 now;"),
    (["--seed", "7"], ": seed was 0 and is 7 now;"),
    (["--set", "lr=0.01"], ": lr was 0.001 and is 0.01 now;"),
    (["--length", "25", "--segments", "8"], ": segments was 9 and is 8, length was 24 and is 25 now;"),
    (["--data", "text.txt"], ": data was 'embedded' and is 'text.txt' now;"),
])
def test_other_arguments_are_refused(arguments, words, stopped, calibration):
    model, out = stopped
    before = checksums(out)
    (model / "text.txt").write_text("eggs and boxes " * 99)
    arguments = [str(model / a) if a == "text.txt" else a for a in arguments]
    result = calibration(out, "--resume", *arguments, model=model)
    assert result["code"] == 2
    assert f"cannot resume {out}: " in result["error"]
    assert words in result["error"]
    assert checksums(out) == before


@pytest.mark.parametrize(("key", "was"), [("version", "0.0.1"), ("torch", "2.0.0"), ("python", "3.9.1")])
def test_another_version_is_refused(key, was, stopped, calibration):
    model, out = stopped
    state = (out / "starquant.json").read_text()
    edited = json.loads(state)
    edited["run"][key] = was
    (out / "starquant.json").write_text(json.dumps(edited))
    result = calibration(out, "--resume", model=model)
    (out / "starquant.json").write_text(state)
    assert result["code"] == 2
    assert f"{key} was '{was}' and is '" in result["error"]


def test_another_model_file_is_refused(stopped, calibration):
    model, out = stopped
    content = bytearray((model / "model.safetensors").read_bytes())
    content[-1000] ^= 1  # the lowest bit of one weight
    (model / "model.safetensors").write_bytes(content)
    result = calibration(out, "--resume", model=model)
    content[-1000] ^= 1
    (model / "model.safetensors").write_bytes(content)
    assert result["code"] == 2
    assert f"cannot resume {out}: model.safetensors is another file now;" in result["error"]


def test_a_block_of_another_run_is_refused(stopped, calibration, tmp_path):
    """Whole as it is, but calibrated with another seed."""
    model, out = stopped
    shard = "model-00002-of-00006.safetensors"
    content = (out / shard).read_bytes()
    assert calibration(tmp_path / "q", "--seed", "7", model=model, event=("os.rename", 3))["code"] == -9
    shutil.copy(tmp_path / "q" / shard, out)
    result = calibration(out, "--resume", model=model)
    (out / shard).write_bytes(content)
    assert result["code"] == 2
    assert f"{out / shard} belongs to another run; delete it, --resume makes it anew." in result["error"]


def test_a_second_run_in_the_folder_is_refused_by_a_lock(stopped, calibration):
    """The lock is the open folder, so that a run that was killed, as this one was, leaves none behind."""
    model, out = stopped
    before = checksums(out)
    handle = os.open(out, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        for again in ("--resume", "--overwrite"):
            result = calibration(out, again, model=model)
            assert (result["code"], "another run is writing to" in result["error"]) == (2, True)
    finally:
        os.close(handle)
    assert checksums(out) == before


def test_a_damaged_finished_block_is_named_and_made_again(stopped, calibration, whole):
    model, out = stopped
    shard = out / "model-00001-of-00006.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1000] ^= 1
    shard.write_bytes(content)
    result = calibration(out, "--resume", model=model)
    assert result["code"] == 2
    assert f"{shard} differs from the checksum in it; delete it" in result["error"]
    shard.unlink()
    assert calibration(out, "--resume", model=f"{model.parent}/./model/")["code"] == 0  # the same model
    # it is finished: said, and nothing is written again
    before = checksums(out)
    result = calibration(out, "--resume", model=model)
    assert (result["code"], "is complete; there is nothing to resume." in result["error"]) == (0, True)
    assert checksums(out) == before
    # the card and the metadata name the model by its folder
    assert {visible(out)["model-00006-of-00006.safetensors"]} <= set(whole[0].values())
