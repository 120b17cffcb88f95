"""Downloads from a server on this machine that speaks the hub's protocol: real HTTP, the real client, no network."""

import json
import os
import re
import shutil
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socket import SHUT_RDWR
from threading import Thread

import pytest

from checkpoint import folder as folder_module
from checkpoint.folder import INDEX, resolve, sha256, write_file, write_json
from runtime.processes import Refused

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(small_folder, tmp_path, monkeypatch):
    """(server, folder it serves as someone/small): two shards, and a pickle that nobody may ask for."""
    from safetensors.torch import load_file, save_file

    served = tmp_path / "served"
    served.mkdir()
    tensors = load_file(small_folder / "model.safetensors")
    files = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in sorted(set(files.values())):
        save_file({k: v for k, v in tensors.items() if files[k] == file}, served / file, {"format": "pt"})
    (served / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": files}))
    (served / "config.json").write_bytes((small_folder / "config.json").read_bytes())
    (served / "pytorch_model.bin").write_bytes(b"pickled")

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args):
            pass

        def reply(self, status, body=b"", headers=(), cut=None):
            self.send_response(status)
            for key, value in {"Content-Length": str(len(body)), **dict(headers)}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body[:cut])
                if cut is not None:  # the line goes dead in the middle
                    self.connection.shutdown(SHUT_RDWR)

        def do_GET(self):
            server.asked.append((self.command, self.path))
            if self.path.startswith("/api/models/someone/small/tree/"):
                tree = [{"type": "file", "path": p.name, "size": p.stat().st_size, "oid": sha256(p)}
                        for p in sorted(served.iterdir())]
                return self.reply(200, json.dumps(tree).encode(), {"Content-Type": "application/json"})
            if self.path.startswith("/api/models/someone/small"):
                listing = {"id": "someone/small", "modelId": "someone/small", "sha": COMMIT, "private": False,
                           "tags": [], "downloads": 0, "likes": 0,
                           "siblings": [{"rfilename": p.name} for p in sorted(served.iterdir())]}
                return self.reply(200, json.dumps(listing).encode(), {"Content-Type": "application/json"})
            path = served / self.path.rpartition("/")[2]
            if not self.path.startswith(f"/someone/small/resolve/{COMMIT}/") or not path.is_file():
                return self.reply(404, headers={"X-Error-Code": "RepoNotFound"})
            if path.name in server.broken:
                return self.reply(403)
            body, headers = path.read_bytes(), {"ETag": f'"{sha256(path)}"', "X-Repo-Commit": COMMIT}
            cut = len(body) // 2 if self.command == "GET" and path.name in server.cut else None
            if cut:
                server.cut.remove(path.name)
            return self.reply(200, body, headers, cut)

        do_HEAD = do_GET  # noqa: N815 (the server's name for it)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.asked, server.broken, server.cut = [], set(), []
    Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    for name, value in {"ENDPOINT": url, "HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": False,
                        "HUGGINGFACE_CO_URL_TEMPLATE": url + "/{repo_id}/resolve/{revision}/{filename}",
                        "HF_HUB_DISABLE_XET": True}.items():
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    folder_module.offline.cache_clear()
    yield server, served
    folder_module.offline.cache_clear()
    server.shutdown()
    server.server_close()


def downloads(server, file):
    return [path for command, path in server.asked if command == "GET" and path.endswith(f"/{file}")]


def test_a_model_arrives_whole_though_the_line_breaks(hub):
    server, served = hub
    broken = max(p.name for p in served.glob("*.safetensors"))
    server.cut.append(broken)
    folder = resolve("someone/small")
    for path in served.iterdir():
        if path.suffix != ".bin":
            assert sha256(folder / path.name) == sha256(path)
    assert len(downloads(server, broken)) == 2
    # pickled weights are not even asked for
    assert not (folder / "pytorch_model.bin").exists()
    assert not downloads(server, "pytorch_model.bin")


def test_an_interrupted_download_keeps_what_it_has(hub):
    server, served = hub
    first, second = sorted(p.name for p in served.glob("*.safetensors"))
    server.broken.add(second)
    said = r"^there is no folder someone/small here, and someone/small could not be downloaded \(.* the folder instead"
    with pytest.raises(Refused, match=said):
        resolve("someone/small")
    assert len(downloads(server, first)) == 1
    server.broken.clear()
    folder = resolve("someone/small")
    assert len(downloads(server, first)) == 1
    assert sha256(folder / second) == sha256(served / second)


@pytest.mark.usefixtures("hub")
def test_a_model_that_does_not_exist_is_one_sentence():
    with pytest.raises(Refused, match=r"^there is no folder .* someone/else could not be downloaded \(RepositoryNotF"):
        resolve("someone/else")


def test_the_hub_is_asked_once_whether_it_is_there(hub, monkeypatch):
    server, _ = hub
    for port, proxies, said in ((server.server_port, {}, False), (9, {}, True), (9, {"https": "http://proxy"}, False)):
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{port}")
        monkeypatch.setattr(folder_module, "getproxies", lambda proxies=proxies: proxies)
        folder_module.offline.cache_clear()
        assert folder_module.offline() is said
    folder_module.offline.cache_clear()


@pytest.mark.parametrize("name", ["out/nothere", "out/tiny-starquant+-w4a4"])  # the hub allows no +
def test_a_folder_that_is_not_there_is_said_to_be_missing(name, monkeypatch):
    monkeypatch.setattr(folder_module, "offline", lambda: True)
    with pytest.raises(Refused, match=re.escape(f"there is no folder {name} here, and {name} could not be downloaded")):
        folder_module.resolve(name)


def test_an_unfinished_folder_says_how_to_finish_it(tmp_path):
    (tmp_path / "starquant.json").write_text("{}")
    with pytest.raises(Refused, match=r"is unfinished; run the same calibrate\.py command with --resume"):
        folder_module.Checkpoint(tmp_path)


def test_files_that_may_not_be_read_are_named(small_folder, tmp_path, monkeypatch):
    """The rights are pretended, because a superuser may read everything."""
    shutil.copytree(small_folder, tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").write_bytes(b"")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(Refused, match=r"model\.safetensors may not be read \(permission denied\)\.$"):
        folder_module.Checkpoint(tmp_path / "m")

    def forbidden(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", forbidden)
    with pytest.raises(Refused, match=r"config\.json cannot be read \(Permission denied\)\.$"):
        folder_module.Checkpoint(tmp_path / "m")


def test_every_spelling_of_a_model_is_one_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "M").mkdir()
    assert {folder_module.model_name(name) for name in ("M", "./M", "M/", "./M/", str(tmp_path / "M"))} == {"M"}
    assert folder_module.model_name("llada-8b") == folder_module.model_name("GSAI-ML/LLaDA-8B-Base")
    assert folder_module.model_name("tiny") == "tiny"
    monkeypatch.chdir("M")
    assert folder_module.model_name(".") == "M"


def test_what_is_no_file_is_not_replaced_by_one(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write_json(tmp_path / "pipe", {"x": 1})
    assert json.loads(os.read(reader, 99)) == {"x": 1}
    os.close(reader)
    assert [p.name for p in tmp_path.iterdir() if p.is_fifo()] == ["pipe"]


def test_a_full_disk_is_named_by_the_file_it_did_not_take(tmp_path):
    def full(path):
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match=f"No space left on device: '?{tmp_path / 'x.json'}"):
        write_file(tmp_path / "x.json", full)
