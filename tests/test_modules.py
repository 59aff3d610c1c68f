"""Modules that read "subnet": keys, actions, the paper's networks, any network as subnetworks."""

import copy
import io
import math
import pickle

import pytest
import torch
from conftest import ACT, OBS, make_batch, small_actor, small_qvalue, specs
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torch.nn import functional as F
from torchrl.data import Bounded, Categorical, Composite, OneHot, Unbounded
from torchrl.envs import ExplorationType, GymEnv, SerialEnv, TransformedEnv, set_exploration_type
from torchrl.envs.transforms import TensorDictPrimer
from torchrl.modules import NormalParamExtractor, ProbabilisticActor, ValueOperator

from omnet_torchrl import (
    EnsembleMLP,
    MaskedLinear,
    MaskedMLP,
    RedrawnMLP,
    SubnetActor,
    SubnetModule,
    SubnetPrimer,
    SubnetQValueOperator,
    bernoulli_module_masks,
    make_actor,
    make_qvalue,
    mask_density,
)
from omnet_torchrl.specs import check_action_spec

N = 3
DETERMINISTIC, RANDOM = ExplorationType.DETERMINISTIC, ExplorationType.RANDOM


@pytest.fixture
def compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Constant(nn.Module):
    """A network of 3 subnetworks that answers the same to everything: mean and log-std of each action."""

    num_subnets = N

    def __init__(self, loc, log_std):
        super().__init__()
        self.answer = nn.Parameter(torch.tensor([*loc, *log_std], dtype=torch.float32))

    def forward(self, observation, subnet):
        batch = torch.broadcast_shapes(observation.shape[:-1], subnet.shape)
        return self.answer.expand(*batch, -1)


def indexed(*index_shape, batch=(4,), subnet=None):
    """A batch without batch size, as the index may have another shape."""
    td = TensorDict(make_batch(*batch).select("observation", "action").to_dict(), batch_size=[])
    return td.set("subnet", torch.randint(N, index_shape) if subnet is None else subnet)


def pendulum(*transforms):
    env = GymEnv("Pendulum-v1")
    for transform in transforms:
        env = TransformedEnv(env, transform)
    return env


# Q operator

INDICES = [((), (4,)), ((1,), (4,)), ((2, 1), (4,)), ((4,), (4,)), ((2,), (2,)), ((2, 4), (4,)), ((2, 1), (2, 4)), ((), ())]


@pytest.mark.parametrize("network_class", [MaskedMLP, EnsembleMLP])
@pytest.mark.parametrize(("index_shape", "batch"), INDICES)
def test_qvalue_has_one_number_for_each_element_of_the_broadcast_batch(network_class, index_shape, batch):
    masked = network_class is MaskedMLP
    qvalue = small_qvalue(N) if masked else make_qvalue(*specs(), network_class=EnsembleMLP, num_cells=(16,), num_subnets=N)
    td = qvalue(indexed(*index_shape, batch=batch))
    assert td["state_action_value"].shape == (*torch.broadcast_shapes(index_shape, batch), 1)


def test_qvalue_reads_observation_action_and_subnet_and_writes_the_value():
    qvalue = small_qvalue(N)
    assert isinstance(qvalue, ValueOperator)
    assert qvalue.in_keys == ["observation", "action", "subnet"]
    assert qvalue.out_keys == ["state_action_value"]
    td = indexed(4)
    expected = qvalue.module(td["observation"], td["action"], td["subnet"])
    assert torch.equal(qvalue(td)["state_action_value"], expected)
    assert set(td.keys()) == {"observation", "action", "subnet", "state_action_value"}


def test_qvalue_can_be_called_with_tensors():
    qvalue, td = small_qvalue(N), indexed(4)
    value = qvalue(observation=td["observation"], action=td["action"], subnet=td["subnet"])
    assert torch.equal(value, qvalue(td)["state_action_value"])


def test_qvalue_takes_other_keys():
    network = MaskedMLP(OBS + ACT, 1, num_cells=[16], num_subnets=N, generator=0, sparsity=0.2)
    qvalue = SubnetQValueOperator(network, in_keys=["a", ("b", "c"), ("b", "k")], out_keys=[("q", "value")])
    td = TensorDict({"a": torch.randn(4, OBS), ("b", "c"): torch.randn(4, ACT), ("b", "k"): torch.randint(N, (4,))})
    assert torch.equal(qvalue(td)["q", "value"], network(td["a"], td["b", "c"], td["b", "k"]))
    with pytest.raises(KeyError, match="'b', 'k'"):
        qvalue(td.exclude(("b", "k")))


# Actor

ASYMMETRIC = Bounded(low=torch.tensor([-0.4, 0.0]), high=torch.tensor([0.4, 2.0]))


@pytest.mark.parametrize(("index_shape", "batch"), INDICES)
@pytest.mark.parametrize("exploration", [DETERMINISTIC, RANDOM])
def test_actions_lie_within_the_bounds_of_the_spec(index_shape, batch, exploration):
    actor = make_actor(Unbounded((OBS,)), ASYMMETRIC, num_cells=(16,), num_subnets=N, sparsity=0.4, generator=1)
    with torch.no_grad():
        actor.module[0].network[-1].weight.mul_(20)  # Actions close to the bounds, too.
    with set_exploration_type(exploration):
        td = actor(indexed(*index_shape, batch=batch).exclude("action"))
    assert td["action"].shape == (*torch.broadcast_shapes(index_shape, batch), ACT)
    assert (td["action"] >= ASYMMETRIC.low).all()
    assert (td["action"] <= ASYMMETRIC.high).all()
    assert set(td.keys()) == {"observation", "subnet", "loc", "scale", "action"}


def test_actor_reads_observation_and_subnet_and_writes_the_action():
    actor = small_actor(N)
    assert isinstance(actor, ProbabilisticActor)
    assert actor.in_keys == ["observation", "subnet"]
    assert actor.out_keys == ["loc", "scale", "action"]
    assert (actor.num_subnets, actor.subnet_key, actor.action_key) == (N, "subnet", "action")


def test_extreme_actions_reach_both_bounds_and_no_further():
    for loc, bound in ((-100.0, ASYMMETRIC.low), (100.0, ASYMMETRIC.high)):
        actor = SubnetActor(Constant([loc, loc], [0, 0]), ASYMMETRIC)
        action = actor(indexed(4))["action"]
        torch.testing.assert_close(action, bound.expand(4, 2), rtol=0, atol=1e-5)
        assert ASYMMETRIC.is_in(action[0])


