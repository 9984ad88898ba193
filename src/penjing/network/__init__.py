"""Networks: capture, the flat graph, channel groups and the Edits."""

from penjing.network.capture import capture
from penjing.network.edits import (
    Call,
    Edit,
    MaskWeights,
    QuantizeTensor,
    RemoveChannels,
    ReplaceLayer,
    SetWeights,
)
from penjing.network.network import InputSpec, Network

__all__ = [
    "Call",
    "Edit",
    "InputSpec",
    "MaskWeights",
    "Network",
    "QuantizeTensor",
    "RemoveChannels",
    "ReplaceLayer",
    "SetWeights",
    "capture",
]
