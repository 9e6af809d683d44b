"""projects/vl2v_adip/ask.py, called the way a user does, before a teacher that counts what it is asked."""

from __future__ import annotations

import hashlib
import io
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from projects.vl2v_adip import ask
from vlmkd.data.decode import decode
from vlmkd.data.loader import Loader
from vlmkd.data.pipelines import ImagePipeline
from vlmkd.data.sources import ItemSource, Stream
from vlmkd.data.teacher_outputs import TeacherOutputs
from vlmkd.data.transforms import ViewConfig, render
from vlmkd.datasets.labelled_sets import load_set
from vlmkd.errors import UserError
from vlmkd.models.class_vectors import ClassVectors
from vlmkd.service import NotServed

DIM = 4


def vector(data: bytes) -> list[float]:
    """Another one for another input, and no unit vector."""
    generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(data).digest()[:4], "big"))
    return torch.randn(DIM, generator=generator).tolist()


class Teacher:
    """Stands for the service: `answer` gives a vector, `served` calls are answered."""

    def __init__(self):
        self.paid, self.calls, self.served, self.answer = [], 0, 1000, vector

    def __call__(self, cfg):
        assert cfg.url == "https://host/embed"
        return self

    def embed(self, kind, inputs):
        self.calls += 1
        if self.calls > self.served:
            raise NotServed("busy")
        data = [part.encode() if kind == "text" else part for part in inputs]
        vectors = [self.answer(part) for part in data]
        if None in vectors:
            raise NotServed("no", refused=True)
        self.paid += inputs
        return vectors


@pytest.fixture
def teacher(monkeypatch):
    service = Teacher()
    monkeypatch.setattr(ask, "HttpTeacher", service)
    return service


@pytest.fixture
def command(tmp_path, teacher):
    """The command on two domains with an image of each of three classes, the last of which is a copy of the first."""
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 255, (30, 40, 3), dtype=np.uint8)) for _ in range(5)]
    names = itertools.product(("ink", "oil"), ("Sea_lion", "cat", "dog"))
    for (domain, name), picture in zip(names, [*pictures, pictures[0]], strict=True):
        (tmp_path / "set" / domain / name).mkdir(parents=True)
        picture.save(tmp_path / "set" / domain / name / "0.png")
    vendor = tmp_path / "vendor.yaml"
    vendor.write_text(
        f"{{url: 'https://host/embed', teacher_id: v3, dim: {DIM}, ledger: {tmp_path / 'ledger'}}}"
    )

    def call(action, *fields, out="out"):
        data = [f"data.set=domains:{tmp_path / 'set'}", "data.workers=0"]
        return ask.main([action, str(vendor), *data, f"out={tmp_path / out}", *fields])

    return call


@pytest.fixture
def items(tmp_path, command):
    return load_set(f"domains:{tmp_path / 'set'}").splits["all"]


TEMPLATES = ["a photo of a {}", "{} in the zoo"]
TEXTS = [template.replace("{}", name) for name in ("Sea lion", "cat", "dog") for template in TEMPLATES]


def test_every_class_and_template_is_asked_once(command, teacher, tmp_path, capsys):
    fields = [f"templates={TEMPLATES}", "max_queries=6", "price=0.25", "logit_scale=50", "batch_size=4"]
    assert command("classes", *fields, out="v.safetensors") == 0
    assert teacher.paid == TEXTS and teacher.calls == 2
    assert capsys.readouterr().out.endswith("v.safetensors: 3 classes, 2 prompts each, 6 texts asked\n")

    found = ClassVectors.load(tmp_path / "v.safetensors", expect_class_names=["Sea lion", "cat", "dog"])
    units = F.normalize(torch.tensor([vector(text.encode()) for text in TEXTS]).double(), dim=1)
    expected = F.normalize(units.reshape(3, 2, DIM).mean(1), dim=1)
    torch.testing.assert_close(found.vectors.double(), expected, rtol=0, atol=1e-6)
    assert (found.templates, found.teacher, found.logit_scale) == (TEMPLATES, "v3", 50)

    assert command("classes", *fields, out="v.safetensors") == 0  # nothing is left, and nothing to pay
    assert capsys.readouterr().out.endswith(", 0 texts asked\n") and teacher.calls == 2
    assert ask.main(["report", str(tmp_path / "ledger")]) == 0
    told = capsys.readouterr().out
    assert told.startswith("v3: ") and "paid 6, cost 1.5, reused 6, answered 6, failed 0" in told
    assert "queries left 0, cost left no limit" in told
    command("images", "max_queries=20")  # one teacher: its vectors and embeddings fit together
    assert TeacherOutputs(tmp_path / "out", "clean").info.digest == found.teacher_digest


