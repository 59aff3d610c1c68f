"""Adam as a function of (state, weights, gradients), over the very tensors of a ``torch.optim.Adam``; and one for masks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from tensordict import NestedKey
from torch import Tensor
from torch.optim import Adam

from omnet_torchrl.training.compiled import materialised

OPTIONS = ("lr", "betas", "eps", "weight_decay", "decoupled_weight_decay", "amsgrad", "maximize")
MOMENTS = ("exp_avg", "exp_avg_sq")


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


class FunctionalAdam:
    """The step of an optimiser, as a function that can be traced: ``torch.optim.Adam``'s arithmetic, in its order.

    Args:
        optim (Adam or LazyAdam): with one parameter group, a number as learning rate, and without amsgrad. Its options are read
            here, once.
        name (str): of the optimiser, for error messages.
        params (mapping): name to parameter; those of ``optim``, no more and no less.

    Attributes:
        names (list): of the parameters.
        state (dict): ``steps (P,)``, one count for each of P parameters, and the lists ``exp_avg`` and ``exp_avg_sq`` of
            moments. The optimiser's own state are these tensors, or views of them.

    Raises:
        ValueError: another optimiser, other parameters.
    """

    def __init__(self, optim: Adam, name: str, params: Mapping[NestedKey, Tensor]):
        groups = optim.param_groups
        kinds = Adam, LazyAdam
        if type(optim) not in kinds or groups[0]["amsgrad"] or isinstance(groups[0]["lr"], Tensor):
            got = type(optim).__name__
            if type(optim) in kinds:
                got += f" with lr={groups[0]['lr']!r}, amsgrad={groups[0]['amsgrad']}"
            raise ValueError(
                f"{name} must be torch.optim.Adam or LazyAdam, with a number as lr and without amsgrad, got {got}."
            )
        if len(groups) != 1:
            raise ValueError(f"{name} must have one parameter group, got {len(groups)}.")
        given = {id(parameter) for parameter in groups[0]["params"]}
        missing = [_join(key) for key, parameter in params.items() if id(parameter) not in given]
        others = len(given) + len(missing) - len(params)
        if missing or others:
            raise ValueError(
                f"{name} must hold the {len(params)} parameters that it trains and no others; missing: "
                f"{', '.join(missing) or 'none'}; others: {others}."
            )
        self.optim, self.name, self.names, self.lazy = optim, name, list(params), isinstance(optim, LazyAdam)
        self.params = list(params.values())
        self.options = {key: groups[0][key] for key in OPTIONS}
        device = self.params[0].device if self.params[0].is_cuda else torch.device("cpu")
        counts = [torch.as_tensor(optim.state[parameter].get("step", 0.0)) for parameter in self.params]
        self.state: dict[str, Any] = {"steps": torch.stack([count.to(device, torch.float32) for count in counts])}
        for parameter, count in zip(self.params, self.state["steps"].unbind(), strict=True):
            state = optim.state[parameter]
            for moment in MOMENTS:
                if moment not in state:
                    state[moment] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            state["step"] = count
        self.state |= {moment: [optim.state[parameter][moment] for parameter in self.params] for moment in MOMENTS}

    def step(self, state: dict[str, Any], params: Mapping[NestedKey, Tensor], grads: Mapping[NestedKey, Tensor]) -> None:
        """Move ``params`` and ``state``, a state like this one's, in place."""
        options, (beta1, beta2) = self.options, self.options["betas"]
        state["steps"] += 1
        counts = state["steps"].double()
        step_sizes = materialised(-options["lr"] / (1 - beta1**counts))
        corrections = materialised((1 - beta2**counts).sqrt())
        for i, name in enumerate(self.names):
            param, grad, exp_avg, exp_avg_sq = params[name], grads[name], *(state[moment][i] for moment in MOMENTS)
            if self.lazy:
                idle, before = grad == 0, [tensor.clone() for tensor in (param, exp_avg, exp_avg_sq)]
            if options["maximize"]:
                grad = -grad
            if options["decoupled_weight_decay"]:
                param.mul_(1 - options["lr"] * options["weight_decay"])
            elif options["weight_decay"]:
                grad = grad.add(param, alpha=options["weight_decay"])
            exp_avg.lerp_(grad, 1 - beta1)
            exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
            step_size, correction = step_sizes[i].to(param.dtype), corrections[i].to(param.dtype)
            param.add_(exp_avg * step_size / (exp_avg_sq.sqrt() / correction).add_(options["eps"]))
            if self.lazy:
                for tensor, old in zip((param, exp_avg, exp_avg_sq), before, strict=True):
                    tensor.copy_(torch.where(idle, old, tensor))

    def check(self, state: dict[str, Any]) -> None:
        """Raise if the ``state_dict`` of an optimiser is of other options."""
        for key, value in self.options.items():
            other = state["param_groups"][0].get(key, value)
            if other != value:
                raise ValueError(f"{self.name} has {key}={value}, the state to load has {key}={other}.")

    def load(self, state: dict[str, Any]) -> None:
        """Load the optimiser, which makes new tensors, and put their values into the fixed ones."""
        fixed = [dict(self.optim.state[parameter]) for parameter in self.params]
        self.optim.load_state_dict(state)
        for parameter, tensors in zip(self.params, fixed, strict=True):
            loaded = self.optim.state[parameter]
            for key in ("step", *MOMENTS):
                loaded[key] = tensors[key].copy_(loaded[key])


def _join(key: NestedKey) -> str:
    return key if isinstance(key, str) else ".".join(key)
