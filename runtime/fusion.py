"""A quantized block on a GPU: norms, SiLU and residual sums inside the kernels of its linears.

`forward` gives what the lines of `model.Block.forward` give, but that a norm may add up in another order. Those lines
start a kernel for each norm, for SiLU and for each sum. Here the kernel that makes a linear's codes takes the norm or
SiLU first, and the one that ends its product adds the block's input.
"""

import torch

from runtime import checks, products
from runtime.cuda import Before
from runtime.layers import QuantLinear


def serves(block, x) -> bool:
    """Whether `forward` serves a `model.Block` and x (B, L, D): on a GPU, all linears quantized, no hooks on its
    parts, and no autocast, which changes the type of activations on their way."""
    linears = block.qkv, block.out, block.gate_up, block.down
    return (all(isinstance(linear, QuantLinear) and products.serves(linear, x) for linear in linears)
            and checks.glues(x, block.attn_norm.weight, block.ffn_norm.weight)
            and not (torch.is_autocast_enabled("cuda") or torch.is_autocast_enabled("cpu"))
            and not any(part._forward_hooks or part._forward_pre_hooks for part in block.children()))


def first(block) -> dict:
    """What the inputs of linears pass before these, by name."""
    return {"qkv": Before(block.attn_norm.weight, block.attn_norm.eps),
            "gate_up": Before(block.ffn_norm.weight, block.ffn_norm.eps), "down": Before()}


def forward(block, x, state, rope, mask=None):
    """x (B, L, D), state (B, L) bool -> (B, L, D)."""
    before = first(block)
    # what has no name here is freed as soon as it is used
    z = block.tac(block.attention(products.linear(block.qkv, x, state, before["qkv"]), rope, mask))
    x = products.linear(block.out, z, state, residual=x)
    return products.linear(block.down, products.linear(block.gate_up, x, state, before["gate_up"]), state,
                           before["down"], x)
