"""The folder that calibration writes: a Hugging Face checkpoint, block by block, that survives interruption.

    model-0000I-of-0000N.safetensors    one shard for each block, and a last one for embedding, final norm and head
    model.safetensors.index.json        which tensor is in which shard, and the checksums of the shards
    config.json                         the source's, with `quantization_config`; beside it the tokenizer's files
    README.md                           the model card
    starquant.json                      arguments, seed, versions, checksums, losses and seconds of each block

What survives
-------------
A shard is written atomically. It carries the hash of its run and a checksum of its tensors. So the shards that exist
are the finished blocks, and `--resume` computes only the others. The index, config.json and `"complete": true` in
starquant.json come last.
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

from checkpoint import storage
from checkpoint.families import FUSED, NAMES, ModelConfig
from checkpoint.folder import (
    INDEX,
    TOKENIZER_FILES,
    Checkpoint,
    read_json,
    sha256,
    shard_name,
    write_file,
    write_index,
    write_json,
    write_tensors,
    write_text,
)
from checkpoint.loading import block_tensors, outer_tensors, stays_16_bit
from methods.rtn import quantize_outer
from model import load_block, load_outer
from runtime.processes import Refused, watched

VERSION = "0.3.0"
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
    """A quantized checkpoint in the making: `write_block` for each block, then `finish`."""

    def __init__(self, folder: Path, source: Checkpoint, run: dict, resume: bool, overwrite: bool):
        """run: `run_key`. Raises Refused where `survey` does; clears what a killed or replaced run left."""
        self.folder, self.source, self.run = folder, source, run
        self.records: dict[int, dict] = {}
        before = survey(folder, run, resume, overwrite)
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.iterdir():  # what is not ours stays, and the state stays until a new one replaces it
            if is_leftover(path) or (not before and path.name != STATE and OURS.fullmatch(path.name)):
                path.unlink()
        if not before:
            self._write_state(complete=False)

    def shard(self, i: int) -> str:
        """File of block i; i = number of blocks for the outer part."""
        return shard_name(i, self.source.config.n_layers + 1)

    def write_block(self, i: int, block, record: dict) -> None:
        """The shard of block i; record: what `starquant.json` says about it."""
        tensors = self._as_in_source(block_tensors(block, i))
        timeless = {k: v for k, v in record.items() if k != "seconds"}  # the same seed gives the same bytes
        about = {"run": self.run["hash"], "record": timeless, "gates": gates(block)}
        about["sha256"] = checksum(tensors, about)
        write_tensors(self.folder / self.shard(i), tensors, {"starquant": json.dumps(about)})
        self.records[i] = record

    def finished(self, i: int, device, dtype):
        """(block, record) of an earlier run, or None. Raises Refused if the shard is damaged or of another run."""
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
        view.quantization = quantization_config(self.run["config"], self.source.config, about["gates"])
        self.records[i] = about["record"]
        return load_block(view, i, device, dtype), self.records[i]

    def finish(self, block) -> None:
        """The last shard, the index, the config, the tokenizer's files and the model card; `block` is any block."""
        c, config = self.source.config, self.run["config"]
        outer = dict.fromkeys(sorted(storage.outer(c)))
        if config["head_bits"] < 16:
            model = load_outer(self.source, dtype=torch.bfloat16)
            outer = outer_tensors(quantize_outer(model, config["head_bits"], config["embed_bits"] or None))
        outer = self._as_in_source(outer)
        write_tensors(self.folder / self.shard(c.n_layers), outer)
        weight_map = dict.fromkeys(outer, self.shard(c.n_layers))
        for i in range(c.n_layers):
            weight_map |= dict.fromkeys(self._shard_view(i).shapes, self.shard(i))
        size = write_index(self.folder, weight_map)
        for name in TOKENIZER_FILES:
            if (self.source.folder / name).exists():
                write_file(self.folder / name, lambda p, name=name: shutil.copy(self.source.folder / name, p))
        write_json(self.folder / "config.json",
                   c.raw | {"quantization_config": quantization_config(config, c, gates(block))})
        write_text(self.folder / "README.md", model_card(self.run, size))
        self._write_state(complete=True)

    def _as_in_source(self, tensors: dict) -> dict:
        """What stays in 16 bit is taken from the source again, since the modules may hold it in another type."""
        return {name: self.source.get(name) if stays_16_bit(name) else tensor for name, tensor in tensors.items()}

    def _shard_view(self, i: int) -> Checkpoint:
        """One finished shard, read as a checkpoint of the source's config."""
        view, file = copy.copy(self.source), self.shard(i)
        view.folder, view._open = self.folder, {}
        handle = view._handle(file)
        view.shapes = {k: tuple(handle.get_slice(k).get_shape()) for k in handle.keys()}  # noqa: SIM118
        view.files = dict.fromkeys(view.shapes, file)
        return view

    def _write_state(self, complete: bool) -> None:
        write_json(self.folder / STATE, {"complete": complete, "run": self.run,
                                         "blocks": [self.records[i] for i in sorted(self.records)]})