def test_the_deterministic_action_is_the_squashed_mean():
    actor = SubnetActor(Constant([math.atanh(0.5), 0.0], [1, 1]), ASYMMETRIC)
    with set_exploration_type(DETERMINISTIC):
        action = actor(indexed(4))["action"]
    torch.testing.assert_close(action, torch.tensor([0.2, 1.0]).expand(4, 2))


def test_random_actions_are_drawn_and_are_the_default():
    actor, td = small_actor(N), indexed(4)
    first, second = actor(td.clone())["action"], actor(td.clone())["action"]
    assert (first != second).all()
    with set_exploration_type(RANDOM):
        torch.manual_seed(1)
        drawn = actor(td.clone())["action"]
    torch.manual_seed(1)
    assert torch.equal(actor(td.clone())["action"], drawn)
    with set_exploration_type(DETERMINISTIC):
        assert torch.equal(actor(td.clone())["action"], actor(td.clone())["action"])


def test_log_probability_is_that_of_the_squashed_and_scaled_gaussian():
    loc, log_std = torch.tensor([0.3, -0.2]), torch.tensor([-0.5, 0.1])
    actor = SubnetActor(Constant(loc, log_std), ASYMMETRIC)
    u = torch.tensor([0.7, -1.1])
    half = (ASYMMETRIC.high - ASYMMETRIC.low) / 2
    action = ASYMMETRIC.low + half * (u.tanh() + 1)
    gaussian = -0.5 * ((u - loc) / log_std.exp()) ** 2 - log_std - 0.5 * math.log(2 * math.pi)
    expected = (gaussian - (half * (1 - u.tanh() ** 2)).log()).sum(-1)
    torch.testing.assert_close(actor.get_dist(indexed(4)).log_prob(action.expand(4, 2)), expected.expand(4))


@pytest.mark.parametrize(
    ("log_std", "clamped"), [(-100.0, -20.0), (-20.5, -20.0), (-19.0, -19.0), (0.0, 0.0), (1.9, 1.9), (2.5, 2.0), (100.0, 2.0)]
)
def test_log_std_is_clamped_to_minus_20_and_2(log_std, clamped):
    actor = SubnetActor(Constant([0, 0], [log_std, 0]), ASYMMETRIC)
    scale = actor(indexed(4))["scale"]
    torch.testing.assert_close(scale, torch.tensor([math.exp(clamped), 1.0]).expand(4, 2), atol=0, rtol=1e-5)
    torch.testing.assert_close(actor.get_dist(indexed(4)).scale, scale, atol=0, rtol=1e-5)


@pytest.mark.parametrize(("low", "high"), [(-math.inf, 1.0), (-1.0, math.inf), (-math.inf, math.inf)])
def test_infinite_action_bounds_are_refused(low, high):
    with pytest.raises(ValueError, match=r"finite bounds, got low=.*high=.*rescale"):
        make_actor(Unbounded((OBS,)), Bounded(low, high, (ACT,)))


@pytest.mark.parametrize(
    "spec",
    [
        Unbounded((ACT,)),
        Unbounded((ACT,), dtype=torch.int64),
        OneHot(3),
        Categorical(3),
        Bounded(-1, 1, (ACT,), dtype=torch.int64),
        Bounded(-1, 1, ()),
        Composite(a=Bounded(-1, 1, (ACT,)), b=Bounded(-1, 1, (ACT,))),
        Composite(),
    ],
    ids=["unbounded", "integers", "one-hot", "categorical", "bounded integers", "scalar", "two actions", "no action"],
)
@pytest.mark.parametrize("make", [make_actor, make_qvalue])
def test_action_specs_other_than_bounded_continuous_vectors_are_refused(make, spec):
    with pytest.raises(TypeError, match="the action spec must be a Bounded of floating point vectors, got"):
        make(Unbounded((OBS,)), spec)


# The index


@pytest.mark.parametrize("make", [small_actor, small_qvalue])
def test_a_missing_index_names_what_adds_it(make):
    module = make(N)
    with pytest.raises(KeyError, match=r"has no 'subnet'.*SubnetPrimer.*make_tensordict_primer"):
        module(indexed(4).exclude("subnet"))


@pytest.mark.parametrize("make", [small_actor, small_qvalue])
@pytest.mark.parametrize("network_class", [MaskedMLP, EnsembleMLP])
@pytest.mark.parametrize("wrong", [7, N, -1])
@pytest.mark.parametrize(("index_shape", "batch"), [((), (4,)), ((1,), (4,)), ((2, 1), (4,)), ((4,), (4,)), ((2,), (2,))])
def test_an_index_out_of_range_is_refused(make, network_class, wrong, index_shape, batch):
    if network_class is MaskedMLP:
        module = make(N)
    else:
        module = (make_actor if make is small_actor else make_qvalue)(*specs(), network_class=EnsembleMLP, num_subnets=N)
    subnet = torch.zeros(index_shape, dtype=torch.int64)
    subnet.view(-1)[-1] = wrong
    with pytest.raises(ValueError, match=rf"'subnet' must be in \[0, num_subnets=3\), got \[.*{wrong}.*\]"):
        module(indexed(subnet=subnet, batch=batch))


@pytest.mark.parametrize("make", [small_actor, small_qvalue])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int32, torch.bool])
@pytest.mark.parametrize("shape", [(), (4,), (2, 1)])
def test_an_index_that_is_not_int64_is_refused(make, dtype, shape):
    with pytest.raises(TypeError, match=f"must be an int64 tensor or an int, got {dtype}"):
        make(N)(indexed(subnet=torch.zeros(shape, dtype=dtype)))


@pytest.mark.parametrize("make", [small_actor, small_qvalue])
def test_an_int_is_an_index_without_dimensions(make):
    module, td = make(N).eval(), indexed(subnet=torch.tensor(2))
    with set_exploration_type(DETERMINISTIC):
        expected = module(td.clone())[module.out_keys[-1]]
        inputs = {str(key): td[key] for key in module.in_keys if key != "subnet"}
        assert torch.equal(module(td.set("subnet", 2))[module.out_keys[-1]], expected)
        answer = module(**inputs, subnet=2)
    assert torch.equal(answer[-1] if isinstance(answer, tuple) else answer, expected)
    with pytest.raises(ValueError, match=rf"must be in \[0, num_subnets={N}\), got"):
        module(**inputs, subnet=N)


