"""The parts inside TorchRL's own trainer and collectors."""

import pytest
import torch
from torchrl.collectors import Collector, MultiSyncCollector
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
from torchrl.envs import GymEnv, InitTracker, RewardSum, SerialEnv, TransformedEnv
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.objectives import SoftUpdate
from torchrl.trainers import ReplayBufferTrainer, Trainer
from torchrl.trainers.algorithms.sac import SACTrainer

from omnet_torchrl import OMNetSACLoss, Update, make_actor, make_qvalue
from omnet_torchrl.updates import UpdateStepper


@pytest.mark.filterwarnings("ignore:SACTrainer is an experimental:UserWarning")
@pytest.mark.filterwarnings("ignore:The '.*' hook stage:FutureWarning")
def test_the_loss_trains_inside_torchrls_sac_trainer():
    env = TransformedEnv(GymEnv("Pendulum-v1"), InitTracker()).append_transform(RewardSum(["reward"], ["reward_sum"]))
    kwargs = {"num_cells": (32, 32), "num_subnets": 3, "generator": 0, "sparsity": 0.1}
    actor, qvalue = (make(env.observation_spec, env.action_spec, **kwargs) for make in (make_actor, make_qvalue))
    env = env.append_transform(actor.make_tensordict_primer(generator=0))
    loss = OMNetSACLoss(actor, qvalue)
    before = {name: p.clone() for name, p in loss.named_parameters()}
    masks = [b.clone() for name, b in loss.named_buffers() if "masks" in name]
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(1_000), batch_size=32)
    trainer = SACTrainer(
        collector=Collector(env, actor, frames_per_batch=50, total_frames=300),
        total_frames=300,
        frame_skip=1,
        optim_steps_per_batch=4,
        loss_module=loss,
        optimizer=torch.optim.Adam(loss.parameters(), lr=1e-3),
        target_net_updater=SoftUpdate(loss, tau=0.01),
        replay_buffer=buffer,
        progress_bar=False,
        log_interval=50,
    )
    trainer.train()
    assert len(buffer) == 300
    assert set(buffer[:]["subnet"].tolist()) <= {0, 1, 2}
    for name, p in loss.named_parameters():
        assert p.isfinite().all()
        if not name.startswith("target"):
            assert not torch.equal(p, before[name]), name
    assert all(torch.equal(b, m) for b, m in zip([b for n, b in loss.named_buffers() if "masks" in n], masks, strict=True))


@pytest.mark.filterwarnings("ignore:The '.*' hook stage:FutureWarning")
def test_an_update_trains_inside_torchrls_trainer():
    env = make_env()
    kwargs = {"num_cells": (32, 32), "num_subnets": 3, "generator": 0, "sparsity": 0.1}
    actor, qvalue = (make(env.observation_spec, env.action_spec, **kwargs) for make in (make_actor, make_qvalue))
    env = env.append_transform(actor.make_tensordict_primer(generator=0))
    update = Update(OMNetSACLoss(actor, qvalue), policy_update_delay=4, compile=False)
    before = {name: p.clone() for name, p in update.loss.named_parameters()}
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(1_000), batch_size=4 * 16)
    trainer = Trainer(
        collector=Collector(env, actor, frames_per_batch=50, total_frames=200),
        total_frames=200,
        frame_skip=1,
        optim_steps_per_batch=2,
        loss_module=update.loss,
        optimization_stepper=UpdateStepper(update, num_updates=4),
        progress_bar=False,
    )
    replay = ReplayBufferTrainer(buffer, flatten_tensordicts=True)
    replay.register(trainer)
    trainer.train()
    assert update.updates == 4 * 2 * 4
    for name, p in update.loss.named_parameters():
        assert p.isfinite().all()
        assert not torch.equal(p, before[name]), name
    assert trainer.optimization_stepper.state_dict()["updates"] == update.updates


def make_env():
    return TransformedEnv(GymEnv("Pendulum-v1"), InitTracker())


@pytest.mark.parametrize("workers", [0, 1])
def test_a_collector_plays_with_the_weights_it_is_given(workers):
    env = make_env()
    actor = make_actor(env.observation_spec, env.action_spec, num_cells=(8,), num_subnets=3, sparsity=0.0)
    kwargs = {"frames_per_batch": 20, "total_frames": 40, "auto_register_policy_transforms": True}
    collector = MultiSyncCollector([make_env], actor, **kwargs) if workers else Collector(env, actor, **kwargs)
    try:
        batches = iter(collector)
        first = next(batches)
        with torch.no_grad():  # a saturated policy: every action at its upper bound
            actor.module[0].network[-1].bias[0] = 100.0
        collector.update_policy_weights_()
        second = next(batches)
    finally:
        collector.shutdown()
    assert first["action"].abs().max() < 2
    torch.testing.assert_close(second["action"], torch.full_like(second["action"], 2.0))
    assert set(first["subnet"].flatten().tolist()) <= {0, 1, 2}


def test_one_actor_plays_a_batch_of_environments_each_with_its_own_subnet():
    env = TransformedEnv(SerialEnv(8, make_env))
    actor = make_actor(env.observation_spec, env.action_spec, num_cells=(8,), num_subnets=3, sparsity=0.1, generator=0)
    env = env.append_transform(actor.make_tensordict_primer(generator=0))
    actor.check_env(env)
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        rollout = env.rollout(4, actor)
        for i, subnet in enumerate(rollout["subnet"][:, 0].tolist()):
            alone = actor.extract(subnet)(rollout[i].select("observation"))
            torch.testing.assert_close(rollout["action"][i], alone["action"])
    assert len(rollout["subnet"][:, 0].unique()) > 1
