"""The folder that calibration writes: a Hugging Face checkpoint, block by block, that survives interruption.

    model-0000I-of-0000N.safetensors    one shard for each block, and a last one for embedding, final norm and head
    model.safetensors.index.json        which tensor is in which shard, and the checksums of the shards
    config.json                         the source's, with `quantization_config`; beside it the tokenizer's files
    README.md                           the model card; beside it the source's LICENSE
    starquant.json                      arguments, seed, versions, checksums, losses and seconds of each block

A shard is written atomically. It carries the hash of its run and a checksum of its tensors. So the shards that exist
are the finished blocks, and `--resume` computes only the others. The index, config.json and `"complete": true` in
starquant.json come last. While a run writes, it locks the folder. The lock ends with its process.
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

from calibration.card import model_card
from checkpoint import folder as disk
from checkpoint import storage
from checkpoint.families import FUSED, NAMES, ModelConfig
from checkpoint.folder import INDEX, TOKENIZER_FILES, Checkpoint, hold
from checkpoint.loading import block_tensors, outer_tensors, stays_16_bit
from methods.rtn import quantize_outer
from model import load_block, load_outer
from runtime import processes
from runtime.processes import Refused
from tiny.tasks import knows_our_tasks

VERSION = "0.3.0"
REPORT = "starquant.json"
OURS = re.compile("|".join([r"model-\d{5}-of-\d{5}\.safetensors", r"LICENSE[\w.-]*",
                            *map(re.escape, (INDEX, REPORT, "config.json", "README.md", *TOKENIZER_FILES))]))
# what a killed run leaves: a temporary file of `write_file`, or the safetensors library's for it (.tmpAb12Cd)
LEFTOVER = re.compile(rf"\.({OURS.pattern})\.tmp|\.tmp[A-Za-z0-9]{{6}}")


def default_folder(args) -> Path:
    """out/MODEL-METHOD-wWaA, a name that the hub takes, too."""
    stressed = f"-stress{args.stress:g}" if args.stress != 1 else ""
    name = f"{disk.own_name(args.model)}{stressed}-{args.method}-w{args.wbits}a{args.abits}".replace("+", "-plus")
    return Path("out") / re.sub(r"[^\w.]+|\.{2,}", "-", name, flags=re.ASCII).strip("-.")


def survey(folder: Path, run: dict, resume: bool, overwrite: bool) -> dict:
    """The report of the run in `folder` that `resume` continues, {} for a new run. Nothing is changed.

    Raises Refused for a folder that holds anything else, or a run that differs in a file, an argument or a version,
    naming the differences. A report that is "complete" leaves nothing to do.
    """
    if os.path.lexists(folder) and not folder.is_dir():
        raise Refused(f"{folder} exists and is not a folder; choose another --out.")
    # a run killed before its first file was whole leaves temporary files at most
    if not folder.exists() or all(p.name == f".{REPORT}.tmp" for p in folder.iterdir()):
        return {}
    if not (folder / REPORT).is_file():
        raise Refused(f"{folder} exists and is not a folder of this program; choose another --out.")
    if overwrite:
        return {}
    if not resume:
        raise Refused(f"{folder} exists; add --resume to continue it or --overwrite to replace it.")
    before = disk.read_json(folder / REPORT)
    if differences := _differences(before.get("run"), run):
        raise Refused(f"cannot resume {folder}: {', '.join(differences)} now; give what it was, or --overwrite it.")
    return before


def left_by(args) -> str:
    """What an interrupted run leaves in --out, in a sentence."""
    if not args.opened:
        return f"This run wrote nothing to {args.out}."
    if disk.read_json(args.out / REPORT, {}).get("complete"):
        return f"The model in {args.out} is complete."
    again = "the same command and --resume" + " instead of --overwrite" * args.overwrite
    if any(args.out.glob("model-*.safetensors")):
        return f"Finished blocks are in {args.out}; continue with {again}."
    return f"No block was finished; begin again with {again}."


class Output:
    """A quantized checkpoint in the making: `write_block` for each block, then `finish`."""

    def __init__(self, folder: Path, source: Checkpoint, run: dict, before: dict):
        """run: `run_key`. before: what `survey` found. Raises Refused if another run writes there."""
        self.folder, self.source, self.run = folder, source, run
        self.records: dict[int, dict] = {}
        processes.first(lambda: self._open(bool(before)))

    def _open(self, resumed: bool) -> None:
        """Lock the folder and clear what a killed or replaced run left; on the first process."""
        self.folder.mkdir(parents=True, exist_ok=True)
        hold(self.folder, self)
        for path in self.folder.iterdir():  # what is not ours stays, and the report stays until a new one replaces it
            if LEFTOVER.fullmatch(path.name) or (not resumed and path.name != REPORT and OURS.fullmatch(path.name)):
                path.unlink()
        if not resumed:
            self._write_report(complete=False)

    def shard(self, i: int) -> str:
        """File of block i; i = number of blocks for the outer part."""
        return disk.shard_name(i, self.source.config.n_layers + 1)

    def write_block(self, i: int, block, record: dict) -> None:
        """The shard of block i; record: what `starquant.json` says about it."""
        tensors = self._as_in_source(block_tensors(block, i))
        timeless = {k: v for k, v in record.items() if k != "seconds"}  # the same seed gives the same bytes
        about = {"run": self.run["hash"], "record": timeless, "gates": gate_sizes(block)}
        about["sha256"] = checksum(tensors, about)
        disk.write_tensors(self.folder / self.shard(i), tensors, {"starquant": json.dumps(about)})
        self.records[i] = record

    def finished(self, i: int, device, dtype):
        """(block, record) of an earlier run, or None. Raises Refused if the shard is damaged or of another run."""
        path = self.folder / self.shard(i)
        if not path.exists():
            return None
        view = copy.copy(self.source)  # of this one shard
        view.folder, view._open = self.folder, {}
        handle = view._handle(path.name)
        view.shapes = {k: tuple(handle.get_slice(k).get_shape()) for k in handle.keys()}  # noqa: SIM118
        view.files = dict.fromkeys(view.shapes, path.name)
        try:
            about = json.loads(handle.metadata()["starquant"])
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
        outer = dict.fromkeys(sorted(storage.outer(c)))  # in 16 bit all of it comes from the source
        if config["head_bits"] < 16:
            model = load_outer(self.source, dtype=torch.bfloat16)
            outer = outer_tensors(quantize_outer(model, config["head_bits"], config["embed_bits"] or None))
        disk.write_tensors(self.folder / self.shard(c.n_layers), self._as_in_source(outer))
        self.size = disk.write_index(self.folder, c.n_layers + 1)
        for path in (*map(self.source.folder.joinpath, TOKENIZER_FILES), *self.source.folder.glob("LICENSE*")):
            if path.is_file():
                disk.write_file(self.folder / path.name, lambda temporary, path=path: shutil.copy(path, temporary))
        about = quantization_config(config, c, gate_sizes(block))
        disk.write_config(self.folder, c.raw | {"quantization_config": about})
        self.write_card()
        self._write_report(complete=True)

    def write_card(self, rows=()) -> None:
        """Write README.md; rows: the closing table."""
        disk.write_text(self.folder / "README.md", model_card(self.run, self.source.folder, self.size, rows))

    def _as_in_source(self, tensors: dict) -> dict:
        """What stays in 16 bit is taken from the source again, since the modules may hold it in another type."""
        return {name: self.source.get(name) if stays_16_bit(name) else tensor for name, tensor in tensors.items()}

    def _write_report(self, complete: bool) -> None:
        blocks = [self.records[i] for i in sorted(self.records)]
        disk.write_json(self.folder / REPORT, {"complete": complete, "run": self.run, "blocks": blocks})


def gate_sizes(block) -> dict:
    """d_m and d_u of each linear of a quantized block."""
    return {name: {"d_m": getattr(block, name).d_m, "d_u": getattr(block, name).d_u} for name in FUSED}


def quantization_config(config: dict, c: ModelConfig, gates: dict) -> dict:
    """What config.json says about a quantized model.

    config: the settings by name. c: the model's config. gates: what `gate_sizes` says of a block.
    """
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


def run_key(args, source: Checkpoint, tokens, config, dtype) -> dict:
    """What must be equal for a run to be continued: versions, type, settings, model files and calibration text.

    `model` is what the card calls the model. How it was spelled does not count.
    """
    files = processes.watched(sorted({*source.files.values(), "config.json"}), "hashing files")
    files = {file: disk.sha256(source.folder / file) for file in files}
    data = Path(args.data).name if args.data else "embedded" if knows_our_tasks(source.folder) else "winogrande"
    run = {"version": VERSION, "torch": torch.__version__, "python": platform.python_version(), "files": files,
           "config": asdict(config), "text": {"data": data, "segments": args.segments, "length": args.length,
                                              "sha256": hashlib.sha256(tokens.numpy().tobytes()).hexdigest()}}
    hashed = run | {"text": run["text"]["sha256"]}
    return {**run, "dtype": str(dtype).removeprefix("torch."),
            "model": disk.model_name(args.model) if args.stress == 1 else source.folder.name,
            "hash": hashlib.sha256(json.dumps(hashed, sort_keys=True).encode()).hexdigest()[:16]}


def _differences(before, run: dict) -> list[str]:
    """The differences, in words, between the `run` of an earlier report (any JSON value) and a `run_key`."""
    def flat(run: dict) -> dict:
        parts = [(key, run.get(key)) for key in ("version", "torch", "python", "dtype", "files", "config", "text")]
        return {k: v for key, part in parts for k, v in (part if isinstance(part, dict) else {key: part}).items()}

    old, new = flat(before if isinstance(before, dict) else {}), flat(run)
    changed = [key for key, value in new.items() if old.get(key) != value]
    if "sha256" not in changed:  # the same text, whatever it is called
        changed = [key for key in changed if key not in run["text"]]
    elif changed == ["sha256"]:
        return ["the calibration text is another"]
    return [f"{key} is another file" if key in run["files"] else f"{key} was {old.get(key)!r} and is {new[key]!r}"
            for key in changed if key != "sha256"]