@pytest.mark.parametrize("make", [small_actor, small_qvalue])
@pytest.mark.parametrize("batch", [(4,), (1,), (2, 3)])
def test_an_index_of_the_shape_of_a_reward_is_refused(make, batch):
    td = make_batch(*batch)
    with pytest.raises(ValueError, match=r"'subnet' must have shape \(\S.*\) in .* got \(.*, 1\), which .*: use squeeze\(-1\)"):
        make(N)(td.set("subnet", torch.zeros(*batch, 1, dtype=torch.int64)))
    make(N)(td.set("subnet", torch.zeros(batch, dtype=torch.int64)))


def test_an_index_for_each_row_of_a_batch_of_rows_is_none_of_the_shape_of_a_reward():
    td = TensorDict(make_batch(3, 4).select("observation", "action").to_dict(), batch_size=[3])
    assert small_actor(N)(td.set("subnet", torch.arange(3)[:, None]))["action"].shape == (3, 4, ACT)


def test_a_missing_observation_is_named():
    actor, policy = small_actor(N), small_actor(N).extract(0)
    for module, td in ((actor, indexed(4)), (actor, indexed(subnet=torch.tensor(0))), (policy, indexed(4))):
        with pytest.raises(KeyError, match=r"reads \['observation'.*\], the TensorDict has no \['observation'\]"):
            module(td.exclude("observation"))


@pytest.mark.parametrize("wrong", [ACT, 2 * ACT + 2])
def test_a_network_whose_outputs_do_not_fit_the_actions_is_refused(wrong):
    actor = SubnetActor(MaskedMLP(in_features=OBS, out_features=wrong, num_cells=[8], sparsity=0.0), specs()[1])
    with pytest.raises(ValueError, match=rf"must have 2 \* action_dim={2 * ACT} outputs, .*got {wrong}"):
        actor(indexed(4))


@pytest.mark.parametrize("make", [small_actor, small_qvalue])
def test_errors_that_are_not_the_indexs_are_left_as_they_are(make):
    td = indexed(4).set("observation", torch.zeros(4, OBS + 1))
    with pytest.raises(ValueError, match=r"must have inputs .* build the network for this size"):
        make(N)(td)


# Environments


def test_the_primer_of_an_actor_draws_its_subnets_under_its_key():
    actor = SubnetActor(Constant([0, 0], [0, 0]), ASYMMETRIC, in_keys=["observation", ("agent", "k")])
    primer = actor.make_tensordict_primer(fixed=2)
    assert isinstance(primer, SubnetPrimer)
    assert (primer.num_subnets, primer.key, primer.fixed.item()) == (N, ("agent", "k"), 2)
    plain = small_actor(4, sparsity=0.1).make_tensordict_primer()
    assert (plain.num_subnets, plain.key, plain.fixed) == (4, "subnet", None)


def test_an_environment_with_the_actors_primer_passes_and_can_be_played():
    env = pendulum()
    actor = make_actor(env.observation_spec, env.action_spec, num_cells=(16,), num_subnets=N, sparsity=0.1, generator=0)
    env = TransformedEnv(env, actor.make_tensordict_primer())
    actor.check_env(env)
    rollout = env.rollout(3, actor)
    assert rollout["action"].shape == (3, 1)
    assert (rollout["subnet"] == rollout["subnet"][0]).all()


def test_an_environment_without_an_index_is_refused():
    with pytest.raises(KeyError, match=r"the environment has no 'subnet'.*SubnetPrimer"):
        small_actor(N).check_env(pendulum())
    with pytest.raises(KeyError, match="the environment has no 'subnet'"):
        small_actor(N).check_env(pendulum(SubnetPrimer(N, key="other")))


def test_an_environment_that_draws_another_number_of_subnets_is_refused():
    with pytest.raises(ValueError, match=r"'subnet' is one of 4 subnetworks, the actor has 3: .*make_tensordict_primer"):
        small_actor(N).check_env(pendulum(SubnetPrimer(4)))


def test_an_environment_whose_index_is_no_category_is_refused():
    env = pendulum(TensorDictPrimer(subnet=Bounded(0, 2, (), dtype=torch.int64), random=True))
    with pytest.raises(ValueError, match=r"'subnet' is a Bounded.*, the actor has 3"):
        small_actor(N).check_env(env)


def test_a_network_that_does_not_say_how_many_it_is_is_refused():
    for make in (SubnetQValueOperator, lambda net: SubnetActor(net, specs()[1])):
        with pytest.raises(TypeError, match="int attribute num_subnets; Linear has none"):
            make(nn.Linear(3, 1))


def test_torchrls_usual_body_of_an_actor_is_refused_with_what_to_use():
    body = nn.Sequential(MaskedMLP(OBS, 2 * ACT, num_cells=[8], sparsity=0.0), NormalParamExtractor())
    with pytest.raises(
        TypeError, match=r"Sequential has none\. It holds a MaskedMLP, .*: pass the MaskedMLP alone. SubnetActor"
    ):
        SubnetActor(body, specs()[1])


@pytest.mark.parametrize("build", ["actor", "builder"])
def test_the_bounds_of_the_actions_are_where_the_network_is(build):
    spec = specs()[1]
    if build == "builder":
        actor = make_actor(*specs(), num_cells=(8,), sparsity=0.0, device="meta")
    else:
        actor = SubnetActor(MaskedMLP(OBS, 2 * ACT, num_cells=[8], sparsity=0.0, device="meta"), spec)
    assert {bound.device.type for bound in actor.module[-1].distribution_kwargs.values()} == {"meta"}
    assert spec.device.type == "cpu"


def test_environments_of_a_batch_with_other_bounds_are_refused():
    bounds = torch.tensor([[1.0], [2.0]])
    with pytest.raises(ValueError, match="differs between the environments"):
        check_action_spec(Bounded(-bounds, bounds, (2, 1)))


# The paper's networks

HALF_CHEETAH = Unbounded((17,)), Bounded(-1, 1, (6,))
PAPER = {
    # Weights, biases, and scale and shift of two normalisations; by hand.
    "actor": (
        make_actor,
        17 * 256 + 256 + 512 + 256 * 256 + 256 + 512 + 256 * 12 + 12,
        74508,
        [(256, 17), (256, 256), (12, 256)],
    ),
    "critic": (make_qvalue, 23 * 256 + 256 + 512 + 256 * 256 + 256 + 512 + 256 + 1, 73217, [(256, 23), (256, 256), (1, 256)]),
}


