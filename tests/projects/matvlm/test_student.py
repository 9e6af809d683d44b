"""What a run trains and what its teacher-forced pass sees, on a tiny Llama with a tiny tower."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PhiConfig, PhiForCausalLM

from projects.matvlm.build import job
from projects.matvlm.config import HybridConfig, MatvlmConfig
from projects.matvlm.student import train_parts
from projects.matvlm.surgery import mixers_of, to_hybrid
from projects.matvlm.task import MatvlmTask, layers_seen, mixer_masks, teacher_forced
from tests.projects.matvlm.models import fields
from vlmkd.chat_ids import IGNORED
from vlmkd.config import load
from vlmkd.errors import UserError
from vlmkd.models.mllm import Mllm, Projector
from vlmkd.train.durations import in_steps
from vlmkd.train.task import Batch

ROOT = Path(__file__).parents[3]
PUBLISHED = ["loss.layer_reduction=frob", "loss.logit_reduction=batch_sum", "loss.padding=true"]


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return [*fields(tmp_path_factory.mktemp("parts")), "run_dir=r"]


def task_of(given: list[str], *more: str) -> tuple[MatvlmTask, list[Batch]]:
    """A run's task, and its first two batches."""
    made = job(load(MatvlmConfig, [*given, *more]))
    task: Any = made.task
    return task, list(itertools.islice(made.loader, 2))


@pytest.mark.parametrize(
    ("preset", "mixers", "trained", "growth"),
    [
        (12.5, 131_563_904, 141_071_744, 26.7),
        (25, 263_127_808, 272_635_648, 53.3),
        (50, 526_255_616, 535_763_456, 106.7),
    ],
)
def test_counts_of_the_paper_s_model(
    given: list[str], preset: Any, mixers: int, trained: int, growth: float
) -> None:
    config = PhiConfig(
        hidden_size=2560, intermediate_size=10240, num_hidden_layers=32, num_attention_heads=32
    )
    with torch.device("meta"):
        decoder = PhiForCausalLM(config)
        before = sum(p.numel() for p in decoder.parameters())
        to_hybrid(decoder, HybridConfig(preset=preset))
        module = Mllm(nn.Linear(3, 1152), Projector(1152, 2560), decoder)
    train_parts(module, load(MatvlmConfig, given))
    assert sum(p.numel() for mixer in mixers_of(module).values() for p in mixer.parameters()) == mixers
    assert sum(p.numel() for p in module.parameters() if p.requires_grad) == trained
    after = sum(p.numel() for p in decoder.parameters())
    assert (after - before) / 1e6 == pytest.approx(growth, abs=0.05)
    train_parts(module, load(MatvlmConfig, [*given, "train_projector=false"]))
    assert sum(p.numel() for p in module.parameters() if p.requires_grad) == mixers


def test_a_step_is_the_published_loss_in_plain_torch(given: list[str]) -> None:
    task, (batch, _) = task_of(given, "hybrid.layers=[0,3,7]", *PUBLISHED)
    batch["cut"] += 2
    found = task.step(batch, 0)
    assert found.metrics["cut"] == 2
    student, teacher = task.core, task.teacher.module
    segments = batch["segments"]
    with torch.no_grad():
        embeds = teacher.embed(batch["input_ids"], batch["images"], batch["image_rows"])
        out: Any = teacher.decoder(
            inputs_embeds=embeds, attention_mask=(segments > 0).long(), output_hidden_states=True
        )
        states = out.hidden_states
        assert len(states) == 9
        layers = torch.tensor(0.0)
        for index in (0, 3, 7):
            body: Any = student.decoder.model
            own = body.layers[index](states[index], token_mask=segments > 0)
            own = own if isinstance(own, Tensor) else own[0]
            layers += torch.linalg.norm((body.norm(own) if index == 7 else own) - states[index + 1])
        p = out.logits.log_softmax(-1)
        q = student.head(student(batch)).log_softmax(-1)
        token = (p.exp() * (p - q)).sum() / 4
    assert found.terms["layer"].item() == pytest.approx(layers.item(), rel=1e-5)
    assert found.terms["token"].item() == pytest.approx(token.item(), rel=1e-4)
    assert found.loss.item() == pytest.approx((layers + token).item(), rel=1e-4)
    assert task.weight(batch) == 4
    found.loss.backward()
    with_gradient = {
        name for name, p in student.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0
    }
    trained = {name for name, p in student.named_parameters() if p.requires_grad}
    assert (
        with_gradient == trained == {name for name in trained if "projector" in name or ".self_attn." in name}
    )
    assert not any(p.grad is not None for p in teacher.parameters())


