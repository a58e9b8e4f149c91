"""Diagrams: what is drawn is what the network is; nothing overlaps; the committed pages are the generated ones."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import TextPath

from lightm.errors import InputError
from lightm.lab.complexity import build_network
from lightm.lab.complexity.diagram import draw_network, trace
from lightm.nets import PRESETS, count_parameters, create
from tests.helpers import docs_script

DOCS = Path(__file__).resolve().parents[3] / "docs"
SVG = "{http://www.w3.org/2000/svg}"
Box = tuple[float, float, float, float]


def boxes(root: ElementTree.Element) -> list[Box]:
    """(left, top, right, bottom) of every stage."""
    found = [r for r in root.iter(f"{SVG}rect") if r.get("rx")]
    sides = [[float(r.get(key, "0")) for key in ("x", "y", "width", "height")] for r in found]
    return [(x, y, x + width, y + height) for x, y, width, height in sides]


def texts(root: ElementTree.Element) -> list[tuple[str, Box]]:
    """Every text with the box that it takes up in DejaVu Sans, which is wider than most."""
    found = []
    for text in root.iter(f"{SVG}text"):
        size = float(text.get("font-size", "0"))
        font = FontProperties(family="DejaVu Sans", weight=text.get("font-weight", "normal"))
        width = TextPath((0, 0), text.text or "", size=size, prop=font).get_extents().width
        x, y = float(text.get("x", "0")), float(text.get("y", "0"))
        left = x - {"start": 0.0, "middle": 0.5, "end": 1.0}[text.get("text-anchor", "start")] * width
        found.append((text.text or "", (left, y - 0.75 * size, left + width, y + 0.2 * size)))
    return found


def overlap(one: Box, other: Box) -> bool:
    return min(one[2], other[2]) - max(one[0], other[0]) > 0.5 and min(one[3], other[3]) - max(one[1], other[1]) > 0.5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "spatial"),
    [
        *((name, (128, 128, 128)) for name in sorted(PRESETS)),
        ("lightm-unet-released", (512, 512)),
        ("spm-lightm-unet-shared", (96, 160, 160)),
    ],
)
def test_every_preset_is_drawn_without_overlaps_and_inside_of_the_picture(name: str, spatial: tuple[int, ...]) -> None:
    root = ElementTree.fromstring(draw_network(name, spatial=spatial))
    left, top, width, height = (float(number) for number in root.get("viewBox", "").split())
    stages, words = boxes(root), texts(root)
    for one, other in itertools.combinations(stages, 2):
        assert not overlap(one, other)
    for (text, one), (again, other) in itertools.combinations(words, 2):
        assert not overlap(one, other), (text, again)
    for text, box in words:
        assert box[0] >= left, text
        assert box[2] <= left + width, text
        assert box[1] >= top, text
        assert box[3] <= top + height, text
        for stage in stages:  # a text lies in a box or beside it, never across its edge
            inside = stage[0] <= box[0] and box[2] <= stage[2] and stage[1] <= box[1] and box[3] <= stage[3]
            assert inside or not overlap(stage, box), text


def test_the_drawing_tells_the_networks_parameters_layers_and_skips() -> None:
    svg = draw_network("lightm-unet-released", spatial=(32, 64, 64), out_channels=4)
    root = ElementTree.fromstring(svg)
    words = [text for text, _ in texts(root)]
    counts = [int(text.replace(",", "").split()[0]) for text in words if re.fullmatch(r"[\d,]+ parameters", text)]
    total = count_parameters(create("lightm-unet-released", 3, 1, 4))
    assert sum(counts) == total
    assert f"{total:,} parameters" in svg
    assert len([path for path in root.iter(f"{SVG}path") if path.get("stroke-dasharray")]) == 3
    for expected in (
        "image 1 × 32×64×64",
        "skip 32 × 32×64×64",
        "skip 128 × 8×16×16",
        "max pooling 256 × 4×8×8",
        "4 × residual block of 2 RVM, 256 → 256",
        "logits 4 × 32×64×64",
    ):
        assert expected in words


def test_settings_are_drawn_as_they_are_built() -> None:
    options = {"base_channels": 16, "encoder_layers": (3, 1), "bottleneck_layers": 5, "parts": 2, "pooling": "avg"}
    svg = draw_network("lightm", spatial=(16, 16), options=options)
    for expected in (
        "convolution 3², 1 → 16",
        "2 × position conv 3², SPM (2 parts) 16 → 16",
        "position conv 3², SPM (2 parts) 16 → 32",
        "5 × position conv 3², SPM (2 parts) 64 → 64",
        "average pooling 64 × 4²",
    ):
        assert f">{expected}<" in svg
    assert svg.count("stroke-dasharray") == 2


def test_skips_are_read_off_the_tensors() -> None:
    units = trace(build_network("lightm-unet", 1, 2, (32, 32)), 1, (32, 32))
    titles = [unit.title for unit in units]
    assert titles == [
        "stem", "encoder 1", "encoder 2", "encoder 3", "bottleneck", "decoder 1", "decoder 2", "decoder 3", "head"
    ]  # fmt: skip
    joined = {unit.title: titles[unit.skip_of] for unit in units if unit.skip_of is not None}
    assert joined == {"decoder 1": "encoder 3", "decoder 2": "encoder 2", "decoder 3": "encoder 1"}


def test_baselines_and_impossible_sizes_are_refused() -> None:
    with pytest.raises(InputError, match="not of baselines"):
        draw_network("unet", spatial=(32, 32))
    with pytest.raises(InputError, match="Y=20 is not divisible by 8"):
        draw_network("lightm", spatial=(20, 32))


@pytest.mark.parametrize("name", ["lightm-unet", "spm-lightm-unet-small"])
def test_the_committed_pages_are_the_generated_ones(name: str) -> None:
    for file, text in docs_script("draw_presets").pages(name).items():
        committed = (DOCS / "presets" / file).read_text(encoding="utf-8")
        assert committed == text, f"docs/presets/{file} is not what docs/draw_presets.py writes; run it"


def test_every_preset_has_its_page_in_the_index() -> None:
    index = (DOCS / "presets" / "README.md").read_text(encoding="utf-8")
    for name in PRESETS:
        assert f"({name}.md)" in index, name
        page = (DOCS / "presets" / f"{name}.md").read_text(encoding="utf-8")
        assert f"![{name} in 3D]({name}.svg)" in page
        assert f"| total |  | {count_parameters(create(name, 3, 1, 3)):,} |" in page
        assert (DOCS / "presets" / f"{name}.svg").is_file()
