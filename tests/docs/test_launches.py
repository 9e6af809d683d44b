"""Every launch script, for every row of the papers' tables: its commands load, and what they name is known."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.docs.commands import ROOT, looked_up, printed
from vlmkd.datasets import published_sets
from vlmkd.errors import UserError

DHO = {"ROOT": "/data", "NPROC": "1", "METHODS": "dho ce kd ce_kd pcgrad kd_feature ce_kd_feature"}
TIP = {"FEW_SHOT_TEACHER": "1"}
TINYCLIP = {"DATA": "/data/{00000..00099}.tar", "IMAGENET": "/images/in 1k", "NPROC": "1", "RUNS": "/out"}
PROMPTKD = {"DATA": "/data"}
COMD = {
    "IMAGES": "/images",
    "STUDENT": "/student",
    "TEACHER": "by=/teacher",
    "ASSESSOR": "url=https://host/v1/chat/completions model=m",
    "AUGMENTOR": "by=written.jsonl",
}
MATVLM = {"TEACHER": "/teacher", "DATA": "/data", "NPROC": "4"}
SETS = [key for key, found in published_sets.SETS.items() if found.halves and key != "imagenet"]
VARIANTS = [key for key, found in published_sets.SETS.items() if found.layout in ("wnids", "numbers")]
DOMAINS = {key: found.domains for key, found in published_sets.SETS.items() if found.domains}
BASELINES = "erm miro lp lp_ft one_stage kd_image kd_text kd_kl kd_cos simkd align distill"

Row = tuple[str, tuple[str, ...], dict[str, str]]


def rows() -> Iterator[Row]:
    """Script, words and variables: together every row of every table, each with few calls."""
    yield "dho/scripts/fine_grained.sh", (), {**DHO, **TIP, "SHOTS": "16", "METHODS": "dho"}
    yield (
        "dho/scripts/fine_grained.sh",
        (),
        {**DHO, **TIP, "SHOTS": "1", "SETS": "dtd", "STUDENT": "mobilenet_v2"},
    )
    yield "dho/scripts/imagenet_few_shot.sh", (), {**DHO, **TIP, "SHOTS": "2"}
    yield (
        "dho/scripts/imagenet_few_shot.sh",
        (),
        {**DHO, **TIP, "SHOTS": "4", "METHODS": "dho", "FIXED": "1", "DINO": "r.pth"},
    )
    yield "dho/scripts/imagenet_low_shot.sh", (), {**DHO, "PERCENT": "10"}
    yield "dho/scripts/imagenet_low_shot.sh", (), {**DHO, "PERCENT": "1", "METHODS": "dho", "SHIFT": "1"}
    yield "dho/scripts/nano.sh", (), {"METHODS": DHO["METHODS"], "SHOTS": "4", "PERCENT": "10"}
    yield "dho/scripts/nano.sh", (), {"LENGTH": "full", "SHOTS": "1", "SEEDS": "2"}

    yield from (("promptkd/scripts/base_to_novel.sh", (key, "1"), PROMPTKD) for key in ["imagenet", *SETS])
    yield from (("promptkd/scripts/cross_dataset.sh", (key, "2"), PROMPTKD) for key in SETS)
    yield from (("promptkd/scripts/domain_generalization.sh", (key, "3"), PROMPTKD) for key in VARIANTS)
    yield from (("promptkd/scripts/few_shot.sh", (key, "1", "16"), PROMPTKD) for key in ["imagenet", *SETS])
    published = {**PROMPTKD, "TEACHER": "/teachers", "RUNS": "published"}
    yield "promptkd/scripts/base_to_novel.sh", ("dtd", "1"), published
    yield "promptkd/scripts/nano.sh", (), {}

    yield "matvlm/scripts/published.sh", (), MATVLM
    yield "matvlm/scripts/nano.sh", (), {"SEEDS": "1"}
    yield "llava_mod/scripts/nano.sh", (), {"SEEDS": "1"}
    yield "matvlm/scripts/published.sh", (), {**MATVLM, "CHAIN": "1"}

    for recipe in ("vit_b32_manual", "vit_b32_auto", "rn50_manual", "vit_b16_yfcc"):
        yield f"tinyclip/scripts/{recipe}.sh", (), {**TINYCLIP, "CACHE": "/cache", "YFCC": "/yfcc/*.tar"}
    machines = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "10.0.0.1"}
    yield "tinyclip/scripts/multi_node.sh", ("vit_b32_manual",), {**TINYCLIP, **machines}
    yield "tinyclip/scripts/one_gpu.sh", ("vit_b16_yfcc",), TINYCLIP
    yield "tinyclip/scripts/slurm.sbatch", ("rn50_manual",), TINYCLIP
    yield "tinyclip/scripts/emoji_table.sh", (), {"SEEDS": "0"}
    yield "tinyclip/scripts/emoji_teacher.sh", (), {}

    yield "calico/scripts/nano.sh", (), {"SEEDS": "1"}
    yield "calico/scripts/recipe.sh", ("all",), {"SEEDS": "1", "FRACTIONS": "5 50"}

    for model in ("qwen1.5_0.5b", "qwen2_0.5b", "qwen2_1.5b", "qwen1.5_1.8b"):
        yield "llava_mod/scripts/recipe.sh", ("all", model), {}
    yield "llava_mod/scripts/comd.sh", ("train.json", "cache.json"), COMD
    yield (
        "llava_mod/scripts/comd.sh",
        ("a.json", "b.json", "steps=9"),
        {**COMD, "ROUNDS": "1", "RUNS": "/out"},
    )
    yield "llava_mod/scripts/recipe.sh", ("d2s", "qwen2_0.5b", "moe.aux=0.02"), {"RUNS": "/out"}

    for stage in BASELINES.split():
        yield "vl2v_adip/scripts/run.sh", (stage, "resnet50", "office_home", "Art", "data.root=/data"), {}
    for key, domains in DOMAINS.items():
        yield "vl2v_adip/scripts/run.sh", ("distill", "vit_b16", key, domains[0], "data.root=/data"), {}
    yield from (
        ("vl2v_adip/scripts/run.sh", ("align", student, "pacs", "photo"), {})
        for student in ("vit_s16", "deit_s", "clip_vitb16")
    )
    yield "vl2v_adip/scripts/run.sh", ("vl2v_sd", "clip_vitb16", "vlcs", "SUN09"), {}
    yield "vl2v_adip/scripts/nano.sh", (), {"STAGES": BASELINES}
    yield "vl2v_adip/scripts/nano.sh", (), {"LENGTH": "full", "SEEDS": "2"}


ROWS = list(rows())


@pytest.mark.parametrize("script", sorted({script for script, _, _ in ROWS}))
def test_every_row_loads_and_names_what_exists(script: str) -> None:
    folders: dict[str, tuple[str, ...]] = {}
    for _, words, env in (row for row in ROWS if row[0] == script):
        for module, *arguments in printed(script, *words, **env):
            found = looked_up(module, *arguments)
            if hasattr(found, "run_dir"):
                command = (module, *arguments)
                assert folders.setdefault(found.run_dir, command) == command, f"two runs in {found.run_dir}"


def test_no_script_is_left_out() -> None:
    scripts = [path for path in (ROOT / "projects").glob("*/scripts/*") if path.name != "common.sh"]
    assert {str(path.relative_to(ROOT / "projects")) for path in scripts} == {script for script, _, _ in ROWS}


def test_an_unknown_name_is_refused_with_its_field() -> None:
    stack = [
        f"projects/dho/configs/{name}.yaml"
        for name in ("fine_grained", "teachers/clip_rn50", "students/resnet18")
    ]
    given = ["run_dir=r", "steps=9", "evaluation.every_steps=1"]
    for wrong, message in (
        ("data.set=fgvc", "config field data.set: unknown data set 'fgvc'; did you mean fgvc_aircraft"),
        ("teacher.model=RN51", "model RN51 is no open_clip architecture"),
        ("teacher.pretrained=openia", "pretrained openia is no tag of RN50"),
        ("student.backbone=torchvision:resnet19", "torchvision has no model resnet19"),
        ("student.weights=zoo:DINO-ResNet-5", "config field student.weights: zoo has no model DINO-ResNet-5"),
    ):
        with pytest.raises(UserError, match=message):
            looked_up("projects.dho.train_student", *stack, "data.set=dtd", *given, wrong)
