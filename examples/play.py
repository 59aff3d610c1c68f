"""Play the policy of a run: a table of returns, one row per subnetwork, and a video of its first episode.

    python examples/play.py runs/Hopper-v4/omnet/seed0/...                          # 5 episodes of each subnetwork
    python examples/play.py runs/Hopper-v4/omnet/seed0/... --subnet 3 --stochastic  # of one, its actions drawn as in training
    python examples/play.py runs/Hopper-v4/omnet/seed0/... --video hopper.gif       # or .mp4: pip install "imageio[ffmpeg]"
    python examples/play.py runs/Hopper-v4/omnet/seed0/... --frames hopper          # PNG files
    python examples/play.py runs/MinAtar/breakout/omnet_dqn/seed0/... --video breakout.gif
    python examples/play.py runs/HalfCheetah/forward+backward/... --task backward   # of several tasks, one alone

Every subnetwork starts from the same states, those of the seeds ``--seed``, ``--seed`` + 1, ... Observations are off by as much
as the run's were (``observation_offset``), something else in each episode. A subnetwork that is a task's plays its task.
"""

import argparse
import gc
import importlib.util
import math
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

# Libraries import MuJoCo, which fails where MUJOCO_GL can't draw, and only drawing needs it: see make.
os.environ["USER_MUJOCO_GL"] = os.environ.get("MUJOCO_GL", "")
os.environ["MUJOCO_GL"] = "disable"

import gymnasium
import imageio.v2 as imageio
import numpy as np
import torch
from PIL import Image, ImageDraw
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.envs import EnvBase, GymWrapper
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import ProbabilisticActor

from omnet_torchrl.envs import task_names
from omnet_torchrl.training import load_policy
from omnet_torchrl.training.loop.blame import failure
from omnet_torchrl.training.loop.border import Border
from omnet_torchrl.training.loop.environments import MAZE, env_options, make_env, make_gymnasium
from omnet_torchrl.training.loop.rollout import rollout
from omnet_torchrl.training.loop.tasks import task_labels
from omnet_torchrl.training.options import load_config
from omnet_torchrl.training.options.contradictions import MINATAR
from omnet_torchrl.training.record.folder import RunFolder

MAX_SUBNETS = 32  # masks that are redrawn at each call stand for 2^31
MAX_FPS = 30  # of a video; an environment of 125 steps a second shows every fifth
# The modules that fail where OpenGL does.
OPENGL = re.compile(r"OpenGL|glfw|mujoco\.|dm_control\._render|gymnasium\.envs\.mujoco\.mujoco_rendering")
GAME_FPS = 10  # of MinAtar, whose package draws so many


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(arguments)
    torch.set_num_threads(1)  # one observation at a time
    run = RunFolder.open(args.run)
    config = load_config(run.config_path)
    name, scale, tasks = config.env, config.observation_offset, task_labels(config.env)
    actor, chosen = load_policy(args.run), chosen_subnet(args, tasks)
    every = range(min(actor.num_subnets, MAX_SUBNETS))
    policies = {k: actor.extract(k) for k in (every if chosen is None else [chosen])}
    names = [task_names(name)[k] for k in policies] if tasks else [name]
    envs = [make(each, draw=bool(args.video or args.frames), **env_options(config)) for each in names]

    kind = "stochastic" if args.stochastic else "deterministic"
    off = f", observations off by up to {scale:g}" if scale else ""
    say(f"{name}, {kind} episodes of {run.path} ({run.info['status']}){off}")
    width = max(8, *(2 + len(task) for task in tasks)) if tasks else 8
    say(f"{'task' if tasks else 'subnet':>{width}}{'episodes':>10}{'return':>21}{'length':>10}")
    everything: list[tuple[float, int]] = []
    with film(args, envs[0][2]) as show:
        for number, (k, policy) in enumerate(policies.items()):
            torch.manual_seed(args.seed)
            episodes, (player, draw, _) = [], envs[number % len(envs)]
            for i in range(args.episodes):
                watch = partial(show, tasks[k] if tasks else f"subnet {k}", draw) if i == 0 else lambda: None
                episodes.append(play(policy, player, args.seed + i, args.stochastic, watch, scale))
            say(row(tasks[k] if tasks else k, episodes, width))
            everything += episodes
    if len(policies) > 1:
        say(row("total", everything, width))
    if args.video or args.frames:
        say(f"first episode of each: {args.video or args.frames}")
    for player, *_ in envs:
        player.close()
    del player, draw, envs
    gc.collect()  # which alone frees it; a renderer that is freed later takes the context of the next one away


@torch.no_grad()
def play(
    policy: ProbabilisticActor,
    env: EnvBase,
    seed: int,
    stochastic: bool,
    watch: Callable[[], object],
    scale: float,
) -> tuple[float, int]:
    """Return and length of an episode; ``watch`` is called in each state, observations are off by up to ``scale``."""
    start = env.reset(seed=seed)
    offset = torch.from_numpy(np.random.default_rng(seed).uniform(-scale, scale, start["observation"].shape))

    def act(state: TensorDictBase) -> Tensor:
        watch()
        return policy(TensorDict(observation=(state["observation"] + offset).float() if scale else state["observation"]))[
            "action"
        ]

    total, length = 0.0, 0
    with set_exploration_type(ExplorationType.RANDOM if stochastic else ExplorationType.DETERMINISTIC):
        for step, _ in rollout(env, act, start):
            total, length = total + step["next", "reward"].item(), length + 1
            if step["next", "done"]:
                watch()
    return total, length


