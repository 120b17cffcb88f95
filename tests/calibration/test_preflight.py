"""Preflight: exact bytes of the output, what is refused before anything is written, and the rehearsal of --dry-run."""

import json
import os
import shutil
import tempfile
from collections import namedtuple
from math import prod
from pathlib import Path

import pytest
import torch
from arguments import fast, quick
from safetensors import safe_open

import calibrate
import model
from calibrate import quantize_model
from calibration import preflight
from checkpoint.families import read_config
from checkpoint.folder import INDEX, Checkpoint, resolve
from checkpoint.published import SHAPES
from methods import METHODS, QuantConfig, awq, gptq, plus, settings_of, storage
from model import DiffusionLM, load_model
from runtime import processes

WIDTH = {"F32": 4, "BF16": 2, "U8": 1, "I8": 1, "I32": 4}
FIXTURES = Path(__file__).parents[1] / "fixtures"


def arguments(model, out, *more, epochs=1):
    return ["--model", str(model), "--out", str(out), "--segments", "9", "--length", "24", *fast(*more, epochs=epochs)]


def tensor_bytes(path) -> int:
    with safe_open(path, "pt") as f:
        slices = [f.get_slice(k) for k in f.keys()]  # noqa: SIM118
        return sum(prod(s.get_shape()) * WIDTH[s.get_dtype()] for s in slices)


SETTINGS = [*(("method", m) for m in sorted(METHODS)), ("set", "transform=dense"),
            ("set", "transform=none"), ("set", "tac=none"), ("set", "weights=asymmetric"),
            ("set", "head_bits=8"), ("set", "head_bits=4"), ("set", "kv_bits=4"), ("set", "tac_block=3"),
            ("wbits", "3"), ("wbits", "5")]


class TestDisk:
    @pytest.mark.parametrize(("flag", "value"), SETTINGS)
    def test_bytes_are_exact(self, flag, value, small_folder, tmp_path):
        self.compare(small_folder, tmp_path, f"--{flag}", value)

    @pytest.mark.parametrize("extra", [
        ["--method", "starquant+", "--set", "balance=dense"], ["--method", "starquant+", "--set", "balance=kronecker"],
        ["--method", "starquant+", "--set", "tac=ridge"], ["--method", "starquant+", "--set", "balance_block=16"],
        ["--method", "starquant+", "--set", "rounding=nearest"],
        ["--method", "quarot", "--set", "kv_bits=4", "--set", "softmax_bits=8"],
        ["--method", "dllmquant++", "--set", "kv_bits=4"], ["--set", "head_bits=8", "--set", "embed_bits=4"]])
    def test_bytes_are_exact_for_combinations(self, extra, small_folder, tmp_path):
        self.compare(small_folder, tmp_path, *extra)

    @pytest.mark.parametrize("extra", [[], ["--set", "head_bits=8"]])
    def test_bytes_are_exact_for_tied_heads_biases_and_grouped_queries(self, extra, small_folder, tmp_path):
        raw = json.loads((small_folder / "config.json").read_text()) | {
            "weight_tying": True, "include_qkv_bias": True, "n_kv_heads": 2}
        torch.manual_seed(0)
        DiffusionLM(read_config(raw)).save(tmp_path / "m", torch.bfloat16)
        for name in ("tokenizer.json", "training.json"):
            shutil.copy(small_folder / name, tmp_path / "m")
        self.compare(tmp_path / "m", tmp_path, *extra)

    def compare(self, model, tmp_path, *extra):
        assert calibrate.main(arguments(model, tmp_path / "q", *extra, epochs=0)) == 0
        config = QuantConfig(**json.loads((tmp_path / "q" / "starquant.json").read_text())["run"]["config"])
        *blocks, outer = storage.output_bytes(Checkpoint(model), config)
        files = sorted((tmp_path / "q").glob("*.safetensors"))
        assert [tensor_bytes(f) for f in files] == [*blocks, outer]
        assert json.loads((tmp_path / "q" / INDEX).read_text())["metadata"]["total_size"] == sum(blocks) + outer
        assert all(f.stat().st_size - n < preflight.HEADER for f, n in zip(files, [*blocks, outer], strict=True))

    def test_too_little_disk_is_named_and_nothing_is_written(self, small_folder, tmp_path, monkeypatch, capsys):
        usage = namedtuple("usage", "total used free")
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 10**5))
        assert calibrate.main(arguments(small_folder, tmp_path / "q")) == 2
        assert "GB, but" in (error := capsys.readouterr().err)
        assert "0.0001 GB left" in error
        assert error.count("\n") == 1
        assert not (tmp_path / "q").exists()