def test_recomputed_activations_give_the_same_gradients(given: list[str]) -> None:
    grads = []
    for more in ([], ["deepspeed.activation_checkpointing=true"]):
        task, (batch, _) = task_of(given, "hybrid.layers=[0,3,7]", *more)
        task.step(batch, 0).loss.backward()
        grads.append({name: p.grad for name, p in task.core.named_parameters() if p.grad is not None})
    assert any(layer.gradient_checkpointing for layer in task.body.layers)
    assert grads[0].keys() == grads[1].keys()
    for name, value in grads[0].items():
        torch.testing.assert_close(grads[1][name], value, rtol=1e-5, atol=1e-6)


def test_teacher_forcing_runs_the_replaced_layers_alone(given: list[str]) -> None:
    task, (batch, _) = task_of(given, "hybrid.preset=25")
    calls: list[int] = []
    for index, layer in enumerate(task.body.layers):
        layer.register_forward_pre_hook(lambda *_, index=index: calls.append(index))
    with torch.no_grad(), layers_seen(task.teacher.module.decoder.model, task.mamba) as seen:
        task.teacher.module(batch)
    teacher_forced(task.body, task.teacher.module.decoder.model, seen, mixer_masks(batch["segments"]))
    assert calls == task.mamba == [0, 4]


def test_padding_counts_only_where_it_is_asked_for(given: list[str]) -> None:
    task, (batch, _) = task_of(given, "hybrid.preset=50", "loss.logit_reduction=token_mean")
    assert task.weight(batch) == int((batch["segments"] > 0).sum()) < batch["segments"].numel()
    before = task.step(batch, 0)
    longer = dict(batch)
    for name, filler in (("input_ids", 0), ("targets", IGNORED), ("segments", 0)):
        longer[name] = torch.nn.functional.pad(batch[name], (0, 7), value=filler)
    for name, value in task.step(longer, 0).terms.items():
        assert value.item() == pytest.approx(before.terms[name].item(), rel=1e-4)
    counting, _ = task_of(given, "hybrid.preset=50", "loss.logit_reduction=token_mean", "loss.padding=true")
    assert counting.weight(longer) == longer["segments"].numel()


def test_packed_chats_are_those_that_stand_alone(given: list[str]) -> None:
    options = ("hybrid.preset=50", "loss.logit_reduction=token_mean", "loss.layer_reduction=mse")
    task, (batch, _) = task_of(given, *options)
    packing, (packed, _) = task_of(given, *options, "data.pack=true")
    assert len(packed["segments"]) < 4 == len(batch["segments"])
    assert packing.weight(packed) == task.weight(batch)
    for name, value in packing.step(packed, 0).terms.items():
        assert value.item() == pytest.approx(task.step(batch, 0).terms[name].item(), rel=1e-4)


def test_the_published_rate_by_samples(given: list[str]) -> None:
    config = ROOT / "projects/matvlm/configs/published.yaml"
    cfg = in_steps(load(MatvlmConfig, [str(config), "run_dir=r", "hybrid.preset=25"]), 665_000 // 64)
    assert (cfg.steps, cfg.optim.warmup_steps, cfg.optim.decay_steps) == (10_390, 1000, 1000)
    task = object.__new__(MatvlmTask)
    task.cfg = cfg
    for samples, factor in ((0, 0.001), (32_000, 0.501), (64_000, 1), (400_000, 1)):
        assert task.lr_factor(samples // 64, cfg) == pytest.approx(factor)
    for left, factor in ((1000, 1), (750, 0.5 + 0.5**1.5), (500, 0.5), (0, 0)):
        assert task.lr_factor(cfg.steps - left, cfg) == pytest.approx(factor)
    linear = load(MatvlmConfig, [*given, "optim.schedule=wsd", "optim.decay_steps=2", "decay=linear"])
    task.cfg = linear
    assert task.lr_factor(2, linear) == 0.5


def test_wrong_pairs_are_refused_with_their_field(given: list[str]) -> None:
    for more, message in (
        (["hybrid.preset=25", "hybrid.layers=[1]"], "hybrid.preset is 25; .*, or give hybrid.layers"),
        (["hybrid.preset=33"], "hybrid.preset is 33; write 12.5, 25 or 50"),
        (["hybrid.layers=[8]"], r"layers \[8\] are not among the decoder's, 0 to 7"),
        (
            ["hybrid.preset=25", "student.decoder_layers=[0,1,2,3]", *(
                one.replace("student.", "teacher.") for one in given if one.startswith("student.")
            )],
            "teacher: has 8 layers of width 24, the student 4 of 24",
        ),
        (["hybrid.preset=25", "deepspeed.zero_stage=3", "deepspeed.precision=bf16"], "deepspeed.zero_stage is 3"),
        (["hybrid.preset=25", "loss.layer=0", "loss.logits=0"], "loss has no term"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            task_of(given, *more)
