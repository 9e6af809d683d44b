"""Every stage as its command, chained: a tiny decoder in a folder, real pictures' backbone, eight chats."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from projects.llava_mod import comd
from projects.llava_mod.config import LlavaModConfig
from projects.llava_mod.experts import sparse_layers
from projects.llava_mod.student import is_trained, surgery
from tests.chat_parts import byte_tokenizer, picture
from tests.projects.zygote import ROOT, Zygote
from vlmkd import config
from vlmkd.errors import UserError
from vlmkd.export.mllm import load_mllm
from vlmkd.tensor_files import read_safetensors

pytestmark = pytest.mark.slow

SHARED = [
    "data.template=plain", "data.max_length=60", "data.workers=0", "batch_size=4", "steps=4", "threads=1",
    "optim.warmup_steps=0", "optim.lr=1e-3", "log.every_steps=1", "checkpoint.every_steps=2", "evaluation.batch_size=4",
]  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder, and chats, pairs and questions about eight pictures."""
    folder = tmp_path_factory.mktemp("chats")
    torch.manual_seed(0)
    sizes = LlamaConfig(
        vocab_size=260, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    LlamaForCausalLM(sizes).save_pretrained(folder / "decoder")
    byte_tokenizer().save_pretrained(folder / "decoder")
    chats, pairs = [], []
    for number in range(8):
        (folder / f"{number}.png").write_bytes(picture(number))
        asked = {"from": "human", "value": "<image>there?"}
        said = [{"from": "gpt", "value": text} for text in ("Yes.", "No.")]
        shared = {"id": str(number), "image": f"{number}.png", "kind": "exists"}
        chats.append({**shared, "conversations": [asked, said[number % 2]]})
        pairs.append(
            {**shared, "chosen": [asked, said[number % 2]], "rejected": [asked, said[1 - number % 2]]}
        )
    (folder / "chats.json").write_text(json.dumps(chats))
    (folder / "pairs.json").write_text(json.dumps(pairs))
    return folder


def model(place: Path, who: str) -> list[str]:
    return [
        f"{who}.tower=efficientnet-lite0", f"{who}.tower_layers=[-1]", f"{who}.grid=2", f"{who}.image_size=64",
        f"{who}.decoder=hf:{place / 'decoder'}",
    ]  # fmt: skip


UNCHECKED = ["vlmkd.chat_runs:check_mllms"]
"""Exports are reloaded in a fresh process elsewhere."""


def run(
    zygote: Zygote, place: Path, name: str, *arguments: str, ranks: int = 1, without: Sequence[str] = ()
) -> tuple[int, str]:
    given = [*SHARED, f"data.chats=[{place / 'chats.json'}]", f"run_dir={place / name}", *arguments]
    return zygote.run(
        "projects.llava_mod.train_stage", given, place / f"{name}.out", ranks=ranks, without=without
    )


@pytest.fixture(scope="module")
def teacher(zygote: Zygote, place: Path) -> Path:
    """The export of a run."""
    questions = f"evaluation.questions=[{{data: {place / 'chats.json'}}}]"
    code, said = run(
        zygote,
        place,
        "teacher",
        "stage=sft",
        "steps=20",
        "optim.lr=1e-2",
        *model(place, "student"),
        questions,
    )
    assert code == 0, said
    assert "reloaded in a fresh process with equal outputs" in said
    return place / "teacher" / "export"


def exported(run_dir: Path) -> dict[str, torch.Tensor]:
    return read_safetensors(run_dir / "export" / "model.safetensors")


def forget_the_end(run_dir: Path) -> None:
    """As if the run had been stopped before its last checkpoint."""
    for gone in ("done.json", "export/model.safetensors", "state/step_000004/manifest.json"):
        (run_dir / gone).unlink()


def losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["kind"] == "train"]


