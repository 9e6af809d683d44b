"""Chats beside a stored teacher: what is stored, what is refused, and shards of chats against files of them."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from data_tools import check_shards, embed_chats, images_to_shards, index_shards
from tests.chat_parts import byte_tokenizer, picture
from tests.projects.matvlm.models import decoder_folder, tower_files
from vlmkd import config
from vlmkd.chat_config import ChatRunConfig, MllmConfig
from vlmkd.chat_ids import IGNORED
from vlmkd.chat_runs import chat_loader, stored_teacher
from vlmkd.data.chat_outputs import ChatOutputs
from vlmkd.data.chats import ChatPipeline, ChatTokens, read_chats
from vlmkd.data.samples import RawSample
from vlmkd.data.shards import read_shard
from vlmkd.data.teacher_outputs import TeacherOutputs
from vlmkd.errors import UserError
from vlmkd.export.mllm import build_mllm, export_digest, export_mllm
from vlmkd.losses.tokens import TeacherStates, TokenObjective, token_loss

MOST = 90


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A teacher's export, and ten chats and four pairs about pictures, some without or with two of them."""
    folder = tmp_path_factory.mktemp("teacher")
    cfg = MllmConfig(tower=tower_files(folder), decoder=f"hf:{decoder_folder(folder / 'llama')}")
    parts = replace(build_mllm(cfg), template="plain")
    parts.trained = set(parts.module.state_dict())
    export_mllm(folder / "export", parts, parts.module.state_dict())
    chats, pairs = [], []
    for number in range(10):
        (folder / f"{number}.png").write_bytes(picture(number))
        images = [f"{number}.png", "0.png"][: (0, 1, 1, 2)[number % 4]]
        talk = [{"from": "human", "value": "<image>" * len(images) + "What?" * (1 + number % 3)}]
        talk += [{"from": "gpt", "value": "red " * (1 + number % 5)}]
        if number % 3 == 0:
            talk += [{"from": "human", "value": "And?"}, {"from": "gpt", "value": "blue"}]
        chats.append({"id": "the same", "image": images, "conversations": talk})
        other = [*talk[:-1], {"from": "gpt", "value": "none at all"}]
        pairs.append({"id": str(number), "image": images, "chosen": talk, "rejected": other})
    (folder / "chats.json").write_text(json.dumps([*chats, chats[0]]))
    (folder / "pairs.json").write_text(json.dumps(pairs[:4]))
    return folder


@pytest.fixture(scope="module")
def teacher(place):
    parts = build_mllm(MllmConfig(init_from=str(place / "export")))
    parts.module.eval()
    return parts


def embed(place: Path, out: Path, *arguments: str, chats: str = "chats.json") -> None:
    given = [
        "--model",
        str(place / "export"),
        "--out",
        str(out),
        "--max-length",
        str(MOST),
        "--batch-size",
        "3",
    ]
    files = [] if "--chats" in arguments else ["--chats", str(place / chats)]
    if code := embed_chats.main([*given, "--part-size", "4", *files, *arguments]):
        raise UserError(f"exit code {code}")


def run_config(place: Path, *arguments: str) -> ChatRunConfig:
    given = [
        f"data.chats=[{place / 'chats.json'}]",
        "data.template=plain",
        f"data.max_length={MOST}",
        "data.workers=0",
    ]
    return config.load(ChatRunConfig, [*given, "batch_size=4", "run_dir=r", *arguments])


def loader_of(place: Path, teacher: Any, *arguments: str, **of_loss: Any) -> Any:
    tokens = ChatTokens(teacher.tokenizer, "plain", teacher.module.tower.tokens)
    return chat_loader(run_config(place, *arguments), teacher, tokens, **of_loss)


def batches(place: Path, teacher: Any, number: int, *arguments: str, **of_loss: Any) -> list[dict[str, Any]]:
    return list(itertools.islice(iter(loader_of(place, teacher, *arguments, **of_loss)), number))


