"""A checkpoint of the released VL2V-ADiP code -> an exported classifier.

    python -m projects.vl2v_adip.convert_vl2v TE0_best.pth OUT --student torchvision:resnet50 \
        --set office_home --root data

Reads nothing but plain data, tensors and the path and argument objects that such a file carries. The released files are
`{args, model_hparams, test_envs, model_dict}` with the backbone under `featurizer.network.`, the projector under
`proj_lyr.` and the text classifier, times 100, twice.
"""

from __future__ import annotations

import argparse
import math
import pathlib
import sys
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmkd.classifier_export import export_classifier
from vlmkd.data.labelled_sets import load_set
from vlmkd.errors import UserError
from vlmkd.models.backbones import Backbone, load_backbone, load_backbone_weights, with_spec
from vlmkd.models.classifier import ClassifierConfig
from vlmkd.models.heads import Projector, TextClassifier
from vlmkd.tensor_files import read_torch

BACKBONE, PROJECTOR, CLASSIFIERS = "featurizer.network.", "proj_lyr.", ("clip_cls.", "classifier.")


class _Number(float):
    """A number of ruamel.yaml, which also remembers how it was written."""


_PATHS = [
    (kind, f"{module}.{kind.__name__}")
    for kind in (pathlib.PosixPath, pathlib.PurePosixPath)
    for module in ("pathlib", "pathlib._local")  # as the Python called it that wrote the file
]
_PLAIN = [
    *_PATHS,
    argparse.Namespace,
    (OrderedDict, "munch.Munch"),  # a dictionary whose keys are attributes too
    (_Number, "ruamel.yaml.scalarfloat.ScalarFloat"),
]
"""What a released file holds beside tensors and plain data; the packages of these classes are not imported."""


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """`model_dict` of a released checkpoint.

    Raises:
        UserError: no such file, damaged, other content, or a pickle that names anything but what the code put there.
    """
    content = read_torch(path, what="checkpoint", plain=_PLAIN)
    state = content.get("model_dict") if isinstance(content, Mapping) else None
    if not isinstance(state, Mapping) or not any(str(name).startswith(BACKBONE) for name in state):
        raise UserError(
            f"checkpoint {path} has no model_dict with {BACKBONE}*; it is not of the released code"
        )
    return dict(state)


def convert(
    state: Mapping[str, Tensor], backbone: Backbone, class_names: list[str], templates: list[str]
) -> tuple[ClassifierConfig, dict[str, Tensor]]:
    """Config and weights of the classifier; `backbone` is filled with the checkpoint's.

    Raises:
        UserError: another backbone or number of classes, two different text classifiers, or unknown tensors.
    """
    parts = (BACKBONE, PROJECTOR, *CLASSIFIERS)
    unknown = [name for name in state if not name.startswith(parts)]
    if unknown:
        raise UserError(f"checkpoint has unknown tensors: {', '.join(unknown[:3])}")
    heads = [state[f"{prefix}weight"].float() for prefix in CLASSIFIERS if f"{prefix}weight" in state]
    if not heads or any(not torch.equal(heads[0], other) for other in heads[1:]):
        raise UserError("checkpoint has no text classifier, or two that differ")
    biases = [state[f"{prefix}bias"] for prefix in CLASSIFIERS if f"{prefix}bias" in state]
    if any(bool(bias.any()) for bias in biases):
        raise UserError("checkpoint's text classifier has a bias, which the method does not train")
    if len(heads[0]) != len(class_names):
        raise UserError(f"checkpoint has {len(heads[0])} classes, the data set {len(class_names)}")
    load_backbone_weights(
        backbone,
        {name.removeprefix(BACKBONE): value for name, value in state.items() if name.startswith(BACKBONE)},
        f"checkpoint ({backbone.source})",
    )
    scale = float(heads[0].norm(dim=1).mean())
    head = TextClassifier(F.normalize(heads[0], dim=1), scale)
    projector = None
    if f"{PROJECTOR}weight" in state:
        width, features = state[f"{PROJECTOR}weight"].shape
        projector = Projector(features, width)
        projector.load_state_dict(
            {f"layers.0.{leaf}": state[f"{PROJECTOR}{leaf}"] for leaf in ("weight", "bias")}
        )
    if not math.isclose(scale, float(heads[0].norm(dim=1).max()), rel_tol=1e-3):
        raise UserError(
            "rows of the checkpoint's text classifier differ in length; it is not a scaled unit classifier"
        )
    weights = {f"backbone.{name}": value for name, value in backbone.module.state_dict().items()}
    weights |= {f"head.{name}": value for name, value in head.state_dict().items()}
    if projector is not None:
        weights |= {f"projector.{name}": value for name, value in projector.state_dict().items()}
    config = ClassifierConfig.of(backbone, head, projector, class_names=class_names, templates=templates)
    return config, weights


def main(argv: list[str]) -> int:
    """Parse arguments and convert; returns the exit code."""
    parser = argparse.ArgumentParser(description="Released VL2V-ADiP checkpoint -> exported classifier.")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--student", required=True, help="backbone, e.g. torchvision:resnet50")
    parser.add_argument("--set", required=True, help="domain set, for its class names")
    parser.add_argument("--root", default="", help="folder of the data sets")
    args = parser.parse_args(argv)
    try:
        dataset = load_set(args.set, args.root)
        # The released code feeds every student ImageNet's statistics and squashes test images.
        backbone = with_spec(
            load_backbone(args.student, pretrained=False), resize_mode="squash", interpolation="bilinear",
            mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225),
        )  # fmt: skip
        config, weights = convert(
            read_checkpoint(args.checkpoint), backbone, dataset.class_names, dataset.templates
        )
        export_classifier(args.out, config, weights, provenance={"converted_from": args.checkpoint.name})
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