class TestMemory:
    def test_counts_the_tensors_that_are_held(self, small_folder):
        """Against the sizes of the tensors themselves, at the linear that takes most."""
        full, (S, L) = load_model(small_folder, "cpu"), (9, 24)
        block, tokens = full.blocks[0], S * L
        x = torch.zeros(tokens, 64)
        wide = torch.zeros(tokens, 192), torch.zeros(192, 64)  # y of qkv and gate_up, their weight
        held = {
            "embedding": [full.embed.weight],
            "one block": [p for p in block.parameters() if p.ndim == 2], "both streams and the next": [x, x, x],
            "fitting a linear": [x, *wide], "inputs of later linears": [x, x, torch.zeros(tokens, 96)]}  # qkv's stage
        parts = preflight.memory_bytes(full.config, tokens, 4)
        assert {k: v for k, v in parts.items() if k != "total"} == {
            k: sum(t.numel() * 4 for t in tensors) for k, tensors in held.items()}
        # the embedding with one stream, then the blocks without the embedding
        outer, rest = held.pop("embedding"), [t for tensors in held.values() for t in tensors]
        assert parts["total"] == max(sum(4 * t.numel() for t in [*outer, x]), sum(4 * t.numel() for t in rest))

        spilled = preflight.memory_bytes(full.config, tokens, 4, spilled=True)
        gone = ("both streams and the next", "inputs of later linears")
        assert all(spilled[k] == (0 if k in gone else v) for k, v in parts.items() if k != "total")
        assert spilled["total"] == max(sum(4 * t.numel() for t in [*outer, x]),
                                       sum(v for k, v in spilled.items() if k not in ("total", "embedding")))

        # GPTQ's second moment, its factor and the weight, and the codes: on top, at the same linear
        more = preflight.memory_bytes(full.config, tokens, 4, gptq=True)
        assert more.pop("GPTQ") == 8 * (2 * 64 * 64 + 192 * 64) + 192 * 64
        assert {**more, "total": 0} == {**parts, "total": 0}
        few = preflight.memory_bytes(full.config, 1, 4, gptq=True)  # of few tokens at the widest, of 96 channels
        assert few["GPTQ"] == 8 * (2 * 96 * 96 + 64 * 96) + 64 * 96

    @pytest.mark.parametrize("method", sorted(METHODS))
    def test_methods_that_round_by_gptq_are_known(self, method, small_folder, monkeypatch):
        called, full = [], load_model(small_folder, "cpu")
        for module in (awq, plus, gptq):
            monkeypatch.setattr(module, "gptq", lambda *a, gptq=gptq.gptq: (called.append(a), gptq(*a))[1])
        tokens = torch.randint(1000, (9, 24), generator=torch.Generator().manual_seed(0))
        quantize_model(full, tokens, quick(method, epochs=0))
        assert bool(called) == METHODS[method].settings.second_order

    @pytest.mark.parametrize("gptq", [False, True])
    def test_llada_8b_streams_in_less_than_its_weights(self, gptq):
        c = read_config(SHAPES["llada-8b"])
        parts = preflight.memory_bytes(c, tokens := 128 * 256, 2, gptq=gptq)
        assert parts["total"] < 0.6 * 2 * 8_015_581_184
        # gate_up takes most: down's inputs, which wait for it, and its own inputs, outputs and weight in fp32
        assert parts["inputs of later linears"] == 2 * tokens * 12288
        assert parts["fitting a linear"] == 4 * (tokens * (4096 + 24576) + 4096 * 24576)

    def test_too_little_memory_is_named(self, small_folder, tmp_path, monkeypatch, capsys):
        monkeypatch.setattr(preflight, "free_memory", lambda device: 10**5)
        assert calibrate.main(arguments(small_folder, tmp_path / "q")) == 2
        assert "0.0001 GB are free; lower --segments or --length" in capsys.readouterr().err
        assert not (tmp_path / "q").exists()

    @pytest.mark.parametrize(("method", "tokens", "warned"), [
        ("starquant+", 1151, True), ("starquant+", 1152, False), ("rtn", 1, False)])
    def test_too_few_tokens_are_named(self, method, tokens, warned, capsys):
        preflight.warn_of_few_tokens(Checkpoint(resolve("tiny")).config, tokens, QuantConfig(method))
        line = "1151 tokens are fewer than two for each of the 576 channels"
        assert (line in capsys.readouterr().err) == warned

    def test_this_machine_has_memory(self):
        free = processes.free_memory(torch.device("cpu"))
        assert free is None or 10**7 < free < 10**15

    @pytest.mark.parametrize(("version", "names"), [
        (2, ("memory.max", "memory.current", "inactive_file", "0::/job/7")),
        (1, ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file",
             "4:memory:/job/7"))])
    def test_a_container_s_limit_counts_less_what_can_be_dropped(self, tmp_path, version, names):
        limit, used, cache, line = names
        root, own = tmp_path / "cgroup", tmp_path / "self"
        own.write_text(f"9:name=systemd:/\n{line}\n")
        assert processes.cgroup_free(root, own) == []
        for place, most in (("", "max" if version == 2 else str(10**9)), ("job/7", "5000")):
            for name, text in ((limit, most), (used, "4000")):
                folder, _, file = name.rpartition("/")
                (root / folder / place).mkdir(parents=True, exist_ok=True)
                (root / folder / place / file).write_text(text + "\n")
                (root / folder / place / "memory.stat").write_text(f"anon 1\n{cache} 300\n")
        assert min(processes.cgroup_free(root, own)) == 1300

    def test_a_system_that_does_not_say_is_not_refused(self, small_folder, tmp_path, monkeypatch):
        monkeypatch.setattr(preflight, "free_memory", lambda device: None)
        assert calibrate.main(arguments(small_folder, tmp_path / "q", "--dry-run")) == 0


