"""Write docs/presets/: a page and a diagram for every preset, and an index: `python docs/draw_presets.py`.

Everything but the notes below is read off the networks: `lightm.lab.complexity` counts, its `diagram`
draws.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from errata import errata_lines  # isort: skip

from lightm.lab.complexity import Account, account, compare
from lightm.lab.complexity.diagram import draw_network
from lightm.lab.complexity.formulas import settings_of
from lightm.lab.complexity.report import (
    SYMBOLS,
    giga,
    grouped_rows,
    layer_rows,
    markdown,
    source_of,
    source_rows,
)
from lightm.nets.presets import PRESETS

FOLDER = Path(__file__).with_name("presets")
SPATIAL = {3: (128, 128, 128), 2: (512, 512)}
ALSO_2D = ("lightm-unet",)  # drawn in 2D too; the others differ in the same way

PAPER = "LightM-UNet, arXiv 2403.05246"
MAMBA2 = "Mamba-2, arXiv 2405.21060 (the state-space layer inside)"
MAMBA = "Mamba, arXiv 2312.00752 (the state-space layer inside)"
ULTRALIGHT = "UltraLight VM-UNet, arXiv 2403.20035 (parallel narrow state-space modules)"

_RVM = (
    "The report's Eq. 1 prints `+ s`; its text, its figure and the released code add s times the layer's input. So "
    "does this network.",
    "s is a vector over channels in the paper and one scalar in the released code; here it is the vector.",
    "The paper writes two LayerNorms for a layer; the released code uses one twice. Here there are two.",
    "The paper's Eq. 3 has a LayerNorm after the state-space recurrence; the released code has none. Here it is there.",
    "The bottleneck has three layers in one place of the report and four in another; here four, a setting "
    "(`bottleneck_layers`).",
)
_SPM = (
    "The report's figure draws four state-space modules side by side; its code, as UltraLight VM-UNet, uses one four "
    "times. `spm-lightm-unet` has four, `spm-lightm-unet-shared` one.",
    "In the report's figure the scaled residual is taken behind the first LayerNorm, unlike in RVM. So it is here.",
    "Pooling Add (max pooling plus average pooling) replaces max pooling, and the bottleneck has three layers: the "
    "report's Figure 6.",
    "s is a vector over channels and the LayerNorm after the recurrence is there, as in the paper's RVM.",
    "The four parts run as one scan, and each of their matmuls in one pass with one matrix per part.",
)
_RELEASED = (
    "Residual blocks of two layers each, with GroupNorm and ReLU before each layer; the paper describes single layers.",
    "One LayerNorm used twice in a layer, a scalar s, no LayerNorm after the recurrence; the paper has two, a vector "
    "and one.",
    "Stages 1 to 3 open with a layer that doubles the width, at the resolution of the stage before, and max pooling.",
    "Stem, decoder and head are the paper's: depthwise and pointwise convolutions, linear upsampling, GroupNorm.",
)
_MAMBA2 = (
    "One decay for a head of 16 channels (Mamba-2, section 2) instead of one for every channel and state; dt belongs "
    "to a head too, and z, x, B, C and dt all come from one projection of the layer's input ("
    "[decision 10](../decisions/0010-the-mamba-2-core.md)).",
    "LayerNorm and gate follow as in the paper's Eq. 3; Mamba-2 gates first and divides by the root mean square.",
)
_OWN = (
    "The stem is a full convolution: of one image channel a depthwise stem makes multiples of one filtered image, "
    "whose size the next LayerNorm divides out ([decision 5](../decisions/0005-the-default-network.md)).",
    "A residual depthwise convolution stands before every layer, so that each token sees its neighbours along every "
    "axis (conditional positional encoding, arXiv 2102.10882). Neither is in the paper or in the report.",
)
_MAX = (
    "The report pools by Pooling Add, the paper by the maximum, as here; the bottleneck has the three layers of the "
    "report's Figure 6. Nothing else differs from `spm-lightm-unet`."
)
_SMALL = "16 filters in place of 32: half the width everywhere."

# by the beginning of the name, the first that fits: what it is, sources, deviations
NOTES: list[tuple[str, str, tuple[str, ...], tuple[str, ...]]] = [
    (
        "lightm-unet-released",
        "The network of the code that LightM-UNet's authors released; weights trained with that code load into it.",
        (f"the code released with {PAPER}", MAMBA),
        _RELEASED,
    ),
    (
        "lightm-unet-add",
        "LightM-UNet with the report's Pooling Add (max pooling plus average pooling) in place of max pooling, so that "
        "the pooling's effect can be told from the layer's: the parameters are those of `lightm-unet`.",
        (PAPER, "the report (its Figure 6)", MAMBA),
        (*_RVM, "The paper pools by the maximum; nothing else differs from `lightm-unet`."),
    ),
    (
        "lightm-unet-mamba2",
        "LightM-UNet with the state-space core of Mamba-2 in its RVM layers; all else is `lightm-unet`.",
        (PAPER, MAMBA2),
        (*_MAMBA2, *_RVM),
    ),
    (
        "lightm-unet",
        "LightM-UNet as its paper describes it: RVM layers, max pooling.",
        (PAPER, MAMBA),
        _RVM,
    ),
    (
        "spm-lightm-unet-shared",
        "The report's network: SPM layers whose four parts share the weights of one state-space module, Pooling Add.",
        ("the report", PAPER, ULTRALIGHT, MAMBA),
        _SPM,
    ),
    (
        "spm-lightm-unet-max",
        "The report's network with the paper's max pooling in place of Pooling Add, so that the layer's effect "
        "can be told from the pooling's: the parameters are those of `spm-lightm-unet`.",
        ("the report", PAPER, ULTRALIGHT, MAMBA),
        (*(line for line in _SPM if not line.startswith("Pooling Add")), _MAX),
    ),
    (
        "spm",
        "The report's network: SPM layers (four narrow state-space modules side by side), Pooling Add.",
        ("the report", PAPER, ULTRALIGHT, MAMBA),
        _SPM,
    ),
    (
        "lightm",
        "This project's own network: the report's SPM network with a full convolution as stem, position convolutions.",
        ("the report", PAPER, ULTRALIGHT, MAMBA, "conditional positional encoding, arXiv 2102.10882"),
        (*_OWN, *_SPM[1:]),
    ),
]

OTHER = ("A variant for comparisons; its settings are below.", (PAPER, "the report", MAMBA), (*_RVM, *_SPM))


def pages(name: str) -> dict[str, str]:
    """Return the files of one preset, its page and its diagrams, by file name."""
    title, sources, deviations = next((rest for start, *rest in NOTES if name.startswith(start)), OTHER)
    three, two = (account(name, spatial=SPATIAL[dims], out_channels=classes) for dims, classes in ((3, 3), (2, 2)))
    files = {f"{name}.svg": draw_network(name)}
    pictures = [f"![{name} in 3D]({name}.svg)"]
    if name in ALSO_2D:
        files[f"{name}-2d.svg"] = draw_network(name, spatial=SPATIAL[2], out_channels=2)
        pictures += ["", "The same in 2D:", "", f"![{name} in 2D]({name}-2d.svg)"]
    lines = [
        f"# {name}",
        "",
        title + (f" {_SMALL}" if name.endswith("-small") else ""),
        "",
        "Written by `python docs/draw_presets.py`; every number is counted from the network.",
        "",
        *markdown(_summary(three, two)),
        "",
        "Sources: " + "; ".join(sources) + ".",
        "",
        *pictures,
        "",
        "## Parameters",
        "",
        "In 3D, 1 image channel, 3 classes. " + SYMBOLS,
        "",
        *markdown(source_rows(three), left=2),
        "",
        *markdown(grouped_rows(three, "stage")),
        "",
        *markdown(grouped_rows(three, "kind")),
        "",
        "## Operations",
        "",
        "For one image of 128 x 128 x 128. What counts as a multiply-add and as an exponential is said in "
        "`lightm.lab.complexity.operations` and printed by `lightm info`.",
        "",
        *markdown(layer_rows(three), left=2),
        "",
        "## Where the sources disagree",
        "",
        *(f"- {line}" for line in (*deviations, *errata_lines(three), *errata_lines(two)[1:])),
        "",
        "Settings: " + ", ".join(f"{key} {_plain(value)}" for key, value in settings_of(name, {})[1].items()) + ".",
        "",
    ]
    return {f"{name}.md": "\n".join(lines), **files}


def _summary(three: Account, two: Account) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [("", "parameters", "multiply-adds, G", "without the scan, G", "exponentials, G")]
    for cost, what in ((three, "3D, 128³, 3 classes"), (two, "2D, 512², 2 classes")):
        total = cost.operations.total
        numbers = (total.multiply_adds.total(), total.without_scan, total.exponentials.total())
        rows.append((what, f"{cost.parameters.total:,}", *map(giga, numbers)))
    return rows


def index() -> str:
    """Return the page that lists all presets."""
    rows: list[tuple[str, ...]] = [("preset", "source", "parameters", "multiply-adds, G", "exponentials, G")]
    for row in compare(list(PRESETS)):
        numbers = (f"{row.parameters:,}", giga(row.multiply_adds), giga(row.exponentials))
        rows.append((f"[`{row.name}`]({row.name}.md)", source_of(row.name), *numbers))
    return "\n".join(
        [
            "# Presets",
            "",
            "In 3D with 1 image channel and 3 classes; operations for one image of 128 x 128 x 128, the scan included. "
            "`lightm info PRESET` gives the same for other sizes and settings, `lightm info --all` adds the baselines.",
            "",
            *markdown(rows, left=2),
            "",
        ]
    )


def _plain(value: object) -> str:
    return "-".join(map(str, value)) if isinstance(value, tuple | list) else str(value)


def main() -> None:
    """Write all files."""
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / "README.md").write_text(index(), encoding="utf-8")
    for name in PRESETS:
        for file, text in pages(name).items():
            (FOLDER / file).write_text(text, encoding="utf-8")
        print(name, file=sys.stderr)


if __name__ == "__main__":
    main()
