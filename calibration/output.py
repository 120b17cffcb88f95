"""The folder that calibration writes: a Hugging Face checkpoint, block by block, that survives interruption.

    model-0000I-of-0000N.safetensors    one shard per block, one for what stays in 16 bit; index; config.json with
                                        `quantization_config`; tokenizer files; README.md (model card)
    starquant.json                      arguments, seed, versions, checksums, per-block losses and seconds

A shard is written atomically and carries its run's hash and a checksum of its tensors, so the shards that exist are the
finished blocks; the index of a complete folder holds the checksums of its files.
"""

import copy
import hashlib
import json
import os
import platform
import re
import shutil
from dataclasses import asdict
from pathlib import Path

import torch

from checkpoint.families import FUSED, NAMES, norm_names
from checkpoint.folder import (
    INDEX,
    TOKENIZER_FILES,
    Checkpoint,
    read_json,
    sha256,
    write_file,
    write_json,
    write_tensors,
)
from checkpoint.loading import outer_tensors
from methods.rtn import quantize_outer
from model import load_block, load_outer
from runtime.processes import Refused, watched

VERSION = "0.2.0"
STATE = "starquant.json"
OURS = re.compile("|".join([r"model-\d{5}-of-\d{5}\.safetensors",
                            *map(re.escape, (INDEX, STATE, "config.json", "README.md", *TOKENIZER_FILES))]))
LEFTOVER = re.compile(rf"\.({OURS.pattern})\.tmp|\.tmp[A-Za-z0-9]{{6}}")


def survey(folder: Path, run: dict, resume: bool, overwrite: bool) -> dict | None:
    """The state of the interrupted run that `resume` continues in `folder`, None to begin anew; changes nothing.

    Raises Refused for a folder that holds anything else, a finished run, or one that differs in a file, an
    argument or a version, naming the difference.
    """
    if os.path.lexists(folder) and not folder.is_dir():
        raise Refused(f"{folder} exists and is not a folder; choose another --out.")
    # a run killed before its first file was whole leaves temporary files at most
    if not folder.exists() or all(p.name == f".{STATE}.tmp" for p in folder.iterdir()):
        return None
    if not (folder / STATE).is_file():
        raise Refused(f"{folder} exists and is not a folder of this program; choose another --out.")
    if overwrite:
        return None
    if not resume:
        raise Refused(f"{folder} exists; add --resume to continue it or --overwrite to replace it.")
    before = read_json(folder / STATE)
    if before.get("complete"):
        raise Refused(f"{folder} is complete; there is nothing to resume.")
    for key, value in run.items():
        old = before["run"].get(key) if isinstance(before.get("run"), dict) else None
        if old != value:
            raise Refused(f"cannot resume {folder}: {_difference(key, old, value)}.")
    return before


def is_leftover(path: Path) -> bool:
    """A temporary file that a killed run left: `write_file`'s, or the safetensors library's for it (.tmpAb12Cd)."""
    return LEFTOVER.fullmatch(path.name) is not None