def test_the_stages_follow_one_another(zygote: Zygote, place: Path, teacher: Path) -> None:
    questions = f"evaluation.questions=[{{data: {place / 'chats.json'}}}]"
    from_teacher = [f"teacher.init_from={teacher}"]
    steps = {
        "adapt": ["stage=adapt", *model(place, "student"), "student.decoder_layers=[0,1,3]"],
        "d2d": ["stage=d2d", f"student.init_from={place / 'adapt' / 'export'}", *from_teacher, "data.pack=true"],
        "d2s": ["stage=d2s", "moe.mode=sparse", f"student.init_from={place / 'd2d' / 'export'}", *from_teacher, "loss.ce=1", "deepspeed.activation_checkpointing=true"],
        "prefer": [
            "stage=prefer", f"student.init_from={place / 'd2s' / 'export'}", *from_teacher,
            f"data.chats=[{place / 'pairs.json'}]", questions,
        ],
    }  # fmt: skip
    for name, arguments in steps.items():
        code, said = run(zygote, place, name, *arguments)
        assert code == 0, said
        assert "reloaded in a fresh process with equal outputs" in said
    said = (place / "teacher.out").read_text()
    assert "[image]there?<<" in said and "chats.json: 8 chats" in said and "8 chats in all" in said
    found = losses(place / "teacher")
    assert sum(found[-3:]) < 0.8 * sum(found[:3])
    first = json.loads((place / "d2s" / "metrics.jsonl").read_text().splitlines()[0])
    assert 0.018 < first["loss/balance"] < 0.03  # 0.01 x two sparse layers, nearly even
    dense, sparse = (load_mllm(place / name / "export", surgery=surgery).module for name in ("d2d", "prefer"))
    assert len(sparse_layers(sparse.decoder)) == 2 and not sparse_layers(dense.decoder)
    assert torch.equal(sparse.decoder.model.embed_tokens.weight, dense.decoder.model.embed_tokens.weight)
    assert not torch.equal(sparse.projector[0].weight, dense.projector[0].weight)
    results = [json.loads(line) for line in (place / "prefer" / "results.jsonl").read_text().splitlines()]
    assert {"f1", "yes_ratio"} <= {line["metric"] for line in results if line["model"] == "student"}
    page = (place / "prefer" / "report.html").read_text()
    assert page.count("data:image/jpeg") == 8 and page.count("<i>teacher</i></dt>") == 8
    with pytest.raises(UserError, match="has sparse, which a plain model has not"):
        load_mllm(place / "d2s" / "export")
    code, said = run(
        zygote, place, "again", "stage=d2d", f"student.init_from={place / 'd2s' / 'export'}", *from_teacher
    )
    assert (
        code == 2
        and "is a sparse export; stage d2d trains dense students" in said
        and "Traceback" not in said
    )


def test_a_stopped_run_goes_on_to_the_same_weights(zygote: Zygote, place: Path) -> None:
    arguments = ["stage=sft", "moe.mode=dense", *model(place, "student")]
    for name in ("straight", "resumed"):
        assert run(zygote, place, name, *arguments)[0] == 0
    forget_the_end(place / "resumed")
    code, said = run(zygote, place, "resumed", *arguments)
    assert code == 0 and "resumed from" in said, said
    one, other = (load_mllm(place / name / "export", surgery=surgery) for name in ("straight", "resumed"))
    assert all(
        torch.equal(value, other.module.state_dict()[name]) for name, value in one.module.state_dict().items()
    )


@pytest.mark.parametrize("stage", ["d2d", "prefer"])
def test_a_stored_teacher_trains_what_the_live_one_does(
    zygote: Zygote, place: Path, teacher: Path, stage: str
) -> None:
    chats, outputs = place / ("pairs.json" if stage == "prefer" else "chats.json"), place / f"{stage}_outputs"
    stored = [
        "--model",
        str(teacher.parent),
        "--chats",
        str(chats),
        "--out",
        str(outputs),
        "--max-length",
        "60",
    ]
    stored += ["--part-size", "3", "--batch-size", "2", "--threads", "1", "--k", "260", "--fp32"]
    embed = str(ROOT / "data_tools" / "embed_chats.py")
    code, said = zygote.run(embed, stored, place / f"{stage}_embed.out", ranks=2)
    assert code == 0 and f"{outputs} is complete" in said, said
    assert len(list(outputs.glob("*.safetensors"))) == 3
    shared = [
        f"stage={stage}",
        f"data.chats=[{chats}]",
        *model(place, "student"),
        "optim.name=sgd",
        "optim.lr=0.05",
    ]
    features = place / f"{stage}_features"
    given = [
        f"init_from={teacher}",
        "--chats",
        str(chats),
        "--out",
        str(features),
        "--fp32",
        "--part-size",
        "3",
    ]
    code, said = zygote.run(
        str(ROOT / "data_tools" / "embed_pictures.py"), given, place / "pictures.out", ranks=2
    )
    assert code == 0 and f"{features} is complete" in said, said
    named = f"teacher.init_from={teacher}"
    seen = [named, f"data.features={features}"]
    ways = {"live": [named], "stored": [named, f"data.teacher_outputs={outputs}"], "seen": seen}
    for name, arguments in ways.items():
        code, said = run(zygote, place, f"{stage}_{name}", *shared, *arguments)
        assert code == 0, said
    live, other = place / f"{stage}_live", place / f"{stage}_stored"
    assert losses(other) == pytest.approx(losses(live), rel=1e-4) and losses(live)[0] != losses(live)[-1]
    assert losses(place / f"{stage}_seen") == pytest.approx(losses(live), rel=1e-4)
    models = [
        {json.loads(line)["model"] for line in (folder / "results.jsonl").read_text().splitlines()}
        for folder in (live, other)
    ]
    assert models == [{"student", "teacher"}, {"student"}]


