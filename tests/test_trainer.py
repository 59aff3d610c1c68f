"""The parts inside TorchRL's own trainer."""

import pytest
import torch
from torchrl.collectors import Collector
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
from torchrl.envs import GymEnv, InitTracker, RewardSum, TransformedEnv
from torchrl.objectives import SoftUpdate
from torchrl.trainers.algorithms.sac import SACTrainer

from omnet_torchrl import OMNetSACLoss, make_actor, make_qvalue


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
