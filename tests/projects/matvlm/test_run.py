"""Whole runs on a tiny Llama: resume, exports that answer when they are loaded again, and a chain of two shares."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from projects.matvlm.config import MatvlmConfig
from projects.matvlm.convert import CODE, portable, write_transformers
from projects.matvlm.mixer import FLOAT32, Mamba2Mixer
from projects.matvlm.speed import load, models_of
from projects.matvlm.student import surgery
from projects.matvlm.surgery import mixers_of, to_hybrid
from tests.chat_parts import byte_tokenizer, picture
from tests.projects.matvlm.models import fields
from tests.projects.matvlm.test_surgery import FIRST, made, prompts
from tests.projects.zygote import ROOT, Zygote
from vlmkd import config
from vlmkd.data.chats import ChatTokens
from vlmkd.errors import UserError
from vlmkd.evaluation.answers import ChatModel
from vlmkd.export.mllm import ChatParts, build_mllm, export_mllm, load_mllm
from vlmkd.tensor_files import read_safetensors

pytestmark = pytest.mark.slow


def train(zygote: Zygote, run_dir: Path, *arguments: str, ranks: int = 1) -> str:
    """A run: what it said."""
    words = [*arguments, f"run_dir={run_dir}"]
    code, said = zygote.run("projects.matvlm.train_distill", words, run_dir.with_suffix(".out"), ranks=ranks)
    assert code == 0, said
    return said


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return fields(tmp_path_factory.mktemp("parts"))


@pytest.fixture(scope="module")
def first(zygote: Zygote, given: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two of the eight layers."""
    run_dir = tmp_path_factory.mktemp("runs") / "quarter"
    train(zygote, run_dir, *given, "hybrid.preset=25")
    return run_dir


def mamba_of(parts: ChatParts) -> list[int]:
    body: Any = parts.module.decoder.model
    return [i for i, layer in enumerate(body.layers) if isinstance(layer.self_attn, Mamba2Mixer)]


def test_a_run_resumes_to_the_same_export(zygote: Zygote, given: list[str], first: Path) -> None:
    again = first.with_name("again")
    killed = [*given, f"run_dir={again}", "hybrid.preset=25"]
    saved = again / "state" / "step_000001"
    zygote.kill("projects.matvlm.train_distill", killed, again.with_suffix(".out"), saved.is_dir)
    assert not (again / "done.json").exists()
    assert "resumed from" in train(zygote, again, *given, "hybrid.preset=25")
    found, wanted = (read_safetensors(run / "export" / "model.safetensors") for run in (again, first))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], value) for name, value in wanted.items())


def test_a_run_in_bf16_keeps_what_is_float32_and_reloads(
    zygote: Zygote, given: list[str], first: Path
) -> None:
    run_dir = first.with_name("bf16")
    said = train(zygote, run_dir, *given, "hybrid.preset=25", "deepspeed.precision=bf16")
    assert "reloaded in a fresh process with equal outputs" in said
    found = read_safetensors(run_dir / "export" / "model.safetensors")
    A_log = found["decoder.model.layers.0.self_attn.A_log"]
    assert not torch.equal(A_log.bfloat16().float(), A_log)
    assert json.loads((run_dir / "export" / "mllm.json").read_text())["rounded"]


def test_zero_3_trains_what_zero_1_does(zygote: Zygote, given: list[str], first: Path) -> None:
    stages = {
        "zero_1": ["deepspeed.zero_stage=1"],
        # Without a threshold all of it is small enough to stay whole.
        "zero_3": [
            "deepspeed.zero_stage=3", "deepspeed.extra={zero_optimization: {stage3_param_persistence_threshold: 0}}",
            "deepspeed.shard_teacher=true",
        ],
    }  # fmt: skip
    losses = {}
    for name, more in stages.items():
        said = train(zygote, first.with_name(name), *given, "hybrid.preset=25", *more, ranks=2)
        assert "reloaded in a fresh process with equal outputs" in said
        lines = map(json.loads, (first.with_name(name) / "metrics.jsonl").read_text().splitlines())
        losses[name] = [line["loss"] for line in lines if line["kind"] == "train"]
    assert losses["zero_3"] == pytest.approx(losses["zero_1"], rel=1e-5)
    with pytest.raises(UserError, match="zero_stage is 3 in half precision"):
        config.load(MatvlmConfig, [*given, "run_dir=r", "deepspeed.zero_stage=3", "deepspeed.precision=bf16"])


