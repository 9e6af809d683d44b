"""The distillation terms on tensors made by hand, against dense formulas."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from projects.matvlm.objective import layer_loss, logit_loss
from vlmkd.losses.tokens import IGNORED, TeacherStates

THREES = (torch.full((1, 2, 2), 5.0), torch.full((1, 2, 2), 2.0))  # an error of 3 at four places: norm 6
ONES = (torch.zeros(1, 2, 2), torch.ones(1, 2, 2))  # norm 2


@pytest.mark.parametrize(
    ("reduction", "value"), [("frob", 6 + 2), ("mse", 9 + 1), ("rel_mse", 36 / 16 + 4 / 4)]
)
def test_layers_add_up(reduction: Any, value: float) -> None:
    assert layer_loss([THREES, ONES], reduction).item() == pytest.approx(value)
    counted = torch.tensor([[True, False]])
    half = {"frob": math.sqrt(18) + math.sqrt(2)}.get(reduction, value)
    assert layer_loss([THREES, ONES], reduction, counted).item() == pytest.approx(half)


def test_the_published_norm_s_gradient_has_norm_one_a_layer_and_is_of_float32() -> None:
    for error in (1e-3, 1e3):
        found = (error * torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))).requires_grad_()
        (grad,) = torch.autograd.grad(layer_loss([(found, torch.zeros(2, 3, 4))], "frob"), found)
        assert grad.norm().item() == pytest.approx(1, rel=1e-5)
    half = layer_loss([(torch.ones(1, 300, 4).bfloat16(), torch.zeros(1, 300, 4).bfloat16())], "frob")
    assert half.dtype == torch.float32 and half.item() == pytest.approx(math.sqrt(1200), rel=1e-6)


def models(rows: int = 2, length: int = 6) -> dict[str, Any]:
    """Hidden states and heads of two models in float64, with targets for a part of the positions."""
    generator = torch.Generator().manual_seed(rows)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    targets = torch.randint(0, 11, (rows, length), generator=generator)
    targets[:, : length // 2] = IGNORED
    teacher = TeacherStates(drawn(rows, length, 5), drawn(11, 5), drawn(11))
    return {
        "hidden": drawn(rows, length, 4), "head": drawn(11, 4), "bias": drawn(11), "teacher": teacher, "targets": targets,
        "samples": rows,
    }  # fmt: skip


def both(given: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Dense log-probabilities [R, T, V] of student and teacher."""
    teacher = given["teacher"]
    own = given["hidden"] @ given["head"].T + given["bias"]
    return own.log_softmax(-1), (teacher.hidden @ teacher.head.T + teacher.bias).log_softmax(-1)


def kl(first: Tensor, second: Tensor) -> Tensor:
    return (first.exp() * (first - second)).sum(-1)


def test_the_three_reductions_are_what_they_say() -> None:
    given = models()
    own, wanted = both(given)
    each = kl(wanted, own)
    counted = torch.ones(2, 6, dtype=torch.bool)
    counted[1, 4:] = False
    learned = given["targets"] != IGNORED
    for reduction, value in (
        ("batch_sum", each[counted].sum() / 2),
        ("token_mean", each[counted].mean()),
        ("answer_mean", each[learned].mean()),
    ):
        found = logit_loss(**given, reduction=reduction, counted=counted, chunk=5)
        assert found.total.item() == pytest.approx(value.item(), rel=1e-10)
    everywhere = logit_loss(**given, reduction="batch_sum")
    assert everywhere.total.item() == pytest.approx(each.sum().item() / 2, rel=1e-10)
    assert everywhere.divergence.item() == pytest.approx(each.mean().item(), rel=1e-10)
    same = (own.argmax(-1) == wanted.argmax(-1)).double().mean()
    assert everywhere.agreement.item() == pytest.approx(same.item())


def test_the_published_divergence_grows_with_the_length_and_the_others_do_not() -> None:
    given = models()
    double = dict(given)
    for name in ("hidden", "targets"):
        double[name] = torch.cat([given[name]] * 2, 1)
    teacher = given["teacher"]
    double["teacher"] = teacher._replace(hidden=torch.cat([teacher.hidden] * 2, 1))
    for reduction, factor in (("batch_sum", 2), ("token_mean", 1), ("answer_mean", 1)):
        once, twice = (
            logit_loss(**one, reduction=reduction).total.item()  # type: ignore[arg-type]
            for one in (given, double)
        )
        assert twice == pytest.approx(factor * once, rel=1e-10)


def test_jsd_is_a_true_one_and_at_most_ln_2_a_token() -> None:
    given = models(3)
    own, wanted = both(given)
    mean = torch.logaddexp(own, wanted) - math.log(2)
    value = ((kl(own, mean) + kl(wanted, mean)) / 2).mean().item()
    found = logit_loss(**given, reduction="token_mean", divergence="jsd").total.item()
    assert found == pytest.approx(value, rel=1e-10)
    apart = {**given, "hidden": 1e4 * given["hidden"]}
    assert value < logit_loss(**apart, reduction="token_mean", divergence="jsd").total.item() <= math.log(2)


def test_cross_entropy_and_temperature_have_their_weights_and_gradients_are_those_of_the_dense_form() -> None:
    given = models()
    learned = given["targets"] != IGNORED

    def dense(hidden: Tensor) -> Tensor:
        one = {**given, "hidden": hidden}
        own, _ = both(one)
        teacher = given["teacher"]
        sharp = ((hidden @ given["head"].T + given["bias"]) / 2).log_softmax(-1)
        wanted = ((teacher.hidden @ teacher.head.T + teacher.bias) / 2).log_softmax(-1)
        ce = -own[learned].gather(1, given["targets"][learned][:, None]).mean()
        return 3 * 4 * kl(wanted, sharp).sum() / 2 + 0.7 * ce

    hidden = given["hidden"].clone().requires_grad_()
    found = logit_loss(
        **{**given, "hidden": hidden}, reduction="batch_sum", temperature=2.0, weight=3.0, ce_weight=0.7
    )
    (grad,) = torch.autograd.grad(found.total, hidden)
    wanted = given["hidden"].clone().requires_grad_()
    value = dense(wanted)
    (expected,) = torch.autograd.grad(value, wanted)
    assert found.total.item() == pytest.approx(value.item(), rel=1e-10)
    torch.testing.assert_close(grad, expected, rtol=1e-9, atol=1e-12)
    assert found.ce.item() == pytest.approx(
        -both(given)[0][learned].gather(1, given["targets"][learned][:, None]).mean().item(), rel=1e-10
    )
