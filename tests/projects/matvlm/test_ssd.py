"""The SSD scan against its sequential definition in float64, and against transformers' Mamba-2."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from projects.matvlm import ssd as scan
from projects.matvlm.ssd import ssd, ssd_step

# heads of x, groups, heads of C, heads, p, n: attention with and without groups, Mamba-2, one group
SHAPES = [
    (3, 3, 3, 3, 4, 5),
    (2, 2, 6, 6, 3, 4),
    (4, 2, 2, 4, 5, 3),
    (4, 1, 1, 4, 2, 2),
    (1, 1, 3, 3, 80, 80),
]


def inputs(
    shape: tuple[int, ...], length: int, batch: int = 2, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    """x, dt, A, B, C, D and a state."""
    of_x, groups, of_c, heads, p, n = shape
    generator = torch.Generator().manual_seed(length)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)

    dt = torch.nn.functional.softplus(draw(batch, length, heads))
    A = -draw(heads).exp()
    x, B, C = draw(batch, length, of_x, p), draw(batch, length, groups, n), draw(batch, length, of_c, n)
    return [x, dt, A, B, C, draw(heads), draw(batch, heads, p, n)]


def sequential(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    state: Tensor,
    seq_idx: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition, a token at a time, with repeated heads."""
    x, B, C = (t.repeat_interleave(dt.shape[2] // t.shape[2], 2) for t in (x, B, C))
    outputs = []
    for t in range(x.shape[1]):
        if seq_idx is not None and t:
            state = state * (seq_idx[:, t] == seq_idx[:, t - 1])[:, None, None, None]
        state = torch.exp(dt[:, t] * A)[..., None, None] * state + torch.einsum(
            "bhp,bhn->bhpn", dt[:, t, :, None] * x[:, t], B[:, t]
        )
        outputs.append(torch.einsum("bhpn,bhn->bhp", state, C[:, t]) + D[:, None] * x[:, t])
    return torch.stack(outputs, 1), state


def close(found: Tensor, wanted: Tensor, tolerance: float = 1e-12) -> None:
    assert found.shape == wanted.shape
    assert (found - wanted).abs().max() <= tolerance * wanted.abs().max().clamp(min=1)


def unpadded(given: list[Tensor], row: int, places: Tensor) -> list[Tensor]:
    """One row's tokens at `places`, of inputs that lie along tokens."""
    x, dt, A, B, C, D, state = given
    return [*(t[row : row + 1, places] for t in (x, dt)), A, *(t[row : row + 1, places] for t in (B, C)), D,
            state[row : row + 1]]  # fmt: skip


@pytest.fixture
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two chunks of eight a block, so that a short sequence has several blocks and a rest."""
    monkeypatch.setitem(scan._BLOCK, "cpu", 2 * 2 * 6 * 64)


@pytest.mark.usefixtures("_small_blocks")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("length", "chunk"), [(1, 8), (5, 8), (16, 8), (53, 8), (53, 1), (53, 24), (53, 64)])
def test_outputs_state_and_gradients_are_the_definition_s(
    shape: tuple[int, ...], length: int, chunk: int
) -> None:
    given = [t.requires_grad_() for t in inputs(shape, length)]
    wanted, last = sequential(*given)
    weights = torch.randn(wanted.shape, dtype=torch.float64), torch.randn(last.shape, dtype=torch.float64)
    wanted_grads = torch.autograd.grad((wanted * weights[0]).sum() + (last * weights[1]).sum(), given)
    y, state = ssd(*given[:6], state=given[6], chunk=chunk)
    close(y, wanted)
    close(state, last)
    grads = torch.autograd.grad((y * weights[0]).sum() + (state * weights[1]).sum(), given)
    for found, right in zip(grads, wanted_grads, strict=True):
        close(found, right, 1e-11)
    with torch.no_grad():
        close(ssd(*given[:6], state=given[6], chunk=chunk)[0], wanted)


def test_gradients_by_differences() -> None:
    x, dt, A, B, C, D, state = (t.requires_grad_() for t in inputs((1, 1, 2, 2, 2, 3), 7, batch=1))
    ids = torch.tensor([[0, 0, 0, 1, 1, 2, 2]])
    for seq_idx in (None, ids):
        assert torch.autograd.gradcheck(
            lambda *given, ids=seq_idx: ssd(*given[:6], state=given[6], chunk=3, seq_idx=ids),
            (x, dt, A, B, C, D, state),
        )


def test_without_decay_it_is_attention_without_softmax() -> None:
    V, _, _, K, Q, _, _ = inputs((2, 2, 6, 6, 4, 4), 19)
    y, _ = ssd(V, torch.ones(2, 19, 6).double(), torch.zeros(6).double(), K, Q, chunk=8)
    V, K = (t.repeat_interleave(3, 2) for t in (V, K))
    close(y, torch.einsum("blhn,bshn->bhls", Q, K).tril().matmul(V.transpose(1, 2)).transpose(1, 2))


@pytest.mark.usefixtures("_small_blocks")
@pytest.mark.parametrize("shape", SHAPES[:3])
def test_a_document_in_a_row_is_as_alone_and_the_first_goes_on_from_the_state(shape: tuple[int, ...]) -> None:
    lengths = ([3, 1, 20, 8, 21], [30, 2, 5, 15, 1])
    given = inputs(shape, 53)
    ids = torch.stack([torch.repeat_interleave(torch.arange(5), torch.tensor(row)) for row in lengths])
    packed, last = ssd(*given[:6], state=given[6], seq_idx=ids, chunk=8)
    wanted, wanted_last = sequential(*given, seq_idx=ids)
    close(packed, wanted)
    close(last, wanted_last)
    for row in range(2):
        for document in range(5):
            alone = unpadded(given, row, ids[row] == document)
            y, state = ssd(*alone[:6], state=alone[6] if document == 0 else None, chunk=8)
            close(packed[row : row + 1, ids[row] == document], y)
        close(last[row : row + 1], state)


def test_padding_anywhere_changes_no_output_and_no_state() -> None:
    given = inputs(SHAPES[1], 40)
    keep = torch.rand(2, 40, generator=torch.Generator().manual_seed(0)) < 0.6
    x, dt, A, B, C, D, state = given
    y, last = ssd(x, dt * keep[..., None], A, B, C, D, state=state, chunk=8)
    for row in range(2):
        alone = unpadded(given, row, keep[row])
        wanted, wanted_last = sequential(*alone)
        close(y[row : row + 1, keep[row]], wanted)
        close(last[row : row + 1], wanted_last)


def test_split_anywhere_and_token_by_token_it_is_the_whole() -> None:
    x, dt, A, B, C, D, state = inputs(SHAPES[1], 21)
    whole, last = ssd(x, dt, A, B, C, D, state=state, chunk=8)
    for cuts in ((1, 20), (8, 13), (2, 3, 16), (20, 1)):
        kept, parts = state, []
        for piece in zip(*(t.split(cuts, 1) for t in (x, dt, B, C)), strict=True):
            y, kept = ssd(piece[0], piece[1], A, piece[2], piece[3], D, state=kept, chunk=8)
            parts.append(y)
        close(torch.cat(parts, 1), whole)
        close(kept, last)
    kept = state.clone()
    where = kept.data_ptr()
    steps = [ssd_step(kept, x[:, t], dt[:, t], A, B[:, t], C[:, t], D) for t in range(21)]
    close(torch.stack(steps, 1), whole)
    close(kept, last)
    assert kept.data_ptr() == where


@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[2]])
def test_it_is_transformers_mamba_2(shape: tuple[int, ...]) -> None:
    from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan

    x, dt, A, B, C, D, state = inputs(shape, 37, dtype=torch.float32)
    wanted, last = mamba2_chunk_scan(x, dt, A, B, C, 16, D=D, initial_states=state, return_final_states=True)
    y, kept = ssd(x, dt, A, B, C, D, state=state, chunk=16)
    close(y, wanted, 2e-6)
    close(kept, last, 2e-6)


@pytest.mark.parametrize("step", [0.05, 0.5, 5.0, 200.0])
def test_float32_is_exact_and_its_gradients_finite_at_any_decay(step: float) -> None:
    """Sums down to -51,200 in one chunk; exponentials above the diagonal would overflow."""
    exact = inputs(SHAPES[1], 256)
    exact[1], exact[2] = torch.ones_like(exact[1]), -torch.full_like(exact[2], step)
    wanted, _ = sequential(*exact)
    given = [t.float().requires_grad_() for t in exact]
    y, state = ssd(*given[:6], state=given[6], chunk=256)
    close(y.double(), wanted, 1e-6)
    (y.square().sum() + state.sum()).backward()
    assert all(t.grad is not None and t.grad.isfinite().all() for t in given)


def test_half_precision_inputs_are_computed_in_float32_whatever_autocast_says() -> None:
    given = inputs(SHAPES[1], 70)
    low = [t.bfloat16() if i in (0, 3, 4) else t.float() for i, t in enumerate(given)]
    wanted, last = sequential(*(t.double() for t in low))
    with torch.autocast("cpu", torch.bfloat16):
        y, state = ssd(*low[:6], state=low[6])
        step = ssd_step(low[6].clone(), *(low[i][:, 0] if i in (0, 1, 3, 4) else low[i] for i in range(6)))
    assert y.dtype == step.dtype == torch.bfloat16 and state.dtype == torch.float32
    close(y.double(), wanted, 4e-3)
    close(step.double(), wanted[:, 0], 4e-3)
    close(state.double(), last, 1e-5)


def test_it_compiles_as_one_graph() -> None:
    x, dt, A, B, C, D, state = inputs(SHAPES[1], 40, dtype=torch.float32)
    compiled = torch.compile(ssd, backend="eager", fullgraph=True)
    close(
        compiled(x.requires_grad_(), dt, A, B, C, D, state=state, chunk=16)[0],
        ssd(x, dt, A, B, C, D, state=state)[0],
        1e-6,
    )


def test_heads_that_do_not_fit_are_refused() -> None:
    x, dt, A, B, C, D, _ = inputs(SHAPES[1], 4)
    with pytest.raises(ValueError, match="3 heads of x and 6 of C; 2 groups, 6 heads"):
        ssd(x[:, :, [0, 0, 0]], dt, A, B, C, D)
