"""Published checkpoints: files built by hand in their layout, live objects and all, are read exactly and run nothing."""

from __future__ import annotations

import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from torch import Tensor, nn

from projects.promptkd import build_bank, legacy, teacher
from projects.promptkd import eval as evaluation
from projects.promptkd.config import BankConfig, ClipConfig, TeacherSource
from projects.promptkd.prompts import PromptShape, class_tokens
from projects.promptkd.student import PromptedStudent
from tests.projects.promptkd import released, tiny
from vlmkd.config import LabelledDataConfig
from vlmkd.data.labelled import LabelledSet
from vlmkd.errors import UserError
from vlmkd.image_spec import ImageSpec
from vlmkd.models.class_vectors import ClassVectors
from vlmkd.models.clip import ClipModel

NAMES = ["cat", "dog", "toad"]
TEMPLATE = "a photo of a {}."
DEPTH, LENGTH, WIDTH, LAYERS = 2, 3, 32, 3


def half(name: str, value: Tensor) -> Tensor:
    """A backbone tensor in the reference's precision: matrices and their biases fp16, norms and tables fp32."""
    exact = name.endswith(("positional_embedding", "class_embedding")) or ".ln_" in f".{name}"
    return value.clone() if exact else value.half()


def prompt(*shape: int, seed: int) -> Tensor:
    """Random prompts."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02


def image_layout(clip: ClipModel, prefix: str = "image_encoder.") -> dict[str, Tensor]:
    """A prompted image tower under the reference's names."""
    tower = clip.module.visual.state_dict()
    state = {prefix + name: half(name, value) for name, value in tower.items()}
    state[f"{prefix}VPT"] = prompt(LENGTH, WIDTH, seed=1)
    for block in range(1, DEPTH):
        state[f"{prefix}transformer.resblocks.{block}.VPT_shallow"] = prompt(LENGTH, WIDTH, seed=10 + block)
    return state


def teacher_layout(clip: ClipModel) -> dict[str, Tensor]:
    """A teacher's state dict: spec (g), at this CLIP's size."""
    weights = clip.module.state_dict()
    embedded = weights["token_embedding.weight"][class_tokens(clip.tokenizer, NAMES, TEMPLATE)].half()
    state = {
        "prompt_learner.ctx": prompt(LENGTH, WIDTH, seed=2).half(),
        "prompt_learner.token_prefix": embedded[:, :1],
        "prompt_learner.token_suffix": embedded[:, 1 + LENGTH :],
    }
    for name, value in clip.module.visual.state_dict().items():
        state[f"prompt_learner.ZS_image_encoder.{name}"] = half(name, value)
    state |= image_layout(clip)
    for name, value in weights.items():
        if name.startswith(("transformer.", "positional_embedding", "text_projection", "ln_final")):
            state[f"text_encoder.{name}"] = half(name, value)
    for block in range(1, DEPTH):
        name = f"text_encoder.transformer.resblocks.{block}.VPT_shallow"
        state[name] = prompt(LENGTH, WIDTH, seed=20 + block)
    return state | {"logit_scale": torch.tensor(3.5)}


def student_layout(clip: ClipModel, embed_dim: int) -> dict[str, Tensor]:
    """A student's state dict: spec (g), at this CLIP's size."""
    width = clip.config["embed_dim"]
    projector = nn.Sequential(
        nn.Conv2d(width, embed_dim, 1),
        nn.BatchNorm2d(embed_dim),
        nn.ReLU(),
        nn.Conv2d(embed_dim, embed_dim, 1),
    )
    projector(torch.randn(4, width, 1, 1))  # moves the running statistics
    state = image_layout(clip) | {"logit_scale": torch.tensor(4.0)}
    return state | {f"VPT_image_trans.conv1.{name}": value for name, value in projector.state_dict().items()}


