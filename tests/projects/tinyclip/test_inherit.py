"""Manual inheritance: the index lists of the reference, heads kept whole, and refusals that name both sides."""

from __future__ import annotations

from typing import Any

import open_clip
import pytest
import torch
from torch import Tensor

from projects.tinyclip.axes import magnitude_scores, tensor_axes
from projects.tinyclip.inherit import (
    Inheritance,
    inherit,
    select_layers,
)
from vlmkd.errors import UserError


def vit(
    width: int, layers: int, text_width: int, text_layers: int, head: int = 16, **changes: Any
) -> dict[str, Any]:
    config: dict[str, Any] = {
        "embed_dim": 24,
        "vision_cfg": {
            "image_size": 32,
            "patch_size": 8,
            "width": width,
            "layers": layers,
            "head_width": head,
        },
        "text_cfg": {
            "context_length": 12,
            "vocab_size": 40,
            "width": text_width,
            "heads": text_width // head,
            "layers": text_layers,
        },
    }
    for key, value in changes.items():
        section, _, name = key.partition("__")
        if name:
            config[section] = {**config[section], name: value}
        else:
            config[section] = value
    return config


def resnet(width: int, layers: list[int], image_size: int = 64) -> dict[str, Any]:
    config = vit(64, 2, 32, 2)
    config["vision_cfg"] = {"image_size": image_size, "width": width, "layers": layers, "head_width": 64}
    return config


def state_of(config: dict[str, Any], seed: int = 0) -> dict[str, Tensor]:
    """A random state dict in which every number is different enough to be told apart."""
    torch.manual_seed(seed)
    model = open_clip.CLIP(**config)
    return {
        name: torch.randn(tensor.shape) if tensor.is_floating_point() else tensor + 5
        for name, tensor in model.state_dict().items()
    }


def load(config: dict[str, Any], result: Inheritance) -> open_clip.CLIP:
    model = open_clip.CLIP(**config)
    left = model.load_state_dict(result.state, strict=False)
    assert left.missing_keys == ["logit_scale"] and not left.unexpected_keys
    return model.eval()


@pytest.mark.parametrize(
    ("depth", "count", "expected"),
    [
        (12, 6, [0, 2, 4, 6, 8, 10]),
        (12, 3, [0, 4, 8]),
        (12, 9, list(range(9))),
        (9, 6, list(range(6))),
        (12, 10, list(range(10))),
        (12, 12, list(range(12))),
        (12, 1, [0]),
    ],
)
def test_interval_front_layers(depth: int, count: int, expected: list[int]) -> None:
    assert select_layers(depth, count, "interval_front", "x") == expected


def test_uniform_layers_span_the_whole_depth() -> None:
    assert select_layers(12, 6, "uniform", "x") == [0, 2, 4, 7, 9, 11]
    assert select_layers(12, 1, "uniform", "x") == [0]
    for depth in range(1, 30):
        for count in range(1, depth + 1):
            layers = select_layers(depth, count, "uniform", "x")
            assert len(set(layers)) == count and layers == sorted(layers) and layers[0] == 0
            assert count == 1 or layers[-1] == depth - 1


TEACHER = vit(64, 12, 48, 12)


def front(teacher: dict[str, Tensor], name: str, source: str, heads: int | None, shape: torch.Size) -> Tensor:
    """The reference's slice: leading heads of q, k and v each, and the leading entries elsewhere."""
    value = teacher[source]
    if heads is not None and "in_proj" in name:
        split = value.view(3, -1, 16, *value.shape[1:])[:, :heads]
        value = split.reshape(-1, *value.shape[1:])
    return value[tuple(slice(size) for size in shape)]


