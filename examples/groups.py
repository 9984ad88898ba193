"""What can be removed from a network: the channel groups, printed, and one of them shrunk by hand."""

import torch
from digits import build

import penjing as pj
from penjing.network.edits import RemoveChannels


def main() -> None:
    network = pj.capture(build(), inputs=(torch.rand(2, 1, 8, 8),), name="digits")
    print(network.groups())

    smaller = network.apply([RemoveChannels(parameter="0.weight", dim=0, indices=(0, 1, 2, 3))])
    for name in ("0.weight", "1.running_mean", "3.weight"):
        before, after = (tuple(n.tensors()[name].shape) for n in (network, smaller))
        print(f"{name}: {before} -> {after}")


if __name__ == "__main__":
    main()
