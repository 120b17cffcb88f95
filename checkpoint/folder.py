"""Checkpoint folders: finding them, reading safetensors tensor by tensor, writing atomically.

A folder holds `config.json` and either `model.safetensors` or shards with `model.safetensors.index.json`. Names, shapes
and types come from the headers, so a wrong or truncated file is named before any work starts. If the index holds
checksums, as ours does, a flipped bit is named, too. Pickled weights are never opened.
"""

import hashlib
import json
import os
import socket
import warnings
import weakref
from functools import cache
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from checkpoint.families import ALIASES, NAMES, READERS, ModelConfig, read_config
from runtime.processes import Refused, home_path

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
                   "vocab.json", "merges.txt", "generation_config.json", "chat_template.jinja", "training.json")
ABOUT = ("README.md", "LICENSE*")  # what the owner of a model says about it


def hub_id(name_or_path: str) -> str | None:
    """The id to download for an alias or hub id, None for the embedded model and for a folder."""
    path = home_path(name_or_path)
    if name_or_path == "tiny" or path.is_dir():
        return None
    name = ALIASES.get(name_or_path, name_or_path)
    if name.count("/") != 1 or path.exists() or name.startswith((".", "/", "~")):
        known = ", ".join(["tiny", *ALIASES])
        raise Refused(f"model {name_or_path!r} is neither a folder, a hub id (owner/name), nor one of {known}.")
    return name


def resolve(name_or_path: str) -> Path:
    """The local folder of an alias, a folder or a hub id. Only a hub id uses the network; finished files are kept."""
    name = hub_id(name_or_path)
    if name is None:
        tiny = Path(__file__).parent.parent / "tiny" / "weights"
        return tiny if name_or_path == "tiny" else home_path(name_or_path)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=["*.safetensors", "*.json", "*.txt", "*.jinja", *ABOUT],
                                      local_files_only=offline()))
    except Exception as error:  # the library has many types for a lost network, a missing permission, an unknown id
        here = "" if name_or_path in ALIASES else f"there is no folder {name_or_path} here, and "
        raise Refused(f"{here}{name} could not be downloaded ({type(error).__name__}); download it elsewhere and give "
                      f"the folder instead: --model FOLDER.") from None


def own_name(name_or_path: str) -> str:
    """The last part of a model's name or path: "M" for ./M/, and for "." inside of M."""
    return Path(os.path.abspath(home_path(name_or_path))).name


def model_name(name_or_path: str) -> str:
    """What a model is called, however it was spelled: its hub id, "tiny", or the folder's own name."""
    return own_name(name_or_path) if home_path(name_or_path).is_dir() else ALIASES.get(name_or_path, name_or_path)


@cache
def offline() -> bool:
    """Whether the hub cannot be reached. It is asked once, for five seconds at most; the library would ask five times.

    Behind a proxy the hub is taken to be there. Offline, what was downloaded before still serves.
    """
    from huggingface_hub.constants import ENDPOINT

    url = urlsplit(ENDPOINT)
    try:
        if not getproxies():
            socket.create_connection((url.hostname, url.port or {"http": 80}.get(url.scheme, 443)), timeout=5).close()
    except OSError:
        return True
    return False


def read_json(path: Path, absent: dict | None = None) -> dict:
    """The JSON object in a file. `absent`, if given, stands for a missing file. Anything else is Refused."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        if absent is not None:
            return absent
        if (path.parent / "starquant.json").is_file():
            raise Refused(f"{path.parent} is unfinished; run the same calibrate.py command with --resume.") from None
        raise Refused(f"{path} does not exist; give the folder of a checkpoint, or the name of a model.") from None
    except OSError as error:
        raise Refused(f"{path} cannot be read ({error.strerror}).") from None
    except (ValueError, RecursionError) as error:
        raise Refused(f"{path} cannot be read as JSON ({error}).") from None
    if not isinstance(value, dict):
        raise Refused(f"{path} holds no JSON object.")
    return value


def json_lines(*files: Path):
    """The objects in files of one JSON object a line; any other, as an interruption leaves it, is left out."""
    for line in (line for file in files if file.exists() for line in file.read_bytes().split(b"\n")):
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            yield value


def added_tokens(folder: Path) -> dict[int, dict]:
    """The tokens that the tokenizer's small files add to its vocabulary: id -> {content, special, ...}."""
    try:
        out = {i: {"content": t} for t, i in read_json(folder / "added_tokens.json", {}).items()}
        listed = read_json(folder / "tokenizer_config.json", {}).get("added_tokens_decoder") or {}
        out |= {int(i): dict(t) for i, t in listed.items()}
        if not all(isinstance(i, int) and isinstance(t["content"], str) for i, t in out.items()):
            raise TypeError("an id is no number or a token no text")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise Refused(f"{folder}: the tokenizer's added tokens cannot be read ({error}).") from None
    return out