@pytest.mark.parametrize(
    ("layers", "width", "text_width"), [(9, 48, 32), (6, 32, 48), (3, 64, 16), (10, 16, 16)]
)
def test_front_cut_equals_the_reference_slices(layers: int, width: int, text_width: int) -> None:
    student = vit(width, layers, text_width, layers)
    teacher = state_of(TEACHER)
    result = inherit(teacher, TEACHER, student)
    model = load(student, result)
    step = 12 // layers
    for name, tensor in model.state_dict().items():
        if name == "logit_scale":
            continue
        source, heads = name, None
        if "resblocks." in name:
            before, _, after = name.partition("resblocks.")
            index, _, rest = after.partition(".")
            source = f"{before}resblocks.{int(index) * step}.{rest}"
            heads = (width if name.startswith("visual") else text_width) // 16
        assert torch.equal(tensor, front(teacher, name, source, heads, tensor.shape)), name
    total = sum(p.numel() for p in model.parameters()) - 1
    assert sum(report.elements for report in result.towers) == total


def test_qkv_keeps_whole_leading_heads_of_published_sizes() -> None:
    """ViT-B widths 768 -> 640, 512, 256: rows 0..H'*64 of q, of k and of v."""
    torch.manual_seed(0)
    rows = torch.arange(3 * 768, dtype=torch.float32)
    for width in (640, 512, 256):
        teacher, student = (vit(size, 1, 64, 1, head=64) for size in (768, width))
        with torch.device("meta"):
            shapes = {name: t.shape for name, t in open_clip.CLIP(**teacher).visual.state_dict().items()}
        state = {f"visual.{name}": torch.zeros(shape) for name, shape in shapes.items()}
        state["visual.transformer.resblocks.0.attn.in_proj_bias"] = rows
        result = inherit(state, teacher, student, tower="image")
        taken = result.state["visual.transformer.resblocks.0.attn.in_proj_bias"].tolist()
        assert taken == [part * 768 + row for part in range(3) for row in range(width)]
        assert result.state["visual.transformer.resblocks.0.mlp.c_fc.weight"].shape == (4 * width, width)


def test_a_student_of_the_teachers_size_is_the_teacher() -> None:
    torch.manual_seed(0)
    teacher = open_clip.CLIP(**TEACHER).eval()
    for layer_select in ("interval_front", "uniform", list(range(12))):
        for width_select in ("front", "magnitude"):
            result = inherit(
                teacher.state_dict(), TEACHER, TEACHER, layer_select=layer_select, width_select=width_select
            )
            images = torch.randn(2, 3, 32, 32)
            assert torch.equal(load(TEACHER, result).encode_image(images), teacher.encode_image(images))
    assert not any(report.units for report in result.towers)


def test_unused_units_can_be_cut_without_changing_the_function() -> None:
    """A teacher whose unit groups are padded with dead heads and channels: magnitude and lists find the live ones."""
    live = [1, 3]
    teacher_config = vit(64, 2, 64, 2, head=16)
    student_config = vit(64, 2, 64, 2, head=16, vision_cfg__mlp_ratio=2.0, text_cfg__mlp_ratio=2.0)
    torch.manual_seed(1)
    teacher = open_clip.CLIP(**teacher_config).eval()
    channels = torch.randperm(256)[:128].sort().values
    dead = torch.ones(256, dtype=torch.bool)
    dead[channels] = False
    with torch.no_grad():
        for stack in (teacher.visual.transformer, teacher.transformer):
            for block in stack.resblocks:
                block.mlp.c_fc.weight[dead] = block.mlp.c_fc.weight[dead] * 1e-4
                block.mlp.c_proj.weight[:, dead] = 0
    images, tokens = torch.randn(2, 3, 32, 32), torch.randint(0, 40, (2, 12))
    for select in ("magnitude", {"mlp": channels.tolist()}):
        result = inherit(teacher.state_dict(), teacher_config, student_config, width_select=select)
        student = load(student_config, result)
        with torch.no_grad():
            assert (student.encode_image(images) - teacher.encode_image(images)).abs().max() < 1e-5
            assert (student.encode_text(tokens) - teacher.encode_text(tokens)).abs().max() < 1e-5
        assert result.towers[0].units["visual.transformer.resblocks.1.mlp"] == channels.tolist()
    # Heads: with the output columns of dead heads at zero, two heads of four compute the same attention.
    block = teacher.visual.transformer.resblocks[0]
    with torch.no_grad():
        block.attn.out_proj.weight[:, :16] = block.attn.out_proj.weight[:, 32:48] = 0
    scores = magnitude_scores(
        {"w": block.attn.out_proj.weight.detach()},
        {"w": tensor_axes("visual.transformer.resblocks.0.attn.out_proj.weight", 16, resnet=False)},
    )
    group = scores["visual.transformer.resblocks.0.heads"]
    assert group.argsort(descending=True)[:2].sort().values.tolist() == live
    assert group.sum().item() == pytest.approx(4.0)


