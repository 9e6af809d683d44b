"""What the runs leave behind: a teacher's prompts, a whole student; written, read, and checked in a fresh process.

`python -m projects.promptkd.exports --check FOLDER PROBE` is that process.

A teacher folder has `prompts.safetensors` and `promptkd_teacher.json`, which names the CLIP under the prompts. A student
folder stands alone: `model.safetensors` holds its image tower, prompts, projector and class vectors, and
`promptkd_student.json` says how they go together.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from projects.promptkd.config import ClipConfig
from projects.promptkd.objective import cosine_logits
from projects.promptkd.prompts import PromptedCLIP, PromptedEncoder, PromptShape
from projects.promptkd.student import PromptedStudent
from vlmkd import __version__
from vlmkd.errors import UserError
from vlmkd.image_spec import ImageSpec
from vlmkd.models.checkpoints import differences, read_safetensors
from vlmkd.models.class_vectors import ClassVectors
from vlmkd.models.clip import ClipModel, build_clip, evaluating, load_clip, read_json, weights_digest

TEACHER_JSON, STUDENT_JSON = "promptkd_teacher.json", "promptkd_student.json"
_PROMPTS, _MODEL = "prompts.safetensors", "model.safetensors"
_TOLERANCE = 1e-4
"""Largest difference of an output; fp32 on another kernel differs by less than 1e-5."""
_NO_TEXT = {"context_length": 1, "vocab_size": 1, "width": 8, "heads": 1, "layers": 1}
_PROBE_TEXT = "a photo of a cat, a probe that is long enough"


def clip_digest(clip: ClipModel) -> str:
    """Digest of a CLIP's weights, random ones too."""
    return clip.digest or weights_digest(clip.module.state_dict())


def teacher_digest(base: str, prompts: Mapping[str, Tensor]) -> str:
    """Digest of a prompted teacher: of the CLIP under the prompts, and the prompts."""
    return hashlib.sha256(f"{base} {weights_digest(prompts)}".encode()).hexdigest()


def image_only(clip: ClipModel) -> dict[str, Any]:
    """The config of a CLIP with the same image tower and next to no text tower."""
    kept = {
        name: clip.config[name] for name in ("embed_dim", "vision_cfg", "quick_gelu") if name in clip.config
    }
    return kept | {"text_cfg": dict(_NO_TEXT)}


# ---------------------------------------------------------------------------------------------------------- teacher


@dataclass(frozen=True)
class TeacherFacts:
    """What `promptkd_teacher.json` says."""

    clip: ClipConfig
    clip_digest: str
    shape: PromptShape
    template: str
    class_names: list[str]
    """Classes of the training labels."""
    digest: str


def write_teacher(folder: Path, prompts: Mapping[str, Tensor], facts: TeacherFacts) -> None:
    """Write a teacher's prompts (names and shapes of `PromptedCLIP.prompts`)."""
    tensors = {name: value.detach().float().cpu().contiguous() for name, value in prompts.items()}
    _write(folder, TEACHER_JSON, dataclasses.asdict(facts), _PROMPTS, tensors)


def read_teacher(
    folder: Path, clip: ClipConfig | None = None
) -> tuple[PromptedCLIP, ClipModel, TeacherFacts]:
    """The prompted CLIP of a teacher folder; `clip` says where its CLIP is now, when it has moved.

    Raises:
        UserError: no teacher folder, or a CLIP of other weights than the prompts were trained on.
    """
    content = read_json(folder / TEACHER_JSON, "teacher export")
    facts = TeacherFacts(
        **{
            **{name: content[name] for name in ("clip_digest", "template", "class_names", "digest")},
            "clip": ClipConfig(**content["clip"]),
            "shape": PromptShape(**content["shape"]),
        }
    )
    where = clip if clip is not None and clip.model else facts.clip
    base = load_clip(where.model, where.pretrained)
    if clip_digest(base) != facts.clip_digest:
        raise UserError(
            f"teacher {folder}: its prompts belong to other weights than those of {base.source}; name the CLIP that it "
            f"was trained on ({facts.clip.model} {facts.clip.pretrained}) in teacher.clip"
        )
    prompted = PromptedCLIP(base, facts.shape)
    prompted.set_prompts(read_safetensors(folder / _PROMPTS), str(folder / _PROMPTS))
    return prompted.eval(), base, facts


# ---------------------------------------------------------------------------------------------------------- student


@dataclass(frozen=True)
class StudentFacts:
    """What `promptkd_student.json` says."""

    clip_config: dict[str, Any]
    """Config of `image_only`."""
    image_spec: ImageSpec
    embed_dim: int
    depth: int
    length: int
    projector_layers: int
    source: str
    """The student's CLIP as its user named it."""


class StudentClassifier:
    """A student with class vectors as the ImageClassifier that evaluators call."""

    def __init__(
        self, name: str, student: Any, vectors: ClassVectors, scale: float, image_spec: ImageSpec
    ) -> None:
        """`student` is a PromptedStudent, or an engine's wrapper of one."""
        self.name, self.image_spec, self.class_names = name, image_spec, vectors.class_names
        self.student, self.vectors, self._scale = student, vectors, scale

    @torch.no_grad()
    def classify(self, images: Tensor) -> Tensor:
        """[B,3,H,W] -> logits [B,C], fp32: scaled cosines with the teacher's class vectors."""
        device = next(self.student.parameters()).device
        with evaluating(self.student):
            embeds = self.student(images.to(device))
        return cosine_logits(embeds, self.vectors.vectors.to(device), self._scale)


