"""Exports are read by plain open_clip and transformers, appear whole or not at all, and are checked."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file

from projects.tinyclip.encoder import CLIPEncoder
from scripts import export_hf as hf
from vlmkd.errors import UserError
from vlmkd.export import clip as export
from vlmkd.export.clip import export_clip, probe_of, verify_export
from vlmkd.export.folder import Probe, compare, replacing, stored
from vlmkd.image_spec import ImageSpec
from vlmkd.models.clip import ClipModel, load_clip, weights_digest

ROOT = Path(__file__).parents[2]
VISION: dict[str, Any] = {"image_size": 32, "patch_size": 16, "width": 64, "layers": 1}
TEXT: dict[str, Any] = {"context_length": 12, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1}
SPEC = ImageSpec(
    size=(32, 32), mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4), interpolation="bilinear", resize_mode="squash"
)


def make(folder: Path, **top: Any) -> ClipModel:
    config = {"embed_dim": 32, "quick_gelu": True, "vision_cfg": VISION, "text_cfg": TEXT} | top
    (folder / "model.json").write_text(json.dumps(config))
    clip = load_clip(str(folder / "model.json"), seed=0)
    clip.image_spec = SPEC
    return clip


def pruned(folder: Path) -> ClipModel:
    tower = {"width": 48, "heads": [1, 0], "mlp": [40, 0], "head_width": 32}
    config = {
        "embed_dim": 32,
        "pruned": True,
        "activation": "gelu",
        "vision_cfg": {"image_size": 32, "patch_size": 16, **tower},
        "text_cfg": {"context_length": 12, "vocab_size": 49408, **tower},
    }
    (folder / "pruned.json").write_text(json.dumps(config))
    return load_clip(str(folder / "pruned.json"), seed=0)


def small_vocabulary(folder: Path) -> ClipModel:
    from tests.small_tokenizer import text_config, train_tokenizer, write_tokenizer

    write_tokenizer(train_tokenizer(["a red cat", "a red dog", "red red"] * 3, 269), folder, 12)
    return make(folder, text_cfg=TEXT | text_config(269, 12))


def resnet(folder: Path) -> ClipModel:
    return make(folder, vision_cfg={"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None})


def siglip_like(folder: Path) -> ClipModel:
    text = TEXT | {"no_causal_mask": True, "pool_type": "last"}
    return make(folder, custom_text=True, init_logit_bias=-10.0, text_cfg=text)


def difference(folder: Path, clip: ClipModel, tmp_path: Path, layout: Any = export) -> str:
    """What the checking process would say, without starting one."""
    probe_of(clip).save(tmp_path / "probe.pt")
    probe = Probe.load(tmp_path / "probe.pt")
    return compare(layout.reloaded_outputs(folder, probe), probe.outputs)


@pytest.mark.parametrize("kind", [make, small_vocabulary, resnet, siglip_like, pruned])
def test_open_clip_layout(kind: Any, tmp_path: Path) -> None:
    clip = kind(tmp_path)
    export_clip(tmp_path / "out", clip)
    assert difference(tmp_path / "out", clip, tmp_path) == ""
    again = load_clip(f"local-dir:{tmp_path / 'out'}")
    assert again.digest == weights_digest(clip.module.state_dict())
    assert again.image_spec == clip.image_spec
    texts = ["a red cat", ""]
    assert torch.equal(again.tokenizer(texts), clip.tokenizer(texts))
    assert not list(tmp_path.glob(".out*"))


@pytest.mark.parametrize("kind", [make, small_vocabulary])
def test_transformers_layout(kind: Any, tmp_path: Path) -> None:
    clip = kind(tmp_path)
    hf.export_hf(tmp_path / "out", clip)
    assert difference(tmp_path / "out", clip, tmp_path, hf) == ""
    again = load_clip(f"hf:{tmp_path / 'out'}")
    assert again.digest == weights_digest(clip.module.state_dict())
    assert again.image_spec == clip.image_spec
    assert torch.equal(again.tokenizer(["a red cat"]), clip.tokenizer(["a red cat"]))


def test_transformers_pipeline_pieces_load(tmp_path: Path) -> None:
    from PIL import Image
    from transformers import CLIPModel, CLIPProcessor

    hf.export_hf(tmp_path / "out", make(tmp_path))
    processor = CLIPProcessor.from_pretrained(tmp_path / "out")
    picture = Image.new("RGB", (50, 40), (0, 128, 255))
    inputs = processor(text=["It's a CAT", "dogs"], images=picture, return_tensors="pt", padding=True)
    assert inputs["input_ids"][0].tolist() == open_clip.tokenize(["It's a CAT"])[0, :6].tolist()
    output = CLIPModel.from_pretrained(tmp_path / "out")(**inputs)
    assert output.logits_per_image.shape == (1, 2)


def test_half_precision_is_smaller_and_keeps_the_scale(tmp_path: Path) -> None:
    clip = make(tmp_path)
    encoder = CLIPEncoder(clip.module, fixed_scale=50.0)
    clip = clip.with_weights(encoder.model.state_dict())
    for half in (False, True):
        export_clip(tmp_path / f"half_{half}", clip, half=half)
    sizes = [
        (tmp_path / f"half_{half}" / "open_clip_model.safetensors").stat().st_size for half in (False, True)
    ]
    assert sizes[1] < 0.51 * sizes[0]
    assert load_clip(f"local-dir:{tmp_path / 'half_True'}").module.logit_scale.exp().item() == pytest.approx(
        50, abs=1e-4
    )


def test_provenance_names_weights_command_and_code(tmp_path: Path) -> None:
    export_clip(tmp_path / "out", make(tmp_path))
    content = json.loads((tmp_path / "out" / "provenance.json").read_text())
    import hashlib

    weights = (tmp_path / "out" / content["file"]).read_bytes()
    assert content["sha256"] == hashlib.sha256(weights).hexdigest()
    assert content["half"] is False
    assert content["vlmkd"] and content["command"] and set(content["git_commit"]) <= set("0123456789abcdef")


def test_an_older_export_is_replaced_and_a_foreign_folder_is_not(tmp_path: Path) -> None:
    clip = make(tmp_path)
    export_clip(tmp_path / "out", clip)
    (tmp_path / "out" / "left_over.txt").write_text("x")
    hf.export_hf(tmp_path / "out", clip)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert "config.json" in names and not names & {"left_over.txt", "open_clip_config.json"}
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="is no model export"):
        export_clip(foreign, clip)
    assert [path.name for path in foreign.iterdir()] == ["thesis.tex"]


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX file size limits")
def test_a_full_disk_leaves_the_older_export(tmp_path: Path) -> None:
    import resource

    clip = make(tmp_path)
    export_clip(tmp_path / "out", clip)
    before = (tmp_path / "out" / "provenance.json").read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # the weights have 13 MB
    try:
        with pytest.raises(UserError, match="cannot write .*; free space"):
            export_clip(tmp_path / "out", clip)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (tmp_path / "out" / "provenance.json").read_bytes() == before
    assert not list(tmp_path.glob(".out*"))


def test_what_transformers_cannot_hold_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    for kind, message in (
        (pruned, "no ragged layers"),
        (resnet, "no ResNet tower"),
        (siglip_like, "init_logit_bias"),
    ):
        with pytest.raises(UserError, match=message):
            hf.export_hf(tmp_path / "out", kind(tmp_path))
        assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def tamper(folder: Path, what: str) -> None:
    config_file, weights = folder / "open_clip_config.json", folder / "open_clip_model.safetensors"
    config = json.loads(config_file.read_text())
    if what == "weights":
        state = load_file(weights)
        state["text_projection"] *= -1
        save_file(state, weights)
    elif what == "activation":
        config["model_cfg"]["quick_gelu"] = False
    else:
        config["preprocess_cfg"]["mean"] = [0, 0, 0]
    config_file.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("what", "message"), [("weights", "text_embeds differs by"), ("activation", "differs by")]
)
def test_the_check_sees_wrong_weights_and_wrong_activation(what: str, message: str, tmp_path: Path) -> None:
    clip = make(tmp_path)
    clip.module.visual.conv1.weight.data *= 20  # out of the range where both activations agree
    export_clip(tmp_path / "out", clip)
    tamper(tmp_path / "out", what)
    assert message in difference(tmp_path / "out", clip, tmp_path)


def test_the_check_sees_wrong_statistics(tmp_path: Path) -> None:
    clip = make(tmp_path)
    export_clip(tmp_path / "out", clip)
    tamper(tmp_path / "out", "mean")
    with pytest.raises(UserError, match="open_clip reads mean"):
        difference(tmp_path / "out", clip, tmp_path)


@pytest.mark.slow
def test_fresh_process_accepts_a_good_export_and_refuses_a_bad_one(tmp_path: Path) -> None:
    clip = make(tmp_path)
    clip = clip.with_weights({k: stored(v, half=True) for k, v in clip.module.state_dict().items()})
    export_clip(tmp_path / "out", clip, half=True)
    verify_export(tmp_path / "out", clip)
    tamper(tmp_path / "out", "weights")
    with pytest.raises(UserError, match="does not reproduce the model: text_embeds differs by"):
        verify_export(tmp_path / "out", clip)


def command_line() -> Any:
    spec = importlib.util.spec_from_file_location("export_script", ROOT / "scripts" / "export.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def test_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clip = make(tmp_path)
    torch.save({"state_dict": clip.module.state_dict()}, tmp_path / "w.pt")
    arguments = [str(tmp_path / "model.json"), str(tmp_path / "out")]
    with pytest.raises(UserError, match="has no weights; give --pretrained"):
        command_line()(arguments)
    verified = []
    monkeypatch.setattr(hf, "verify_hf", lambda *of: verified.append(of))
    assert command_line()([*arguments, "--pretrained", str(tmp_path / "w.pt"), "--layout", "hf"]) == 0
    assert load_clip(f"hf:{tmp_path / 'out'}").digest == weights_digest(clip.module.state_dict())
    assert [folder for folder, _ in verified] == [tmp_path / "out"]


def test_a_file_in_the_exports_place_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "export").write_text("no folder")
    with pytest.raises(UserError, match="export is a file"), replacing(tmp_path / "export", []):
        pass
    assert (tmp_path / "export").read_text() == "no folder"