def test_magnitude_is_one_choice_for_the_whole_tower_and_ignores_scale() -> None:
    teacher = state_of(TEACHER)
    student = vit(32, 6, 32, 6)
    result = inherit(teacher, TEACHER, student, width_select="magnitude")
    hidden = result.towers[0].units["hidden"]
    assert len(hidden) == 32 and hidden == sorted(hidden) != list(range(32))
    assert torch.equal(result.state["visual.ln_post.weight"], teacher["visual.ln_post.weight"][hidden])
    assert torch.equal(result.state["visual.proj"], teacher["visual.proj"][hidden])
    # Independent score: shares of squared norm, matrix by matrix of the selected layers.
    score = torch.zeros(64, dtype=torch.float64)
    kept = [f"resblocks.{layer}." for layer in (0, 2, 4, 6, 8, 10)]
    for name, tensor in teacher.items():
        if not name.startswith("visual.") or tensor.ndim < 2 or name == "visual.positional_embedding":
            continue
        if "resblocks" in name and not any(part in name for part in kept):
            continue
        for dim in range(tensor.ndim):
            hidden_axis = (
                dim == 0
                if name.endswith(("conv1.weight", "proj", "out_proj.weight", "c_proj.weight"))
                else dim == 1
            )
            if hidden_axis:
                share = tensor.double().square().transpose(0, dim).flatten(1).sum(dim=1)
                score += share / share.sum() * 64
    assert hidden == sorted(score.argsort(descending=True)[:32].tolist())
    scaled = {
        name: tensor * (1000.0 if "3.mlp" in name or "conv1" in name else 1.0)
        for name, tensor in teacher.items()
    }
    again = inherit(scaled, TEACHER, student, width_select="magnitude")
    assert again.towers[0].units == result.towers[0].units


def test_explicit_lists() -> None:
    teacher = state_of(TEACHER)
    student = vit(32, 2, 32, 2)
    chosen = list(range(1, 64, 2))
    result = inherit(
        teacher,
        TEACHER,
        student,
        tower="image",
        layer_select=[3, 7],
        width_select={"hidden": chosen, "heads": [3, 0]},
    )
    assert set(name.split(".")[0] for name in result.state) == {"visual"}
    weight = result.state["visual.transformer.resblocks.1.attn.in_proj_weight"]
    source = teacher["visual.transformer.resblocks.7.attn.in_proj_weight"].view(3, 4, 16, 64)
    assert torch.equal(weight, source[:, [3, 0]][..., chosen].reshape(96, 32))
    out = teacher["visual.transformer.resblocks.3.attn.out_proj.weight"].view(64, 4, 16)
    assert torch.equal(
        result.state["visual.transformer.resblocks.0.attn.out_proj.weight"], out[chosen][:, [3, 0]].flatten(1)
    )
    assert torch.equal(
        result.state["visual.transformer.resblocks.0.mlp.c_fc.weight"],
        teacher["visual.transformer.resblocks.3.mlp.c_fc.weight"][:128][:, chosen],
    )
    assert torch.equal(result.state["visual.conv1.weight"], teacher["visual.conv1.weight"][chosen])