def test_two_ranks_and_micro_batches_train_what_one_does(zygote: Zygote, place: Path) -> None:
    arguments = ["stage=sft", "optim.name=sgd", "optim.lr=0.1", *model(place, "student")]
    assert run(zygote, place, "one", *arguments)[0] == 0
    code, said = run(zygote, place, "many", *arguments, "micro_batch_size=1", ranks=2)
    assert code == 0, said
    assert losses(place / "many") == pytest.approx(losses(place / "one"), rel=1e-4)


def test_a_killed_on_policy_run_goes_on_to_the_same_weights_and_two_ranks_sample_as_one(
    zygote: Zygote, place: Path
) -> None:
    teacher = [name.replace("student.", "teacher.") for name in model(place, "student")]
    arguments = [
        "stage=d2s", "moe.mode=sparse", "loss.on_policy=0.5", "loss.sample_tokens=6", "loss.taid=0.3", *model(place, "student"),
        "student.decoder_layers=[0,3]", *teacher, "data.pack=true", "seed=4",
    ]  # fmt: skip
    assert run(zygote, place, "whole", *arguments, without=UNCHECKED)[0] == 0
    folder = place / "killed"
    given = [*SHARED, f"data.chats=[{place / 'chats.json'}]", f"run_dir={folder}", *arguments]
    zygote.kill(
        "projects.llava_mod.train_stage",
        given,
        place / "killed.out",
        (folder / "state/step_000002/manifest.json").is_file,
    )
    code, said = run(zygote, place, "killed", *arguments, without=UNCHECKED)
    assert code == 0 and "resumed from" in said, said
    one, other = (load_mllm(place / name / "export", surgery=surgery) for name in ("whole", "killed"))
    assert all(
        torch.equal(value, other.module.state_dict()[name]) for name, value in one.module.state_dict().items()
    )
    lines = [json.loads(line) for line in (place / "whole" / "metrics.jsonl").read_text().splitlines()]
    kinds = ["sampled/kl" in line for line in lines if line["kind"] == "train"]
    assert kinds == [False, True, False, True]
    greedy = [*arguments, "loss.sample_temperature=0", "loss.on_policy=1", "optim.name=sgd", "moe.aux=0"]
    assert run(zygote, place, "alone", *greedy, without=UNCHECKED)[0] == 0
    code, said = run(zygote, place, "both", *greedy, "micro_batch_size=1", ranks=2, without=UNCHECKED)
    assert code == 0, said
    assert losses(place / "both") == pytest.approx(losses(place / "alone"), rel=1e-4, abs=1e-7)