def test_an_interrupted_call_goes_on_and_writes_no_half_file(command, teacher, tmp_path):
    teacher.served, fields = 1, [f"templates={TEMPLATES}", "batch_size=4"]
    with pytest.raises(UserError, match="gave no vector for a query"):
        command("classes", *fields, out="v.safetensors")
    assert not (tmp_path / "v.safetensors").exists() and len(teacher.paid) == 4
    teacher.served = 1000
    assert command("classes", *fields, out="v.safetensors") == 0
    assert sorted(teacher.paid) == sorted(TEXTS)


def test_a_set_is_asked_once_and_trained_on_without_a_teacher(command, items, teacher, tmp_path):
    assert command("images", "max_queries=5") == 0
    assert len(teacher.paid) == 5 and set(teacher.paid) == {item.image.read() for item in items}
    stored = TeacherOutputs(tmp_path / "out", "clean")
    assert (stored.info.source, stored.info.logit_scale) == ("v3", 100)
    stored.check(ViewConfig(), (9, 9, 9), items=items, digest=stored.info.digest)
    for item in items:
        expected = F.normalize(torch.tensor([vector(item.image.read())]), dim=1)
        torch.testing.assert_close(stored.get(item.key).columns["image_embeds"], expected, rtol=0, atol=1e-6)
    command("images", out="again")
    assert len(teacher.paid) == 5


def test_a_set_larger_than_the_budget_is_refused_unasked(command, teacher, tmp_path, capsys):
    with pytest.raises(UserError, match="5 more queries to v3 are needed.* 4 queries .*nothing was asked"):
        command("images", "max_queries=4")
    assert not teacher.calls and not (tmp_path / "out").exists()
    (tmp_path / "set" / "ink" / "cat" / "0.png").write_bytes(b"no image")  # found before paying
    assert command("images", "max_queries=4") == 0
    assert capsys.readouterr().out.endswith("out is complete; left out: undecodable_image 1\n")
    assert len(teacher.paid) == 4


def test_drawn_views_are_sent_as_pictures_and_masked_ones_are_marked(
    command, items, teacher, tmp_path, capsys
):
    def mean_colour(data: bytes) -> list[float] | None:
        """None for the second picture that it sees, each time."""
        seen.append(data)
        return None if data in seen[1:2] else [*decode(data).double().mean(dim=(0, 1)).tolist(), 1.0]

    seen: list[bytes] = []
    teacher.answer = mean_colour
    fields = ["views=2", "size=16", "data.crop_scale=[0.3,0.6]", "data.flip=0.5", "mask=true", "seed=4"]
    assert command("images", *fields) == 0
    assert capsys.readouterr().out.endswith("out is complete; left out: masked_view 1\n")
    assert all(Image.open(io.BytesIO(part)).size == (16, 16) for part in teacher.paid)
    stored, masked = TeacherOutputs(tmp_path / "out"), 0
    spec = stored.info.image_spec
    for item in items:
        entry = stored.get(item.key)
        for view, embed in zip(entry.views, entry.columns["image_embeds"], strict=True):
            if not embed.any():
                masked += 1
                continue
            pixels = render(decode(item.image.read()), view, spec).float()
            expected = F.normalize(torch.tensor([*pixels.mean(dim=(0, 1)).tolist(), 1.0]), dim=0)
            torch.testing.assert_close(embed, expected, rtol=0, atol=1e-5)
    assert masked == 1
    source = ItemSource({"a": Stream(items, 6)}, seed=1, rank=0, world_size=1, view_count=stored.info.crops)
    views = ViewConfig((0.3, 0.6), (0.75, 4 / 3), 0.5)
    loader = Loader(source, ImagePipeline(spec, views, stored=[[stored]]), workers=0)
    valid = [bool(one) for batch in itertools.islice(iter(loader), 2) for one in batch["teacher_valid"][0]]
    assert valid.count(False) == 1 and len(valid) == 12


def test_mistakes_are_named(command, tmp_path):
    for arguments, told in (
        (["report", str(tmp_path / "nowhere")], "ledger .*nowhere does not exist"),
        (["images", "url=https://host/embed"], "config field teacher_id is missing"),
        (["images", "budget=3"], "budget"),
    ):
        with pytest.raises(UserError, match=told):
            ask.main(arguments)
    with pytest.raises(UserError, match="config field out is .*; it must end in .safetensors"):
        command("classes")
