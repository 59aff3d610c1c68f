"""OMNet-SAC on a MuJoCo task: the whole pipeline in sight.

    python examples/omnet_sac.py                                  # Hopper-v4 with the paper's settings
    python examples/omnet_sac.py --config-name quick_start        # InvertedDoublePendulum-v4, solved in minutes
    python examples/omnet_sac.py env=Humanoid-v4 seed=3 network.num_subnets=8
    python examples/omnet_sac.py env=my_module:MyEnv-v0 env_kwargs.size=3 max_episode_steps=500  # of the working directory
    python examples/omnet_sac.py algorithm=redq                   # a baseline; training/options/rows.py has the rows
    python examples/omnet_sac.py -m seed=0,1,2                    # one run after the other
    python examples/omnet_sac.py resume=runs/Hopper-v4/omnet/seed0/...  # goes on where a run was stopped
    python examples/omnet_sac.py resume=auto folder=runs/mine     # starts it, or goes on with it: for schedulers
    python examples/omnet_sac.py --cfg job                        # all options; training/options/options.py describes them

"One is More: Diverse Perspectives within a Single Network for Efficient DRL", Tan et al., 2023,
https://arxiv.org/abs/2310.14009.
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
    OMNetSACLoss,
    SubnetPrimer,
    Update,
    make_actor,
    make_qvalue,
)
from omnet_torchrl.training import (
    Evaluation,
    Run,
    Trainer,
    describe,
    make_collector,
    make_env,
)
from omnet_torchrl.training.build import loss_options, make_topology, network_options, normalization, update_options
from omnet_torchrl.training.command_line import execute
from omnet_torchrl.training.loop.environments import env_options
from omnet_torchrl.training.loop.streams import derived_seed


@hydra.main(version_base="1.3", config_path=".", config_name="omnet_sac")
def main(cfg: DictConfig) -> float:
    with Run.start(cfg) as run:
        return train(run)


def train(run: Run) -> float:
    config, device = run.config, run.device
    torch.manual_seed(config.seed)

    num_envs = config.num_envs if config.num_envs > 1 else None  # a single one is stepped without a vector around it
    seed = derived_seed(config.seed, "environments")
    options = {"observation_offset": config.observation_offset, **env_options(config)}
    env = make_env(config.env, num_envs=num_envs, seed=seed, **options)

    # One network and N masks, for the critic and for the actor (section 3.1).
    specs = env.observation_spec, env.action_spec
    common = {"normalize": normalization(config, env.observation_spec), "device": device}
    actor = make_actor(*specs, **network_options(config, "actor"), **common)
    qvalue = make_qvalue(*specs, **network_options(config, "critic"), **common)

    # The environment draws, at each reset, the subnetwork that plays the episode (section 3.3).
    env.append_transform(SubnetPrimer(actor.num_subnets, generator=config.seed))

    # Train one random critic subnetwork against the minimum of two, the actor against the mean of all (equations 4 and 5).
    loss = OMNetSACLoss(actor, qvalue, **loss_options(config, env.action_spec))
    loss.make_value_estimator(gamma=config.loss.gamma)
    optimiser = LazyAdam if config.optim.lazy else Adam
    critic_optim = optimiser(qvalue.parameters(), lr=config.optim.lr)
    actor_optim = optimiser([*actor.parameters(), loss.log_alpha], lr=config.optim.lr)
    update = Update(loss, [critic_optim, actor_optim], **update_options(config))

    policy = CompiledPolicy(actor, precision=config.precision, compile=config.compile)
    collector = make_collector(config, env, policy, device)
    capacity = min(config.buffer_size, config.total_frames)
    buffer = ReplayBuffer(storage=GatherStorage(capacity, device=device))
    evaluation = Evaluation(config, policy, loss, run.reporter.say)
    topology = make_topology(config, update)  # of rows whose masks follow the weights, see dapd_sac.py
    trainer = Trainer(collector, buffer, update, evaluation, run.checkpointer, run.reporter, config, topology)
    run.train(trainer, describe(config, actor, qvalue))
    return trainer.last.get("eval/return", float("nan"))


if __name__ == "__main__":
    execute(main, __file__)
