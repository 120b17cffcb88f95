"""Bad input: one sentence that names the thing, exit code 2, no traceback, nothing written, nothing executed.

Each case is (what, how a good folder is spoilt or None, command and arguments, words that the sentence must hold).
MODEL, QUANTIZED, OUT and HERE in arguments stand for the spoilt copies, a fresh output folder and the case's folder.
"""

import json
import math
import pickle
import shutil
import struct
from pathlib import Path

import pytest
import torch
from arguments import fast
from safetensors.torch import load_file, save_file

import bench
import calibrate
import evaluate
from checkpoint.folder import INDEX
from tiny import stress

WEIGHTS, CONFIG = "model.safetensors", "config.json"
EMBED, NORM = "model.transformer.wte.weight", "model.transformer.ln_f.weight"
QKV, DOWN = "model.transformer.blocks.0.qkv", "model.transformer.blocks.1.ff_out.weight"


@pytest.fixture(scope="module")
def good(small_folder, tmp_path_factory):
    """A 16-bit folder, the same in three shards with checksums, and a quantized one."""
    base = tmp_path_factory.mktemp("good")
    shutil.copytree(small_folder, base / "model")
    shutil.copytree(small_folder, base / "sharded")
    tensors = load_file(base / "model" / WEIGHTS)
    (base / "sharded" / WEIGHTS).unlink()
    place = {name: f"model-0000{i % 3 + 1}-of-00003.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in set(place.values()):
        save_file({k: v for k, v in tensors.items() if place[k] == file}, base / "sharded" / file)
    (base / "sharded" / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": place}))
    assert calibrate.main(["--model", str(base / "model"), "--out", str(base / "quantized"), "--segments", "9",
                           "--length", "24", *fast(epochs=0)]) == 0
    return base


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
ASK = ["--prompt", "x", "--steps", "1", "--gen-length", "1", "--device", "cpu"]
FOLDERS = ([("calibrate", "model", c, ["--model", "MODEL"]) for c in MODELS]
           + [("calibrate", "sharded", c, ["--model", "MODEL"]) for c in SHARDED]
           + [("evaluate", "quantized", c, ["--model", "MODEL", *ASK]) for c in QUANTIZED])


# ---- bad arguments, with good folders --------------------------------------------------------------------------------


NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
ARGUMENTS = [
    ("calibrate", ["--model", "no-such-model"], "model 'no-such-model' is neither a folder, a hub id"),
    ("calibrate", ["--model", "./nowhere/model"], "'./nowhere/model' is neither a folder"),
    ("calibrate", ["--model", "file.txt"], "model 'file.txt' is neither a folder"),
    *((command, [flag, ""], f"nothing is given for {flag}") for command, flag in (
        ("calibrate", "--model"), ("calibrate", "--data"), ("evaluate", "--data"), ("bench", "--out"))),
    ("evaluate", ["--prompt", "a\udcff"], "is no text in UTF-8"),
    ("calibrate", ["--model", "~nobody-here/model"], "'~nobody-here/model' is neither a folder"),
    ("calibrate", ["--model", "QUANTIZED"], "is quantized already; give the 16-bit model"),
    ("calibrate", ["--method", "magic"], "method 'magic' is not one of"),
    ("calibrate", ["--wbits", "1"], "wbits 1 is not between 2 and 8"),
    ("calibrate", ["--wbits", "-4"], "wbits -4 is not between 2 and 8"),
    ("calibrate", ["--abits", "9"], "abits 9 is not between 2 and 8"),
    ("calibrate", ["--wbits", "four"], "argument --wbits: invalid int value: 'four'"),
    ("calibrate", ["--colour", "red"], "unrecognized arguments: --colour red"),
    ("calibrate", ["--wbits"], "argument --wbits: expected one argument"),
    ("calibrate", ["--dtype", "fp8"], "argument --dtype: invalid choice: 'fp8'"),
    ("calibrate", ["--resume", "--overwrite"], "not allowed with argument"),
    ("calibrate", ["--set", "epochs"], "expected SETTING=VALUE"),
    ("calibrate", ["--set", "colour=red"], "expected SETTING=VALUE"),
    ("calibrate", ["--set", "trained=1"], "expected SETTING=VALUE"),
    ("calibrate", ["--set", "wbits=3"], "give --wbits instead"),
    ("calibrate", ["--inputs", "none"], "inputs 'none' is not one of quantized, fp"),
    ("calibrate", ["--states", "none"], "states 'none' is not one of masked, rollout"),
    ("calibrate", ["--set", "lr=fast"], "'fast' is not a float"),
    ("calibrate", ["--set", "lr=nan"], "lr nan is not between"),
    ("calibrate", ["--set", "epochs=-1"], "epochs -1 is not between"),
    ("calibrate", ["--set", "tac=always"], "tac 'always' is not one of"),
    ("calibrate", ["--set", "tac_block=0"], "tac_block 0 is not between"),
    ("calibrate", ["--method", "starquant+", "--set", "balance_block=0"], "balance_block 0 is not between"),
    ("calibrate", ["--set", "head_bits=5"], "head_bits 5 is not one of 16, 8, 4"),
    ("calibrate", ["--set", "weights=asymmetric", "--method", "gptq"], "is for starquant and rtn, not for gptq"),
    ("calibrate", ["--set", "allocation=closed_form", "--method", "starquant+"],
     "allocation is for starquant, not for starquant+"),
    ("calibrate", ["--set", "lr=.1", "--method", "rtn"], "lr is for starquant, flatquant and freeact, not for rtn"),
    ("calibrate", ["--set", "tac=statistics", "--method", "starquant+"], "tac 'statistics' is not one of none, ridge"),
    ("calibrate", ["--set", "state_fraction=1"], "state_fraction 1 gives each state the whole width"),
    ("calibrate", ["--set", "embed_bits=4"], "embed_bits 4 needs head_bits 8 or 4"),
    ("calibrate", ["--seed", "-1"], "seed -1 is not between"),
    ("calibrate", ["--segments", "0"], "--segments: must be at least 1 and below 1000000"),
    ("calibrate", ["--length", "1"], "--length: must be at least 2"),
    ("calibrate", ["--problems", "-1"], "--problems: must be at least 0"),
    ("calibrate", ["--segments", "999999", "--length", "256"], "of memory on cpu"),
    ("calibrate", ["--length", "257"], "knows sequences of at most 256 tokens"),
    ("calibrate", ["--stress", "0"], "stress 0 is not a positive number"),
    ("calibrate", ["--stress", "nan"], "stress nan is not a positive number"),
    ("calibrate", ["--device", "abacus"], "device 'abacus' is not available"),
    ("calibrate", ["--device", "meta"], "device 'meta' is not available"),
    *(pytest.param(command, ["--device", "cuda"], "device 'cuda' is not available", marks=NO_GPU)
      for command in ("calibrate", "evaluate", "bench")),
    *(("calibrate", ["--model", "MODEL", "--data", file], words) for file, words in (
        ("nowhere.txt", "nowhere.txt cannot be read"),
        ("folder.txt", "folder.txt cannot be read"),
        ("empty.txt", "empty.txt holds no text"),
        ("blank.txt", "blank.txt holds no text"),
        ("nul.txt", "nul.txt holds no text"),
        ("latin.txt", "not UTF-8 text; convert it first, from Latin-1 by iconv -f latin1 -t"),
        ("short.txt", "too few for segments of 64; give at least 128 or lower --length"),
        ("a.csv", "a.csv is none of .txt, .jsonl and .parquet"),
        ("a.parquet", "cannot be read as parquet|needs pyarrow"),
        ("broken.jsonl", "broken.jsonl, row 2"),
        ("number.jsonl", "number.jsonl, row 1"),
        ("list.jsonl", "list.jsonl, row 1"),
        ("deep.jsonl", "deep.jsonl, row 1"))),
    ("calibrate", ["--out", "theirs"], "theirs exists and is not a folder of this program"),
    ("calibrate", ["--out", "theirs", "--overwrite"], "theirs exists and is not a folder of this program"),
    ("calibrate", ["--out", "theirs", "--resume"], "theirs exists and is not a folder of this program"),
    ("calibrate", ["--out", "MODEL", "--resume"], "exists and is not a folder of this program"),
    ("calibrate", ["--out", "MODEL", "--overwrite"], "exists and is not a folder of this program"),
    ("calibrate", ["--out", "QUANTIZED"], "add --resume to continue it or --overwrite to replace it"),
    ("calibrate", ["--out", "QUANTIZED", "--resume"], "segments was 9 and is 128, length was 24 and is 64 now"),
    ("calibrate", ["--out", "state-only", "--resume"], "state-only"),
    ("calibrate", ["--out", "bad-state", "--resume"], "starquant.json cannot be read as JSON"),
    ("calibrate", ["--out", "theirs/q", "--stress", "3"], "is not this model stressed"),
    ("stress", ["--model", "QUANTIZED", "--out", "OUT"], "is quantized already"),
    ("stress", ["--model", "MODEL", "--c", "-1", "--out", "OUT"], "stress -1 is not a positive number"),
    ("stress", ["--model", "MODEL", "--out", "theirs"], "theirs exists and is not this model stressed"),
    ("stress", ["--model", "MODEL"], "the following arguments are required: --out"),
    ("bench", ["--model", "gpt-2", "--write", "OUT"], "shapes are known of"),
    ("bench", ["--model", "llada-8b", "--blocks", "0", "--write", "OUT"], "between 1 and 32"),
    ("bench", ["--model", "llada-8b", "--blocks", "1", "--write", "theirs"], "theirs is not empty"),
    ("evaluate", ["--figure", "2"], "argument --figure: invalid choice: '2'"),
    ("evaluate", ["--figure", "4", "--model", "nowhere"], "neither a folder"),
    ("evaluate", ["--figure", "4", "--model", "QUANTIZED", "--out", "OUT"], "is quantized already"),
    ("evaluate", ["--figure", "4", "--stress", "0", "--out", "OUT"], "argument --stress: must be above 0"),
    ("evaluate", ["--table", "2", "--stress", "nan", "--out", "OUT"], "argument --stress: must be above 0"),
    ("bench", ["--model", "MODEL", "--points", "1x257x1"], "a sequence of 257 tokens is longer than the model's 256"),
    ("bench", ["--model", "MODEL", "--out", "theirs"], "--out theirs is a folder; give a file"),
    ("bench", ["--model", "llada-8b", "--gain", "nan", "--write", "OUT"], "argument --gain: must be above 0"),
    ("bench", ["--seed", "9223372036854775808"], "argument --seed: must be at least 0"),
    ("bench", ["--model", "llada-8b", "--predict", "--device", "cpu"], "--predict knows --model"),
    ("bench", ["--model", "QUANTIZED"], "is quantized already"),
    ("bench", ["--model", "nowhere"], "neither a folder"),
    ("bench", ["--points", "1x2"], "'1x2' is not BATCHxLENGTHxTOKENS"),
    ("evaluate", ["--model", "nowhere"], "neither a folder"),
    ("evaluate", ["--problems", "0"], "must be at least 1"),
    ("evaluate", ["--prompt", "x", "--steps", "0"], "must be at least 1"),
    ("evaluate", ["--table", "9"], "argument --table: invalid choice: '9'"),
    ("evaluate", ["--table", "1", "--seeds", "0"], "argument --seeds: must be at least 1"),
    ("evaluate", ["--table", "1", "--seeds", "1000000"], "argument --seeds: must be at least 1 and below 1000000"),
    ("evaluate", ["--tasks", " , "], "argument --tasks: names nothing; give names with commas between them"),
    ("evaluate", ["--table", "1", "--model", "QUANTIZED"], "is quantized already"),
    ("evaluate", ["--seed", "18446744073709551616"], "argument --seed: must be at least 0 and below 922337"),
    ("evaluate", ["--device", "abacus"], "not available"),
    ("evaluate", ["--out", "theirs"], "--out theirs is a folder; give a file"),
    *((command, arguments, f"{arguments[-2]} {at}: nothing can be written to") for command, arguments, at in (
        ("evaluate", ["--out", "file.txt/x.json"], "file.txt"),
        ("evaluate", ["--prompt", "x", "--out", "gone/x.json"], "gone"),
        ("evaluate", ["--tasks", "piqa", "--cache", "file.txt"], "file.txt"),
        ("evaluate", ["--table", "2", "--out", "file.txt"], "file.txt"),
        ("evaluate", ["--table", "2", "--out", "gone"], "gone"),
        ("evaluate", ["--figure", "4", "--out", "file.txt"], "file.txt"),
        ("evaluate", ["--figure", "6", "--out", "/proc/x"], "/proc/x"),
        ("evaluate", ["--data", "blank.txt", "--out", "/proc/x"], "/proc"),
        ("calibrate", ["--out", "file.txt"], "file.txt"), ("calibrate", ["--out", "file.txt/q"], "file.txt/q"),
        ("calibrate", ["--out", "/proc/x"], "/proc/x"), ("calibrate", ["--spill", "file.txt"], "file.txt"),
        ("bench", ["--out", "/proc/x.json"], "/proc"),
        ("bench", ["--model", "llada-8b", "--write", "gone"], "gone"),
        ("stress", ["--model", "MODEL", "--out", "/proc/x"], "/proc/x"))),
    ("bench", ["--model", "llada-8b"], "or add --random-weights"),
    ("evaluate", ["--model", "models/none"], "there is no folder models/none here"),
    ("calibrate", ["--out", "gone"], "gone exists and is not a folder|--out gone: nothing can be written to gone"),
    ("calibrate", ["--spill", "not-there"], "--spill not-there is no folder; make it first"),
]
FILES = {"empty.txt": b"", "blank.txt": b" \n\t\n", "nul.txt": b"\0" * 99, "latin.txt": "größer".encode("latin-1") * 99,
         "short.txt": b"too short", "a.csv": b"a,b\n", "a.parquet": b"PAR1",
         "broken.jsonl": b'{"text": "a"}\n{not json\n',
         "number.jsonl": b'{"text": 5}\n', "list.jsonl": b"[1]\n", "deep.jsonl": b"[" * 100_000, "file.txt": b"text"}


# ---- the test --------------------------------------------------------------------------------------------------------


COMMANDS = {"calibrate": calibrate.main, "evaluate": evaluate.main, "bench": bench.main, "stress": stress.main}


def tree(folder: Path) -> dict:
    return {str(p): (p.lstat().st_mtime_ns, p.lstat().st_size) for p in folder.rglob("*")}


def refused(command, arguments, words, tmp_path, capsys):
    before = tree(tmp_path)
    capsys.readouterr()
    try:
        code = COMMANDS[command](arguments)
    except SystemExit as end:  # argparse
        code = end.code
    out, err = capsys.readouterr()
    assert code == 2, err
    assert any(w in err for w in words.split("|")), err
    assert err.startswith("python -m tiny.stress: " if command == "stress" else f"{command}.py: "), err
    assert err.endswith(".\n"), err
    assert err.count("\n") == 1, err
    assert out == ""
    assert tree(tmp_path) == before


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder to run in: whatever is written, unpickled or executed by mistake shows there."""
    monkeypatch.chdir(tmp_path)
    for name, content in FILES.items():
        (tmp_path / name).write_bytes(content)
    for name, inside in (("theirs", "notes.txt"), ("state-only", "starquant.json"), ("bad-state", "starquant.json")):
        (tmp_path / name).mkdir()
        (tmp_path / name / inside).write_text("{}" if name == "state-only" else "mine")
    (tmp_path / "theirs" / "x-stress3").mkdir()
    (tmp_path / "theirs" / "model-stress3").mkdir()
    (tmp_path / "theirs" / "model-stress3" / "model.safetensors").write_bytes(b"mine")
    (tmp_path / "folder.txt").mkdir()
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere" / "at-all")  # a link to a disk that is not there
    return tmp_path


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


@pytest.mark.parametrize(("command", "arguments", "words"), ARGUMENTS)
def test_bad_arguments_are_refused(command, arguments, words, good, here, capsys):
    places = {"MODEL": str(good / "model"), "QUANTIZED": str(good / "quantized"), "OUT": str(here / "out")}
    given = [places.get(a, a) for a in arguments]
    if command == "calibrate":
        defaults = {"--model": str(good / "model"), "--out": str(here / "out"), "--device": "cpu", "--problems": "0"}
        given += [x for k, v in defaults.items() if k not in given for x in (k, v)]
    before = tree(good)
    refused(command, given, words, here, capsys)
    assert tree(good) == before


def test_what_was_measured_is_said_though_the_disk_is_full(good, tmp_path, monkeypatch, capsys):
    def full(path, value):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(evaluate, "write_json", full)
    out = tmp_path / "deep" / "x.json"
    assert evaluate.main(["--model", str(good / "quantized"), *ASK, "--out", str(out)]) == 2
    printed, error = capsys.readouterr()
    assert json.loads(printed.splitlines()[-1])["prompt"] == "x"
    assert error.endswith(f"evaluate.py: No space left on device: {out}.\n")


def test_the_table_is_long_enough():
    assert len(FOLDERS) + len(ARGUMENTS) >= 100


def test_the_good_folders_are_good(good, tmp_path):
    """What the cases spoil works as it is, so each is refused for its fault."""
    for name in ("model", "sharded"):
        assert calibrate.main(["--model", str(good / name), "--out", str(tmp_path / name), "--problems", "0",
                               "--device", "cpu", "--segments", "3", "--length", "8", "--method", "rtn"]) == 0
    assert evaluate.main(["--model", str(good / "quantized"), *ASK]) == 0