class TestPermission:
    def test_a_folder_that_may_not_be_written(self, small_folder, tmp_path, monkeypatch, capsys):
        def forbidden(dir):
            raise PermissionError(13, "Permission denied", str(dir))

        monkeypatch.setattr(tempfile, "TemporaryFile", forbidden)  # a superuser may write everywhere
        assert calibrate.main(arguments(small_folder, tmp_path / "deep" / "q")) == 2
        assert f"nothing can be written to {tmp_path} (Permission denied)" in capsys.readouterr().err
        assert not list(tmp_path.iterdir())

    def test_a_path_below_a_file(self, small_folder, tmp_path, capsys):
        (tmp_path / "file").write_text("")
        assert calibrate.main(arguments(small_folder, tmp_path / "file" / "q")) == 2
        assert f"nothing can be written to {tmp_path / 'file'} (Not a directory)" in capsys.readouterr().err


class TestDryRun:
    @pytest.mark.parametrize("method", sorted(METHODS))
    def test_rehearses_a_step_and_writes_nothing(self, method, small_folder, tmp_path, capsys, monkeypatch):
        fits = []
        fit, trained = METHODS[method].fit, "epochs" in settings_of(method)

        def record(*args):
            fits.append((tuple(args[2].x.shape), *([args[3].epochs] if trained else [])))
            return fit(*args)

        monkeypatch.setitem(METHODS, method, METHODS[method]._replace(fit=record))
        before = {p: p.read_bytes() for p in small_folder.iterdir()}
        assert calibrate.main(arguments(small_folder, tmp_path / "q", "--method", method, "--dry-run")) == 0
        assert not list(tmp_path.iterdir())
        assert {p: p.read_bytes() for p in small_folder.iterdir()} == before
        text, result = capsys.readouterr().out.rstrip().rsplit("\n", 1)
        step = json.loads(result)["step"]
        # 5 segments: one batch of 4 and one held out; methods without training are fitted whole
        assert fits == ([((5, 24, 64), 0)] * 2 + [((5, 24, 64), 1)] if trained else [((4, 24, 64),), ((9, 24, 64),)])
        assert (step["steps_per_linear"] > 0) == trained
        assert (step["loss_after"] is not None) == trained
        assert 0 < step["error"] < 1
        assert step["estimated_seconds"] > 0
        assert f"Quantized to W4A4 by {method}: qkv, out, gate_up, down of 2 blocks, 8 linears." in text
        assert "Stays in 16 bit: norms, model.transformer.wte, model.transformer.ff_out." in text

    def test_the_plan_is_what_a_run_writes(self, small_folder, tmp_path, capsys):
        assert calibrate.main(arguments(small_folder, tmp_path / "q", "--dry-run")) == 0
        plan = json.loads(capsys.readouterr().out.splitlines()[-1])["plan"]
        assert calibrate.main(arguments(small_folder, tmp_path / "q")) == 0
        files = sorted((tmp_path / "q").glob("*.safetensors"))
        assert [tensor_bytes(f) for f in files] == [*plan["blocks"], plan["outer"]]
        assert sum(p.stat().st_size for p in (tmp_path / "q").iterdir()) <= plan["disk"]
        assert plan["model_bytes"] == tensor_bytes(small_folder / "model.safetensors")

    def test_an_existing_result_is_left_alone(self, small_folder, tmp_path, capsys):
        assert calibrate.main(arguments(small_folder, tmp_path / "q", "--method", "rtn")) == 0
        before = {p: p.read_bytes() for p in (tmp_path / "q").iterdir()}
        assert calibrate.main(arguments(small_folder, tmp_path / "q", "--dry-run")) == 2
        assert "--overwrite" in capsys.readouterr().err
        assert calibrate.main(arguments(small_folder, tmp_path / "q", "--dry-run", "--overwrite")) == 0
        assert {p: p.read_bytes() for p in (tmp_path / "q").iterdir()} == before

    def test_a_hub_model_without_network_explains_itself(self, tmp_path, monkeypatch, capsys):
        import huggingface_hub

        def no_network(*args, **options):
            raise ConnectionError("no route to host")

        monkeypatch.setattr(huggingface_hub, "snapshot_download", no_network)
        (tmp_path / "text.txt").write_text("some text")
        assert calibrate.main(["--model", "llada-8b", "--dry-run", "--out", str(tmp_path / "q"), "--data",
                               str(tmp_path / "text.txt")]) == 2
        assert capsys.readouterr().err == (
            "calibrate.py: GSAI-ML/LLaDA-8B-Base could not be downloaded (ConnectionError); download it elsewhere and "
            "give the folder instead: --model FOLDER.\n")
        assert [p.name for p in tmp_path.iterdir()] == ["text.txt"]

    def test_stress_is_not_written_either(self, small_folder, tmp_path):
        assert calibrate.main(arguments(small_folder, tmp_path / "q", "--dry-run", "--stress", "8")) == 0
        assert not list(tmp_path.iterdir())


