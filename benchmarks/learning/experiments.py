"""The paper's experiments as data: which rows, with which options, on which tasks, by how many seeds, for how many frames.

Figures and table of https://arxiv.org/abs/2310.14009. An experiment is a set of cells, a cell is one run; a cell that two
experiments share is run once.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from omnet_torchrl.training.options import ROWS

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
TASKS = ("Hopper-v4", "Walker2d-v4", "Ant-v4", "Humanoid-v4")


@dataclass(frozen=True)
class Variant:
    """A row of a figure: an algorithm, and what differs from it.

    Args:
        name (str): of its folder.
        label (str): in figures.
        algorithm (str): see :mod:`omnet_torchrl.training.options.rows`.
        options (tuple): dotted name and value of each option that differs; in a text, ``{cells}`` is the folder of the task's
            cells and ``{seed}`` the seed.
    """

    name: str
    label: str
    algorithm: str
    options: tuple[tuple[str, Any], ...] = ()

    def overrides(self, task: str, seed: int, frames: int, results: Path = Path()) -> list[str]:
        """Arguments of :attr:`example`; ``results`` is where the cells are."""
        places = {"{cells}": str(results / task), "{seed}": str(seed)}
        own = []
        for name, value in self.options:
            text = "null" if value is None else str(_listed(value))
            for place in places if isinstance(value, str) else ():
                text = text.replace(place, places[place])
            own.append(f"{name}={text}")
        return [f"algorithm={self.algorithm}", f"env={task}", f"seed={seed}", f"total_frames={frames}", *own]

    @property
    def example(self) -> Path:
        """The script that runs it."""
        scripts = {"sac": "omnet_sac.py", "td3": "omnet_td3.py", "dqn": "minatar_dqn.py", "tasks": "multitask.py"}
        return EXAMPLES / scripts[ROWS[self.algorithm].loss]

    def nested(self) -> dict[str, Any]:
        """Its algorithm and options as :func:`~omnet_torchrl.training.options.to_config` takes them."""
        options: dict[str, Any] = {"algorithm": self.algorithm}
        for name, value in self.options:
            *groups, leaf = name.split(".")
            node = options
            for group in groups:
                node = node.setdefault(group, {})
            node[leaf] = _listed(value)
        return options


def _listed(value: Any) -> Any:
    """A value as Hydra takes it: a list is a tuple here, so that variants have a hash."""
    return list(value) if isinstance(value, tuple) else value


@dataclass(frozen=True)
class Cell:
    """One run: a variant on a task with a seed, for so many frames."""

    variant: Variant
    task: str
    seed: int
    frames: int

    @property
    def row(self) -> str:
        """The variant's name; the dropout rate that a row has on this task (table 1) is that row."""
        algorithm = self.variant.algorithm
        chosen = (("network.dropout", ROWS[algorithm].dropout.get(self.task)),)
        return algorithm if self.variant.options == chosen else self.variant.name

    @property
    def path(self) -> Path:
        """Of its folder, below the results'."""
        return Path(self.task, self.row, f"seed{self.seed}")


@dataclass(frozen=True)
class Experiment:
    """A figure or table.

    Args:
        title (str): what it shows.
        variants (tuple): its rows.
        tasks (tuple): gymnasium ids. Defaults to the paper's four.
        seeds (int): of each row and task, 0 to this less one.
        frames (int): of each run.
    """

    title: str
    variants: tuple[Variant, ...]
    tasks: tuple[str, ...] = TASKS
    seeds: int = 10
    frames: int = 300_000

    def cells(self, seeds: Iterable[int] | None = None) -> list[Cell]:
        """Its cells, of its own seeds or others; those of the first come first: a part of them is a smaller experiment."""
        return [
            Cell(variant, task, seed, self.frames)
            for seed in (range(self.seeds) if seeds is None else seeds)
            for task in self.tasks
            for variant in self.variants
        ]


def _rows(*names: str) -> tuple[Variant, ...]:
    return tuple(Variant(name, ROWS[name].label, name) for name in names)


