"""The rows of the results table: what each is, its equations in plain torch, and that it goes on after a kill."""

import contextlib
import math
import warnings
from pathlib import Path

import pytest
import torch
from conftest import ACT, OBS, make_batch, run_script
from maze import read_trajectories
from tensordict import TensorDict
from test_resume import Crash, Stopping, differing, leaves, result, untimed
from torch import nn
from torch.nn import functional as F
from torchrl.collectors import Collector
from torchrl.data import Bounded, LazyTensorStorage, TensorDictReplayBuffer, Unbounded
from torchrl.envs.utils import ExplorationType, set_exploration_type

from omnet_torchrl import (
    CompiledPolicy,
    EnsembleMLP,
    MaskedMLP,
    RedrawnMLP,
    SubnetPrimer,
    UnitMaskedMLP,
    hashed_masks,
    make_qvalue,
)
from omnet_torchrl.layers import EnsembleLinear, MaskedLinear, RedrawnLinear, StructuredLinear
from omnet_torchrl.masks import random_bits
from omnet_torchrl.metrics import sac_flops
from omnet_torchrl.structures import l1_structure
from omnet_torchrl.training import Evaluation, Exploring, Trainer, load_policy, make_env
from omnet_torchrl.training import grid as grid_module
from omnet_torchrl.training.build import build, describe, make_topology, network_options, training_flops
from omnet_torchrl.training.loop import evaluation as evaluation_module
from omnet_torchrl.training.loop.environments import env_options
from omnet_torchrl.training.loop.streams import derived_seed
from omnet_torchrl.training.loop.tasks import task_labels
from omnet_torchrl.training.options import ROWS, LossConfig, NetworkConfig, TrainConfig, row, to_config
from omnet_torchrl.training.options.rows import dropout, network_sparsity, target_entropy
from omnet_torchrl.training.record.checkpoint import Checkpointer

EXAMPLES = Path(__file__).parent.parent / "examples"
EXAMPLE = {
    name: EXAMPLES / f"{script}.py"
    for name, script in {"sac": "omnet_sac", "td3": "omnet_td3", "dqn": "minatar_dqn", "tasks": "multitask"}.items()
}
EXAMPLE["dapd"] = EXAMPLES / "dapd_sac.py"  # a row with a script of its own, which has its paper's options
DAPD = {"loss": {"alpha_init": 0.1}, "optim": {"batch_size": 8, "lr": 1e-3, "target_update_interval": 2}}
TASKS = ["Hopper-v4", "Walker2d-v4", "Ant-v4", "Humanoid-v4"]
REDQ_ENTROPY, HALF = [-1, -3, -4, -2], [-1.5, -3, -4, -8.5]

# From the papers, not from the code: critic's class and number, (K, M, V), LayerNorm of critic and actor, updates per frame,
# delay, frames between resets, target entropy and dropout on the four tasks.
ALL = "all"
EXPECTED = {
    "omnet": (MaskedMLP, 5, (1, 2, 5), (True, True), 20, 20, None, REDQ_ENTROPY, [0] * 4),
    "omnet_critic": (MaskedMLP, 5, (1, 2, 5), (True, True), 20, 20, None, REDQ_ENTROPY, [0] * 4),
    "omnet_infinity": (RedrawnMLP, 2**31, (1, 2, 5), (True, True), 20, 20, None, REDQ_ENTROPY, [0] * 4),
    "sac": (EnsembleMLP, 2, (2, 2, 2), (False, False), 1, 1, None, REDQ_ENTROPY, [0] * 4),
    "sac_20": (EnsembleMLP, 2, (2, 2, 2), (False, False), 20, 20, None, REDQ_ENTROPY, [0] * 4),
    "redq": (EnsembleMLP, 10, (10, 2, 10), (False, False), 20, 20, None, REDQ_ENTROPY, [0] * 4),
    "droq": (EnsembleMLP, 2, (2, 2, 2), (True, False), 20, 20, None, REDQ_ENTROPY, [0.001, 0.003, 0.01, 0.03]),
    "sr_sac": (EnsembleMLP, 2, (2, 2, 2), (False, False), 20, 20, 100_000, HALF, [0] * 4),
    "sin_sac": (EnsembleMLP, 1, (1, 1, 1), (False, False), 20, 20, None, REDQ_ENTROPY, [0] * 4),
    "sin_droq": (EnsembleMLP, 1, (1, 1, 1), (True, False), 20, 20, None, REDQ_ENTROPY, [0.001, 0.01, 0.1, 0.01]),
    "sr_sin_sac": (EnsembleMLP, 1, (1, 1, 1), (False, False), 20, 20, 100_000, HALF, [0] * 4),
    "redq_layer_norm": (EnsembleMLP, 10, (10, 2, 10), (True, True), 20, 20, None, REDQ_ENTROPY, [0] * 4),
    "sac_20_layer_norm": (EnsembleMLP, 2, (2, 2, 2), (True, True), 20, 20, None, REDQ_ENTROPY, [0] * 4),
    "sin_sac_layer_norm": (EnsembleMLP, 1, (1, 1, 1), (True, True), 20, 20, None, REDQ_ENTROPY, [0] * 4),
    "omnet_adaptive": (MaskedMLP, 5, (1, 2, 5), (True, True), 20, 20, None, REDQ_ENTROPY, [0] * 4),
    **{
        name: (EnsembleMLP, 2, (2, 2, 2), (False, False), 1, 1, None, REDQ_ENTROPY, [0] * 4)
        for name in ("dapd", "rigl", "set", "static_erk", "sac_small")
    },
}
DENSE_ACTOR = set(EXPECTED) - {"omnet", "omnet_infinity", "omnet_adaptive"}  # one network, with or without a mask


