"""data_tools/embed_classes.py, called the way a user does: a model, and a service that is paid for each text once."""

from __future__ import annotations

import http.server
import importlib.util
import json
import threading
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vlmkd import teacher_options
from vlmkd.data.ledger import Ledger, report
from vlmkd.errors import UserError
from vlmkd.models.class_vectors import ClassVectors
from vlmkd.models.clip import ClipModel

ROOT = Path(__file__).resolve().parents[2]
DIM = 4


def vector(text: str) -> list[float]:
    """What the service says: not a unit vector, and another one for another text."""
    return [float(len(text)), float(sum(text.encode()) % 97 + 1), float(text.count("o")), -1.0]


class Service(http.server.ThreadingHTTPServer):
    """Counts the texts that it was asked; `busy` calls are turned away first."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.asked, self.kinds, self.calls, self.busy_after = Counter(), set(), 0, None
        self.url = f"http://127.0.0.1:{self.server_address[1]}/embed"


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):  # noqa: N802
        owner = self.server
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if owner.busy_after is not None and owner.calls >= owner.busy_after:
            self.send_error(503)
            return
        owner.calls += 1
        owner.kinds.add(request["kind"])
        owner.asked.update(request["inputs"])
        body = json.dumps({"vectors": [vector(text) for text in request["inputs"]]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        """Keep the test output clean."""


@pytest.fixture
def service(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    running = Service()
    thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield running
    running.shutdown()
    running.server_close()
    thread.join()


@pytest.fixture
def main(tmp_path, encoded_image):
    """The tool's main on a set of three classes."""
    for name in ("Sea_lion", "cat", "dog"):
        folder = tmp_path / "set" / "train" / name
        folder.mkdir(parents=True)
        (folder / "0.jpg").write_bytes(encoded_image(1))
    path = ROOT / "data_tools" / "embed_classes.py"
    spec = importlib.util.spec_from_file_location("data_tools_embed_classes", path)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)

    def call(*arguments):
        fixed = [
            "--set",
            f"folder:{tmp_path / 'set'}",
            "--device",
            "cpu",
            "--out",
            str(tmp_path / "v.safetensors"),
        ]
        return tool.main([*fixed, *arguments])

    return call


@pytest.fixture
def box(service, tmp_path):
    """Options of the service."""
    ledger = str(tmp_path / "ledger.sqlite")
    return [
        "--black-box", service.url, "--teacher-id", "vendor-v3", "--dim", str(DIM), "--ledger", ledger,
        "--retries", "0", "--batch-size", "4",
    ]  # fmt: skip


TEMPLATES = ["a photo of a {}", "{} in the zoo"]


def test_a_black_box_is_asked_for_every_class_and_template_once(main, box, service, tmp_path, capsys):
    options = [
        *box,
        "--templates",
        *TEMPLATES,
        "--max-queries",
        "6",
        "--price",
        "0.25",
        "--logit-scale",
        "50",
    ]
    assert main(*options) == 0
    texts = [template.replace("{}", name) for name in ("Sea lion", "cat", "dog") for template in TEMPLATES]
    assert service.asked == Counter(texts) and service.kinds == {"text"} and service.calls == 2
    assert capsys.readouterr().out.endswith("6 texts asked\n")

    found = ClassVectors.load(tmp_path / "v.safetensors", expect_class_names=["Sea lion", "cat", "dog"])
    units = torch.tensor([vector(text) for text in texts], dtype=torch.float64)
    units = (units / units.norm(dim=1, keepdim=True)).reshape(3, 2, DIM).mean(1)
    expected = units / units.norm(dim=1, keepdim=True)
    torch.testing.assert_close(found.vectors.double(), expected, rtol=0, atol=1e-6)
    assert found.templates == TEMPLATES and found.teacher == "vendor-v3" and found.logit_scale == 50
    # the digest under which embed_labelled stores this teacher's image embeddings
    assert found.teacher_digest == Ledger(tmp_path / "other", None, "vendor-v3", dim=DIM).digest

    assert main(*options) == 0  # nothing left of the budget, and nothing to pay
    assert capsys.readouterr().out.endswith(", 0 texts asked\n") and service.calls == 2
    (figures,) = report(tmp_path / "ledger.sqlite")
    assert (figures.paid, figures.cost, figures.reused, figures.queries_left) == (6, 1.5, 6, 0)