def _sweep(algorithm: str, label: str, *changes: tuple[tuple[str, Any], ...]) -> tuple[Variant, ...]:
    """Variants of a row: each change is one option or several that go together; the first one is in the name."""
    variants = []
    for change in changes:
        name, value = change[0]
        short = name.split(".")[-1]
        variants.append(Variant(f"{algorithm}-{short}-{value}", label.format(value), algorithm, change))
    return tuple(variants)


def _dropouts(algorithm: str, *rates: float) -> tuple[Variant, ...]:
    return _sweep(algorithm, f"{ROWS[algorithm].label}, dropout {{}}", *((("network.dropout", rate),) for rate in rates))


# The paper gives the scales of figure 8 and the sparsities of figure 9a in pictures only: these are ours.
_OFFSETS = (0.05, 0.1, 0.2, 0.4)
_SPARSITIES = (0.1, 0.3, 0.7, 0.9)
_DROQ, _SIN_DROQ = _dropouts("droq", 0.001, 0.003, 0.01, 0.03, 0.1), _dropouts("sin_droq", 0.001, 0.01, 0.1)
_FIG2A = _rows("sac", "sac_20", "redq", "droq", "sr_sac", "omnet")
_FIG2B = _rows("sin_sac", "sin_droq", "sr_sin_sac", "omnet")
_CONTROLS = _rows("redq_layer_norm", "sac_20_layer_norm", "sin_sac_layer_norm", "omnet_critic")
# Dropout at the masks' own rate: of one critic, and of OMNet without masks, whose networks then differ by noise alone.
_HALVES = _dropouts("sin_droq", 0.5) + _sweep(
    "omnet", "OMNet, dropout {} for masks", (("network.dropout", 0.5), ("network.sparsity", 0.0))
)


def _maze(title: str, seeds: int = 10) -> Experiment:
    options = (("init_random_frames", 1_000), ("eval.interval", 100), ("eval.bias_episodes", 0))
    # The paper has an OMNet critic in both of its rows; the others have no OMNet at all.
    labels = {"omnet": "OMNet", "omnet_critic": "a dense actor", "sac_20": "SAC-20, dense critics too"}
    labels |= {"sac_20_layer_norm": "SAC-20 + LayerNorm"}
    variants = tuple(Variant(name, label, name, options) for name, label in labels.items())
    return Experiment(title, variants, tasks=("Maze2D",), seeds=seeds, frames=31_000)


def _masks(*options: tuple[str, Any]) -> tuple[Variant, ...]:
    """Masks over weights and over units; at a sparsity of 0.29 as many weights are left as half of all."""
    unit = ("network.masks", "unit")
    return (
        Variant("omnet", "OMNet, weight masks", "omnet", options),
        Variant("omnet_unit", "OMNet, unit masks", "omnet", (unit, *options)),
        Variant("omnet_unit_29", "OMNet, unit masks, 29 % of the units", "omnet", (unit, ("network.sparsity", 0.29), *options)),
    )


def _precisions(*options: tuple[str, Any]) -> tuple[Variant, ...]:
    bfloat16 = (("precision", "bfloat16"), *options)
    return (
        Variant("omnet", "OMNet, float32", "omnet", options),
        Variant("omnet-precision-bfloat16", "OMNet, bfloat16", "omnet", bfloat16),
    )


# A window of 3 x 3 has 9 % of a grid of 10 x 10: 1,000 units with one each keep as many weights as 90 that see everything.
_GAMES = ("MinAtar/breakout", "MinAtar/space_invaders")
_GAME = (("max_episode_steps", 10_000), ("log_interval", 5_000))