def network_of(module):
    """The network with an index inside an actor or a critic."""
    return module.module[0].network if isinstance(module, SubnetActor) else module.module


@pytest.mark.parametrize(("make", "size", "literal", "shapes"), PAPER.values(), ids=PAPER.keys())
def test_default_networks_are_those_of_the_paper(make, size, literal, shapes):
    module = make(*HALF_CHEETAH, generator=0)
    network = network_of(module)
    assert type(network) is MaskedMLP
    assert network.num_subnets == 5
    hidden = [MaskedLinear, nn.LayerNorm, nn.ReLU]
    assert [type(layer) for layer in network] == [*hidden, *hidden, MaskedLinear]
    assert [tuple(layer.weight.shape) for layer in network if isinstance(layer, MaskedLinear)] == shapes
    assert [layer.normalized_shape for layer in network if isinstance(layer, nn.LayerNorm)] == [(256,), (256,)]
    assert sum(p.numel() for p in module.parameters()) == size == literal


@pytest.mark.parametrize("make", [make_actor, make_qvalue])
def test_every_linear_layer_of_the_paper_is_half_masked_and_starts_as_in_redq(make):
    network = network_of(make(*HALF_CHEETAH, generator=0))
    for layer in (network[0], network[3], network[6]):
        assert layer.masks.shape == (5, *layer.weight.shape)
        assert layer.bias_masks is None
        tolerance = 5 * 0.5 / math.sqrt(layer.masks.numel())
        assert mask_density(layer.masks).mean().item() == pytest.approx(0.5, abs=tolerance)
        assert (layer.bias == 0).all()
        bound = math.sqrt(6 / sum(layer.weight.shape))
        assert 0.95 * bound < layer.weight.abs().max().item() <= bound
        # Five standard deviations of the variance of uniform draws, whose kurtosis is 9/5.
        tolerance = 5 * math.sqrt(0.8 / layer.weight.numel())
        assert layer.weight.square().mean().item() == pytest.approx(bound**2 / 3, rel=tolerance)


@pytest.mark.parametrize("make", [make_actor, make_qvalue])
def test_networks_without_layer_norm_are_linear_and_relu(make):
    network = network_of(make(*specs(), layer_norm=False, num_cells=(7, 4, 9), sparsity=0.1, generator=0))
    assert [type(layer) for layer in network] == [MaskedLinear, nn.ReLU] * 3 + [MaskedLinear]
    assert [layer.out_features for layer in network if isinstance(layer, MaskedLinear)][:-1] == [7, 4, 9]


@pytest.mark.parametrize("make", [make_actor, make_qvalue])
def test_arguments_go_to_the_network(make):
    kwargs = {
        "num_subnets": 4,
        "sparsity": [0.0, 0.2, 0.0],
        "mask_bias": True,
        "activation_class": nn.ELU,
        "init_fn": nn.init.ones_,
    }
    network = network_of(make(*specs(), num_cells=(7, 9), generator=3, dropout=0.1, **kwargs))
    assert isinstance(network[3], nn.ELU)
    assert isinstance(network[1], nn.Dropout)
    assert network[0].masks.all()
    assert not network[4].masks.all()
    assert network[4].bias_masks.shape == (4, 9)
    assert (network[0].weight == 1).all()


@pytest.mark.parametrize("make", [make_actor, make_qvalue])
def test_an_ensemble_takes_the_place_of_the_masked_network(make):
    module = make(*HALF_CHEETAH, network_class=EnsembleMLP, num_subnets=10)
    network = network_of(module)
    assert type(network) is EnsembleMLP
    assert network.num_subnets == 10
    _, size, _, shapes = PAPER["actor" if make is make_actor else "critic"]
    assert sum(p.numel() for p in module.parameters()) == 10 * size
    bounds = [math.sqrt(6 / sum(shape)) for shape in shapes]
    for layer, bound in zip((network[0], network[3], network[6]), bounds, strict=True):
        largest = layer.weight.flatten(1).abs().amax(1)
        assert (0.9 * bound < largest).all()
        assert (largest <= bound).all()
        assert (layer.bias == 0).all()


@pytest.mark.parametrize("make", [make_actor, make_qvalue])
@pytest.mark.parametrize("num_envs", [0, 2])
def test_specs_of_an_environment_are_understood_batched_or_not(make, num_envs):
    env = SerialEnv(num_envs, lambda: GymEnv("Pendulum-v1")) if num_envs else GymEnv("Pendulum-v1")
    kwargs = {"num_cells": (16,), "num_subnets": N, "sparsity": 0.1, "generator": 0}
    for observation_spec in (env.observation_spec, env.observation_spec["observation"]):
        for action_spec in (env.action_spec, env.full_action_spec):
            module = make(observation_spec, action_spec, **kwargs)
            td = module(env.rand_action(env.reset()).set("subnet", torch.zeros(env.batch_size, dtype=torch.int64)))
            sizes = (3, 2) if make is make_actor else (4, 1)
            assert (network_of(module).in_features, network_of(module).out_features) == sizes
            assert td[module.out_keys[-1]].shape == (*env.batch_size, 1)
            if make is make_actor:
                torch.testing.assert_close(module.spec["action"].space.high, torch.tensor([2.0]))
    env.close()


def test_actor_of_a_batched_environment_plays_it():
    env = SerialEnv(2, lambda: GymEnv("Pendulum-v1"))
    actor = make_actor(env.observation_spec, env.action_spec, num_cells=(16,), num_subnets=N, sparsity=0.1, generator=0)
    env = TransformedEnv(env, actor.make_tensordict_primer())
    actor.check_env(env)
    rollout = env.rollout(3, actor)
    assert rollout["action"].shape == (2, 3, 1)
    assert env.action_spec.is_in(rollout["action"][:, 0])
    env.close()


