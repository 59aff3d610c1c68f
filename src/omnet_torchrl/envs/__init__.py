"""Environments of our own."""

from omnet_torchrl.envs.maze import ENCLOSURE, GOAL, GOAL_RADIUS, START, Maze2DEnv, Walls
from omnet_torchrl.envs.minatar import MinAtarEnv