@pytest.fixture(scope="module")
def whole(place) -> Path:
    """All that the teacher says, in float32."""
    embed(place, place / "whole", "--fp32", "--k", "260", "--workers", "1")
    return place / "whole"


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("divergence", ["forward", "reverse", "jsd"])
def test_the_whole_vocabulary_gives_the_loss_of_the_live_teacher(
    place, teacher, whole, pack, divergence
) -> None:
    info = ChatOutputs(whole).info
    assert (info.k, info.vocabulary, info.set_name, info.pairs) == (260, 260, "chats", False)
    assert len(ChatOutputs(whole)) == 10  # a record that comes twice is stored once
    generator = torch.Generator().manual_seed(1)
    head = torch.randn(260, 24, generator=generator)
    found = batches(place, teacher, 4, f"data.teacher_outputs={whole}", f"data.pack={pack}")
    assert not pack or int(max(batch["segments"].max() for batch in found)) > 1
    for batch in found:
        learned = batch["targets"] != IGNORED
        hidden = torch.randn(int(learned.sum()), 24, generator=generator)
        with torch.no_grad():
            states = teacher.module(batch)[learned]
        live = TeacherStates(states, teacher.module.head.weight)
        objective = TokenObjective(divergence=divergence)
        one, other = (token_loss(hidden, head, each, objective) for each in (live, stored_teacher(batch)))
        assert other.total.item() == pytest.approx(one.total.item(), rel=1e-5)
        assert other.entropy.item() == pytest.approx(one.entropy.item(), rel=1e-4)
        assert other.agreement == one.agreement


