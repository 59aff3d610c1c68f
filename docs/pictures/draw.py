"""Draws the pictures of the site: ``python docs/pictures/draw.py`` writes ``idea.svg`` and ``masks.png`` beside it."""

from pathlib import Path

import matplotlib
import torch
from torch import Tensor

from omnet_torchrl import bernoulli_masks, unit_masks
from omnet_torchrl.structures import random_structure, spatial_structure

matplotlib.use("agg")
from matplotlib import pyplot

HERE = Path(__file__).parent
ROWS, COLUMNS, CELL = 6, 6, 16
BLUE, INK, PALE, ORANGE = "#2b6cb0", "#1a202c", "#e2e8f0", "#dd6b20"


def text(
    x: float, y: float, content: str, size: int = 14, anchor: str = "middle", fill: str = INK, weight: str = "normal"
) -> str:
    """A line of text."""
    style = f'font-size="{size}" text-anchor="{anchor}" fill="{fill}" font-weight="{weight}"'
    return f'<text x="{x}" y="{y}" {style}>{content}</text>'


def matrix(x: float, y: float, value: Tensor, colour: str, frame: str = INK, width: float = 1.2, cell: int = CELL) -> str:
    """A matrix of numbers in [0, 1] as shades of a colour."""
    cells = [
        f'<rect x="{x + j * cell}" y="{y + i * cell}" width="{cell}" height="{cell}" fill="{colour}" '
        f'fill-opacity="{float(value[i, j]):.2f}" stroke="{PALE}" stroke-width="0.6"/>'
        for i in range(len(value))
        for j in range(value.shape[1])
    ]
    sides = f'width="{value.shape[1] * cell}" height="{len(value) * cell}"'
    return "".join([*cells, f'<rect x="{x}" y="{y}" {sides} fill="none" stroke="{frame}" stroke-width="{width}"/>'])


def arrow(x1: float, y1: float, x2: float, y2: float, colour: str = INK) -> str:
    """A line with a head at its end."""
    head = "head" if colour == INK else "chosen"
    return f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="{colour}" stroke-width="1.8" marker-end="url(#{head})"/>'


def box(x: float, y: float, width: float, height: float, colour: str) -> str:
    """A rounded box."""
    return f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="8" fill="#fff" stroke="{colour}" stroke-width="1.5"/>'


def idea() -> str:
    """Weights, masks and index: one network that is N."""
    generator = torch.Generator().manual_seed(3)
    weights = 0.25 + 0.75 * torch.rand(ROWS, COLUMNS, generator=generator)
    masks = bernoulli_masks(5, (ROWS, COLUMNS), 0.5, generator=7).float()
    side, small = ROWS * CELL, 10
    parts = [text(16, 130, "one weight tensor θ", 15, "start", weight="bold"), matrix(30, 150, weights, BLUE)]
    parts += [text(16, 150 + side + 24, "shared by all of them", 12, "start", fill="#4a5568")]
    parts += [text(163, 203, "⊙", 26), text(275, 40, "N fixed binary masks", 15, weight="bold")]
    for k, mask in enumerate(masks):
        y = 66 + k * 68
        chosen = k == 2
        parts += [text(216, y + 34, f"m<tspan dy='4' font-size='10'>{k}</tspan>", 15)]
        parts += [matrix(240, y, mask, INK, ORANGE if chosen else INK, 3 if chosen else 1.2, small)]
    parts += [box(352, 184, 140, 52, ORANGE), text(422, 206, '"subnet"', 15, fill=ORANGE, weight="bold")]
    parts += [text(422, 226, "= 2, an integer", 13), arrow(352, 226, 310, 231, ORANGE)]
    parts += [text(422, 262, "drawn at reset, for an episode", 12, fill="#4a5568")]
    parts += [text(422, 279, "or by the loss, for an update", 12, fill="#4a5568")]
    parts += [arrow(494, 210, 545, 200)]
    parts += [
        text(556 + side / 2, 130, "subnetwork 2", 15, weight="bold"),
        matrix(556, 150, weights * masks[2], BLUE, ORANGE, 2.5),
    ]
    parts += [text(556 + side / 2, 150 + side + 24, "θ ⊙ m<tspan dy='4' font-size='10'>2</tspan>", 15)]
    parts += [
        arrow(662, 198, 704, 198),
        text(712, 204, "π<tspan dy='4' font-size='11'>2</tspan><tspan dy='-4'>(a | s)</tspan>", 17, "start"),
    ]
    asked = [
        ("critic", "train one,", "against the smaller of two others", [1], [0, 3]),
        ("actor", "train one of its own,", "against the mean of all critics", [], [0, 1, 2, 3, 4]),
        ("episode", "play one,", "from reset to end", [2], []),
    ]
    for i, (who, first, second, trained, others) in enumerate(asked):
        x = 30 + i * 265
        parts += [box(x, 430, 245, 84, "#a0aec0"), text(x + 16, 456, who, 15, "start", weight="bold")]
        parts += [text(x + 16, 478, first, 13, "start"), text(x + 16, 497, second, 13, "start")]
        for k in range(5):
            colour = ORANGE if k in trained else BLUE if k in others else "#fff"
            parts += [f'<circle cx="{x + 118 + k * 24}" cy="451" r="9" fill="{colour}" stroke="{INK}" stroke-width="1"/>']
    markers = "".join(
        f'<marker id="{name}" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path d="M 0 0 L 10 5 L 0 10 z" fill="{colour}"/></marker>'
        for name, colour in (("head", INK), ("chosen", ORANGE))
    )
    title = "One weight tensor under N binary masks is N subnetworks; an index chooses one"
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 820 535" role="img" '
        f'font-family="system-ui, sans-serif"><title>{title}</title><defs>{markers}</defs>'
        f'<rect width="820" height="535" rx="10" fill="#fff"/>{"".join(parts)}</svg>\n'
    )


def masks_figure() -> None:
    """What masks of a layer look like, by family."""
    units, grid = 32, (5, 5, 1)
    panels = [(f"weights, {k}", bernoulli_masks(5, (units, 25), 0.5, generator=0)[k]) for k in range(3)]
    kept_units, kept_inputs = (unit_masks(5, count, 0.5, generator=seed) for seed, count in enumerate((units, 25)))
    panels += [(f"units, {k}", kept_units[k][:, None] & kept_inputs[k][None]) for k in range(3)]
    panels += [("structure: random", random_structure(units, 25, 9, generator=0))]
    panels += [("structure: spatial", spatial_structure(units, grid, 3, generator=0))]
    figure, axes = pyplot.subplots(1, len(panels), figsize=(11, 2.2), layout="constrained")
    for axis, (title, mask) in zip(axes, panels, strict=True):
        axis.imshow(mask, cmap="gray_r", interpolation="nearest", aspect="auto", vmin=0, vmax=1)
        axis.set(title=title, xticks=[], yticks=[])
        axis.title.set_fontsize(9)
    axes[0].set(xlabel="inputs", ylabel="units")
    figure.savefig(HERE / "masks.png", dpi=150, metadata={"Software": None})


if __name__ == "__main__":
    (HERE / "idea.svg").write_text(idea())
    masks_figure()
