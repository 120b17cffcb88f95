"""Spoilt folders: one sentence that names the thing, exit code 2, no traceback, nothing written, nothing executed.

Each case is (what, how a good folder is spoilt, words that the sentence must hold). MODEL in arguments stands for the
spoilt copy.
"""

import json
import math
import pickle
import shutil
import struct

import pytest
import torch
from refusals import ASK, refused
from safetensors.torch import load_file, save_file

import calibrate
import evaluate
from checkpoint.folder import INDEX

WEIGHTS, CONFIG = "model.safetensors", "config.json"
EMBED, NORM = "model.transformer.wte.weight", "model.transformer.ln_f.weight"
QKV, DOWN = "model.transformer.blocks.0.qkv", "model.transformer.blocks.1.ff_out.weight"


# ---- ways to spoil a folder ------------------------------------------------------------------------------------------


class Evil:
    """Writes a file when it is unpickled."""

    def __reduce__(self):
        return exec, ("open('unpickled', 'w').write('')",)


def text(name, content):
    return lambda folder: (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def remove(name):
    return lambda folder: (folder / name).unlink()


def cut(name, n):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:n])


def flip(name, at, bit=1):
    def spoil(folder):
        content = bytearray((folder / name).read_bytes())
        content[at] ^= bit
        (folder / name).write_bytes(content)
    return spoil


def keys(name=CONFIG, **changes):
    """Change top-level keys of a JSON file; ... removes one."""
    def spoil(folder):
        raw = {k: v for k, v in (json.loads((folder / name).read_text()) | changes).items() if v is not ...}
        (folder / name).write_text(json.dumps(raw))
    return spoil


def quantization(**changes):
    def spoil(folder):
        raw = json.loads((folder / CONFIG).read_text())
        raw["quantization_config"] = {k: v for k, v in (raw["quantization_config"] | changes).items() if v is not ...}
        (folder / CONFIG).write_text(json.dumps(raw))
    return spoil


def tensors(change, name=WEIGHTS):
    """Change the dictionary of tensors of a safetensors file, and forget its checksum."""
    def spoil(folder):
        values = load_file(folder / name)
        change(values)
        save_file(values, folder / name, {"format": "pt"})
        if (folder / INDEX).exists():
            index = json.loads((folder / INDEX).read_text())
            elsewhere = {k: v for k, v in index["weight_map"].items() if v != name}
            (folder / INDEX).write_text(json.dumps({"weight_map": elsewhere | dict.fromkeys(values, name)}))
    return spoil


def header(change):
    """Change the JSON header of the weights, leaving the data as they are."""
    def spoil(folder):
        content = (folder / WEIGHTS).read_bytes()
        size = struct.unpack("<Q", content[:8])[0]
        head = json.loads(content[8 : 8 + size])
        change(head)
        head = json.dumps(head).encode()
        (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(head)) + head + content[8 + size :])
    return spoil


def mapped(change):
    """Change the index's weight_map."""
    def spoil(folder):
        index = json.loads((folder / INDEX).read_text())
        change(index["weight_map"])
        (folder / INDEX).write_text(json.dumps(index))
    return spoil


def all_of(*spoils):
    return lambda folder: [spoil(folder) for spoil in spoils]


def rename(old, new):
    return lambda folder: (folder / old).rename(folder / new)


FIRST, LAST = "model-00001-of-00003.safetensors", "model-00003-of-00003.safetensors"
PICKLE = pickle.dumps({"w": Evil()})