def test_an_export_holds_what_was_trained_and_answers_as_the_uncached_forward(first: Path) -> None:
    parts = load_mllm(first / "export", surgery=surgery)
    assert mamba_of(parts) == [0, 4]
    names = read_safetensors(first / "export" / "model.safetensors").keys()
    assert {name.split(".self_attn.")[0] for name in names if "projector" not in name} == {
        "decoder.model.layers.0", "decoder.model.layers.4",
    }  # fmt: skip
    module = parts.module.eval()
    tokens = ChatTokens(parts.tokenizer, "plain", module.tower.tokens)  # type: ignore[arg-type]
    model = ChatModel("student", module, tokens, parts.image_spec)
    asked = [([picture(1)], [], "<image>\nWhat is it?"), ([picture(2)], [], "<image>\nWhat?")]
    said = model.answer(asked, most_tokens=6)  # type: ignore[arg-type]
    for one, text in zip(asked, said, strict=True):
        row = tokens.prompt([], one[2])
        images = torch.stack([model._transform(_image(one[0][0]))])
        with torch.no_grad():
            for _ in range(6):
                ids = torch.tensor([row])
                batch = {
                    "input_ids": ids, "segments": torch.ones_like(ids), "images": images,
                    "image_rows": torch.zeros(1, dtype=torch.int64),
                }  # fmt: skip
                row = [*row, int(module.head(module(batch))[0, -1].argmax())]
        found = row[-6:]
        found = found[: found.index(tokens.end)] if tokens.end in found else found
        assert text == parts.tokenizer.decode(found, skip_special_tokens=True).strip()


def trained(run_dir: Path) -> list[dict[str, Any]]:
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == "train"]


def _image(data: bytes) -> Any:
    import io

    from PIL import Image

    return Image.open(io.BytesIO(data))


def test_a_chain_keeps_the_mixers_of_layers_that_stay_mamba_and_gives_the_others_their_attention_back(
    zygote: Zygote, given: list[str], first: Path
) -> None:
    data = [one for one in given if not one.startswith("student.")]
    teacher = [one.replace("student.", "teacher.") for one in given if one.startswith("student.")]
    chained = [*data, *teacher, f"student.init_from={first / 'export'}"]
    untrained = [*chained, "optim.lr=0"]
    run_dir = first.with_name("half")
    train(zygote, run_dir, *untrained, "hybrid.layers=[0,2,6]")
    before, after = (load_mllm(run / "export", surgery=surgery) for run in (first, run_dir))
    assert mamba_of(after) == [0, 2, 6]
    old, new = before.module.state_dict(), after.module.state_dict()
    for name, value in old.items():
        if ".layers.0.self_attn." in name or "projector" in name:
            assert torch.equal(new[name], value), name
    stock: Any = load_decoder_of(given).state_dict()
    for name, value in stock.items():
        if ".layers.4.self_attn." in name:
            assert torch.equal(new[f"decoder.{name}"], value), name
    results = [json.loads(line) for line in (run_dir / "results.jsonl").read_text().splitlines()]
    shares = {line["tags"]["mamba"] for line in results if line["model"] == "student"}
    assert shares == {37.5} and any(line["model"] == "teacher" for line in results)
    code, said = zygote.run(
        "projects.matvlm.train_distill", [*data, f"student.init_from={first / 'export'}", "hybrid.preset=50", "run_dir=r"],
        first.with_name("refused.out"),
    )  # fmt: skip
    assert code == 2 and "student.init_from is a hybrid; set teacher.init_from" in said


def load_decoder_of(given: list[str]) -> Any:
    from vlmkd.models.mllm import load_decoder

    name = next(one for one in given if one.startswith("student.decoder="))
    return load_decoder(name.partition("=")[2])[0]


def test_a_stored_teacher_gives_the_logit_term(zygote: Zygote, given: list[str], first: Path) -> None:
    base, outputs = first.with_name("base"), first.with_name("outputs")
    cfg = config.load(MatvlmConfig, [*given, "hybrid.preset=25", "run_dir=r"])
    parts = replace(build_mllm(cfg.student), template="plain")
    parts.trained = {name for name in parts.module.state_dict() if name.startswith("projector.")}
    export_mllm(base / "export", parts, parts.module.state_dict())
    stored = ["--model", str(base), "--chats", *cfg.data.chats, "--out", str(outputs), "--k", "260", "--fp32"]
    code, said = zygote.run(str(ROOT / "data_tools" / "embed_chats.py"), stored, first.with_name("embed.out"))
    assert code == 0, said
    data = [one for one in given if not one.startswith("student.")]
    shared = [*data, f"student.init_from={base / 'export'}", "loss.layer=0"]
    told = [f"data.teacher_outputs={outputs}"]
    for name, arguments in (("live", []), ("stored", told)):
        train(zygote, first.with_name(name), *shared, "hybrid.preset=25", *arguments)
    live, other = (trained(first.with_name(name)) for name in ("live", "stored"))
    assert [one["loss"] for one in other] == pytest.approx([one["loss"] for one in live], rel=1e-4)
    assert len(live) == 3 and other[0]["kl"] > 0
    refused = {
        "config field loss.layer needs the teacher itself; set 0": [*shared, "hybrid.preset=25", "loss.layer=1"],
        "loss.logit_reduction =batch_sum needs the teacher": [*shared, "hybrid.preset=25", "loss.logit_reduction=batch_sum"],
        "the teacher: ": [*shared, f"teacher.init_from={first / 'export'}", "hybrid.preset=25"],
        "layer 4 becomes attention again, which the teacher has": [
            *data, f"student.init_from={first / 'export'}", f"teacher.init_from={base / 'export'}", "loss.layer=0",
            "hybrid.layers=[0,2,6]",
        ],
    }  # fmt: skip
    for line, arguments in refused.items():
        words = [*arguments, *told, "run_dir=refused"]
        code, said = zygote.run("projects.matvlm.train_distill", words, first.with_name("refused.out"))
        assert code == 2 and line in said and "Traceback" not in said, said


