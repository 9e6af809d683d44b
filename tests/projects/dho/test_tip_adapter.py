"""Tip-Adapter-F against NumPy loops: logits, keys, search; and files of the released layout."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from projects.dho import tip_adapter
from projects.dho.tip_adapter import TipAdapter
from vlmkd.errors import UserError

N, C, D = 8, 4, 6


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    """Random unit vectors."""
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def adapter(alpha: float = 1.5, beta: float = 2.5) -> TipAdapter:
    """Eight cached images of four classes."""
    values = F.one_hot(torch.arange(N) % C, C)
    return TipAdapter(unit(N, D), values, unit(C, D, seed=1), alpha=alpha, beta=beta)


def by_hand(tip: TipAdapter, embeds: torch.Tensor, alpha: float, beta: float) -> np.ndarray:
    """The formula of the teacher, element by element in float64."""
    f, k = embeds.double().numpy(), tip.keys.detach().double().numpy()
    w = tip.class_vectors.double().numpy()
    logits = np.zeros((len(f), C))
    for row in range(len(f)):
        for label in range(C):
            logits[row, label] = 100 * f[row] @ w[label]
            for cached in range(N):
                if cached % C == label:
                    logits[row, label] += alpha * np.exp(-beta * (1 - f[row] @ k[cached]))
    return logits


def test_logits() -> None:
    tip, embeds = adapter(), unit(5, D, seed=2)
    np.testing.assert_allclose(
        tip(embeds).detach().numpy(), by_hand(tip, embeds, 1.5, 2.5), rtol=2e-5, atol=1e-4
    )


def test_keys_are_the_mean_of_raw_features() -> None:
    features = torch.randn(3, N, D, generator=torch.Generator().manual_seed(0)) * torch.tensor(
        [1.0, 5.0, 0.1]
    ).view(3, 1, 1)
    keys = tip_adapter.cache_keys(features)
    mean = features.double().numpy().mean(0)
    np.testing.assert_allclose(keys.numpy(), mean / np.linalg.norm(mean, axis=1, keepdims=True), rtol=1e-5)
    assert not torch.allclose(keys, tip_adapter.cache_keys(F.normalize(features, dim=-1)), atol=1e-2)


def test_search_is_the_double_loop_with_the_first_of_equals() -> None:
    tip, embeds = adapter(), unit(30, D, seed=3)
    labels = torch.randint(0, C, (30,), generator=torch.Generator().manual_seed(4))
    betas, alphas = tip_adapter.search_grid(7, 3)
    assert (len(betas), len(alphas)) == (200, 20)
    assert betas[0] == alphas[0] == 0.1
    assert betas[-1] == pytest.approx(7 - 6.9 / 200) and alphas[-1] == pytest.approx(3 - 2.9 / 20)
    tip.scale, tip.class_vectors = 3.0, tip.class_vectors  # so that the cache decides
    best, expected = 0.0, (0.0, 0.0)
    few = betas[::40]
    for beta in few:
        for alpha in alphas:
            with torch.no_grad():
                logits = tip.zero_shot(embeds) + alpha * tip.cache_logits(embeds, beta)
            accuracy = float((logits.argmax(1) == labels).double().mean())
            if accuracy > best:
                best, expected = accuracy, (beta, alpha)
    assert tip_adapter.search(tip, embeds, labels, few, alphas) == (*expected, pytest.approx(best))


def test_fitting_learns_keys_and_keeps_the_best_epoch_on_validation_images() -> None:
    labels = torch.arange(N) % C
    centres = torch.eye(C, D)
    views = F.normalize(
        centres[labels] + 0.3 * torch.randn(5, N, D, generator=torch.Generator().manual_seed(1)), dim=-1
    )
    validation = F.normalize(
        centres.repeat(5, 1) + 0.3 * torch.randn(20, D, generator=torch.Generator().manual_seed(2)), dim=-1
    )
    truth = torch.arange(C).repeat(5)
    tip = TipAdapter(unit(N, D, seed=8), F.one_hot(labels, C), torch.zeros(C, D), alpha=3.0)
    before = tip_adapter.accuracy(tip, validation, truth)
    epoch, score = tip_adapter.fit(tip, views, labels, (validation, truth), epochs=40, lr=0.05, batch_size=3)
    assert score > before + 0.3 and score == tip_adapter.accuracy(tip, validation, truth)
    assert 1 <= epoch <= 40
    again = TipAdapter(unit(N, D, seed=8), F.one_hot(labels, C), torch.zeros(C, D), alpha=3.0)
    assert tip_adapter.fit(again, views, labels, (validation, truth), epochs=40, lr=0.05, batch_size=3) == (
        epoch,
        score,
    )
    assert torch.equal(again.keys, tip.keys)


def test_the_schedule_is_a_cosine_over_all_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float] = []
    original = torch.optim.AdamW.step

    def spy(self: torch.optim.AdamW, *args: object) -> object:
        seen.append(self.param_groups[0]["lr"])
        assert self.param_groups[0]["eps"] == 1e-4
        return original(self, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    labels = torch.arange(N) % C
    tip_adapter.fit(adapter(), unit(1, N, D), labels, (unit(4, D), torch.arange(4)), epochs=2, batch_size=3)
    expected = [1e-3 * (1 + np.cos(np.pi * t / 6)) / 2 for t in range(6)]
    assert seen == pytest.approx(expected)


def test_files_have_the_released_layout_and_come_back_equal(tmp_path: Path) -> None:
    tip, file = adapter(), tmp_path / "best_tip_adapter_F_2shots_round0.pt"
    tip_adapter.save(tip, file)
    content = torch.load(file, weights_only=True)
    shapes = {name: list(value.shape) for name, value in content.items() if isinstance(value, torch.Tensor)}
    assert shapes == {
        "adapter_weight": [N, D],
        "cache_keys": [D, N],
        "cache_values": [N, C],
        "clip_weights": [D, C],
    }
    assert (content["best_alpha"], content["best_beta"]) == (1.5, 2.5)
    back, embeds = tip_adapter.load(file), unit(5, D, seed=2)
    assert torch.equal(back(embeds), tip(embeds))


def test_a_released_file_in_half_precision_with_numpy_scalars_is_read(tmp_path: Path) -> None:
    tip, file = adapter(), tmp_path / "released.pt"
    content = {
        "adapter_weight": torch.nn.Parameter(tip.keys.detach().half()),
        "cache_keys": unit(D, N).half(),  # the keys before fine-tuning
        "cache_values": tip.values.half(),
        "clip_weights": tip.class_vectors.T.half(),
        "best_alpha": np.float64(1.5),
        "best_beta": np.float32(2.5),
    }
    torch.save(content, file)
    back, embeds = tip_adapter.load(file), unit(5, D, seed=2)
    torch.testing.assert_close(back(embeds), tip(embeds), rtol=1e-2, atol=0.2)
    assert back.values.dtype == torch.float32


@pytest.mark.parametrize("change", [{"clip_weights": torch.zeros(D, C + 1)}, {"best_beta": None}])
def test_a_wrong_file_is_refused(tmp_path: Path, change: dict[str, object]) -> None:
    file = tmp_path / "wrong.pt"
    tip_adapter.save(adapter(), file)
    content = {**torch.load(file, weights_only=True), **change}
    torch.save({name: value for name, value in content.items() if value is not None}, file)
    with pytest.raises(UserError, match="shapes do not fit|has no best_beta"):
        tip_adapter.load(file)
