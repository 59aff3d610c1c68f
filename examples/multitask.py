"""One network, many tasks: each task has a subnetwork of its own, its pathway.

    python examples/multitask.py                                  # HalfCheetah forward and backward
    python examples/multitask.py --config-name quick_start_multitask    # the same in minutes
    python examples/multitask.py env=HalfCheetah/forward+backward+velocity_0.5+jump network.num_subnets=4
    python examples/multitask.py env=my_module:A-v0+my_module:B-v0      # any tasks with equal spaces
    python examples/multitask.py env=Meta-World/MT10 network.num_subnets=10 total_frames=1_000_000 max_episode_steps=200
    python examples/multitask.py algorithm=shared_tasks           # or multi_head, separate_tasks: what to compare with
    python examples/multitask.py resume=runs/HalfCheetah/forward+backward/pathways/seed0/...
    python examples/play.py runs/HalfCheetah/... --task backward --video backward.gif

Beside the run's learning curve, tasks.png shows each task's return and how much the tasks' masks have in common.
"Efficient Reinforcement Learning by Discovering Neural Pathways", Arnob et al., NeurIPS 2024, with random masks that stay;
theirs are topology.method=saliency topology.freeze_overlap=0.8 network.sparsity=0.9.
"""

from pathlib import Path

import hydra
import torch
from matplotlib.figure import Figure
from omegaconf import DictConfig
from torch.optim import Adam
from torchrl.data import ReplayBuffer

from omnet_torchrl import CompiledPolicy, GatherStorage, LazyAdam, OMNetSACLoss, SubnetPrimer, Update, make_actor, make_qvalue
from omnet_torchrl.layers import MaskedLinear
from omnet_torchrl.masks import mask_iou
from omnet_torchrl.training import Evaluation, Run, Trainer, describe, make_collector, make_env
from omnet_torchrl.training.build import loss_options, make_topology, network_options, normalization, update_options
from omnet_torchrl.training.command_line import execute
from omnet_torchrl.training.loop.environments import env_options
from omnet_torchrl.training.loop.streams import derived_seed
from omnet_torchrl.training.record.metrics import read_metrics
from omnet_torchrl.training.record.plots import save


@hydra.main(version_base="1.3", config_path=".", config_name="multitask")
def main(cfg: DictConfig) -> float:
    with Run.start(cfg) as run:
        return train(run)


def train(run: Run) -> float:
    config, device = run.config, run.device
    torch.manual_seed(config.seed)
    options = {"observation_offset": config.observation_offset, **env_options(config)}
    env = make_env(config.env, seed=derived_seed(config.seed, "environments"), **options)
    tasks = env.batch_size.numel()

    # One network for each of critic and actor, with a mask for each task, or two for its two critics.
    common = {"normalize": normalization(config, env.observation_spec), "device": device}
    actor = make_actor(env.observation_spec, env.action_spec, **network_options(config, "actor"), **common)
    qvalue = make_qvalue(env.observation_spec, env.action_spec, **network_options(config, "critic"), **common)

    # The place of an environment is its task, and the task is the index of the subnetwork that plays.
    env.append_transform(SubnetPrimer(actor.num_subnets, fixed=torch.arange(tasks)))

    # Each task trains its own subnetworks, on its own transitions, with a temperature of its own.
    loss = OMNetSACLoss(actor, qvalue, **loss_options(config, env.action_spec))
    loss.make_value_estimator(gamma=config.loss.gamma)
    optimiser = LazyAdam if config.optim.lazy else Adam
    optims = [optimiser(params, lr=config.optim.lr) for params in (qvalue.parameters(), [*actor.parameters(), loss.log_alpha])]
    update = Update(loss, optims, **update_options(config))

    policy = CompiledPolicy(actor, precision=config.precision, compile=config.compile)
    collector = make_collector(config, env, policy, device)
    # One element is a step of all tasks.
    buffer = ReplayBuffer(storage=GatherStorage(min(config.buffer_size, config.total_frames) // tasks, device=device))
    evaluation = Evaluation(config, policy, loss, run.reporter.say)
    masks = make_topology(config, update)  # those that follow each task's own data, where topology.method names them
    trainer = Trainer(collector, buffer, update, evaluation, run.checkpointer, run.reporter, config, masks)
    run.train(trainer, describe(config, actor, qvalue))
    draw(run.folder.path, trainer.tasks, actor)
    return trainer.last.get("eval/return", float("nan"))


def draw(folder: Path, tasks: tuple[str, ...], actor: torch.nn.Module) -> None:
    """Draw each task's return, and the overlap (Jaccard) of the tasks' masks in the actor."""
    figure, metrics = Figure(figsize=(11, 4), layout="constrained"), read_metrics(folder / "metrics.csv")
    returns, overlap = figure.subplots(1, 2, width_ratios=[3, 2])
    for task in tasks:
        if f"eval/return_{task}" in metrics:
            returns.plot(*metrics[f"eval/return_{task}"], marker=".", label=task)
    returns.set(xlabel="frames, all tasks", ylabel="return of a deterministic episode")
    returns.legend()
    masks = [layer.masks.flatten(1) for layer in actor.modules() if isinstance(layer, MaskedLinear)]
    if masks:
        values = mask_iou(torch.cat(masks, 1)).numpy(force=True)
        overlap.imshow(values, vmin=0, vmax=1, cmap="Blues")
        for i, j in torch.cartesian_prod(*[torch.arange(len(tasks))] * 2).tolist():
            colour = "white" if values[i, j] > 0.5 else "black"
            overlap.text(j, i, f"{values[i, j]:.2f}", ha="center", va="center", color=colour)
        overlap.set(title="overlap of the actor's masks", xticks=range(len(tasks)), yticks=range(len(tasks)))
        overlap.set_xticklabels(tasks, rotation=20)
        overlap.set_yticklabels(tasks)
    else:
        overlap.set_axis_off()
    save(figure, folder / "tasks.png")


if __name__ == "__main__":
    execute(main, __file__)
