"""Image-text retrieval: recall at 1, 5 and 10, and mean and median rank, in both directions.

Q queries, N candidates, D embedding width. A query, an image or a caption, is a hit when any of its captions or images is
among the first k candidates, by falling score, equal ones by rising index.
"""

from __future__ import annotations

from statistics import fmean, median
from typing import Any

import torch
from torch import Tensor

from vlmkd import distributed
from vlmkd.datasets.evaluation_sets import CaptionedImages
from vlmkd.evaluation.base import Context, Result, require_protocol
from vlmkd.evaluation.images import embed_texts, embeddings
from vlmkd.predictors import DualEncoder
from vlmkd.results import UNREADABLE, share

RECALL_AT = (1, 5, 10)
BLOCK_ELEMENTS = 1 << 24
"""Scores held at once: 64 MB in float32, whatever the size of the set."""


class Retrieval:
    """`image_to_text_r<k>` and `text_to_image_r<k>` for k = 1, 5, 10 below the number of candidates.

    `details` has the mean and median rank of the first positive, where 1 is best.
    """

    name = "retrieval"

    def __init__(self, dataset: CaptionedImages) -> None:
        self.dataset = dataset

    def run(self, predictor: Any, context: Context) -> list[Result]:
        """An unreadable image leaves the set with the captions of its own."""
        require_protocol(self.name, predictor, DualEncoder)
        data = self.dataset
        ids, images, unreadable = embeddings(predictor, data.images, f"{data.name}: images", context)
        texts = embed_texts(predictor, data.texts, f"{data.name}: texts", context)
        own = [data.texts_of_image[index] for index in ids.tolist()]
        kept = sorted({text for of_image in own for text in of_image})
        place = {text: position for position, text in enumerate(kept)}
        texts_of_image = [[place[text] for text in of_image] for of_image in own]
        images_of_text: list[list[int]] = [[] for _ in kept]
        for image, of_image in enumerate(texts_of_image):
            for text in of_image:
                images_of_text[text].append(image)
        images, texts = images.to(context.device), texts[kept].to(context.device)
        directions = {
            "image_to_text": (images, texts, texts_of_image),
            "text_to_image": (texts, images, images_of_text),
        }
        metrics: dict[str, float] = {}
        meanings = {"unreadable": UNREADABLE}
        details: dict[str, Any] = {"texts": len(kept)}
        for name, (queries, candidates, positives) in directions.items():
            mine = distributed.rank_share(len(queries))
            own_positives = [positives[index] for index in mine]
            found = first_positive(queries[mine.start :: mine.step], candidates, own_positives)
            places = [place for part in distributed.gather_objects(found.tolist()) for place in part]
            for k in RECALL_AT:
                if k == 1 or k < len(candidates):
                    metrics[f"{name}_r{k}"] = sum(place < k for place in places) / len(places)
                    label, main = f"{name.replace('_to_', '→')} R@{k}", (name, k) == ("image_to_text", 1)
                    meanings[f"{name}_r{k}"] = share(label, main=main)
            details |= {f"{name}_mean_rank": 1 + fmean(places), f"{name}_median_rank": 1 + median(places)}
        if unreadable:
            metrics["unreadable"], details["unreadable"] = float(len(unreadable)), unreadable
        return [Result(self.name, data.name, metrics, len(ids), details, meanings=meanings)]


def first_positive(queries: Tensor, candidates: Tensor, positives: list[list[int]]) -> Tensor:
    """Place (0 = first) of each query's best positive, of queries [Q,D] in candidates [N,D]: int64 [Q] on the CPU."""
    count = len(candidates)
    rows_per_block = max(1, BLOCK_ELEMENTS // max(count, 1))
    order = torch.arange(count, device=candidates.device)
    places = [torch.empty(0, dtype=torch.long)]
    for start in range(0, len(queries), rows_per_block):
        block = positives[start : start + rows_per_block]
        scores = queries[start : start + rows_per_block] @ candidates.T
        pairs = [(query, index) for query, indices in enumerate(block) for index in indices]
        row, column = torch.tensor(pairs, device=scores.device).T
        own = scores[row, column]
        best = scores.new_full((len(block),), -torch.inf).scatter_reduce_(0, row, own, "amax")
        # Among a query's positives with the best score the lowest index comes first.
        index = torch.where(own == best[row], column, count)
        lowest = order.new_full((len(block),), count).scatter_reduce_(0, row, index, "amin")
        ahead = (scores > best[:, None]) | ((scores == best[:, None]) & (order < lowest[:, None]))
        places.append(ahead.sum(dim=1).cpu())
    return torch.cat(places)
