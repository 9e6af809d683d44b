"""The mixer: padding, packing, split prefill, decoding, caches; transformers' mixer as an independent reference."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from projects.matvlm import mixer as mixers
from projects.matvlm.cache import MambaLayer, mamba_layer
from projects.matvlm.mixer import Mamba2Mixer, MixerShape
from vlmkd.errors import UserError

SHAPE = MixerShape(width=20, heads=6, kv_heads=2, head_dim=4)


def made(shape: MixerShape = SHAPE, dtype: torch.dtype = torch.float64, **options: Any) -> Mamba2Mixer:
    mixer = Mamba2Mixer(shape, 0, chunk=8, dtype=dtype, **options)
    mixer.start(torch.Generator().manual_seed(0))
    return mixer


def tokens(length: int, batch: int = 3, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(length)
    return 3 * torch.randn(batch, length, SHAPE.width, generator=generator, dtype=dtype)


def states(cache: DynamicCache) -> tuple[Tensor, Tensor]:
    found = mamba_layer(cache, 0).read()
    assert found is not None
    return found


def close(found: Tensor, wanted: Tensor, tolerance: float = 1e-12) -> None:
    assert found.shape == wanted.shape and wanted.abs().max() > 0.01
    assert (found - wanted).abs().max() <= tolerance * wanted.abs().max().clamp(min=1)


@pytest.mark.parametrize("bias", [False, True])
def test_it_is_transformers_mixer_with_repeated_rows(bias: bool) -> None:
    from transformers import Mamba2Config
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer as Theirs

    ours = made(MixerShape(width=24, heads=6, kv_heads=2, head_dim=4, bias=bias), torch.float32)
    theirs = Theirs(
        Mamba2Config(
            num_heads=6, n_groups=6, head_dim=4, state_size=4, expand=1, hidden_size=24, chunk_size=16, use_bias=bias,
            layer_norm_epsilon=1e-5, num_hidden_layers=1,
        ), 0,
    ).eval()  # fmt: skip

    def repeated(rows: Tensor) -> Tensor:
        return rows.unflatten(0, (2, 4)).repeat_interleave(3, 0).flatten(0, 1)

    weights = dict(ours.state_dict())
    for name in [name for name in weights if name.startswith("in_proj")]:
        z, x, B, C, dt = weights[name].split(ours.shape.rows)
        weights[name] = torch.cat([z, repeated(x), repeated(B), C, dt])
    for name in ("conv1d.weight", "conv1d.bias"):
        x, B, C = weights[name].split(ours.shape.rows[1:4])
        weights[name] = torch.cat([repeated(x), repeated(B), C])
    theirs.load_state_dict(weights)
    given = torch.randn(2, 24, 24)
    with torch.no_grad():
        close(ours(given)[0], theirs(given), 2e-6)
        cache, their_cache = DynamicCache(), DynamicCache(config=theirs_config(theirs))
        close(ours(given[:, :20], cache=cache)[0], theirs(given[:, :20], cache=their_cache), 2e-6)
        for t in range(20, 24):
            close(
                ours(given[:, t : t + 1], cache=cache)[0],
                theirs(given[:, t : t + 1], cache=their_cache),
                2e-6,
            )


def theirs_config(_: object) -> Any:
    from transformers import Mamba2Config

    return Mamba2Config(num_heads=6, head_dim=4, hidden_size=24, expand=1, num_hidden_layers=1)


@pytest.mark.parametrize("side", ["left", "right", "holes"])
@pytest.mark.parametrize("bias", [False, True])
def test_padding_changes_neither_outputs_nor_state(side: str, bias: bool) -> None:
    mixer = made(MixerShape(width=20, heads=6, kv_heads=2, head_dim=4, bias=bias))
    given, length = tokens(30), 30
    places = torch.arange(length)
    counts = torch.tensor([[30], [17], [2]])
    mask = {"left": places >= length - counts, "right": places < counts}.get(side)
    if mask is None:
        mask = torch.rand(3, length, generator=torch.Generator().manual_seed(0)) < 0.5
    more = tokens(6)
    with torch.no_grad():
        cache = DynamicCache()
        first, _ = mixer(given, token_mask=mask, cache=cache)
        window, state = (t.clone() for t in states(cache))
        second, _ = mixer(
            more, token_mask=mask[:, -6:] | (places[:6] > 3), cache=cache
        )  # padding in later pieces too
        for row in range(3):
            alone = DynamicCache()
            wanted, _ = mixer(given[row : row + 1, mask[row]], cache=alone)
            close(first[row : row + 1, mask[row]], wanted)
            close(window[row : row + 1], states(alone)[0])
            close(state[row : row + 1], states(alone)[1])
            kept = mask[row, -6:] | (places[:6] > 3)
            wanted, _ = mixer(more[row : row + 1, kept], cache=alone)
            close(second[row : row + 1, kept], wanted)
            close(states(cache)[1][row : row + 1], states(alone)[1])


def test_padding_has_no_gradient() -> None:
    given = tokens(12).requires_grad_()
    mask = torch.arange(12) < torch.tensor([[12], [5], [9]])
    out, _ = made()(given, token_mask=mask)
    (out * mask[..., None]).square().sum().backward()
    assert given.grad is not None and (given.grad.abs().sum(2) > 0).equal(mask)


def test_its_gradients_by_differences() -> None:
    mixer = made(MixerShape(width=4, heads=2, kv_heads=1, head_dim=2, bias=True))
    names = [name for name, _ in mixer.named_parameters()]
    assert {"A_log", "dt_bias", "D", "conv1d.weight", "norm.weight"} <= set(names)
    given = torch.randn(1, 6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def outputs(given: Tensor, *values: Tensor) -> Tensor:
        found: Tensor = torch.func.functional_call(mixer, dict(zip(names, values, strict=True)), (given,))[0]
        return found

    values = [p.detach().clone().requires_grad_() for p in mixer.parameters()]
    assert torch.autograd.gradcheck(outputs, (given.requires_grad_(), *values))


def test_documents_in_a_row_are_as_alone_with_padding_between_them_too() -> None:
    mixer, given = made(), tokens(30)
    ids = torch.stack([torch.repeat_interleave(torch.arange(4), torch.tensor(row)) for row in
                       ([1, 2, 20, 7], [9, 9, 9, 3], [27, 1, 1, 1])])  # fmt: skip
    for mask in (None, torch.rand(3, 30, generator=torch.Generator().manual_seed(1)) < 0.8):
        packed, _ = mixer(given, seq_idx=ids, token_mask=mask)
        for row in range(3):
            for document in range(4):
                places = (ids[row] == document) & (True if mask is None else mask[row])
                if places.any():
                    close(packed[row : row + 1, places], mixer(given[row : row + 1, places])[0])


@pytest.mark.parametrize("cuts", [(15, 6), (1, 1, 1, 18), (2, 19), (20, 1), (1,) * 21])
def test_a_split_prefill_and_decoding_are_the_whole(cuts: tuple[int, ...]) -> None:
    mixer, given = made(), tokens(21)
    with torch.no_grad():
        uncut, cut = DynamicCache(), DynamicCache()
        whole, _ = mixer(given, cache=uncut)
        close(whole, mixer(given)[0])
        close(torch.cat([mixer(piece, cache=cut)[0] for piece in given.split(cuts, 1)], 1), whole)
    for one, other in zip(states(cut), states(uncut), strict=True):
        close(one, other)


def test_decoding_changes_the_state_where_it_is() -> None:
    mixer, given, cache = made(dtype=torch.float32), tokens(6, dtype=torch.float32), DynamicCache()
    with torch.no_grad():
        mixer(given[:, :5], past_key_values=cache)
        where = [t.data_ptr() for t in states(cache)]
        mixer(given[:, 5:], past_key_values=cache)
    assert [t.data_ptr() for t in states(cache)] == where
    assert [tuple(t.shape) for t in states(cache)] == [(3, 3, 40), (3, 6, 4, 4)]


def test_the_cache_takes_what_beams_and_batches_ask() -> None:
    mixer, given, cache = made(), tokens(7), DynamicCache()
    with torch.no_grad():
        mixer(given[:, :6], cache=cache)
        cache.reorder_cache(torch.tensor([2, 0, 1]))
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([0, 2, 5]))
        rows = [2, 0, 1]
        close(mixer(given[rows, 6:], cache=cache)[0], mixer(given[rows])[0][:, 6:])
        with pytest.raises(NotImplementedError, match="cannot be cropped"):
            cache.layers[0].crop(-1)
        assert not cache.is_croppable
        cache.reset()
        assert mamba_layer(cache, 0).read() is None
        close(mixer(given, cache=cache)[0], mixer(given)[0])
    stock = DynamicCache(config=theirs_config(None))
    assert isinstance(mamba_layer(stock, 0), MambaLayer) and len(stock.layers) == 1


def test_in_half_precision_a_and_the_state_stay_exact() -> None:
    mixer = made(dtype=torch.float32)
    exact = {name: getattr(mixer, name).detach().clone() for name in mixers.FLOAT32}
    given, wanted = tokens(40, dtype=torch.float32), mixer(tokens(40, dtype=torch.float32))[0]
    mixer = mixer.to(torch.bfloat16)
    assert all(getattr(mixer, name).equal(value) for name, value in exact.items())
    assert mixer.in_proj.weight.dtype == mixer.norm.weight.dtype == torch.bfloat16
    cache = DynamicCache()
    with torch.no_grad():
        out, _ = mixer(given.bfloat16(), cache=cache)
    assert out.dtype == torch.bfloat16 and [t.dtype for t in states(cache)] == [torch.bfloat16, torch.float32]
    close(out.float(), wanted.detach(), 3e-2)
    made_low = Mamba2Mixer(SHAPE, 0, dtype=torch.bfloat16)
    assert made_low.A_log.dtype == torch.float32 and made_low.double().A_log.dtype == torch.float64


def test_random_start_is_the_paper_s() -> None:
    mixer = made(MixerShape(width=64, heads=512, kv_heads=512, head_dim=1), torch.float32)
    A, dt = mixer.A_log.exp(), torch.nn.functional.softplus(mixer.dt_bias)
    assert 1 <= A.min() < 1.2 and 15.8 < A.max() <= 16
    assert 1e-3 <= dt.min() * 1.001 and dt.max() <= 0.1001
    assert abs(dt.log().mean() - torch.tensor(1e-2).log()) < 0.2  # uniform in the logarithm
    assert mixer.conv1d.weight.abs().max() <= 0.5 and mixer.in_proj.weight.abs().max() <= 1 / 8
    assert (mixer.D == 1).all() and (mixer.norm.weight == 1).all()


def test_one_mixer_of_phi_2_has_the_paper_s_size() -> None:
    mixer = Mamba2Mixer(MixerShape(width=2560, heads=32, kv_heads=32, head_dim=80), 0, device="meta")
    assert mixer.in_proj.weight.shape == (10272, 2560) and mixer.conv1d.weight.shape == (7680, 1, 4)
    assert sum(p.numel() for p in mixer.parameters()) == 32_890_976


def test_heads_that_share_unevenly_are_refused() -> None:
    with pytest.raises(UserError, match="5 heads cannot share 2 key/value heads evenly"):
        MixerShape(width=20, heads=5, kv_heads=2, head_dim=4)


def test_the_log_says_which_path_runs(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """No kernels, broken ones, those that import at the second try; and never for tensors on a CPU."""
    imported: list[str] = []

    def second_time(name: str) -> Any:
        imported.append(name)
        if len(imported) == 1:
            raise ModuleNotFoundError("No module named 'selective_scan_cuda'")
        return type("module", (), {"mamba_chunk_scan_combined": "scan", "selective_state_update": "step"})

    def broken(name: str) -> Any:
        imported.append(name)
        raise ImportError("undefined symbol: _ZN3c10")

    caplog.set_level(logging.INFO)
    for importer, tries, on_gpu in ((broken, 1, None), (second_time, 3, "scan")):
        imported.clear()
        mixers.kernels.cache_clear()
        mixers._chosen.cache_clear()
        monkeypatch.setattr(mixers.importlib, "import_module", importer)
        assert mixers._kernel("scan", "auto", "cuda") == on_gpu and len(imported) == tries
        assert (
            mixers._kernel("scan", "auto", "cpu") is None and mixers._kernel("scan", "torch", "cuda") is None
        )
        with pytest.raises(UserError, match="undefined symbol" if on_gpu is None else "tensors are on cpu"):
            mixers._kernel("scan", "mamba_ssm", "cpu")
    said = [record.getMessage() for record in caplog.records]
    assert said == [
        "Mamba-2 scan on cuda: PyTorch (undefined symbol: _ZN3c10)",
        "Mamba-2 scan on cpu: PyTorch (undefined symbol: _ZN3c10)",
        "Mamba-2 scan on cuda: PyTorch (backend=torch)",
        "Mamba-2 scan on cuda: mamba-ssm's kernel",
        "Mamba-2 scan on cpu: PyTorch (mamba-ssm's kernels run on a GPU)",
        "Mamba-2 scan on cuda: PyTorch (backend=torch)",
    ]
    monkeypatch.undo()
    mixers.kernels.cache_clear()
    mixers._chosen.cache_clear()


def test_it_compiles_as_one_graph() -> None:
    mixer, given = made(dtype=torch.float32), tokens(20, dtype=torch.float32)
    mask = torch.arange(20) >= torch.tensor([[0], [5], [18]])
    compiled = torch.compile(mixer, backend="eager", fullgraph=True)
    close(compiled(given, token_mask=mask)[0], mixer(given, token_mask=mask)[0], 1e-6)