def test_the_budget_is_looked_at_before_the_first_query(main, box, service, tmp_path):
    with pytest.raises(UserError, match="6 queries to vendor-v3 are needed, 5 are left .* nothing was asked"):
        main(*box, "--templates", *TEMPLATES, "--max-queries", "5")
    with pytest.raises(UserError, match="would cost 3, 2 is left"):
        main(*box, "--templates", *TEMPLATES, "--price", "0.5", "--max-cost", "2")
    assert service.calls == 0 and not (tmp_path / "v.safetensors").exists()


def test_an_interrupted_call_goes_on_and_writes_no_half_file(main, box, service, tmp_path):
    service.busy_after = 1
    with pytest.raises(UserError, match="gave no vector for a query"):
        main(*box, "--templates", *TEMPLATES)
    assert not (tmp_path / "v.safetensors").exists() and sum(service.asked.values()) == 4
    service.busy_after = None
    assert main(*box, "--templates", *TEMPLATES) == 0
    assert set(service.asked.values()) == {1} and len(service.asked) == 6


class TinyClip(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.text = nn.Embedding(300, 6)
        self.logit_scale = nn.Parameter(torch.tensor(3.0))
        self.logit_bias = None

    def encode_text(self, tokens, normalize=False):
        return self.text(tokens).sum(1)


@pytest.fixture
def clip(spec, tokenizer, monkeypatch):
    model = ClipModel(
        module=TinyClip(), config={}, image_spec=spec, tokenizer=tokenizer, source="tiny@tag", digest="f" * 64
    )
    monkeypatch.setattr(teacher_options, "load_clip", lambda name, pretrained="": model)
    return model


@pytest.mark.parametrize("normalise", ["each_and_mean", "mean", "none"])
def test_a_model_writes_the_same_kind_of_file(main, clip, tmp_path, normalise):
    (tmp_path / "prompts.txt").write_text("the {}\nmy {c}\n")
    assert (
        main("--model", "tiny", "--templates", str(tmp_path / "prompts.txt"), "--normalise", normalise) == 0
    )
    found = ClassVectors.load(tmp_path / "v.safetensors")
    rows = []
    for name in ("Sea lion", "cat", "dog"):
        features = clip.module.encode_text(clip.tokenizer([f"the {name}", f"my {name}"])).detach()
        mean = (F.normalize(features, dim=1) if normalise == "each_and_mean" else features).mean(0)
        rows.append(mean if normalise == "none" else mean / mean.norm())
    torch.testing.assert_close(found.vectors, torch.stack(rows), rtol=0, atol=1e-5)
    assert (found.teacher, found.teacher_digest, found.normalise) == ("tiny@tag", "f" * 64, normalise)
    assert found.logit_scale == pytest.approx(float(torch.tensor(3.0).exp()))


def test_the_sets_own_templates_are_the_default(main, clip, tmp_path):
    assert main("--model", "tiny") == 0
    assert ClassVectors.load(tmp_path / "v.safetensors").templates == ["a photo of a {}."]


def test_mistakes_are_named(main, box, clip):
    for arguments, told in (
        (["--templates", "a {}"], "--model is missing"),
        (["--model", "tiny", "--ledger", "x"], "--ledger goes with --black-box only"),
        (["--black-box", "http://127.0.0.1:9"], "--black-box needs --ledger"),
        (["--model", "tiny", "--templates", "a {}", "photo"], "has no {} or {c} for the class name"),
        (["--model", "tiny", "--templates", "nowhere.txt"], "nowhere.txt does not exist"),
        ([*box, "--normalise", "none"], "need text features before normalisation"),
        (["--model", "tiny", "--batch-size", "0"], "--batch-size must be at least 1"),
    ):
        with pytest.raises(UserError, match=told):
            main(*arguments)
