"""The names that the reference must have. Needs no Sphinx."""

from importlib import import_module
from inspect import isclass, isfunction

import omnet_torchrl

# Rooms whose public names are those of ``__all__``, and rooms of which every name without an underscore is public.
LISTED = ("objectives", "updates", "training", "training.options")
OPEN = ("masks", "structures", "topology", "metrics", "grids", "envs.maze", "envs.minatar")
INTERNAL = {  # shared between rooms, and no part of what a script builds on
    *("check_masks", "check_module_masks", "check_num_subnets", "check_sparsity", "each_sparsity", "random_bits"),
    *("GridInput", "check_walls", "empty_subnets"),
}


def public_names() -> set[str]:
    """Full names. What the package itself offers is not asked for again under its room."""
    top = {name: getattr(omnet_torchrl, name) for name in omnet_torchrl.__all__}
    found = {f"omnet_torchrl.{name}" for name in top}
    for room in (*LISTED, *OPEN):
        module = import_module(f"omnet_torchrl.{room}")
        names = module.__all__ if room in LISTED else [name for name in vars(module) if not name.startswith("_")]
        for name in names:
            value = getattr(module, name)
            own = room in LISTED or ((isclass(value) or isfunction(value)) and value.__module__ == module.__name__)
            if own and top.get(name) is not value and name not in INTERNAL:
                found.add(f"{module.__name__}.{name}")
    return found
