"""OMNet-TD3 on a MuJoCo task: the whole pipeline in sight.

    python examples/omnet_td3.py                                  # Hopper-v4
    python examples/omnet_td3.py --config-name quick_start_td3    # InvertedDoublePendulum-v4, solved in minutes
    python examples/omnet_td3.py algorithm=td3                    # or redq_td3, sin_td3
    python examples/omnet_td3.py resume=runs/Hopper-v4/omnet_td3/seed0/...  # goes on where a run was stopped
    python examples/omnet_td3.py --cfg job                        # all options; training/options/options.py describes them

Equations 4 and 5 of https://arxiv.org/abs/2310.14009 over TD3, Fujimoto et al., 2018, https://arxiv.org/abs/1802.09477.
"""

import hydra
import torch
from omegaconf import DictConfig
from torch.optim import Adam
from torchrl.data import ReplayBuffer

from omnet_torchrl import (
    CompiledPolicy,
    GatherStorage,
    LazyAdam,
    OMNetTD3Loss,
    SubnetPrimer,
    Update,
    make_deterministic_actor,
    make_qvalue,
)
from omnet_torchrl.training import Evaluation, Exploring, Run, Trainer, describe, make_collector, make_env
from omnet_torchrl.training.build import loss_options, make_topology, network_options, normalization, update_options
from omnet_torchrl.training.command_line import execute
from omnet_torchrl.training.loop.environments import env_options
from omnet_torchrl.training.loop.streams import derived_seed


@hydra.main(version_base="1.3", config_path=".", config_name="omnet_td3")
def main(cfg: DictConfig) -> float:
    with Run.start(cfg) as run:
        return train(run)


def train(run: Run) -> float:
    config, device = run.config, run.device
    torch.manual_seed(config.seed)
    num_envs = config.num_envs if config.num_envs > 1 else None  # a single one is stepped without a vector around it
    options = {"observation_offset": config.observation_offset, **env_options(config)}
    env = make_env(config.env, num_envs=num_envs, seed=derived_seed(config.seed, "environments"), **options)

    # One network and N masks, for the critic and for the actor; each episode is played by one subnetwork of the actor.
    specs = env.observation_spec, env.action_spec
    common = {"normalize": normalization(config, env.observation_spec), "device": device}
    actor = make_deterministic_actor(*specs, **network_options(config, "actor"), **common)
    qvalue = make_qvalue(*specs, **network_options(config, "critic"), **common)
    env.append_transform(SubnetPrimer(actor.num_subnets, generator=config.seed))
    policy = CompiledPolicy(actor, precision=config.precision, compile=config.compile)
    explore = Exploring(policy, config, env.action_spec)

    # Train one random critic subnetwork against the minimum of two, the actor against the mean of all (equations 4 and 5).
    loss = OMNetTD3Loss(actor, qvalue, **loss_options(config, env.action_spec))
    loss.make_value_estimator(gamma=config.loss.gamma)
    optimiser = LazyAdam if config.optim.lazy else Adam
    optims = [optimiser(network.parameters(), lr=config.optim.lr) for network in (qvalue, actor)]
    update = Update(loss, optims, **update_options(config))

    collector = make_collector(config, env, explore, device)
    buffer = ReplayBuffer(storage=GatherStorage(min(config.buffer_size, config.total_frames), device=device))
    evaluation = Evaluation(config, policy, loss, run.reporter.say)
    topology = make_topology(config, update)
    trainer = Trainer(collector, buffer, update, evaluation, run.checkpointer, run.reporter, config, topology)
    run.train(trainer, describe(config, actor, qvalue))
    return trainer.last.get("eval/return", float("nan"))


if __name__ == "__main__":
    execute(main, __file__)
