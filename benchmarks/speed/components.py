"""What is timed: blocks of 20 updates with their replay sampling, as functions without arguments.

A block does what one frame of the main job does: sample 20 batches, draw, 20 critic updates, one actor update. Every builder
returns the block, ready and warm; calling it returns when the device is done.
"""

import types
import warnings
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import bare
import matmuls
import torch
from collecting import collect_block
from tensordict import TensorDict
from tensordict.nn import NormalParamExtractor, TensorDictModule
from torch import Tensor, nn
from torch.optim import Adam
from torchrl.data import Bounded, LazyTensorStorage, ReplayBuffer, TensorDictReplayBuffer, Unbounded
from torchrl.modules import MLP, ProbabilisticActor, TanhNormal, ValueOperator
from torchrl.objectives import REDQLoss, SACLoss, SoftUpdate, group_optimizers

from omnet_torchrl import GatherStorage, Update, make_actor
from omnet_torchrl.training import Trainer
from omnet_torchrl.training.build import build
from omnet_torchrl.training.options import OptimConfig, TrainConfig, to_config

UPDATES, ACTIONS, BATCH, WIDTH, STORED = 20, 200, 256, 256, 50_000
Block = Callable[[], None]


class Task(NamedTuple):
    """Sizes of observation and action, and the bound of the actions."""

    observation: int
    action: int
    bound: float

    def specs(self) -> tuple[Unbounded, Bounded]:
        """Of observation and action."""
        return Unbounded((self.observation,)), Bounded(-self.bound, self.bound, (self.action,))


TASKS = {"hopper": Task(11, 3, 1.0), "humanoid": Task(376, 17, 0.4), "tiny": Task(3, 2, 1.0)}

# Options of a run, over those of training/options/rows.py: the rows of the results table, and masks over units.
ROWS: dict[str, dict[str, Any]] = {
    "omnet": {},
    "unit": {"network": {"masks": "unit"}},
    "unit 29 %": {"network": {"masks": "unit", "sparsity": 0.29}},
    "sac": {"algorithm": "sac_20"},
    "redq": {"algorithm": "redq"},
    "droq": {"algorithm": "droq", "network": {"dropout": 0.01}},
}
MASKED = ["omnet", "unit", "unit 29 %"]  # the rows whose networks have masks


def transitions(task: Task, count: int, device: str = "cpu") -> TensorDict:
    """Random transitions, one in a hundred of them terminal."""
    generator = torch.Generator().manual_seed(0)
    end = torch.rand(count, 1, generator=generator) < 0.01
    data = {
        "observation": torch.randn(count, task.observation, generator=generator),
        "action": task.bound * (2 * torch.rand(count, task.action, generator=generator) - 1),
        "next": {
            "observation": torch.randn(count, task.observation, generator=generator),
            "reward": torch.randn(count, 1, generator=generator),
            "done": end,
            "terminated": end.clone(),
        },
    }
    return TensorDict(data, batch_size=[count], device=device)


def replay(task: Task, device: str = "cpu") -> ReplayBuffer:
    """The main job's buffer, full of :func:`transitions`."""
    return filled(ReplayBuffer(storage=GatherStorage(STORED, device=device)), task, device)


def filled(buffer: ReplayBuffer, task: Task, device: str = "cpu") -> ReplayBuffer:
    """The buffer, full of :func:`transitions`."""
    buffer.extend(transitions(task, STORED, device))
    return buffer


def make_update(row: str, task: Task, *, width: int = 256, compile: bool = True, device: str = "cpu", **kwargs: Any) -> Update:
    """The update of a row; ``kwargs`` are options of its networks."""
    torch.manual_seed(0)
    network = {**ROWS[row].get("network", {}), "num_cells": [width, width], **kwargs}
    loss = {"num_target_subnets": 1} if network.get("num_subnets") == 1 else {}  # one subnetwork can't be two targets
    config = to_config({**ROWS[row], "network": network, "loss": loss, "compile": compile})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # small networks have units without inputs: their speed is the same
        return build(config, *task.specs(), device).update


def omnet_block(row: str, task: Task, *, batch: int = 256, device: str = "cpu", **kwargs: Any) -> Block:
    """The main job's own frame, by its :class:`~omnet_torchrl.training.Trainer`; ``kwargs`` as in :func:`make_update`."""
    update = make_update(row, task, device=device, **kwargs)
    update.policy_update_delay = UPDATES
    schedule = {"init_random_frames": 0, "utd_ratio": UPDATES}
    none: Any = None
    buffer = replay(task, device)
    nobody: Any = SimpleNamespace(policy=torch.nn.Identity())  # collects
    trainer = Trainer(nobody, buffer, update, none, none, none, TrainConfig(**schedule, optim=OptimConfig(batch_size=batch)))

    def block() -> None:
        trainer.frames += 1
        trainer._train(trainer.frames - 1)

    return _warm(block, device)


