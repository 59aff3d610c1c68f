"""The peers' worker: SBX (SAC in JAX), its own ``train`` of 20 gradient steps with replay sampling.

Runs in an environment of its own (``requirements-peers.txt``), started by ``run.py --peers``; imports nothing of ours but the
protocol.
"""

import argparse
import warnings
from functools import partial
from importlib.metadata import version

import gymnasium
import jax
import numpy as np
from protocol import Block, serve
from sbx import SAC
from stable_baselines3.common.logger import Logger

UPDATES, BATCH, STORED = 20, 256, 50_000
TASKS = {"hopper": (11, 3, 1.0), "humanoid": (376, 17, 0.4)}
# The rows; DroQ is SBX's own configuration of it.
ROWS = {
    "SBX SAC": {"n_critics": 2},
    "SBX DroQ": {"n_critics": 2, "dropout_rate": 0.01, "layer_norm": True},
    "SBX 10 critics": {"n_critics": 10},
}


class Sizes(gymnasium.Env):
    """An environment that is only its spaces."""

    def __init__(self, observation: int, action: int, bound: float):
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (observation,), np.float32)
        self.action_space = gymnasium.spaces.Box(-bound, bound, (action,), np.float32)


def block(row: str, task: str) -> Block:
    """20 gradient steps, the actor's in one of them, from a full replay buffer."""
    sizes, rng = TASKS[task], np.random.default_rng(0)
    model = SAC(
        "MlpPolicy",
        Sizes(*sizes),
        buffer_size=STORED,
        batch_size=BATCH,
        gradient_steps=UPDATES,
        policy_delay=UPDATES,
        policy_kwargs={"net_arch": [256, 256], **ROWS[row]},
        seed=0,
    )
    model.set_logger(Logger(folder=None, output_formats=[]))
    buffer = model.replay_buffer
    buffer.observations[:] = rng.standard_normal(buffer.observations.shape)
    buffer.next_observations[:] = rng.standard_normal(buffer.observations.shape)
    buffer.actions[:] = rng.uniform(-1, 1, buffer.actions.shape)
    buffer.rewards[:] = rng.standard_normal(buffer.rewards.shape)
    buffer.dones[:] = rng.random(buffer.dones.shape) < 0.01
    buffer.full = True

    def run() -> None:
        model.train(UPDATES, BATCH)
        jax.block_until_ready((model.policy.qf_state.params, model.policy.actor_state.params, model.ent_coef_state.params))

    for _ in range(3):
        run()
    return run


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    argparse.ArgumentParser(description=__doc__).parse_args()
    versions = {name: version(name) for name in ("sbx-rl", "jax", "jaxlib", "flax")}
    serve({f"{row} {task}": partial(block, row, task) for row in ROWS for task in TASKS}, versions)
