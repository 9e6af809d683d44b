"""Small image-text shards and the tokenizer, input and server that the data tests share."""

from __future__ import annotations

import http.server
import io
import tarfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vlmkd.image_spec import ImageSpec


def encoded_image(seed: int, size: tuple[int, int] = (40, 30), kind: str = "JPEG") -> bytes:
    """A smooth random picture (width, height) as a file."""
    pixels = np.random.default_rng(seed).integers(0, 255, (6, 8, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).save(file, kind)
    return file.getvalue()


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    """A tar of these members, in this order."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def pair(shard: int, number: int) -> list[tuple[str, bytes]]:
    """The two members of one good sample."""
    return [
        (f"{number:04d}.jpg", encoded_image(1000 * shard + number)),
        (f"{number:04d}.txt", f"picture {shard} {number}".encode()),
    ]


@pytest.fixture(name="encoded_image")
def _encoded_image() -> Callable[..., bytes]:
    return encoded_image


@pytest.fixture(name="write_tar")
def _write_tar() -> Callable[..., Path]:
    return write_tar


@pytest.fixture(name="pair")
def _pair() -> Callable[..., list[tuple[str, bytes]]]:
    return pair


@pytest.fixture
def make_shards(tmp_path: Path) -> Callable[..., list[str]]:
    """`make_shards(counts, spoil)` writes one shard per count; `spoil(shard, number, members)` may edit a sample."""

    def make(
        counts: list[int], spoil: Callable[..., object] | None = None, folder: str = "shards"
    ) -> list[str]:
        (tmp_path / folder).mkdir(exist_ok=True)
        paths = []
        for shard, count in enumerate(counts):
            members = []
            for number in range(count):
                sample = pair(shard, number)
                members += (spoil(shard, number, sample) if spoil else None) or sample
            paths.append(str(write_tar(tmp_path / folder / f"{shard:03d}.tar", members)))
        return paths

    return make


@pytest.fixture
def spec() -> ImageSpec:
    return ImageSpec(size=(16, 16), mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))


def bytes_tokenizer(texts: list[str]) -> torch.Tensor:
    """Length and last four bytes of each text."""
    return torch.tensor([[len(text), *text.encode()[-4:].rjust(4)] for text in texts])


@pytest.fixture
def tokenizer() -> Callable[[list[str]], torch.Tensor]:
    return bytes_tokenizer


class _Handler(http.server.BaseHTTPRequestHandler):
    """Serves files of a folder; can hang up early, ignore ranges, or fail, as its server says."""

    server: FlakyServer

    def do_GET(self) -> None:  # noqa: N802
        owner = self.server
        start = int(self.headers.get("Range", "bytes=0-")[6:-1])
        owner.requests.append((self.path, start))
        path = owner.folder / self.path.lstrip("/")
        if owner.failures > 0 or not path.is_file():
            owner.failures -= 1
            self.send_error(503 if path.is_file() else 404)
            return
        data = path.read_bytes()
        partial = owner.ranges and start > 0
        body = data[start:] if partial else data
        self.send_response(206 if partial else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if owner.hang_ups > 0:
            owner.hang_ups -= 1
            body = body[: owner.hang_up_after]
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Keep the test output clean."""


class FlakyServer(http.server.ThreadingHTTPServer):
    """An HTTP server on 127.0.0.1 with faults to order."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.requests: list[tuple[str, int]] = []
        self.failures = 0
        self.hang_ups = 0
        self.hang_up_after = 0
        self.ranges = True

    def url(self, path: str) -> str:
        """Address of a file below the folder."""
        return f"http://127.0.0.1:{self.server_address[1]}/{path}"


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FlakyServer]:
    from vlmkd.data import shards

    monkeypatch.setattr(shards, "_RETRY_PAUSE", 0.01)
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    running = FlakyServer(tmp_path)
    thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield running
    running.shutdown()
    running.server_close()
    thread.join()