def test_a_competitive_round_of_an_export_and_saved_answers(zygote: Zygote, place: Path) -> None:
    """The tuned student is an export, the others are files; the next round tunes on what they wrote."""
    folder, following = place / "round_1", place / "round_2"
    images, teacher, student = f"images={place}", place / "teacher.jsonl", folder / "student.jsonl"
    files = [f"pool={place / 'chats.json'}", images, f"folder={folder}"]
    keys = [str(number) for number in range(8)]
    scored = {f"{key}/{order}": score for key in keys for order, score in (("12", "9 6"), ("21", "6 6"))}
    written = {f"round_1-{key}": f"And where would {key} be, {'more ' * int(key)}?" for key in keys}
    answered = {key: "Yes." for key in (*keys, *written)}
    for name, said in (("answered", answered), ("scored", scored), ("written", written)):
        lines = [json.dumps({"id": key, "said": text}) + "\n" for key, text in said.items()]
        (place / f"{name}.jsonl").write_text("".join(lines))

    def step(name: str, by: str, *given: str) -> None:
        assert comd.main([name, *given, f"by={place / by}", "most_tokens=4", "device=cpu"]) == 0

    def tune(name: str, *start: str) -> None:
        given = [f"data.chats=[{place / name / 'tune.jsonl'}]", f"data.images={place}", "stage=sft", *start]
        code, said = run(zygote, place, f"{name}/tune", *given, without=UNCHECKED)
        assert code == 0, said

    step("answer", "answered.jsonl", *files[:2], f"out={teacher}", f"chats={folder / 'tune.jsonl'}")
    tune("round_1", *model(place, "student"))
    step("answer", "round_1/tune/export", *files[:2], f"out={student}")
    lines = [json.loads(line) for line in student.read_text().splitlines()]
    assert [line["id"] for line in lines] == keys and {line["asked"] for line in lines} == {"<image>there?"}
    step("assess", "scored.jsonl", *files, f"teacher={teacher}", f"student={student}")
    assert (
        len((folder / "difficult.jsonl").read_text().splitlines()) == 8
    )  # a lead of (9 + 6) / 2 - (6 + 6) / 2
    step("augment", "written.jsonl", *files, f"train={place / 'chats.json'}", f"next={following}", "new=8")
    new = len((folder / "new.jsonl").read_text().splitlines())
    assert 0 < new <= 4
    pool = f"pool={following / 'train.jsonl'}"
    step("answer", "answered.jsonl", pool, images, f"out={teacher}", f"chats={following / 'tune.jsonl'}")
    assert len(teacher.read_text().splitlines()) == 8 + new  # the kept ones were known
    tune("round_2", f"student.init_from={place / 'round_1/tune/export'}")


@pytest.mark.parametrize(
    ("stage", "trained"),
    [
        ("adapt", set()),
        ("d2d", {"embed", "attention", "dense", "norm"}),
        ("d2s", {"dense", "experts", "gate"}),
        ("prefer", {"dense", "experts", "gate"}),
    ],
)
def test_each_stage_trains_its_part(stage: str, trained: set[str]) -> None:
    names = {
        "embed": "decoder.model.embed_tokens.weight",
        "attention": "decoder.model.layers.0.self_attn.q_proj.weight",
        "dense": "decoder.model.layers.1.mlp.gate_proj.weight",
        "experts": "decoder.model.layers.0.mlp.experts.down_proj",
        "gate": "decoder.model.layers.0.mlp.gate.weight",
        "norm": "decoder.model.norm.weight",
    }
    arguments = [f"stage={stage}", "student.init_from=x", "data.chats=[x]", "run_dir=r"]
    cfg = config.load(LlavaModConfig, [*arguments, *(["teacher.init_from=y"] if stage != "adapt" else [])])
    found = {part for part, name in names.items() if is_trained(name, cfg)}
    assert found - ({"experts", "gate"} if stage == "d2d" else set()) == trained
    assert is_trained("projector.0.weight", cfg) and not is_trained("tower.backbone.conv_stem.weight", cfg)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["stage=d2d"], "config field teacher goes with d2d, d2s, prefer, and only with them"),
        (["stage=sft", "teacher.init_from=y"], "config field teacher goes with d2d, d2s, prefer"),
        (
            ["stage=sft", "moe.expert_parallel=2"],
            "config field moe.expert_parallel needs moe.backend=deepspeed",
        ),
        (
            ["stage=sft", "moe.backend=deepspeed"],
            "config field moe.backend .* needs deepspeed.zero_stage 1 or 2",
        ),
        (
            [
                "stage=d2s",
                "teacher.init_from=y",
                "moe.backend=deepspeed",
                "deepspeed.zero_stage=2",
                "loss.on_policy=0.5",
            ],
            "config field loss.on_policy does not go with moe.backend=deepspeed",
        ),
        (["stage=adapt", "moe.mode=sparse"], "config field moe.mode goes with sft, d2s and prefer only"),
        (["stage=words", "data.pack=true"], "config field data.pack does not go with stage words"),
        (["stage=adapt", "student.decoder=smollm2"], "config field init_from leaves no choice"),
        (["stage=sft", "data.teacher_outputs=y"], "config field teacher goes with d2d, d2s, prefer"),
        (
            ["stage=d2d", "data.teacher_outputs=y", "parity.unshifted_mask=true"],
            "config field parity.unshifted_mask needs the teacher at other positions",
        ),
    ],
)
def test_settings_that_do_not_fit_are_named(arguments: list[str], told: str) -> None:
    with pytest.raises(UserError, match=told):
        config.load(LlavaModConfig, ["student.init_from=x", "data.chats=[x]", "run_dir=r", *arguments])


