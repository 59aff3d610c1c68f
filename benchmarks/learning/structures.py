"""Draw the sparse structures of DQN's hidden layer: which cells of the grid eight of its units see, and how often each is seen.

    python benchmarks/learning/structures.py                       # results/structures_breakout.png, of seed 0
    python benchmarks/learning/structures.py space_invaders --units 200

The structures are those of the runs of ``minatar_structures``: equally many kept weights, a function of the game and the seed.
The learned one is drawn where the run that it is taken from is there.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from experiments import EXPERIMENTS, Cell
from matplotlib import pyplot as plt
from run import RESULTS
from torch import Tensor

from omnet_torchrl.envs import MinAtarEnv
from omnet_torchrl.envs.minatar import GAMES
from omnet_torchrl.training.grid import GRID, structure
from omnet_torchrl.training.options import to_config

SHOWN = 8  # units


def masks(game: str, seed: int, units: int, results: Path = RESULTS) -> dict[str, Tensor]:
    """Each structure that there is, boolean, ``(units, cells * channels)``, by its name."""
    channels = MinAtarEnv(game).observation_spec["observation"].shape[-1]
    found = {}
    for variant in EXPERIMENTS["minatar_structures"].variants:
        options = variant.nested()
        kind = options["network"].get("structure")
        if kind is None or kind in found:
            continue
        source = results / Cell(EXPERIMENTS["minatar_structures"].variants[0], f"MinAtar/{game}", seed, 0).path
        if kind == "l1" and not (source / "run.json").exists():
            continue
        network = {**options["network"], "num_cells": [units], "structure_run": str(source) if kind == "l1" else None}
        config = to_config({"algorithm": "dqn", "env": f"MinAtar/{game}", "seed": seed, "network": network})
        found[kind] = structure(config, channels)
    return found


def draw(found: dict[str, Tensor], path: Path, title: str) -> None:
    """One line of pictures for each structure."""
    figure, axes = plt.subplots(len(found), SHOWN + 1, figsize=(1.25 * (SHOWN + 1) + 1, 1.35 * len(found) + 0.6), squeeze=False)
    for number, (line, (name, mask)) in enumerate(zip(axes, found.items(), strict=True)):
        cells = mask.view(len(mask), GRID, GRID, -1).float()
        for unit, place in enumerate(line[:SHOWN]):
            place.imshow(cells[unit].mean(-1), vmin=0, vmax=1, cmap="Blues")
            place.set_title("" if number else f"unit {unit}", fontsize=9)
        seen = cells.sum((0, -1)).numpy() / len(mask)
        image = line[SHOWN].imshow(seen, vmin=0, vmax=max(1.0, float(np.max(seen))), cmap="Oranges")
        bar = figure.colorbar(image, ax=line[SHOWN], fraction=0.046)
        bar.ax.tick_params(labelsize=7)
        line[SHOWN].set_title("" if number else "weights of a unit,\non average", fontsize=9)
        line[0].set_ylabel(name, fontsize=10)
    for place in axes.flat:
        place.set(xticks=[], yticks=[])
    figure.suptitle(title, fontsize=11)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw, and say where."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("game", nargs="?", default="breakout", choices=GAMES, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--units", type=int, default=1_000, help="of the hidden layer (default: %(default)s)")
    parser.add_argument(
        "--results", type=Path, default=RESULTS, help="folder of the runs and of the picture (default: %(default)s)"
    )
    args = parser.parse_args(arguments)
    path = args.results / f"structures_{args.game}.png"
    title = f"MinAtar {args.game}: cells that a unit sees (darker: more channels of it)"
    draw(masks(args.game, args.seed, args.units, args.results.resolve()), path, title)
    print(path)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, ImportError) as error:
        sys.exit(f"error: {error}")
