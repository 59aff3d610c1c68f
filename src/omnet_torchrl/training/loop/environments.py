"""Environments of a run: gymnasium's, a user's own and TorchRL's, each behind a :class:`Border`, and the maze."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from importlib import import_module
from typing import Any

import gymnasium
import numpy as np
import torchrl.envs.libs.utils  # noqa: F401, whose failed import of gym would keep what is on the stack when it is first needed
from gymnasium.wrappers import FlattenObservation, NormalizeReward, TimeLimit
from torch import Tensor
from torchrl.envs import Compose, DoubleToFloat, EnvBase, GymWrapper, RewardSum, StepCounter, Transform, TransformedEnv

from omnet_torchrl.envs import Maze2DEnv, MinAtarEnv, TasksEnv, make_task, task_names
from omnet_torchrl.envs.suites import HALF_CHEETAH, META_WORLD
from omnet_torchrl.envs.tasks import check_tasks
from omnet_torchrl.offset import ObservationOffset
from omnet_torchrl.training.loop.adapter import TorchRLAdapter
from omnet_torchrl.training.loop.blame import failure, member, unknown_env
from omnet_torchrl.training.loop.border import Border, check_spaces
from omnet_torchrl.training.loop.generators import OwnGlobals
from omnet_torchrl.training.options import TrainConfig
from omnet_torchrl.training.options.contradictions import MINATAR
from omnet_torchrl.transforms import EpisodePrimer

MAZE = "Maze2D"  # Maze2DEnv; MinAtar/<game> is MinAtarEnv; every other name is gymnasium's or a user's own


def env_options(config: TrainConfig) -> dict[str, Any]:
    """The options that make an environment, which :func:`check_env` and :func:`make_env` take beside its name."""
    names = ("env_kwargs", "wrappers", "flatten_observation", "max_episode_steps")
    return {name: getattr(config, name) for name in names}


def instances(config: TrainConfig) -> str:
    """The line that says how many environments a run makes."""
    tasks = len(task_names(config.env))
    counts = tasks * config.environments, tasks * config.eval.episodes, config.eval.bias_episodes
    purposes = zip(counts, ("train in", "evaluate in", "measure the bias in"), strict=True)
    listed = ", ".join(f"{count} to {purpose}" for count, purpose in purposes if count)
    return f"environments that are made of {config.env}: {listed}"


def check_env(name: str, *, normalized: bool = False, **options: Any) -> list[str]:
    """Make the environment once, reset it, make a step, and close it.

    Args:
        name (str): the option ``env``.

    Keyword Args:
        normalized (bool): the networks normalise observations, and no wrapper may. Defaults to ``False``.
        **options: of :func:`make_gymnasium`.

    Returns:
        list of str: what a person should know of it, a line each.

    Raises:
        ValueError: it is unknown, lacks a package, can't be made, reset or stepped, or has spaces, observations or rewards that
            are not supported.
    """
    if name == MAZE or name.startswith(MINATAR):
        for option in ("wrappers", "flatten_observation", *(["env_kwargs"] if name == MAZE else [])):
            if options.get(option):
                raise ValueError(f"{option} must not be given with env={name}, got {options[option]!r}: leave it out.")
        if name != MAZE:
            with _blamed(name, "made", options.get("env_kwargs")):
                _games(name, None, options)
        return []
    names = task_names(name)
    envs, notes = zip(*(_checked(each, normalized, options) for each in names), strict=True)
    if len(names) > 1:
        check_tasks(envs, names)
    return [note for each in notes for note in each]


def _checked(name: str, normalized: bool, options: Mapping[str, Any]) -> tuple[Border, list[str]]:
    """An environment that was made, stepped and closed, and what a person should know of it."""
    env = _bordered(name, **options)
    try:
        with _blamed(name, "reset"):
            # As a run does: some environments draw the first episode before they read the seed.
            first, again = ((env.reset(seed=0), env.reset()[0])[1] for _ in range(2))
        with _blamed(name, "stepped"):
            observation, reward, *_ = env.step(env.action_space.low / 2 + env.action_space.high / 2)
    finally:
        with _blamed(name, "closed"):
            env.close()
    for what, value in {"observation": np.stack([first, observation]), "reward": np.array(reward)}.items():
        if not np.isfinite(value).all():
            raise ValueError(f"the {what} of env must be finite, got {value.tolist()} in the first step of {name!r}: mend it.")
    return env, _notes(name, env, normalized, repeats=np.array_equal(first, again))


def _notes(name: str, env: gymnasium.Env, normalized: bool, repeats: bool) -> list[str]:
    notes = []
    while isinstance(env, gymnasium.Wrapper):
        if any(type(each).__name__ == "RunningMeanStd" for each in vars(env).values()):
            apart = "each environment of training and of evaluation has its own, and no checkpoint keeps them"
            if not isinstance(env, NormalizeReward):
                if normalized:
                    advice = "leave out the one or the other"
                    raise ValueError(f"normalize_observations must be false with {type(env).__name__} around {name}: {advice}.")
                apart += "; normalize_observations=true has one set for all, and keeps it"
            notes.append(f"warning: {type(env).__name__} around {name} keeps running statistics: {apart}")
        env = env.env
    if not notes and not repeats:
        why = "it draws random numbers that no seed decides, or keeps something from one episode to the next"
        then = "two runs of one seed may differ, and a resumed run may go on inexactly"
        notes.append(f"warning: two episodes of {name} begin differently after the same seed: {why}; {then}")
    return notes


@contextmanager
def _blamed(name: str, what: str, kwargs: Mapping[str, Any] | None = None) -> Iterator[None]:
    """Whatever an environment's own code raises is a ``ValueError`` of one line."""
    try:
        yield
    except Exception as error:
        raise ValueError(failure(name, what, error, kwargs)) from error