def critic_block(row: str, task: Task, *, batch: int = 256, device: str = "cpu", **kwargs: Any) -> Block:
    """20 critic updates alone, on stored batches."""
    update = make_update(row, task, device=device, **kwargs)
    batches = transitions(task, UPDATES * batch, device).reshape(UPDATES, batch)
    draws = update.loss.draw(batches[0], num_updates=UPDATES)
    update.policy_update_delay = 2**62  # no step of the actor

    def block() -> None:
        update(batches, draws=draws)

    return _warm(block, device)


def bare_update(update: Update, task: Task, **kwargs: Any) -> bare.Update:
    """The bare-torch reference that starts from the weights, masks and temperature of an update."""
    loss, networks = update.loss, []
    for root in (loss.actor_network, loss.qvalue_network):
        params = loss.actor_network_params if root is loss.actor_network else loss.qvalue_network_params
        with params.to_module(root):
            (mlp,) = (module for module in root.modules() if isinstance(module, MLP))
            layers: bare.Layers = []
            masks = []
            for module in mlp:
                tensors = [parameter.detach().clone() for parameter in module.parameters()]
                if hasattr(module, "masks"):
                    masks.append(module.masks.to(tensors[0].dtype))
                    layers.append(tensors)
                elif tensors:
                    layers[-1] += tensors
            networks.append((layers, masks))
    return bare.Update(*networks, scale=task.bound, target_entropy=float(loss.target_entropy), **kwargs)


def bare_batch(batch: TensorDict) -> dict[str, Tensor]:
    """A batch of a buffer as the bare-torch reference takes it."""
    flat = {"observation": batch["observation"], "action": batch["action"]}
    flat["next_observation"] = batch["next", "observation"]
    for key in ("reward", "terminated"):
        flat[key] = batch["next", key].squeeze(-1).to(batch["observation"].dtype)
    return flat


def bare_block(task: Task, *, width: int = 256, compile: bool = True, device: str = "cpu") -> Block:
    """The bare-torch reference of OMNet's block: replay and draws are plain tensors too."""
    update = bare_update(make_update("omnet", task, width=width, compile=False, device=device), task, compile=compile)
    storage = bare_batch(transitions(task, STORED, device))
    rows = {key: value[: UPDATES * BATCH].clone() for key, value in storage.items()}
    subnets, shape = update.critic_masks[0].shape[0], (UPDATES, BATCH, task.action)

    def block() -> None:
        index = torch.randint(STORED, (UPDATES * BATCH,), device=device)
        for key, value in storage.items():
            torch.index_select(value, 0, index, out=rows[key])
        sampled = {key: value.unflatten(0, (UPDATES, BATCH)).unbind(0) for key, value in rows.items()}
        order = torch.rand(2, UPDATES, subnets, device=device).argsort(-1)
        actor = torch.randint(subnets, (2, UPDATES), device=device)
        drawn = {"critic": order[0, :, :1], "target": order[1, :, :2], "next_actor": actor[0], "actor": actor[1]}
        drawn["value"] = torch.arange(subnets, device=device).expand(UPDATES, -1)
        drawn["next_noise"] = torch.randn(shape, device=device)
        drawn["noise"] = torch.randn(shape[1:], device=device).expand(shape)  # one actor update reads it
        for i in range(UPDATES):
            batch, draws = ({key: value[i] for key, value in source.items()} for source in (sampled, drawn))
            update.critic_step(batch, draws)
        update.actor_step(batch, draws)

    return _warm(block, device)


def torchrl_loss(
    loss_class: type[SACLoss] | type[REDQLoss], task: Task, *, width: int = 256, device: str = "cpu"
) -> tuple[Any, SoftUpdate]:
    """TorchRL's loss over the networks of its own recipes, and the updater of its targets."""
    torch.manual_seed(0)
    action, cells = task.specs()[1], [width, width]
    network = MLP(task.observation, 2 * task.action, num_cells=cells, activation_class=nn.ReLU, device=device)
    module = TensorDictModule(
        nn.Sequential(network, NormalParamExtractor()), in_keys=["observation"], out_keys=["loc", "scale"]
    )
    actor = ProbabilisticActor(
        module,
        in_keys=["loc", "scale"],
        spec=action.to(device),
        distribution_class=TanhNormal,
        distribution_kwargs={"low": action.space.low.to(device), "high": action.space.high.to(device)},
        return_log_prob=loss_class is REDQLoss,
    )
    critic = MLP(task.observation + task.action, 1, num_cells=cells, activation_class=nn.ReLU, device=device)
    qvalue = ValueOperator(critic, in_keys=["observation", "action"])
    loss = loss_class(actor, qvalue, num_qvalue_nets=10 if loss_class is REDQLoss else 2, loss_function="l2")
    loss.make_value_estimator(gamma=0.99)
    return loss, SoftUpdate(loss, tau=0.005)


