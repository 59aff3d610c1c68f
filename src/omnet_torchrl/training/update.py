r"""The update: loss, backward, optimiser and target step as one function of (state, batch, draws).

The state is a set of fixed tensors, the ones that the loss module and the optimisers hold, changed in place. With the draws
passed in there is no random number inside and nothing waits for the device: run eagerly, compiled, or captured in a CUDA graph,
the same numbers come out (to rounding), and a resumed run repeats itself.
"""

from __future__ import annotations

import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from torch import Tensor
from torch.func import grad_and_value
from torch.optim import Adam
from torch.optim.adam import adam
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.objectives import SoftUpdate

from omnet_torchrl.layers import MaskedLinear
from omnet_torchrl.metrics import action_disagreement, value_disagreement
from omnet_torchrl.objectives import OMNetSACLoss

Leaves = dict[NestedKey, Tensor]
MOMENTS = ("step", "exp_avg", "exp_avg_sq")
OPTIONS = ("lr", "betas", "eps", "weight_decay", "decoupled_weight_decay", "amsgrad", "maximize")
NETWORKS = ("actor_network_params", "qvalue_network_params", "target_qvalue_network_params")


class SACUpdate:
    """One step of critic and target, or of actor and temperature.

    Args:
        loss (OMNetSACLoss): with the parameters to train; on their device before. What needs no gradient is not trained.
        critic_optim (Adam): over the critic's parameters. Its options are read here, once: a scheduler has no effect.
        actor_optim (Adam): over the actor's parameters and ``loss.log_alpha`` (unless ``fixed_alpha``).
        target_updater (SoftUpdate): of ``loss``.

    Keyword Args:
        compile (bool): compile each step whole, with ``torch.compile(fullgraph=True)``; on a CUDA device capture it in a CUDA
            graph too. The first call then takes a while, see :meth:`prepare`. Defaults to ``True``.

    Shape:
        the batch is a TensorDict ``(B,)`` with ``loss.in_keys``, the draws are :meth:`~omnet_torchrl.OMNetSACLoss.draw`'s.
        Once compiled, every batch has the first one's shape.

    Raises:
        ValueError: an optimiser that is not over just these parameters, or is no plain Adam; a target updater that is no
            SoftUpdate of ``loss``; a loss that is not reduced to one number; a float64 temperature to be compiled on a CPU.

    .. note:: It is numerically the step of ``torch.optim.Adam`` and :class:`~torchrl.objectives.SoftUpdate`, whose own state it
        changes: their ``state_dict`` is the state of this update. Gradients never appear in ``.grad``.
    """

    def __init__(
        self,
        loss: OMNetSACLoss,
        critic_optim: Adam,
        actor_optim: Adam,
        target_updater: SoftUpdate,
        *,
        compile: bool = True,
    ):
        if loss.reduction not in ("mean", "sum"):
            raise ValueError(f"the loss's reduction must be 'mean' or 'sum', got {loss.reduction!r}.")
        if not isinstance(target_updater, SoftUpdate) or target_updater.loss_module is not loss:
            got = "one of another loss" if isinstance(target_updater, SoftUpdate) else type(target_updater).__name__
            raise ValueError(f"target_updater must be a SoftUpdate of this loss, got {got}.")
        self.loss, self.tau, self.device = loss, 1 - target_updater.eps, loss.log_alpha.device
        self.compiled = compile
        temperature = {"log_alpha": loss.log_alpha} if loss.log_alpha.requires_grad else {}
        self._critic_adam = _Adam(critic_optim, "critic_optim", _trained(loss.qvalue_network_params))
        self._actor_adam = _Adam(actor_optim, "actor_optim", {**_trained(loss.actor_network_params), **temperature})
        self._params = {name: self._fixed(name) for name in NETWORKS}
        self._params["log_alpha"] = {"log_alpha": loss.log_alpha.detach()}
        if compile and any(x.ndim == 0 and x.dtype == torch.float64 and x.device.type == "cpu" for x in self._state()):
            # torch 2.13; in torch.float32 and on other shapes it keeps them.
            raise ValueError(
                "torch.compile loses what is written to 0-dimensional float64 tensors on a CPU, here the temperature or Adam's "
                "steps: pass compile=False, or build loss and update with torch.float32 as the default dtype."
            )
        self._bound_temperature()
        self._steps: dict[str, Callable] = {} if compile else {"critic": self._critic_step, "actor": self._actor_step}

    def critic_step(self, batch: TensorDictBase, draws: TensorDictBase) -> dict[str, Tensor]:
        """Train the critic (equation 4), and move the target towards it.

        Returns:
            dict: 0-dimensional ``loss_qvalue``, ``qvalue`` (mean of the trained subnetworks' values) and ``td_error``,
            detached; read before the next step, where a graph writes them anew.
        """
        return self._step("critic", batch, draws)

    def actor_step(self, batch: TensorDictBase, draws: TensorDictBase) -> dict[str, Tensor]:
        """Train actor and temperature (equation 5).

        Returns:
            dict: 0-dimensional ``loss_actor``, ``loss_alpha``, ``entropy`` and ``alpha`` (after the step), detached.
        """
        return self._step("actor", batch, draws)

    def prepare(self, batch: TensorDictBase) -> None:
        """Compile now, for batches like ``batch``, whose values don't matter; the state is left exactly as it was.

        So is torch's global generator. Without it, the first step compiles.
        """
        if not self.compiled:
            return
        zeros = batch.apply(torch.zeros_like)
        draws = self.loss.draw(zeros, generator=torch.Generator(self.device).manual_seed(0))
        kept, steps = [tensor.clone() for tensor in self._state()], {}
        on_cuda = self.device.type == "cuda"
        try:
            with torch.random.fork_rng([self.device] if on_cuda else []), warnings.catch_warnings():
                # tensordict reads a flag that torch 2.13 no longer uses, whenever something is compiled.
                warnings.filterwarnings("ignore", message=".*inline_inbuilt_nn_modules is deprecated", category=FutureWarning)
                for name, step in (("critic", self._critic_step), ("actor", self._actor_step)):
                    steps[name] = _CUDAGraph(_compile(step), zeros, draws) if on_cuda else _compile(step)
                    steps[name](zeros, draws)
        finally:
            for tensor, value in zip(self._state(), kept, strict=True):
                tensor.copy_(value)
        self._steps = steps

    def state_dict(self) -> dict[str, Any]:
        """Everything that an update changes or reads: networks, targets, masks, temperature, moments of the optimisers."""
        optims = {"critic_optim": self._critic_adam.optim.state_dict(), "actor_optim": self._actor_adam.optim.state_dict()}
        return {"loss": self.loss.state_dict(), **optims}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a :meth:`state_dict`, into the tensors that are there.

        Raises:
            ValueError: it is the state of an optimiser with other options, which are fixed here.
        """
        self._critic_adam.check(state["critic_optim"])
        self._actor_adam.check(state["actor_optim"])
        self.loss.load_state_dict(state["loss"])
        self._critic_adam.load(state["critic_optim"])
        self._actor_adam.load(state["actor_optim"])
        for name in NETWORKS:
            for key, value in getattr(self.loss, name).items(True, True):
                self._params[name][key].copy_(value)

    @torch.no_grad()
    def disagreement(self, batch: TensorDictBase) -> dict[str, Tensor]:
        """How far the subnetworks are apart on a batch: ``subnets/q_std``, ``subnets/action_distance``, 0-dimensional."""
        loss = self.loss
        every = torch.arange(loss.num_subnets, device=self.device)
        action = batch.get(loss.tensor_keys.action)
        values = loss._qvalue(loss.qvalue_network_params, batch, action, every)
        every = torch.arange(loss.num_actor_subnets, device=self.device).view(-1, *(1 for _ in batch.batch_size))
        inputs = loss._inputs(loss.actor_network, batch, every)
        with (
            set_exploration_type(ExplorationType.DETERMINISTIC),
            loss.actor_network_params.to_module(loss.actor_network, preserve_module_state=False),
        ):
            actions = loss.actor_network(inputs).get(loss.tensor_keys.action)
        actions = actions.expand(loss.num_actor_subnets, *action.shape)
        return {"subnets/q_std": value_disagreement(values), "subnets/action_distance": action_disagreement(actions)}

    def is_finite(self) -> bool:
        """Whether parameters, target and temperature are all finite. Waits for the device."""
        return all(bool(tensor.isfinite().all()) for tensors in self._params.values() for tensor in tensors.values())

    def _state(self) -> Iterator[Tensor]:
        for tensors in self._params.values():
            yield from tensors.values()
        yield from self._critic_adam.tensors()
        yield from self._actor_adam.tensors()

    def _step(self, name: str, batch: TensorDictBase, draws: TensorDictBase) -> dict[str, Tensor]:
        if not self._steps:
            self.prepare(batch)
        return self._steps[name](batch, draws)

    def _critic_step(self, batch: TensorDictBase, draws: TensorDictBase) -> dict[str, Tensor]:
        trained = self._select("qvalue_network_params", self._critic_adam.names)

        def objective(weights: Leaves) -> tuple[Tensor, dict[str, Tensor]]:
            loss, data = self.loss.qvalue_loss(batch, draws=draws, params=self._as_params(qvalue_network_params=weights))
            return loss, {"qvalue": data["pred_value"].mean(), "td_error": data["td_error"].mean()}

        grads, (loss, data) = grad_and_value(objective, has_aux=True)(trained)
        self._critic_adam.step(trained, grads)
        target, online = self._params["target_qvalue_network_params"], self._params["qvalue_network_params"]
        for key in trained:
            target[key].lerp_(online[key], self.tau)
        return {"loss_qvalue": loss.detach(), **data}

    def _actor_step(self, batch: TensorDictBase, draws: TensorDictBase) -> dict[str, Tensor]:
        names, log_alpha = self._actor_adam.names, self._params["log_alpha"]["log_alpha"]
        trained = {**self._select("actor_network_params", names), **self._select("log_alpha", names)}

        def objective(weights: Leaves) -> tuple[Tensor, dict[str, Tensor]]:
            actor = {key: value for key, value in weights.items() if key != "log_alpha"}
            loss_actor, data = self.loss.actor_loss(batch, draws=draws, params=self._as_params(actor_network_params=actor))
            temperature = TensorDict({"log_alpha": weights.get("log_alpha", log_alpha)})
            loss_alpha = self.loss._reduced(self.loss.alpha_loss(data["log_prob"], params=temperature), batch)
            entropy = -data["log_prob"].mean()
            return loss_actor + loss_alpha, {"loss_actor": loss_actor, "loss_alpha": loss_alpha, "entropy": entropy}

        grads, (_, data) = grad_and_value(objective, has_aux=True)(trained)
        self._actor_adam.step(trained, grads)
        self._bound_temperature()
        return {**{key: value.detach() for key, value in data.items()}, "alpha": log_alpha.exp()}

    def _bound_temperature(self) -> None:
        low, high = self.loss.min_log_alpha, self.loss.max_log_alpha
        if low is not None or high is not None:
            self._params["log_alpha"]["log_alpha"].clamp_(low, high)

    def _fixed(self, name: str) -> Leaves:
        network = getattr(self.loss, name.removeprefix("target_").removesuffix("_params"))
        masked = [tuple(path.split(".")) for path, module in network.named_modules() if isinstance(module, MaskedLinear)]
        leaves = {key: value.detach() for key, value in getattr(self.loss, name).items(True, True)}
        for key, value in leaves.items():
            if value.dtype == torch.bool and key[:-1] in masked:
                # As numbers of the weights' type: 0 and 1 multiply exactly, and four times faster than booleans on a CPU.
                weight = (*key[:-1], "weight")
                leaves[key] = value.to(leaves[weight].dtype)
        return leaves

    def _select(self, name: str, keys: Any) -> Leaves:
        return {key: value for key, value in self._params[name].items() if key in keys}

    def _as_params(self, **changed: Leaves) -> TensorDict:
        params = TensorDict()
        for name, leaves in self._params.items():
            if name == "log_alpha":
                params.set(name, leaves[name])
            else:
                params.set(name, TensorDict({**leaves, **changed.get(name, {})}))
        return params


class _Adam:
    """The functional form of a ``torch.optim.Adam``, over the very tensors of its state."""

    def __init__(self, optim: Adam, name: str, params: dict[NestedKey, Tensor]):
        groups = optim.param_groups
        if type(optim) is not Adam or groups[0]["amsgrad"] or isinstance(groups[0]["lr"], Tensor):
            got = type(optim).__name__
            if type(optim) is Adam:
                got += f" with lr={groups[0]['lr']!r}, amsgrad={groups[0]['amsgrad']}"
            raise ValueError(f"{name} must be torch.optim.Adam, with a number as lr and without amsgrad, got {got}.")
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
        self.optim, self.name, self.names = optim, name, list(params)
        self.params = list(params.values())
        self.group = {key: groups[0][key] for key in OPTIONS}
        self.options = {key: value for key, value in self.group.items() if key != "betas"}
        self.options["beta1"], self.options["beta2"] = groups[0]["betas"]
        self.options["capturable"] = on_cuda = self.params[0].is_cuda
        for parameter in self.params:
            state = optim.state[parameter]
            if not state:
                state["step"] = torch.zeros(())
                for moment in MOMENTS[1:]:
                    state[moment] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            state["step"] = state["step"].to(parameter.device if on_cuda else "cpu")
        states = [optim.state[parameter] for parameter in self.params]
        self.steps, self.exp_avgs, self.exp_avg_sqs = ([state[key] for state in states] for key in MOMENTS)

    def check(self, state: dict[str, Any]) -> None:
        """Raise if a state is of other options."""
        for key, value in self.group.items():
            other = state["param_groups"][0].get(key, value)
            if other != value:
                raise ValueError(f"{self.name} has {key}={value}, the state to load has {key}={other}.")

    def load(self, state: dict[str, Any]) -> None:
        """Load the optimiser, which makes new tensors, and put their values into the fixed ones."""
        fixed = [dict(self.optim.state[parameter]) for parameter in self.params]
        self.optim.load_state_dict(state)
        for parameter, tensors in zip(self.params, fixed, strict=True):
            loaded = self.optim.state[parameter]
            for key in MOMENTS:
                loaded[key] = tensors[key].copy_(loaded[key])

    def tensors(self) -> Iterator[Tensor]:
        yield from (*self.steps, *self.exp_avgs, *self.exp_avg_sqs)

    def step(self, params: Leaves, grads: Leaves) -> None:
        adam(
            [params[name] for name in self.names],
            [grads[name] for name in self.names],
            self.exp_avgs,
            self.exp_avg_sqs,
            [],
            self.steps,
            foreach=False,
            fused=False,
            differentiable=False,
            **self.options,
        )


class _CUDAGraph:
    """A step captured once, and replayed on copies of its inputs."""

    def __init__(self, step: Callable, batch: TensorDictBase, draws: TensorDictBase):
        self.batch, self.draws = batch.clone(), draws.clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                step(self.batch, self.draws)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.output = step(self.batch, self.draws)

    def __call__(self, batch: TensorDictBase, draws: TensorDictBase) -> dict[str, Tensor]:
        self.batch.copy_(batch, non_blocking=True)
        self.draws.copy_(draws, non_blocking=True)
        self.graph.replay()
        return self.output


def _compile(step: Any) -> Callable:
    # All that a step reads but its arguments is fixed: the guards on it, hundreds, cost as much as a tenth of the step.
    def keep(guards: list[Any]) -> list[bool]:
        return [guard.guard_type == "TENSOR_MATCH" for guard in guards]

    # Torch finds what it has compiled by the code object. Without guards it would take another update's, with its learning
    # rate, for this one's; so each has a code object of its own.
    function = step.__func__
    own = types.FunctionType(function.__code__.replace(), function.__globals__, function.__name__)
    bound = types.MethodType(own, step.__self__)
    return torch.compile(bound, fullgraph=True, dynamic=False, options={"guard_filter_fn": keep})


def _trained(params: TensorDictBase) -> Leaves:
    return {key: value for key, value in params.items(True, True) if value.requires_grad}


def _join(key: NestedKey) -> str:
    return key if isinstance(key, str) else ".".join(key)