def _structures() -> tuple[Variant, ...]:
    """Structures of the first layer, its weights learned or fixed, with equally many kept weights."""
    variants: list[Variant] = []
    # The run whose weights an L1 penalty thins out: its largest ones are the structure of the others. The coefficient is ours.
    source = (("network.channels", None), ("network.num_cells", (1_000,)), ("loss.l1", 1e-5))
    variants.append(Variant("dqn_l1_source", "dense, with an L1 penalty", "dqn", (*source, *_GAME)))
    for name in ("dense", "random", "spatial", "predictive", "l1"):
        units = (90,) if name == "dense" else (1_000,)
        layer = (("network.channels", None), ("network.num_cells", units))
        layer += () if name == "dense" else (("network.structure", name),)
        layer += (("network.structure_run", "{cells}/dqn_l1_source/seed{seed}"),) if name == "l1" else ()
        variants.append(Variant(f"dqn_{name}", f"{name}, learned", "dqn", (*layer, *_GAME)))
        fixed = ("network.freeze_hidden", True)
        variants.append(Variant(f"dqn_{name}_fixed", f"{name}, fixed", "dqn", (*layer, fixed, *_GAME)))
    return tuple(variants)


# 100,000 frames of each of four tasks. Each step of all of them is followed by one update with 64 transitions of each.
_GAITS = ("HalfCheetah/forward+backward+velocity_0.5+velocity_2",)
_GAIT = (
    *(("network.num_subnets", 4), ("utd_ratio", 0.25), ("init_random_frames", 20_000), ("eval.interval", 20_000)),
    *(("eval.episodes", 5), ("log_interval", 4_000)),
)


def _tasks(*names: str) -> tuple[Variant, ...]:
    return tuple(Variant(name, ROWS[name].label, name, _GAIT) for name in names)


_QUICK_START = (("utd_ratio", 8), ("policy_update_delay", 4), ("init_random_frames", 1_000), ("eval.interval", 1_000))

# SAC as DAPD's authors ran it. What they report of HalfCheetah-v2 at 1M frames, read off their poster: dense 8.5K; at 95 %
# DAPD 9.0K, RigL 4.1K. No point of theirs within 300,000 frames is known.
_DAPD = (("optim.lr", 1e-3), ("loss.alpha_init", 0.1), ("optim.target_update_interval", 2))
_NO_FREEZE = (("topology.end", None), ("topology.freeze_overlap", None), ("topology.warm_up_frames", 0))
_SPARSE = ("rigl", "set", "static_erk", "sac_small", "sac")
_DAPD_QUICK = (("utd_ratio", 4), ("policy_update_delay", 2), ("init_random_frames", 1_000), ("eval.interval", 1_000))


def _dapd(*options: tuple[str, Any], **own: tuple[tuple[str, Any], ...]) -> tuple[Variant, ...]:
    """DAPD and its comparisons under the same options; ``own`` are those of a row alone."""
    names = ("dapd", *_SPARSE)
    return tuple(Variant(name, ROWS[name].label, name, (*_DAPD, *options, *own.get(name, ()))) for name in names)


_EACH_250 = (("topology.interval", 250),)
_QUICK_MASKS = {
    "dapd": (*_EACH_250, ("topology.warm_up_frames", 2_000), ("topology.end", 3_000), ("topology.average_decay", 0.5)),
    "rigl": (*_EACH_250, ("topology.end", 5_000)),
    "set": _EACH_250,
}

