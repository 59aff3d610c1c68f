"""Our worker: the library, the bare-torch reference, the matmul floor and TorchRL's losses."""

import argparse
import logging
import warnings
from importlib.metadata import version

import torch
from components import cases
from protocol import serve

if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.disable(logging.INFO)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    versions = {name: version(name) for name in ("torch", "torchrl", "tensordict", "gymnasium", "mujoco")}
    serve(cases(arguments.device), versions | {"threads": str(torch.get_num_threads())})
