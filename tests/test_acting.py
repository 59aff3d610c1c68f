"""CompiledPolicy: the actor's own actions, from its current parameters, and the actor where it can't be compiled."""

import copy
import pickle

import pytest
import torch
from conftest import OBS, small_actor, small_deterministic_actor, small_qvalue_actor, specs
from tensordict import TensorDict
from tensordict.nn import TensorDictSequential
from test_training import make_trainer, transitions
from test_update import compiler  # noqa: F401
from torch import nn
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import EGreedyModule

from omnet_torchrl import CompiledPolicy, make_actor

CLOSE = {"rtol": 1e-5, "atol": 1e-6}


def make_policy(build=small_actor, compile=True, device=None):
    """A policy that is not prepared."""
    return CompiledPolicy(build(device=device), compile=compile)


def frame(num_envs=1, seed=0, device=None, size=OBS):
    generator = torch.Generator().manual_seed(seed)
    observation = torch.randn(num_envs, size, generator=generator)
    subnet = torch.randint(3, (num_envs,), generator=generator)
    return TensorDict(observation=observation, subnet=subnet, batch_size=[num_envs]).to(device)


def act(policy, tensordict, seed=0):
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        return policy(tensordict.copy())["action"].clone()


@pytest.fixture(scope="module")
def prepared():
    """A policy, compiled for one environment and for four, there deterministic too."""
    policies = {}
    for num_envs in (1, 4):
        policies[num_envs] = make_policy()
        policies[num_envs].prepare(frame(num_envs))
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        policies[4].prepare(frame(4))
    return policies


@pytest.mark.parametrize("make", [small_deterministic_actor, small_qvalue_actor])
@pytest.mark.parametrize("kind", [None, *ExplorationType])
def test_policies_without_a_distribution_are_compiled_whatever_the_exploration(make, kind, compiler):  # noqa: F811
    policy = CompiledPolicy(make())
    with set_exploration_type(kind):
        policy.prepare(frame(4))
        assert len(compiler) == 1
        state = torch.get_rng_state()
        for seed in range(3):
            played = policy(frame(4, seed))
            assert played.keys() == {"observation", "subnet", "action"}
            assert torch.equal(played["action"], policy.actor(frame(4, seed))["action"])
        assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(policy(frame(2))["action"], policy.actor(frame(2))["action"])


@pytest.mark.parametrize("num_envs", [1, 4])
def test_it_acts_as_the_actor_does(prepared, num_envs):
    policy = prepared[num_envs]
    for seed in range(20):
        state = frame(num_envs, seed)
        assert policy(state.copy()).keys() == {"observation", "subnet", "action"}  # not by the actor, which writes more
        torch.testing.assert_close(act(policy, state, seed), act(policy.actor, state, seed), **CLOSE)


def test_it_acts_as_the_actor_does_deterministically(prepared):
    policy, generator = prepared[4], torch.get_rng_state()
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        for seed in range(20):
            state = frame(4, seed)
            assert policy(state.copy()).keys() == {"observation", "subnet", "action"}
            torch.testing.assert_close(act(policy, state, 0), act(policy.actor, state, 1), **CLOSE)
            assert torch.equal(act(policy, state, 0), act(policy, state, 1))
    assert torch.equal(generator, torch.get_rng_state())


def test_what_it_is_prepared_for_is_not_compiled_again(prepared, monkeypatch):
    monkeypatch.setattr("omnet_torchrl.updates.acting.CompiledFunction", lambda *_: pytest.fail("compiled again"))
    prepared[4].prepare(frame(4, seed=3))
    with set_exploration_type(ExplorationType.MEAN):  # the actor's own affair
        prepared[4].prepare(frame(4))


def test_it_reads_inputs_of_any_strides(prepared):
    policy, state = prepared[4], frame(4)
    columns = torch.stack([state["observation"], torch.ones(4, OBS)], -1).transpose(0, 1)[..., 0].t()
    assert not columns.is_contiguous()
    assert torch.equal(act(policy, state.copy().set("observation", columns)), act(policy, state))


def test_it_follows_the_parameters_of_the_actor(prepared):
    policy, state = prepared[1], frame(1)
    before = act(policy, state)
    with torch.no_grad():
        for parameter in policy.actor.parameters():
            parameter.mul_(1.5)
    changed = act(policy, state)
    assert not torch.allclose(before, changed)
    torch.testing.assert_close(changed, act(policy.actor, state), **CLOSE)


def test_it_follows_a_state_that_is_loaded_masks_included(prepared):
    policy, state = prepared[4], frame(4)
    other = make_policy(lambda device: make_actor(*specs(), num_subnets=3, sparsity=0.4, num_cells=(16, 16), generator=3))
    policy.actor.load_state_dict(other.actor.state_dict())
    torch.testing.assert_close(act(policy, state), act(other.actor, state), **CLOSE)


@pytest.mark.parametrize("num_envs", [2, 4])
def test_the_actor_answers_what_it_was_not_compiled_for(prepared, num_envs):
    policy, state = prepared[1], frame(num_envs)
    assert torch.equal(act(policy, state), act(policy.actor, state))
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        assert torch.equal(act(policy, frame()), act(policy.actor, frame()))


def test_it_asks_for_the_index_as_the_actor_does(prepared):
    with pytest.raises(KeyError, match="append SubnetPrimer"):
        prepared[1](frame().exclude("subnet"))


@pytest.mark.parametrize("build", [small_actor, lambda device: small_actor(dropout=0.1)])
def test_nothing_is_compiled_where_it_is_not_asked_for_or_where_dropout_draws(build):
    policy = make_policy(build, compile=build is not small_actor)
    policy.prepare(frame())
    assert not policy._code
    assert "loc" in policy(frame())