def save(path: Path, state: dict[str, Tensor], *, prefix: str = "") -> Path:
    """A file as the reference's trainer writes it, with the live objects of its scheduler and optimiser."""
    parameter = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([parameter], lr=0.1, momentum=0.9)
    parameter.grad = torch.ones(2)
    optimizer.step()
    successor = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
    content = {
        "state_dict": {prefix + name: value for name, value in state.items()},
        "epoch": 20,
        "optimizer": optimizer.state_dict(),
        "scheduler": {"successor": successor, "base_lrs": [0.1], "path": Path("somewhere")},
        "val_result": 81.5,
    }
    torch.save(content, path)
    return path


@pytest.fixture
def clip() -> ClipModel:
    """A CLIP of three blocks of width 32."""
    return tiny.clip(width=WIDTH, layers=LAYERS)


@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_published_teacher_is_read_whole(clip: ClipModel, tmp_path: Path, prefix: str) -> None:
    state = teacher_layout(clip)
    path = save(tmp_path / "model-best.pth.tar", state, prefix=prefix)
    with pytest.raises(pickle.UnpicklingError):  # the live objects make torch's own safe loading fail
        torch.load(path, weights_only=True)
    read = legacy.read_checkpoint(path)
    assert read.keys() == state.keys() and legacy.kind_of(read, "file") == "teacher"
    assert all(torch.equal(read[name], value.float()) for name, value in state.items())

    other = tiny.clip(
        seed=9, width=WIDTH, layers=LAYERS
    )  # whatever CLIP is given, the file's backbone counts
    other.module.token_embedding.weight.data = clip.module.token_embedding.weight.data
    prompted, base = legacy.load_teacher(read, other, "file")
    assert prompted.shape == PromptShape(
        image_depth=DEPTH, image_length=LENGTH, text_depth=DEPTH, text_length=LENGTH
    )
    assert torch.equal(prompted.text.prompts[0], state["prompt_learner.ctx"].float())
    assert prompted.image.prompts is not None
    assert torch.equal(prompted.image.prompts[0], state["image_encoder.VPT"])
    assert torch.equal(prompted.image.prompts[1], state["image_encoder.transformer.resblocks.1.VPT_shallow"])
    assert torch.equal(prompted.text.prompts[1], state["text_encoder.transformer.resblocks.1.VPT_shallow"])
    assert float(prompted.scale) == pytest.approx(float(torch.tensor(3.5).exp()))
    assert base.digest != other.digest
    for name, value in clip.module.state_dict().items():
        if name not in ("logit_scale", "token_embedding.weight"):
            assert torch.equal(
                base.module.state_dict()[name], half(name.removeprefix("visual."), value).float()
            )


def test_teachers_round_trip_in_the_exact_layout(clip: ClipModel, tmp_path: Path) -> None:
    state = teacher_layout(clip)
    # With 24, 24 and 12 layers and depth 9 this is the published 761.
    assert len(state) == 3 + 2 * 8 + 12 * LAYERS * 3 + 1 + 4 + 1 + 2 * (DEPTH - 1)
    prompted, base = legacy.load_teacher(legacy.read_checkpoint(save(tmp_path / "a", state)), clip, "a")
    written = released.teacher_state(prompted, class_tokens(clip.tokenizer, NAMES, TEMPLATE))
    assert written.keys() == state.keys()
    for name, value in state.items():
        assert written[name].dtype == value.dtype and written[name].shape == value.shape, name
        assert torch.equal(written[name], value), name
    released.write_checkpoint(tmp_path / "b", written, 20)
    again, _ = legacy.load_teacher(legacy.read_checkpoint(tmp_path / "b"), base, "b")
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(again.image(images), prompted.image(images))


