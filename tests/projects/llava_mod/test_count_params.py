"""The paper's models have the sizes that their files and the paper say."""

from __future__ import annotations

import pytest

from projects.llava_mod.count_params import SIZES, Counts, count, main

# dense, sparse, activated, trained in d2s: billions; adaptor: millions.
EXPECTED = {
    "Qwen1.5-0.5B": (0.464, 0.775, 0.568, 0.521, 2.10),
    "Qwen2-0.5B": (0.494, 0.965, 0.651, 0.786, 1.72),
    "Qwen2-1.5B": (1.544, 3.278, 2.122, 2.894, 3.94),
    "Qwen1.5-1.8B": (1.837, 3.054, 2.243, 2.035, 6.30),
}
TEACHERS = {"Qwen1.5-7B": (7.72, 20.98), "Qwen2-7B": (7.62, 16.52)}


@pytest.mark.parametrize("name", EXPECTED)
def test_sizes_of_the_students(name: str) -> None:
    *billions, millions = EXPECTED[name]
    found = count(name)
    assert [round(number / 1e9, 3) for number in found[:-1]] == billions
    assert round(found.adaptor / 1e6, 2) == millions


@pytest.mark.parametrize("name", TEACHERS)
def test_sizes_of_the_teachers(name: str) -> None:
    found = count(name)
    assert (round(found.dense / 1e9, 2), round(found.adaptor / 1e6, 2)) == TEACHERS[name]


def test_the_smallest_by_hand() -> None:
    layers, width, inner, heads, kv_heads, vocabulary, _ = SIZES["Qwen2-0.5B"]
    head = width // heads
    attention = (
        2 * width * width + 2 * width * head * kv_heads + width + 2 * head * kv_heads
    )  # biases of q, k and v
    ffn = 3 * width * inner
    dense = vocabulary * width + layers * (attention + ffn + 2 * width) + width
    router, adaptor = 4 * width, 1024 * width + width + width * width + width
    expected = Counts(
        dense,
        dense + 12 * (3 * ffn + router),
        dense + 12 * (ffn + router),
        12 * (ffn + 4 * ffn + router) + adaptor,
        adaptor,
    )
    assert count("Qwen2-0.5B") == expected


def test_the_command_prints_a_row_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["Qwen2-0.5B"]) == 0
    rows = capsys.readouterr().out.splitlines()
    assert rows[-1] == "| Qwen2-0.5B | 0.494 B | 0.965 B | 0.651 B | 0.786 B | 1.72 M |" and len(rows) == 3
    with pytest.raises(SystemExit):
        main(["Qwen3"])
