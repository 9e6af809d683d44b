"""mamba-ssm absent, broken or there: what runs; and its kernels against the PyTorch path, in Triton's interpreter on a CPU,
where the package is installed."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from projects.matvlm import mixer as mixers
from projects.matvlm.surgery import to_hybrid
from tests.projects.matvlm.test_surgery import FIRST, made, prompts

ROOT = Path(__file__).parents[3]
COMPARED = """
import contextlib, torch, triton
torch.cuda.device = lambda index: contextlib.nullcontext()
autotune = triton.autotune  # one config a kernel: choosing between them needs a GPU
triton.autotune = lambda configs, key, **options: autotune(configs[:1], key, **options)
from transformers.cache_utils import DynamicCache
from projects.matvlm import mixer as mixers

mixer = mixers.Mamba2Mixer(mixers.MixerShape(width=32, heads=4, kv_heads=2, head_dim=16), 0, chunk=16)
mixer.start(torch.Generator().manual_seed(0))
given, ids = 3 * torch.randn(2, 37, 32), torch.arange(37).expand(2, -1) // 11

@torch.no_grad()
def outputs():
    cache = DynamicCache()
    found = [mixer(piece, cache=cache)[0] for piece in given.split((30, 6, 1), 1)]
    return [*found, mixers.mamba_layer(cache, 0).read()[1], mixer(given, seq_idx=ids)[0]]

ours = outputs()
found, why = mixers.kernels()
assert found, why
mixers._kernel = lambda name, *_: found[name]
print(max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(outputs(), ours)))
"""


BROKEN = "raise ImportError('undefined symbol: _ZN3c10')"
THERE = "def mamba_chunk_scan_combined(*_, **__): raise AssertionError\nselective_state_update = mamba_chunk_scan_combined"


@pytest.fixture
def _forgotten() -> Iterator[None]:
    """As if nobody had looked for mamba-ssm, before and after."""

    def forget() -> dict[str, ModuleType]:
        mixers.kernels.cache_clear()
        mixers._chosen.cache_clear()
        names = [name for name in sys.modules if name.partition(".")[0] == "mamba_ssm"]
        return {name: sys.modules.pop(name) for name in names}

    before = forget()
    yield
    forget()
    sys.modules.update(before)


@pytest.mark.usefixtures("_forgotten")
@pytest.mark.parametrize("state", ["absent", "broken", "there"])
def test_generation_on_a_cpu_works_whatever_mamba_ssm_is(
    state: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "mamba_ssm"
    if state == "absent":
        monkeypatch.setitem(sys.modules, "mamba_ssm", None)
    else:
        (package / "ops" / "triton").mkdir(parents=True)
        for folder in (package, package / "ops", package / "ops" / "triton"):
            (folder / "__init__.py").write_text(BROKEN if state == "broken" else "")
        for module in ("ssd_combined", "selective_state_update"):
            (package / "ops" / "triton" / f"{module}.py").write_text(THERE)
        monkeypatch.syspath_prepend(str(tmp_path))
    model = to_hybrid(made("llama", torch.float32), FIRST)
    ids, mask, _ = prompts()
    model.generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=False)
    assert bool(mixers.kernels()[0]) == (state == "there")
    assert mixers._kernel("scan", "auto", "cpu") is mixers._kernel("step", "auto", "cpu") is None
    done = subprocess.run(
        [sys.executable, "-c", "import vlmkd"], env={**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}, check=False
    )  # fmt: skip
    assert done.returncode == 0


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("mamba_ssm") is None, reason="mamba-ssm is not installed")
def test_the_kernels_compute_the_same() -> None:
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    done = subprocess.run(
        [sys.executable, "-c", COMPARED], env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[-1]) < 2e-6
