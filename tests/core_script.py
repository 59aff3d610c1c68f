"""A script that needs torch, tensordict, torchrl and this package alone: OMNet-SAC from a replay buffer, compiled."""

import torch
from tensordict import TensorDict
from torchrl.data import Bounded, LazyTensorStorage, TensorDictReplayBuffer, Unbounded
from torchrl.envs.utils import set_exploration_type

from omnet_torchrl import CompiledPolicy, OMNetSACLoss, Update, make_actor, make_qvalue

torch.manual_seed(0)
specs, options = (Unbounded(5), Bounded(-1, 1, (2,))), {"num_subnets": 3, "num_cells": (16, 16), "sparsity": [0, 0.5, 0.5]}
actor, qvalue = make_actor(*specs, **options), make_qvalue(*specs, **options)
loss = OMNetSACLoss(actor, qvalue, fixed_alpha=True, alpha_init=0.1).make_value_estimator(gamma=0.5)
update, policy = Update(loss, lr=3e-3, tau=0.05, policy_update_delay=10), CompiledPolicy(actor)

observation, action, end = torch.randn(1_000, 5), torch.rand(1_000, 2) * 2 - 1, torch.zeros(1_000, 1, dtype=torch.bool)
following = {"observation": torch.randn(1_000, 5), "reward": 3 + observation[:, :1], "done": end, "terminated": end}
buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(1_000))
buffer.extend(TensorDict({"observation": observation, "action": action, "next": following}, [1_000]))
losses = [float(update(buffer.sample(10 * 32).reshape(10, 32))["loss_qvalue"]) for _ in range(40)]
assert losses[-1] < 0.5 * losses[0], f"the critic's loss must fall, got {losses}"

batch, question = buffer.sample(32), TensorDict({"observation": observation[:4], "subnet": torch.arange(4) % 3}, [4])
draws, values = loss.draw(batch), []
with set_exploration_type("deterministic"), torch.no_grad():
    policy.prepare(question)
    for _ in range(2):  # compiled and plain see the same masks, the second time others, written in place
        values.append(loss.qvalue_loss(batch, draws=draws)[0])
        torch.testing.assert_close(policy(question.clone())["action"], actor(question.clone())["action"], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(update(batch.clone(), draws=draws)["loss_qvalue"], values[-1], rtol=1e-4, atol=1e-5)
        for layer in (layer for network in (actor, qvalue) for layer in network.modules() if hasattr(layer, "masks")):
            layer.masks.copy_(layer.masks.roll(1, 0))
assert abs(values[1] / values[0] - 1) > 0.05, f"other masks must change the loss, got {values}"
print(f"critic's loss {losses[0]:.3f} -> {losses[-1]:.3f}; under other masks {values[1]:.3f}")