EXPERIMENTS = {
    "fig2a": Experiment("Return of the methods", _FIG2A),
    "fig2b": Experiment("Return of the methods with a single critic", _FIG2B),
    "fig3": Experiment("Score against training FLOPs", tuple(dict.fromkeys((*_FIG2A, *_FIG2B, *_DROQ)))),
    "fig4": Experiment("Value bias", _rows("sin_sac", "sin_droq", "sac_20", "redq", "droq", "omnet"), tasks=("Humanoid-v4",)),
    "fig5": _maze("Return in the maze"),
    "fig6": _maze("Where an agent has been, from the first step of its policy on"),
    "fig7": _maze("The ways of the actor's subnetworks", seeds=3),
    "fig8": Experiment(
        "Return under a constant noise on the observations",
        _rows("redq", "omnet")
        + tuple(
            variant
            for name in ("redq", "omnet")
            for variant in _sweep(name, ROWS[name].label + ", noise {}", *((("observation_offset", s),) for s in _OFFSETS))
        ),
        tasks=("Humanoid-v4",),
    ),
    "fig9a": Experiment(
        "Sparsity", _rows("omnet") + _sweep("omnet", "sparsity {}", *((("network.sparsity", s),) for s in _SPARSITIES))
    ),
    "fig9b": Experiment(
        "Number of subnetworks",
        _rows("omnet", "omnet_infinity") + _sweep("omnet", "N {}", *((("network.num_subnets", n),) for n in (2, 4, 8))),
    ),
    "fig10": Experiment("Dropout rates of DroQ", _DROQ),
    "fig11": Experiment("Dropout rates of Sin-DroQ", _SIN_DROQ),
    "table1": Experiment("The best dropout rate of each task", _DROQ + _SIN_DROQ),
    "units": Experiment("Weight masks or unit masks?", _masks()),
    "units_quick": Experiment(
        "Weight masks or unit masks, as in the quick start",
        _masks(*_QUICK_START),
        tasks=("InvertedDoublePendulum-v4",),
        frames=5_000,
    ),
    "precision": Experiment("Products of bfloat16 inputs", _precisions(), tasks=("Hopper-v4",), seeds=3, frames=30_000),
    "precision_quick": Experiment(
        "Products of bfloat16 inputs, as in the quick start",
        _precisions(*_QUICK_START),
        tasks=("InvertedDoublePendulum-v4",),
        seeds=5,
        frames=5_000,
    ),
    "minatar_structures": Experiment(
        "Sparse structures of DQN's hidden layer", _structures(), tasks=_GAMES, seeds=5, frames=500_000
    ),
    "minatar": Experiment(
        "OMNet-DQN and DQN with a convolution",
        tuple(Variant(name, ROWS[name].label, name, _GAME) for name in ("omnet_dqn", "dqn", "double_dqn")),
        tasks=_GAMES,
        seeds=3,
        frames=500_000,
    ),
    "tasks": Experiment(
        "One network for four tasks, or four networks",
        (
            *_tasks("pathways", "shared_tasks", "multi_head", "separate_tasks"),
            *_sweep("pathways", "pathways, sparsity {}", (("network.sparsity", 0.75), *_GAIT)),
        ),
        tasks=_GAITS,
        seeds=3,
        frames=400_000,
    ),
    "td3_quick": Experiment(
        "OMNet-TD3 and TD3, as in the quick start",
        tuple(
            Variant(name, ROWS[name].label, name, (*options, ("exploration.noise", 0.3)))
            for name, options in (("omnet_td3", _QUICK_START), ("td3", _QUICK_START[2:]))
        ),
        tasks=("InvertedDoublePendulum-v4",),
        seeds=3,
        frames=8_000,
    ),
    "dapd": Experiment(
        "95 % sparse: masks that follow the weights, and masks that stay",
        (
            *_dapd(),
            Variant("dapd-no_freeze", "DAPD, never frozen", "dapd", (*_DAPD, *_NO_FREEZE)),
            Variant("dapd-average_decay-0.9", "DAPD, scores averaged", "dapd", (*_DAPD, ("topology.average_decay", 0.9))),
        ),
        tasks=("HalfCheetah-v4",),
        seeds=3,
    ),
    "dapd_quick": Experiment(
        "95 % sparse, as in DAPD's quick start",
        _dapd(*_DAPD_QUICK, **_QUICK_MASKS),
        tasks=("InvertedDoublePendulum-v4",),
        seeds=3,
        frames=6_000,
    ),
    "adaptive": Experiment(
        "Fixed masks, or masks that follow their own scores?",
        _rows("omnet", "omnet_adaptive"),
        tasks=("Hopper-v4",),
        seeds=3,
        frames=30_000,
    ),
    "adaptive_quick": Experiment(
        "Fixed masks, or masks that follow their own scores, as in the quick start",
        (
            Variant("omnet", "OMNet", "omnet", _QUICK_START),
            Variant("omnet_adaptive", ROWS["omnet_adaptive"].label, "omnet_adaptive", (*_QUICK_START, *_EACH_250)),
        ),
        tasks=("InvertedDoublePendulum-v4",),
        seeds=5,
        frames=5_000,
    ),
    "controls": Experiment(
        "Masks, LayerNorm or dropout?", (*_rows("omnet", "redq", "sac_20", "sin_sac"), *_CONTROLS, *_HALVES)
    ),
    "hopper_30k": Experiment(
        "A first equal budget",
        _rows("omnet", "redq", "sac_20", "droq", "sin_sac", "sin_sac_layer_norm"),
        tasks=("Hopper-v4",),
        seeds=2,
        frames=30_000,
    ),
    # Where the paper leaves something open, and what OMNet and the methods that wait as it does have in common.
    "readings": Experiment(
        "Other readings of the paper, LayerNorm and dropout",
        (
            *_rows("omnet", "omnet_critic"),
            *_sweep("omnet", "OMNet, no LayerNorm in the critic", (("network.critic_layer_norm", False),)),
            *_sweep("omnet", "OMNet, no LayerNorm in the actor", (("network.actor_layer_norm", False),)),
            *_sweep("omnet", "OMNet, output layers without masks", (("network.dense_output", True),)),
            *_sweep("omnet", "OMNet, lazy Adam", (("optim.lazy", True),)),
            *_sweep("omnet", "OMNet, drawn with replacement", (("loss.replacement", True),)),
            *_rows("sac_20", "sac_20_layer_norm"),
            *_HALVES,
        ),
        tasks=("Hopper-v4",),
        seeds=2,
        frames=30_000,
    ),
}