def mask_token_id(folder: Path) -> int:
    """Id of the mask token from the tokenizer's files, where dLLM's Qwen models keep it instead of in config.json."""
    files = ("tokenizer_config.json", "special_tokens_map.json")
    text = next(filter(None, (read_json(folder / file, {}).get("mask_token") for file in files)), "<|mask|>")
    text = text.get("content") if isinstance(text, dict) else text
    whole = read_json(folder / "tokenizer.json", {}).get("added_tokens") or []
    listed = [(t.get("id"), t) for t in (whole if isinstance(whole, list) else []) if isinstance(t, dict)]
    ids = [i for i, t in (*added_tokens(folder).items(), *listed) if t.get("content") == text]
    if not ids:
        raise Refused(f"{folder} has no mask token: config.json has no mask_token_id, and tokenizer_config.json, "
                      f"added_tokens.json and tokenizer.json list no {text!r}.")
    return ids[0]


def write_file(path: Path, write) -> None:
    """Call write(temporary path), flush it to disk, and only then give it its final name.

    A device or a pipe is written to as it is: /dev/null would be a file from then on, for all programs.
    """
    if path.absolute().parent == Path("/dev") or (path.exists() and not path.is_file()):
        return write(path)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb+") as f:
            os.fsync(f.fileno())
        os.umask(mask := os.umask(0))
        os.chmod(temporary, 0o666 & ~mask)  # the safetensors library makes files that only their owner may read
        os.replace(temporary, path)
    except OSError as error:
        error.filename = error.filename or str(path)  # a full disk does not say where
        raise
    finally:
        temporary.unlink(missing_ok=True)


def hold(folder: Path, owner) -> None:
    """Lock the folder while `owner` and the process live; Refused if another run has it."""
    try:
        import fcntl
    except ImportError:  # Windows
        return
    handle = os.open(folder, os.O_RDONLY)
    weakref.finalize(owner, os.close, handle)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise Refused(f"another run is writing to {folder}; wait for it or choose another --out.") from None
    except OSError:  # some network file systems lock no folder
        pass


def write_json(path: Path, value, indent: int = 2) -> None:
    write_text(path, json.dumps(value, indent=indent) + "\n")


def write_config(folder: Path, raw: dict) -> None:
    """config.json, without `auto_map`: it names files with code, which are not copied."""
    write_json(folder / "config.json", {k: v for k, v in raw.items() if k != "auto_map"})


def write_text(path: Path, text: str) -> None:
    write_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_tensors(path: Path, tensors: dict, metadata: dict | None = None) -> None:
    """One safetensors file. Tensors are copied to contiguous CPU memory first.

    `metadata` must have a single key. The library writes several in random order, but equal runs must give equal bytes.
    """
    tensors = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    try:
        write_file(path, lambda p: save_file(tensors, p, metadata or {"format": "pt"}))
    except SafetensorError as error:  # the library's name for a full disk
        raise OSError(f"{path} cannot be written ({error})") from None


def shard_name(i: int, shards: int) -> str:
    """File of the i-th of all shards, counted from 0."""
    return f"model-{i + 1:05d}-of-{shards:05d}.safetensors"


def write_index(folder: Path, shards: int, checksums: bool = True) -> int:
    """The index over the shards in a folder, from their headers; returns the bytes of all tensors.

    With checksums, whoever opens the folder later compares the shards with them.
    """
    files = [shard_name(i, shards) for i in range(shards)]
    weight_map, size = {}, 0
    for file in files:
        with open(folder / file, "rb") as shard:
            header = shard.read(int.from_bytes(shard.read(8), "little"))
        weight_map |= {name: file for name in sorted(json.loads(header)) if name != "__metadata__"}
        size += (folder / file).stat().st_size - 8 - len(header)
    sums = {"sha256": {file: sha256(folder / file) for file in files}} if checksums else {}
    write_json(folder / INDEX, {"metadata": {"total_size": size, **sums}, "weight_map": weight_map})
    return size


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while part := f.read(2**20):
            digest.update(part)
    return digest.hexdigest()


