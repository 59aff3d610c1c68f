r"""The update: loss, backward, optimiser and target step as one function of (state, batch, draws).

The state is a set of fixed tensors, the ones that the loss module and the optimisers hold, changed in place. With the draws
passed in there is no random number inside and nothing waits for the device: run eagerly, compiled, or captured in a CUDA graph,
the same numbers come out (to rounding), and a resumed run repeats itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from torch import Tensor
from torch.func import grad_and_value
from torch.optim import Adam
from torch.utils import _pytree as pytree
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.objectives import SoftUpdate

from omnet_torchrl.layers import MaskedLinear
from omnet_torchrl.metrics import action_disagreement, value_disagreement
from omnet_torchrl.objectives import OMNetSACLoss
from omnet_torchrl.training.adam import FunctionalAdam
from omnet_torchrl.training.compiled import CompiledStep, CUDAGraph, Inputs, Schedule, preserved, run

Leaves = dict[NestedKey, Tensor]
State = dict[str, Any]
INDEX = "index"  # among the draws: which of the rows make up the batch
MOST = 32  # subnetworks that a disagreement is over, where there are more
NETWORKS = ("actor_network_params", "qvalue_network_params", "target_qvalue_network_params")


class SACUpdate:
    """One step of critic and target, or of actor and temperature.

    Args:
        loss (OMNetSACLoss): with the parameters to train; on their device before. What needs no gradient is not trained.
        critic_optim (Adam or LazyAdam): over the critic's parameters. Its options are read here, once: a scheduler has no
            effect.
        actor_optim (Adam or LazyAdam): over the actor's parameters and ``loss.log_alpha`` (unless ``fixed_alpha``).
        target_updater (SoftUpdate): of ``loss``.

    Keyword Args:
        compile (bool): compile each step whole, see :mod:`~omnet_torchrl.training.compiled`; on a CUDA device capture what
            one call makes in a CUDA graph too. The first call then takes a while, see :meth:`prepare`. Defaults to ``True``.
            Matrix products are oneDNN's where it is faster, see :mod:`~omnet_torchrl.training.products`.

    Shape:
        the batch is a TensorDict ``(B,)`` with ``loss.in_keys`` and what there is of ``loss.optional_in_keys``, the draws are
        :meth:`~omnet_torchrl.OMNetSACLoss.draw`'s. With an ``index (B,)`` of int64 among the draws it is what that names of
        ``(R,)`` rows, which are passed in place of a batch (:attr:`GatherStorage.rows`): compiled, nothing else of them is
        read, and no batch is written before an update reads it.
        Once compiled, every batch has the first one's shape, every set of rows too; on a CUDA device it is always the same.

    Raises:
        IndexError: on a CPU, an ``index`` that names no row.
        ValueError: an optimiser that is not over just these parameters, or is neither Adam nor LazyAdam; a target updater
            that is no SoftUpdate of ``loss``; a loss that is not reduced to one number; compiled, a batch of another shape or
            with other ``optional_in_keys`` than the first, or rows that are not contiguous.

    Examples:
        >>> from torchrl.data import Bounded, ReplayBuffer, Unbounded
        >>> from omnet_torchrl import make_actor, make_qvalue
        >>> from omnet_torchrl.training import GatherStorage
        >>> specs = Unbounded(11), Bounded(-1, 1, (3,))
        >>> loss = OMNetSACLoss(make_actor(*specs), make_qvalue(*specs))
        >>> optims = [Adam(params, lr=3e-4) for params in (
        ...     loss.qvalue_network_params.parameters(), [*loss.actor_network_params.parameters(), loss.log_alpha])]
        >>> update = SACUpdate(loss, *optims, SoftUpdate(loss, tau=0.005), compile=False)
        >>> observation, end = torch.randn(500, 11), torch.zeros(500, 1, dtype=torch.bool)
        >>> following = {"observation": observation, "reward": torch.randn(500, 1), "done": end, "terminated": end}
        >>> frames = TensorDict({"observation": observation, "action": torch.rand(500, 3), "next": following}, [500])
        >>> buffer = ReplayBuffer(storage=GatherStorage(1_000))
        >>> _ = buffer.extend(frames)
        >>> batches = buffer.sample(20 * 256).reshape(20, 256)  # 20 updates, the actor's after the last one
        >>> draws = loss.draw(batches[0], num_updates=20)
        >>> sorted(update.block(batches, draws, [False] * 19 + [True]))
        ['alpha', 'entropy', 'loss_actor', 'loss_alpha', 'loss_qvalue', 'qvalue', 'td_error']

        The same without copies of the batches:

        >>> draws["index"] = torch.randint(len(buffer), (20, 256))
        >>> output = update.block(buffer.storage.rows, draws, [False] * 19 + [True])

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
        self._critic_adam = FunctionalAdam(critic_optim, "critic_optim", _trained(loss.qvalue_network_params))
        self._actor_adam = FunctionalAdam(actor_optim, "actor_optim", {**_trained(loss.actor_network_params), **temperature})
        self._params = {name: self._fixed(name) for name in NETWORKS}
        self._params["log_alpha"] = {"log_alpha": loss.log_alpha.detach()}
        self._state: State = {"params": self._params, "critic": self._critic_adam.state, "actor": self._actor_adam.state}
        self._bound_temperature(self._state)
        self._steps: dict[str, CompiledStep] = {}
        self._graphs: dict[Schedule, CUDAGraph] = {}

    @property
    def actor_params(self) -> Leaves:
        """The tensors of the actor that the steps read and change; masks are numbers among them."""
        return self._params["actor_network_params"]

    @property
    def prepared(self) -> bool:
        """Whether nothing is left to be compiled."""
        return not self.compiled or bool(self._steps)

    def block(self, batches: TensorDictBase, draws: TensorDictBase, actor: Sequence[bool]) -> dict[str, Tensor]:
        """Several updates, one after the other: a critic step for each, and an actor step after those that ``actor`` names.

        Args:
            batches (TensorDictBase): ``(U, B)``; or ``(R,)``, the rows of all, with an ``index (U, B)`` among the draws.
            draws (TensorDictBase): ``(U,)``, see ``num_updates`` of :meth:`~omnet_torchrl.OMNetSACLoss.draw`.
            actor (sequence of bool): U of them.

        Returns:
            dict: the newest of what :meth:`critic_step` and :meth:`actor_step` return.
        """
        schedule: list[tuple[str, int]] = []
        for row, follows in enumerate(actor):
            schedule += [("critic", row), *([("actor", row)] if follows else [])]
        return self._run(tuple(schedule), batches, draws)

    def critic_step(self, batch: TensorDictBase, draws: TensorDictBase) -> dict[str, Tensor]:
        """Train the critic (equation 4), and move the target towards it.

        Returns:
            dict: 0-dimensional ``loss_qvalue``, ``qvalue`` (mean of the trained subnetworks' values) and ``td_error``,
            detached; read before the next step, where a graph writes them anew.
        """
        return self._one("critic", batch, draws)

    def actor_step(self, batch: TensorDictBase, draws: TensorDictBase) -> dict[str, Tensor]:
        """Train actor and temperature (equation 5).

        Returns:
            dict: 0-dimensional ``loss_actor``, ``loss_alpha``, ``entropy`` and ``alpha`` (after the step), detached.
        """
        return self._one("actor", batch, draws)

    def prepare(self, batch: TensorDictBase, batch_size: int | None = None) -> None:
        """Compile now, for batches like ``batch``, whose values don't matter; the state is left exactly as it was.

        So is torch's global generator. Without it, the first step compiles.

        Args:
            batch (TensorDictBase): ``(B,)``; or ``(R,)`` rows.
            batch_size (int or None): B, of rows. ``None`` (default): ``batch`` is a batch.
        """
        if not self.compiled:
            return
        generator = torch.Generator(self.device).manual_seed(0)
        if batch_size is None:
            batch = batch.apply(torch.zeros_like)
            draws = self.loss.draw(batch, generator)
        else:
            draws = self.loss.draw(batch[:1].expand(batch_size), generator)
            draws.set(INDEX, torch.zeros(batch_size, dtype=torch.int64, device=self.device))
        self._inputs = Inputs(batch, draws, shared=batch_size is not None)
        with preserved([], self.device):
            steps = {"critic": self._critic_step, "actor": self._actor_step}
            self._steps = {name: CompiledStep(step, self._state, self._inputs) for name, step in steps.items()}
        self._inputs.examples.clear()  # which may be a whole buffer

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
    def reset(self) -> None:
        """Draw the networks anew; target, temperature and moments start again too, masks stay.

        Draws from torch's global generator.
        """
        self.loss.reset_parameters_recursive()
        self.loss.log_alpha.copy_(self.loss.alpha_init.log())
        self._bound_temperature(self._state)
        for adam in (self._critic_adam, self._actor_adam):
            for tensor in pytree.tree_leaves(adam.state):
                tensor.zero_()

    @torch.no_grad()
    def disagreement(self, batch: TensorDictBase) -> dict[str, Tensor]:
        """How far the subnetworks are apart on a batch: ``subnets/q_std``, ``subnets/action_distance``, 0-dimensional.

        Without dropout.
        """
        loss, critic = self.loss, self.loss.qvalue_network
        every = torch.arange(min(loss.num_subnets, MOST), device=self.device)
        action = batch.get(loss.tensor_keys.action)
        training = critic.training
        critic.eval()
        values = loss._qvalue(loss.qvalue_network_params, batch, action, every)
        critic.train(training)
        num_actor = min(loss.num_actor_subnets, MOST)
        every = torch.arange(num_actor, device=self.device).view(-1, *(1 for _ in batch.batch_size))
        inputs = loss._inputs(loss.actor_network, batch, every)
        with (
            set_exploration_type(ExplorationType.DETERMINISTIC),
            loss.actor_network_params.to_module(loss.actor_network, preserve_module_state=False),
        ):
            actions = loss.actor_network(inputs).get(loss.tensor_keys.action)
        actions = actions.expand(num_actor, *action.shape)
        return {"subnets/q_std": value_disagreement(values), "subnets/action_distance": action_disagreement(actions)}

    def is_finite(self) -> bool:
        """Whether parameters, target and temperature are all finite. Waits for the device."""
        return all(bool(tensor.isfinite().all()) for tensors in self._params.values() for tensor in tensors.values())

    def _one(self, name: str, batch: TensorDictBase, draws: TensorDictBase) -> dict[str, Tensor]:
        return self._run(((name, 0),), batch if INDEX in draws.keys() else batch.unsqueeze(0), draws.unsqueeze(0))

    def _run(self, schedule: Schedule, batches: TensorDictBase, draws: TensorDictBase) -> dict[str, Tensor]:
        index = draws.get(INDEX, None)
        if index is not None:
            _check_index(index, len(batches))
        if not self.compiled:
            steps = {"critic": self._critic_step, "actor": self._actor_step}
            each = batches.unbind(0) if index is None else [batches] * len(draws)
            rows = list(zip(each, draws.unbind(0), strict=True))
            outputs: dict[str, Tensor] = {}
            for name, row in schedule:
                outputs |= steps[name](self._state, *rows[row])
            return outputs
        if not self._steps:
            self.prepare(*((batches[0],) if index is None else (batches, index.shape[1])))
        for key in self.loss.optional_in_keys:
            if key in batches.keys(True, True) and key not in self._inputs.keys[0]:
                raise ValueError(f"the update is compiled for batches without {key!r}, got one with it: build another one.")
        leaves = self._inputs.leaves(batches, draws)
        if self.device.type != "cuda":
            return run(self._steps, schedule, self._inputs.rows(leaves))
        with torch.cuda.device(self.device):  # graphs are captured on, and replayed by, the current one
            if schedule not in self._graphs:
                with preserved(pytree.tree_leaves(self._state), self.device):
                    self._graphs[schedule] = CUDAGraph(self._steps, schedule, self._inputs, leaves)
            return self._graphs[schedule](leaves)

    def _critic_step(self, state: State, batch: TensorDictBase, draws: TensorDictBase) -> dict[str, Tensor]:
        params, batch = state["params"], self._batch(batch, draws)
        trained = {key: params["qvalue_network_params"][key] for key in self._critic_adam.names}

        def objective(weights: Leaves) -> tuple[Tensor, dict[str, Tensor]]:
            loss, data = self.loss.qvalue_loss(batch, draws=draws, params=_as_params(params, qvalue_network_params=weights))
            return loss, {"qvalue": data["pred_value"].mean(), "td_error": data["td_error"].mean()}

        grads, (loss, data) = grad_and_value(objective, has_aux=True)(trained)
        self._critic_adam.step(state["critic"], trained, grads)
        for key, weight in trained.items():
            params["target_qvalue_network_params"][key].lerp_(weight, self.tau)
        return {"loss_qvalue": loss.detach(), **data}

    def _actor_step(self, state: State, batch: TensorDictBase, draws: TensorDictBase) -> dict[str, Tensor]:
        params, log_alpha = state["params"], state["params"]["log_alpha"]["log_alpha"]
        batch = self._batch(batch, draws)
        every = {**params["actor_network_params"], "log_alpha": log_alpha}
        trained = {key: every[key] for key in self._actor_adam.names}

        def objective(weights: Leaves) -> tuple[Tensor, dict[str, Tensor]]:
            actor = {key: value for key, value in weights.items() if key != "log_alpha"}
            loss_actor, data = self.loss.actor_loss(batch, draws=draws, params=_as_params(params, actor_network_params=actor))
            temperature = TensorDict({"log_alpha": weights.get("log_alpha", log_alpha)})
            loss_alpha = self.loss._reduced(self.loss.alpha_loss(data["log_prob"], params=temperature), batch)
            entropy = -data["log_prob"].mean()
            return loss_actor + loss_alpha, {"loss_actor": loss_actor, "loss_alpha": loss_alpha, "entropy": entropy}

        grads, (_, data) = grad_and_value(objective, has_aux=True)(trained)
        self._actor_adam.step(state["actor"], trained, grads)
        self._bound_temperature(state)
        return {**{key: value.detach() for key, value in data.items()}, "alpha": log_alpha.exp()}

    def _batch(self, rows: TensorDictBase, draws: TensorDictBase) -> TensorDictBase:
        """The batch of an update: what the index among its draws names, where there is one."""
        index = draws.get(INDEX, None)
        if index is None:
            return rows
        batch = rows.select(*self.loss.in_keys, *self.loss.optional_in_keys, strict=False)
        # Inductor fuses indexing with what reads it; as an operation of its own it takes four times as long as copying rows.
        gather = Tensor.__getitem__ if torch.compiler.is_compiling() else (lambda leaf, index: leaf.index_select(0, index))
        return batch.apply(lambda leaf: gather(leaf, index), batch_size=index.shape)

    def _bound_temperature(self, state: State) -> None:
        low, high = self.loss.min_log_alpha, self.loss.max_log_alpha
        if low is not None or high is not None:
            state["params"]["log_alpha"]["log_alpha"].clamp_(low, high)

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


def _check_index(index: Tensor, count: int) -> None:
    # A kernel that finds one ends the process where it runs in several threads. A GPU is not waited for.
    if index.device.type == "cpu":
        low, high = (bound.item() for bound in index.aminmax())
        if low < 0 or high >= count:
            raise IndexError(f"the index among the draws must be in [0, {count}), the rows, got {low} to {high}.")


def _as_params(params: dict[str, Leaves], **changed: Leaves) -> TensorDict:
    """The losses' ``params``: those of a state, some of their leaves replaced."""
    networks = {name: TensorDict({**params[name], **changed.get(name, {})}) for name in NETWORKS}
    return TensorDict({**networks, **params["log_alpha"]})


def _trained(params: TensorDictBase) -> Leaves:
    return {key: value for key, value in params.items(True, True) if value.requires_grad}
