"""Losses over subnetworks; :mod:`~omnet_torchrl.objectives.subnet_loss` is what they share."""

from omnet_torchrl.objectives.sac import OMNetSACLoss
from omnet_torchrl.objectives.subnet_loss import LossStep, SubnetLoss

__all__ = ["LossStep", "OMNetSACLoss", "SubnetLoss"]
