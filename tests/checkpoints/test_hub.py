"""Hub references against a small server on loopback that speaks the Hub's protocol; nothing leaves the machine."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """Serves one folder as ``org/model`` and notes what was asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.log = folder, []  # type: ignore[var-annotated]
        super().__init__(("127.0.0.1", 0), Handler)


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *arguments: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        path = self.path.split("?")[0]
        self.server.log.append((self.command, path, self.headers.get("Range")))
        files = {p.relative_to(self.server.folder).as_posix(): p for p in self.server.folder.rglob("*") if p.is_file()}
        if re.fullmatch(r"/api/models/org/model(/revision/\w+)?", path):
            siblings = [{"rfilename": name} for name in files]
            return self.send_json({"id": "org/model", "modelId": "org/model", "sha": COMMIT, "siblings": siblings})
        if re.match(r"/api/models/org/model/tree/\w+", path):
            entries = [
                {"type": "file", "path": n, "size": p.stat().st_size, "oid": hashlib.sha1(p.read_bytes()).hexdigest()}
                for n, p in files.items()
            ]
            return self.send_json(entries)
        match = re.fullmatch(r"/org/model/resolve/\w+/(.+)", path)
        if match and match[1] in files:
            data = files[match[1]].read_bytes()
            ranged = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
            part = data
            if ranged:
                part = data[int(ranged[1]) : int(ranged[2]) + 1 if ranged[2] else None]
            self.send_response(206 if ranged else 200)
            if ranged:
                stop = int(ranged[1]) + len(part) - 1
                self.send_header("Content-Range", f"bytes {ranged[1]}-{stop}/{len(data)}")
            self.send_header("ETag", f'"{hashlib.sha1(data).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Content-Length", str(len(part)))
            self.end_headers()
            if body:
                self.wfile.write(part)
            return None
        self.send_response(404)
        self.send_header("X-Error-Code", "EntryNotFound" if match else "RepoNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()
        return None

    def send_json(self, value: object) -> None:
        data = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def hub(save_model) -> Iterator[Hub]:
    folder = save_model("remote")
    (folder / "pytorch_model.bin").write_bytes(b"never wanted")
    (folder / "merge_statistics.safetensors").write_bytes(b"published")
    server = Hub(folder)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def run(code: str, hub: Hub, cache: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code in a process of its own: the client reads its settings when it is imported."""
    settings = {
        **os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HOME": str(cache),
        "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1",
        "no_proxy": "*", **environment,
    }  # fmt: skip
    return subprocess.run([sys.executable, "-c", code], env=settings, capture_output=True, text=True, timeout=120)


OPEN = "from merganser.checkpoints import open_checkpoint\nc = open_checkpoint('org/model@main')\n"


def test_headers_first_then_weights_then_offline(hub: Hub, tmp_path: Path) -> None:
    from merganser.checkpoints import open_checkpoint

    local = open_checkpoint(hub.folder)
    code = OPEN + "print(c.revision, len(c.tensors), c.config['model_type'])\n"
    code += "assert (c.path / 'merge_statistics.safetensors').read_bytes() == b'published'"
    first = run(code, hub, tmp_path / "cache")
    assert first.returncode == 0, first.stderr
    assert first.stdout.split() == [COMMIT, str(len(local.tensors)), "bert"]
    weights = [entry for entry in hub.log if entry[1].endswith("model.safetensors") and entry[0] == "GET"]
    assert weights and all(entry[2] for entry in weights)  # ranges for the header, never the whole file
    second = run(OPEN + "print(c.manifest_sha256())", hub, tmp_path / "cache")
    assert second.returncode == 0, second.stderr
    assert second.stdout.strip() == local.manifest_sha256()
    assert not any(entry[1].endswith("pytorch_model.bin") for entry in hub.log)
    hub.log.clear()
    third = run(OPEN + "print(c.manifest_sha256())", hub, tmp_path / "cache", HF_HUB_OFFLINE="1")
    assert third.stdout.strip() == local.manifest_sha256(), third.stderr
    assert hub.log == []


def test_what_cannot_be_had_says_how_to_mend_it(hub: Hub, tmp_path: Path) -> None:
    for name, offline in (("org/other", "0"), ("org/model", "1")):
        code = (
            "from merganser.checkpoints import open_checkpoint\nfrom merganser.errors import CheckpointError\n"
            f"try:\n    open_checkpoint({name!r})\nexcept CheckpointError as error:\n    print(error)\n"
        )
        found = run(code, hub, tmp_path / "empty", HF_HUB_OFFLINE=offline)
        assert "cannot be had from the Hub" in found.stdout and f"hf download {name}" in found.stdout, found.stderr


def test_codes_on_the_hub_are_seen_from_headers_and_read_once_fetched(hub: Hub, save_model, tmp_path: Path) -> None:
    from functools import partial

    from merganser.checkpoints import open_checkpoint
    from quantised_examples import fp8, write_quantised

    settings = {"quant_method": "fp8", "weight_block_size": [16, 16]}
    write_quantised(tmp_path / "q", save_model("plain", "llama"), partial(fp8), settings)
    hub.folder = tmp_path / "q"
    local = open_checkpoint(hub.folder)
    name = "model.layers.0.mlp.up_proj.weight"
    code = OPEN + f"print(type(c).__name__, len(c.tensors), c.tensors[{name!r}].dtype)\n"
    found = run(code, hub, tmp_path / "cache")
    assert found.stdout.split() == ["QuantisedCheckpoint", str(len(local.tensors)), "BF16"], found.stderr
    assert all(entry[2] for entry in hub.log if entry[1].endswith("model.safetensors") and entry[0] == "GET")
    code = OPEN + f"print(float(c.read({name!r}).double().sum()), c.manifest_sha256())"
    found = run(code, hub, tmp_path / "cache")
    assert found.stdout.split() == [str(float(local.read(name).double().sum())), local.manifest_sha256()]


def test_nested_modules_are_there_from_the_start(hub: Hub, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    (hub.folder / "modules.json").write_text('[{"path": ""}, {"path": "2_Dense"}]')
    (hub.folder / "2_Dense").mkdir()
    save_file({"linear.weight": torch.eye(2)}, hub.folder / "2_Dense" / "model.safetensors")
    found = run(OPEN + "print('2_Dense/linear.weight' in c.tensors)", hub, tmp_path / "cache")
    assert found.stdout.strip() == "True", found.stderr


def test_pickled_modules_are_named_and_fetched_where_they_are_allowed(hub: Hub, tmp_path: Path) -> None:
    (hub.folder / "modules.json").write_text('[{"path": ""}, {"path": "2_Dense"}]')
    (hub.folder / "2_Dense").mkdir()
    torch.save({"linear.weight": torch.eye(2)}, hub.folder / "2_Dense" / "pytorch_model.bin")
    said = (
        "from merganser.checkpoints import open_checkpoint\nfrom merganser.errors import CheckpointError\n"
        "try:\n    open_checkpoint('org/model')\nexcept CheckpointError as error:\n    print(error)\n"
    )
    refused = run(said, hub, tmp_path / "cache")
    assert "2_Dense" in refused.stdout and "--allow-pickle" in refused.stdout, refused.stderr
    assert not any(entry[1].endswith(".bin") and entry[0] == "GET" for entry in hub.log)
    allowed = said.replace("('org/model')", "('org/model', allow_pickle=True)").replace(
        "\nexcept", "\n    print(open_checkpoint('org/model', allow_pickle=True).read('2_Dense/linear.weight'))\nexcept"
    )
    found = run(allowed, hub, tmp_path / "cache")
    assert "tensor([[1., 0.]" in found.stdout, found.stderr


def test_pickles_alone_are_named_and_fetched_where_they_are_allowed(hub: Hub, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    tensors = load_file(hub.folder / "model.safetensors")
    torch.save(tensors, hub.folder / "pytorch_model.bin")
    (hub.folder / "model.safetensors").unlink()
    said = (
        "from merganser.checkpoints import open_checkpoint\nfrom merganser.errors import CheckpointError\n"
        "try:\n    open_checkpoint('org/model')\nexcept CheckpointError as error:\n    print(error)\n"
    )
    refused = run(said, hub, tmp_path / "cache")
    assert "pickled" in refused.stdout and "--allow-pickle" in refused.stdout, refused.stderr
    assert not any(entry[1].endswith("pytorch_model.bin") and entry[0] == "GET" for entry in hub.log)
    allowed = OPEN.replace("@main')", "@main', allow_pickle=True)") + "print(len(c.tensors), c.revision)"
    for offline in ("0", "1"):
        found = run(allowed, hub, tmp_path / "cache", HF_HUB_OFFLINE=offline)
        assert found.stdout.split() == [str(len(tensors)), COMMIT], found.stderr


def test_an_adapter_s_header_comes_first_and_its_base_may_be_elsewhere(hub: Hub, save_model, tmp_path: Path) -> None:
    from adapter_examples import adapt_linears

    base = save_model("base")
    for file in hub.folder.iterdir():
        file.unlink()
    adapt_linears(hub.folder, base, ("query",))
    code = (
        "from merganser.checkpoints import open_checkpoint\n"
        f"c = open_checkpoint('{base}+org/model@main')\nprint(c.revision)\n"
    )
    first = run(code, hub, tmp_path / "cache")
    assert first.stdout.strip() == f"{base}+org/model@{COMMIT}", first.stderr
    weights = [entry for entry in hub.log if entry[1].endswith("adapter_model.safetensors") and entry[0] == "GET"]
    assert weights and all(entry[2] for entry in weights)  # ranges for the header, never the whole file
    second = run(code + "print(c.manifest_sha256())", hub, tmp_path / "cache")
    from merganser.checkpoints import open_checkpoint

    assert second.stdout.split()[-1] == open_checkpoint(f"{base}+{hub.folder}").manifest_sha256(), second.stderr