def test_nothing_reaches_the_network_without_a_hub_id(small_folder, tmp_path, monkeypatch):
    import socket

    def refuse(*args, **options):
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert calibrate.main(arguments(small_folder, tmp_path / "q", "--method", "rtn")) == 0
    assert load_model(tmp_path / "q", "cpu").config.n_layers == 2
    assert calibrate.main(["--model", "no-such-model", "--out", str(tmp_path / "r")]) == 2


def test_every_file_may_be_read_by_whom_the_umask_allows(small_folder, tmp_path):
    before = os.umask(0o027)
    try:
        assert calibrate.main(arguments(small_folder, tmp_path / "q", "--method", "rtn")) == 0
    finally:
        os.umask(before)
    assert {p.stat().st_mode & 0o777 for p in (tmp_path / "q").iterdir()} == {0o640}


def test_the_index_lists_the_checksum_of_every_shard(small_folder, tmp_path, monkeypatch):
    assert calibrate.main(arguments(small_folder, tmp_path / "q", "--method", "rtn")) == 0
    index = json.loads((tmp_path / "q" / INDEX).read_text())
    assert set(index["metadata"]["sha256"]) == set(index["weight_map"].values())
    # checksums are looked at before tensors are
    monkeypatch.setattr(model, "load_outer", lambda *a: pytest.fail("a tensor was read"))
    shard = tmp_path / "q" / "model-00002-of-00003.safetensors"
    content = bytearray(shard.read_bytes())
    content[-5] ^= 16
    shard.write_bytes(content)
    with pytest.raises(ValueError, match=r"model-00002-of-00003.safetensors differs from its checksum"):
        load_model(tmp_path / "q", "cpu")