def test_preparing_changes_nothing(prepared):
    policy = make_policy()
    before, state = {key: value.clone() for key, value in policy.state_dict().items()}, torch.get_rng_state()
    example = frame()
    policy.prepare(example)
    assert torch.equal(state, torch.get_rng_state())
    assert example.keys() == {"observation", "subnet"}
    assert all(torch.equal(value, before[key]) for key, value in policy.state_dict().items())


def test_its_state_is_the_actors():
    policy = make_policy()
    assert policy.state_dict().keys() == policy.actor.state_dict().keys()
    policy.load_state_dict({key: value * 0 for key, value in policy.actor.state_dict().items()})
    assert all(not parameter.any() for parameter in policy.actor.parameters())
    assert [id(parameter) for parameter in policy.parameters()] == [id(parameter) for parameter in policy.actor.parameters()]


def compiled_policy(actor):
    policy = CompiledPolicy(actor)
    policy.prepare(frame(2, size=4))
    return policy


def test_a_run_is_the_same_to_rounding(tmp_path):
    plain, compiled = (make_trainer(tmp_path / str(p), num_envs=2, policy=p) for p in (None, compiled_policy))
    assert compiled.collector.policy._code
    plain.run()
    compiled.run()
    torch.testing.assert_close(transitions(compiled), transitions(plain), rtol=1e-3, atol=1e-3)


def test_a_trainer_prepares_it(tmp_path):
    trainer = make_trainer(tmp_path, policy=CompiledPolicy)
    prepared = []
    trainer.update.compiled, trainer.update.prepare = True, prepared.append
    trainer.prepare()
    assert trainer.collector.policy._code
    assert [batch.batch_size for batch in prepared] == [(8,)]


@pytest.mark.gpu
def test_on_a_gpu_it_acts_as_the_actor_does():
    policy, state = make_policy(device="cuda"), frame(device="cuda")
    policy.prepare(state)
    assert policy(state.copy()).keys() == {"observation", "subnet", "action"}
    torch.testing.assert_close(act(policy, state), act(policy.actor, state), rtol=1e-4, atol=1e-5)


def test_a_module_that_holds_one_loads_what_it_has_stored():
    def make():
        policy = CompiledPolicy(small_qvalue_actor(), compile=False)
        return TensorDictSequential(policy, EGreedyModule(policy.actor.spec))

    first, second = make(), make()
    second.load_state_dict(first.state_dict())
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
    nn.Sequential(second).load_state_dict(nn.Sequential(first).state_dict())


def replaced_by_loading(actor, values):
    actor.load_state_dict(values, assign=True)


def replaced_as_data(actor, values):
    for name, tensor in [*actor.named_parameters(), *actor.named_buffers()]:
        tensor.data = values[name]


@pytest.mark.parametrize("replace", [replaced_by_loading, replaced_as_data])
def test_tensors_that_take_the_place_of_others_are_those_of_the_next_action(replace, compiler):  # noqa: F811
    policy = make_policy()
    policy.prepare(frame(4))
    values = {name: ~each if each.dtype == torch.bool else each + 0.3 for name, each in policy.actor.state_dict().items()}
    replace(policy.actor, values)
    torch.testing.assert_close(act(policy, frame(4)), act(policy.actor, frame(4)), **CLOSE)
    with torch.no_grad():
        next(policy.actor.parameters()).mul_(3)
    assert set(policy(frame(4)).keys()) == {"observation", "subnet", "action"}  # compiled, as before
    torch.testing.assert_close(act(policy, frame(4)), act(policy.actor, frame(4)), **CLOSE)
    assert len(compiler) == 1


def test_parameters_that_it_has_for_a_while_are_those_of_its_actions_for_that_while(compiler):  # noqa: F811
    policy = make_policy()
    policy.prepare(frame(4))
    before = act(policy, frame(4))
    others = TensorDict.from_module(policy.actor).data.apply(lambda each: ~each if each.dtype == torch.bool else each + 0.3)
    with others.to_module(policy.actor):
        within = act(policy, frame(4))
        torch.testing.assert_close(within, act(policy.actor, frame(4)), **CLOSE)
    assert not torch.allclose(within, before)
    torch.testing.assert_close(act(policy, frame(4)), before, **CLOSE)


def test_tensors_of_another_type_are_left_to_the_actor(compiler):  # noqa: F811
    policy = make_policy()
    policy.prepare(frame(4))
    policy.actor.double()
    played = frame(4).apply(lambda value: value.double() if value.is_floating_point() else value)
    torch.testing.assert_close(act(policy, played), act(policy.actor, played))
    policy.actor.float()
    torch.testing.assert_close(act(policy, frame(4)), act(policy.actor, frame(4)), **CLOSE)


def sent(policy):
    return pickle.loads(pickle.dumps(policy))


@pytest.mark.parametrize("copied", [copy.deepcopy, sent])
def test_a_copy_acts_by_its_own_parameters_and_is_prepared_by_itself(copied, compiler):  # noqa: F811
    policy = make_policy()
    policy.prepare(frame(4))
    before, other = act(policy, frame(4)), copied(policy)
    torch.testing.assert_close(act(other, frame(4)), before, **CLOSE)
    with torch.no_grad():
        for parameter in other.actor.parameters():
            parameter.mul_(2)
    for _ in range(2):  # as it came, and prepared
        torch.testing.assert_close(act(other, frame(4)), act(other.actor, frame(4)), **CLOSE)
        torch.testing.assert_close(act(policy, frame(4)), before, **CLOSE)
        other.prepare(frame(4))
    assert len(compiler) == 2