ELSEWHERE = """
import sys
sys.modules["vlmkd"] = sys.modules["projects"] = None  # an import of either is an error
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

ids, mask, positions = torch.load("prompts.pt")
def logits_of(folder, **options):
    model, told = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, output_loading_info=True, **options)
    assert not any(told.values()), told
    with torch.no_grad():
        return model, model(ids, mask, positions).logits

for kind in sys.argv[1:]:
    assert AutoTokenizer.from_pretrained(kind)("abc").input_ids
    model, logits = logits_of(kind)
    common = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False}
    texts = [model.generate(ids, **common, **more) for more in ({}, {"num_beams": 2})]
    model.save_pretrained(kind + "_again")
    assert logits.equal(logits_of(kind + "_again")[1])
    half = logits_of(kind, dtype=torch.bfloat16)[0]
    dtypes = {name: parameter.dtype for name, parameter in half.named_parameters()}
    torch.save((logits, texts, dtypes), kind + ".pt")
    try:
        AutoModelForCausalLM.from_pretrained(kind, trust_remote_code=False)
    except ValueError as error:
        assert "trust_remote_code=True" in str(error), error
    else:
        raise AssertionError("a stock class has loaded half of it")
"""


def test_a_folder_for_transformers_is_the_hybrid_where_this_code_is_not(
    zygote: Zygote, first: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "llama"
    code, said = zygote.run(
        "projects.matvlm.convert", ["--transformers", str(first / "export"), str(folder)], tmp_path / "out"
    )
    assert code == 0, said
    models: dict[str, Any] = {"llama": load_mllm(first / "export", surgery=surgery).module.decoder.eval()}
    for kind in ("phi", "qwen2"):
        models[kind] = to_hybrid(made(kind, torch.float32), FIRST)
        write_transformers(tmp_path / kind, models[kind], byte_tokenizer())
    torch.save(prompts(), tmp_path / "prompts.pt")
    env = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    env.pop("PYTHONPATH", None)
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, *models], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    ids, mask, positions = prompts()
    for kind, model in models.items():
        logits, texts, dtypes = torch.load(tmp_path / f"{kind}.pt")
        with torch.no_grad():
            assert logits.equal(model(ids, attention_mask=mask, position_ids=positions).logits)
        common = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False}
        for text, options in zip(texts, ({}, {"num_beams": 2}), strict=True):
            assert text.equal(model.generate(ids, **common, **options))
        exact = {f"{name}.{part}" for name in mixers_of(model) for part in FLOAT32}
        assert {name for name, dtype in dtypes.items() if dtype == torch.float32} == exact
    code, said = zygote.run(
        "projects.matvlm.convert", ["--transformers", str(first), str(folder)], tmp_path / "out"
    )
    assert code == 2 and "name the `export` folder of a run" in said


def test_speed_is_measured_of_exports_and_of_no_hybrid_as_teacher(first: Path) -> None:
    for name in (first, first / "export"):
        model = load(str(name), "bf16")
        (mixer, *_) = mixers_of(model).values()
        assert len(mixers_of(model)) == 2 and mixer.A_log.dtype == torch.float32
        assert model.get_input_embeddings().weight.dtype == torch.bfloat16
    wrong = Namespace(teacher=str(first), hybrids=[], presets=[25], dtype="fp32")
    with pytest.raises(UserError, match="is a hybrid; name the model before surgery"):
        models_of(wrong)


def test_the_code_of_such_a_folder_imports_nothing_else_of_ours() -> None:
    beside = {path.stem for path in CODE}
    for path in CODE:
        text = portable(path.read_text(), "Phi")
        assert not re.search(r"^\s*(from|import) (vlmkd|projects)", text, flags=re.M), path
        assert set(re.findall(r"^from \.(\w+) import", text, flags=re.M)) <= beside, path


def test_a_folder_for_transformers_needs_mixers(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match="the model has no Mamba-2 layers; transformers loads its decoder as it is"
    ):
        write_transformers(tmp_path / "folder", made("llama"), byte_tokenizer())
