"""The zoo's list and its downloads, against a small HTTP server on this machine."""

from __future__ import annotations

import dataclasses
import hashlib
import http.server
import json
import re
import runpy
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from vlmkd import zoo
from vlmkd.errors import UserError

NAME = "TinyCLIP-ViT-8M-16-Text-3M-YFCC15M"
FILE = f"{NAME}.pt"
CONTENT = bytes(range(256)) * 400
SHA = hashlib.sha256(CONTENT).hexdigest()


@dataclass
class Server:
    """What the test server holds and what it was asked."""

    url: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    ranges: list[str] = field(default_factory=list)
    cut_after: list[int] = field(default_factory=list)
    """Bytes after which the next replies break off, one per reply."""
    etag: str = '"one"'
    honours_range: bool = True
    requests: int = 0
    redirect: bool = False
    shift: int = 0
    """Bytes after the wanted one at which it continues."""


@pytest.fixture
def server() -> Iterator[Server]:
    state = Server()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            body = state.files.get(self.path)
            self.send_response(404 if body is None else 200)
            commit = re.search("/resolve/([^/]*)/", self.path)
            self.send_header("X-Repo-Commit", commit[1] if commit else "")
            self.send_header("ETag", f'"{hashlib.sha256(body or b"").hexdigest()}"')
            self.send_header("Content-Length", str(len(body or b"")))
            self.end_headers()

        def do_GET(self) -> None:
            state.requests += 1
            if state.redirect:
                self.send_response(302)
                self.send_header("Location", self.path)
                self.end_headers()
                return
            body = state.files.get(self.path.partition("?")[0])
            if body is None:
                self.send_error(404)
                return
            asked = self.headers.get("Range", "")
            state.ranges.append(asked)
            start = int(re.findall(r"bytes=(\d+)-", asked)[0]) if asked and state.honours_range else 0
            if self.headers.get("If-Range", state.etag) != state.etag:
                start = 0
            start += state.shift if start else 0
            if start >= len(body):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(body)}")
                self.end_headers()
                return
            self.send_response(206 if start else 200)
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
            self.send_header("ETag", state.etag)
            self.send_header("Content-Length", str(len(body) - start))
            self.end_headers()
            rest = body[start:]
            self.wfile.write(rest[: state.cut_after.pop(0)] if state.cut_after else rest)

        def log_message(self, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        threading.Thread(target=httpd.serve_forever, args=(0.02,), daemon=True).start()
        state.url = f"http://127.0.0.1:{httpd.server_port}"
        yield state
        httpd.shutdown()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VLMKD_CACHE", str(tmp_path / "cache"))
    for name in (
        "VLMKD_MIRROR",
        "HF_ENDPOINT",
        "VLMKD_OFFLINE",
        "HF_HUB_OFFLINE",
        "http_proxy",
        "HTTP_PROXY",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(zoo, "BACKOFF_S", 0.0)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "cache" / "zoo"


@pytest.fixture
def mirror(server: Server, monkeypatch: pytest.MonkeyPatch) -> Server:
    monkeypatch.setenv("VLMKD_MIRROR", f"{server.url}/base/")
    server.files[f"/base/{FILE}"] = CONTENT
    return server


def test_first_download_pins_and_a_later_different_file_is_refused(mirror: Server, cache: Path) -> None:
    path = zoo.fetch(f"zoo:{NAME}")
    assert path == cache / FILE and path.read_bytes() == CONTENT
    assert json.loads((cache / "pins.json").read_text())[NAME] == {"sha256": SHA}
    assert zoo.fetch(NAME) == path and mirror.requests == 1

    path.unlink()
    other = CONTENT[:-1] + b"!"
    mirror.files[f"/base/{FILE}"] = other
    with pytest.raises(UserError, match=f"pinned at the first download.*{FILE}.rejected-"):
        zoo.fetch(NAME)
    aside = cache / f"{FILE}.rejected-{hashlib.sha256(other).hexdigest()[:8]}"
    assert aside.read_bytes() == other and not path.exists()

    mirror.files[f"/base/{FILE}"] = CONTENT
    assert zoo.fetch(NAME).read_bytes() == CONTENT


def test_a_file_changed_in_the_cache_is_set_aside(mirror: Server, cache: Path) -> None:
    path = zoo.fetch(NAME)
    path.write_bytes(b"changed")
    with pytest.raises(UserError, match="rejected"):
        zoo.fetch(NAME)
    assert zoo.fetch(NAME).read_bytes() == CONTENT


def test_wrong_sha256_of_zoo_yaml(mirror: Server, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    item = dataclasses.replace(zoo.entry(NAME), sha256="0" * 64)
    monkeypatch.setitem(zoo.entries(), NAME, item)
    with pytest.raises(UserError, match=f"sha256 {SHA}, not the 0{{64}} of zoo.yaml"):
        zoo.fetch(NAME)
    assert not (cache / FILE).exists()


def test_truncated_transfer_is_continued_where_it_stopped(mirror: Server) -> None:
    mirror.cut_after = [1000, 5000]
    assert zoo.fetch(NAME).read_bytes() == CONTENT
    assert mirror.ranges == ["", "bytes=1000-", "bytes=6000-"]


def test_partial_file_survives_a_failed_call_and_is_continued_by_the_next(
    mirror: Server, cache: Path
) -> None:
    mirror.cut_after = [100] * zoo.ATTEMPTS
    with pytest.raises(UserError, match="without sending complete message body.*400 bytes kept"):
        zoo.fetch(NAME)
    assert (cache / f"{FILE}.part").stat().st_size == 100 * zoo.ATTEMPTS
    assert zoo.fetch(NAME).read_bytes() == CONTENT
    assert mirror.ranges[-1] == f"bytes={100 * zoo.ATTEMPTS}-"
    assert sorted(path.name for path in cache.iterdir()) == [f"{NAME}.lock", FILE, "pins.json"]


def test_two_versions_are_never_joined(mirror: Server) -> None:
    mirror.cut_after = [100] * zoo.ATTEMPTS
    with pytest.raises(UserError):
        zoo.fetch(NAME)
    newer = CONTENT[::-1]
    mirror.files[f"/base/{FILE}"], mirror.etag = newer, '"two"'
    assert zoo.fetch(NAME).read_bytes() == newer


def test_server_without_ranges_starts_again(mirror: Server) -> None:
    mirror.honours_range, mirror.cut_after = False, [1000]
    assert zoo.fetch(NAME).read_bytes() == CONTENT


@pytest.mark.parametrize("left", [CONTENT, CONTENT + b"more"])
def test_complete_and_overlong_partial_files(mirror: Server, cache: Path, left: bytes) -> None:
    cache.mkdir(parents=True)
    (cache / f"{FILE}.part").write_bytes(left)
    (cache / f"{FILE}.part.etag").write_text(mirror.etag)
    assert zoo.fetch(NAME).read_bytes() == CONTENT
    assert mirror.ranges == [f"bytes={len(left)}-", ""]


def test_a_server_that_continues_elsewhere_is_not_believed(mirror: Server, cache: Path) -> None:
    mirror.cut_after, mirror.shift = [1000], 1
    with pytest.raises(UserError, match="continued at bytes 1001-.* instead of byte 1000"):
        zoo.fetch(NAME)


def test_missing_file_is_one_line_with_the_mend(
    server: Server, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    monkeypatch.setenv("VLMKD_MIRROR", server.url)
    with pytest.raises(UserError) as caught:
        zoo.fetch(NAME)
    message = str(caught.value)
    assert f"{server.url}/{FILE}: HTTP 404" in message and "VLMKD_MIRROR" in message
    assert str(cache / FILE) in message and "\n" not in message
    assert server.requests == 1  # a refusal is not tried again


@pytest.mark.parametrize(
    ("address", "reason"),
    [("http://127.0.0.1:9", "refused"), ("http://no-such-host.invalid", "not known|resolution")],
)
def test_an_unreachable_host_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch, address: str, reason: str
) -> None:
    monkeypatch.setenv("VLMKD_MIRROR", address)
    monkeypatch.setattr(zoo, "BACKOFF_S", 60.0)
    with pytest.raises(UserError, match=f"cannot download {address}/.*({reason}).*by hand"):
        zoo.fetch(NAME)


@pytest.mark.parametrize("address", ["nonsense", "http://[bad", "http://host:port", "http://a b"])
def test_a_mirror_that_is_no_address(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setenv("VLMKD_MIRROR", address)
    with pytest.raises(UserError, match="cannot download .*VLMKD_MIRROR") as caught:
        zoo.fetch(NAME)
    assert "\n" not in str(caught.value)


def test_a_circle_of_redirections_is_one_line(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    server.redirect = True
    monkeypatch.setenv("VLMKD_MIRROR", server.url)
    with pytest.raises(UserError, match="redirect") as caught:
        zoo.fetch(NAME)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["[]", '{"NAME": 3}', "[" * 100_000, "\x00"])
def test_pins_that_are_no_pins(mirror: Server, cache: Path, content: str) -> None:
    cache.mkdir(parents=True)
    (cache / "pins.json").write_text(content.replace("NAME", NAME))
    with pytest.raises(UserError, match="list of pinned digests .*delete that file and call again"):
        zoo.fetch(NAME)


def test_a_link_in_place_of_a_partial_file_is_not_followed(mirror: Server, cache: Path) -> None:
    cache.mkdir(parents=True)
    other = cache.parent / "other"
    other.write_bytes(b"mine")
    (cache / f"{FILE}.part").symlink_to(other)
    assert zoo.fetch(NAME).read_bytes() == CONTENT and other.read_bytes() == b"mine"


def test_without_a_network_the_hub_is_asked_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """open_clip, timm and the zoo look into the cache alone, and the line names the connection."""
    from huggingface_hub import constants

    from vlmkd.models.backbones import load_backbone
    from vlmkd.models.clip import load_clip

    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail(f"waited {seconds} s"))
    for load in (
        lambda: load_clip("ViT-B-32", "laion2b_s34b_b79k"),
        lambda: load_backbone("timm:test_vit"),
        lambda: zoo.fetch(f"{NAME}-hf"),
    ):
        with pytest.raises(UserError, match="http://127.0.0.1:9 cannot be reached: .*Connection refused"):
            load()
        assert constants.HF_HUB_OFFLINE is False


def test_a_proxy_is_asked_in_place_of_the_hub(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import close_session

    monkeypatch.setenv("http_proxy", server.url)
    monkeypatch.setenv("HF_ENDPOINT", "http://no-such-host.invalid")
    close_session()  # it keeps the proxies it was made with
    with zoo.hub_or_cache() as trouble:
        assert trouble == ""
    close_session()


def test_errors_of_the_hubs_http_library_are_errors_of_the_system() -> None:
    from huggingface_hub.errors import HfHubHTTPError

    library = next(base for base in HfHubHTTPError.__mro__ if base.__name__ == "HTTPError")
    with pytest.raises(ConnectionError, match="broke off"), zoo.hub_or_cache():
        raise library("broke off")


@pytest.mark.parametrize("variable", ["VLMKD_OFFLINE", "HF_HUB_OFFLINE"])
def test_offline_uses_the_cache_only(
    mirror: Server, cache: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv(variable, "1")
    with pytest.raises(UserError, match=f"{FILE} and offline mode is on; .*{FILE} by hand"):
        zoo.fetch(NAME)
    cache.mkdir(parents=True, exist_ok=True)
    (cache / FILE).write_bytes(CONTENT)  # by hand
    assert zoo.fetch(NAME) == cache / FILE
    assert mirror.requests == 0


def _hub(server: Server, name: str, revision: str) -> None:
    """A repository of the hub as huggingface_hub asks for it: the commit, the list of files, the files."""
    repo = zoo.entry(name).source
    files = {"config.json": b"{}", "model.safetensors": CONTENT, "merges.txt": b"a b"}
    files |= {"pytorch_model.bin": b"pickle", "onnx/config.json": b"{}"}  # unwanted
    tree = [
        {"type": "file", "path": item, "size": len(data), "oid": hashlib.sha256(data).hexdigest()[:40]}
        for item, data in files.items()
    ]
    info = {"id": repo, "sha": revision, "siblings": [{"rfilename": item} for item in files]}
    server.files[f"/api/models/{repo}/revision/main"] = json.dumps(info).encode()
    server.files[f"/api/models/{repo}/revision/{revision}"] = json.dumps(info).encode()
    server.files[f"/api/models/{repo}/tree/{revision}"] = json.dumps(tree).encode()
    server.files |= {f"/{repo}/resolve/{revision}/{item}": data for item, data in files.items()}


@pytest.mark.parametrize("listed", [True, False])
def test_hub_entry_at_its_pinned_revision(
    server: Server, monkeypatch: pytest.MonkeyPatch, cache: Path, tmp_path: Path, listed: bool
) -> None:
    """At the commit of its list, or at the one that the first download found; then from the hub's cache alone."""
    name = f"{NAME}-hf" if listed else "TinyCLIP-ViT-39M-16-Text-19M-YFCC15M-hf"
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    revision = zoo.entry(name).revision if listed else "ab" * 20
    _hub(server, name, revision)
    folder = zoo.fetch(name)
    assert folder.is_relative_to(tmp_path / "hub") and folder.name == revision
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json",
        "merges.txt",
        "model.safetensors",
    ]
    assert (folder / "model.safetensors").read_bytes() == CONTENT
    pin = {"sha256": SHA} if listed else {"sha256": SHA, "revision": revision}
    assert json.loads((cache / "pins.json").read_text())[name] == pin
    assert zoo.weights_file(f"zoo:{name}") == folder / "model.safetensors"

    server.files.clear()
    with monkeypatch.context() as offline:
        offline.setenv("VLMKD_OFFLINE", "1")
        assert zoo.fetch(name) == folder
    shutil.rmtree(tmp_path / "hub")
    with pytest.raises(UserError, match=f"at {revision} .*nor at {server.url} .*HF_ENDPOINT"):
        zoo.fetch(name)  # asks for the pinned commit, not for main
    monkeypatch.setenv("VLMKD_OFFLINE", "1")
    with pytest.raises(UserError, match="neither in the hub's cache .*offline mode is on.* by hand"):
        zoo.fetch(name)


def test_a_hub_entry_that_is_not_the_pinned_one(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    item = dataclasses.replace(zoo.entry(f"{NAME}-hf"), sha256="0" * 64)
    monkeypatch.setitem(zoo.entries(), item.name, item)
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    _hub(server, item.name, item.revision)
    with pytest.raises(UserError, match=f"not the 0{{64}} of zoo.yaml; kept as .*{item.revision}: delete it"):
        zoo.fetch(item.name)


MANUAL = "PromptKD-teacher-ViT-L-14-DescribableTextures"


def test_a_file_without_address_is_put_there_by_hand_and_pinned(cache: Path) -> None:
    path = cache / f"{MANUAL}.pth.tar"
    with pytest.raises(UserError) as caught:
        zoo.fetch(MANUAL)
    message = str(caught.value)
    assert "DescribableTextures/VLPromptLearner/model-best.pth.tar from https://" in message
    assert message.endswith(f"put it at {path}") and "\n" not in message
    path.write_bytes(CONTENT)
    assert zoo.fetch(f"zoo:{MANUAL}") == path
    assert json.loads((cache / "pins.json").read_text())[MANUAL] == {"sha256": SHA}
    path.write_bytes(b"another file")
    with pytest.raises(UserError, match="not the .* pinned at the first download"):
        zoo.fetch(MANUAL)


def test_release_files_of_the_hub_come_from_another_host_or_mirror(
    server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", f"{server.url}/hub/")
    server.files["/hub/erjui/dho/resolve/main/vit_b_1.pt"] = CONTENT
    assert zoo.fetch("DHO-ViT-B-16-1percent") == cache / "DHO-ViT-B-16-1percent.pt"
    monkeypatch.setenv("VLMKD_MIRROR", server.url)
    server.files["/DHO-ViT-B-16-10percent.pt"] = CONTENT[::-1]  # under its name in the cache
    assert zoo.fetch("DHO-ViT-B-16-10percent").read_bytes() == CONTENT[::-1]


def test_a_checkpoints_name_is_a_zoo_entry_or_a_path(
    server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert zoo.weights_file("some/where.pt") == Path("some/where.pt")
    assert zoo.weights_file("~/x.pt") == Path.home() / "x.pt"
    name = "timm-deit_small_distilled_patch16_224.fb_in1k"
    folder = cache / name
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(CONTENT)
    assert zoo.weights_file(f"zoo:{name}") == folder / "model.safetensors"
    with pytest.raises(UserError, match="did you mean"):
        zoo.weights_file("zoo:DHO-ViT-B-16-1-percent")


def test_local_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zoo, "REPOSITORY", tmp_path)
    item = zoo.Entry(
        name="nano", project="p", kind="local", source="zoo/nano", licence="MIT", link="zoo/nano", sha256=SHA
    )
    monkeypatch.setitem(zoo.entries(), "nano", item)
    with pytest.raises(UserError, match="zoo/nano of the repository is missing"):
        zoo.fetch("nano")
    (tmp_path / "zoo/nano").mkdir(parents=True)
    with pytest.raises(UserError, match="neither"):
        zoo.fetch("nano")
    (tmp_path / "zoo/nano/open_clip_model.safetensors").write_bytes(CONTENT)
    assert zoo.fetch("nano") == tmp_path / "zoo/nano"
    (tmp_path / "zoo/nano/open_clip_model.safetensors").write_bytes(b"other")
    with pytest.raises(UserError, match="git checkout"):
        zoo.fetch("nano")


def test_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean TinyCLIP-ViT-61M-32-Text-29M-LAION400M"):
        zoo.entry("tinyclip-vit-61m-32-text-29m-laion400")
    with pytest.raises(UserError, match="--list"):
        zoo.entry("zzz")


def test_unwritable_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mirror: Server) -> None:
    import errno
    import os

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(zoo, "_transfer", full)
    with pytest.raises(UserError, match="No space left.*VLMKD_CACHE"):
        zoo.fetch(NAME)


def test_entries_are_complete_and_honest() -> None:
    """Every checkpoint of the papers' releases is there; no digest or score is stated without its origin."""
    items = zoo.entries().values()
    for item in items:
        assert item.licence and item.link
        assert item.sha256 == zoo.PIN_AT_FIRST_DOWNLOAD or re.fullmatch("[0-9a-f]{64}", item.sha256)
        assert item.revision == "" or re.fullmatch("[0-9a-f]{40}", item.revision)
        assert all(one["command"] for one in item.ours)
        assert item.kind != "local" or re.fullmatch("[0-9a-f]{64}", item.sha256)
        assert not item.paper or item.paper_imagenet_top1 is None  # the page has one place for both
    counts = Counter((item.project, item.kind) for item in items)
    assert counts["tinyclip", "release"] == 11 and counts["tinyclip", "hub"] == 4
    assert counts["dho", "release"] == 4
    assert counts["promptkd", "manual"] == 12 + 2 + 12  # teachers, students, PromptSRC
    assert {item.project for item in items} == zoo.lists().keys() - {
        "vl2v_adip",
        "matvlm",
    }  # nothing, and folders to convert
    for item in items:
        if item.project == "tinyclip" and item.kind == "release":
            assert item.source.endswith(f"/{item.name}.pt") and item.paper_imagenet_top1 is not None
        if item.source.startswith("https://openaipublic."):
            assert item.source.split("/")[-2] == item.sha256


def test_recipes_start_from_models_of_the_page() -> None:
    """Each open_clip, timm and torchvision name in the configs of the three newer papers has an entry that names it."""
    notes = " ".join(item.note for item in zoo.entries().values() if item.project == "foundation")
    named = set()
    for project in ("promptkd", "dho", "vl2v_adip"):
        for path in (zoo.REPOSITORY / "projects" / project / "configs").rglob("*.yaml"):
            text = path.read_text(encoding="utf-8")
            named |= {
                f"{model}@{tag}" for model, tag in re.findall(r"model: ([\w-]+), pretrained: (\w+)", text)
            }
            named |= set(re.findall(r"backbone: \"?clip:([\w-]+@\w+)", text))
            named |= set(re.findall(r"backbone: \"?((?:timm|torchvision):[\w.]+)", text))
    assert {"RN50@openai", "ViT-H-14-378-quickgelu@dfn5b", "torchvision:resnet50"} < named
    assert not {name for name in named if name not in notes}


@pytest.mark.parametrize(
    "name", [item.name for item in zoo.entries().values() if item.kind == "release" and item.architecture]
)
def test_stated_parameters_are_those_of_the_stated_architecture(name: str) -> None:
    import torch
    from open_clip.model import CLIP

    item = zoo.entry(name)
    with torch.device("meta"):
        model = CLIP(**item.architecture)
    vision = sum(p.numel() for p in model.visual.parameters())
    total = sum(p.numel() for p in model.parameters())
    text = total - vision - model.token_embedding.weight.numel() - 1  # the scale belongs to neither tower
    measured = [round(count / 1e6, 2) for count in (vision, text, total)]
    assert measured == [item.params[tower] for tower in ("vision", "text", "total")]


@pytest.mark.parametrize(
    ("prefix", "clip", "blocks", "projector"),
    [
        ("PromptKD-teacher-", "OpenAI-CLIP-ViT-L-14", 9, 0),
        ("PromptKD-student-", "OpenAI-CLIP-ViT-B-16", 9, 986_112),
        ("PromptSRC-ViT-B-16-ImageNet-xd", "OpenAI-CLIP-ViT-B-16", 3, 0),
        ("PromptSRC-ViT-B-16-", "OpenAI-CLIP-ViT-B-16", 9, 0),
    ],
)
def test_stated_parameters_of_prompted_models(prefix: str, clip: str, blocks: int, projector: int) -> None:
    """The CLIP's, counted, and four prompts in each block; a student has the projector of the specification, and no text."""
    import torch
    from open_clip.model import CLIP

    config = zoo.entry(clip).architecture
    with torch.device("meta"):
        model = CLIP(**config)
    own = sum(p.numel() for p in model.visual.parameters())
    rest = sum(p.numel() for p in model.parameters()) - own
    vision = own + 4 * blocks * config["vision_cfg"]["width"] + projector
    text = rest + 4 * blocks * config["text_cfg"]["width"]
    expected = [vision, text - model.token_embedding.weight.numel() - 1, vision + text]
    measured: list[float | None] = [round(count / 1e6, 2) for count in expected]
    if projector:
        measured = [measured[0], None, measured[0]]
    items = [item for item in zoo.entries().values() if item.name.startswith(prefix)]
    for item in items:
        if item.name == prefix or item.name != "PromptSRC-ViT-B-16-ImageNet-xd":
            assert measured == [item.params[tower] for tower in ("vision", "text", "total")], item.name


def test_model_zoo_page_is_up_to_date() -> None:
    page = zoo.REPOSITORY / "MODEL_ZOO.md"
    text = runpy.run_path(str(zoo.REPOSITORY / "scripts" / "check_zoo.py"))["markdown"]()
    assert page.read_text(encoding="utf-8") == text, "run python scripts/check_zoo.py --write"


def test_no_torch_for_listing_and_downloading() -> None:
    code = "import sys, vlmkd.zoo; vlmkd.zoo.entries(); sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=zoo.REPOSITORY, check=False).returncode == 0


def test_command_line(tmp_path: Path) -> None:
    script = str(zoo.REPOSITORY / "scripts" / "download.py")
    listing = subprocess.run([sys.executable, script, "--list"], capture_output=True, text=True, check=True)
    assert len(listing.stdout.splitlines()) == len(zoo.entries())
    wrong = subprocess.run([sys.executable, script, NAME + "x"], capture_output=True, text=True, check=False)
    assert wrong.returncode == 2 and wrong.stderr.count("\n") == 1 and f"did you mean {NAME}" in wrong.stderr
    command = [sys.executable, script, "--offline", NAME]
    lacking = subprocess.run(command, capture_output=True, text=True, check=False)
    assert lacking.returncode == 2 and "offline mode is on" in lacking.stderr


def test_every_clip_that_a_recipe_names_has_an_entry() -> None:
    named = set()
    for path in (zoo.REPOSITORY / "projects").glob("*/configs/**/*.yaml"):
        text = path.read_text(encoding="utf-8")
        named |= {
            f"{model}@{tag}" for model, tag in re.findall(r"model: ([\w-]+), pretrained: (\w+)\b(?!/)", text)
        }
    assert {"ViT-B-32@laion2b_e16", "ViT-B-16-quickgelu@openai"} <= named
    # OpenAI's weights bring their activation with them, under either name.
    notes = " ".join(item.note for item in zoo.entries().values()).replace("-quickgelu@openai", "@openai")
    named = {name.replace("-quickgelu@openai", "@openai") for name in named}
    assert not [name for name in named if f"{name} of" not in notes]


def test_the_page_names_the_mirrors() -> None:
    page = (zoo.REPOSITORY / "MODEL_ZOO.md").read_text(encoding="utf-8")
    for mirror in ("pan.baidu.com", "terabox.com", "drive.google.com", "8M-16-Text-3M-YFCC15M-ONNX"):
        assert mirror in page
