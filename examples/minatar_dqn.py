"""OMNet-DQN on MinAtar: the whole pipeline in sight.

    python examples/minatar_dqn.py                                  # Breakout, 500,000 frames
    python examples/minatar_dqn.py env=MinAtar/space_invaders seed=3
    python examples/minatar_dqn.py algorithm=dqn                    # or double_dqn, averaged_dqn, maxmin_dqn, bootstrapped_dqn
    python examples/minatar_dqn.py algorithm=dqn network.channels=null network.structure=predictive network.freeze_hidden=true
    python examples/minatar_dqn.py resume=runs/MinAtar/breakout/omnet_dqn/seed0/...  # goes on where a run was stopped
    python examples/minatar_dqn.py --cfg job                        # all options; training/options/options.py describes them

Needs MinAtar's games, whose licence is the GPL-3.0: pip install minatar. Structures of the first layer are after "The Interplay
Between Sparsity and Training in Deep Reinforcement Learning", Davelouis et al., 2025, https://arxiv.org/abs/2501.16729.
"""

import hydra
import torch
from omegaconf import DictConfig
from torch.optim import Adam
from torchrl.data import ReplayBuffer

from omnet_torchrl import CompiledPolicy, GatherStorage, LazyAdam, OMNetDQNLoss, SubnetPrimer, Update
from omnet_torchrl.grids import make_grid_qvalue_actor
from omnet_torchrl.training import Evaluation, Exploring, Run, Trainer, describe, make_collector, make_env
from omnet_torchrl.training.build import grid_options, loss_options, make_topology, update_options
from omnet_torchrl.training.command_line import execute
from omnet_torchrl.training.grid import freeze_hidden, structure_options
from omnet_torchrl.training.loop.environments import env_options
from omnet_torchrl.training.loop.streams import derived_seed


@hydra.main(version_base="1.3", config_path=".", config_name="minatar_dqn")
def main(cfg: DictConfig) -> float:
    with Run.start(cfg) as run:
        return train(run)


def train(run: Run) -> float:
    config, device = run.config, run.device
    torch.manual_seed(config.seed)
    env = make_env(config.env, num_envs=config.num_envs, seed=derived_seed(config.seed, "environments"), **env_options(config))

    # One network and N masks; the first layer may have a structure, the hidden layers may keep their first weights.
    structure = structure_options(config, env.observation_spec)
    actor = make_grid_qvalue_actor(env.observation_spec, env.action_spec, **grid_options(config), **structure, device=device)
    freeze_hidden(config, actor)

    # The subnetwork that is drawn at reset acts greedily on its own values all episode, but for epsilon.
    env.append_transform(SubnetPrimer(actor.num_subnets, generator=config.seed))
    policy = CompiledPolicy(actor, precision=config.precision, compile=config.compile)
    explore = Exploring(policy, config, env.action_spec)

    # Train one random subnetwork; its best action has the minimum of two in the target.
    loss = OMNetDQNLoss(actor, **loss_options(config, env.action_spec))
    loss.make_value_estimator(gamma=config.loss.gamma)
    optimiser = LazyAdam if config.optim.lazy else Adam
    optim = optimiser([parameter for parameter in actor.parameters() if parameter.requires_grad], lr=config.optim.lr)
    update = Update(loss, optim, **update_options(config))

    collector = make_collector(config, env, explore, device)
    buffer = ReplayBuffer(storage=GatherStorage(min(config.buffer_size, config.total_frames), device=device))
    evaluation = Evaluation(config, policy, loss, run.reporter.say)
    topology = make_topology(config, update)
    trainer = Trainer(collector, buffer, update, evaluation, run.checkpointer, run.reporter, config, topology)
    run.train(trainer, describe(config, actor, actor))
    return trainer.last.get("eval/return", float("nan"))


if __name__ == "__main__":
    execute(main, __file__)
