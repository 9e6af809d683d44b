#!/usr/bin/env python
"""Write an exported classifier (a run's export/) as ONNX beside it, and compare the two with onnxruntime.

python scripts/to_onnx.py runs/my_dho/export

model.onnx takes `images` [B,3,H,W] in the statistics of classifier.json's image_spec and gives `logits` [B,C], for any B.
It needs the extra `export`: pip install 'vlmkd[export]'.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works in a checkout that was not installed

import torch
from torch import Tensor, nn

from vlmkd.errors import UserError, run_tool
from vlmkd.export.classifier import load_classifier
from vlmkd.export.folder import compare, probe_images
from vlmkd.models.classifier import ClassifierPredictor
from vlmkd.models.heads import mix_heads

ONNX = "model.onnx"
_TOLERANCE = 1e-3
"""onnxruntime fuses other operations."""


class Prediction(nn.Module):
    """images -> logits as one tensor, those of a dual head mixed."""

    def __init__(self, predictor: ClassifierPredictor) -> None:
        super().__init__()
        self.module, self.mix = predictor.module, predictor.mix

    def forward(self, images: Tensor) -> Tensor:
        output = self.module(images)
        return output if self.mix is None else mix_heads(output, *self.mix)


def missing_for_onnx() -> list[str]:
    """Packages of the extra `export` that are not installed."""
    return [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]


def to_onnx(folder: Path) -> Path:
    """Write FOLDER/model.onnx, compare it with onnxruntime, and return its path."""
    if missing := missing_for_onnx():
        raise UserError(f"ONNX export needs {', '.join(missing)}; run: pip install 'vlmkd[export]'")
    predictor = load_classifier(folder)
    model, spec = Prediction(predictor).eval(), predictor.image_spec
    partial = folder / f".{ONNX}.partial.onnx"
    torch.onnx.export(
        model,
        (probe_images(spec),),
        str(partial),
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
        dynamo=True,
        external_data=False,
        verbose=False,
    )
    onnxruntime = importlib.import_module("onnxruntime")  # of the extra `export`
    session = onnxruntime.InferenceSession(str(partial), providers=["CPUExecutionProvider"])
    for count in (1, 3):
        images = probe_images(spec, count)
        with torch.no_grad():
            expected = {"logits": model(images)}
        found = {"logits": torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])}
        if difference := compare(found, expected, _TOLERANCE):
            partial.unlink()
            raise UserError(
                f"ONNX export of {folder} does not reproduce the classifier: of {count} images {difference}; report this"
            )
    return partial.replace(folder / ONNX)


def main(argv: list[str]) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="folder of an exported classifier")
    print(f"wrote {to_onnx(parser.parse_args(argv).folder)}")
    return 0


if __name__ == "__main__":
    run_tool(main)