def test_nested_keys_are_read_and_written():
    observation_spec = Composite(agent=Composite(obs=Unbounded((OBS,)), other=Unbounded((9,))))
    action_spec = Composite(agent=Composite(act=ASYMMETRIC))
    keys = {"observation_key": ("agent", "obs"), "action_key": ("agent", "act"), "subnet_key": ("agent", "k")}
    kwargs = {"num_cells": (16,), "num_subnets": N, "sparsity": 0.2, "generator": 0, **keys}
    actor, qvalue = make_actor(observation_spec, action_spec, **kwargs), make_qvalue(observation_spec, action_spec, **kwargs)
    td = TensorDict({("agent", "obs"): torch.randn(4, OBS), ("agent", "k"): torch.randint(N, (4,))})
    td = qvalue(actor(td))
    assert td["agent", "act"].shape == (4, ACT)
    assert td["state_action_value"].shape == (4, 1)
    assert actor.spec["agent", "act"] == ASYMMETRIC
    for plain in (actor.extract(1), qvalue.extract(1)):
        plain(td.exclude(("agent", "k")))
    assert actor.extract(1).out_keys == ["loc", "scale", ("agent", "act")]
    with pytest.raises(KeyError, match="'agent', 'k'"):
        actor(td.exclude(("agent", "k")))


WRONG_KEYWORDS = {
    "a typo": (MaskedMLP, {"sparcity": 0.5}, "MaskedMLP takes no 'sparcity': did you mean 'sparsity'. It takes .*mask_bias.*"),
    "of no network": (EnsembleMLP, {"zzz": 1}, "EnsembleMLP takes no 'zzz'. It takes .*num_subnets"),
    "of another network": (EnsembleMLP, {"mask_fn": 0.5}, "EnsembleMLP takes no 'mask_fn'.* It takes .*num_subnets"),
    "a number that is given": (RedrawnMLP, {"num_subnets": 5}, "RedrawnMLP takes no 'num_subnets'. It takes .*generator"),
    "the builder's own": (MaskedMLP, {"layer_class": nn.Linear}, "MaskedMLP takes no 'layer_class'"),
}


@pytest.mark.parametrize("make", [make_actor, make_qvalue])
@pytest.mark.parametrize(("network_class", "kwargs", "message"), WRONG_KEYWORDS.values(), ids=WRONG_KEYWORDS.keys())
def test_a_keyword_that_the_network_does_not_take_is_refused_with_the_closest_one(make, network_class, kwargs, message):
    with pytest.raises(TypeError, match=message):
        make(*specs(), network_class=network_class, **kwargs)


@pytest.mark.parametrize("make", [make_actor, make_qvalue])
def test_a_function_may_make_the_network_and_none_is_the_default(make):
    module = make(*specs(), network_class=lambda **kwargs: MaskedMLP(num_subnets=2, **kwargs), sparsity=0.0, device=None)
    assert module.num_subnets == 2
    assert make(*specs(), init_fn=None, num_subnets=None, sparsity=0.0).num_subnets == 5
    assert make(*specs(), network_class=RedrawnMLP, sparsity=0.0).num_subnets == 2**31


