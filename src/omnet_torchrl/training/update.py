r"""The update: loss, backward, optimiser and target step as one function of (state, batch, draws).

The state is a set of fixed tensors, the ones that the loss module and the optimisers hold, changed in place. With the draws
passed in there is no random number inside and nothing waits for the device: run eagerly, compiled, or captured in a CUDA graph,
the same numbers come out (to rounding), and a resumed run repeats itself.
"""

from __future__ import annotations

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

from omnet_torchrl.metrics import action_disagreement, value_disagreement
from omnet_torchrl.objectives import OMNetSACLoss

Leaves = dict[NestedKey, Tensor]
MOMENTS = ("step", "exp_avg", "exp_avg_sq")
NETWORKS = ("actor_network_params", "qvalue_network_params", "target_qvalue_network_params")


class SACUpdate:
    """One step of critic and target, or of actor and temperature.

    Args:
        loss (OMNetSACLoss): with the parameters to train; on their device before.
        critic_optim (Adam): over the critic's parameters.
        actor_optim (Adam): over the actor's parameters and ``loss.log_alpha``.
        target_updater (SoftUpdate): of ``loss``.

    Keyword Args:
        compile (bool): compile each step whole, with ``torch.compile(fullgraph=True)``; on a CUDA device capture it in a CUDA
            graph too. The first two calls then take a while, see :meth:`prepare`. Defaults to ``True``.

    Shape:
        the batch is a TensorDict ``(B,)`` with ``loss.in_keys``, the draws are :meth:`~omnet_torchrl.OMNetSACLoss.draw`'s.
        Once compiled, every batch has the first one's shape.

    Raises:
        ValueError: an optimiser that is not over just these parameters, or uses an option of Adam that is not elementwise.

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
        self.loss, self.tau, self.device = loss, 1 - target_updater.eps, loss.log_alpha.device
        self.compiled = compile
        self._critic_adam = _Adam(critic_optim, "critic_optim", dict(_trained(loss.qvalue_network_params)))
        self._actor_adam = _Adam(
            actor_optim, "actor_optim", {**dict(_trained(loss.actor_network_params)), "log_alpha": loss.log_alpha}
        )
        self._params = {
            name: {key: self._fixed(value) for key, value in getattr(loss, name).items(True, True)} for name in NETWORKS
        }
        self._params["log_alpha"] = {"log_alpha": loss.log_alpha.detach()}
        self._target = [key for key, _ in _trained(loss.target_qvalue_network_params)]
        self._steps: dict[str, Callable] = {"critic": self._critic_step, "actor": self._actor_step}

    def critic_step(self, batch: TensorDictBase, draws: TensorDictBase) -> dict[str, Tensor]:
        """Train the critic (equation 4), and move the target towards it.

        Returns:
            dict: 0-dimensional ``loss_qvalue``, ``qvalue`` (mean of the trained subnetworks' values) and ``td_error``, detached;
            read before the next step, where a graph writes them anew.
        """
        return self._steps["critic"](batch, draws)

    def actor_step(self, batch: TensorDictBase, draws: TensorDictBase) -> dict[str, Tensor]:
        """Train actor and temperature (equation 5).

        Returns:
            dict: 0-dimensional ``loss_actor``, ``loss_alpha``, ``entropy`` and ``alpha`` (after the step), detached.
        """
        return self._steps["actor"](batch, draws)

    def prepare(self, batch: TensorDictBase, generator: torch.Generator | None = None) -> None:
        """Compile now, for batches like ``batch``, whose values don't matter; the state is left exactly as it was.

        Without it, the first calls compile. ``generator``: of the draws needed; its state is left as it was too.
        """
        if not self.compiled:
            return
        zeros = batch.apply(torch.zeros_like)
        draws = self.loss.draw(zeros, generator=torch.Generator(self.device).manual_seed(0) if generator is None else generator)
        kept = [tensor.clone() for tensor in self._state()]
        with warnings.catch_warnings():
            # tensordict reads a flag that torch 2.13 no longer uses, whenever something is compiled.
            warnings.filterwarnings("ignore", message=".*inline_inbuilt_nn_modules is deprecated", category=FutureWarning)
            for name, step in (("critic", self._critic_step), ("actor", self._actor_step)):
                compiled = _compile(step)
                if self.device.type == "cuda":
                    self._steps[name] = _CUDAGraph(compiled, zeros, draws)
                else:
                    compiled(zeros, draws)
                    self._steps[name] = compiled
        for tensor, value in zip(self._state(), kept, strict=True):
            tensor.copy_(value)

    def state_dict(self) -> dict[str, Any]:
        """Everything that an update changes or reads: networks, targets, masks, temperature, moments of the optimisers."""
        optims = {"critic_optim": self._critic_adam.optim.state_dict(), "actor_optim": self._actor_adam.optim.state_dict()}
        return {"loss": self.loss.state_dict(), **optims}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a :meth:`state_dict`, into the tensors that are there."""
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

    def _critic_step(self, batch: TensorDictBase, draws: TensorDictBase) -> dict[str, Tensor]:
        trained = self._select("qvalue_network_params", self._critic_adam.names)

        def objective(weights: Leaves) -> tuple[Tensor, dict[str, Tensor]]:
            loss, data = self.loss.qvalue_loss(batch, draws=draws, params=self._as_params(qvalue_network_params=weights))
            return loss, {"qvalue": data["pred_value"].mean(), "td_error": data["td_error"].mean()}

        grads, (loss, data) = grad_and_value(objective, has_aux=True)(trained)
        self._critic_adam.step(grads)
        target, online = self._params["target_qvalue_network_params"], self._params["qvalue_network_params"]
        for key in self._target:
            target[key].lerp_(online[key], self.tau)
        return {"loss_qvalue": loss.detach(), **data}

    def _actor_step(self, batch: TensorDictBase, draws: TensorDictBase) -> dict[str, Tensor]:
        trained = self._select("actor_network_params", self._actor_adam.names)
        trained["log_alpha"] = self._params["log_alpha"]["log_alpha"]

        def objective(weights: Leaves) -> tuple[Tensor, dict[str, Tensor]]:
            actor = {key: value for key, value in weights.items() if key != "log_alpha"}
            loss_actor, data = self.loss.actor_loss(batch, draws=draws, params=self._as_params(actor_network_params=actor))
            temperature = TensorDict({"log_alpha": weights["log_alpha"]})
            loss_alpha = self.loss.alpha_loss(data["log_prob"], params=temperature).mean()
            entropy = -data["log_prob"].mean()
            return loss_actor + loss_alpha, {"loss_actor": loss_actor, "loss_alpha": loss_alpha, "entropy": entropy}

        grads, (_, data) = grad_and_value(objective, has_aux=True)(trained)
        self._actor_adam.step(grads)
        return {**{key: value.detach() for key, value in data.items()}, "alpha": trained["log_alpha"].exp()}

    def _fixed(self, value: Tensor) -> Tensor:
        # Masks as numbers of the weights' type: 0 and 1 multiply exactly, and four times faster than booleans do on a CPU.
        return value.to(self.loss.log_alpha.dtype) if value.dtype == torch.bool else value.detach()

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
        given = [p for group in groups for p in group["params"]]
        if {id(p) for p in given} != {id(p) for p in params.values()} or len(groups) != 1:
            raise ValueError(
                f"{name} must hold the parameters that it trains, in one group: expected {len(params)} tensors "
                f"({', '.join(map(str, params))}), got {len(given)} in {len(groups)} groups."
            )
        self.options = {key: groups[0][key] for key in ("amsgrad", "lr", "weight_decay", "eps", "maximize")}
        if type(optim) is not Adam or self.options["amsgrad"] or isinstance(self.options["lr"], Tensor):
            raise ValueError(f"{name} must be torch.optim.Adam with a number as lr and without amsgrad, got {optim}.")
        self.options["beta1"], self.options["beta2"] = groups[0]["betas"]
        self.optim, self.names = optim, list(params)
        self.params = list(params.values())
        on_cuda = self.params[0].is_cuda
        self.options["capturable"] = on_cuda
        for parameter in self.params:
            if not optim.state[parameter]:
                step = torch.zeros((), device=parameter.device if on_cuda else "cpu")
                optim.state[parameter] = {
                    "step": step,
                    "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
                    "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
                }
        states = [optim.state[parameter] for parameter in self.params]
        self.steps, self.exp_avgs, self.exp_avg_sqs = ([state[key] for state in states] for key in MOMENTS)
        self.detached = [parameter.detach() for parameter in self.params]

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

    def step(self, grads: Leaves) -> None:
        adam(
            self.detached,
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


def _compile(step: Callable) -> Callable:
    # All that a step reads but its arguments is fixed: the guards on it, hundreds, cost as much as a tenth of the step.
    options = {"guard_filter_fn": torch.compiler.keep_tensor_guards_unsafe}
    return torch.compile(step, fullgraph=True, dynamic=False, options=options)


def _trained(params: TensorDictBase) -> Iterator[tuple[NestedKey, Tensor]]:
    return ((key, value) for key, value in params.items(True, True) if value.is_floating_point())