def make_env(
    name: str,
    *transforms: Transform,
    num_envs: int | None = None,
    seed: int | None = None,
    observation_offset: float = 0.0,
    sum_episodes: bool = True,
    **options: Any,
) -> EnvBase:
    """An environment for training or evaluation.

    Args:
        name (str): the option ``env``: ``Maze2D`` for :class:`~omnet_torchrl.Maze2DEnv`, or see :func:`make_gymnasium`. Several
            tasks, whose names ``+`` joins, are a :class:`~omnet_torchrl.TasksEnv`, of which ``num_envs`` is a multiple.
        *transforms (Transform): appended, e.g. a :class:`~omnet_torchrl.SubnetPrimer`.
        num_envs (int or None): this many, stepped one after the other in this process, as one environment of batch size
            ``(num_envs,)``. ``None`` (default): a single one, without batch size.
        seed (int or None): of the environment's random numbers.
        observation_offset (float): scale of an :class:`~omnet_torchrl.ObservationOffset`; 0 (default): none.
        sum_episodes (bool): write each episode's return and length so far, ``episode_reward`` and ``step_count``. Defaults to
            ``True``.
        **options: of :func:`make_gymnasium`; the maze has ``max_episode_steps`` alone.
    """
    if name == MAZE:
        limit = options.get("max_episode_steps")
        base: EnvBase = Maze2DEnv(() if num_envs is None else num_envs, **({} if limit is None else {"max_steps": limit}))
    elif name.startswith(MINATAR):
        base = _games(name, num_envs, options)
    else:
        names = task_names(name)
        names *= (num_envs or len(names)) // len(names)
        with ExitStack() as stack:  # which closes those that were made where another can't be
            envs = []
            for i, each in enumerate(names):
                envs.append(_bordered(each, seed=i + (seed or 0), **options))
                stack.callback(envs[-1].close)
            base = _together(envs, names, num_envs)
            stack.pop_all()
    offset = [ObservationOffset(observation_offset, generator=seed)] if observation_offset else []
    sums: list[Transform] = [RewardSum()] if sum_episodes else []
    limit = options.get("max_episode_steps") if name.startswith(MINATAR) else None
    if sum_episodes or limit:
        sums.append(StepCounter(limit))  # games are truncated by it, all others by themselves
    # Nothing is float64 any more; a checkpoint knows transforms by their number, and older ones count this.
    env = TransformedEnv(base, Compose(DoubleToFloat(), *offset, *sums, *transforms))
    if seed is not None:
        env.set_seed(seed)
    return env


def _games(name: str, num_envs: int | None, options: Mapping[str, Any]) -> MinAtarEnv:
    return MinAtarEnv(name.removeprefix(MINATAR), () if num_envs is None else num_envs, **(options.get("env_kwargs") or {}))


def _together(envs: Sequence[Border], names: Sequence[str], num_envs: int | None) -> EnvBase:
    if len(set(names)) > 1:
        return TasksEnv(envs, names, success=all(each.startswith(META_WORLD) for each in names))
    return GymWrapper(envs[0] if num_envs is None else _vector(envs))


def _vector(envs: Sequence[Border]) -> gymnasium.vector.SyncVectorEnv:
    # The only mode of gymnasium's vector environments in which TorchRL sees each environment's own last observation.
    mode = gymnasium.vector.AutoresetMode.DISABLED
    return gymnasium.vector.SyncVectorEnv([partial(next, iter([env])) for env in envs], autoreset_mode=mode)


def _bordered(name: str, *, seed: int = 0, **options: Any) -> Border:
    if ":" not in name and name not in gymnasium.registry and not _in_suite(name):
        raise ValueError(unknown_env(name, [MAZE]))
    own_globals = OwnGlobals(seed)
    with own_globals, _blamed(name, "made", options.get("env_kwargs")):
        env = make_gymnasium(name, **options)
    try:
        check_spaces(name, env.observation_space, env.action_space)
    except ValueError:
        env.close()
        raise
    return Border(env, own_globals)


