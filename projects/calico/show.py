"""Draw a frame: points, regions and boxes from above, and the cameras' pictures with points and boxes in them.

    python -m projects.calico.show DATA --frame 0 --out frame.png

DATA is what `projects.calico.frames.open_frames` takes, a frame a number or a token. With `--out NAME.html` the pictures
stand in a page of their own, one file that needs no other. Colours: a region each its own, ground light, all else grey;
labels green, their front marked.
"""

from __future__ import annotations

import argparse
import base64
import colorsys
import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jinja2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from projects.calico.frames import open_frames
from projects.calico.geometry import box_corners
from projects.calico.regions import PRESETS, Regions, preset_of, regions_of
from projects.calico.scenes import DRIVING_AXIS, Camera, Frame, FrameKind, Frames
from projects.calico.synthdrive import HALF_RANGE
from vlmkd.errors import UserError, run_tool
from vlmkd.files import new_file, write_text

Colour = tuple[int, int, int]
TRUTH, PREDICTION = (0, 150, 60), (220, 30, 60)
_GROUND, _REST, _PAPER, _INK = (222, 222, 226), (150, 150, 156), (255, 255, 255), (40, 40, 44)
_RING, _TEXT = (205, 205, 215), (140, 140, 150)
_LAYERS = {"road": (232, 236, 244), "crossing": (246, 228, 200), "walkway": (236, 226, 240)}
_EDGES = [(a + up, b + up) for up in (0, 4) for a, b in ((0, 1), (1, 2), (2, 3), (3, 0))] + [
    (a, a + 4) for a in range(4)
]
"""Pairs of a box's corners, see `geometry.box_corners`; corners 0, 1, 4, 5 are its front."""
_NEAREST = 0.1
"""Metres before a camera at which lines end."""


class Outlines(NamedTuple):
    """Boxes [k, >= 7] in one colour."""

    boxes: np.ndarray
    colour: Colour = TRUTH


def region_colours(region: np.ndarray, ground: np.ndarray | None = None) -> np.ndarray:
    """uint8 [n, 3] of points: neighbouring numbers get different colours."""
    hues = [
        colorsys.hsv_to_rgb(n * 0.618034 % 1, 0.9 - 0.3 * (n % 3 == 2), 0.9 - 0.25 * (n % 2))
        for n in range(int(region.max(initial=-1)) + 1)
    ]
    table = np.concatenate([np.array(hues).reshape(-1, 3) * 255, [_REST]]).astype(np.uint8)
    colours = table[region]
    if ground is not None:
        colours[ground & (region < 0)] = _GROUND
    return colours


