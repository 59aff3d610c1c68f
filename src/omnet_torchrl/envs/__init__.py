"""Environments of our own."""

from omnet_torchrl.envs.maze import ENCLOSURE, GOAL, GOAL_RADIUS, START, Maze2DEnv, Walls
from omnet_torchrl.envs.minatar import MinAtarEnv
from omnet_torchrl.envs.suites import make_half_cheetah, make_meta_world, make_task, task_names
from omnet_torchrl.envs.tasks import TasksEnv