def make(name, *, cells=(16, 12), obs=5, act=2, **options):
    """A row, small and eager, of observations of 5 numbers and actions of 2 within [-0.4, 1]."""
    options = {"algorithm": name, "compile": False, "network": {"num_cells": list(cells)}, **options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # small networks have units without inputs
        return build(to_config(options), Unbounded((obs,)), Bounded(-0.4, 1.0, (act,)))


# What a row is


def test_the_rows_are_those_of_the_table():
    assert {name for name, each in ROWS.items() if each.loss == "sac"} == set(EXPECTED)
    assert len({each.label for each in ROWS.values()}) == len(ROWS)


@pytest.mark.parametrize("name", EXPECTED)
def test_a_row_is_what_its_paper_says(name):
    critic, number, counts, norms, utd, delay, reset, entropies, dropouts = EXPECTED[name]
    algorithm, config = make(name), to_config({"algorithm": name})
    network, actor = algorithm.qvalue.module, algorithm.actor.module[0].network
    loss = algorithm.loss
    assert type(network) is critic
    assert loss.num_subnets == number
    assert (loss.num_trained_subnets, loss.num_target_subnets, loss.num_value_subnets) == counts
    assert loss.value_reduction == "mean"
    assert type(actor) is (EnsembleMLP if name in DENSE_ACTOR else critic)
    assert loss.num_actor_subnets == (1 if name in DENSE_ACTOR else number)
    assert tuple(any("Norm" in type(layer).__name__ for layer in net) for net in (network, actor)) == norms
    assert not any(isinstance(layer, nn.Dropout) for layer in actor)
    assert (config.utd_ratio, config.policy_update_delay, config.reset_interval) == (utd, delay, reset)
    for task, action_dim, entropy, rate in zip(TASKS, (3, 6, 8, 17), entropies, dropouts, strict=True):
        of_task = to_config({"algorithm": name, "env": task})
        assert target_entropy(of_task, action_dim) == entropy
        assert dropout(of_task) == rate
    rest = (config.optim.lr, config.optim.batch_size, config.optim.tau, config.loss.gamma, config.init_random_frames)
    assert rest == (3e-4, 256, 0.005, 0.99, 5_000)


@pytest.mark.parametrize(
    ("name", "hopper", "humanoid"),
    [
        ("redq", 1213.3, 2911.9),
        ("sac_20", 332.4, 799.0),
        ("droq", 332.4, 799.0),
        ("sin_sac", 186.8, 449.7),
        ("omnet", 236.5, 569.0),
    ],
)
def test_the_flops_of_a_row_are_those_of_the_papers_convention(name, hopper, humanoid):
    config = to_config({"algorithm": name})
    assert training_flops(config, 11, 3) / 1e6 == pytest.approx(hopper, abs=0.05)
    assert training_flops(config, 376, 17) / 1e6 == pytest.approx(humanoid, abs=0.05)
    assert training_flops(config, 376, 17, exact=True) < training_flops(config, 376, 17)


@pytest.mark.parametrize("sparsity", [0.29, 0.5, [0.5, 0.25]])
def test_the_flops_of_unit_masks_are_of_the_units_that_they_keep(sparsity):
    config = to_config({"network": {"masks": "unit", "sparsity": sparsity}})
    qvalue = make_qvalue(Unbounded((11,)), Bounded(-1, 1, (3,)), **network_options(config, "critic"))
    kept = qvalue.module.extract(0).num_cells
    smaller = to_config({"network": {"num_cells": kept}})
    assert training_flops(config, 11, 3) == training_flops(smaller, 11, 3) < training_flops(to_config({}), 11, 3)


def test_the_flops_are_those_of_each_networks_own_units():
    def flops(**network):
        return training_flops(to_config({"network": {"masks": "unit", **network}}), 11, 3)

    half = [128, 128]
    assert flops() == sac_flops(11, 3, half)
    assert flops(actor="dense") == sac_flops(11, 3, half, actor_cells=(256, 256)) > flops()
    assert flops(critic="separate", num_subnets=2) == sac_flops(11, 3, actor_cells=half, num_value=2)
    assert flops(critic="separate", actor="dense", num_subnets=2) == sac_flops(11, 3, num_value=2)


@pytest.mark.parametrize("masks", ["weight", "unit", "redrawn"])
def test_actor_and_critic_have_masks_of_their_own_which_the_seed_tells(masks):
    def generators(seed):
        loss = {"loss": {"replacement": True}} if masks == "redrawn" else {}
        config = to_config({"seed": seed, "network": {"masks": masks}, **loss})
        return [network_options(config, role)["generator"] for role in ("actor", "critic")]

    assert generators(0) == generators(0)
    assert len({*generators(0), *generators(1)}) == 4


def test_what_is_given_goes_before_the_row_and_the_row_before_the_defaults():
    config = to_config({"algorithm": "redq", "network": {"num_subnets": 4}, "utd_ratio": 5})
    assert (config.network.num_subnets, config.network.critic, config.utd_ratio) == (4, "separate", 5)
    assert to_config({"algorithm": "droq", "network": {"dropout": 0.2}}).network.dropout == 0.2
    assert dropout(to_config({"algorithm": "droq", "env": "InvertedPendulum-v4"})) == 0.01
    assert target_entropy(to_config({"algorithm": "sr_sac", "loss": {"target_entropy": -7.0}}), 3) == -7


def test_an_unknown_row_names_the_closest():
    with pytest.raises(ValueError, match=r"algorithm must be one of omnet, .*, got 'redQ'; the closest are redq,"):
        row("redQ")
    with pytest.raises(ValueError, match="got 'sac20'; the closest are sac_20"):
        to_config({"algorithm": "sac20"})


# Its equations


def layers_of(network, values=None):
    """What a network does, in order: weights as leaves that are trained, or of ``values`` (a target's)."""
    layers = []
    for i, layer in enumerate(network):
        tensors = {
            name: (layer.get_parameter(name) if values is None else values[str(i)][name])
            for name, _ in layer.named_parameters()
        }
        layers.append((layer, {name: tensor.detach().clone().requires_grad_() for name, tensor in tensors.items()}))
    return layers


def answer(layers, subnets, x, seed=None):
    """The networks ``subnets``, one after the other: ``(K, B, out)``."""
    outputs = []
    for place, k in enumerate(subnets):
        h = x
        for layer, own in layers:
            separate = type(layer).__name__.startswith("Ensemble")
            weight, bias = ((own[n][k] if separate else own[n]) for n in ("weight", "bias")) if own else (None, None)
            if isinstance(layer, MaskedLinear):
                weight = weight * layer.masks[k]
            if isinstance(layer, RedrawnLinear):
                weight = weight * hashed_masks(torch.tensor([k]), weight.shape, 0.5, layer.key)[0]
            if isinstance(layer, EnsembleLinear | nn.Linear):
                h = h @ weight.T + bias
            elif isinstance(layer, nn.Dropout):
                bits = random_bits(seed, len(subnets) * h.numel(), layer.stream).view(len(subnets), *h.shape)[place]
                h = torch.where(bits >= layer.p * 2**32, h / (1 - layer.p), 0.0)
            elif isinstance(layer, nn.ReLU):
                h = h.clamp(min=0)
            else:
                h = (h - h.mean(-1, keepdim=True)) / (h.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt() * weight + bias
        outputs.append(h)
    return torch.stack(outputs)


def policy(layers, subnet, state, noise, low=-0.4, high=1.0):
    """A tanh-squashed Gaussian action within [low, high] and its log-probability in [-1, 1], by change of variables."""
    mean, log_std = answer(layers, [subnet], state)[0].chunk(2, -1)
    std = log_std.clamp(-20, 2).exp()
    u = mean + std * noise
    log_prob = -0.5 * noise**2 - std.log() - 0.5 * math.log(2 * math.pi)
    log_prob = log_prob - 2 * (math.log(2) - u - F.softplus(-2 * u))  # before it is scaled, as REDQ does
    return low + (high - low) * (torch.tanh(u) + 1) / 2, log_prob.sum(-1)


@pytest.fixture
def _double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("_double")
@pytest.mark.parametrize("name", EXPECTED)
def test_target_losses_and_gradients_are_those_of_the_rows_equations(name):
    gamma, alpha = 0.9, 0.3
    options = {"loss": {"gamma": gamma, "alpha_init": alpha}, "optim": {"tau": 0.1}, "env": "Humanoid-v4"}
    algorithm = make(name, **options)
    loss, critic = algorithm.loss, algorithm.qvalue.module
    with torch.no_grad():  # the target differs from the critic
        for p in algorithm.qvalue.parameters():
            p.add_(0.1 * torch.randn(p.shape))
    batch = make_batch(16, done=0.3)
    draws = loss.draw(batch, torch.Generator().manual_seed(3))
    number, (trained, minimum, mean) = EXPECTED[name][1:3]
    for key, count in (("critic", trained), ("target", minimum), ("value", mean)):
        assert draws[key].unique().numel() == draws[key].numel() == count
        assert draws[key].max() < number
    seeds = draws.get("dropout", [None] * 5)
    loss_qvalue, data = loss.qvalue_loss(batch, draws=draws)
    loss_actor, actor_data = loss.actor_loss(batch, draws=draws)
    loss_qvalue.backward()
    loss_actor.backward()

    theta, phi = layers_of(critic), layers_of(algorithm.actor.module[0].network)
    held = layers_of(critic, loss.target_qvalue_network_params["module"])
    state, following = batch["observation"], batch["next"]
    with torch.no_grad():
        a, log_prob = policy(phi, int(draws["next_actor"]), following["observation"], draws["next_noise"])
        values = answer(held, draws["target"].tolist(), torch.cat([following["observation"], a], -1), seeds[1])[..., 0]
        going_on = (~following["terminated"]).double().squeeze(-1)
        y = following["reward"].squeeze(-1) + gamma * going_on * (values.amin(0) - alpha * log_prob)
    q = answer(theta, draws["critic"].tolist(), torch.cat([state, batch["action"]], -1), seeds[0])[..., 0]
    expected_qvalue = sum(((y - q[i]) ** 2).mean() for i in range(trained))
    a, log_prob = policy(phi, int(draws["actor"]), state, draws["noise"])
    frozen = [(layer, {n: t.detach() for n, t in own.items()}) for layer, own in theta]
    q_mean = answer(frozen, draws["value"].tolist(), torch.cat([state, a], -1), seeds[2])[..., 0].mean(0)
    expected_actor = (alpha * log_prob - q_mean).mean()
    (expected_qvalue + expected_actor).backward()

    torch.testing.assert_close(data["target_value"], y)
    torch.testing.assert_close(data["pred_value"], q.detach())
    torch.testing.assert_close(loss_qvalue, expected_qvalue)
    torch.testing.assert_close(loss_actor, expected_actor)
    torch.testing.assert_close(actor_data["log_prob"], log_prob.detach())
    for network, layers in ((critic, theta), (algorithm.actor.module[0].network, phi)):
        for layer, (_, own) in zip(network, layers, strict=True):
            for part, tensor in own.items():
                torch.testing.assert_close(layer.get_parameter(part).grad, tensor.grad)
                assert tensor.grad.abs().sum() > 0


# The job

SMALL = {
    **{"env": "InvertedPendulum-v4", "total_frames": 60, "init_random_frames": 20, "log_interval": 10, "compile": False},
    **{"network": {"num_cells": [8, 8]}, "optim": {"batch_size": 8, "lr": 1e-3}, "progress": False},
    **{"eval": {"interval": 30, "episodes": 3}, "checkpoint": {"interval": 10}},
}
SMALL_DQN = {
    **SMALL,
    **{"env": "MinAtar/breakout", "num_envs": 2, "total_frames": 120, "max_episode_steps": 30},
    **{"network": {"num_cells": [8]}, "optim": {"batch_size": 8, "target_update_interval": 20}},
    "exploration": {"epsilon_frames": 60},
}
# Updates as in the paper, but for their number, and a reset at frame 30, where there is a checkpoint too.
EVERY = {"utd_ratio": 2, "policy_update_delay": 3}


def options_of(name, **more):
    if ROWS[name].loss == "dqn":
        channels = {} if ROWS[name].options["network"]["channels"] is None else {"channels": 2}
        return {
            **SMALL_DQN,
            "algorithm": name,
            **more,
            "network": {**SMALL_DQN["network"], **channels, **more.get("network", {})},
        }
    if "topology" in ROWS[name].options:  # masks that change each ten frames, and are frozen by none of the rules
        own = {"interval": 10, "recent_frames": 20} if ROWS[name].options["topology"]["method"] in ("saliency", "rigl") else {}
        own |= {"interval": 10, "end": None} if name == "set" else {}
        more = {**more, "topology": {**own, **more.get("topology", {})}, "network": {**SMALL["network"], "sparsity": 0.5}}
    if ROWS[name].loss == "tasks":
        more = {"env": "HalfCheetah/forward+backward", "max_episode_steps": 7, **more}
    reset = {"reset_interval": 30} if ROWS[name].options.get("reset_interval") else {}
    return {**SMALL, "algorithm": name, **EVERY, **reset, **more}


def compose(path, options, diary):
    """The trainer of some options, as examples/omnet_sac.py composes it."""
    config = to_config(options)
    torch.manual_seed(config.seed)
    num_envs = config.num_envs if config.num_envs > 1 else None
    seed = derived_seed(config.seed, "environments")
    env = make_env(
        config.env, num_envs=num_envs, seed=seed, observation_offset=config.observation_offset, **env_options(config)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        algorithm = build(config, env.observation_spec, env.action_spec)
    tasks = len(task_labels(config.env)) or 1
    fixed = torch.arange(tasks) if tasks > 1 else None
    env.append_transform(SubnetPrimer(algorithm.actor.num_subnets, fixed=fixed, generator=config.seed))
    policy = algorithm.actor
    if ROWS[config.algorithm].loss in ("td3", "dqn"):
        policy = Exploring(CompiledPolicy(policy, compile=config.compile), config, env.action_spec)
    collector = Collector(
        env,
        policy,
        frames_per_batch=config.num_envs * tasks,
        init_random_frames=config.init_random_frames,
        policy_device="cpu",
        env_device="cpu",
        storing_device="cpu",
        auto_register_policy_transforms=False,
        track_traj_ids=False,
    )
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(config.total_frames // tasks))
    evaluation = Evaluation(config, algorithm.actor, algorithm.loss)
    topology = make_topology(config, algorithm.update)
    return Trainer(collector, buffer, algorithm.update, evaluation, Checkpointer(path), diary, config, topology)


def session(path, name, rows, stop=10**9, **options):
    trainer = compose(path, options_of(name, **options), Stopping(rows, stop))
    torch.manual_seed(stop)  # whatever else the process does
    if not trainer.resume():
        rows.clear()
    with contextlib.suppress(Crash):
        trainer.run()
    return trainer


# Rows each of which has something that none of the others has: masks of weights, hashed ones, separate networks, dropout,
# resets, masks that change, another loss, images, tasks with masks or heads of their own. (test_mask_changes.py has rigl.)
KINDS = {
    *("omnet", "omnet_infinity", "redq", "droq", "sr_sac", "omnet_adaptive", "dapd", "set"),
    *("omnet_td3", "omnet_dqn", "bootstrapped_dqn", "pathways", "multi_head"),
}


@pytest.mark.filterwarnings("ignore:.*keep no weight")
@pytest.mark.parametrize("name", [name if name in KINDS else pytest.param(name, marks=pytest.mark.slow) for name in ROWS])
def test_a_killed_run_of_a_row_goes_on_as_if_it_had_not_been(name, tmp_path):
    whole, rows, parts = tmp_path / "whole", [], []
    session(whole, name, rows)
    for stop in (30, 47, 10**9):
        session(tmp_path / "parts", name, parts, stop)
    assert untimed(parts) == untimed(rows)
    assert differing(result(tmp_path / "parts"), result(whole)) == []
    assert len(rows) > 40
    resets = [frames for frames, name, _ in rows if name == "train/reset"]
    assert resets == ([30] if name.startswith("sr_") else [])


def test_a_killed_run_with_noise_and_bias_goes_on_as_if_it_had_not_been(tmp_path):
    rows, parts = [], []
    more = {"observation_offset": 0.3, "eval": {"interval": 20, "episodes": 2, "bias_episodes": 2}}
    session(tmp_path / "whole", "droq", rows, **more)
    for stop in (37, 10**9):
        session(tmp_path / "parts", "droq", parts, stop, **more)
    assert untimed(parts) == untimed(rows)
    assert differing(result(tmp_path / "parts"), result(tmp_path / "whole")) == []
    assert [frames for frames, name, _ in rows if name == "bias/mean"] == [20, 40, 60]


@pytest.mark.parametrize("structure", ["random", "spatial", "predictive"])
def test_a_run_with_a_structure_keeps_its_hidden_layers_and_goes_on(structure, tmp_path, monkeypatch):
    monkeypatch.setattr(grid_module, "PREDICTION_FRAMES", 300)
    network = {"channels": None, "structure": structure, "fan_in": 9, "freeze_hidden": True, "num_cells": [16]}
    rows, parts = [], []
    whole = session(tmp_path / "whole", "dqn", rows, network=network)
    for stop in (60, 10**9):
        session(tmp_path / "parts", "dqn", parts, stop, network=network)
    assert untimed(parts) == untimed(rows)
    assert differing(result(tmp_path / "parts"), result(tmp_path / "whole")) == []
    fresh = compose(tmp_path / "fresh", options_of("dqn", network=network), Stopping([], 10**9))
    (first, last), (first_before, last_before) = (
        [layer for layer in trainer.update.loss.value_network.modules() if isinstance(layer, MaskedLinear | StructuredLinear)]
        for trainer in (whole, fresh)
    )
    assert torch.equal(first.weight, first_before.weight)
    assert not torch.equal(last.weight, last_before.weight)
    assert set(first.structure.sum(-1).unique().tolist()) == {36 if structure == "spatial" else 9}


def test_a_structure_is_learned_by_an_l1_penalty_and_then_given_to_another_run(tmp_path):
    options = ["env=MinAtar/breakout", "algorithm=dqn", "network.channels=null", "network.num_cells=[16]", "compile=false"]
    options += ["num_envs=1", "total_frames=200", "init_random_frames=40", "optim.batch_size=16", "utd_ratio=1"]
    learned = ["network.structure=l1", f"network.structure_run={tmp_path / 'l1'}", "network.fan_in=9"]

    def run(name, *own):
        return run_script(*options, "eval.episodes=0", *own, f"folder={tmp_path / name}", script=EXAMPLE["dqn"])[1]

    for name, own in {"plain": [], "l1": ["loss.l1=0.01"], "learned": learned}.items():
        run(name, *own)
    networks = {name: load_policy(tmp_path / name) for name in ("plain", "l1", "learned")}
    kinds = MaskedLinear | StructuredLinear
    layers = {name: next(m for m in net.modules() if isinstance(m, kinds)) for name, net in networks.items()}
    assert layers["l1"].weight.abs().sum() < 0.95 * layers["plain"].weight.abs().sum()
    assert torch.equal(layers["learned"].structure, l1_structure(layers["l1"].weight, 9))
    assert "must have this run's (8, 400) weights, got (16, 400)" in run("other", *learned, "network.num_cells=[8]")


@pytest.mark.parametrize(
    ("network", "message"),
    [
        ({"structure": "round"}, "network.structure must be null or one of random, spatial, predictive, l1, got 'round'"),
        ({"structure": "random", "channels": 16}, "network.channels must be null with network.structure"),
        ({"structure": "random", "mask_bias": True}, "network.mask_bias must be false with network.structure"),
        ({"structure": "l1"}, "network.structure=l1 and network.structure_run must be given together"),
    ],
)
def test_options_that_contradict_a_structure(network, message):
    with pytest.raises(ValueError, match=message):
        to_config({"env": "MinAtar/breakout", "algorithm": "dqn", "network": {"channels": None, **network}})


def test_epsilon_is_a_function_of_the_frame():
    config = to_config(options_of("omnet_dqn", exploration={"epsilon_start": 1.0, "epsilon_end": 0.2, "epsilon_frames": 100}))
    env = make_env(config.env, num_envs=2)
    actor = build(config, env.observation_spec, env.action_spec).actor
    explore = Exploring(CompiledPolicy(actor, compile=False), config, env.action_spec)
    seen = []
    for frames in (0, 50, 100, 1_000):
        explore.set_frames(frames)
        seen.append(float(explore.noise.eps))
    assert seen == pytest.approx([1.0, 0.6, 0.2, 0.2])
    assert set(explore.state_dict()) == set(actor.state_dict())


def test_td3s_noise_is_of_the_range_of_the_action():
    config = to_config(options_of("omnet_td3", exploration={"noise": 0.1}, network={"dense_input": True}))
    actor = build(config, Unbounded((OBS,)), Bounded(-0.4, 1.0, (ACT,))).actor
    explore = Exploring(CompiledPolicy(actor, compile=False), config, Bounded(-0.4, 1.0, (ACT,)))
    batch = TensorDict(observation=torch.zeros(4_000, OBS), subnet=torch.zeros(4_000, dtype=torch.int64), batch_size=[4_000])
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        mean = explore(batch.clone())["action"]
    noise = explore(batch.clone())["action"] - mean
    inside = ((mean + noise - 1.0).abs() > 1e-6) & ((mean + noise + 0.4).abs() > 1e-6)
    assert noise[inside].std().item() == pytest.approx(0.07, rel=0.05)


def test_a_killed_run_in_the_maze_goes_on_and_its_subnetworks_ways_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation_module, "FIGURE_7", (6, 20))  # two updates for a frame, every third one of the policy too
    rows, parts = [], []
    more = {"env": "Maze2D", "eval": {"interval": 10, "episodes": 2}}
    session(tmp_path / "whole", "omnet", rows, **more, folder=str(tmp_path / "whole"))
    for stop in (37, 52, 10**9):
        session(tmp_path / "parts", "omnet", parts, stop, **more, folder=str(tmp_path / "parts"))
    assert untimed(parts) == untimed(rows)
    assert differing(result(tmp_path / "parts"), result(tmp_path / "whole")) == []
    ways = [read_trajectories(tmp_path / name / "trajectories.csv") for name in ("whole", "parts")]
    assert list(ways[0][0]) == [6, 20]
    assert ways[0][0][20].shape == (5, 51, 2)
    assert all(torch.equal(ways[0][0][updates], ways[1][0][updates]) for updates in (6, 20))


@pytest.mark.filterwarnings("ignore:.*keep no weight", "ignore:.*units .* lose every one")
@pytest.mark.parametrize("name", ["omnet", "droq", "omnet_td3", "omnet_dqn", "dapd", "pathways"])
def test_the_example_and_the_row_are_equal_numbers(name, tmp_path):
    """Of a whole run: the same networks, masks, draws, losses and moments."""
    options = options_of(name, **(DAPD if name == "dapd" else {}))
    trainer = compose(tmp_path / "row", options, Stopping([], 10**9))
    trainer.run()

    def flat(options, prefix=""):
        for key, value in options.items():
            yield from flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [f"{prefix}{key}={value}"]

    arguments = [argument.replace(" ", "").replace("None", "null") for argument in flat(options)]
    script = EXAMPLE.get(name, EXAMPLE[ROWS[name].loss])
    code, printed = run_script(*arguments, f"folder={tmp_path}/example", script=script)
    assert code == 0, printed
    states = [Checkpointer(folder).load()[0] for folder in (tmp_path / "row", tmp_path / "example" / "checkpoints")]
    for part in ("update", "policy", "random", "carrier"):
        row_part, example_part = (leaves(state[part]) for state in states)
        assert differing(row_part, example_part) == [], part


def test_a_reset_starts_everything_anew_but_masks_and_replay(tmp_path):
    trainer = compose(tmp_path, options_of("omnet", reset_interval=30), Stopping([], 10**9))
    trainer.reporter.stop = 30
    with contextlib.suppress(Crash):
        trainer.run()
    update, loss = trainer.update, trainer.update.loss
    before = {key: value.clone() for key, value in leaves_of(loss).items()}
    trainer._reset_networks()
    after = leaves_of(loss)
    for key, value in after.items():
        # Biases start at zero, scales of a LayerNorm at one: drawn anew, weights are others.
        assert torch.equal(value, before[key]) == (not value.is_floating_point()), key
    for part in ("module", "masks"):
        assert any(part in str(key) for key in after)
    target, online = loss.target_qvalue_network_params, loss.qvalue_network_params
    assert all(torch.equal(target[key], value) for key, value in online.items(True, True))
    assert loss.log_alpha == 0
    assert all(not tensor.any() for key, tensor in update.state["optim"].items(True, True) if key[-1] != "lr")
    # The update computes with the very tensors that were reset.
    assert all(
        torch.equal(update.state[("params", "qvalue_network_params", *key)], value) for key, value in online.items(True, True)
    )
    assert len(trainer.buffer) == 30


def leaves_of(loss):
    networks = ("actor_network_params", "qvalue_network_params")
    return {(name, key): value.detach() for name in networks for key, value in getattr(loss, name).items(True, True)}


# What the options build


@pytest.mark.parametrize(("env", "expected"), [("Hopper-v4", -1), ("Humanoid-v4", -2), ("Hopper-v5", -3), ("Pendulum-v1", -3)])
def test_the_target_entropy_is_redqs_for_the_papers_tasks_and_minus_the_actions_elsewhere(env, expected):
    assert target_entropy(TrainConfig(env=env), 3) == expected
    assert target_entropy(TrainConfig(env=env, loss=LossConfig(target_entropy=0.0)), 3) == 0


@pytest.mark.parametrize("env", ["Hopper-v4", "Pendulum-v1"])
def test_entropy_counts_the_same_whatever_the_range_of_the_actions(env):
    config, found = to_config({"env": env, "compile": False, "network": {"sparsity": 0.0}}), []
    for limit in (1.0, 0.4):
        torch.manual_seed(0)
        loss = build(config, Unbounded((OBS,)), Bounded(-limit, limit, (ACT,))).loss
        for tensor in loss.target_qvalue_network_params.values(True, True):  # the reward and the entropy are left of the target
            tensor.data.zero_()
        batch = make_batch(8)
        draws = loss.draw(batch, torch.Generator().manual_seed(0))
        log_prob = loss.actor_loss(batch, draws=draws)[1]["log_prob"]
        found.append((log_prob, log_prob + loss.target_entropy, loss.compute_target(batch, draws=draws)))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize(
    ("network", "expected"),
    [
        (NetworkConfig(), 0.5),
        (NetworkConfig(sparsity=[0.1, 0.2, 0.3]), [0.1, 0.2, 0.3]),
        (NetworkConfig(dense_input=True), [0, 0.5, 0.5]),
        (NetworkConfig(dense_output=True, sparsity=0.8), [0.8, 0.8, 0]),
        (NetworkConfig(dense_input=True, dense_output=True, num_cells=[8]), [0, 0]),
    ],
)
def test_dense_layers_have_no_sparsity_and_the_network_takes_it(network, expected):
    sparsity = network_sparsity(network)
    assert sparsity == expected
    MaskedMLP(in_features=30, out_features=1, num_cells=network.num_cells, num_subnets=2, sparsity=sparsity)


@pytest.mark.parametrize("role", ["actor", "critic"])
def test_masks_choose_the_network(role):
    weight = network_options(to_config({"network": {"mask_bias": True}}), role)
    assert (weight["network_class"], weight["mask_bias"], weight["sparsity"]) == (MaskedMLP, True, 0.5)
    unit = network_options(to_config({"network": {"masks": "unit", "sparsity": [0.5, 0.75]}}), role)
    assert unit["network_class"] is UnitMaskedMLP
    qvalue = make_qvalue(Unbounded((3,)), Bounded(-1, 1, (2,)), **unit)
    assert qvalue.extract(0).module.num_cells == [128, 64]


@pytest.mark.parametrize(
    "network",
    [
        {"sparsity": [0, 0.5, 0.5]},
        {"dense_input": True},
        {"dense_output": True},
        {"masks": "unit", "channels": None},
        {"channels": None, "sparsity": [0, 0.5]},
    ],
)
@pytest.mark.filterwarnings("ignore:.*units .* lose every one")
def test_the_layers_of_a_network_for_grids_are_counted_with_its_convolution(network):
    config = to_config({"algorithm": "omnet_dqn", "env": "MinAtar/breakout", "network": network, "compile": False})
    env = make_env(config.env, num_envs=config.num_envs)
    algorithm = build(config, env.observation_spec, env.action_spec)
    assert "parameters" in describe(config, algorithm.actor, algorithm.actor)["network"]
    masks = [buffer for name, buffer in algorithm.actor.named_buffers() if name.endswith("masks")]
    dense = [bool(each.all()) for each in masks]
    if network.get("masks") != "unit":
        assert dense == [
            not network.get("dense_output") and dense[0],
            *[False] * (len(masks) - 2),
            bool(network.get("dense_output")),
        ]


def test_a_number_of_layers_without_the_convolution_is_refused():
    with pytest.raises(ValueError, match="one number for each of 3 layers, the convolution first, got"):
        to_config({"algorithm": "omnet_dqn", "env": "MinAtar/breakout", "network": {"sparsity": [0, 0.5]}})