def make_gymnasium(
    name: str,
    *,
    env_kwargs: Mapping[str, Any] | None = None,
    wrappers: Sequence[str] = (),
    flatten_observation: bool = False,
    max_episode_steps: int | None = None,
    render_mode: str | None = None,
) -> gymnasium.Env:
    """The gymnasium environment that the options of a run name.

    Args:
        name (str): an id; a task of a suite, see :func:`~omnet_torchrl.envs.make_task`; ``module:Id``, whose module registers
            the id and is imported first; or ``module:function``, which returns an environment of gymnasium or TorchRL. Modules
            are also looked for in the working directory.

    Keyword Args:
        env_kwargs (mapping or None): arguments of the constructor or function.
        wrappers (sequence of str): ``module.Class``, called with the environment, one after the other.
        flatten_observation (bool): make one vector of observations of any other space.
        max_episode_steps (int or None): steps after which an episode is truncated. ``None`` (default): the id's own number.
        render_mode (str or None): as in ``gymnasium.make``.
    """
    kwargs = {**(env_kwargs or {}), **({} if render_mode is None else {"render_mode": render_mode})}
    function = partial(make_task, name) if _in_suite(name) else _function(name)
    if _in_suite(name) and max_episode_steps is not None:
        kwargs["max_episode_steps"], max_episode_steps = max_episode_steps, None
    elif function is None and max_episode_steps is not None:
        kwargs["max_episode_steps"] = -1  # gymnasium's word for none
    with warnings.catch_warnings(), _models():
        warnings.filterwarnings("ignore", message=".*is out of date")  # the paper's tasks are the -v4 ones
        env = gymnasium.make(name, **kwargs) if function is None else function(**kwargs)
    if isinstance(env, EnvBase):
        env = TorchRLAdapter(env)
    if not isinstance(env, gymnasium.Env):
        raise TypeError(f"it must return an environment of gymnasium or TorchRL, got {type(env).__name__}.")
    for wrapper in wrappers:
        module, _, attribute = wrapper.rpartition(".")
        if not module:
            raise ValueError(f"wrappers must be module.Class, got {wrapper!r}.")
        env = member(_import(module), attribute)(env)
    if flatten_observation:
        env = FlattenObservation(env)
    return env if max_episode_steps is None else TimeLimit(env, max_episode_steps)


@contextmanager
def _models() -> Iterator[None]:
    """Within, what MuJoCo says of a model is a Python warning, once, and not two lines for each instance.

    That a model uses what is deprecated is for its author, who is seldom the one that trains in it.
    """
    try:
        import mujoco
    except ImportError:
        yield
        return
    said: dict[str, None] = {}
    before = mujoco.get_mju_user_warning()
    mujoco.set_mju_user_warning(lambda text: said.setdefault(text))
    try:
        yield
    finally:
        mujoco.set_mju_user_warning(before)
    for text in said:
        if "deprecated" not in text:
            warnings.warn(f"MuJoCo: {text}", stacklevel=2)


def _in_suite(name: str) -> bool:
    return name.startswith((HALF_CHEETAH, META_WORLD))


def _function(name: str) -> Callable[..., Any] | None:
    """What ``module:function`` names; ``None`` for an id."""
    if name.count(":") != 1:
        return None
    module, attribute = name.split(":")
    imported = _import(module)  # which may register the id
    if name in gymnasium.registry or attribute in gymnasium.registry:
        return None
    other_version = attribute.split("-v")[0] in {each.split("-v")[0] for each in gymnasium.registry}  # gymnasium says which
    return None if other_version and not hasattr(imported, attribute) else member(imported, attribute)


def _import(module: str) -> Any:
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    return import_module(module)


def seed_env(env: EnvBase, seed: int) -> None:
    """Seed an environment and what its transforms draw: an evaluation is then a function of its seed."""
    env.set_seed(seed)
    for primer in primers(env):
        primer.generator.manual_seed(seed)


def primers(env: EnvBase) -> list[EpisodePrimer]:
    """What draws at the resets of an environment."""
    transforms = env.transform if isinstance(env, TransformedEnv) else ()
    each = transforms if isinstance(transforms, Compose) else [transforms]
    return [transform for transform in each if isinstance(transform, EpisodePrimer)]


def recorders(env: EnvBase) -> list[Border | EnvBase]:
    """The objects that bring back the episodes of an environment of :func:`make_env`: one each, or the whole maze or games."""
    while isinstance(env, TransformedEnv):
        env = env.base_env
    if isinstance(env, Maze2DEnv | MinAtarEnv):
        return [env]
    base: Any = env._env if isinstance(env, GymWrapper) else env if isinstance(env, TasksEnv) else None
    return list(getattr(base, "envs", [base]))


@contextmanager
def resting(env: EnvBase) -> Iterator[Callable[[Tensor], None]]:
    """Gives a function to say which environments of a batch rest: from then on, a step of theirs does nothing.

    An evaluation then takes the time of the steps that count. Only gymnasium's environments of :func:`make_env` can rest; the
    steps of all others, the maze's and the games' too, are made as usual. At the end no environment rests.
    """
    players = [player for player in recorders(env) if isinstance(player, Border)]

    def rest(which: Tensor) -> None:
        for player, rests in zip(players, which.tolist(), strict=bool(players)):
            player.resting = rests

    try:
        yield rest
    finally:
        for player in players:
            player.resting = False
