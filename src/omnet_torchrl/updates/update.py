r"""The update: loss, backward, optimiser and target step as one function of (state, batch, draws).

The state is a TensorDict of fixed tensors, the ones that the loss module and the optimisers hold, changed in place; masks are
among them, in the storage that the modules read. With the draws passed in there is no random number inside and nothing waits
for the device: run eagerly, compiled, or captured in a CUDA graph, the same numbers come out (to rounding), and a resumed run
repeats itself. What an update does is stated by its loss (:meth:`~omnet_torchrl.objectives.SubnetLoss.steps`).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torch.optim import Adam, Optimizer
from torchrl.objectives import SoftUpdate

from omnet_torchrl.arguments import suggesting
from omnet_torchrl.objectives.subnet_loss import SubnetLoss
from omnet_torchrl.updates.adam import adam_groups, copied
from omnet_torchrl.updates.checks import Settings, check_batch, check_options, checked_norms, warn_of_changes
from omnet_torchrl.updates.compiled import CompiledFunction, as_bytes, preserved
from omnet_torchrl.updates.cuda_graph import CUDAGraph
from omnet_torchrl.updates.kernels import PRECISIONS
from omnet_torchrl.updates.steps import PRIORITY, Schedule, collected, held, leaves_of, run_step, schedule_of, steps_of

LR = 3e-4  # of REDQ, DroQ and OMNet


class Update:
    """Trains a loss over subnetworks: one call makes one update, or many, as fast as the main job of this project does.

    Args:
        loss (SubnetLoss): e.g. :class:`~omnet_torchrl.OMNetSACLoss`, with the parameters to train; on their device before. What
            requires no gradient is not trained.
        optim (Optimizer, sequence of them or None): ``torch.optim.Adam``, ``AdamW`` or :class:`~omnet_torchrl.LazyAdam`, which
            together hold each parameter that is trained once; in one optimiser or several, with any parameter groups. Masks
            among them are passed over. A value that changes (a learning rate, ``tau``, the discount) counts from the next
            call on; each value but a learning rate is compiled once. ``None`` (default): an Adam for each step.

    Keyword Args:
        lr (float): learning rate of the optimisers made here, where ``optim`` is ``None``. Defaults to 3e-4.
        tau (float): step of the target networks towards the online ones, in (0, 1]. Defaults to 0.005.
        policy_update_delay (int): the loss's delayed steps (the actor's) are made in every update whose number is a multiple of
            it. Defaults to 1.
        target_update_interval (int): the target networks move at the end of every update whose number is a multiple of it; with
            ``tau=1.0`` they are copies that are renewed at this interval, as in DQN. Defaults to 1: each target moves whenever
            its network was trained.
        max_grad_norm (float, mapping or None): largest norm of the gradient of a parameter group; larger ones are scaled down,
            as :func:`torch.nn.utils.clip_grad_norm_` does. A mapping has one for some of the groups that the loss's steps train
            (``{"qvalue_network_params": 10.0}``). ``None`` (default): gradients are left as they are.
        precision (str): of the inputs of matrix products, ``"float32"`` (default) or ``"bfloat16"``. Weights, moments, targets
            and losses are float32 in either case.
        compile (bool): compile each step whole, see :mod:`~omnet_torchrl.updates.compiled`; on a CUDA device capture what one
            call makes in a CUDA graph too. The first call, and the first with batches of another shape, takes a while; see
            :meth:`prepare`. ``False`` makes each operation by itself, to debug. Defaults to ``True``.

    Attributes:
        state (TensorDict): ``params`` (networks, targets, masks, temperature), and ``optim`` (learning rates, moments). These
            are the very tensors of the loss and the optimisers.
        updates (int): how many were made.
        optims (list of Optimizer): those given, or made here.

    Raises:
        ValueError: an optimiser of another kind or over other parameters; options out of range; a loss that is not reduced.
        RuntimeError: the loss was moved, or its tensors were replaced or frozen, after the update was built.

    Examples:
        >>> from torchrl.data import Bounded, LazyTensorStorage, TensorDictReplayBuffer, Unbounded
        >>> from omnet_torchrl import OMNetSACLoss, make_actor, make_qvalue
        >>> specs = Unbounded(11), Bounded(-1, 1, (3,))
        >>> loss = OMNetSACLoss(make_actor(*specs), make_qvalue(*specs))
        >>> update = Update(loss, lr=3e-4, tau=0.005, policy_update_delay=20, compile=False)
        >>> observation, end = torch.randn(500, 11), torch.zeros(500, 1, dtype=torch.bool)
        >>> following = {"observation": observation, "reward": torch.randn(500, 1), "done": end, "terminated": end}
        >>> buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(1_000))
        >>> _ = buffer.extend(TensorDict({"observation": observation, "action": torch.rand(500, 3), "next": following}, [500]))
        >>> metrics = update(buffer.sample(20 * 256).reshape(20, 256))  # 20 updates, the actor's after the last one
        >>> sorted(metrics.keys())
        ['alpha', 'entropy', 'loss_actor', 'loss_alpha', 'loss_qvalue', 'qvalue', 'td_error']
        >>> update
        Update(OMNetSACLoss, steps=[critic: 70,913 parameters, actor (every 20): 71,431 parameters], tau=0.005, 20 updates made)

    .. note:: It is numerically the step of the optimisers, whose own state it changes, and of
        :class:`~torchrl.objectives.SoftUpdate`. Gradients never appear in ``.grad``.
    """

    @suggesting
    def __init__(
        self,
        loss: SubnetLoss,
        optim: Optimizer | Sequence[Optimizer] | None = None,
        *,
        lr: float | None = None,
        tau: float = 0.005,
        policy_update_delay: int = 1,
        target_update_interval: int = 1,
        max_grad_norm: float | Mapping[str, float] | None = None,
        precision: str = "float32",
        compile: bool = True,
    ):
        counts = {"policy_update_delay": policy_update_delay, "target_update_interval": target_update_interval}
        check_options(loss, optim, lr, tau, precision, **counts)
        self.loss, self.tau, self.policy_update_delay = loss, tau, policy_update_delay
        self.target_update_interval = target_update_interval
        self.precision, self.compiled, self.updates = precision, compile, 0
        self.steps = steps_of(loss, target_update_interval)
        self._groups, self._settings = loss.parameter_groups(), Settings(loss)
        self._trained = {
            name: {key: leaf for key, leaf in leaves_of(self._groups).items() if key[0] in step.trains and leaf.requires_grad}
            for name, step in self.steps.items()
            if step.trains
        }
        if optim is None:
            optim = [Adam(params.values(), lr=LR if lr is None else lr) for params in self._trained.values()]
        self.optims = [optim] if isinstance(optim, Optimizer) else list(optim)
        self._adam = adam_groups(self.optims, self._trained)
        self._max_grad_norm = checked_norms(max_grad_norm, [name for step in self.steps.values() for name in step.trains])
        live = leaves_of(self._groups)
        paths = {id(leaf): ".".join(key) for key, leaf in live.items()}
        self._places = {
            name: [(leaf, leaf.data_ptr(), leaf.requires_grad, paths[id(leaf)]) for leaf in held(group)]
            for name, group in self._groups.items()
        }
        moments = {name: {str(i): group.state for i, group in enumerate(groups)} for name, groups in self._adam.items()}
        self.state = TensorDict({"params": TensorDict({key: leaf.detach() for key, leaf in live.items()}), "optim": moments})
        self._keys = list(self.state.keys(True, True))
        self._tensors = as_bytes([self.state.get(key) for key in self._keys])
        self.device = self._tensors[0].device
        targets = [leaf for key, leaf in live.items() if key[0].startswith("target_")]
        if targets:
            with preserved(targets, self.device):  # which it would set to the online networks
                SoftUpdate(loss, tau=0.5)  # tells the loss that somebody moves its targets
        for step in self.steps.values():
            if step.after is not None:
                step.after(self.state.get("params"))
        self._code: dict[Any, dict[str, CompiledFunction]] = {}
        self._graphs: dict[Any, CUDAGraph] = {}

    @torch.no_grad()
    def __call__(
        self,
        batch: TensorDictBase,
        *,
        draws: TensorDictBase | None = None,
        generator: torch.Generator | None = None,
    ) -> TensorDict:
        """Make an update of a batch ``(B,)``, or U updates of ``(U, B)``, one after the other.

        Where the loss has ``choose="batch"``, a batch is ``(T, B)`` with a task in each row: ``(T, B)`` or ``(U, T, B)``.

        Args:
            batch (TensorDictBase): with ``loss.in_keys`` and what there is of ``loss.optional_in_keys`` (n-step data, priority
                weights); other keys are not read. The priority of each transition, ``td_error``, is written to it, as the loss
                itself does: ``buffer.update_tensordict_priority(batch.reshape(-1))``. Batches are brought to the loss's device.

        Keyword Args:
            draws (TensorDictBase or None): :meth:`loss.draw <omnet_torchrl.objectives.SubnetLoss.draw>`'s, of batch size ``()``
                or ``(U,)``. ``None`` (default): drawn here.
            generator (torch.Generator or None): on the loss's device, of draws that are made here. ``None``: torch's global
                one.

        Returns:
            TensorDict: scalars, the newest of each: losses, and what else the steps compute; of several tasks, also a number
            for each under names that end in ``_task``.
        """
        batches = batch.unsqueeze(0) if batch.ndim == self.loss.batch_dims else batch
        check_batch(self.loss, batches, batch)
        count = len(batches)
        numbers = range(self.updates + 1, self.updates + 1 + count)
        delayed = [number % self.policy_update_delay == 0 for number in numbers]
        read = self._read(batches)
        if draws is None:
            draws = self.loss.draw(read[0], generator, num_updates=count, delayed=delayed)
        elif batch.ndim == self.loss.batch_dims:
            draws = draws.unsqueeze(0)
        outputs = self._run(schedule_of(self.steps, delayed, numbers, self.target_update_interval), read, draws)
        self.updates += count
        priority = outputs.pop(PRIORITY, None)
        if priority is not None:
            batch.set(self.loss.tensor_keys.priority, priority.view(batch.batch_size).to(batch.device or priority.device))
        return TensorDict(outputs)

    def prepare(self, batch: TensorDictBase) -> None:
        """Compile now, for batches like ``batch``, whose values don't matter; the state is left exactly as it was.

        So is torch's global generator. Without it, the first call compiles.

        Args:
            batch (TensorDictBase): as a call takes it.
        """
        if self.compiled:
            read = self._read(batch if batch.ndim == self.loss.batch_dims else batch[0])
            with preserved([], self.device):
                draws = self.loss.draw(read)
            self._code_for(read.unsqueeze(0), draws.unsqueeze(0))

    def state_dict(self) -> dict[str, Any]:
        """Everything that an update changes or reads: the loss (targets, masks, temperature too), optimisers, the count."""
        optims = {name: optim.state_dict() for name, optim in self._named_optims().items()}
        return {"loss": self.loss.state_dict(), **optims, "updates": self.updates}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a :meth:`state_dict`, into the tensors that are there.

        Raises:
            ValueError: it is the state of optimisers with other options, or of other optimisers.
        """
        optims = self._named_optims()
        for name, optim in optims.items():
            if name not in state:
                raise ValueError(f"the state to load must have {', '.join(optims)}, got {', '.join(state)}.")
            for group, other in zip(optim.param_groups, state[name]["param_groups"], strict=True):
                for key in group.keys() - {"lr", "initial_lr", "params"}:
                    if other.get(key, group[key]) != group[key]:
                        raise ValueError(f"{name} has {key}={group[key]}, the state to load has {key}={other[key]}.")
        self.loss.load_state_dict(state["loss"])
        for name, optim in optims.items():
            optim.load_state_dict(state[name])
        self.updates = state.get("updates", self.updates)
        self._follow()

    @torch.no_grad()
    def reset(self) -> None:
        """Draw the networks anew; targets, temperature and moments start again too, masks and the count of updates stay.

        Draws from torch's global generator.
        """
        self.loss.reset()
        params = self.state.get("params")
        for step in self.steps.values():
            if step.after is not None:
                step.after(params)
        for groups in self._adam.values():
            for group in groups:
                for name, tensor in group.state.items(True, True):
                    if name != "lr":
                        tensor.zero_()

    def is_finite(self) -> bool:
        """Whether all parameters and targets are finite. Waits for the device."""
        return all(bool(tensor.isfinite().all()) for tensor in self.state.get("params").values(True, True))

    def _named_optims(self) -> dict[str, Optimizer]:
        """The optimisers by the names of the steps that they serve: ``critic_optim``, ``actor_optim``."""
        named: dict[str, Optimizer] = {}
        for optim in self.optims:
            steps = [name for name, groups in self._adam.items() if any(group.optim is optim for group in groups)]
            name = "_".join([*steps, "optim"])
            named[name if name not in named else f"{name}_{len(named)}"] = optim
        return named

    def _follow(self) -> None:
        """Take over what was changed outside since the last call, and refuse what can't be taken over."""
        for groups in self._adam.values():
            for group in groups:
                group.follow()
        for name, places in self._places.items():
            for (leaf, place, trained, path), tensor in zip(places, held(getattr(self.loss, name)), strict=True):
                if tensor is not leaf or tensor.data_ptr() != place or tensor.requires_grad != trained:
                    raise RuntimeError(
                        f"the loss's {path} is another tensor than when the update was built, or requires_grad has changed: "
                        "build the update then, or copy into the tensors that are there (load_state_dict, copy_)."
                    )

    def _read(self, batch: TensorDictBase) -> TensorDict:
        """What the loss reads of a batch, on its device, in an order of keys that doesn't depend on the batch."""
        keys = [*self.loss.in_keys, *self.loss.optional_in_keys]
        values = {key: value.contiguous() for key in keys if (value := batch.get(key, None)) is not None}
        return TensorDict(values, batch_size=batch.batch_size, device=self.device)

    def _run(self, schedule: Schedule, batches: TensorDictBase, draws: TensorDictBase) -> dict[str, Tensor]:
        self._follow()
        for optim in self.optims:
            optim._opt_called = True  # type: ignore[attr-defined]  # torch's schedulers warn unless step() was called
        if not self.compiled:
            each = list(zip(batches.unbind(0), draws.unbind(0), strict=True))
            return collected((name, self._step(name, self.state, *each[row])) for name, row in schedule)
        kind, code = self._code_for(batches, draws)
        leaves = [value.contiguous() for value in (*batches.values(True, True), *draws.values(True, True))]

        def function(leaves: Sequence[Tensor]) -> dict[str, Tensor]:
            each = list(zip(*(leaf.unbind(0) for leaf in leaves), strict=True))
            return collected((name, code[name](self._tensors, each[row])) for name, row in schedule)

        if self.device.type != "cuda":
            return function(leaves)
        with torch.cuda.device(self.device):  # graphs are captured on, and replayed by, the current one
            if (kind, schedule) not in self._graphs:
                with preserved(self._tensors, self.device):
                    self._graphs[kind, schedule] = CUDAGraph(function, leaves)
            return {name: value.clone() for name, value in self._graphs[kind, schedule](leaves).items()}

    def _code_for(self, batches: TensorDictBase, draws: TensorDictBase) -> tuple[Any, dict[str, CompiledFunction]]:
        """The compiled steps for batches and draws of this kind, ``(U, B)`` and ``(U,)``."""
        optim = repr([group.options for groups in self._adam.values() for group in groups])
        leaves = [(key, value.shape[1:], value.dtype) for each in (batches, draws) for key, value in each.items(True, True)]
        kind = (tuple(leaves), self._settings.read(optim=optim, tau=self.tau, precision=self.precision))
        if kind not in self._code:
            warn_of_changes(self._code, kind)
            keys = [list(each.keys(True, True)) for each in (batches, draws)]
            sizes = batches.batch_size[1:], draws.batch_size[1:]
            examples = [
                torch.zeros_like(each.get(key)[0]) for each, own in zip((batches, draws), keys, strict=True) for key in own
            ]

            def step(name: str, state: list[Tensor], inputs: list[Tensor]) -> dict[str, Tensor]:
                parts = zip(keys, (inputs[: len(keys[0])], inputs[len(keys[0]) :]), sizes, strict=True)
                batch, draws = (TensorDict(dict(zip(own, part, strict=True)), batch_size=size) for own, part, size in parts)
                return self._step(name, TensorDict(dict(zip(self._keys, state, strict=True))), batch, draws)

            values = [self.state.get(key) for key in self._keys]
            with preserved([], self.device):
                self._code[kind] = {name: CompiledFunction(partial(step, name), values, examples) for name in self.steps}
        return kind, self._code[kind]

    def _step(self, name: str, state: TensorDict, batch: TensorDictBase, draws: TensorDictBase) -> dict[str, Tensor]:
        """One step of the loss: a function of its arguments that changes ``state`` in place."""
        options: dict[str, Any] = {"tau": self.tau, "max_grad_norm": self._max_grad_norm, "dtype": PRECISIONS[self.precision]}
        every = [group for groups in self._adam.values() for group in groups]
        return run_step(self.steps[name], self._adam.get(name, every), state, batch, draws, **options)

    def __deepcopy__(self, memo: dict[int, Any]) -> Update:
        """An update of a copied loss and copied optimisers, which shares the compiled code."""
        loss = copy.deepcopy(self.loss, memo)
        groups = loss.parameter_groups()
        old, new = ({**leaves_of(each)} for each in (self._groups, groups))
        optims = [copied(optim, {id(tensor): new[key] for key, tensor in old.items()}) for optim in self.optims]
        memo |= {id(optim): optims[i] for i, optim in enumerate(self.optims)}
        names = ("tau", "policy_update_delay", "target_update_interval", "precision")
        options: dict[str, Any] = {name: getattr(self, name) for name in names}
        update = type(self)(loss, optims, max_grad_norm=self._max_grad_norm, compile=self.compiled, **options)
        update.updates, update._code = self.updates, dict(self._code)
        return update

    def __repr__(self) -> str:
        steps = []
        for name, step in ((name, self.steps[name]) for name in self._trained):
            every = f" (every {self.policy_update_delay})" if step.delayed and self.policy_update_delay > 1 else ""
            steps.append(f"{name}{every}: {sum(param.numel() for param in self._trained[name].values()):,} parameters")
        options = [] if self.precision == "float32" else [self.precision]
        if self.target_update_interval > 1:
            options.append(f"targets every {self.target_update_interval}")
        shown = [type(self.loss).__name__, f"steps=[{', '.join(steps)}]", f"tau={self.tau}", *options]
        return f"{type(self).__name__}({', '.join(shown)}, {self.updates} updates made)"
