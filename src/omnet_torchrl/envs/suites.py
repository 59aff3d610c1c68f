r"""Names of tasks, and the suites that they belong to: HalfCheetah's gaits, and Meta-World.

``"HalfCheetah/forward+backward"`` names two tasks side by side, ``"Hopper-v4+my_module:Hopper-v4"`` two environments of
gymnasium with equal spaces. The gaits are those of "Efficient Reinforcement Learning by Discovering Neural Pathways" (Arnob et
al., 2024) in plain MuJoCo; it gives no formulas, so these are ours, after gymnasium's own reward:

.. math::
    r = v - c, \quad r = -v - c, \quad r = -|v - v^*| - c, \quad r = 15 z - c, \quad r = \pm\min(\pm v, 3) + 15 z - c

for ``forward``, ``backward``, ``velocity_<v*>``, ``jump``, and ``forward_jump`` and ``backward_jump``, with the velocity
:math:`v` in m/s, the height of the torso :math:`z` above its start in m, and the cost of control :math:`c = 0.1 |a|^2`.

gymnasium and metaworld are imported where an environment is made, and nowhere else.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
import math
from collections.abc import Sequence
from typing import Any

HALF_CHEETAH, META_WORLD = "HalfCheetah/", "Meta-World/"  # before the name of a task
CHEETAH_TASKS = ("forward", "backward", "forward_jump", "backward_jump", "jump")
VELOCITY = "velocity_"  # before a target velocity
MT10 = (
    *("reach-v3", "push-v3", "pick-place-v3", "door-open-v3", "drawer-open-v3", "drawer-close-v3"),
    *("button-press-topdown-v3", "peg-insert-side-v3", "window-open-v3", "window-close-v3"),
)
METAWORLD_MUJOCO = "3.3.0"  # the only one that metaworld 3.1.1 works with


def task_names(name: str) -> tuple[str, ...]:
    """The tasks that a name stands for: its parts between ``+``, each with the suite of the part before; one for most names.

    Examples:
        >>> task_names("HalfCheetah/forward+velocity_0.5")
        ('HalfCheetah/forward', 'HalfCheetah/velocity_0.5')
        >>> task_names("Hopper-v4")
        ('Hopper-v4',)
        >>> len(task_names("Meta-World/MT10"))
        10

    Raises:
        ValueError: a part is empty, or a task is named twice.
    """
    if name == f"{META_WORLD}MT10":
        return tuple(META_WORLD + task for task in MT10)
    names: list[str] = []
    suite = ""
    for part in name.split("+"):
        inside = part.partition("/")[0] + "/"
        suite = inside if inside in (HALF_CHEETAH, META_WORLD) else suite if "/" not in part and ":" not in part else ""
        names.append(part if part.startswith(suite) else suite + part)
        if (name and not part) or names.index(names[-1]) < len(names) - 1:
            what = f"{names[-1]!r} twice" if part else "an empty name"
            raise ValueError(f"the tasks of {name!r} must be different names between '+', got {what}.")
    return tuple(names)


def make_task(name: str, **kwargs: Any) -> Any:
    """The gymnasium environment of a task of a suite, ``"HalfCheetah/..."`` or ``"Meta-World/..."``.

    Args:
        name (str): of one task.
        **kwargs: of ``HalfCheetah-v5``; or of :func:`make_meta_world`.
    """
    if name.startswith(HALF_CHEETAH):
        return make_half_cheetah(name.removeprefix(HALF_CHEETAH), **kwargs)
    return make_meta_world(name.removeprefix(META_WORLD), **kwargs)


def half_cheetah_reward(task: str, velocity: float, height: float, control: float) -> float:
    """The reward of a step, see the module's docstring.

    Args:
        task (str): e.g. ``"forward"`` or ``"velocity_0.5"``.
        velocity, height, control (float): mean velocity of the step, height after it, and the cost of control.
    """
    if task.startswith(VELOCITY):
        return -abs(velocity - float(task.removeprefix(VELOCITY))) - control
    forward = -velocity if task.startswith("backward") else velocity
    if task.endswith("jump"):
        return (0.0 if task == "jump" else min(forward, 3.0)) + 15.0 * height - control
    return forward - control


def make_half_cheetah(task: str, **kwargs: Any) -> Any:
    """HalfCheetah-v5 with the reward of a task; episodes are truncated after 1,000 steps.

    Args:
        task (str): ``forward``, ``backward``, ``forward_jump``, ``backward_jump``, ``jump`` or ``velocity_<m/s>``.
        **kwargs: of ``gymnasium.make``.

    Raises:
        ValueError: an unknown task.
    """
    _check_gait(task)
    gymnasium = importlib.import_module("gymnasium")

    class HalfCheetahTask(gymnasium.Wrapper):  # type: ignore[name-defined]
        def step(self, action: Any) -> Any:
            observation, _, terminated, truncated, info = self.env.step(action)
            height = float(self.unwrapped.data.qpos[1])  # 0 where an episode starts
            reward = half_cheetah_reward(task, info["x_velocity"], height, -info["reward_ctrl"])
            return observation, reward, terminated, truncated, info

    return HalfCheetahTask(gymnasium.make("HalfCheetah-v5", **kwargs))


def make_meta_world(
    task: str,
    *,
    reward_function_version: str = "v2",
    num_goals: int = 1,
    goal_seed: int = 0,
    max_episode_steps: int = 500,
    render_mode: str | None = None,
) -> Any:
    """A task of Meta-World, whose goal is part of the observation (MT1).

    Args:
        task (str): e.g. ``"reach-v3"``.

    Keyword Args:
        reward_function_version (str): ``"v1"`` or ``"v2"`` (default); returns of the two can't be compared.
        num_goals (int): goals of which each episode has a random one, 1 to 50. Defaults to 1, a fixed goal.
        goal_seed (int): of the goals, which are the same in every environment with this seed. Defaults to 0.
        max_episode_steps (int): after which an episode is truncated. Defaults to 500, the suite's.
        render_mode (str or None): as in ``gymnasium.make``.

    Raises:
        ImportError: metaworld is missing, or another mujoco than it needs is installed.
        ValueError: an unknown task.
    """
    advice = "pip install 'omnet-torchrl[metaworld]', in a virtual environment of its own"
    try:
        metaworld, gymnasium = (importlib.import_module(name) for name in ("metaworld", "gymnasium"))
    except ModuleNotFoundError as error:
        raise ImportError(f"Meta-World's tasks are in the package metaworld, which is not installed: {advice}.") from error
    installed = importlib.metadata.version("mujoco")
    if installed != METAWORLD_MUJOCO:
        raise ImportError(f"metaworld needs mujoco=={METAWORLD_MUJOCO}, got mujoco=={installed}: {advice}.")
    if task not in metaworld.MT1.ENV_NAMES:
        raise ValueError(_unknown("Meta-World", task, ["MT10", *metaworld.MT1.ENV_NAMES]))
    if not 1 <= num_goals <= 50:
        raise ValueError(f"num_goals must be in [1, 50], got {num_goals}.")
    benchmark = metaworld.MT1(task, seed=goal_seed)
    env = benchmark.train_classes[task](reward_function_version=reward_function_version, render_mode=render_mode)
    env.max_path_length = max_episode_steps + 1  # TimeLimit ends episodes, as it does everywhere else
    goals = benchmark.train_tasks[:num_goals]
    env.set_task(goals[0])
    env = gymnasium.wrappers.TimeLimit(env, max_episode_steps)
    return env if num_goals == 1 else importlib.import_module("metaworld.wrappers").RandomTaskSelectWrapper(env, goals)


def _check_gait(task: str) -> None:
    if task.startswith(VELOCITY):
        try:
            if math.isfinite(float(task.removeprefix(VELOCITY))):
                return
        except ValueError:
            pass
    if task not in CHEETAH_TASKS:
        raise ValueError(_unknown("HalfCheetah", task, [*CHEETAH_TASKS, f"{VELOCITY}0.5"]))


def _unknown(suite: str, task: str, among: Sequence[str]) -> str:
    closest = difflib.get_close_matches(task, among, 1, cutoff=0)[0]
    listed = ", ".join(among) if len(among) < 10 else f"one of its {len(among)} tasks"
    return f"a task of {suite} must be {listed}, got {task!r}; the closest is {closest!r}."