def chosen_subnet(args: argparse.Namespace, tasks: Sequence[str]) -> int | None:
    """The one that is to play; ``None``: all."""
    if args.task is None:
        return args.subnet
    if args.task not in tasks:
        known = f"one of {', '.join(tasks)}" if tasks else "left out: the run has one task"
        raise ValueError(f"--task must be {known}, got {args.task}.")
    return tasks.index(args.task)


def row(name: object, episodes: Sequence[tuple[float, int]], width: int) -> str:
    returns, lengths = zip(*episodes, strict=True)
    with np.errstate(invalid="ignore"):  # of returns that are not finite
        return f"{name:>{width}}{len(episodes):>10}{np.mean(returns):>11.1f} ± {np.std(returns):<7.1f}{np.mean(lengths):>10.1f}"


def make(name: str, draw: bool, **options: object) -> tuple[EnvBase, Callable[[], np.ndarray], int]:
    """The environment, what draws it, and its steps a second.

    With ``draw``, it has drawn a frame: where that fails, it is before anything is played.
    """
    if name == MAZE:
        raise ValueError(f"{name} is no environment of gymnasium: its subnetworks' ways are in the run's trajectories.csv.")
    if name.startswith(MINATAR):
        games = make_env(name, sum_episodes=False, **options)
        return games, lambda: games.base_env.render(32).numpy(), GAME_FPS
    backend = os.environ["USER_MUJOCO_GL"]
    if not backend and sys.platform == "linux" and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        backend = "egl"  # without a screen
    if draw and backend:
        os.environ["MUJOCO_GL"] = backend
    elif draw:
        del os.environ["MUJOCO_GL"]
    what, advice = "made", ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old versions of environments, and what leads to the errors below
            env = make_gymnasium(name, render_mode="rgb_array" if draw else None, **options)
            if draw:
                what, advice = "drawn", ": --video and --frames need a render() that returns an image"
                env.reset(seed=0)
                if env.render() is None:
                    raise ValueError('with render_mode="rgb_array", it returned nothing')
    except Exception as error:
        raised_in = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
        if isinstance(error, gymnasium.error.Error) or not any(map(OPENGL.match, raised_in)):
            raise ValueError(f"{failure(name, what, error)}{advice}.") from error
        sys.unraisablehook = lambda _: None  # each library of OpenGL fails in its own way, and once more when it is deleted
        cause = traceback.format_exception_only(error)[-1].strip()
        raise ValueError(
            f"{name} can't be drawn with MUJOCO_GL={backend} ({cause}). MuJoCo needs OpenGL; without a "
            "screen, set MUJOCO_GL=egl (a GPU's driver, or: apt install libegl1 libgl1-mesa-dri) or MUJOCO_GL=osmesa (slower; "
            "apt install libosmesa6)."
        ) from error
    return GymWrapper(Border(env)), env.render, env.metadata.get("render_fps") or MAX_FPS


@contextmanager
def film(args: argparse.Namespace, fps: int) -> Iterator[Callable[[str, Callable[[], np.ndarray]], None]]:
    """A function to be called in each state, which draws it, with a text, into the video or the folder of frames."""
    every = math.ceil(fps / MAX_FPS)
    states: dict[str, int] = {}  # seen, of each text
    images: list[Image.Image] = []
    writer = None

    def show(text: str, draw: Callable[[], np.ndarray]) -> None:
        number = states[text] = states.get(text, -1) + 1
        if number % every:
            return
        image = Image.fromarray(draw())
        if args.frames:
            image.save(args.frames / f"{text.replace(' ', '_')}_{number:05d}.png")
            return
        ImageDraw.Draw(image).text((10, 10), text, font_size=20, stroke_width=1, stroke_fill="black")
        if writer:
            writer.append_data(np.asarray(image))
        else:  # a GIF is kept in memory to its end, and is large enough at this size
            image.thumbnail((320, 320))
            images.append(image.quantize())

    if args.frames:
        args.frames.mkdir(parents=True, exist_ok=True)
        yield show
    elif args.video:
        args.video.parent.mkdir(parents=True, exist_ok=True)
        if args.video.suffix == ".mp4":
            with imageio.get_writer(args.video, format="FFMPEG", fps=fps / every) as writer:
                yield show
        else:
            yield show
            images[0].save(args.video, save_all=True, append_images=images[1:], duration=1000 * every / fps, loop=0)
    else:
        yield lambda text, draw: None


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="folder of the run")
    alone = parser.add_mutually_exclusive_group()
    alone.add_argument("--subnet", type=int, help="play this subnetwork alone")
    alone.add_argument("--task", help="of several tasks, play this one alone")
    parser.add_argument("--episodes", type=int, default=5, help="of each subnetwork (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the start states and the actions (default: %(default)s)")
    parser.add_argument("--stochastic", action="store_true", help="draw the actions, as in training")
    pictures = parser.add_mutually_exclusive_group()
    pictures.add_argument("--video", type=Path, help="file to write, .mp4 or .gif")
    pictures.add_argument("--frames", type=Path, help="folder to write PNG files to")
    args = parser.parse_args(arguments)
    if args.episodes < 1 or not 0 <= args.seed < 2**32:
        raise ValueError(f"--episodes must be at least 1 and --seed in [0, 2^32), got {args.episodes} and {args.seed}.")
    if args.video and args.video.suffix not in (".mp4", ".gif"):
        raise ValueError(f"--video must be an .mp4 or a .gif, got {args.video}.")
    if args.video and args.video.suffix == ".mp4" and importlib.util.find_spec("imageio_ffmpeg") is None:
        raise ValueError('an .mp4 needs ffmpeg: pip install "imageio[ffmpeg]"; or write a .gif.')
    return args


def say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    try:
        main()
    except BrokenPipeError:  # whoever read the table has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
