"""The policy that a run leaves behind. What trained it is not read, and its environment is not made.

Nothing but torch, tensordict and torchrl is needed: ``run.json`` has the specs, and what the networks are made of.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tensordict.nn import TensorDictModuleBase
from torch import Tensor, nn
from torchrl.data import Binary, Bounded, Categorical, OneHot, TensorSpec, Unbounded

from omnet_torchrl.builders import make_actor, make_deterministic_actor
from omnet_torchrl.deterministic import SubnetQValueActor
from omnet_torchrl.grids import make_grid_qvalue_actor
from omnet_torchrl.layers import EnsembleMLP, MaskedMLP, RedrawnMLP, RunningNormalization, SharedMLP, UnitMaskedMLP
from omnet_torchrl.layers.structured import scattered
from omnet_torchrl.specs import check_action_spec, check_discrete_spec
from omnet_torchrl.training.device import resolve_device
from omnet_torchrl.training.record.checkpoint import Checkpointer, check_shapes
from omnet_torchrl.training.record.files import one_line
from omnet_torchrl.training.record.folder import RunFolder

MAKE: dict[str, Any] = {"sac": make_actor, "tasks": make_actor, "td3": make_deterministic_actor, "dqn": make_grid_qvalue_actor}
NETWORKS = {each.__name__: each for each in (EnsembleMLP, MaskedMLP, RedrawnMLP, SharedMLP, UnitMaskedMLP)}  # of an actor


def load_policy(folder: str | Path, subnet: int | None = None, *, device: torch.device | str = "cpu") -> TensorDictModuleBase:
    """The actor of a run's newest whole checkpoint, whether the run has finished, was killed or still goes on.

    It is in evaluation mode and its parameters require no gradient. Its actions are random, as in training; within TorchRL's
    ``set_exploration_type(ExplorationType.DETERMINISTIC)`` they are not; those of TD3 and DQN never are. It reads observations
    of any floating-point type, those of float64 that MuJoCo returns among them.

    Args:
        folder (str or Path): the run's folder, which holds ``run.json``.
        subnet (int or None): this subnetwork alone, an actor that reads no index. ``None`` (default): all of them, a
            :class:`~omnet_torchrl.SubnetActor` or, of TD3 and DQN, a :class:`~omnet_torchrl.SubnetDeterministicActor` or
            :class:`~omnet_torchrl.SubnetQValueActor`, which read ``"subnet"``.

    Keyword Args:
        device (torch.device or str): of the policy, whatever the run's was: cpu, cuda, cuda:1 or auto.

    Raises:
        ValueError: no run in the folder, no checkpoint yet or none that is whole, a checkpoint of other networks than
            ``run.json`` has, no such subnetwork or device. A damaged checkpoint is passed over for the one before, with a
            warning.
        TypeError: ``subnet`` is not an int.

    Examples:
        >>> policy = load_policy("runs/Hopper-v4/omnet/seed0/2026-01-31_12-00-00", subnet=3)  # doctest: +SKIP
        >>> observation, _ = gymnasium.make("Hopper-v4").reset()  # doctest: +SKIP
        >>> action = policy(TensorDict(observation=observation))["action"]  # doctest: +SKIP
    """
    where, run = resolve_device(str(device)), RunFolder.open(folder)
    loaded = Checkpointer(run.checkpoint_path).load(replay=False)
    if loaded is None:
        advice = "a run writes one at its end and, where checkpoint.interval is not 0, every so many frames"
        raise ValueError(f"{run.path} has no checkpoint yet (status: {run.info['status']}): {advice}.")
    state = loaded[0]
    # What is drawn here is replaced: nobody's random numbers move, and nobody is warned of its masks.
    with torch.random.fork_rng([where] if where.type == "cuda" else []), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            make, specs, options = _networks(run.info)
            actor = make(*specs, **options, **_structure(state["policy"], specs[0]), device=where)
        except Exception as error:  # whatever an edited file leads to
            advice = f"was it edited, or has the run not begun ({type(error).__name__}: {one_line(error)})?"
            raise ValueError(f"{run.path}/run.json must say what the actor is made of: {advice}") from error
    check_shapes(state.get("policy", {}), actor.state_dict())
    actor.load_state_dict(state["policy"])
    policy = actor if subnet is None else actor.extract(subnet)
    if not isinstance(actor, SubnetQValueActor):
        head = policy.module[0]  # of SAC, or of TD3
        (head.network if hasattr(head, "network") else head.module).register_forward_pre_hook(_as_trained)
    return policy.eval().requires_grad_(False)


def describe_policy(options: dict[str, Any], observation_spec: TensorSpec, action_spec: TensorSpec) -> dict[str, Any]:
    """What ``run.json`` keeps for :func:`load_policy`: size and bounds of the spaces, and the arguments of the actor.

    Args:
        options (dict): of :func:`~omnet_torchrl.training.build.policy_options`.
        observation_spec, action_spec (TensorSpec): of the environment.
    """
    observation = observation_spec["observation"]
    actor = {**options, "network_class": options["network_class"].__name__}
    if options["loss"] == "dqn":
        discrete = check_discrete_spec(action_spec)
        one_hot = isinstance(discrete, OneHot)
        return {
            "spaces": {"grid": list(observation.shape[-3:]), "actions": discrete.space.n, "one_hot": one_hot},
            "actor": actor,
        }
    action = check_action_spec(action_spec)
    bounds = {"low": action.space.low.tolist(), "high": action.space.high.tolist()}
    spaces = {"observation": observation.shape[-1], **bounds, "dtype": str(action.dtype).split(".")[1]}
    return {"spaces": spaces, "actor": actor}


def _as_trained(network: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The inputs of a network in the type of its weights; an index stays one."""
    dtype = next(network.parameters()).dtype
    return tuple(each.to(dtype) if each.is_floating_point() else each for each in inputs)


def _networks(info: Mapping[str, Any]) -> tuple[Any, tuple[TensorSpec, TensorSpec], dict[str, Any]]:
    """What makes the actor, the environment's specs, and the actor's arguments, as the run wrote them down."""
    kept, options = info["spaces"], info["actor"]
    given = {name: value for name, value in options.items() if name not in ("loss", "normalize")}
    if options.get("normalize"):
        given["normalize"] = RunningNormalization(kept["observation"])
    return MAKE[options["loss"]], _specs(kept), {**given, "network_class": NETWORKS[options["network_class"]]}


def _structure(state: Mapping[str, Tensor], observation_spec: TensorSpec) -> dict[str, Tensor]:
    """The structure of a checkpoint's first layer, where it has one: which of its weights there are."""
    starts = next((name for name in state if name.endswith(".starts")), None)
    if starts is None:
        return {}
    rows, columns = (state[starts.removesuffix("starts") + name] for name in ("rows", "columns"))
    shape = len(state[starts]) - 1, observation_spec.shape.numel()
    return {"structure": scattered(torch.ones_like(rows, dtype=torch.bool), rows, columns, shape)}


def _specs(kept: Mapping[str, Any]) -> tuple[TensorSpec, TensorSpec]:
    if "grid" in kept:
        return Binary(shape=kept["grid"], dtype=torch.bool), (OneHot if kept["one_hot"] else Categorical)(kept["actions"])
    low, high = (torch.tensor(kept[name], dtype=getattr(torch, kept["dtype"])) for name in ("low", "high"))
    return Unbounded((kept["observation"],)), Bounded(low, high, low.shape, dtype=low.dtype)
