"""Speed: the floors of the paper's model, and the command on a tiny one."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
from transformers import PhiConfig, PhiForCausalLM, PreTrainedModel

from projects.matvlm.config import HybridConfig
from projects.matvlm.speed import Speed, apart, crossover, floor_of, measure, table, twin
from projects.matvlm.surgery import mixers_of, to_hybrid
from tests.projects.matvlm.models import decoder_folder
from tests.projects.matvlm.test_surgery import FIRST, KINDS, made
from tests.projects.zygote import Zygote
from vlmkd.results import read_results

GIB = 2**30
LAYER = {
    1024: (162.5, 172.1),
    2048: (167.8, 172.1),
    4096: (178.3, 172.1),
    16384: (241.2, 172.1),
    32768: (325.1, 172.1),
}
"""MFLOP a token of one layer: attention, Mamba-2 with chunks of 64 (worked out by hand from the sizes)."""
DECODE = {
    1024: ((0.31, 0.28, 0.24, 0.17), (1.00, 0.99, 0.99)),
    4096: ((1.25, 1.10, 0.94, 0.64), (1.02, 1.03, 1.07)),
    16384: ((5.00, 4.38, 3.76, 2.51), (1.06, 1.13, 1.30)),
    32768: ((10.0, 8.75, 7.51, 5.01), (1.09, 1.19, 1.47)),
}
"""GiB of the cache at 0, 12.5, 25 and 50 %, and how much faster bytes allow decoding in bfloat16."""


@pytest.fixture(scope="module")
def phi_2() -> list[PreTrainedModel]:
    """The paper's teacher and its three hybrids, without values."""
    config = PhiConfig(
        hidden_size=2560, intermediate_size=10240, num_hidden_layers=32, num_attention_heads=32
    )
    with torch.device("meta"):
        teacher = PhiForCausalLM(config).to(torch.bfloat16)
    return [teacher, *(to_hybrid(twin(teacher), HybridConfig(preset=share)) for share in (12.5, 25, 50))]


@pytest.mark.parametrize("length", LAYER)
def test_products_of_a_layer(phi_2: list[PreTrainedModel], length: int) -> None:
    teacher, *_, half = (floor_of(model, length).work / 1e6 for model in phi_2)
    assert round(teacher / 32, 1) == LAYER[length][0]
    assert round((half - teacher / 2) / 16, 1) == LAYER[length][1]


def test_from_where_on_a_hybrid_has_fewer_products(phi_2: list[PreTrainedModel]) -> None:
    for hybrid in phi_2[1:]:
        at = crossover(phi_2[0], hybrid)
        assert 2850 < at < 2950
        below, above = ([floor_of(one, round(at) + n).work for one in (phi_2[0], hybrid)] for n in (-2, 2))
        assert below[0] < below[1] and above[0] > above[1]


@pytest.mark.parametrize("length", DECODE)
def test_bytes_of_a_decoded_token(phi_2: list[PreTrainedModel], length: int) -> None:
    teacher, *hybrids = (floor_of(model, length) for model in phi_2)
    caches, ratios = DECODE[length]
    for floor, cache in zip((teacher, *hybrids), caches, strict=True):
        assert floor.cache / GIB == pytest.approx(cache, abs=0.006)
    for floor, ratio in zip(hybrids, ratios, strict=True):
        assert teacher.traffic / floor.traffic == pytest.approx(ratio, abs=0.006)
    if length == 1024:  # tokens a second at 936 GB/s
        assert [round(936e9 / one.traffic) for one in (teacher, hybrids[-1])] == [166, 164]


@pytest.mark.parametrize("kind", KINDS)
def test_the_bytes_of_a_cache_are_those_that_a_cache_has(kind: str) -> None:
    model = to_hybrid(made(kind, torch.float32), FIRST)
    out = model(torch.randint(3, 97, (2, 12)), use_cache=True)
    held = 0
    for layer in out.past_key_values.layers:
        names = ("keys", "values", "conv_states", "recurrent_states")
        for found in (getattr(layer, name, None) for name in names):
            found = found[0] if isinstance(found, dict) else found
            held += 0 if found is None else found.numel() * found.element_size()
    assert floor_of(model, 12, batch=2).cache == held


def test_a_twin_has_the_same_tensors_and_surgery_leaves_the_teacher_alone() -> None:
    model = made("llama", torch.float32)
    other = to_hybrid(twin(model), FIRST)
    assert not mixers_of(model) and len(mixers_of(other)) == 2
    assert other.model.layers[1].self_attn.q_proj.weight is model.model.layers[1].self_attn.q_proj.weight
    assert other.config is not model.config


def test_a_measurement_in_a_process_of_its_own_sees_what_is_added() -> None:
    model = made("llama", torch.float32)
    weights = sum(p.numel() * 4 for p in model.parameters())
    found = apart(lambda: measure(model, 3000, 2, 3, 1))
    assert found is not None and found.prefill > 0 and found.decode > 0
    held = floor_of(model, 3000, 2).cache
    assert weights + held < found.memory < weights + 60 * held


def test_one_that_runs_out_of_memory_leaves_its_place_empty() -> None:
    def killed() -> Speed:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError

    assert apart(killed) is None
    model = made("llama", torch.float32)
    floors = {"teacher": floor_of(model, 8), "half": floor_of(to_hybrid(twin(model), FIRST), 8)}
    teacher, half = table(8, {"teacher": None, "half": Speed(20, 3, 2**21)}, floors)
    assert teacher[2] == "out of memory" and half[2:4] == ["20", ""] and half[8] == "2"
    assert [row[3] for row in table(8, dict.fromkeys(floors, Speed(20, 3, 2**21)), floors)] == [
        "1.00",
        "1.00",
    ]


@pytest.mark.slow
def test_the_command_writes_numbers_and_a_plot(zygote: Zygote, tmp_path: Path) -> None:
    decoder = f"hf:{decoder_folder(tmp_path / 'llama')}"
    results = tmp_path / "speed.jsonl"
    words = [decoder, "--lengths", "40", "20", "--new", "3", "--rounds", "2", "--presets", "25", "50"]
    code, said = zygote.run("projects.matvlm.speed", [*words, "--results", str(results)], tmp_path / "out")
    assert code == 0, said
    rows = [line for line in said.splitlines() if line.startswith("| ") and "model" not in line]
    assert [row.split(" | ")[0] for row in rows] == ["| 20"] * 3 + ["| 40"] * 3
    assert "CPU, 1 thread(s), fp32, batch 1, 3 tokens decoded, median of 2" in said
    assert "25 % Mamba-2: fewer products than the teacher's prefill from" in said
    found = read_results(results)
    assert {one.model for one in found} == {"teacher", "25 % Mamba-2", "50 % Mamba-2"}
    assert {one.metric for one in found} == {"prefill", "decode", "memory", "cache", "work", "traffic"}
    assert len(found) == 2 * 3 * 6 and {one.tags["tokens"] for one in found} == {20, 40}
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")
    code, said = zygote.run("projects.matvlm.speed", [decoder, "--hybrids", decoder], tmp_path / "out")
    assert code == 2 and "has no Mamba-2 layers; name the export of a hybrid" in said