ZERO_3 = [
    "deepspeed.zero_stage=3",
    "deepspeed.extra={zero_optimization: {stage3_param_persistence_threshold: 0}}",  # else all of it is small enough to stay
]


def test_zero_3_trains_answers_exports_and_resumes_as_zero_1(zygote: Zygote, place: Path) -> None:
    arguments = [
        "stage=d2s", "moe.mode=sparse", "loss.ce=1", "optim.lr=1e-2", *model(place, "student"), *model(place, "teacher"),
        "deepspeed.activation_checkpointing=true", "deepspeed.shard_teacher=true",
        f"evaluation.questions=[{{data: {place / 'chats.json'}, most: 3}}]", "evaluation.every_steps=2",
    ]  # fmt: skip
    code, said = run(zygote, place, "first", *arguments, "deepspeed.zero_stage=1", ranks=2, without=UNCHECKED)
    assert code == 0, said
    code, said = run(zygote, place, "third", *arguments, *ZERO_3, ranks=2)
    assert code == 0 and "reloaded in a fresh process with equal outputs" in said, said
    assert losses(place / "third") == pytest.approx(losses(place / "first"), rel=1e-5)
    straight = exported(place / "third")
    for name, value in exported(place / "first").items():
        torch.testing.assert_close(straight[name], value, rtol=0, atol=1e-4)
    forget_the_end(place / "third")
    code, said = run(zygote, place, "third", *arguments, *ZERO_3, ranks=2, without=UNCHECKED)
    assert code == 0 and "resumed from" in said, said
    assert all(torch.equal(value, straight[name]) for name, value in exported(place / "third").items())


def test_preferences_at_zero_3_train_what_one_rank_does(zygote: Zygote, place: Path) -> None:
    arguments = [
        "stage=prefer", f"data.chats=[{place / 'pairs.json'}]", "optim.lr=1e-2", "optim.name=sgd", "optim.clip_grad_norm=0",
        "loss.preference=sigmoid", *model(place, "student"), *model(place, "teacher"),  # kto_pair's depends on the micro-batch
    ]  # fmt: skip
    for name, ranks, more in (("one_prefers", 1, []), ("two_prefer", 2, ZERO_3)):
        code, said = run(zygote, place, name, *arguments, *more, ranks=ranks, without=UNCHECKED)
        assert code == 0, said
    found, before = (exported(place / name) for name in ("two_prefer", "one_prefers"))
    for name, value in before.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-6)


def test_experts_spread_over_ranks_by_deepspeed_train_resume_and_export_as_native_ones(
    zygote: Zygote, place: Path
) -> None:
    arguments = [
        "stage=d2s", "moe.mode=sparse", "loss.ce=1", "optim.lr=1e-2", *model(place, "student"), *model(place, "teacher"),
        "parity.capacity=0.6", "parity.second_expert=gumbel", "deepspeed.zero_stage=2", "optim.clip_grad_norm=0.3",
        f"evaluation.questions=[{{data: {place / 'chats.json'}, most: 3}}]",
    ]  # fmt: skip
    shared = ["moe.backend=deepspeed", "moe.expert_parallel=2"]
    code, said = run(zygote, place, "native", *arguments, ranks=2, without=UNCHECKED)
    assert code == 0, said
    code, said = run(zygote, place, "shared", *arguments, *shared, ranks=2)
    assert code == 0 and "reloaded in a fresh process with equal outputs" in said, said
    assert losses(place / "shared") == pytest.approx(losses(place / "native"), rel=1e-5)
    straight, native = exported(place / "shared"), exported(place / "native")
    assert straight.keys() == native.keys()
    for name, value in native.items():
        torch.testing.assert_close(straight[name], value, rtol=0, atol=1e-5)
    forget_the_end(place / "shared")
    code, said = run(zygote, place, "shared", *arguments, *shared, ranks=2, without=UNCHECKED)
    assert code == 0 and "resumed from" in said, said
    assert all(torch.equal(value, straight[name]) for name, value in exported(place / "shared").items())
    code, said = run(
        zygote, place, "odd", *arguments, "moe.backend=deepspeed", "moe.expert_parallel=3", ranks=2
    )
    assert code == 2 and "moe.expert_parallel is 3, which does not divide the 4 experts of a layer" in said
