"""OMNet-SAC on a MuJoCo task, the whole pipeline in sight.

    python examples/omnet_sac.py
    python examples/omnet_sac.py env=InvertedPendulum-v4 total_frames=6000 init_random_frames=1000 eval.interval=1000

"One is More: Diverse Perspectives within a Single Network for Efficient DRL", Tan et al., 2023,
https://arxiv.org/abs/2310.14009. omnet_sac.yaml describes the options. Every logged value is a row of metrics.csv in the run's
folder.
"""

import csv
import time
import warnings
from pathlib import Path

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from torch.optim import Adam
from torchrl.collectors import Collector
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
from torchrl.envs import Compose, DoubleToFloat, EnvBase, GymEnv, InitTracker, RewardSum, StepCounter, TransformedEnv
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.objectives import SoftUpdate
from tqdm import tqdm

from omnet_torchrl import OMNetSACLoss, SubnetActor, SubnetPrimer, make_actor, make_qvalue

# Target entropies that REDQ published for these tasks; -dim(action) elsewhere.
TARGET_ENTROPY = {"Hopper-v4": -1.0, "Walker2d-v4": -3.0, "Ant-v4": -4.0, "Humanoid-v4": -2.0}


def make_env(name: str, seed: int, *transforms) -> EnvBase:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is out of date")  # the paper's tasks are the -v4 ones
        env = GymEnv(name)
    env = TransformedEnv(env, Compose(DoubleToFloat(), InitTracker(), RewardSum(), StepCounter(), *transforms))
    env.set_seed(seed)
    return env


@torch.no_grad()
def evaluate(actor: SubnetActor, env: EnvBase, episodes: int) -> dict[str, float]:
    """Undiscounted returns of deterministic episodes that cycle through the subnetworks, each as a plain network."""
    returns, lengths = [[] for _ in range(actor.num_subnets)], []
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        for episode in range(episodes):
            subnet = episode % actor.num_subnets
            last = env.rollout(100_000, actor.extract(subnet))[-1]["next"]
            returns[subnet].append(last["episode_reward"].item())
            lengths.append(last["step_count"].item())
    metrics = {f"eval/return_subnet_{k}": sum(r) / len(r) for k, r in enumerate(returns) if r}
    metrics["eval/return"] = sum(map(sum, returns)) / episodes
    metrics["eval/length"] = sum(lengths) / episodes
    return metrics


@hydra.main(version_base="1.3", config_path=".", config_name="omnet_sac")
def main(cfg: DictConfig) -> float:
    device = torch.device(cfg.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    folder = Path(HydraConfig.get().runtime.output_dir)
    torch.manual_seed(cfg.seed)

    # The environment draws, at each reset, the subnetwork that plays the episode (section 3.3).
    env = make_env(cfg.env, cfg.seed, SubnetPrimer(cfg.network.num_subnets, generator=cfg.seed))
    eval_env = make_env(cfg.env, cfg.seed + 1_000_000).to(device)

    # One network and N masks, for the critic and for the actor (section 3.1).
    actor = make_actor(env.observation_spec, env.action_spec, **cfg.network, device=device)
    qvalue = make_qvalue(env.observation_spec, env.action_spec, **cfg.network, device=device)
    actor.check_env(env)

    # Train one random critic subnetwork against the minimum of two, the actor against the mean of all (equations 4 and 5).
    target_entropy = cfg.optim.target_entropy
    if target_entropy is None:
        target_entropy = TARGET_ENTROPY.get(cfg.env, "auto")
    loss = OMNetSACLoss(actor, qvalue, target_entropy=target_entropy)
    loss.make_value_estimator(gamma=cfg.optim.gamma)
    target_updater = SoftUpdate(loss, tau=cfg.optim.tau)
    critic_optim = Adam(qvalue.parameters(), lr=cfg.optim.lr)
    actor_optim = Adam([*actor.parameters(), loss.log_alpha], lr=cfg.optim.lr)

    collector = Collector(
        env,
        actor,
        frames_per_batch=1,
        total_frames=cfg.total_frames,
        init_random_frames=cfg.init_random_frames,
        device=device,
        auto_register_policy_transforms=False,
    )
    # The batches of all the updates of a frame are sampled at once: one gather instead of twenty.
    buffer = TensorDictReplayBuffer(
        storage=LazyTensorStorage(min(cfg.buffer_size, cfg.total_frames), device=device),
        batch_size=cfg.utd_ratio * cfg.optim.batch_size,
    )

    def update(batch, train_actor: bool) -> dict[str, torch.Tensor]:
        draws = loss.draw(batch)
        loss_qvalue, critic_data = loss.qvalue_loss(batch, draws=draws)
        critic_optim.zero_grad()
        loss_qvalue.backward()
        critic_optim.step()
        metrics = {"train/loss_qvalue": loss_qvalue, "train/qvalue": critic_data["pred_value"].mean()}
        if train_actor:
            loss_actor, actor_data = loss.actor_loss(batch, draws=draws)
            loss_alpha = loss.alpha_loss(actor_data["log_prob"]).mean()
            actor_optim.zero_grad()
            (loss_actor + loss_alpha).backward()
            actor_optim.step()
            entropy = -actor_data["log_prob"].mean()
            metrics |= {"train/loss_actor": loss_actor, "train/alpha": loss.log_alpha.exp(), "train/entropy": entropy}
        target_updater.step()
        return {name: value.detach() for name, value in metrics.items()}

    with (folder / "metrics.csv").open("w", newline="") as file, tqdm(total=cfg.total_frames, unit="frame") as bar:
        rows = csv.writer(file)
        rows.writerow(["frames", "seconds", "name", "value"])

        def log(metrics: dict[str, float]) -> None:
            rows.writerows([bar.n, f"{time.perf_counter() - start:.1f}", name, float(v)] for name, v in metrics.items())
            file.flush()

        start, updates, eval_metrics, shown = time.perf_counter(), 0, {}, {}
        bar.write(f"{cfg.env}, seed {cfg.seed}, on {device}; results go to {folder}")
        for data in collector:
            buffer.extend(data.select(*loss.in_keys))
            bar.update(data.numel())
            for done in data[data["next", "done"].squeeze(-1)]["next"]:
                shown["episode"] = f"{done['episode_reward'].item():.0f}"
                log({"train/episode_return": done["episode_reward"], "train/episode_length": done["step_count"]})

            if bar.n > cfg.init_random_frames:
                for batch in buffer.sample().reshape(cfg.utd_ratio, cfg.optim.batch_size):
                    updates += 1
                    metrics = update(batch, train_actor=updates % cfg.policy_update_delay == 0)
                if bar.n % 100 == 0:
                    log({**metrics, "time/updates": updates})

            if bar.n % cfg.eval.interval == 0 or bar.n == cfg.total_frames:
                eval_metrics = evaluate(actor, eval_env, cfg.eval.episodes)
                log(eval_metrics)
                shown["eval"] = f"{eval_metrics['eval/return']:.0f}"
                bar.write(f"{bar.n:>8} frames: evaluation return {eval_metrics['eval/return']:.1f}")
            bar.set_postfix(shown, refresh=False)
        collector.shutdown()
    return eval_metrics["eval/return"]


if __name__ == "__main__":
    main()
