"""mamba-ssm's kernels against the PyTorch path, in Triton's interpreter on a CPU, where the package is installed."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

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


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("mamba_ssm") is None, reason="mamba-ssm is not installed")
def test_the_kernels_compute_the_same() -> None:
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    done = subprocess.run(
        [sys.executable, "-c", COMPARED], env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[-1]) < 2e-6