def test_students_round_trip_and_convolutions_are_linear_layers(clip: ClipModel, tmp_path: Path) -> None:
    state = student_layout(clip, embed_dim=24)
    read = legacy.read_checkpoint(save(tmp_path / "student", state, prefix="module."))
    assert legacy.kind_of(read, "student") == "student"
    student = legacy.load_student(read, tiny.clip(seed=5, width=WIDTH, layers=LAYERS), "student")
    assert float(student.logit_scale) == 4.0

    projector = nn.Sequential(
        nn.Conv2d(16, 24, 1), nn.BatchNorm2d(24), nn.ReLU(), nn.Conv2d(24, 24, 1)
    ).eval()
    projector.load_state_dict(
        {
            name.removeprefix("VPT_image_trans.conv1."): v
            for name, v in state.items()
            if "VPT_image_trans" in name
        }
    )
    images = torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        expected = projector(student.image(images)[:, :, None, None]).flatten(1)
        expected = expected / expected.norm(dim=-1, keepdim=True)
        torch.testing.assert_close(student(images), expected, rtol=0, atol=1e-6)

    written = released.student_state(student)
    assert written.keys() == state.keys()
    for name, value in state.items():
        assert written[name].dtype == value.dtype and torch.equal(written[name], value), name


def test_a_student_of_the_published_size() -> None:
    """1,013,760 trained values and 171 tensors: ViT-B/16, nine times four prompts, projector to 768."""
    tower = {"image_size": 224, "patch_size": 16, "width": 768, "layers": 12}
    text = {"context_length": 8, "vocab_size": 16, "width": 8, "heads": 1, "layers": 1}
    with torch.device("meta"):
        module = open_clip.CLIP(512, tower, text, quick_gelu=True)
    spec = ImageSpec(size=(224, 224), mean=tiny.MEAN, std=tiny.STD)
    clip = ClipModel(module, {"embed_dim": 512}, spec, tiny.tokenizer, "meta", "")
    student = PromptedStudent(clip, 768, depth=9, length=4)
    assert sum(p.numel() for p in student.parameters() if p.requires_grad) == 1_013_760
    assert len(released.student_state(student)) == 171


def test_our_own_student_becomes_a_file_that_is_read_back(clip: ClipModel, tmp_path: Path) -> None:
    student = PromptedStudent(clip, 24, depth=3, length=2, seed=4)
    student(torch.randn(4, 3, 16, 16))  # training mode: the running statistics move
    student.eval()
    released.write_checkpoint(tmp_path / "s", released.student_state(student), 1)
    again = legacy.load_student(legacy.read_checkpoint(tmp_path / "s"), clip, "s")
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(again(images), student(images), rtol=0, atol=2e-2)  # fp16 backbone
    assert torch.equal(again.image.prompts, student.image.prompts)  # type: ignore[arg-type]


def removed(name: str) -> Any:
    """An edit that takes a tensor out."""
    return lambda state: state.pop(name)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            removed("image_encoder.VPT"),
            "image_encoder.VPT of block 0 is missing, but deeper blocks have prompts",
        ),
        (removed("image_encoder.proj"), "missing: visual.proj"),
        (removed("text_encoder.ln_final.bias"), "missing: ln_final.bias"),
        (removed("logit_scale"), "logit_scale is missing"),
        (
            lambda state: state.update({"adapter.weight": torch.zeros(1)}),
            "1 unknown tensors, first adapter.weight",
        ),
        (
            lambda state: state.update(
                {"image_encoder.transformer.resblocks.9.VPT_shallow": torch.zeros(LENGTH, WIDTH)}
            ),
            "image_encoder.VPT of block 2 is missing",
        ),
        (
            lambda state: state.update(
                {"text_encoder.transformer.resblocks.1.VPT_shallow": torch.zeros(7, WIDTH)}
            ),
            "block 1 has prompts",
        ),
    ],
)
def test_incomplete_and_foreign_teachers_are_refused(clip: ClipModel, edit: Any, message: str) -> None:
    state = {name: value.float() for name, value in teacher_layout(clip).items()}
    edit(state)
    with pytest.raises(UserError, match=message):
        legacy.load_teacher(state, clip, "file")


@pytest.mark.parametrize("name", ["image_encoder.ln_post.weight", "VPT_image_trans.conv1.1.running_var"])
def test_incomplete_students_are_refused(clip: ClipModel, name: str) -> None:
    state = {key: value.float() for key, value in student_layout(clip, 24).items()}
    del state[name]
    with pytest.raises(UserError, match="missing"):
        legacy.load_student(state, clip, "file")