@pytest.mark.parametrize(("width", "blocks"), [(56, [3, 4, 6, 3]), (44, [2, 2, 3, 1])])
def test_resnet_front_cut_equals_leading_slices(width: int, blocks: list[int]) -> None:
    teacher_config, student_config = resnet(64, [3, 4, 6, 3]), resnet(width, blocks)
    teacher = state_of(teacher_config)
    result = inherit(teacher, teacher_config, student_config, tower="image")
    model = open_clip.CLIP(**student_config)
    model.load_state_dict(result.state, strict=False)
    steps = {
        f"layer{stage + 1}": full // kept
        for stage, (full, kept) in enumerate(zip([3, 4, 6, 3], blocks, strict=True))
    }
    for name, tensor in model.visual.state_dict().items():
        source = name
        if name.startswith("layer"):
            stage, index, rest = name.split(".", 2)
            source = f"{stage}.{int(index) * steps[stage]}.{rest}"
        assert torch.equal(
            tensor, teacher[f"visual.{source}"][tuple(slice(size) for size in tensor.shape)]
        ), name
    heads = width * 32 // 64
    assert model.visual.attnpool.num_heads == heads
    assert torch.equal(
        result.state["visual.attnpool.q_proj.weight"],
        teacher["visual.attnpool.q_proj.weight"][: heads * 64, : width * 32],
    )
    buffers = sum(tensor.numel() for tensor in model.visual.buffers())
    assert result.towers[0].elements == sum(p.numel() for p in model.visual.parameters()) + buffers
    assert result.state["visual.bn1.num_batches_tracked"] == 5
    assert result.towers[0].layers["visual.layer3"] == [i * steps["layer3"] for i in range(blocks[2])]


def test_resnet_magnitude_keeps_a_network_without_its_dead_channels() -> None:
    teacher_config, student_config = resnet(8, [1, 2, 1, 1]), resnet(4, [1, 2, 1, 1])
    teacher_config["vision_cfg"]["head_width"] = student_config["vision_cfg"]["head_width"] = 16
    result = inherit(
        state_of(teacher_config), teacher_config, student_config, tower="image", width_select="magnitude"
    )
    model = open_clip.CLIP(**student_config)
    assert not model.load_state_dict(result.state, strict=False).unexpected_keys
    report = result.towers[0]
    state, teacher = result.state, state_of(teacher_config)
    stream = report.units["layer2"]
    assert len(stream) == 32 and stream != list(range(32))
    for name in (
        "visual.layer2.0.bn3.running_var",
        "visual.layer2.1.bn3.weight",
        "visual.layer2.0.downsample.1.bias",
    ):
        assert torch.equal(state[name], teacher[name][stream])
    assert torch.equal(
        state["visual.layer3.0.conv1.weight"],
        teacher["visual.layer3.0.conv1.weight"][report.units["layer3.0.conv1"]][:, stream],
    )
    heads = report.units["attnpool.heads"]
    columns = [head * 16 + offset for head in heads for offset in range(16)]
    assert torch.equal(
        state["visual.attnpool.c_proj.weight"], teacher["visual.attnpool.c_proj.weight"][:, columns]
    )


def test_positions_are_interpolated_or_refused() -> None:
    teacher = state_of(TEACHER)
    student = vit(32, 6, 32, 6, vision_cfg__image_size=48, text_cfg__context_length=8)
    result = inherit(teacher, TEACHER, student)
    load(student, result)
    table = teacher["visual.positional_embedding"]
    assert result.state["visual.positional_embedding"].shape == (37, 32)
    assert torch.equal(result.state["visual.positional_embedding"][0], table[0, :32])
    assert result.towers[0].interpolated and not result.towers[1].interpolated
    assert torch.equal(result.state["positional_embedding"], teacher["positional_embedding"][:8, :32])
    # The resize is open_clip's own.
    larger = {**TEACHER, "vision_cfg": {**TEACHER["vision_cfg"], "image_size": 48}}
    resized = {"visual.positional_embedding": table.clone()}
    open_clip.model.resize_pos_embed(resized, open_clip.CLIP(**larger))
    ours = inherit(teacher, TEACHER, larger).state["visual.positional_embedding"]
    assert torch.allclose(ours, resized["visual.positional_embedding"], atol=1e-6)
    with pytest.raises(UserError, match="4x4 grid.*6x6.*positions=interpolate"):
        inherit(teacher, TEACHER, student, positions="refuse")
    rn = resnet(8, [1, 1, 1, 1])
    bigger = inherit(state_of(rn), rn, resnet(8, [1, 1, 1, 1], image_size=96), tower="image")
    assert bigger.state["visual.attnpool.positional_embedding"].shape == (10, 256)


