"""Layers: dense, masked, unit, ensemble; forward and backward; how they grow with width, N and batch."""

import pytest
import torch
from torch import nn
from torchrl.modules import MLP

from omnet_torchrl import EnsembleMLP, MaskedMLP, UnitMaskedMLP

NETWORKS = {"masked": MaskedMLP, "unit": UnitMaskedMLP, "ensemble": EnsembleMLP}
GROWTH = [(256, 5, 64), (256, 5, 1024), (256, 5, 4096), (256, 1, 256), (256, 2, 256), (256, 32, 256)]
SIZES = [(256, 5, 256), (512, 5, 256), (1024, 5, 256), (2048, 5, 256), *GROWTH]  # width, N, batch


def make(kind, width, subnets, rows, batch, device="cpu"):
    """A network as a function of nothing, forward; and with its backward pass."""
    common = {"num_cells": [width, width], "activation_class": nn.ReLU, "device": device}
    x = torch.randn(batch, 14, device=device)
    if kind == "dense":
        network, inputs = MLP(14, 1, **common), (x,)
    else:
        network = NETWORKS[kind](14, 1, num_subnets=subnets, **common)
        inputs = (
            x,
            torch.arange(rows, device=device)[:, None] if rows > 1 else torch.zeros(1, dtype=torch.int64, device=device),
        )

    def forward():
        with torch.no_grad():
            return network(*inputs)

    def backward():
        network.zero_grad()
        network(*inputs).square().mean().backward()

    return {"forward": forward, "backward": backward}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("way", ["forward", "backward"])
@pytest.mark.parametrize(("width", "subnets", "batch"), SIZES)
@pytest.mark.parametrize("kind", ["dense", *NETWORKS])
def test_one_subnetwork(benchmark, kind, width, subnets, batch, way):
    if kind == "dense" and subnets != 5:
        pytest.skip("a dense network has one")
    benchmark(make(kind, width, subnets, 1, batch)[way])


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("way", ["forward", "backward"])
@pytest.mark.parametrize("subnets", [2, 5, 32])
@pytest.mark.parametrize("kind", NETWORKS)
def test_all_subnetworks(benchmark, kind, subnets, way):
    benchmark(make(kind, 256, subnets, subnets, 256)[way])