class Bomb:
    """Calls a function when it is unpickled by the ordinary unpickler."""

    def __init__(self, function: Any, *arguments: str) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def test_no_code_in_a_checkpoint_runs(clip: ClipModel, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    state = student_layout(clip, 24)
    content = {"state_dict": state, "scheduler": [Bomb(open, str(trace), "w")]}
    torch.save(content, tmp_path / "bomb")
    read = legacy.read_checkpoint(tmp_path / "bomb")
    assert not trace.exists() and "logit_scale" in read
    # The one load without weights_only, of the test's own file: it proves that the bomb is armed.
    torch.load(tmp_path / "bomb", weights_only=False)
    assert trace.exists()
    torch.save({"state_dict": {"a": Bomb(open, str(tmp_path / "b"), "w")}}, tmp_path / "weights")
    with pytest.raises(UserError, match="a is no tensor"):
        legacy.read_checkpoint(tmp_path / "weights")
    torch.save({"state_dict": state, "scheduler": Bomb(os.system, "true")}, tmp_path / "shell")
    with pytest.raises(UserError, match=f"names {os.system.__module__}.system, which is code"):
        legacy.read_checkpoint(tmp_path / "shell")


def test_files_of_other_kinds_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        legacy.read_checkpoint(tmp_path / "none")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(UserError, match="is damaged or of another kind"):
        legacy.read_checkpoint(tmp_path / "text")
    with zipfile.ZipFile(tmp_path / "zip", "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(UserError, match="is damaged"):
        legacy.read_checkpoint(tmp_path / "zip")
    torch.save({"weights": {}}, tmp_path / "other")
    with pytest.raises(UserError, match="has no state_dict"):
        legacy.read_checkpoint(tmp_path / "other")
    with zipfile.ZipFile(tmp_path / "other") as archive, zipfile.ZipFile(tmp_path / "torn", "w") as torn:
        for name in archive.namelist():
            torn.writestr(name, archive.read(name)[:-3])
    with pytest.raises(UserError, match="damaged"):
        legacy.read_checkpoint(tmp_path / "torn")
    with pytest.raises(UserError, match="neither prompt_learner.ctx"):
        legacy.kind_of({"a": torch.zeros(1)}, "file")


def test_published_folders_are_found_in_either_spelling(tmp_path: Path) -> None:
    for name in ("StandfordCars", "FGVCaircraft", "ImageNet", "ImageNet-xd", "DescribableTextures"):
        (tmp_path / name / "VLPromptLearner").mkdir(parents=True)
        (tmp_path / name / "VLPromptLearner" / "my-own-name.pth.tar-20").write_bytes(b"")
    for key, setting, name in (
        ("stanford_cars", "base_to_novel", "StandfordCars"),
        ("fgvc_aircraft", "base_to_novel", "FGVCaircraft"),
        ("imagenet", "base_to_novel", "ImageNet"),
        ("dtd", "cross_dataset", "ImageNet-xd"),
        ("imagenet-a", "domain_generalization", "ImageNet-xd"),
    ):
        found = legacy.find_teacher(tmp_path, key, setting)
        assert found == tmp_path / name / "VLPromptLearner" / "my-own-name.pth.tar-20"
    folder = tmp_path / "DescribableTextures" / "VLPromptLearner"
    (folder / "model.pth.tar-5").write_bytes(b"")
    with pytest.raises(UserError, match="name one checkpoint file"):
        legacy.find_teacher(tmp_path, "dtd", "base_to_novel")
    (folder / "checkpoint").write_text("model.pth.tar-5\n")
    assert legacy.find_teacher(tmp_path, "dtd", "base_to_novel") == folder / "model.pth.tar-5"
    with pytest.raises(UserError, match="found nothing"):
        legacy.find_teacher(tmp_path, "eurosat", "base_to_novel")
    with pytest.raises(UserError, match="no published teacher is named after emoji"):
        legacy.find_teacher(tmp_path, "emoji", "base_to_novel")
    (tmp_path / "ImageNet-xd").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="teacher of all of ImageNet's classes .* found nothing"):
        legacy.find_teacher(tmp_path, "dtd", "cross_dataset")


def test_the_setting_decides_whose_published_teacher_is_taken(
    clip: ClipModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`build_bank.py` and both ways into `eval.py`, in a folder with a teacher of the target set and one of ImageNet."""
    monkeypatch.setattr(teacher, "load_clip", lambda model, pretrained: clip)
    monkeypatch.setattr(evaluation, "load_clip", lambda model, pretrained: clip)
    for name, seed in (("DescribableTextures", 7), ("ImageNet-xd", 8)):
        (tmp_path / name).mkdir()
        state = teacher_layout(clip)
        state["prompt_learner.ctx"] = prompt(LENGTH, WIDTH, seed=seed).half() * 30
        save(tmp_path / name / "model.pth.tar-20", state)
    save(tmp_path / "student", student_layout(clip, 16))
    dataset = LabelledSet("dtd", NAMES, [TEMPLATE], {}, [])
    monkeypatch.setattr(build_bank, "configured_set", lambda data: dataset)
    source = TeacherSource(prompts=str(tmp_path), clip=ClipConfig(model="tiny"))
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    banks, answers = {}, {}
    for short, setting in evaluation.SETTINGS.items():
        cfg = BankConfig(
            out=str(tmp_path / short), teacher=source, data=LabelledDataConfig(set="dtd"), protocol=setting
        )
        build_bank.build_bank(cfg)
        banks[short] = ClassVectors.load(tmp_path / short)
        for ckpt in (tmp_path, tmp_path / "student"):
            model = evaluation.classifier(
                str(ckpt), dataset, ClipConfig(model="tiny"), source, "", torch.device("cpu"), setting
            )
            answers[short, ckpt.name] = model.classify(images)
    own, across = "DescribableTextures", "ImageNet-xd"
    assert [Path(banks[short].teacher).parent.name for short in ("base2novel", "cross", "dg")] == [
        own,
        across,
        across,
    ]
    for name in (tmp_path.name, "student"):
        assert torch.equal(answers["cross", name], answers["dg", name])
        assert not torch.allclose(answers["cross", name], answers["base2novel", name], atol=1e-3)


def test_zoo_entries_are_read_where_checkpoints_are_named(
    clip: ClipModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A teacher and its student, put into the cache as `download.py` says, answer like the files themselves."""
    monkeypatch.setenv("VLMKD_CACHE", str(tmp_path))
    monkeypatch.setattr(teacher, "load_clip", lambda model, pretrained: clip)
    monkeypatch.setattr(evaluation, "load_clip", lambda model, pretrained: clip)
    named = ClipConfig(model="tiny")
    entry = "zoo:PromptKD-teacher-ViT-L-14-EuroSAT"
    with pytest.raises(
        UserError, match=r"get EuroSAT/.*/model-best.pth.tar from .* and put it at .*EuroSAT.pth.tar"
    ):
        teacher.load_teacher(TeacherSource(prompts=entry, clip=named), "eurosat", "base_to_novel")
    teachers = save(tmp_path / "zoo" / "PromptKD-teacher-ViT-L-14-EuroSAT.pth.tar", teacher_layout(clip))
    students = save(tmp_path / "zoo" / "PromptKD-student-ViT-B-16-ImageNet.pth.tar", student_layout(clip, 16))
    dataset = LabelledSet("tiny", NAMES, [TEMPLATE], {}, [])
    answers = []
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    for first, second in ((entry, "zoo:PromptKD-student-ViT-B-16-ImageNet"), (str(teachers), str(students))):
        source = TeacherSource(prompts=first, clip=named)
        for name in (first, second):
            device = torch.device("cpu")
            model = evaluation.classifier(name, dataset, named, source, "", device, "base_to_novel")
            answers.append(model.classify(images))
    assert torch.equal(answers[0], answers[2]) and torch.equal(answers[1], answers[3])
    assert not torch.equal(answers[0], answers[1])