@pytest.mark.parametrize("make", [make_actor, make_qvalue])
def test_an_observation_of_another_dtype_than_the_networks_is_refused(make):
    double = Unbounded((OBS,), dtype=torch.float64)
    with pytest.raises(TypeError, match=r"of the network's torch.float32, got torch.float64: append .*DoubleToFloat\(\)"):
        make(double, specs()[1], sparsity=0.0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        assert next(make(double, specs()[1], sparsity=0.0).parameters()).dtype == torch.float64
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("make", [make_actor, make_qvalue])
def test_an_observation_spec_without_the_key_is_refused(make):
    with pytest.raises(KeyError, match=r"the observation spec has no 'observation', only \['pixels'\]; pass observation_key"):
        make(Composite(pixels=Unbounded((OBS,))), Bounded(-1, 1, (ACT,)))


@pytest.mark.parametrize("make", [make_actor, make_qvalue])
@pytest.mark.parametrize("spec", [Unbounded(()), Categorical(5), Unbounded((OBS,), dtype=torch.int64)])
def test_observations_other_than_floating_point_vectors_are_refused(make, spec):
    with pytest.raises(ValueError, match="the observation must be a floating point vector, got shape"):
        make(spec, Bounded(-1, 1, (ACT,)))


@pytest.mark.gpu
def test_networks_made_on_cuda_act_and_judge_there():
    actor, qvalue = small_actor(N, device="cuda"), small_qvalue(N, device="cuda")
    td = qvalue(actor(indexed(4).exclude("action").to("cuda")))
    assert all(value.is_cuda for value in td.values())
    assert all(v.is_cuda for module in (actor, qvalue) for v in module.state_dict().values())
    moved = small_actor(N).to("cuda")
    assert moved(td.select("observation", "subnet"))["action"].is_cuda


# Copies


@pytest.mark.parametrize("make", [small_actor, small_qvalue])
def test_a_copy_answers_the_same_and_is_separate(make):
    module, td = make(N), indexed(4)
    clone = copy.deepcopy(module)
    assert_same_answers(clone, module, td)
    with torch.no_grad():
        for p in clone.parameters():
            p.zero_()
    assert any(p.any() for p in module.parameters())


@pytest.mark.parametrize("make", [small_actor, small_qvalue])
def test_a_pickled_module_answers_the_same(make):
    module = make(N)
    assert_same_answers(pickle.loads(pickle.dumps(module)), module, indexed(4))


@pytest.mark.parametrize("make", [small_actor, small_qvalue])
def test_weights_and_masks_travel_in_the_state_dict(make):
    module, td = make(N), indexed(4)
    other = (make_actor if make is small_actor else make_qvalue)(
        *specs(), num_subnets=N, sparsity=0.2, num_cells=(16, 16), generator=8
    )
    first = module.out_keys[0]
    assert not torch.equal(other(td.clone())[first], module(td.clone())[first])
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(network_of(other)[0].masks, network_of(module)[0].masks)
    assert_same_answers(other, module, td)


@pytest.mark.parametrize("make", [small_actor, small_qvalue])
def test_parameters_reset_recursively_start_anew_and_keep_their_masks(make):
    module = make(N)
    network = network_of(module)
    layers = [network[0], network[3], network[6]]
    masks, weights = [layer.masks.clone() for layer in layers], [layer.weight.clone() for layer in layers]
    with torch.no_grad():
        for p in module.parameters():
            p.fill_(9.0)
    module.reset_parameters_recursive()
    for layer, mask, weight in zip(layers, masks, weights, strict=True):
        assert torch.equal(layer.masks, mask)
        assert (layer.weight != weight).all()
        assert (layer.weight.abs() <= math.sqrt(6 / sum(weight.shape))).all()
        assert (layer.bias == 0).all()
    assert (network[1].weight == 1).all()


def assert_same_answers(module, expected, td):
    answers = []
    for m in (module, expected):
        torch.manual_seed(5)
        answers.append(m(td.clone()).select(*expected.out_keys))
    assert (answers[0] == answers[1]).all()


# Extraction


@pytest.mark.parametrize("network_class", [MaskedMLP, EnsembleMLP])
@pytest.mark.parametrize("k", range(N))
def test_an_extracted_actor_acts_as_its_index_and_reads_none(network_class, k):
    kwargs = {"sparsity": 0.4, "generator": 1} if network_class is MaskedMLP else {}
    kwargs |= {"network_class": network_class, "num_cells": (16,), "num_subnets": N}
    actor = make_actor(Unbounded((OBS,)), ASYMMETRIC, **kwargs)
    plain, td = actor.extract(k), indexed(subnet=torch.tensor(k))
    assert type(plain) is ProbabilisticActor
    assert plain.in_keys == ["observation"]
    assert plain.out_keys == actor.out_keys
    assert plain.spec["action"] == actor.spec["action"]
    for exploration in (DETERMINISTIC, RANDOM):
        with set_exploration_type(exploration):
            torch.manual_seed(5)
            expected = actor(td.clone())
            torch.manual_seed(5)
            answer = plain(td.exclude("subnet"))
        torch.testing.assert_close(answer.select(*plain.out_keys), expected.select(*plain.out_keys), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("network_class", [MaskedMLP, EnsembleMLP])
@pytest.mark.parametrize("k", range(N))
def test_an_extracted_critic_judges_as_its_index_and_reads_none(network_class, k):
    kwargs = {"sparsity": 0.4, "generator": 1} if network_class is MaskedMLP else {}
    qvalue = make_qvalue(*specs(), network_class=network_class, num_cells=(16,), num_subnets=N, **kwargs)
    plain, td = qvalue.extract(k), indexed(subnet=torch.tensor(k))
    assert type(plain) is ValueOperator
    assert plain.in_keys == ["observation", "action"]
    expected, answer = qvalue(td.clone())["state_action_value"], plain(td.exclude("subnet"))["state_action_value"]
    torch.testing.assert_close(answer, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("make", [small_actor, small_qvalue])
def test_an_extracted_module_keeps_its_weights_while_training_goes_on(make):
    module, td = make(N), indexed(subnet=torch.tensor(1))
    before = module(td.clone())[module.out_keys[0]].detach()
    plain = module.extract(1)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(1)
    assert not torch.equal(module(td.clone())[module.out_keys[0]], before)
    torch.testing.assert_close(plain(td.clone())[module.out_keys[0]], before, rtol=0, atol=0)


@pytest.mark.parametrize("make", [small_actor, small_qvalue])
@pytest.mark.parametrize("training", [True, False])
def test_an_extracted_module_is_in_the_mode_of_its_origin(make, training):
    plain = make(N, dropout=0.5).train(training).extract(0)
    assert all(m.training is training for m in plain.modules())


@pytest.mark.parametrize("make", [small_actor, small_qvalue])
@pytest.mark.parametrize("subnet", [N, -1])
def test_only_a_subnet_that_exists_can_be_extracted(make, subnet):
    with pytest.raises(ValueError, match=rf"\[0, num_subnets=3\), got {subnet}"):
        make(N).extract(subnet)


# Any network


class Pixels(nn.Module):
    """An image and an action to one number."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(2, 4, 3), nn.Linear(4 * 9 + ACT, 1)

    def forward(self, image, action):
        return self.head(torch.cat([self.conv(image).relu().flatten(-3), action], -1))


def cnn():
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(-3), nn.Linear(4 * 9, 3))


NETWORKS = {
    # Network, shape of one element of each input, batched as the network wants it.
    "cnn": (cnn, [(2, 5, 5)]),
    "gru": (lambda: nn.GRU(8, 6, num_layers=2, batch_first=True), [(4, 8)]),
    "two inputs": (Pixels, [(2, 5, 5), (ACT,)]),
}
each_network = pytest.mark.parametrize("name", NETWORKS)


def any_network(name):
    """A network as 3 subnetworks, with its masks, and the shape of one element of each input."""
    make, events = NETWORKS[name]
    network = make().double()
    masks = bernoulli_module_masks(network, N, 0.3, generator=0)
    event_dims = [len(e) for e in events] if len(events) > 1 else len(events[0])
    return SubnetModule(network, masks, event_dims=event_dims), masks, events


def plain_copies(module, masks):
    """One copy of the network for each subnetwork, its weights masked: what the module must equal."""
    copies = []
    for k in range(N):
        clone = copy.deepcopy(module.network)
        with torch.no_grad():
            for name, p in clone.named_parameters():
                if name in masks:
                    p.mul_(masks[name][k])
        copies.append(clone)
    return copies


def flat(output):
    """Outputs of a network as a tuple of tensors (a GRU returns its state, too)."""
    return output if isinstance(output, tuple) else (output,)


def summed_gradients(copies, masks, indices):
    """Gradients of the shared parameters: those of the copies asked, masked and summed."""
    sums = {}
    for k in set(indices):
        for name, p in copies[k].named_parameters():
            sums[name] = sums.get(name, 0) + (p.grad * masks[name][k] if name in masks else p.grad)
    return sums


@each_network
@pytest.mark.parametrize(
    ("index_shape", "own"),
    [((), False), ((1,), False), ((1, 1), False), ((1, 1), True), ((2, 1), False), ((4, 1), False), ((4, 1), True)],
)
def test_any_network_equals_a_loop_over_masked_networks_with_its_gradients(name, index_shape, own):
    rows = len(index_shape) == 2
    module, masks, events = any_network(name)
    copies, subnet = plain_copies(module, masks), torch.randint(N, index_shape)
    batch = (index_shape[0], 5) if own else (5,)
    inputs = [torch.randn(*batch, *event, dtype=torch.float64) for event in events]
    outputs = flat(module(*inputs, subnet))

    indices = subnet.flatten().tolist()
    answers = [flat(copies[k](*(x[i] if own else x for x in inputs))) for i, k in enumerate(indices)]
    expected = tuple(torch.stack(parts) if rows else parts[0] for parts in zip(*answers, strict=True))
    torch.testing.assert_close(outputs, expected, rtol=1e-10, atol=1e-12)

    cotangents = [torch.randn_like(y) for y in expected]
    torch.autograd.backward(outputs, cotangents)
    torch.autograd.backward(expected, cotangents)
    gradients = {name: p.grad for name, p in module.network.named_parameters()}
    torch.testing.assert_close(gradients, summed_gradients(copies, masks, indices), rtol=1e-9, atol=1e-11)


def test_inputs_of_each_row_and_shared_inputs_can_be_mixed():
    module, masks, _ = any_network("two inputs")
    image, action = torch.randn(5, 2, 5, 5, dtype=torch.float64), torch.randn(2, 5, ACT, dtype=torch.float64)
    output = module(image, action, torch.tensor([[2], [0]]))
    copies = plain_copies(module, masks)
    expected = torch.stack([copies[2](image, action[0]), copies[0](image, action[1])])
    torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-12)


def test_an_index_of_three_dimensions_goes_with_two_batch_dimensions():
    network = nn.Linear(8, 3).double()
    masks = bernoulli_module_masks(network, N, 0.3, generator=0)
    module, subnet = SubnetModule(network, masks), torch.tensor([2, 0]).view(2, 1, 1)
    x, own = torch.randn(4, 5, 8, dtype=torch.float64), torch.randn(2, 4, 5, 8, dtype=torch.float64)
    weights = [network.weight * masks["weight"][k] for k in (2, 0)]
    torch.testing.assert_close(module(x, subnet), torch.stack([F.linear(x, w, network.bias) for w in weights]))
    expected = torch.stack([F.linear(y, w, network.bias) for y, w in zip(own, weights, strict=True)])
    torch.testing.assert_close(module(own, subnet), expected)


@each_network
@pytest.mark.parametrize("subnet", [torch.tensor(1), torch.tensor([[2], [0]])])
def test_gradients_of_any_network_are_zero_where_the_mask_is_zero(name, subnet):
    module, masks, events = any_network(name)
    inputs = [torch.randn(5, *event, dtype=torch.float64) for event in events]
    sum(y.square().sum() for y in flat(module(*inputs, subnet))).backward()
    for parameter, mask in masks.items():
        grad, kept = module.network.get_parameter(parameter).grad, mask[subnet.flatten()].any(0)
        assert (grad[~kept] == 0).all()
        assert (grad[kept] != 0).float().mean() > 0.5


def test_only_parameters_with_masks_are_masked():
    network = cnn()
    masks = bernoulli_module_masks(network, N, 0.5, generator=0)
    module = SubnetModule(network, {"3.weight": masks["3.weight"]}, event_dims=3)
    module(torch.randn(5, 2, 5, 5), torch.tensor(0)).square().sum().backward()
    assert (network[0].weight.grad != 0).all()
    assert (network[3].weight.grad[~masks["3.weight"][0]] == 0).all()


@each_network
def test_masks_of_any_network_are_buffers_in_its_state_dict(name):
    module, masks, _ = any_network(name)
    buffers = {parameter: f"masks-{parameter.replace('.', '-')}" for parameter in masks}
    assert dict(module.named_buffers()).keys() == set(buffers.values())
    assert [n for n, _ in module.named_parameters()] == [f"network.{n}" for n, _ in module.network.named_parameters()]
    state = module.state_dict()
    assert all(torch.equal(state[buffer], masks[parameter]) for parameter, buffer in buffers.items())
    module.to(torch.float32)
    assert all(b.dtype == torch.bool for b in module.buffers())


def test_masks_go_to_the_device_of_their_parameter():
    network = nn.Linear(8, 3, device="meta")
    masks = bernoulli_module_masks(nn.Linear(8, 3), N, 0.3, generator=0)
    assert SubnetModule(network, masks).get_buffer("masks-weight").device.type == "meta"


@each_network
def test_an_extracted_network_is_a_plain_copy_equal_to_its_index(name):
    module, masks, events = any_network(name)
    inputs = [torch.randn(5, *event, dtype=torch.float64) for event in events]
    state, before = torch.get_rng_state(), {n: p.clone() for n, p in module.state_dict().items()}
    for k, expected in enumerate(plain_copies(module, masks)):
        plain = module.extract(k)
        assert type(plain) is type(module.network)
        assert not list(plain.buffers())
        answers = flat(plain(*inputs))
        torch.testing.assert_close(answers, flat(module(*inputs, torch.tensor(k))), rtol=0, atol=0)
        torch.testing.assert_close(answers, flat(expected(*inputs)), rtol=0, atol=0)
        with torch.no_grad():
            for p in plain.parameters():
                p.zero_()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p, before[n]) for n, p in module.state_dict().items())


@pytest.mark.parametrize(("subnet", "error"), [(N, ValueError), (-1, ValueError), (1.0, TypeError), (True, TypeError)])
def test_only_an_existing_subnet_of_any_network_can_be_extracted(subnet, error):
    with pytest.raises(error, match=f"subnet must be .*got {subnet}"):
        any_network("cnn")[0].extract(subnet)


@each_network
@pytest.mark.parametrize("subnet", [torch.tensor(1), torch.tensor([[2], [0]])])
def test_swapped_parameters_are_the_ones_used(name, subnet):
    module, masks, events = any_network(name)
    keys = [f"x{i}" for i in range(len(events))]
    out_keys = ["y", "state"] if name == "gru" else ["y"]
    operator = TensorDictModule(module, in_keys=[*keys, "subnet"], out_keys=out_keys)
    inputs = {key: torch.randn(5, *event, dtype=torch.float64) for key, event in zip(keys, events, strict=True)}
    td = TensorDict({**inputs, "subnet": subnet})
    swapped = TensorDict.from_module(operator).data.apply(lambda v: torch.randn_like(v) if v.is_floating_point() else v)
    swapped.apply(lambda v: v.requires_grad_() if v.is_floating_point() else v)
    with swapped.to_module(operator):
        assert not isinstance(next(iter(module.network.state_dict(keep_vars=True).values())), nn.Parameter)
        output = operator(td.clone())["y"]

    other = copy.deepcopy(module)
    with torch.no_grad():
        for parameter, p in other.network.named_parameters():
            p.copy_(swapped["module", "network"][tuple(parameter.split("."))])
    torch.testing.assert_close(output, flat(other(*inputs.values(), subnet))[0], rtol=1e-10, atol=1e-12)
    output.square().sum().backward()
    assert all(p.grad is None for p in module.parameters())
    for parameter, mask in masks.items():
        grad, kept = swapped["module", "network"][tuple(parameter.split("."))].grad, mask[subnet.flatten()].any(0)
        assert (grad[~kept] == 0).all()
        assert (grad != 0).any()


def test_vmap_over_swapped_parameters_equals_a_loop():
    module, _, _ = any_network("cnn")
    operator = TensorDictModule(module, in_keys=["x", "subnet"], out_keys=["y"])
    params = TensorDict.from_module(operator).data.apply(lambda v: v * 1)
    several = torch.stack([params.apply(lambda v, s=s: v * s if v.is_floating_point() else v) for s in (1.0, -0.5, 2.0)])
    x, subnet = torch.randn(5, 2, 5, 5, dtype=torch.float64), torch.tensor([[2], [0]])

    def answer(p):
        with p.to_module(operator):
            return module(x, subnet)

    expected = torch.stack([answer(p) for p in several.unbind(0)])
    torch.testing.assert_close(torch.vmap(answer)(several), expected, rtol=1e-10, atol=1e-12)


def test_a_compiled_cnn_agrees_with_eager(compiler):
    module, _, _ = any_network("cnn")
    x, one, rows = torch.randn(5, 2, 5, 5, dtype=torch.float64), torch.tensor(1), torch.tensor([[2], [0]])

    def both():
        return module(x, one), module(x, rows)

    def gradients(outputs):
        return torch.autograd.grad(sum(y.square().sum() for y in outputs), list(module.parameters()))

    expected, outputs = both(), torch.compile(both, fullgraph=True, backend="aot_eager")()
    torch.testing.assert_close(outputs, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(gradients(outputs), gradients(expected), rtol=1e-10, atol=1e-12)


def test_any_network_can_be_a_critic():
    module, masks, _ = any_network("two inputs")
    qvalue = SubnetQValueOperator(module, in_keys=["pixels", "action", "subnet"])
    pixels, action = torch.randn(5, 2, 5, 5, dtype=torch.float64), torch.randn(5, ACT, dtype=torch.float64)
    td = TensorDict(pixels=pixels, action=action, subnet=torch.tensor([[1], [2]]))
    expected = torch.stack([plain_copies(module, masks)[k](pixels, action) for k in (1, 2)])
    torch.testing.assert_close(qvalue(td)["state_action_value"], expected)
    plain = qvalue.extract(2)
    assert type(plain.module) is Pixels
    torch.testing.assert_close(plain(td.exclude("subnet"))["state_action_value"], expected[1])
    with pytest.raises(ValueError, match=r"'subnet' must be in \[0, num_subnets=3\), got \[7\]"):
        qvalue(td.set("subnet", torch.tensor(7)))


@pytest.mark.parametrize("shape", [(2,), (5,), (2, 2), (1, 5), (2, 1, 5)])
def test_any_network_refuses_an_index_for_each_element(shape):
    module, _, _ = any_network("cnn")
    with pytest.raises(
        ValueError, match=r"takes an index of shape \(\) or \(K, 1, ...\), got \(" + ", ?".join(map(str, shape))
    ):
        module(torch.zeros(5, 2, 5, 5, dtype=torch.float64), torch.zeros(shape, dtype=torch.int64))


def test_any_network_refuses_more_batch_dimensions_than_its_index_has():
    network = nn.Linear(8, 3)
    module = SubnetModule(network, bernoulli_module_masks(network, N, 0.3, generator=0))
    with pytest.raises(ValueError, match=r"inputs of \[3\] batch dimensions need an index"):
        module(torch.zeros(4, 2, 5, 8), torch.zeros(2, 1, dtype=torch.int64))


def test_any_network_takes_an_int_and_sees_masks_written_in_place():
    module, x = any_network("cnn")[0], torch.randn(2, 2, 5, 5, dtype=torch.float64)
    before = module(x, 1)
    assert torch.equal(before, module(x, torch.tensor(1)))
    with pytest.raises(ValueError, match=rf"subnet must be in \[0, num_subnets={N}\), got {N}"):
        module(x, N)
    for masks in module.buffers():
        masks.copy_(masks.roll(1, 0))
    assert torch.equal(module(x, 2), before)
    assert torch.equal(module.extract(2)(x), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int32, torch.bool])
@pytest.mark.parametrize("shape", [(), (2, 1)])
def test_any_network_refuses_an_index_that_is_not_int64(dtype, shape):
    with pytest.raises(TypeError, match=f"the subnet index must be an int64 tensor or an int, got {dtype}"):
        any_network("cnn")[0](torch.zeros(5, 2, 5, 5, dtype=torch.float64), torch.zeros(shape, dtype=dtype))


def test_masks_that_do_not_fit_any_network_are_refused():
    network = cnn()
    good = bernoulli_module_masks(network, N, 0.3, generator=0)
    with pytest.raises(ValueError, match=r"masks name the parameter '4.weight', the network has \['0.bias'"):
        SubnetModule(network, {**good, "4.weight": good["3.weight"]})
    with pytest.raises(ValueError, match=r"masks\['3.weight'\] must have shape \(num_subnets, 3, 36\)"):
        SubnetModule(network, {**good, "3.weight": good["3.weight"].mT})
    with pytest.raises(TypeError, match=r"masks\['3.weight'\] must be a boolean tensor"):
        SubnetModule(network, {**good, "3.weight": good["3.weight"].float()})
    with pytest.raises(ValueError, match="same number of subnetworks"):
        SubnetModule(network, {**good, "3.weight": good["3.weight"][:2]})
    with pytest.raises(ValueError, match="masks is empty"):
        SubnetModule(network, {})


def test_a_recurrent_network_compiles_where_torch_allows_it(compiler):
    network = nn.GRU(OBS, 4, batch_first=True)
    module = SubnetModule(network, bernoulli_module_masks(network, N, 0.2, generator=0), event_dims=2)
    sequences, every = torch.randn(2, 6, OBS), torch.arange(N)[:, None]
    with torch._dynamo.config.patch(allow_rnn=True):
        output, state = torch.compile(module, fullgraph=True, backend="aot_eager")(sequences, every)
    expected, expected_state = module(sequences, every)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(state, expected_state)


def test_actor_and_critic_compile_with_their_keys(compiler):
    actor, qvalue, batch = small_actor(N), small_qvalue(N), make_batch(8)
    batch["subnet"] = torch.arange(8) % N
    with set_exploration_type(DETERMINISTIC):
        expected = qvalue(actor(batch.clone()))
        actual = torch.compile(lambda td: qvalue(actor(td)), fullgraph=True, backend="aot_eager")(batch.clone())
    torch.testing.assert_close(actual["action"], expected["action"])
    torch.testing.assert_close(actual["state_action_value"], expected["state_action_value"])
