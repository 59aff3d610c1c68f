"""Adam as a function of (state, weights, gradients), over the very tensors of a ``torch.optim.Adam``; and one for masks."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from tensordict import NestedKey, TensorDict
from torch import Tensor
from torch.optim import Adam, AdamW, Optimizer

# What is fixed when an update is compiled. The learning rate is not: it is a tensor of the state.
OPTIONS = ("betas", "eps", "weight_decay", "decoupled_weight_decay", "amsgrad", "maximize")
MOMENTS = ("exp_avg", "exp_avg_sq")
Leaves = Mapping[NestedKey, Tensor]


class LazyAdam(Adam):
    """Adam that leaves a weight alone, and its moments, in a step in which its gradient is exactly zero.

    Outside the subnetworks that an update trains, every weight's is. Plain Adam moves those too, by the momentum of earlier
    updates: in OMNet with N 5 and S 0.5, nearly half of a weight's movement. The paper does not say which it takes, most likely
    the plain one. Steps are counted for a whole tensor, as in :class:`torch.optim.SparseAdam`.

    Args and errors are those of :class:`torch.optim.Adam`.

    Examples:
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> optim = LazyAdam([weight], lr=0.1)
        >>> for gradient in ([1.0, 1.0], [1.0, 0.0]):
        ...     weight.grad = torch.tensor(gradient)
        ...     optim.step()
        >>> weight
        Parameter containing:
        tensor([0.8000, 0.9000], requires_grad=True)
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """A step of each parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        params = [param for group in self.param_groups for param in group["params"] if param.grad is not None]
        before = []
        for param in params:
            state = self.state[param]
            before.append({moment: state[moment].clone() for moment in MOMENTS if moment in state} | {"param": param.clone()})
        # Without the hooks of steps, which torch wraps around either method: they are this one's.
        step: Any = Adam.step
        (step.__wrapped__ if getattr(step, "hooked", False) else step)(self)
        for param, old in zip(params, before, strict=True):
            now = {moment: self.state[param][moment] for moment in MOMENTS} | {"param": param}
            for name, value in now.items():
                value.copy_(torch.where(param.grad == 0, old.get(name, 0.0), value))
        return loss


class AdamGroup:
    """The step of one parameter group of an optimiser, as a function that can be traced.

    It is ``torch.optim.Adam``'s arithmetic, in its order. The optimiser's own state are the tensors of :attr:`state`, or views
    of them: its ``state_dict`` is always up to date, and what is loaded into it is taken over by :meth:`follow`.

    Args:
        optim (Adam, AdamW or LazyAdam): without amsgrad.
        group (dict): one of its ``param_groups``.
        params (mapping): name to parameter; some of the group's.

    Attributes:
        state (TensorDict): ``lr ()`` in double precision, ``steps (P,)``, one count for each of P parameters, and for each
            parameter the moments ``exp_avg`` and ``exp_avg_sq``.
    """

    def __init__(self, optim: Optimizer, group: dict[str, Any], params: Leaves):
        self.optim, self.params, self.lazy = optim, dict(params), isinstance(optim, LazyAdam)
        self._place = next(i for i, each in enumerate(optim.param_groups) if each is group)
        first = next(iter(self.params.values()))
        device = first.device if first.is_cuda else torch.device("cpu")
        steps = torch.zeros(len(self.params), dtype=torch.float32, device=device)
        moments = {
            moment: TensorDict({key: torch.zeros_like(param) for key, param in self.params.items()}) for moment in MOMENTS
        }
        self.state = TensorDict({"lr": torch.zeros((), dtype=torch.float64, device=device), "steps": steps, **moments})
        own = [moments[moment].get(key).detach() for moment in MOMENTS for key in self.params]
        self._own = [
            {"step": count, **dict(zip(MOMENTS, pair, strict=True))}
            for count, pair in zip(steps.unbind(), zip(own[: len(steps)], own[len(steps) :], strict=True), strict=True)
        ]
        self._lr: Any = None
        self.follow()

    @property
    def group(self) -> dict[str, Any]:
        """The optimiser's parameter group; ``load_state_dict`` of an optimiser replaces it."""
        return self.optim.param_groups[self._place]

    @property
    def options(self) -> dict[str, Any]:
        """The options that a step is compiled with."""
        return {key: self.group.get(key, False) for key in OPTIONS}

    @torch.no_grad()
    def follow(self) -> None:
        """Take over what has been changed outside: the learning rate, and a state that was loaded into the optimiser."""
        lr = self.group["lr"]
        if isinstance(lr, Tensor):
            self.state["lr"].copy_(lr)
        elif lr != self._lr:
            self.state["lr"].fill_(lr)
            self._lr = lr
        for param, own in zip(self.params.values(), self._own, strict=True):
            state = self.optim.state[param]
            for name, tensor in own.items():
                found = state.get(name)
                if found is not tensor:
                    tensor.zero_() if found is None else tensor.copy_(torch.as_tensor(found))
                    state[name] = tensor

    def step(self, state: TensorDict, params: Leaves, grads: Leaves) -> None:
        """Move ``params`` and ``state``, a state like this one's, in place."""
        options, (beta1, beta2), lr = self.options, self.group["betas"], state.get("lr")
        steps = state.get("steps")
        steps += 1
        counts = steps.double()
        step_sizes = materialised(-lr / (1 - beta1**counts))
        corrections = materialised((1 - beta2**counts).sqrt())
        for i, name in enumerate(self.params):
            param, grad, (exp_avg, exp_avg_sq) = params[name], grads[name], (state.get(m).get(name) for m in MOMENTS)
            if self.lazy:
                idle, before = grad == 0, [tensor.clone() for tensor in (param, exp_avg, exp_avg_sq)]
            if options["maximize"]:
                grad = -grad
            if options["decoupled_weight_decay"] and options["weight_decay"]:
                param.mul_((1 - lr * options["weight_decay"]).to(param.dtype))
            elif options["weight_decay"]:
                grad = grad.add(param, alpha=options["weight_decay"])
            exp_avg.lerp_(grad, 1 - beta1)
            exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
            step_size, correction = step_sizes[i].to(param.dtype), corrections[i].to(param.dtype)
            param.add_(exp_avg * step_size / (exp_avg_sq.sqrt() / correction).add_(options["eps"]))
            if self.lazy:
                for tensor, old in zip((param, exp_avg, exp_avg_sq), before, strict=True):
                    tensor.copy_(torch.where(idle, old, tensor))