MODELS = [  # calibrate.py --model MODEL
    ("no config", remove(CONFIG), "config.json does not exist"),
    ("config that is no JSON", text(CONFIG, "{"), "cannot be read as JSON"),
    ("config of NUL", text(CONFIG, b"\0" * 100), "cannot be read as JSON"),
    ("config that is not UTF-8", text(CONFIG, b'{"a": "\xff\xfe\x00"}'), "cannot be read as JSON"),
    ("config that is a list", text(CONFIG, "[]"), "holds no JSON object"),
    ("config of deep brackets", text(CONFIG, "[" * 100_000), "cannot be read as JSON"),
    ("config of a huge number", text(CONFIG, '{"d_model": ' + "9" * 5000 + "}"), "cannot be read as JSON"),
    ("another family", keys(model_type="gpt2"), "model_type 'gpt2' is not supported"),
    ("no family", keys(model_type=...), "model_type None is not supported"),
    ("no heads", keys(n_heads=0), "0 heads"),
    ("heads that do not divide d", keys(n_heads=7), "64 does not divide by 7 heads"),
    ("negative layers", keys(n_layers=-2), "n_layers is -2"),
    ("a million layers", keys(n_layers=10**6), "n_layers is 1000000"),
    ("more layers than tensors", keys(n_layers=9999), "lacks the tensor 'model.transformer.blocks.2."),
    ("a huge d", keys(d_model=10**12), "d_model is 1000000000000"),
    ("d as text", keys(d_model="64"), "d_model is '64', not an integer"),
    ("another FFN", keys(mlp_hidden_size=100), "asks for [100, 64]"),
    ("mask outside the vocabulary", keys(mask_token_id=1024), "mask_id is 1024, outside the vocabulary of 1024"),
    ("negative mask", keys(mask_token_id=-1), "mask_id is -1"),
    ("no mask", keys(mask_token_id=...), "has no mask token"),
    ("theta NaN", keys(rope_theta=math.nan), "rope_theta is nan"),
    ("eps infinite", keys(rms_norm_eps=math.inf), "norm_eps is inf"),
    ("a key of unknown effect", keys(rope_scaling={"factor": 4}), "not implemented here: rope_scaling = {'factor': 4}"),
    ("no weights", remove(WEIGHTS), f"holds neither {WEIGHTS} nor {INDEX}"),
    ("pickle beside nothing", all_of(remove(WEIGHTS), text("pytorch_model.bin", PICKLE)), "never loaded"),
    ("pickle under the name of safetensors", text(WEIGHTS, PICKLE), "not a whole safetensors file"),
    ("empty weights", text(WEIGHTS, b""), "not a whole safetensors file"),
    ("a cut in the header", cut(WEIGHTS, 100), "not a whole safetensors file"),
    ("a cut in the data", cut(WEIGHTS, -1), "not a whole safetensors file"),
    ("bytes behind the end", lambda f: text(WEIGHTS, (f / WEIGHTS).read_bytes() + b"\0" * 64)(f),
     "not a whole safetensors file"),
    ("a header longer than the file", flip(WEIGHTS, 4), "not a whole safetensors file"),
    ("a header of 2^63 bytes", flip(WEIGHTS, 7, 128), "not a whole safetensors file"),
    ("a header that is no JSON", flip(WEIGHTS, 8, 255), "not a whole safetensors file"),
    ("a shape of 2^60 numbers", header(lambda h: h[EMBED].update(shape=[2**30, 2**30])), "not a whole safetensors"),
    ("offsets beyond the file", header(lambda h: h[EMBED].update(data_offsets=[0, 2**50])), "not a whole safetensors"),
    ("negative offsets", header(lambda h: h[EMBED].update(data_offsets=[-4, 4])), "not a whole safetensors file"),
    ("overlapping tensors", header(lambda h: h[EMBED].update(data_offsets=h[NORM]["data_offsets"])), "not a whole"),
    ("an unknown type", header(lambda h: h[EMBED].update(dtype="BF15")), "not a whole safetensors file"),
    ("a type of another width", header(lambda h: h[EMBED].update(dtype="F32")), "not a whole safetensors file"),
    ("another type", header(lambda h: h[NORM].update(dtype="I16")), "has type I16"),
    ("a shape transposed", header(lambda h: h[EMBED]["shape"].reverse()), "has shape [64, 1024]"),
    ("a tensor missing", tensors(lambda t: t.pop(NORM)), f"lacks the tensor '{NORM}'"),
    ("a tensor too many", tensors(lambda t: t.update(extra=torch.ones(2))), "first 'extra'"),
    ("another shape", tensors(lambda t: t.update({NORM: torch.ones(63)})), "has shape [63]"),
    ("NaN in a norm", tensors(lambda t: t[NORM].fill_(math.nan)), f"tensor '{NORM}' holds 64 NaN or Inf"),
    ("one Inf in the last block", tensors(lambda t: t[DOWN][3, 5].fill_(math.inf)), f"'{DOWN}' holds 1 NaN or Inf"),
    ("one -Inf", tensors(lambda t: t[DOWN][3, 5].fill_(-math.inf)), f"'{DOWN}' holds 1 NaN or Inf"),
    ("a weight whose bits are all set", lambda f: text(WEIGHTS, (f / WEIGHTS).read_bytes()[:-2] + b"\xff\xff")(f),
     "holds 1 NaN or Inf"),
    ("no tokenizer", remove("tokenizer.json"), "has no tokenizer"),
    ("a tokenizer that is none", text("tokenizer.json", '{"model": 1}'), "tokenizer.json is not a tokenizer"),
    ("a tokenizer of NUL", text("tokenizer.json", b"\0" * 9), "tokenizer.json is not a tokenizer"),
    ("a token too many", text("added_tokens.json", '{"<x>": 1024}'), "has 1025 tokens, the embedding only 1024"),
    ("a token of the wrong id", text("added_tokens.json", '{"<x>": 5}'), "token '<x>' should have id 5"),
    ("quantized by another tool", keys(quantization_config={"quant_method": "awq"}), "tool (quant_method 'awq')"),
]
SHARDED = [  # calibrate.py --model of a sharded folder
    ("a shard missing", remove(FIRST), f"lacks 1 of 3 shards that {INDEX} lists: {FIRST}"),
    ("a shard cut", cut(LAST, 1000), f"{LAST} is not a whole safetensors file"),
    ("a shard too many", text("model-00004-of-00004.safetensors", b""), "holds model-00004-of-00004.safetensors"),
    ("shards exchanged", all_of(rename(FIRST, "x"), rename(LAST, FIRST), rename("x", LAST)), "does not place there"),
    ("no index", remove(INDEX), f"holds neither {WEIGHTS} nor {INDEX}"),
    ("an index that is no JSON", text(INDEX, "weight_map"), f"{INDEX} cannot be read as JSON"),
    ("an index that is a list", text(INDEX, "[1]"), f"{INDEX} holds no JSON object"),
    ("an index without a map", keys(INDEX, weight_map=...), f"{INDEX} has no usable weight_map"),
    ("an empty map", keys(INDEX, weight_map={}), f"{INDEX} has no usable weight_map"),
    ("a map to numbers", mapped(lambda m: m.update({NORM: 3})), f"{INDEX} has no usable weight_map"),
    ("a path outside the folder", mapped(lambda m: m.update({NORM: "../model/model.safetensors"})),
     "names '../model/model.safetensors', which is not a safetensors file in this folder"),
    ("an absolute path", mapped(lambda m: m.update({NORM: "/etc/passwd"})), "names '/etc/passwd'"),
    ("a NUL in a path", mapped(lambda m: m.update({NORM: "a\0.safetensors"})), "which is not a safetensors file"),
    ("a pickle in the map", mapped(lambda m: m.update({NORM: "w.bin"})), "names 'w.bin'"),
    ("a tensor that is not there", mapped(lambda m: m.update(more=FIRST)), f"{INDEX} lists 'more'"),
    ("a tensor that is not listed", mapped(lambda m: m.pop(NORM)), f"holds '{NORM}', which {INDEX} does not place"),
    ("a checksum that differs", keys(INDEX, metadata={"sha256": {LAST: "0" * 64}}), "differs from its checksum"),
]
QUANTIZED = [  # evaluate.py --model QUANTIZED
    ("a bit flipped", flip(LAST, -9), f"{LAST} differs from its checksum"),
    ("a shard cut", cut(FIRST, -50), f"{FIRST} differs from its checksum"),
    ("a shard missing", remove(FIRST), f"lacks 1 of 3 shards that {INDEX} lists"),
    ("negative bits", quantization(weight_bits=-4), "weight_bits is -4"),
    ("no bits", quantization(weight_bits=0), "weight_bits is 0"),
    ("bits as text", quantization(activation_bits="4"), "activation_bits is '4'"),
    ("other bits", quantization(weight_bits=8), "asks for [192, 64]"),
    ("bits of an embedding that has none", quantization(head_bits=8), "lacks the tensor 'model.transformer.wte.weig"),
    ("gates wider than the layer", quantization(linears={n: {"d_m": 40, "d_u": 40} for n in
                                                         ("qkv", "out", "gate_up", "down")}), "d_u is 40"),
    ("gates missing", quantization(linears={}), "d_m is None"),
    ("gates that are a list", quantization(linears=[1]), "d_m is None"),
    ("bits missing", quantization(weight_bits=...), "another tool"),
    ("16-bit tensors where quantized ones are needed",
     all_of(tensors(lambda t: t.clear() or t.update({f"{QKV}.weight": torch.ones(2)}), FIRST)), "lacks the tensor"),
    ("quantized tensors where 16-bit ones are needed", keys(quantization_config=...), "lacks the tensor 'model.trans"),
    ("a transform of another size", tensors(lambda t: t.update({f"{QKV}.transform_0P1": torch.eye(9)}), FIRST),
     "transform_0P1' has shape [9, 9]"),
    ("feedback in blocks that do not fill the width",
     tensors(lambda t: t.update({f"{QKV}.feedback": torch.zeros(5, 6, 6, dtype=torch.bfloat16)}), FIRST),
     "feedback' has shape [5, 6, 6]"),
    ("a transform that is not square", tensors(lambda t: t.update({f"{QKV}.transform_0P2": torch.ones(8, 4)}), FIRST),
     "transform_0P2' has shape [8, 4]"),
    ("codes of another type", tensors(lambda t: t.update({f"{QKV}.weight_packed": t[f"{QKV}.weight_packed"].float()}),
                                      FIRST), "has type F32, not U8"),
    ("a scale NaN", tensors(lambda t: t[f"{QKV}.weight_scale"].fill_(math.nan), FIRST), "weight_scale' holds 192 NaN"),
    ("TAC of another size", tensors(lambda t: t.update({"model.transformer.blocks.0.tac.M": torch.ones(3, 16, 16)}),
                                    FIRST), "tac.M' has shape [3, 16, 16]"),
    ("no tokenizer", remove("tokenizer.json"), "has no tokenizer.json, which text needs"),
    ("a tensor nobody asked for", tensors(lambda t: t.update({f"{QKV}.zero": torch.ones(1)}), FIRST), f"'{QKV}.zero'"),
]
FOLDERS = ([("calibrate", "model", c, ["--model", "MODEL"]) for c in MODELS]
           + [("calibrate", "sharded", c, ["--model", "MODEL"]) for c in SHARDED]
           + [("evaluate", "quantized", c, ["--model", "MODEL", *ASK]) for c in QUANTIZED])