def torchrl_block(
    loss_class: type[SACLoss] | type[REDQLoss], task: Task, *, width: int = 256, compile: bool = True, device: str = "cpu"
) -> Block:
    """TorchRL's loss as in its own recipes: each update is the whole loss, one backward pass and all optimisers."""
    loss, updater = torchrl_loss(loss_class, task, width=width, device=device)
    groups = (loss.actor_network_params.parameters(), loss.qvalue_network_params.parameters(), [loss.log_alpha])
    optim = group_optimizers(*(Adam(list(params), lr=3e-4) for params in groups))
    storage = LazyTensorStorage(STORED, device=device)
    buffer = filled(TensorDictReplayBuffer(storage=storage, batch_size=BATCH), task, device)

    def update(batch: TensorDict) -> TensorDict:
        losses = loss(batch)
        (losses["loss_actor"] + losses["loss_qvalue"] + losses["loss_alpha"]).sum().backward()
        optim.step()
        optim.zero_grad(set_to_none=True)
        updater.step()
        return losses.detach()

    # Dynamo keeps what it compiled by code object, up to eight: each block has its own.
    own = types.FunctionType(update.__code__.replace(), globals(), closure=update.__closure__)
    step = torch.compile(own) if compile else update

    def block() -> None:
        for _ in range(UPDATES):
            step(buffer.sample())

    return _warm(block, device)


def _warm(block: Block, device: str) -> Block:
    def synchronised() -> None:
        block()
        if device != "cpu":
            torch.cuda.synchronize()

    for _ in range(3):
        synchronised()
    return synchronised


def act_block(kind: str) -> Block:
    """200 actions of one environment: of ``extract(0)``, or of the same actor over a plain MLP."""
    task = TASKS["hopper"]
    observation = TensorDict(observation=torch.randn(task.observation))
    if kind == "indexed":
        policy: Any = make_actor(*task.specs())
        observation["subnet"] = torch.tensor(0)
    elif kind == "extracted":
        policy = make_actor(*task.specs()).extract(0)
    else:
        norm = {"norm_class": nn.LayerNorm, "norm_kwargs": [{"normalized_shape": WIDTH}] * 2}
        mlp = MLP(task.observation, 2 * task.action, num_cells=[WIDTH, WIDTH], activation_class=nn.ReLU, **norm)
        plain = make_actor(*task.specs(), num_subnets=1, sparsity=0.0).extract(0)
        plain.module[0].network = mlp
        policy = plain

    return _warm(actions(policy, observation), "cpu")


def actions(policy: Any, observation: TensorDict) -> Block:
    """200 actions of one environment, by a policy."""

    @torch.no_grad()
    def block() -> None:
        for _ in range(ACTIONS):
            policy(observation)

    return block


def matmul_block(task: Task, device: str = "cpu") -> Block:
    """The matmul floor of OMNet's block."""
    return _warm(matmuls.block(matmuls.products(task.observation, task.action), device), device)


def cases(device: str = "cpu") -> dict[str, Callable[[], Block]]:
    """Everything the report compares, by name."""
    found: dict[str, Callable[[], Block]] = {}
    for name in ("hopper", "humanoid"):
        task, on = TASKS[name], {"device": device}
        for row in ROWS:
            found[f"{row} {name}"] = partial(omnet_block, row, task, **on)
            found[f"{row} eager {name}"] = partial(omnet_block, row, task, compile=False, **on)
        found[f"bare torch {name}"] = partial(bare_block, task, **on)
        found[f"matmul floor {name}"] = partial(matmul_block, task, **on)
        for label, loss in (("SACLoss", SACLoss), ("REDQLoss", REDQLoss)):
            found[f"TorchRL {label} {name}"] = partial(torchrl_block, loss, task, **on)
            found[f"TorchRL {label} eager {name}"] = partial(torchrl_block, loss, task, compile=False, **on)
    hopper = TASKS["hopper"]
    for subnets in (2, 32):
        found[f"critic updates N={subnets}"] = partial(critic_block, "omnet", hopper, num_subnets=subnets, device=device)
    for row in MASKED:
        found[f"{row} width 1024"] = partial(omnet_block, row, hopper, width=1024, device=device)
    for kind in ("plain", "extracted", "indexed"):
        found[f"act {kind}"] = partial(act_block, kind)
    for placement in ("none", "outside"):
        found[f"collect primer {placement}"] = partial(collect_block, "Hopper-v4", placement, frames=50)
    return found
