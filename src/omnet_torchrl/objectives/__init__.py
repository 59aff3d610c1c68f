"""Losses over subnetworks; :mod:`~omnet_torchrl.objectives.subnet_loss` is what they share."""

from omnet_torchrl.objectives.dqn import OMNetDQNLoss
from omnet_torchrl.objectives.sac import OMNetSACLoss
from omnet_torchrl.objectives.subnet_loss import LossStep, SubnetLoss
from omnet_torchrl.objectives.td3 import OMNetTD3Loss

__all__ = ["LossStep", "OMNetDQNLoss", "OMNetSACLoss", "OMNetTD3Loss", "SubnetLoss"]
