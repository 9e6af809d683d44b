"""One step of each task: what is computed, what moves, and what does not."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from projects.tinyclip.build import distill_job, mask_job
from projects.tinyclip.config import DistillConfig, LossConfig, MaskConfig
from projects.tinyclip.objective import StudentEmbeds, objective
from tests.projects.tinyclip.tiny_runs import Runs
from vlmkd import config
from vlmkd.losses.affinity import PairEmbeds
from vlmkd.models.clip import load_clip
from vlmkd.train.trainer import Job

ALL_TERMS = ["loss.affinity=0.5", "loss.contrastive=0.25", "loss.feature=20", "loss.interactive=2"]


def _job(runs: Runs, *overrides: str) -> Job:
    path = runs.config("c")
    return distill_job(config.load(DistillConfig, [str(path), f"run_dir={runs.folder / 'run'}", *overrides]))


def _unit(rows: int, width: int, seed: int) -> torch.Tensor:
    values = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.nn.functional.normalize(values, dim=-1)


def test_objective_equals_the_formulas_written_out() -> None:
    images, texts, teacher_images, teacher_texts = (_unit(5, 7, seed) for seed in range(4))
    student = StudentEmbeds(images, texts, 50.0, 0.0, projected=[(images, texts)], interactive_scale=10.0)
    teacher = PairEmbeds(teacher_images, teacher_texts, 30.0)
    loss = LossConfig(affinity=1.0, contrastive=0.5, feature=2000.0, interactive=1.0)
    terms, weights, metrics = objective(student, [teacher], loss)

    def softmax(x: np.ndarray, axis: int) -> np.ndarray:
        e = np.exp(x - x.max(axis, keepdims=True))
        return e / e.sum(axis, keepdims=True)

    s = 50.0 * images.numpy() @ texts.numpy().T
    t = 30.0 * teacher_images.numpy() @ teacher_texts.numpy().T
    affinity = -sum((softmax(t, axis) * np.log(softmax(s, axis))).sum() for axis in (0, 1)) / 5 / 2
    entropy = -sum((softmax(t, axis) * np.log(softmax(t, axis))).sum() for axis in (0, 1)) / 5 / 2
    clip = -sum(np.log(np.diag(softmax(s, axis))).mean() for axis in (0, 1)) / 2
    feature = ((images - teacher_images) ** 2).mean() + ((texts - teacher_texts) ** 2).mean()
    cross = 10.0 * images.numpy() @ teacher_texts.numpy().T, 10.0 * texts.numpy() @ teacher_images.numpy().T
    interactive = -sum(np.log(np.diag(softmax(x, 1))).mean() for x in cross) / 2
    expected = {
        "affinity": affinity,
        "contrastive": clip,
        "feature": float(feature),
        "interactive": interactive,
    }
    assert {name: float(value) for name, value in terms.items()} == pytest.approx(expected, rel=1e-9)
    assert weights == {"affinity": 1.0, "contrastive": 0.5, "feature": 2000.0, "interactive": 1.0}
    assert float(metrics["affinity_kl"]) == pytest.approx(affinity - entropy, rel=1e-6)


def test_a_term_of_weight_zero_is_not_computed() -> None:
    student = StudentEmbeds(_unit(3, 4, 0), _unit(3, 4, 1), 50.0, 0.0)
    terms, _, metrics = objective(student, [], LossConfig(affinity=0.0, contrastive=1.0))
    assert list(terms) == ["contrastive"] and metrics == {}


def test_terms_sum_to_the_loss_and_only_the_student_moves(runs: Runs) -> None:
    job = _job(runs, *ALL_TERMS, "logit_scale.mode=learned")
    task, batch = job.task, next(iter(job.loader))
    before = [p.clone() for p in task.teachers[0].parameters()]
    output = task.step(batch, 0)
    output.loss.backward()
    assert set(output.terms) == {"affinity", "contrastive", "feature", "interactive"}
    assert float(sum(output.terms.values())) == pytest.approx(float(output.loss.detach()), rel=1e-6)
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in task.student.parameters())
    teacher = list(task.teachers[0].parameters())
    assert all(not p.requires_grad and p.grad is None for p in teacher)
    assert all(torch.equal(a, b) for a, b in zip(before, teacher, strict=True))


def test_a_fixed_scale_is_pinned_before_step_zero_and_not_trained(runs: Runs) -> None:
    job = _job(runs)
    task = job.task
    assert float(task.core.encoder.logit_scale.exp()) == pytest.approx(50.0)
    assert not task.core.encoder.logit_scale.requires_grad and task.bounds() == []
    output = task.step(next(iter(job.loader)), 0)
    assert float(output.metrics["logit_scale"]) == 50.0
    legacy = _job(runs, "logit_scale.legacy_first_step=true")
    batch = next(iter(legacy.loader))
    assert float(legacy.task.step(batch, 0).metrics["logit_scale"]) == pytest.approx(1 / 0.07)
    assert float(legacy.task.step(batch, 1).metrics["logit_scale"]) == 50.0


def test_a_learned_scale_is_clamped_to_clips_range(runs: Runs) -> None:
    task = _job(runs, "logit_scale.mode=learned").task
    ((parameter, low, high),) = task.bounds()
    assert parameter is task.core.encoder.logit_scale and parameter.requires_grad
    assert (low, high) == (0.0, pytest.approx(math.log(100)))


def test_inherited_weights_are_the_sources_leading_slices(runs: Runs) -> None:
    from vlmkd.models.clip import load_clip

    weights = runs.folder / "teacher.pt"
    source = load_clip(str(runs.folder / "teacher.json"), seed=3).module.state_dict()
    torch.save(source, weights)
    sources = [
        f"inherit.{tower}_from.{field}={value}"
        for tower in ("image", "text")
        for field, value in (("model", runs.folder / "teacher.json"), ("pretrained", weights))
    ]
    state = _job(runs, *sources).task.core.encoder.model.state_dict()
    assert torch.equal(state["visual.conv1.weight"], source["visual.conv1.weight"][:32])
    for mine, theirs in ((0, 0), (1, 2)):  # four layers into two: floor(4 / 2) apart
        name = "transformer.resblocks.{}.mlp.c_fc.weight"
        assert torch.equal(state[name.format(mine)], source[name.format(theirs)][:128, :32])


def test_inherited_units_are_those_that_the_config_lists(runs: Runs) -> None:
    teacher = runs.folder / "teacher.json"
    odd = [47, 2, 46, *range(9, 38)]
    weights = runs.folder / "teacher.pt"
    source = load_clip(str(teacher), seed=3).module.state_dict()
    torch.save(source, weights)
    job = _job(
        runs, f"inherit.image_from.model={teacher}", f"inherit.image_from.pretrained={weights}",
        "inherit.width=list", f"inherit.image_units.hidden={odd}", "inherit.image_units.heads=[2,0]",
    )  # fmt: skip
    found = job.task.core.encoder.model.state_dict()
    assert torch.equal(found["visual.class_embedding"], source["visual.class_embedding"][odd])
    name = "visual.transformer.resblocks.0.attn.in_proj_weight"
    heads = source[name].view(3, 3, 16, 48)[:, [2, 0]][..., odd]
    assert torch.equal(found[name], heads.reshape(96, 32))


def test_the_same_batch_draws_the_same_masks_and_another_batch_others(runs: Runs) -> None:
    cfg = config.load(
        MaskConfig,
        [
            str(runs.config("m", masks={"target_sparsity": 0.5, "sparsity_warmup_steps": 1})),
            f"run_dir={runs.folder / 'run'}",
            f"student.model={runs.folder}/teacher.json",
        ],
    )
    job = mask_job(cfg)
    for alpha in job.task.masked.image_masks.log_alphas():
        alpha.data.zero_()
    batches = iter(job.loader)
    first, second = next(batches), next(batches)
    again = {**first, "positions": second["positions"]}
    one, same, other = (job.task._forward(batch, 0)[0].image_embeds for batch in (first, first, again))
    assert torch.equal(one, same) and not torch.allclose(one, other, atol=1e-3)
    output = job.task.step(first, 5)
    assert {"affinity", "sparsity"} == set(output.terms) and "sparsity" in output.metrics
    output.loss.backward()
    groups = {group["name"]: group for group in job.task.param_groups(cfg.optim)}
    assert groups["masks"]["lr"] == 0.02 and groups["masks"]["schedule"] is False
    everything = [id(p) for group in job.task.param_groups(cfg.optim) for p in group["params"]]
    trainable = [id(p) for p in job.task.student.parameters() if p.requires_grad]
    assert sorted(everything) == sorted(trainable)