def known(names: Iterable[str], among: Sequence[str], what: str) -> list[str]:
    """The names, each of them one of ``among``; a ``ValueError`` lists those that are."""
    chosen = list(names)
    for name in chosen:
        if name not in among:
            closest = difflib.get_close_matches(name, among, n=1, cutoff=0)
            raise ValueError(f"unknown {what} {name!r}; known are {', '.join(among)}; did you mean {''.join(closest)}?")
    return chosen


def select(
    experiments: Iterable[str],
    rows: Iterable[str] | None = None,
    tasks: Iterable[str] | None = None,
    seeds: Iterable[int] | None = None,
    frames: int | None = None,
) -> list[Cell]:
    """The cells of some experiments, each once, within a smaller (or larger) budget.

    Args:
        experiments (iterable of str): names; ``all`` are all of them.
        rows, tasks (iterable or None): only these. ``None``: all.
        seeds (iterable or None): these, more than an experiment has too. ``None``: each experiment's own.
        frames (int or None): of each run. ``None``: each experiment's own, of a shared cell the most.

    Raises:
        ValueError: an unknown name, or nothing that is left.
    """
    names = known(experiments, [*EXPERIMENTS, "all"], "experiment")
    chosen = [EXPERIMENTS[name] for name in (EXPERIMENTS if "all" in names else names)]
    variants = list(dict.fromkeys(variant.name for each in chosen for variant in each.variants))
    wanted_rows = None if rows is None else known(rows, variants, "row")
    wanted_tasks = None if tasks is None else known(tasks, list(dict.fromkeys(t for e in chosen for t in e.tasks)), "task")
    wanted_seeds = None if seeds is None else sorted(set(seeds))
    cells: dict[Path, Cell] = {}
    for cell in (cell for each in chosen for cell in each.cells(wanted_seeds)):
        if wanted_rows is not None and cell.variant.name not in wanted_rows:
            continue
        if wanted_tasks is not None and cell.task not in wanted_tasks:
            continue
        shared = cells.get(cell.path, cell)
        cells[cell.path] = replace(shared, frames=max(shared.frames, cell.frames) if frames is None else frames)
    if not cells:
        raise ValueError(
            f"no cell is left of {', '.join(names)}: expected a seed, and a row with one of the tasks, got seeds "
            f"{wanted_seeds or []}, rows {wanted_rows}, tasks {wanted_tasks}: leave some out."
        )
    return list(cells.values())
