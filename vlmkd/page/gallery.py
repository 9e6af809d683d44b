"""Pictures of the page, written while models and images are at hand."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmkd.files import write_text

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from vlmkd.data.labelled import Item
    from vlmkd.evaluation.base import Result
    from vlmkd.predictors import DualEncoder

GALLERY, MISTAKES, PICTURES = "gallery.json", "mistakes.json", "pictures.json"
RETRIEVED = 5  # images that are shown of a text
_SIDE = 96  # pixels
_SCENE = 160  # of a picture that questions are asked about


def write_gallery(
    path: Path,
    predictors: Mapping[str, DualEncoder],
    images: Sequence[Image.Image],
    texts: Sequence[str],
    device: torch.device | None = None,
) -> None:
    """Write how each model (teachers first) relates `texts` to `images`; text i belongs to image i.

    Affinity is TinyCLIP's text-to-image one: softmax over images of logit_scale * cosine.
    """
    import torch  # here, because pages are made without it

    from vlmkd.data.transforms import eval_transform

    models: dict[str, Any] = {}
    for name, predictor in predictors.items():
        transform = eval_transform(predictor.image_spec)
        with torch.no_grad():
            image_embeds = predictor.encode_image(torch.stack([*map(transform, images)]).to(device)).float()
            similarity = predictor.encode_text(list(texts)).float() @ image_embeds.T
        affinity = torch.softmax(float(predictor.logit_scale) * similarity, dim=1)
        models[name] = {
            "affinity": [[round(value, 5) for value in line] for line in affinity.tolist()],
            "retrieved": similarity.argsort(dim=1, descending=True, stable=True)[:, :RETRIEVED].tolist(),
        }
    content = {"texts": list(texts), "images": [*map(_data_uri, images)], "models": models}
    write_text(path, json.dumps(content))


def write_mistakes(path: Path, results: Sequence[Result], items: Mapping[str, Sequence[Item]]) -> None:
    """Write the worst mistakes with their pictures, of data sets that `items` has."""
    found: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        if "mistakes" in result.details and result.dataset in items:
            images = {item.key: item.image for item in items[result.dataset]}
            names = result.details["classes"]
            found[result.dataset] = [
                one
                | {which: names[one[which]] for which in ("label", "predicted")}
                | {"image": _data_uri(images[one["key"]].read())}
                for one in result.details["mistakes"]
            ]
    if found:
        write_text(path, json.dumps(found))


def write_pictures(
    path: Path, pictures: Mapping[str, Mapping[str, Sequence[bytes]]], attributions: Iterable[str]
) -> None:
    """Write the pictures of questions, by data set and key; the answers are in the run's details."""
    found = {
        dataset: {key: [_data_uri(one, _SCENE) for one in own] for key, own in of_set.items()}
        for dataset, of_set in pictures.items()
    }
    if found:
        write_text(path, json.dumps({"pictures": found, "attributions": list(attributions)}))


def _data_uri(image: Image.Image | bytes, side: int = _SIDE) -> str:
    """An inline PNG that fits the square of `side`; a JPEG where that is not _SIDE."""
    from PIL import Image  # here, because pages are made without it

    if isinstance(image, bytes):
        image = Image.open(io.BytesIO(image))
    clear = side == _SIDE and image.mode in ("RGBA", "LA", "P")
    small = image.convert("RGBA" if clear else "RGB")
    small.thumbnail((side, side))
    buffer, form = io.BytesIO(), "PNG" if side == _SIDE else "JPEG"
    small.save(buffer, format=form, optimize=True)
    return f"data:image/{form.lower()};base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