def gates(block) -> dict:
    """d_m and d_u of each linear of a quantized block."""
    return {name: {"d_m": getattr(block, name).d_m, "d_u": getattr(block, name).d_u} for name in FUSED}


def quantization_config(config: dict, c: ModelConfig, gates: dict) -> dict:
    """What config.json says about a quantized model: settings (by name), the model's config, `gates(block)`."""
    names, head_bits = NAMES[c.family], config["head_bits"]
    outer = {"head_bits": head_bits, "embed_bits": config["embed_bits"] or head_bits} if head_bits < 16 else {}
    return {"quant_method": "starquant", "format": "int4-packed" if config["wbits"] <= 4 else "int8", **outer,
            "method": config["method"], "weight_bits": config["wbits"], "activation_bits": config["abits"],
            "linears": gates, "ignore": [] if outer else [names.embed, names.head]}


def checksum(tensors: dict, about) -> str:
    """SHA-256 of a block's tensors, their names, types and shapes, and of what is said about them."""
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _difference(key: str, old, new) -> str:
    if isinstance(old, dict) and isinstance(new, dict):
        changed = [k for k in {**old, **new} if old.get(k) != new.get(k)]
        return f"{key} {changed[0]} was {old.get(changed[0])!r} and is {new.get(changed[0])!r} now"
    if key == "tokens":
        return "the calibration segments are others now (--segments, --length, --data, --seed)"
    return f"{key} was {old!r} and is {new!r} now"


def model_card(run: dict, size: int) -> str:
    """README.md of the folder; size: bytes of its tensors."""
    c = run["config"]
    kept = "embedding, head and norms are as in the source" if c["head_bits"] == 16 else (
        f"the embedding has {c['embed_bits'] or c['head_bits']} bits, the head {c['head_bits']}, and norms are as in "
        f"the source")
    return (f"# {run['model']}, {c['method']} W{c['wbits']}A{c['abits']}\n\nQuantized by the STaR-Quant reference "
            f"implementation {run['version']} (arXiv 2606.04945), {size / 1e6:.1f} MB.\n\n```python\nfrom model "
            f"import load_model\nmodel = load_model(\"FOLDER\")\n```\n\nAll linears of all blocks are quantized; "
            f"{kept}. Arguments, versions and losses: `starquant.json`.\n")


def run_key(name: str, source: Checkpoint, tokens, config) -> dict:
    """What must be equal for a run to be continued: versions, arguments, model file and calibration data."""
    names = sorted({*source.files.values(), "config.json"})
    files = {f: sha256(source.folder / f) for f in watched(names, "hashing files")}
    run = {"version": VERSION, "torch": torch.__version__, "python": platform.python_version(), "model": name,
           "files": files, "tokens": hashlib.sha256(tokens.numpy().tobytes()).hexdigest(), "config": asdict(config)}
    return {**run, "hash": hashlib.sha256(json.dumps(run, sort_keys=True).encode()).hexdigest()[:16]}
