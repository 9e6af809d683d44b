"""The loss of every stage of every project over its first twenty steps: a change that claims to be neutral leaves it alone.

The curves lie in tests/golden, one line a step. A change that moves one on purpose writes it again and gives its reason in
the commit:

    VLMKD_GOLDEN=write python -m pytest tests/projects/test_golden.py [-k NAME]
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.data.conftest import pair, write_tar
from tests.projects.calico.toy import TOY
from tests.projects.calico.toy import scenes as toy_scenes
from tests.projects.dho.tiny_runs import clip_config, write_images
from tests.projects.matvlm.models import decoder_folder, scenes, tower_files
from tests.projects.tinyclip.tiny_runs import model_config
from tests.projects.vl2v_adip.tiny import domain_tree
from tests.projects.zygote import Zygote
from vlmkd.export.clip import export_clip
from vlmkd.models.clip import load_clip

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
CURVES = ROOT / "tests" / "golden"
STEPS = 20
UNCHECKED = {
    "tinyclip": ["projects.tinyclip.task:verify_export"],
    "promptkd": ["projects.promptkd.task:verify", "projects.promptkd.task:verify_classifiers"],
    "dho": ["projects.dho.task:verify_classifiers"],
    "vl2v_adip": ["projects.vl2v_adip.task:verify_classifiers"],
    "llava_mod": ["vlmkd.chat_runs:check_mllms"],
    "matvlm": ["vlmkd.chat_runs:check_mllms"],
    "calico": ["projects.calico.export:check"],
}
"""The check of an export starts a process, and has tests of its own."""


class Place:
    """A folder with data, models and runs."""

    def __init__(self, folder: Path, zygote: Zygote) -> None:
        self.folder, self._zygote = folder, zygote
        shards = folder / "shards"
        shards.mkdir()
        for shard in range(3):
            members = [member for number in range(12) for member in pair(shard, number)]
            write_tar(shards / f"{shard}.tar", members)
        write_images(folder / "images")
        domain_tree(folder / "domains")
        for name, config in (
            ("teacher", model_config(48, 4)),
            ("student", model_config(32, 2)),
            ("large", clip_config(32, 2)),
            ("small", clip_config(16, 1)),
        ):
            path = folder / f"{name}.json"
            path.write_text(json.dumps(config))
            export_clip(folder / name, load_clip(str(path), seed=len(name)))
        self.tower, self.decoder = tower_files(folder), f"hf:{decoder_folder(folder / 'llama')}"
        self.chats = scenes(folder / "chats")

    def model(self, name: str) -> str:
        """How a config names one of the CLIPs."""
        return f"local-dir:{self.folder / name}"

    def command(self, module: str, *arguments: object, without: list[str] | None = None) -> None:
        """A command that must end well."""
        output = self.folder / "output.txt"
        code, said = self._zygote.run(
            module, [str(word) for word in arguments], output, without=without or ()
        )
        assert code == 0, said

    def train(self, script: str, name: str, fields: dict[str, Any]) -> Path:
        """A whole run in fp32 on one rank; returns its folder."""
        values = {
            "threads": 1,
            "seed": 3,
            "log": {"every_steps": 1},
            "checkpoint": {"every_steps": 0},
            "evaluation": {"teacher": False},
            **fields,
        }
        path, run_dir = self.folder / f"{name}.yaml", self.folder / "runs" / name
        path.write_text(yaml.safe_dump(values))
        if not (run_dir / "done.json").is_file():
            without = UNCHECKED.get(script.split(".")[1], [])
            self.command(script, path, f"run_dir={run_dir}", without=without)
        return run_dir


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, zygote: Zygote) -> Place:
    """What the runs share."""
    return Place(tmp_path_factory.mktemp("golden"), zygote)


# ------------------------------------------------------------------------------------------------------- the runs


def _stream(place: Place, **fields: Any) -> dict[str, Any]:
    """A TinyCLIP run on shards, read by two processes."""
    source = {"shards": [str(place.folder / "shards" / "{0..2}.tar")]}
    return {
        "steps": STEPS,
        "batch_size": 8,
        "student": {"model": place.model("student")},
        "teachers": [{"model": place.model("teacher")}],
        "data": {"sources": [source], "workers": 2, "shuffle_buffer": 10, "crop_scale": [0.6, 1.0]},
        "optim": {"lr": 1e-3, "warmup_steps": 4},
        **fields,
    }


def tinyclip_distill(place: Place) -> Path:
    fields = _stream(place, micro_batch_size=4, loss={"affinity": 1.0, "contrastive": 1.0, "feature": 10.0})
    return place.train("projects.tinyclip.train_distill", "tinyclip_distill", fields)


def tinyclip_stored(place: Place) -> Path:
    cache = place.folder / "cache"
    shards = str(place.folder / "shards" / "{0..2}.tar")
    options = ["--crops", 2, "--crop-scale", 0.6, 1.0, "--threads", 1, "--out", cache]
    tool = str(ROOT / "data_tools" / "embed_teacher.py")
    place.command(tool, "--model", place.model("teacher"), "--shards", shards, *options)
    fields = _stream(place)
    fields["data"]["sources"][0]["teacher_caches"] = [str(cache)]
    return place.train("projects.tinyclip.train_distill", "tinyclip_stored", fields)


def tinyclip_mask(place: Place) -> Path:
    masks = {
        "start_sparsity": 0.0,
        "target_sparsity": 0.5,
        "sparsity_warmup_steps": 10,
        "lr": 0.5,
        "multiplier_lr": 0.5,
    }
    fields = _stream(place, masks=masks, student={"model": place.model("teacher")})
    return place.train("projects.tinyclip.train_mask", "tinyclip_mask", fields)


def promptkd_teacher(place: Place) -> Path:
    fields = {
        "steps": "10ep",  # of two steps: four images of each base class
        "batch_size": 3,
        "shots": 4,
        "data": {"set": f"folder:{place.folder / 'images'}", "workers": 0},
        "clip": {"model": place.model("large")},
        "prompts": {
            "image_depth": 2,
            "image_length": 2,
            "text_depth": 1,
            "text_length": 2,
            "init": "a photo",
        },
        "average": {"mean": 2.0, "std": 1.0},
        "frozen_templates": "set",
        "classes_per_chunk": 2,
    }
    return place.train("projects.promptkd.train_teacher", "promptkd_teacher", fields)


def promptkd_student(place: Place) -> Path:
    fields = {
        "steps": "4ep",  # of five steps
        "batch_size": 6,
        "data": {"set": f"folder:{place.folder / 'images'}", "workers": 0},
        "student": {"model": place.model("small")},
        "prompts": {"depth": 1, "length": 2},
        "teacher": {"prompts": str(promptkd_teacher(place) / "export")},
        "loss": {"weight": 10.0},
    }
    return place.train("projects.promptkd.train_student", "promptkd_student", fields)


def _few_labels(place: Place, **fields: Any) -> dict[str, Any]:
    """A DHO run."""
    return {
        "steps": STEPS,
        "batch_size": 8,
        "data": {"set": f"folder:{place.folder / 'images'}", "workers": 0, "crop_scale": [0.5, 1.0]},
        "split": {"shots": 2, "validation": "val"},
        "teacher": {"model": place.model("large")},
        "student": {"backbone": f"clip:{place.model('small')}"},
        "optim": {"lr": 1e-3, "warmup_steps": 2, "decay_all": True},
        "evaluation": {"every_steps": 10, "batch_size": 16, "teacher": False},
        **fields,
    }


def dho(place: Place) -> Path:
    return place.train("projects.dho.train_student", "dho", _few_labels(place, grad_cosine_every=5))


def dho_stored(place: Place) -> Path:
    outputs = place.folder / "outputs"
    given = ["--set", f"folder:{place.folder / 'images'}", "--model", place.model("large"), "--out", outputs]
    views = ["--views", 2, "--crop-scale", 0.5, 1.0, "--flip", 0.5, "--threads", 1]
    place.command(str(ROOT / "data_tools" / "embed_labelled.py"), *given, *views)
    fields = _few_labels(place)
    fields["data"]["teacher_outputs"] = str(outputs)
    return place.train("projects.dho.train_student", "dho_stored", fields)


def _domains(place: Place, **fields: Any) -> dict[str, Any]:
    """A VL2V-ADiP run."""
    return {
        "steps": STEPS,
        "batch_size": 6,
        "select_from_step": 5,
        "runs": str(place.folder / "runs" / "vl2v"),
        "data": {
            "set": f"domains:{place.folder / 'domains'}",
            "workers": 0,
            "crop_scale": [0.7, 1.0],
            "color_jitter": 0.3,
        },
        "fold": {"test_domain": "oil"},
        "student": {"backbone": "timm:test_resnet", "pretrained": False, "image_size": 32},
        "teacher": {"model": place.model("large")},
        "optim": {"name": "adam", "lr": 1e-3, "weight_decay": 0.0, "schedule": "constant", "warmup_steps": 0},
        "evaluation": {"every_steps": 5, "batch_size": 16, "teacher": False},
        **fields,
    }


def vl2v_adip_align(place: Place) -> Path:
    return place.train("projects.vl2v_adip.train_align", "vl2v_adip_align", _domains(place, method="align"))


def vl2v_adip_distill(place: Place) -> Path:
    fields = _domains(place, method="distill", init_from=str(vl2v_adip_align(place) / "export"))
    return place.train("projects.vl2v_adip.train_distill", "vl2v_adip_distill", fields)


def _chats(place: Place, **fields: Any) -> dict[str, Any]:
    """A run on chats of a Llama of eight layers, with images and without."""
    return {
        "steps": STEPS,
        "batch_size": 4,
        "student": {"tower": place.tower, "decoder": place.decoder},
        "data": {"chats": [str(place.chats)], "template": "plain", "max_length": 64, "workers": 0},
        "optim": {"lr": 2e-4, "warmup_steps": 2},
        **fields,
    }


def matvlm(place: Place) -> Path:
    fields = _chats(place, hybrid={"preset": 25, "chunk": 16}, loss={"ce": 0.5})
    return place.train("projects.matvlm.train_distill", "matvlm", fields)


def _stage(place: Place, stage: str, before: Path | None = None, **fields: Any) -> Path:
    """A stage of LLaVA-MoD, from the export of the one before."""
    if before:
        whole = {"tower": place.tower, "decoder": place.decoder}
        fields = {"student": {"init_from": str(before / "export")}, "teacher": whole, **fields}
    return place.train(
        "projects.llava_mod.train_stage", f"llava_mod_{stage}", _chats(place, stage=stage, **fields)
    )


def llava_mod_adapt(place: Place) -> Path:
    student = {"tower": place.tower, "decoder": place.decoder, "decoder_layers": [0, 2, 5, 7]}
    return _stage(place, "adapt", student=student)


def llava_mod_d2s(place: Place) -> Path:
    return _stage(place, "d2s", llava_mod_adapt(place), moe={"mode": "sparse"}, loss={"ce": 1.0})


def llava_mod_prefer(place: Place) -> Path:
    pairs = []
    for record in json.loads(place.chats.read_text()):
        asked, said = record.pop("conversations")
        pairs.append({**record, "chosen": [asked, said], "rejected": [asked, {**said, "value": "nothing"}]})
    path = place.chats.with_name("pairs.json")
    path.write_text(json.dumps(pairs))
    data = {"chats": [str(path)], "template": "plain", "max_length": 64, "workers": 0}
    return _stage(place, "prefer", llava_mod_d2s(place), data=data)


def _scenes(place: Place, stage: str, **fields: Any) -> Path:
    """A stage of CALICO in the toy world, as its nano runs are but for the number of samples."""
    data = place.folder / "scenes"
    if not data.exists():
        toy_scenes(data)
    merged: dict[str, Any] = {}
    for name in ("base", stage):
        for key, value in yaml.safe_load((TOY / f"{name}.yaml").read_text()).items():
            merged[key] = {**merged.get(key, {}), **value} if isinstance(value, dict) else value
    merged["data"] |= {"info": str(data), "fraction": 100}
    for key in ("run_dir", "log", "checkpoint", "evaluation"):
        merged.pop(key, None)
    sizes = {"prc": {"n_rich": 64, "n_less": 64}, "batch_size": 2, "steps": STEPS}
    return place.train("projects.calico.train_stage", f"calico_{stage}", merged | sizes | fields)


def calico_prc(place: Place) -> Path:
    return _scenes(place, "prc")


def calico_rad(place: Place) -> Path:
    return _scenes(place, "rad", rad={"teacher_ckpt": str(calico_prc(place) / "export")})


def calico_finetune(place: Place) -> Path:
    init = {"lidar": str(calico_prc(place) / "export"), "camera": str(calico_rad(place) / "export")}
    return _scenes(place, "finetune", init=init)


RUNS: list[Callable[[Place], Path]] = [
    tinyclip_distill,
    tinyclip_stored,
    tinyclip_mask,
    promptkd_teacher,
    promptkd_student,
    dho,
    dho_stored,
    vl2v_adip_align,
    vl2v_adip_distill,
    matvlm,
    llava_mod_adapt,
    llava_mod_d2s,
    llava_mod_prefer,
    calico_prc,
    calico_rad,
    calico_finetune,
]


# ------------------------------------------------------------------------------------------------------ the curves


def curve(run_dir: Path) -> list[dict[str, float]]:
    """Loss, its terms, gradient norm and learning rate of every step."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    kept = ("step", "loss", "lr", "grad_norm")
    return [
        {name: value for name, value in line.items() if name in kept or name.startswith("loss/")}
        for line in lines
        if line["kind"] == "train"
    ]


def write(path: Path, found: list[dict[str, float]]) -> None:
    """One line a step: `name=value`, nine digits."""
    text = "".join(
        " ".join(f"{name}={value:.9g}" for name, value in sorted(step.items())) + "\n" for step in found
    )
    path.write_text(text)


def read(path: Path) -> list[dict[str, float]]:
    """What `write` wrote."""
    lines = path.read_text().splitlines()
    return [
        {name: float(value) for name, _, value in (word.partition("=") for word in line.split())}
        for line in lines
    ]


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.__name__)
def test_the_loss_is_what_it_was(place: Place, run: Callable[[Place], Path]) -> None:
    """Within what the order of additions on another processor may change, which twenty steps make larger."""
    path = CURVES / f"{run.__name__}.txt"
    found = curve(run(place))
    assert len(found) == STEPS
    if os.environ.get("VLMKD_GOLDEN") == "write":
        write(path, found)
    expected = read(path)
    for now, before in zip(found, expected, strict=True):
        assert now == pytest.approx(before, rel=2e-4, abs=1e-6)