# ---- the test --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("command", "kind", "case", "arguments"), FOLDERS,
                         ids=[f"{kind}: {case[0]}" for _, kind, case, _ in FOLDERS])
def test_a_spoilt_folder_is_refused(command, kind, case, arguments, good, tmp_path, capsys, monkeypatch):
    _, spoil, words = case
    monkeypatch.chdir(tmp_path)
    shutil.copytree(good / kind, tmp_path / "model")
    spoil(tmp_path / "model")
    arguments = [str(tmp_path / "model") if a == "MODEL" else a for a in arguments]
    if command == "calibrate":
        arguments += ["--out", str(tmp_path / "out"), "--problems", "0", "--device", "cpu"]
    refused(command, arguments, words, tmp_path, capsys)


def test_the_table_is_long_enough():
    assert len(FOLDERS) >= 90


def test_the_good_folders_are_good(good, tmp_path):
    """What the cases spoil works as it is, so each is refused for its fault."""
    for name in ("model", "sharded"):
        assert calibrate.main(["--model", str(good / name), "--out", str(tmp_path / name), "--problems", "0",
                               "--device", "cpu", "--segments", "3", "--length", "8", "--method", "rtn"]) == 0
    assert evaluate.main(["--model", str(good / "quantized"), *ASK]) == 0