@pytest.mark.parametrize(("temperature", "vocabulary"), [(1.0, 260), (2.5, 200)])
def test_few_entries_with_the_mass_of_the_others_are_a_dense_softmax(temperature, vocabulary) -> None:
    logits = 4 * torch.randn(30, 260, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    logits[0, 3] = 90.0  # next to nothing is left for the others
    info = SimpleNamespace(vocabulary=vocabulary, temperature=temperature, k=5)
    found = embed_chats.top_k(logits, info)
    p = (logits[:, :vocabulary] / temperature).softmax(-1)
    for row in range(30):
        kept = found["ids"][row].long()
        assert set(kept.tolist()) == set(p[row].argsort(descending=True)[:5].tolist())
        torch.testing.assert_close(found["log_probs"][row].double(), p[row, kept].log(), rtol=1e-5, atol=1e-6)
        rest = math.log(
            math.fsum(p[row, other].item() for other in range(vocabulary) if other not in kept.tolist())
        )
        assert found["log_tail"][row].item() == pytest.approx(rest, rel=1e-4, abs=1e-5)


def test_what_is_stored_by_default_bounds_the_live_divergence_from_below(place, teacher, whole) -> None:
    embed(place, place / "few", "--k", "20")
    assert json.loads((place / "few" / "cache.json").read_text())["info"]["dtype"] == "float16"
    head = torch.randn(260, 24, generator=torch.Generator().manual_seed(1))
    options = [f"data.teacher_outputs={folder}" for folder in (whole, place / "few")]
    (all_of_it,), (few,) = (batches(place, teacher, 1, option) for option in options)
    assert torch.equal(all_of_it["targets"], few["targets"]) and few["teacher_ids"].shape[1] == 20
    hidden = torch.randn(len(few["teacher_ids"]), 24, generator=torch.Generator().manual_seed(3))
    live, coarse = (
        token_loss(hidden, head, stored_teacher(one), TokenObjective()) for one in (all_of_it, few)
    )
    assert 0.5 * live.total < coarse.total < live.total


def test_pairs_have_the_sums_of_both_answers_in_the_order_of_the_rows(place, teacher) -> None:
    embed(place, place / "sums", chats="pairs.json")
    options = [f"data.chats=[{place / 'pairs.json'}]", f"data.teacher_outputs={place / 'sums'}"]
    (batch,) = batches(place, teacher, 1, *options, pairs=True)
    with torch.no_grad():
        log_p = teacher.module.head(teacher.module(batch)).double().log_softmax(-1)
    learned = batch["targets"] != IGNORED
    expected = log_p.gather(2, batch["targets"].clamp_min(0)[..., None])[..., 0].where(learned, 0).sum(1)
    torch.testing.assert_close(batch["teacher_sums"].double(), expected, rtol=1e-5, atol=1e-4)
    with pytest.raises(UserError, match="the stage takes preference pairs: False, in the outputs True"):
        loader_of(place, teacher, *options)


@pytest.mark.parametrize(
    ("arguments", "of_loss", "told"),
    [
        (["data.template=llava"], {}, "data.template: llava, in the outputs plain"),
        (["data.max_length=80"], {}, "data.max_length: 80, in the outputs 90"),
        ([], {"temperature": 2.0}, "loss.temperature: 2.0, in the outputs 1.0"),
        ([], {"vocabulary": 100}, r"the vocabulary of the loss .*: 100, in the outputs 260"),
        ([], {"pairs": True}, "the stage takes preference pairs: True, in the outputs False"),
    ],
)
def test_a_run_of_other_settings_is_refused(place, teacher, whole, arguments, of_loss, told) -> None:
    tokens = ChatTokens(teacher.tokenizer, "llava" if arguments == ["data.template=llava"] else "plain", 4)
    cfg = run_config(place, f"data.teacher_outputs={whole}", *arguments)
    with pytest.raises(UserError, match=told) as raised:
        chat_loader(cfg, teacher, tokens, **of_loss)
    assert "\n" not in str(raised.value) and "data_tools/embed_chats.py" in str(raised.value)


def test_another_teacher_tokenizer_or_input_is_refused(place, teacher, whole, tmp_path) -> None:
    option = f"data.teacher_outputs={whole}"
    loader_of(place, teacher, option, f"teacher.init_from={place / 'export'}")
    changed = replace(teacher, trained={"projector.0.bias"})
    weights = {"projector.0.bias": teacher.module.projector[0].bias.detach() + 1}
    export_mllm(tmp_path / "other", changed, teacher.module.state_dict() | weights)
    assert export_digest(str(tmp_path / "other")) != export_digest(str(place))
    with pytest.raises(UserError, match=r"the teacher: \w{12}\.\.\., in the outputs \w{12}\.\.\."):
        loader_of(place, teacher, option, f"teacher.init_from={tmp_path / 'other'}")
    with pytest.raises(UserError, match="teacher.tower goes with no data.teacher_outputs"):
        loader_of(place, teacher, option, "teacher.tower=x", "teacher.decoder=y")
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<new>"])
    with pytest.raises(UserError, match="the tokenizer's vocabulary: "):
        loader_of(place, replace(teacher, tokenizer=tokenizer), option)
    spec = replace(teacher.image_spec, size=(32, 32))
    with pytest.raises(UserError, match="the student's input: "):
        loader_of(place, replace(teacher, image_spec=spec), option)
    with pytest.raises(UserError, match="are of another kind of data"):
        TeacherOutputs(whole)


def test_changed_chats_and_images_are_refused(place, teacher, tmp_path) -> None:
    for path in [*place.glob("*.png"), place / "chats.json"]:
        (tmp_path / path.name).write_bytes(path.read_bytes())
    embed(place, tmp_path / "out", "--chats", str(tmp_path / "chats.json"))
    options = [f"data.chats=[{tmp_path / 'chats.json'}]", f"data.teacher_outputs={tmp_path / 'out'}"]
    batches(place, teacher, 4, *options)
    before = (tmp_path / "1.png").read_bytes()
    (tmp_path / "1.png").write_bytes(picture(99))
    for workers in (0, 1):
        with pytest.raises(UserError, match="written for other tokens or images than chat the same has now"):
            batches(place, teacher, 4, *options, f"data.workers={workers}")
    (tmp_path / "1.png").write_bytes(before)
    records = json.loads((tmp_path / "chats.json").read_text())
    records[2]["conversations"][1]["value"] = "green"
    (tmp_path / "chats.json").write_text(json.dumps(records))
    with pytest.raises(
        UserError, match=r"1 of 11 chats are not in it .first: .*; change the config, or run data_tools"
    ):
        loader_of(place, teacher, *options)
    loader = loader_of(place, teacher, *options, "data.max_bad_share=0.5")
    list(itertools.islice(iter(loader), 3))
    assert loader.skipped == {"missing_teacher_embedding": 1}
    embed(place, tmp_path / "out", "--chats", str(tmp_path / "chats.json"))  # adds the one
    assert len(ChatOutputs(tmp_path / "out")) == 11
    batches(place, teacher, 4, *options)


def test_an_interrupted_call_goes_on_and_other_settings_are_not_mixed(
    place, whole, monkeypatch, tmp_path, capsys
) -> None:
    said, asked = embed_chats.said, []

    def stopping(batch, **rest):
        asked.extend(one.key for one in batch)
        if len(asked) > 5:
            raise KeyboardInterrupt
        return said(batch, **rest)

    monkeypatch.setattr(embed_chats, "said", stopping)
    with pytest.raises(KeyboardInterrupt):
        embed(place, tmp_path / "out", "--fp32", "--k", "260")
    assert len(ChatOutputs(tmp_path / "out")) == 4 and not list((tmp_path / "out").glob("*.partial"))
    first = set(asked[:4])
    asked.clear()
    monkeypatch.setattr(
        embed_chats,
        "said",
        lambda batch, **rest: (asked.extend(x.key for x in batch), said(batch, **rest))[1],
    )
    embed(place, tmp_path / "out", "--fp32", "--k", "260")
    assert len(asked) == 6 and not first & set(asked)
    resumed, straight = ChatOutputs(tmp_path / "out"), ChatOutputs(whole)
    for key in [*first, *asked]:
        one, other = resumed.get(key), straight.get(key)
        assert one.digest == other.digest and torch.equal(
            one.columns["ids"][:, 0], other.columns["ids"][:, 0]
        )
        torch.testing.assert_close(one.columns["log_probs"], other.columns["log_probs"], rtol=1e-5, atol=1e-5)
    for change, told in (
        (["--k", "8"], "k 260 (now 8)"),
        (["--template", "llava"], "template plain (now llava)"),
        (["--temperature", "2"], "temperature 1.0 (now 2.0)"),
        (["--precision", "bf16"], "precision fp32 (now bf16)"),
    ):
        assert embed_chats.main(["--model", str(place / "export"), "--chats", str(place / "chats.json"), "--out",
                                 str(tmp_path / "out"), "--fp32", "--k", "260", "--max-length", str(MOST), *change]) == 2  # fmt: skip
        assert f"holds outputs made with {told}" in capsys.readouterr().err


@pytest.fixture(scope="module")
def shards(place) -> list[str]:
    """The chats in four shards."""
    arguments = ["--chats", str(place / "chats.json"), "--num-shards", "4", "--out", str(place / "shards")]
    assert images_to_shards.main(arguments) == 0
    return [str(path) for path in sorted((place / "shards").glob("*.tar"))]


def test_shards_hold_what_files_do(place, teacher, shards, capsys) -> None:
    tokens = ChatTokens(teacher.tokenizer, "plain", 4)
    pipeline = ChatPipeline(tokens, teacher.image_spec, max_length=MOST)

    def plain(raw: RawSample) -> tuple[Any, ...]:
        chat = pipeline.process(raw)
        return json.dumps(chat.rows), [image.sum().item() for image in chat.images]

    items = read_chats(str(place / "chats.json"), str(place))
    expected = sorted(plain(RawSample("", "x", item.members())) for item in items)
    assert sorted(plain(raw) for url in shards for raw in read_shard(url)) == expected
    assert check_shards.main([*shards, "--chats"]) == 0 and index_shards.main(shards) == 0
    assert "11 samples, 0 bad" in capsys.readouterr().out
    loader = loader_of(place, teacher, f"data.chats=[{place / 'shards'}/*.tar]")
    assert loader.samples_per_epoch == 11
    torn = Path(shards[0]).with_name("torn.tar")
    torn.write_bytes(Path(shards[0]).read_bytes().replace(b'"human"', b'"robot"'))
    assert check_shards.main([str(torn), "--chats"]) == 1 and "bad_record 3" in capsys.readouterr().out
    torn.unlink()


def test_pairs_go_through_shards_too(place, teacher) -> None:
    out = place / "pair_shards"
    assert (
        images_to_shards.main(["--chats", str(place / "pairs.json"), "--num-shards", "2", "--out", str(out)])
        == 0
    )
    embed(place, place / "pair_sums", "--chats", f"{out}/*.tar")
    options = [f"data.chats=[{out}/*.tar]", f"data.teacher_outputs={place / 'pair_sums'}"]
    (batch,) = batches(place, teacher, 1, *options, pairs=True)
    assert batch["input_ids"].shape[0] == 8 and batch["teacher_sums"].shape == (8,)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_stream_of_shards_is_the_same(place, teacher, shards, workers) -> None:
    embed(place, place / "of_shards", "--chats", *shards)
    options = [f"data.chats=[{place / 'shards'}/*.tar]", f"data.teacher_outputs={place / 'of_shards'}"]
    options.append(f"data.workers={workers}")
    straight = batches(place, teacher, 7, *options)
    first = loader_of(place, teacher, *options)
    for _ in zip(range(3), first, strict=False):
        pass
    state = json.loads(json.dumps(first.state_dict()))
    again = loader_of(place, teacher, *options)
    again.load_state_dict(state)
    for one, other in zip(straight[3:], again, strict=False):
        assert one["keys"] == other["keys"]
        for name in ("input_ids", "targets", "images", "teacher_ids", "teacher_log_probs"):
            assert torch.equal(one[name], other[name]), name


def test_shards_and_files_do_not_mix(place, teacher, shards) -> None:
    with pytest.raises(UserError, match=r"data.chats names shards .* and JSON files; give one kind"):
        loader_of(place, teacher, f"data.chats=[{shards[0]},{place / 'chats.json'}]")
    with pytest.raises(UserError, match="data.images goes with JSON files"):
        loader_of(place, teacher, f"data.chats=[{shards[0]}]", f"data.images={place}")
    with pytest.raises(
        UserError, match="config field data.chats has 1 shards, but 1 ranks x 2 workers need 2"
    ):
        loader_of(place, teacher, f"data.chats=[{shards[0]}]", "data.workers=2")