def test_two_sources_are_merged() -> None:
    image, text = vit(64, 4, 32, 2), vit(32, 2, 48, 6)
    student = vit(32, 2, 32, 3)
    image_state, text_state = state_of(image, 1), state_of(text, 2)
    result = inherit(image_state, image, student, tower="image").merge(
        inherit(text_state, text, student, tower="text")
    )
    load(student, result)
    assert torch.equal(result.state["visual.class_embedding"], image_state["visual.class_embedding"][:32])
    assert torch.equal(result.state["ln_final.weight"], text_state["ln_final.weight"][:32])
    text_report = result.describe()
    assert "image tower:" in text_report and "transformer.resblocks: layers 0, 2, 4 (3)" in text_report
    assert "hidden: units 0..31" in text_report


@pytest.mark.parametrize(
    ("student", "words"),
    [
        (vit(32, 13, 32, 6), "image tower.*student has 13 layers, its source 12"),
        (vit(32, 6, 32, 14), "text tower.*student has 14 layers, its source 12"),
        (vit(80, 6, 32, 6), "image tower: the student has 80 units of hidden.*its source 64"),
        (vit(32, 6, 64, 6), "text tower: the student has 64 units of hidden.*its source 48"),
        (vit(32, 6, 32, 6, head=32), "heads are 16 wide in the source and 32 in the student"),
        (vit(32, 6, 32, 6, quick_gelu=True), "source uses GELU, the student QuickGELU.*quick_gelu: false"),
        (vit(32, 6, 32, 6, vision_cfg__mlp_ratio=16.0), r"512 units of .*mlp.*its source 256"),
        (vit(32, 6, 32, 6, vision_cfg__patch_size=4), "patches of 8 pixels, the student of 4.*patch_size: 8"),
        (vit(32, 6, 32, 6, text_cfg__context_length=20), "20 units of positions.*its source 12"),
        (vit(32, 6, 32, 6, text_cfg__vocab_size=39), "vocabulary"),
        (vit(32, 6, 32, 6, embed_dim=32), "32 units of embedding.*its source 24"),
        (resnet(8, [1, 1, 1, 1]), "source is a transformer, the student a ResNet"),
        (vit(32, 6, 32, 6, vision_cfg__ls_init_value=0.1), "source has no .*ls_1.gamma"),
        (vit(32, 6, 32, 6, text_cfg__proj_bias=True), "source has no text_projection.weight"),
    ],
)
def test_refusals_name_both_sides(student: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        inherit(state_of(TEACHER), TEACHER, student)


def test_activation_change_can_be_allowed() -> None:
    student = vit(32, 6, 32, 6, quick_gelu=True)
    assert inherit(state_of(TEACHER), TEACHER, student, allow_activation_change=True).state


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"layer_select": [0, 1]}, r"must name 6 layers of 0\.\.11"),
        ({"layer_select": [0, 1, 2, 3, 4, 12]}, r"of 0\.\.11"),
        ({"width_select": {"hiden": [0]}}, "no group hiden.*hidden"),
        ({"width_select": {"hidden": [0, 0, 1]}}, "32 different units of 0..63"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        inherit(state_of(TEACHER), TEACHER, vit(32, 6, 32, 6), tower="image", **options)


def test_a_list_of_layers_is_for_transformers() -> None:
    teacher, student = resnet(8, [1, 2, 2, 1]), resnet(8, [1, 1, 1, 1])
    with pytest.raises(UserError, match="list of layers is for transformers"):
        inherit(state_of(teacher), teacher, student, tower="image", layer_select=[0, 0, 0, 0])