def adam_groups(optims: Sequence[Optimizer], trained: Mapping[str, Leaves]) -> dict[str, list[AdamGroup]]:
    """For each step of an update, the parameter groups of the optimisers that train its parameters.

    Args:
        optims (sequence of Optimizer): one for all parameters, or several. Entries that require no gradient (masks, where the
            parameters were taken from ``params.flatten_keys().values()``) are passed over.
        trained (mapping): name of a step to name and parameter of what it trains.

    Raises:
        ValueError: another kind of optimiser, a parameter that none of them or two of them hold, or one that no step trains.
    """
    places: dict[int, tuple[Optimizer, dict[str, Any]]] = {}
    for optim in optims:
        if type(optim) not in (Adam, AdamW, LazyAdam) or any(group.get("amsgrad") for group in optim.param_groups):
            got = type(optim).__name__ + (" with amsgrad=True" if isinstance(optim, Adam) else "")
            raise ValueError(f"optim must be torch.optim.Adam, AdamW or LazyAdam, without amsgrad, got {got}.")
        for group in optim.param_groups:
            for param in (param for param in group["params"] if param.requires_grad):
                if id(param) in places:
                    raise ValueError(f"two optimisers hold the same parameter, of shape {tuple(param.shape)}: give it to one.")
                places[id(param)] = optim, group
    names = [(step, key) for step, params in trained.items() for key in params]
    missing = [key for step, key in names if id(trained[step][key]) not in places]
    others = len(places) + len(missing) - len(names)
    if missing or others:
        listed = ", ".join(".".join(key) if isinstance(key, tuple) else key for key in missing[:3])
        listed += f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ValueError(
            f"optim must hold the {len(names)} parameters that the update trains and no others: give it loss.parameters(); "
            f"missing: {listed or 'none'}; others: {others}."
        )
    groups: dict[str, list[AdamGroup]] = {}
    for step, params in trained.items():
        parts: dict[int, tuple[Optimizer, dict[str, Any], dict[NestedKey, Tensor]]] = {}
        for key, param in params.items():
            optim, group = places[id(param)]
            parts.setdefault(id(group), (optim, group, {}))[2][key] = param
        groups[step] = [AdamGroup(*part) for part in parts.values()]
    return groups


def copied(optim: Optimizer, copies: Mapping[int, Tensor]) -> Optimizer:
    """An optimiser like ``optim``, its state too, over the copies of its parameters (by the ``id`` of each)."""
    groups = []
    for group in optim.param_groups:
        options = copy.deepcopy({name: value for name, value in group.items() if name != "params"})
        groups.append({**options, "params": [copies[id(p)] for p in group["params"] if id(p) in copies]})
    kind: Any = type(optim)
    new: Optimizer = kind(groups)
    for param in (p for group in optim.param_groups for p in group["params"] if id(p) in copies and p in optim.state):
        new.state[copies[id(param)]] = {name: torch.as_tensor(v).clone() for name, v in optim.state[param].items()}
    return new


def materialised(tensor: Tensor) -> Tensor:
    """The same numbers, computed once: Inductor would compute small tensors anew for each few of the elements they serve."""
    return tensor.as_strided(tensor.shape, tensor.stride())