class Output:
    """A quantized checkpoint written block by block; what is there after an interruption is where --resume goes on.

    One shard per block and one for what stays in 16 bit, each written atomically and marked with the run's hash;
    index, config and `"complete": true` come last.
    """

    def __init__(self, folder: Path, source: Checkpoint, run: dict, resume: bool, overwrite: bool):
        self.folder, self.source, self.run = folder, source, run
        self.records: dict[int, dict] = {}
        self.shards = source.config.n_layers + 1
        before = survey(folder, run, resume, overwrite)
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.iterdir():  # what is not ours stays, and the state stays until a new one replaces it
            if is_leftover(path) or (not before and path.name != STATE and OURS.fullmatch(path.name)):
                path.unlink()
        if not before:
            self._write_state(complete=False)

    def shard(self, i: int) -> str:
        return f"model-{i + 1:05d}-of-{self.shards:05d}.safetensors"

    def write_block(self, i: int, block, record: dict) -> None:
        names = NAMES[self.source.config.family]
        prefix = names.block.format(i)
        kept = [f"{prefix}.{n}.weight" for n in norm_names(self.source.config).values()]
        tensors = {n: self.source.get(n) for n in kept}
        for part in (*FUSED, "tac", *(["softmax_value"] if block.softmax_value is not None else [])):
            tensors |= {f"{prefix}.{part}.{k}": v for k, v in getattr(block, part).state_dict().items()}
        timeless = {k: v for k, v in record.items() if k != "seconds"}  # the same seed gives the same bytes
        about = {"run": self.run["hash"], "record": timeless, "gates": _gates(block)}
        about["sha256"] = checksum(tensors, about)
        write_tensors(self.folder / self.shard(i), tensors, {"starquant": json.dumps(about)})
        self.records[i] = record

    def finished(self, i: int, device, dtype):
        """(block, record) of an earlier run, or None."""
        path = self.folder / self.shard(i)
        if not path.exists():
            return None
        view = self._shard_view(i)
        try:
            about = json.loads(view.metadata(path.name)["starquant"])
            found = about.pop("sha256")
        except (AttributeError, KeyError, TypeError, ValueError):
            about = found = None
        if found != checksum({n: view.get(n) for n in view.shapes}, about):
            raise Refused(f"{path} differs from the checksum in it; delete it, --resume makes it anew.")
        if about["run"] != self.run["hash"]:
            raise Refused(f"{path} belongs to another run; delete it, --resume makes it anew.")
        view.quantization, self.records[i] = self._quantization(about["gates"]), about["record"]
        return load_block(view, i, device, dtype), self.records[i]

    def _shard_view(self, i: int) -> Checkpoint:
        """One finished shard, read as a checkpoint of the source's config."""
        view, file = copy.copy(self.source), self.shard(i)
        view.folder, view._open = self.folder, {}
        handle = view._handle(file)
        view.shapes = {k: tuple(handle.get_slice(k).get_shape()) for k in handle.keys()}  # noqa: SIM118
        view.files = dict.fromkeys(view.shapes, file)
        return view

    def _quantization(self, gates: dict) -> dict:
        config, names = self.run["config"], NAMES[self.source.config.family]
        outer = {"head_bits": config["head_bits"], "embed_bits": config["embed_bits"] or config["head_bits"]}
        return {"quant_method": "starquant", "format": "int4-packed" if config["wbits"] <= 4 else "int8",
                **(outer if config["head_bits"] < 16 else {}),
                "method": config["method"], "weight_bits": config["wbits"], "activation_bits": config["abits"],
                "linears": gates, "ignore": [names.embed, names.head] if config["head_bits"] == 16 else []}

    def finish(self, block) -> None:
        """What stays in 16 bit, the index, the config, the tokenizer files and the model card."""
        names, c = NAMES[self.source.config.family], self.source.config
        outer = {f"{n}.weight" for n in (names.embed, names.final_norm, *([] if c.tied else [names.head]))}
        outer, bits = {n: self.source.get(n) for n in sorted(outer)}, self.run["config"]["head_bits"]
        if bits < 16:
            embed_bits = self.run["config"]["embed_bits"] or None
            outer = outer_tensors(quantize_outer(load_outer(self.source, dtype=torch.bfloat16), bits, embed_bits))
        write_tensors(self.folder / self.shard(c.n_layers), outer)
        weight_map = dict.fromkeys(outer, self.shard(c.n_layers))
        for i in range(c.n_layers):
            weight_map |= dict.fromkeys(self._shard_view(i).shapes, self.shard(i))
        size = sum(tensor_bytes(self.folder / self.shard(i)) for i in range(self.shards))
        sums = {self.shard(i): sha256(self.folder / self.shard(i)) for i in range(self.shards)}
        write_json(self.folder / INDEX, {"metadata": {"total_size": size, "sha256": sums}, "weight_map": weight_map})
        for name in TOKENIZER_FILES:
            if (self.source.folder / name).exists():
                write_file(self.folder / name, lambda p, name=name: shutil.copy(self.source.folder / name, p))
        write_json(self.folder / "config.json", {**c.raw, "quantization_config": self._quantization(_gates(block))})
        write_file(self.folder / "README.md", lambda p: p.write_text(model_card(self.run, size)))
        self._write_state(complete=True)

    def _write_state(self, complete: bool) -> None:
        write_json(self.folder / STATE, {"complete": complete, "run": self.run,
                                         "blocks": [self.records[i] for i in sorted(self.records)]})


def tensor_bytes(path: Path) -> int:
    """Bytes of the tensors in a safetensors file, as Hugging Face counts them: without its header."""
    with open(path, "rb") as file:
        return path.stat().st_size - 8 - int.from_bytes(file.read(8), "little")


def checksum(tensors: dict, about) -> str:
    """SHA-256 of a block's tensors, their names, types and shapes, and of what is said about them."""
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _gates(block) -> dict:
    return {name: {"d_m": getattr(block, name).d_m, "d_u": getattr(block, name).d_u} for name in FUSED}


def _difference(key: str, old, new) -> str:
    if isinstance(old, dict) and isinstance(new, dict):
        changed = [k for k in {**old, **new} if old.get(k) != new.get(k)]
        return f"{key} {changed[0]} was {old.get(changed[0])!r} and is {new.get(changed[0])!r} now"
    return f"{key} was {old!r} and is {new!r} now"


def model_card(run: dict, size: int) -> str:
    c = run["config"]
    return (f"# {run['model']}, {c['method']} W{c['wbits']}A{c['abits']}\n\nQuantized by the STaR-Quant reference "
            f"implementation {run['version']} (arXiv 2606.04945), {size / 1e6:.1f} MB.\n\n```python\nfrom model import "
            f"load_model\nmodel = load_model(\"FOLDER\")\n```\n\nAll linears of all blocks are quantized; embedding, "
            f"head and norms are as in the source. Arguments, versions and losses: `starquant.json`.\n")


def run_key(name: str, source: Checkpoint, tokens, config) -> dict:
    """What must be equal for a run to be continued: versions, arguments, model file and calibration data."""
    names = sorted({*source.files.values(), "config.json"})
    files = {f: sha256(source.folder / f) for f in watched(names, "hashing files")}
    run = {"version": VERSION, "torch": torch.__version__, "python": platform.python_version(), "model": name,
           "files": files, "tokens": hashlib.sha256(tokens.numpy().tobytes()).hexdigest(), "config": asdict(config)}
    return {**run, "hash": hashlib.sha256(json.dumps(run, sort_keys=True).encode()).hexdigest()[:16]}
