"""DAPD on a MuJoCo task: SAC within 5 % of the weights, which are found from data while it trains.

    python examples/dapd_sac.py                                   # HalfCheetah-v4 with the paper's settings
    python examples/dapd_sac.py --config-name quick_start_dapd    # InvertedDoublePendulum-v4, solved in minutes
    python examples/dapd_sac.py network.sparsity=0.8 topology.freeze_return=8000
    python examples/dapd_sac.py algorithm=rigl                    # or set, static_erk, sac_small (dense), sac
    python examples/dapd_sac.py resume=runs/HalfCheetah-v4/dapd/seed0/...  # goes on where a run was stopped
    python examples/dapd_sac.py --cfg job                         # all options; training/options/options.py describes them

The folder's learning_curve.png has the overlap of the masks with those before, and the density of each layer, over time.

"Efficient Reinforcement Learning by Discovering Neural Pathways", Arnob et al., 2024.
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
    MaskSchedule,
    OMNetSACLoss,
    SubnetPrimer,
    Update,
    make_actor,
    make_qvalue,
)
from omnet_torchrl.training import Evaluation, Run, Trainer, describe, make_collector, make_env
from omnet_torchrl.training.build import loss_options, network_options, normalization, topology_options, update_options
from omnet_torchrl.training.command_line import execute
from omnet_torchrl.training.loop.environments import env_options
from omnet_torchrl.training.loop.streams import derived_seed


@hydra.main(version_base="1.3", config_path=".", config_name="dapd_sac")
def main(cfg: DictConfig) -> float:
    with Run.start(cfg) as run:
        return train(run)


def train(run: Run) -> float:
    config, device = run.config, run.device
    torch.manual_seed(config.seed)
    num_envs = config.num_envs if config.num_envs > 1 else None  # a single one is stepped without a vector around it
    options = {"observation_offset": config.observation_offset, **env_options(config)}
    env = make_env(config.env, num_envs=num_envs, seed=derived_seed(config.seed, "environments"), **options)

    # Two critics and an actor; each weight has a mask, which keeps all of them at first.
    common = {"normalize": normalization(config, env.observation_spec), "device": device}
    actor = make_actor(env.observation_spec, env.action_spec, **network_options(config, "actor"), **common)
    qvalue = make_qvalue(env.observation_spec, env.action_spec, **network_options(config, "critic"), **common)
    env.append_transform(SubnetPrimer(actor.num_subnets, generator=config.seed))

    # SAC: both critics are trained on the minimum of both, the actor on their mean.
    loss = OMNetSACLoss(actor, qvalue, **loss_options(config, env.action_spec))
    loss.make_value_estimator(gamma=config.loss.gamma)
    optimiser = LazyAdam if config.optim.lazy else Adam
    critic_optim = optimiser(qvalue.parameters(), lr=config.optim.lr)
    actor_optim = optimiser([*actor.parameters(), loss.log_alpha], lr=config.optim.lr)
    update = Update(loss, [critic_optim, actor_optim], **update_options(config))

    # Score |weight * gradient| on the newest transitions; the top 5 % over both critics, and over the actor, are the masks.
    # They change each 1,000 frames (warm-up), and stay once they overlap with the last by 80 %, or after a fifth (freeze).
    topology = MaskSchedule(update, **topology_options(config)) if config.topology.method else None

    policy = CompiledPolicy(actor, precision=config.precision, compile=config.compile)
    collector = make_collector(config, env, policy, device)
    buffer = ReplayBuffer(storage=GatherStorage(min(config.buffer_size, config.total_frames), device=device))
    evaluation = Evaluation(config, policy, loss, run.reporter.say)
    trainer = Trainer(collector, buffer, update, evaluation, run.checkpointer, run.reporter, config, topology)
    run.train(trainer, describe(config, actor, qvalue))
    return trainer.last.get("eval/return", float("nan"))


if __name__ == "__main__":
    execute(main, __file__)