class Checkpoint:
    """Read access to a folder, whose headers are checked when it is opened.

    config: what config.json says. quantization: its quantization_config, None for a 16-bit model. shapes, dtypes and
    files: of every tensor by name. stored: its name in the file, where that is another one. Raises Refused with one
    sentence about what is wrong.
    """

    def __init__(self, folder):
        self.folder = Path(folder)
        raw = read_json(self.folder / "config.json")
        if raw.get("mask_token_id") is None and raw.get("model_type") in READERS:
            raw["mask_token_id"] = mask_token_id(self.folder)
        self.config: ModelConfig = read_config(raw)
        q = self.quantization = raw.get("quantization_config") or None
        if q and not (isinstance(q, dict) and {"linears", "weight_bits", "activation_bits"} <= q.keys()):
            method = q.get("quant_method") if isinstance(q, dict) else q
            raise Refused(f"{self.folder} was quantized by another tool (quant_method {method!r}); give the 16-bit "
                          f"model instead.")
        if "bd3lm" in str(self.folder).lower():
            warnings.warn(f"{self.folder} is called a block-diffusion model (BD3LM), which config.json cannot tell; "
                          f"here every token attends to all others, as in its MDLM sibling.", stacklevel=2)
        self._open, self.shapes, self.dtypes, self.stored = {}, {}, {}, {}
        self.files = self._files()
        for file in sorted(set(self.files.values())):
            handle = self._handle(file)
            for name in handle.keys():  # noqa: SIM118 (the handle is no dict)
                if self.files.get(name) != file:
                    raise Refused(f"{self.folder / file} holds {name!r}, which {INDEX} does not place there.")
                view = handle.get_slice(name)
                self.shapes[name], self.dtypes[name] = tuple(view.get_shape()), view.get_dtype()
        missing = sorted(set(self.files) - set(self.shapes))
        if missing:
            raise Refused(f"{self.folder}: {INDEX} lists {missing[0]!r} (and {len(missing) - 1} more), but its "
                          f"shard does not hold it.")
        names = NAMES[self.config.family]
        embed, head = f"{names.embed}.weight", f"{names.head}.weight"
        if self.config.tied and embed not in self.shapes and head in self.shapes:  # the head's tensor stands for both
            self.stored[embed] = head
            for values in (self.files, self.shapes, self.dtypes):
                values[embed] = values.pop(head)

    def _files(self) -> dict[str, str]:
        """{tensor: file}, from the index if there is one. A path out of the folder is refused."""
        folder, index, single = self.folder, self.folder / INDEX, (self.folder / SINGLE).is_file()
        if index.exists() and single:
            raise Refused(f"{folder} holds both {SINGLE} and {INDEX}, which may be two models; move one of them away.")
        if single:
            return dict.fromkeys(self._handle(SINGLE).keys(), SINGLE)
        if not index.exists():
            hint = " (pickled weights are never loaded)" if any(folder.glob("*.bin")) else ""
            raise Refused(f"{folder} holds neither {SINGLE} nor {INDEX}{hint}.")
        said = read_json(index)
        files, metadata = said.get("weight_map"), said.get("metadata")
        if not isinstance(files, dict) or not files or not all(isinstance(f, str) for f in files.values()):
            raise Refused(f"{index} has no usable weight_map.")
        shards = set(files.values())
        bad = [f for f in files.values() if not f.isprintable() or Path(f).name != f or not f.endswith(".safetensors")]
        if bad:
            raise Refused(f"{index} names {bad[0]!r}, which is not a safetensors file in this folder.")
        missing = sorted(f for f in shards if not (folder / f).is_file())
        if missing:
            raise Refused(f"{folder} lacks {len(missing)} of {len(shards)} shards that {INDEX} lists: "
                          f"{', '.join(missing)}.")
        stray = sorted({p.name for p in folder.glob("model-*-of-*.safetensors")} - shards)
        if stray:
            raise Refused(f"{folder} holds {stray[0]}, which {INDEX} does not list; it belongs to another model.")
        sums = metadata.get("sha256") if isinstance(metadata, dict) else None
        for file, digest in (sums if isinstance(sums, dict) else {}).items():
            if file in shards and sha256(folder / file) != digest:
                raise Refused(f"{folder / file} differs from its checksum in {INDEX}; copy or make it again.")
        return files

    def _handle(self, file: str):
        if file not in self._open:
            try:
                # one at a time: the pages of a mapped file count as the process's memory while it is open
                self._open = {file: safe_open(self.folder / file, framework="pt")}
            except (SafetensorError, OSError) as error:
                if not os.access(self.folder / file, os.R_OK):
                    raise Refused(f"{self.folder / file} may not be read (permission denied).") from None
                raise Refused(f"{self.folder / file} is not a whole safetensors file ({error}).") from None
        return self._open[file]

    def get(self, name: str) -> torch.Tensor:
        """One tensor; Refused if it holds NaN or Inf."""
        tensor = self._handle(self.files[name]).get_tensor(self.stored.get(name, name))
        # the extremes of a tensor with NaN or Inf are NaN or Inf; finding them is twenty times as fast as counting
        if tensor.is_floating_point() and tensor.numel() and not torch.isfinite(torch.stack(tensor.aminmax())).all():
            # in pieces, because the mask of a whole embedding would take half as much memory again
            bad = sum(int((~torch.isfinite(part)).sum()) for part in tensor.split(4096))
            raise Refused(f"{self.folder / self.files[name]}: tensor {name!r} holds {bad} NaN or Inf.")
        return tensor
