"""The projector's loss before the decoder, against loops in float64; and that it makes features name what is there."""

from __future__ import annotations

import math

import torch

from projects.llava_mod.words import SCALE, said, words_loss
from vlmkd.chat_ids import IGNORED


def test_words_are_the_answers_tokens_that_at_most_half_of_the_rows_have() -> None:
    targets = torch.tensor(
        [[IGNORED, 3, 5, 1], [IGNORED, 4, 1, 5], [2, 1, IGNORED, IGNORED], [0, 1, 6, IGNORED]]
    )
    found = [set(row.nonzero()[:, 0].tolist()) for row in said(targets, 8)]
    assert found == [{3, 5}, {4, 5}, {2}, {0, 6}]


def by_loops(embeds, places, words, table):
    """Equation 11, number by number."""
    listed = [
        v for v in range(words.shape[1]) if any(words[r, v] and places[r].any() for r in range(len(words)))
    ]
    length = sum(float(row.norm()) for row in table) / len(table)
    named = off = 0.0
    for row in range(len(words)):
        features = [embeds[row, n] for n in range(len(places[row])) if places[row, n]]
        wanted = [v for v in listed if words[row, v]]
        if not features or not wanted:
            continue
        scores = {
            v: math.log(
                sum(math.exp(SCALE * float(f @ table[v] / f.norm() / table[v].norm())) for f in features)
            )
            for v in listed
        }
        total = math.log(sum(math.exp(score) for score in scores.values()))
        named -= sum(scores[v] - total for v in wanted) / len(wanted)
        off += sum((float(f.norm()) / length - 1) ** 2 for f in features) / len(features)
    return named / len(words), off / len(words)


def test_the_loss_is_equation_11() -> None:
    generator = torch.Generator().manual_seed(0)
    embeds = torch.randn(4, 5, 3, generator=generator, dtype=torch.float64)
    table = torch.randn(9, 3, generator=generator, dtype=torch.float64)
    places = torch.tensor([[1, 1, 0, 0, 1], [0, 1, 1, 1, 0], [0] * 5, [1] * 5]).bool()
    words = torch.zeros(4, 9).bool()
    words[0, [1, 2]] = words[1, 2] = words[2, 7] = True  # row 2 has no features, row 3 no words
    for found, expected in zip(
        words_loss(embeds, places, words, table), by_loops(embeds, places, words, table), strict=True
    ):
        torch.testing.assert_close(float(found), expected, rtol=1e-5, atol=1e-6)


def test_without_any_word_it_is_zero_with_gradients() -> None:
    embeds = torch.randn(2, 3, 4, requires_grad=True)
    named, off = words_loss(embeds, torch.zeros(2, 3).bool(), torch.zeros(2, 6).bool(), torch.randn(6, 4))
    (named + off).backward()
    assert named == off == 0 and embeds.grad is not None and not embeds.grad.any()