def write_student(
    folder: Path, state: Mapping[str, Tensor], vectors: ClassVectors, facts: StudentFacts
) -> None:
    """Write a student's complete state dict with its class vectors."""
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in state.items()}
    _write(folder, STUDENT_JSON, dataclasses.asdict(facts), _MODEL, tensors)
    vectors.save(folder / "class_vectors.safetensors")


def read_student(folder: Path) -> StudentClassifier:
    """The classifier of a student folder.

    Raises:
        UserError: no student folder, or damaged weights.
    """
    content = read_json(folder / STUDENT_JSON, "student export")
    spec: dict[str, Any] = {
        name: tuple(v) if isinstance(v, list) else v for name, v in content["image_spec"].items()
    }
    names = [item.name for item in dataclasses.fields(StudentFacts)]
    facts = StudentFacts(**{name: content[name] for name in names} | {"image_spec": ImageSpec(**spec)})
    student = empty_student(facts)
    state = read_safetensors(folder / _MODEL)
    problems = differences(student.state_dict(), state)
    if problems:
        raise UserError(f"student {folder}: {problems}; export it again")
    student.load_state_dict(state)
    vectors = ClassVectors.load(folder / "class_vectors.safetensors")
    scale = float(student.logit_scale.double().exp())
    return StudentClassifier(str(folder), student.eval(), vectors, scale, facts.image_spec)


def empty_student(facts: StudentFacts) -> PromptedStudent:
    """The student that `facts` describe, with random weights."""
    clip = ClipModel(
        module=build_clip(facts.clip_config, seed=0),
        config=facts.clip_config,
        image_spec=facts.image_spec,
        tokenizer=lambda texts: torch.zeros(len(texts), 1, dtype=torch.long),
        source=facts.source,
        digest="",
    )
    return PromptedStudent(
        clip, facts.embed_dim, depth=facts.depth, length=facts.length, projector_layers=facts.projector_layers
    )


def _write(
    folder: Path, name: str, content: Mapping[str, Any], weights_name: str, tensors: Mapping[str, Tensor]
) -> None:
    """A folder that appears complete or not at all; an older export of the same kind is replaced."""
    from safetensors.torch import save_file

    folder = folder.absolute()
    if folder.exists() and any(folder.iterdir()) and not (folder / name).is_file():
        raise UserError(f"{folder} exists and is no such export; choose another folder")
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_file(dict(tensors), partial / weights_name, {"format": "pt"})
    text = json.dumps({**content, "vlmkd": __version__}, indent=1, ensure_ascii=False)
    (partial / name).write_text(text + "\n", encoding="utf-8")
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(partial, folder)


# ------------------------------------------------------------------------------------------------------------ check


def outputs(folder: Path, images: Tensor) -> dict[str, Tensor]:
    """What the exported model makes of pixels, and a teacher of a text."""
    if (folder / STUDENT_JSON).is_file():
        return {"logits": read_student(folder).classify(images)}
    prompted, clip, _ = read_teacher(folder)
    encoder = PromptedEncoder(prompted, clip, "teacher")
    return {"image_embeds": encoder.encode_image(images), "text_embeds": encoder.encode_text([_PROBE_TEXT])}


def probe_text() -> str:
    """The text by which a teacher's export is checked."""
    return _PROBE_TEXT


def verify(folder: Path, images: Tensor, expected: Mapping[str, Tensor]) -> None:
    """Reload `folder` in a fresh process and compare its outputs with `expected`.

    Raises:
        UserError: they differ, or the folder cannot be loaded.
    """
    from safetensors.torch import save_file

    with tempfile.TemporaryDirectory() as scratch:
        probe = Path(scratch) / "probe.safetensors"
        save_file(
            {"images": images, **{name: value.cpu().contiguous() for name, value in expected.items()}}, probe
        )
        root = str(Path(__file__).resolve().parents[2])
        env = {
            name: value
            for name, value in os.environ.items()
            if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        }
        env |= {
            "CUDA_VISIBLE_DEVICES": "",
            "PYTHONPATH": os.pathsep.join(filter(None, [root, env.get("PYTHONPATH", "")])),
        }
        command = [
            sys.executable,
            "-m",
            "projects.promptkd.exports",
            "--check",
            str(folder.absolute()),
            str(probe),
        ]
        child = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if child.returncode:
        lines = (child.stderr.strip() or f"exit code {child.returncode}").splitlines()
        raise UserError(
            f"export {folder} does not reproduce the model: {lines[-1]}; keep the run's checkpoint and report this"
        )


def main(argv: list[str]) -> int:
    """Entry of the checking process; prints what differs and returns 1 when something does."""
    parser = argparse.ArgumentParser(prog="python -m projects.promptkd.exports", description=main.__doc__)
    parser.add_argument("--check", nargs=2, type=Path, required=True, metavar=("FOLDER", "PROBE"))
    folder, probe_file = parser.parse_args(argv).check
    probe = read_safetensors(probe_file)
    try:
        found = outputs(folder, probe["images"])
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    for name, value in found.items():
        limit = _TOLERANCE * max(1.0, float(probe[name].abs().max()))
        if value.shape != probe[name].shape or not float((value - probe[name]).abs().max()) <= limit:
            print(f"{name} differs", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
