"""Every stage on one batch, and a sparse model that answers alike in batches of any size."""

from __future__ import annotations

import json
from typing import get_args

import pytest
import torch

from projects.llava_mod.config import FROM_TEACHER, SPARSE, LlavaModConfig, Stage
from projects.llava_mod.student import train_parts
from projects.llava_mod.task import LlavaModTask
from tests.chat_parts import picture
from tests.projects.llava_mod.test_on_policy import parts
from vlmkd import config
from vlmkd.data.chats import Chat, ChatPipeline, ChatTokens
from vlmkd.data.samples import RawSample
from vlmkd.evaluation.answers import ChatModel


@pytest.mark.parametrize("stage", get_args(Stage))
def test_a_step_moves_what_the_stage_trains_and_twenty_learn_the_batch(stage: Stage) -> None:
    taught = stage in FROM_TEACHER
    given = [f"stage={stage}", "student.init_from=x", "data.chats=[x]", "run_dir=r", "loss.ce=0.5"]
    cfg = config.load(LlavaModConfig, given + ["teacher.init_from=y"] * taught)
    student, teacher = parts(0, sparse=stage in SPARSE), parts(1)
    teacher.module.eval().requires_grad_(False)
    train_parts(student.module, cfg)
    tokens = ChatTokens(student.tokenizer, "plain", student.module.tower.tokens)  # type: ignore[arg-type]
    pipeline = ChatPipeline(tokens, student.image_spec, max_length=400)
    batch = pipeline.collate([record(pipeline, number, stage == "prefer") for number in range(3)])
    task = LlavaModTask(cfg, student, tokens, teacher if taught else None)
    trained = {name: p for name, p in student.module.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in student.module.named_parameters()}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
    losses = []
    for step in range(20):
        loss = task.step(batch, step).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if not step:
            moved = {
                name for name, p in student.module.named_parameters() if not torch.equal(p, before[name])
            }
            assert moved == trained.keys()
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("shown", [3, 0], ids=["images", "text"])
def test_a_tower_that_is_the_teachers_too_runs_once_and_gives_the_same_loss(shown: int) -> None:
    cfg = config.load(
        LlavaModConfig,
        ["stage=d2d", "student.init_from=x", "teacher.init_from=y", "data.chats=[x]", "run_dir=r"],
    )
    student, teacher = parts(0, sparse=False), parts(1)
    teacher.module.eval().requires_grad_(False)
    tokens = ChatTokens(student.tokenizer, "plain", student.module.tower.tokens)  # type: ignore[arg-type]
    pipeline = ChatPipeline(tokens, student.image_spec, max_length=400)
    batch = pipeline.collate([record(pipeline, number, False) for number in range(3)])
    if not shown:
        batch |= {"images": batch["images"][:0], "image_rows": batch["image_rows"][:0]}
        batch["input_ids"] = batch["input_ids"].clamp_min(0)
    passes: list[int] = []
    student.module.tower.register_forward_hook(lambda *_: passes.append(1))

    def loss(task: LlavaModTask) -> torch.Tensor:
        passes.clear()
        return task.step(batch, 0).loss

    shared = loss(LlavaModTask(cfg, student, tokens, teacher))
    assert not passes
    own = LlavaModTask(cfg, student, tokens, teacher)
    own.one_tower = False
    assert torch.equal(shared, loss(own))
    assert passes
    student.module.tower.double()
    loss(LlavaModTask(cfg, student, tokens, teacher))
    assert passes  # the same weights at another precision
    student.module.tower.float()
    next(teacher.module.tower.parameters()).data.mul_(1.1)
    loss(LlavaModTask(cfg, student, tokens, teacher))
    assert passes  # other weights


def record(pipeline: ChatPipeline, number: int, pair: bool) -> Chat:
    """A question about a picture, with its answer or with two of them."""
    asked = {"from": "human", "value": "<image>there?"}
    answers = [[asked, {"from": "gpt", "value": text}] for text in ("Yes.", "Not at all.")]
    content = (
        {"chosen": answers[0], "rejected": answers[1]} if pair else {"conversations": answers[number % 2]}
    )
    members = {"json": json.dumps(content).encode(), "png": picture(number)}
    found = pipeline.process(RawSample("", str(number), members))
    assert isinstance(found, Chat)
    return found


def test_a_sparse_model_answers_alike_in_batches_of_one_to_four_and_again() -> None:
    model = parts(0, sparse=True)
    tokens = ChatTokens(model.tokenizer, "plain", model.module.tower.tokens)  # type: ignore[arg-type]
    chat = ChatModel("sparse", model.module.eval(), tokens, model.image_spec)
    asked = [([picture(seed)], [], f"<image>{'what' * seed}?") for seed in range(4)]
    said = [chat.answer([one], most_tokens=6)[0] for one in asked]  # type: ignore[list-item]
    assert len(set(said)) > 1
    for size in (1, 2, 3, 4):
        groups = [asked[start : start + size] for start in range(0, 4, size)]
        found = [text for group in groups for text in chat.answer(group, most_tokens=6)]  # type: ignore[arg-type]
        assert found == said