def from_above(
    kind: FrameKind,
    points: np.ndarray,
    colours: np.ndarray,
    outlines: Sequence[Outlines] = (),
    *,
    half: float = 54.0,
    side: int = 900,
    masks: dict[str, np.ndarray] | None = None,
) -> Image.Image:
    """A square picture of what is within `half` metres, the way that the car drives up: points [n, >= 2], colours [n, 3].

    `masks`: map layers of synthdrive, [X, Y].
    """
    scale, middle = side / (2 * half), side / 2
    ahead_is_x = DRIVING_AXIS[kind] == "x"

    def place(xy: np.ndarray) -> np.ndarray:
        across, ahead = (-xy[..., 1], xy[..., 0]) if ahead_is_x else (xy[..., 0], xy[..., 1])
        return np.stack([(half + across) * scale, (half - ahead) * scale], -1)

    canvas = np.full((side, side, 3), _PAPER, np.uint8)
    v, u = np.indices((side, side)) + 0.5
    ahead, across = half - v / scale, u / scale - half
    xy = np.stack([ahead, -across] if ahead_is_x else [across, ahead], -1)
    for layer, mask in (masks or {}).items():
        cell = np.floor((xy + HALF_RANGE) / (2 * HALF_RANGE) * len(mask)).astype(int)
        there = ((cell >= 0) & (cell < len(mask))).all(-1)
        there[there] = mask[tuple(cell[there].T)]
        canvas[there] = _LAYERS.get(layer, _PAPER)
    image = Image.fromarray(canvas)
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(max(10, side // 70))
    step = 10 if half > 15 else 5
    for metres in range(step, int(half) + 1, step):
        top, bottom = middle - metres * scale, middle + metres * scale
        draw.ellipse([top, top, bottom, bottom], outline=_RING)
        draw.text((middle + 3, top + 1), f"{metres} m", fill=_TEXT, font=font)
    draw.polygon([(middle + x, middle + y) for x, y in ((0, -9), (-6, 7), (6, 7))], fill=_INK)
    for boxes, colour in outlines:
        for corners in place(box_corners(boxes[:, :7]).numpy()[:, :4, :2]):
            draw.polygon([tuple(c) for c in corners], outline=colour, width=2)
            draw.line([tuple(corners.mean(0)), tuple(corners[:2].mean(0))], fill=colour, width=2)
    canvas = np.array(image)  # points over the outlines, on which many of them lie
    order = np.argsort((colours == _GROUND).all(1) * -2 - (colours == _REST).all(1), kind="stable")
    pixels = np.floor(place(points[order, :2].astype(np.float64))).astype(int)
    size = max(2, round(0.16 * scale)) if side >= 600 else 1
    for offset in np.ndindex(size, size):
        where = pixels + offset
        inside = ((where >= 0) & (where < side)).all(1)
        canvas[where[inside, 1], where[inside, 0]] = colours[order[inside]]
    return Image.fromarray(canvas)


def camera_view(
    camera: Camera,
    points: np.ndarray,
    colours: np.ndarray,
    outlines: Sequence[Outlines] = (),
    *,
    width: int = 640,
    title: str = "",
) -> Image.Image:
    """A picture `width` pixels wide with points [n, >= 3], the nearest on top, and boxes."""
    rows, columns = camera.size
    scale = width / columns
    smooth = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
    image = Image.fromarray(camera.load()).resize((width, round(rows * scale)), smooth)
    draw = ImageDraw.Draw(image)
    to_camera = np.linalg.inv(camera.cam2lidar)

    def seen(xyz: np.ndarray) -> np.ndarray:
        return xyz @ to_camera[:3, :3].T + to_camera[:3, 3]

    def pixels(xyz: np.ndarray) -> np.ndarray:
        spots = xyz @ camera.intrinsics.T
        return (spots[..., :2] / spots[..., 2:] + 0.5) * scale

    def line(one: np.ndarray, other: np.ndarray, colour: Colour, width: int) -> None:
        if max(one[2], other[2]) <= _NEAREST:
            return
        ends = []
        for end, far in ((one, other), (other, one)):
            if end[2] < _NEAREST:
                end = end + (far - end) * (_NEAREST - end[2]) / (far[2] - end[2])
            ends.append(pixels(end))
        if np.abs(ends).max() < 1e5:
            draw.line([tuple(end) for end in ends], fill=colour, width=width)

    cloud = seen(points[:, :3].astype(np.float64))
    front = cloud[:, 2] > _NEAREST
    cloud, shades = cloud[front], colours[front]
    spots = pixels(cloud)
    inside = ((spots >= 0) & (spots < [image.width, image.height])).all(1)
    for n in np.flatnonzero(inside)[np.argsort(-cloud[inside, 2])]:
        (u, v), shade = spots[n], tuple(shades[n].tolist())
        if shade in (_GROUND, _REST):
            draw.point((u, v), fill=shade)
        else:
            size = 1.5 * max(1.0, width / 640)
            draw.ellipse([u - size, v - size, u + size, v + size], fill=shade)
    for boxes, colour in outlines:
        for corners in seen(box_corners(boxes[:, :7]).numpy().astype(np.float64)):
            for one, other in _EDGES:
                line(corners[one], corners[other], colour, 2)
            for one, other in ((0, 5), (1, 4)):  # a cross on the front
                line(corners[one], corners[other], colour, 1)
    if title:
        draw.rectangle([0, 0, 8 + 8 * len(title), 18], fill=_INK)
        draw.text((5, 2), title, fill=_PAPER, font=ImageFont.load_default(13))
    return image


def pictures(
    frame: Frame, regions: Regions, half: float, side: int = 900, found: np.ndarray | None = None
) -> dict[str, Image.Image]:
    """The picture from above, and each camera's, with true boxes and those that were `found` [k, >= 7]."""
    points, labels = frame.points[frame.key], frame.labels
    colours = region_colours(regions.region, regions.ground)
    outlines = [] if labels is None else [Outlines(labels.boxes, TRUTH)]
    outlines += [] if found is None else [Outlines(found, PREDICTION)]
    masks = labels.masks if labels and frame.frame == "synthdrive" else None
    above = from_above(frame.frame, points, colours, outlines, half=half, side=side, masks=masks)
    drawn = {"from above" if found is None else "true boxes green, found boxes red": above}
    for name, camera in frame.cameras.items():
        rows, columns = camera.size
        width = 640 if columns < 2.5 * rows else 1240  # KITTI's are three times as wide as high
        drawn[name] = camera_view(camera, points, colours, outlines, width=width, title=name)
    return drawn


def facts(frame: Frame, regions: Regions, preset: str) -> str:
    """What the frame holds, in a line."""
    rich = int((regions.region >= 0).sum())
    told = [
        f"{frame.frame} {frame.token}",
        f"{int(frame.key.sum())} points ({frame.dropped} dropped), {int(regions.ground.sum())} ground",
        f"{regions.clusters} clusters, {regions.count} regions ({preset}) with {rich} points",
        f"{len(frame.cameras)} cameras",
    ]
    return "; ".join(told + ([f"{len(frame.labels.boxes)} boxes"] if frame.labels is not None else []))


def montage(drawn: dict[str, Image.Image], title: str) -> Image.Image:
    """All pictures in one: from above on the left, cameras in two columns beside it."""
    above, *views = drawn.values()
    height, top = above.height, 26
    columns = 2 if len(views) > 2 else 1
    tile = min([height // max(1, -(-len(views) // columns))] + [view.height for view in views])
    tiles = [view.resize((round(view.width * tile / view.height), tile)) for view in views]
    wide = max([one.width for one in tiles], default=0) + 6
    sheet = Image.new("RGB", (above.width + columns * wide * bool(tiles), top + height), _PAPER)
    ImageDraw.Draw(sheet).text((6, 5), title, fill=_INK, font=ImageFont.load_default(15))
    sheet.paste(above, (0, top))
    for n, one in enumerate(tiles):
        sheet.paste(one, (above.width + 6 + n % columns * wide, top + n // columns * (tile + 4)))
    return sheet


LEGEND = (
    "Points of a region have a colour of their own, ground is light, all else grey. Labels are green with their front "
    "marked, boxes that a model found red. From above, road is tinted blue, crossings yellow, walkways violet."
)

_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
body { font: 16px/1.4 system-ui, sans-serif; margin: 1rem auto; max-width: 1500px; padding: 0 1rem; color: #222; }
.views { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); gap: .5rem; }
figure { margin: 0; } figcaption { color: #555; font-size: .85rem; }
figure:first-child { grid-column: 1 / -1; width: min(100%, 900px); margin: 0 auto 1rem; }
img { width: 100%; height: auto; display: block; border: 1px solid #ddd; }
</style>
<h1>{{ title }}</h1>
<p>{{ facts }}</p>
<p>{{ legend }}</p>
<div class="views">
{% for name, data in figures %}
<figure><img alt="{{ name }}" src="data:image/png;base64,{{ data }}"><figcaption>{{ name }}</figcaption></figure>
{% endfor %}
</div>
</html>
"""


def page(drawn: dict[str, Image.Image], title: str, told: str) -> str:
    """The pictures as a page of HTML that needs no other file."""
    figures = []
    for name, image in drawn.items():
        image.save(data := io.BytesIO(), "PNG")
        figures.append((name, base64.b64encode(data.getvalue()).decode()))
    template = jinja2.Environment(autoescape=True, trim_blocks=True).from_string(_PAGE)
    return template.render(title=title, facts=told, legend=LEGEND, figures=figures)


def find(frames: Frames, wanted: str) -> int:
    """The number of a frame, from its token or its number."""
    tokens = list(frames.tokens)
    if wanted in tokens:
        return tokens.index(wanted)
    if wanted.isdecimal() and int(wanted) < len(tokens):
        return int(wanted)
    told = f"is neither a token nor a number below {len(tokens)}; the first token is {tokens[0]}"
    raise UserError(f"--frame {wanted} {told}")


def main(argv: list[str]) -> int:
    """Run the tool; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("data", type=Path)
    add("--frame", default="0", help="its token, or its number (0)")
    add("--root", type=Path, help="folder that an info file's paths are below; else its own")
    add("--preset", default="default", help=f"of regions: {' or '.join(PRESETS)} (default)")
    add("--half", type=float, help="metres from the car to the picture's edge (54; synthdrive 24)")
    add("--out", type=Path, default=Path("frame.png"), help="a .png or .html file (frame.png)")
    options = parser.parse_args(argv)
    if options.out.suffix not in (".png", ".html"):
        raise UserError(f"--out {options.out} must end in .png or .html")
    preset = preset_of(options.preset)
    frames = open_frames(options.data, options.root, sweeps=0)
    frame = frames.read(find(frames, options.frame), labels=True)
    regions = regions_of(frame, preset)
    told = facts(frame, regions, options.preset)
    drawn = pictures(frame, regions, options.half or (24.0 if frame.frame == "synthdrive" else 54.0))
    if options.out.suffix == ".html":
        write_text(options.out, page(drawn, f"{frame.frame} {frame.token}", told), "page")
    else:
        with new_file(options.out, "picture") as partial:
            montage(drawn, told).save(partial, "PNG")
    print(f"{options.out}: {told}")
    return 0


if __name__ == "__main__":
    run_tool(main)
