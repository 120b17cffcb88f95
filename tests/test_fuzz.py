"""Any bytes in config.json, the index or a safetensors header: a model, or one sentence; no other error, no hang."""

import json
import shutil
import struct
import time

import pytest
import torch
from arguments import fast
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import calibrate
from checkpoint.folder import INDEX, SINGLE
from model import load_model
from runtime.processes import Refused

SECONDS = 10  # far above a load of these folders (20 ms), far below a hang
FUZZ = settings(max_examples=2 * settings().max_examples, suppress_health_check=[HealthCheck.function_scoped_fixture])
SHARD = "model-00001-of-00003.safetensors"


def arguments(model, out, *more):
    return ["--model", str(model), "--out", str(out), "--segments", "3", "--length", "8", *fast(*more, epochs=0)]


@pytest.fixture(scope="module")
def folders(small_folder, tmp_path_factory):
    """kind -> (folder, name of a file with a header): 16-bit, and quantized without checksums, which hide the rest."""
    base = tmp_path_factory.mktemp("fuzz")
    shutil.copytree(small_folder, base / "plain")
    assert calibrate.main(arguments(small_folder, base / "quantized")) == 0
    index = json.loads((base / "quantized" / INDEX).read_text())
    (base / "quantized" / INDEX).write_text(json.dumps({"weight_map": index["weight_map"]}))
    for kind in ("plain", "quantized"):
        (base / kind / "tokenizer.json").unlink()  # the tokenizers library's own format
    return {"plain": (base / "plain", SINGLE), "quantized": (base / "quantized", SHARD)}


def loads_or_refuses(folder) -> bool:
    start = time.perf_counter()
    try:
        model = load_model(folder, "cpu")
        with torch.no_grad():
            assert model(torch.zeros(1, 4, dtype=torch.long)).shape == (1, 4, model.config.vocab_size)
        return True
    except Refused as error:
        sentence = str(error)
    finally:
        assert time.perf_counter() - start < SECONDS
    assert "\n" not in sentence
    return False


def attempt(path, content: bytes) -> bool:
    """Load the folder with this content in one of its files, and put the file back."""
    good = path.read_bytes()
    path.write_bytes(content)
    try:
        return loads_or_refuses(path.parent)
    finally:
        path.write_bytes(good)


def with_header(good: bytes, header: bytes) -> bytes:
    size = struct.unpack("<Q", good[:8])[0]
    return struct.pack("<Q", len(header)) + header + good[8 + size :]


# edits of bytes: (position, bytes removed, bytes inserted), positions wrap
edits = st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 20), st.binary(max_size=8)), min_size=1, max_size=4)


def edited(content: bytes, changes) -> bytes:
    for at, removed, inserted in changes:
        at %= len(content) + 1
        content = content[:at] + inserted + content[at + removed :]
    return content


values = st.recursive(st.none() | st.booleans() | st.integers() | st.integers(-3, 300) | st.floats()
                      | st.text(max_size=4) | st.sampled_from(["../x.safetensors", SHARD, "a\0b.safetensors", "F32"]),
                      lambda inner: (st.lists(inner, max_size=3)
                                     | st.dictionaries(st.text(max_size=3), inner, max_size=3)), max_leaves=5)


def replaced(data, tree):
    """The JSON tree with one value anywhere in it replaced, removed or added."""
    if isinstance(tree, dict) and tree and data.draw(st.integers(0, 9)) > 1:
        key = data.draw(st.sampled_from(sorted(tree)))
        return tree | {key: replaced(data, tree[key])}
    if isinstance(tree, dict) and tree and data.draw(st.booleans()):
        key = data.draw(st.sampled_from(sorted(tree)))
        return {k: v for k, v in tree.items() if k != key}
    if isinstance(tree, dict) and data.draw(st.booleans()):
        return tree | {data.draw(st.text(max_size=3)): data.draw(values)}
    if isinstance(tree, list) and tree and data.draw(st.booleans()):
        i = data.draw(st.integers(0, len(tree) - 1))
        return [*tree[:i], replaced(data, tree[i]), *tree[i + 1 :]]
    return data.draw(values)


@pytest.mark.parametrize("kind", ["plain", "quantized"])
class TestFuzz:
    def test_good_folders_load(self, kind, folders):
        assert loads_or_refuses(folders[kind][0])

    @FUZZ
    @given(changes=edits)
    def test_bytes_of_the_config(self, kind, folders, changes):
        path = folders[kind][0] / "config.json"
        attempt(path, edited(path.read_bytes(), changes))

    @FUZZ
    @given(data=st.data())
    def test_values_of_the_config(self, kind, folders, data):
        path = folders[kind][0] / "config.json"
        attempt(path, json.dumps(replaced(data, json.loads(path.read_text()))).encode())

    @FUZZ
    @given(changes=edits)
    def test_bytes_of_the_header(self, kind, folders, changes):
        path = folders[kind][0] / folders[kind][1]
        good = path.read_bytes()
        size = struct.unpack("<Q", good[:8])[0]
        attempt(path, with_header(good, edited(good[8 : 8 + size], changes)))
        attempt(path, edited(good[: 8 + size], changes) + good[8 + size :])  # its length stays what it was

    @FUZZ
    @given(data=st.data())
    def test_values_of_the_header(self, kind, folders, data):
        path = folders[kind][0] / folders[kind][1]
        good = path.read_bytes()
        size = struct.unpack("<Q", good[:8])[0]
        header = json.dumps(replaced(data, json.loads(good[8 : 8 + size]))).encode()
        attempt(path, with_header(good, header))

    @FUZZ
    @given(content=st.binary(max_size=300))
    def test_any_bytes(self, kind, folders, content):
        folder, weights = folders[kind]
        assert not attempt(folder / "config.json", content)
        assert not attempt(folder / weights, content)


class TestIndex:
    @FUZZ
    @given(changes=edits)
    def test_bytes(self, folders, changes):
        path = folders["quantized"][0] / INDEX
        attempt(path, edited(path.read_bytes(), changes))

    @FUZZ
    @given(data=st.data())
    def test_values(self, folders, data):
        path = folders["quantized"][0] / INDEX
        attempt(path, json.dumps(replaced(data, json.loads(path.read_text()))).encode())

    @FUZZ
    @given(content=st.binary(max_size=300))
    def test_any_bytes(self, folders, content):
        assert not attempt(folders["quantized"][0] / INDEX, content)


@settings(FUZZ, max_examples=settings().max_examples, phases=[Phase.generate])
@given(data=st.data())
def test_any_state_of_an_interrupted_run(data, folders, small_folder, tmp_path):
    """starquant.json is read too, on --resume, and so is what stands in the metadata of a finished shard."""
    good, out = folders["quantized"][0], tmp_path / "q"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    state = json.loads((good / "starquant.json").read_text()) | {"complete": False}
    (out / "starquant.json").write_text(json.dumps(replaced(data, state)))
    content = (good / SHARD).read_bytes()
    if data.draw(st.booleans()):
        size = struct.unpack("<Q", content[:8])[0]
        header = json.loads(content[8 : 8 + size])
        record = replaced(data, json.loads(header["__metadata__"]["starquant"]))
        header["__metadata__"] = {"starquant": json.dumps(record)}
        content = with_header(content, json.dumps(header).encode())
    (out / SHARD).write_bytes(content)
    assert calibrate.main(arguments(small_folder, out, "--resume")) in (0, 2)
