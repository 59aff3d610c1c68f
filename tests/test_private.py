"""Private names of torch: where they can't be used, torch.compile takes over, with one warning and the same numbers."""

import importlib
import warnings

import pytest
import tensordict.utils
import torch
import torch._inductor.compile_fx
import torch._inductor.output_code
from conftest import OBS, small_actor
from tensordict import TensorDict
from test_update import BATCH, CLOSE, assert_outputs_close, assert_same_state, build, make_batch, make_parts, make_update, train
from torch.distributions import Distribution
from torchrl.envs.utils import ExplorationType, set_exploration_type

from omnet_torchrl import CompiledPolicy
from omnet_torchrl.updates import kernels, private
from omnet_torchrl.updates.compiled import CompiledFunction


@pytest.fixture(autouse=True)
def _asked_anew():
    private.inductor.cache_clear()
    yield
    private.inductor.cache_clear()


def outside(monkeypatch):
    monkeypatch.setattr(private, "TESTED", ((1, 0), (1, 13)))


def without_inner(monkeypatch):
    monkeypatch.delattr(torch._inductor.compile_fx, "compile_fx_inner")


def without_callable(monkeypatch):
    monkeypatch.delitem(torch._inductor.output_code.CompiledFxGraph.__annotations__, "current_callable")


def without_mode(monkeypatch):
    monkeypatch.delattr(torch._subclasses, "FakeTensorMode")


def without_cache(monkeypatch):
    monkeypatch.setattr(torch._functorch, "config", object(), raising=True)


MISSING = {
    outside: "has not been tested",
    without_inner: "compile_fx_inner",
    without_callable: "current_callable",
    without_mode: "FakeTensorMode",
    without_cache: "enable_autograd_cache",
}


def test_this_version_is_tested():
    assert private.inductor() is private.inductor() is not None


@pytest.mark.parametrize("change", MISSING)
def test_what_is_missing_is_said_once(change, monkeypatch):
    change(monkeypatch)
    with pytest.warns(UserWarning, match=f"compiled by torch.compile.*{MISSING[change]}"):
        private.inductor()
    assert private.inductor() is None  # and a second warning would be an error
    assert not private.has_onednn_mm()


@pytest.mark.parametrize("version", ["2.13.0", "2.14.1+cu128", "2.14.0a0+git123abc", "2.13.0.dev20250101"])
def test_versions_of_all_kinds_are_read(version, monkeypatch):
    monkeypatch.setattr(torch, "__version__", version)
    assert private.inductor() is not None


@pytest.mark.parametrize("version", ["2.7.1", "2.15.0a0+git123abc", "3.0"])
def test_other_versions_are_not_trusted(version, monkeypatch):
    monkeypatch.setattr(torch, "__version__", version)
    with pytest.warns(UserWarning, match=f"torch {version[:3]}.*install a version of torch from 2.13 to 2.14"):
        assert private.inductor() is None


@pytest.fixture(scope="module")
def taken_over():
    """An update that torch.compile has prepared, and the warnings of that."""
    with pytest.MonkeyPatch.context() as monkeypatch, warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        outside(monkeypatch)
        private.inductor.cache_clear()
        update = build(make_parts())
        update.prepare(make_batch(BATCH))
    return update, said


@pytest.fixture
def nothing_is_compiled():
    with torch.compiler.set_stance("fail_on_recompile"):
        yield


def test_preparing_warns_once_and_changes_nothing(taken_over):
    update, said = taken_over
    assert [warning.category for warning in said if "torch.compile" in str(warning.message)] == [UserWarning]
    assert not [warning for warning in said if "inline_inbuilt_nn_modules" in str(warning.message)]
    assert_same_state(update, make_update())


def test_torch_compile_makes_the_same_numbers_and_compiles_once(taken_over, nothing_is_compiled):
    update, eager = taken_over[0], make_update()
    update.load_state_dict(eager.state_dict())
    outputs = train(update, 20), train(eager, 20)
    assert_same_state(update, eager, **CLOSE)
    assert_outputs_close(*outputs)


def test_blocks_of_updates_agree_too(taken_over, nothing_is_compiled):
    update, eager = taken_over[0], make_update()
    update.load_state_dict(eager.state_dict())
    batches = make_batch(4, BATCH, seed=3)
    draws = update.loss.draw(batches[0], num_updates=4, delayed=[True] * 4)
    assert_outputs_close(*(dict(each(batches, draws=draws).items()) for each in (update, eager)))
    assert_same_state(update, eager, **CLOSE)


def test_masks_written_in_place_are_live(taken_over, nothing_is_compiled):
    update, eager, stale = taken_over[0], make_update(), make_update()
    update.load_state_dict(eager.state_dict())
    for each in (update, eager):
        masks = [mask for mask in each.loss.qvalue_network_params.values(True, True) if mask.dtype == torch.bool]
        assert masks
        for mask in masks:
            mask.logical_not_()
    got, expected, old = (train(each, 5) for each in (update, eager, stale))
    assert_outputs_close(got, expected)
    assert_same_state(update, eager, **CLOSE)
    assert not torch.allclose(got["loss_qvalue"], old["loss_qvalue"], rtol=1e-3)


def test_a_policy_is_compiled_by_torch_compile(monkeypatch):
    outside(monkeypatch)
    policy = CompiledPolicy(small_actor())
    state = TensorDict({"observation": torch.randn(4, OBS), "subnet": torch.tensor([0, 2, 1, 1])}, [4])
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        with pytest.warns(UserWarning, match="compiled by torch.compile") as said:
            policy.prepare(state)
        assert len(said) == 1
        assert len(policy._code) == 1
        with torch.compiler.set_stance("fail_on_recompile"):
            torch.testing.assert_close(policy(state.copy())["action"], policy.actor(state.copy())["action"])
            with torch.no_grad():
                for tensor in policy.actor.state_dict().values():
                    tensor.logical_not_() if tensor.dtype == torch.bool else tensor.mul_(1.5)
            torch.testing.assert_close(policy(state.copy())["action"], policy.actor(state.copy())["action"])


def test_kernels_load_again():
    a, b = torch.randn(3, 4), torch.randn(4, 5)
    if private.has_onednn_mm():
        kernels._operation()
        importlib.reload(kernels)
        torch.testing.assert_close(kernels._operation()(a, b), a @ b)


def test_within_as_if_compiling_and_only_there_torch_says_so():
    seen, validated = [], Distribution._validate_args

    def look():
        seen.append((torch.compiler.is_compiling(), tensordict.utils.is_compiling(), Distribution._validate_args))
        return 1 / (len(seen) - 2)

    look()
    with pytest.raises(ZeroDivisionError), private.as_if_compiling():
        look()
    look()
    assert seen == [(False, False, validated), (True, True, False), (False, False, validated)]


def test_compiled_code_reads_inputs_and_states_of_any_strides():
    def step(state, inputs):
        state[0].add_(inputs[0])
        return {"sum": state[0].sum(0), "product": inputs[0] * torch.arange(4.0)}

    state, value = torch.zeros(3, 8)[:, :4], torch.arange(12.0).view(3, 4)
    with torch.no_grad():
        output = CompiledFunction(step, [state], [torch.zeros(4, 3).t()])([state], [value])
    assert torch.equal(state, value)
    assert torch.equal(output["sum"], value.sum(0))
    assert torch.equal(output["product"], value * torch.arange(4.0))
