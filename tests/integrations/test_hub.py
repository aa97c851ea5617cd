"""The Hugging Face Hub, replaced by a local server that implements the part of its interface needed here."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import torch
import yaml
from torch import nn

from randlora_vision import RandLoRAConfig, inject, save_adapter
from randlora_vision.integrations import hub
from tests.helpers import IMAGES, randomize, vit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """Repositories in memory; `log` records (method, path) of every request."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, bytes] = {}  # "owner/name/file" -> content
        self.log: list[tuple[str, str]] = []


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._file(send=False)

    def do_GET(self) -> None:
        self._file(send=True)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = self._path()
        if path == "/api/repos/create":
            asked = json.loads(body)
            self._answer({"url": f"{self._root()}/{asked['organization']}/{asked['name']}"})
        elif path == "/api/validate-yaml":
            self._answer({"errors": [], "warnings": []})
        elif path.endswith("/preupload/main"):
            plan = {"uploadMode": "regular", "shouldIgnore": False}
            files = [{"path": file["path"], **plan} for file in json.loads(body)["files"]]
            self._answer({"files": files})
        elif path.endswith("/commit/main"):
            repository = path.removeprefix("/api/models/").removesuffix("/commit/main")
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    self.server.files[f"{repository}/{line['value']['path']}"] = content
            url = f"{self._root()}/{repository}/commit/{COMMIT}"
            self._answer({"commitUrl": url, "commitOid": COMMIT, "success": True})
        else:
            self._answer({"error": "unknown"}, 404)

    def _path(self) -> str:
        path = unquote(urlsplit(self.path).path)
        self.server.log.append((self.command, path))
        return path

    def _root(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def _file(self, send: bool) -> None:
        repository, _, rest = self._path().lstrip("/").partition("/resolve/")
        content = self.server.files.get(f"{repository}/{rest.partition('/')[2]}")
        if content is None:
            self._answer({"error": "not found"}, 404, {"X-Error-Code": "EntryNotFound"})
            return
        self.send_response(200)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if send:
            self.wfile.write(content)

    def _answer(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        for name, text in {**(headers or {}), "Content-Type": "application/json"}.items():
            self.send_header(name, text)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    import huggingface_hub.constants as constants

    running = Hub()
    threading.Thread(target=running.serve_forever, args=(0.02,), daemon=True).start()
    endpoint = f"http://127.0.0.1:{running.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    yield running
    running.shutdown()
    running.server_close()


def adapted() -> nn.Module:
    model = vit()
    inject(model, RandLoRAConfig(rank=4, target_modules=["qkv"], modules_to_save=["head"], seed=5))
    randomize(model)
    nn.init.normal_(model.head.weight)
    return model


def test_there_and_back(server: Hub) -> None:
    model = adapted()
    url = hub.push_to_hub(model, "me/flowers", base_model="vit_tiny", library="timm", metrics={"top1": 0.9})
    assert url.endswith(f"/me/flowers/commit/{COMMIT}")
    assert sorted(server.files) == ["me/flowers/README.md", "me/flowers/adapter.safetensors"]
    loaded = vit()
    report = hub.load_adapter(loaded, "me/flowers")
    x = torch.linspace(-1, 1, 2 * 3 * 16 * 16).reshape(IMAGES)
    assert torch.equal(loaded(x), model.requires_grad_(False)(x)) and len(report.targets) == 2
    asked = {path for _, path in server.log if "/resolve/" in path}
    assert asked == {"/me/flowers/resolve/main/adapter.safetensors"}


def test_a_file_is_pushed_as_it_is(server: Hub, tmp_path: Path) -> None:
    path = save_adapter(adapted(), tmp_path / "any.safetensors")
    hub.push_to_hub(path, "me/flowers", base_model="vit_tiny")
    assert server.files["me/flowers/adapter.safetensors"] == path.read_bytes()


def test_a_name_alone_is_a_repository_of_the_login(
    server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.HfApi.whoami", lambda self: {"name": "me"})
    path = save_adapter(adapted(), tmp_path / "any.safetensors")
    assert "/me/flowers/" in hub.push_to_hub(path, "flowers", base_model="vit_tiny")
    assert b"me/flowers" in server.files["me/flowers/README.md"]


def test_a_pipeline_finds_it(server: Hub) -> None:
    from randlora_vision.integrations import diffusers
    from tests.tiny_pipelines import PIPELINES, sample

    pipe = PIPELINES["sd15"]()
    for part in (pipe.unet, pipe.text_encoder):
        inject(part, RandLoRAConfig(rank=4))
        randomize(part)
    hub.push_to_hub(pipe, "me/style", base_model="sd15", library="diffusers")
    other = PIPELINES["sd15"]()
    assert set(diffusers.load_adapter(other, "me/style")) == {"unet", "text_encoder"}
    assert torch.equal(sample(other), sample(pipe))


def test_the_card(tmp_path: Path) -> None:
    path = save_adapter(adapted(), tmp_path / "adapter.safetensors")
    card = hub.model_card(path, "me/flowers", 'odd: "name"', "timm", "apache-2.0", {"top1": 0.91234})
    _, front, text = card.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "base_model": 'odd: "name"',
        "library_name": "timm",
        "license": "apache-2.0",
        "tags": ["randlora", "randlora_vision", "adapter"],
    }
    assert "# flowers" in text and "| top1 | 0.91234 |" in text
    assert "| model | 2 | 4 | structured, 5 | 741 |" in text  # 2 * (4 * 8 + 8 * 32) trained, 5 * 32 + 5 of the head
    assert '"target_modules": [' in text
    for library in ("", "timm", "open_clip", "diffusers"):
        code = hub.model_card(path, "me/flowers", "base", library).split("```python\n")[1].split("```")[0]
        compile(code, "card", "exec")
        assert "'me/flowers'" in code


def test_only_safetensors_and_json_are_fetched(server: Hub) -> None:
    server.files["me/evil/adapter.bin"] = b"pickle"
    with pytest.raises(ValueError, match="'adapter.bin' of 'me/evil': only .safetensors and .json files are fetched"):
        hub.download("me/evil", "adapter.bin")
    assert not server.log


def test_mistakes_are_one_line(server: Hub, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="adapter.safetensors of the repository 'me/nothing' could not be down"):
        hub.download("me/nothing")
    with pytest.raises(FileNotFoundError, match="no adapter file"):
        hub.push_to_hub(tmp_path / "gone.safetensors", "me/flowers", base_model="x")
    path = save_adapter(adapted(), tmp_path / "adapter.safetensors")
    with pytest.raises(ValueError, match="library must be one of timm, open_clip, diffusers, got 'keras'"):
        hub.push_to_hub(path, "me/flowers", base_model="x", library="keras")
    with pytest.raises(ValueError, match="the Hugging Face Hub rejected the upload to 'a/b/c': "):
        hub.push_to_hub(path, "a/b/c", base_model="x")
    (tmp_path / "other.safetensors").write_bytes(b"no adapter")
    with pytest.raises(ValueError, match="other.safetensors|adapter.safetensors"):
        hub.push_to_hub(tmp_path / "other.safetensors", "me/flowers", base_model="x")
    assert not server.files
