"""ATen operators by what quantization and folding can do with them."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

CONVOLUTIONS = {
    "aten::conv1d",
    "aten::conv2d",
    "aten::conv3d",
    "aten::convolution",
    "aten::conv_transpose1d",
    "aten::conv_transpose2d",
    "aten::conv_transpose3d",
}
#: Operator → positions of the two factors.
PRODUCTS = {
    "aten::linear": (0, 1),
    "aten::mm": (0, 1),
    "aten::bmm": (0, 1),
    "aten::matmul": (0, 1),
    "aten::addmm": (1, 2),
    "aten::baddbmm": (1, 2),
}
RECURRENT = {"aten::lstm", "aten::gru", "aten::rnn_tanh", "aten::rnn_relu"}
#: Activations that runtimes fuse into the layer before them together with the quantizer behind.
FUSED = {
    "aten::relu",
    "aten::relu_",
    "aten::relu6",
    "aten::hardtanh",
    "aten::hardtanh_",
    "aten::clamp",
    "aten::clamp_min",
}
POOLS = {
    "aten::mean",
    "aten::avg_pool1d",
    "aten::avg_pool2d",
    "aten::avg_pool3d",
    "aten::adaptive_avg_pool1d",
    "aten::adaptive_avg_pool2d",
    "aten::adaptive_avg_pool3d",
}
ADDITIONS = {"aten::add", "aten::add_"}
CONCATENATIONS = {"aten::cat", "aten::concat", "aten::concatenate"}
VIEWS = {
    "aten::alias",
    "aten::chunk",
    "aten::clone",
    "aten::constant_pad_nd",
    "aten::contiguous",
    "aten::dropout",
    "aten::expand",
    "aten::feature_dropout",
    "aten::flatten",
    "aten::flip",
    "aten::max_pool1d",
    "aten::max_pool2d",
    "aten::max_pool3d",
    "aten::narrow",
    "aten::pad",
    "aten::permute",
    "aten::pixel_shuffle",
    "aten::pixel_unshuffle",
    "aten::reshape",
    "aten::select",
    "aten::slice",
    "aten::split",
    "aten::split_with_sizes",
    "aten::squeeze",
    "aten::swapaxes",
    "aten::t",
    "aten::transpose",
    "aten::unflatten",
    "aten::unsqueeze",
    "aten::upsample_nearest1d",
    "aten::upsample_nearest2d",
    "aten::upsample_nearest3d",
    "aten::view",
}


def operator_name(node: fx.Node) -> str:
    """`aten::conv2d`, or "" for what is no ATen call, or reads the bits of numbers as other numbers."""
    if not isinstance(node.target, torch._ops.OpOverload) or node.target is torch.ops.aten.view.dtype:
        return ""
    return node.target._schema.name


def quantizes(node: fx.Node) -> bool:
    """Whether this node is (one half of) a quantizer already."""
    return operator_name(node).startswith("quantized_decomposed::")


def argument(node: fx.Node, position: int, name: str, default: Any) -> Any:
    """An operator's argument, by position or keyword."""
    if name in node.kwargs:
        return node.kwargs[name]
    return node.args[position] if len(node.args) > position else default


def convolution_form(node: fx.Node) -> tuple[bool, int]:
    """(whether a convolution is transposed, its number of groups)"""
    name = operator_name(node)
    if name == "aten::convolution":
        return bool(argument(node, 6, "transposed", False)), int(argument(node, 8, "groups", 1))
    return "transpose" in name, int(argument(node, 6, "groups", 1))
