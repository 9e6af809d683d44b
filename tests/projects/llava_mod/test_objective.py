"""Losses and metrics of a step against sums over single positions in float64."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor

from projects.llava_mod.config import LlavaModConfig
from projects.llava_mod.experts import balance
from projects.llava_mod.taid import TaidSchedule
from projects.llava_mod.task import LlavaModTask
from tests.chat_parts import picture
from tests.projects.llava_mod.test_on_policy import parts
from vlmkd import config
from vlmkd.data.chats import Chat, ChatPipeline, ChatTokens
from vlmkd.data.samples import RawSample
from vlmkd.errors import UserError
from vlmkd.losses.tokens import Taid

TURNS = [
    [("<image>what?", "A cat."), ("and then?", "No")],
    [("<image>how many are there?", "3")],
    [("<image>b", "nothing at all")],
]
OTHERS = ["Yes", "A long answer", "4"]
"""Rejected in the place of the last ones."""


def made(*options: str, pairs: bool = False, pack: bool = False) -> tuple[LlavaModTask, dict[str, Any]]:
    """A task of a sparse student and a dense teacher, and a batch of three chats."""
    student, teacher = parts(0, sparse=True), parts(1, vocabulary=259)
    teacher.module.eval().requires_grad_(False)
    given = ["student.init_from=x", "teacher.init_from=y", "data.chats=[x]", "run_dir=r", "loss.chunk=3"]
    cfg = config.load(LlavaModConfig, [*given, *options])
    tokens = ChatTokens(student.tokenizer, "chatml", student.module.tower.tokens)  # type: ignore[arg-type]
    pipeline = ChatPipeline(tokens, student.image_spec, max_length=400, pack=pack)
    batch = pipeline.collate([chat(pipeline, number, pairs) for number in range(3)])
    return LlavaModTask(cfg, student, tokens, teacher), batch


def chat(pipeline: ChatPipeline, number: int, pair: bool) -> Chat:
    def talk(turns: list[tuple[str, str]]) -> list[dict[str, str]]:
        said = [(who, text) for turn in turns for who, text in zip(("human", "gpt"), turn, strict=True)]
        return [{"from": who, "value": text} for who, text in said]

    *before, (asked, _) = turns = TURNS[number]
    content = {"conversations": talk(turns)}
    if pair:
        content = {"chosen": talk(turns), "rejected": talk([*before, (asked, OTHERS[number])])}
    members = {"json": json.dumps(content).encode(), "png": picture(number)}
    found = pipeline.process(RawSample("", str(number), members))
    assert isinstance(found, Chat)
    return found


def log_probs(model: Any, batch: dict[str, Any], size: int | None = None) -> Tensor:
    """[R, T, V] in float64, over the first `size` entries."""
    with torch.no_grad():
        logits: Tensor = model.head(model(batch)).double()
    return logits[..., :size].log_softmax(-1)


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("unshifted", [False, True])
def test_the_released_mask_moves_the_divergence_and_not_the_cross_entropy(
    unshifted: bool, pack: bool
) -> None:
    options = [f"parity.unshifted_mask={unshifted}", "loss.ce=0.5", "loss.kd=2"]
    task, batch = made("stage=d2s", *options, pack=pack)
    batch["cut"] += 2
    found = task.step(batch, 0)
    assert found.metrics["cut"] == 2
    own = log_probs(task.core, batch)
    even = 0.01 * balance(task.core, batch["segments"] > 0)
    q, p = own[..., :259].log_softmax(-1), log_probs(task.teacher.module, batch, 259)  # type: ignore[union-attr]
    rows = [(ids, learned) for ids, learned in map(task.tokens.encode, TURNS)]
    divergence, surprise = [], []
    for ids, learned in rows:
        row, start = place_of(batch["input_ids"], ids)
        for place in range(len(ids) - 1):
            here = start + place
            if learned[place if unshifted else place + 1]:
                divergence.append((p[row, here].exp() * (p[row, here] - q[row, here])).sum())
            if learned[place + 1]:
                surprise.append(-own[row, here, ids[place + 1]])
    assert len(divergence) == len(surprise) == task.weight(batch)
    kl, ce = torch.stack(divergence).mean(), torch.stack(surprise).mean()
    assert found.metrics["kl"].item() == pytest.approx(kl.item(), rel=1e-5)
    assert found.metrics["next_token"].item() == pytest.approx(ce.item(), rel=1e-5)
    assert found.loss.item() == pytest.approx((2 * kl + 0.5 * ce + even).item(), rel=1e-5)
    found.loss.backward()
    assert task.core.head.weight.grad is not None


def place_of(rows: Tensor, ids: list[int]) -> tuple[int, int]:
    """Row and column where a chat begins in a batch."""
    for row, have in enumerate(rows.tolist()):
        for start in range(len(have) - len(ids) + 1):
            if have[start : start + len(ids)] == ids:
                return row, start
    raise AssertionError("the chat is not in the batch")


def test_a_skewed_divergence_is_from_the_mixture() -> None:
    task, batch = made("stage=d2d", "loss.skew=0.3")
    found = task.step(batch, 0).metrics["kl"]
    q, p = (log_probs(one, batch, 259)[batch["targets"] >= 0] for one in (task.core, task.teacher.module))  # type: ignore[union-attr]
    expected = (p.exp() * (p - (0.3 * p.exp() + 0.7 * q.exp()).log())).sum(-1).mean()
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)


def test_taids_target_is_between_student_and_teacher() -> None:
    task, batch = made("stage=d2d", "loss.taid=0.3", "steps=10")
    found = task.step(batch, 0)
    learned = batch["targets"] >= 0
    q, p = (log_probs(one, batch, 259)[learned] for one in (task.core, task.teacher.module))  # type: ignore[union-attr]
    target = (0.7 * q + 0.3 * p).log_softmax(-1)
    expected = (target.exp() * (target - q)).sum(-1).mean()
    assert found.metrics["kl"].item() == pytest.approx(expected.item(), rel=1e-5)
    assert found.metrics["taid"] == 0.3
    surprise = -(target.exp() * q).sum().item()
    assert task.state()["taid"]["seen"] == pytest.approx([surprise, int(learned.sum())], rel=1e-5)
    assert task.step(batch, 1).metrics["taid"].item() == pytest.approx(0.3)  # the first loss is only kept
    assert task.step(batch, 2).metrics["taid"].item() == pytest.approx(
        0.3 + 0.7 * 2 / 10
    )  # the line to the end


def test_taids_share_follows_the_loss_of_whole_steps_and_is_resumed() -> None:
    def run(schedule: TaidSchedule, places: range) -> list[float]:
        found = []
        for place in places:  # two micro-batches of unequal size a step
            step, rows = place // 2, torch.tensor(4.0 - place % 2)
            found.append(schedule.at(step))
            schedule.add(rows * (place % 2 + 1) * 0.9**step, rows)
        return found

    straight = run(TaidSchedule(0.4, 10**6), range(40))
    by_hand, expected = Taid(0.4), []
    for step in range(20):
        expected += [by_hand.t] * 2
        by_hand = by_hand.after((4 * 1 + 3 * 2) / 7 * 0.9**step, (step + 1) / 10**6, start=0.4)
    assert straight == pytest.approx(expected, rel=1e-6) and straight[-1] > straight[4] > 0.4
    before, after = TaidSchedule(0.4, 10**6), TaidSchedule(0.4, 10**6)
    first = run(before, range(20))
    after.load_state(before.state())
    assert first + run(after, range(20, 40)) == straight


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["loss.preference=sigmoid", "loss.label_smoothing=0.2"],
        ["loss.mixture={sigmoid: 0.8, bco_pair: 0.2, sft: 1}"],
        ["loss.preference=ipo", "loss.by_length=true"],
    ],
)
def test_pairs_are_compared_with_the_teacher_and_balanced_apart(options: list[str]) -> None:
    beta = 0.3
    task, batch = made("stage=prefer", f"loss.beta={beta}", "moe.aux=0.05", *options, pairs=True)
    found = task.step(batch, 0)
    lengths = (batch["targets"] >= 0).sum(1)
    own, said = sums(task.core, batch), sums(task.teacher.module, batch)  # type: ignore[union-attr]
    ratios = (own - said) / (lengths if "loss.by_length=true" in options else 1)
    good, bad = ratios[:3], ratios[3:]

    def s(x: Tensor) -> Tensor:
        return (beta * x).sigmoid()

    if not options:
        above, below = good.mean().clamp_min(0), bad.mean().clamp_min(0)
        expected = (1 - s(good - below)) / 2 + (1 - s(above - bad)) / 2
    elif "smoothing" in options[-1]:
        expected = -0.8 * s(good - bad).log() - 0.2 * s(bad - good).log()
    elif "mixture" in options[0]:
        mpo = {
            "sigmoid": -0.8 * s(good - bad).log(), "bco_pair": -0.2 * (s(good) * s(-bad)).log(), "sft": -own[:3] / lengths[:3],
        }  # fmt: skip
        expected = sum(mpo.values(), torch.zeros(3))
        for kind, term in mpo.items():
            assert found.metrics[f"preference/{kind}"].item() == pytest.approx(term.mean().item(), rel=1e-5)
    else:
        expected = (good - bad - 1 / (2 * beta)) ** 2
    even = []
    for half in (slice(0, 3), slice(3, 6)):  # as two passes
        rows = {name: batch[name][half] for name in ("input_ids", "targets", "segments", "image_rows")}
        task.core({"images": batch["images"], **rows})
        even.append(balance(task.core, rows["segments"] > 0))
    assert found.terms["preference"].item() == pytest.approx(expected.mean().item(), rel=1e-4)
    assert found.terms["balance"].item() == pytest.approx(0.05 * (even[0] + even[1]).item(), rel=1e-5)
    reward = beta * ratios
    logged = {
        "reward_chosen": reward[:3].mean(),
        "reward_rejected": reward[3:].mean(),
        "reward_margin": (reward[:3] - reward[3:]).mean(),
        "preferred": (good > bad).double().mean(),
        "saturated": (reward.abs() > 5).double().mean(),
        "logps/chosen": own[:3].mean(),
        "logps/rejected": own[3:].mean(),
    }
    for name, value in logged.items():
        assert found.metrics[name].item() == pytest.approx(value.item(), rel=1e-4, abs=1e-6), name


def sums(model: Any, batch: dict[str, Any]) -> Tensor:
    """Log-probability [R] of each row's answers, position by position."""
    logs = log_probs(model, batch)
    learned = [[(t, int(token)) for t, token in enumerate(row) if token >= 0] for row in batch["targets"]]
    return torch.stack([sum(logs[r, t, token] for t, token in row) for r, row in enumerate(learned)])


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["moe.top_k=5"], "config field moe.top_k is 5, but a layer has 4 experts"),
        (["loss.divergence=jsd", "loss.skew=0.1"], "config field loss.skew is below 1, and of the forward"),
        (["loss.skew=1"], "config field loss.skew is below 1"),
        (["stage=prefer", "loss.taid=0.3"], "config field loss.taid goes with d2d and d2s only"),
        (
            ["loss.mixture={dpo: 1}"],
            "config field loss.mixture.dpo is no kind; choose from kto_pair, sigmoid",
        ),
        (["loss.label_smoothing=0.1"], "config field loss.label_smoothing is of the sigmoid preference only"),
    ],
)
def test_settings_that_no_loss_has_are_named(options: list[str], told: str) -> None:
    given = ["stage=d2d", "student.init_from=x", "teacher.init_from=y", "data.chats=[x]", "run_dir=r"]
    with pytest.raises(UserError, match=told):
        config.load(LlavaModConfig, [*given, *options])
