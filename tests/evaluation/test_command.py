"""The evaluation scripts: model names, table, results file, exit codes."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import save_file

from scripts.evaluation_command import Evaluated, model_name, per_set, table
from vlmkd import zoo
from vlmkd.errors import UserError
from vlmkd.evaluation.base import Result
from vlmkd.models.clip import build_clip
from vlmkd.results import UNREADABLE, Meaning, Number, read_results, share

from .conftest import encoded, write_tar

CONFIG = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 64, "layers": 1},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1},
}


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder whose export is a tiny CLIP in open_clip's layout."""
    root = tmp_path_factory.mktemp("run")
    (root / "export").mkdir()
    model = build_clip(CONFIG, seed=0)
    save_file(model.state_dict(), root / "export" / "open_clip_model.safetensors")
    (root / "export" / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": CONFIG, "preprocess_cfg": {}})
    )
    (root / "config.json").write_text(json.dumps(CONFIG))
    return root


def test_model_names(run_folder: Path, tmp_path: Path) -> None:
    name = next(iter(zoo.entries()))
    export = run_folder / "export"
    (tmp_path / "config.json").write_text("{}")
    meant = {
        "ViT-B-32/laion2b_s34b_b79k": ("ViT-B-32", "laion2b_s34b_b79k"),
        "ViT-B-32@openai": ("ViT-B-32", "openai"),
        "ViT-B/32@w/x.pt": ("ViT-B/32", "w/x.pt"),
        "a/c.json@b/w.pt": ("a/c.json", "b/w.pt"),
        name: (f"zoo:{name}", ""),
        f"zoo:{name}": (f"zoo:{name}", ""),
        "hf:some/where": ("hf:some/where", ""),
        f"local-dir:{export}": (f"local-dir:{export}", ""),
        str(export): (f"local-dir:{export}", ""),
        str(tmp_path): (f"hf:{tmp_path}", ""),
    }
    assert {given: model_name(given) for given in meant} == meant


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ViT-B-32", "names no weights; write ViT-B-32@ and one of: openai, laion400m_e31"),
        ("ViT-B/32", "names no weights"),
        ("ViT-S-32-alt", "write ViT-S-32-alt@ and a weights file"),
        ("a/config.json", "names no weights"),
        ("runs/nothing", "no such folder, nor ARCHITECTURE/TAG"),
        ("TinyCLIP-ViT-40M-32-Text", "did you mean TinyCLIP-ViT-40M-32"),
    ],
)
def test_names_that_mean_nothing(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        model_name(name)


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="neither it nor its export/"):
        model_name(str(tmp_path))


def test_options_per_set() -> None:
    assert per_set([], ["a", "b"], "--x") == ["", ""]
    assert per_set(["v"], ["a", "b"], "--x") == ["v", "v"]
    assert per_set(["v", "w"], ["a", "b"], "--x") == ["v", "w"]
    with pytest.raises(UserError, match="--x has 3 values for 2 data sets; give one for all or one each"):
        per_set(["v"] * 3, ["a", "b"], "--x")
    with pytest.raises(UserError, match="give one each"):
        per_set(["v"], ["a", "b"], "--x", shared=False)


def test_table() -> None:
    meanings = {"top1": share("top-1"), "top5": share("top-5"), "unreadable": UNREADABLE}
    results = [
        Result("zero_shot", "birds", {"top1": 0.5, "top5": 0.75}, 8, meanings=meanings),
        Result("agreement", "birds", {"kl": 0.1}, 8, meanings={"kl": Meaning("KL", "nats")}),
    ]
    more = [
        Result("zero_shot", "a_set_with_a_long_name", {"top1": 1.0, "unreadable": 2.0}, 3, meanings=meanings)
    ]
    parameters = {"total": 1_234_567}
    models = [
        Evaluated("one", "", parameters, {"multiply-adds": (1.5, "G")}, results + more),
        Evaluated("two", "", parameters, {"multiply-adds": (2, "G")}, more),
    ]
    text = table([number for model in models for number in model.numbers()])
    assert text.splitlines() == [
        "                                                 birds          a_set_with_a_long_name",
        "model  parameters (M)  multiply-adds (G)  top-1  top-5      KL   top-1      unreadable",
        "one              1.23                1.5  50.00  75.00  0.1000  100.00               2",
        "two              1.23                  2      –      –       –  100.00               2",
    ]


def _script(name: str, *args: str) -> int:
    """Run a script's main in this process, which saves its imports."""
    code: int = runpy.run_path(str(zoo.REPOSITORY / "scripts" / name))["main"](list(args))
    return code


def test_zero_shot_script(
    run_folder: Path, class_folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two models, one of them missing: the first one's numbers stay, and the exit code says that something failed."""
    weights = run_folder / "export" / "open_clip_model.safetensors"
    code = _script(
        "eval_zero_shot.py",
        *(
            "--model",
            str(run_folder),
            f"{run_folder / 'config.json'}@{weights}",
            f"ViT-B-32@{tmp_path / 'none.pt'}",
        ),
        *("--data", str(class_folders), "--templates", "simple", "--results", str(tmp_path / "out.jsonl")),
        *("--teacher", str(run_folder), "--cost", "--name", "tiny"),
    )
    shown = capsys.readouterr()
    assert code == 2
    assert shown.err.splitlines()[-1].startswith(
        f"{Path(sys.argv[0]).name}: pretrained {tmp_path / 'none.pt'}: neither a file"
    )
    found: dict[str, dict[str, Number]] = {}
    for one in read_results(tmp_path / "out.jsonl"):
        found.setdefault(one.model, {})[one.metric] = one
    first, second = ({name: one.value for name, one in model.items()} for model in found.values())
    costs = {"multiply-adds", "image", "text"}
    assert {k: v for k, v in first.items() if k not in costs} == {
        k: v for k, v in second.items() if k not in costs
    }
    assert len({str(one.tags["digest"]) for model in found.values() for one in model.values()} - {""}) == 1
    metrics = first
    assert metrics["agreement_top1"] == 1 and 0 <= metrics["top1"] <= metrics["top5"] <= 1
    assert 1e6 * first["parameters"] == pytest.approx(
        sum(part.numel() for part in build_clip(CONFIG).parameters())
    )
    assert costs < first.keys()
    details = json.loads((tmp_path / "out.details.json").read_text())["models"][str(run_folder)]["tiny"]
    assert {"per_class", "confusion", "mistakes"} <= details.keys()
    assert len(shown.out.splitlines()) == 4 and f"{100 * metrics['top1']:.2f}" in shown.out


def test_retrieval_script(run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    members = {
        f"{n}.{kind}": data
        for n in range(12)
        for kind, data in [("jpg", encoded(n)), ("txt", b"text %d" % n)]
    }
    write_tar(tmp_path / "0.tar", members)
    assert _script("eval_retrieval.py", "--model", str(run_folder), "--data", str(tmp_path), "--quiet") == 0
    shown = capsys.readouterr()
    assert shown.err == "" and "image→text R@1  image→text R@5  image→text R@10  text→image R@1" in shown.out


def test_bad_input_is_one_line(tmp_path: Path) -> None:
    command = [
        sys.executable,
        str(zoo.REPOSITORY / "scripts" / "eval_retrieval.py"),
        "--model",
        "ViT-B-32@openai",
    ]
    command += ["--data", str(tmp_path / "none.tar")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.count("\n") == 1 and "no file matches" in result.stderr
