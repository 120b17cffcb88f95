"""Models of published shape without their weights, which the benchmark compares.

They are the 16-bit model, its quantized twin in both residencies, and the ways of other projects. Twins share every
tensor that they do not replace, so that a comparison does not need twice the memory. `checkpoint/published.py` writes
checkpoints of such shapes.
"""

import copy

import torch
from torch import nn

from checkpoint.families import FUSED, read_config
from checkpoint.published import published
from methods.hadamard import spread
from methods.rtn import quantize_outer
from methods.sgat import initial_basis
from model import DiffusionLM
from runtime import checks
from runtime.layers import TAC, Centre, Grid, QuantLinear, Weight, rebuilt
from starquant import Across, Blocks, Dense, tac_block_size


def random_model(name: str, device, dtype, seed: int, blocks: int | None = None) -> DiffusionLM:
    """A 16-bit model of published shape with normal weights of standard deviation 0.02."""
    with torch.device("meta"):
        model = DiffusionLM(read_config(published(name, blocks))).to(dtype)
    model.to_empty(device=device).requires_grad_(False)
    generator = torch.Generator(device).manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            parameter.normal_(std=0.02, generator=generator)
        else:
            parameter.fill_(0 if name.endswith("bias") else 1)  # 1: the gain of a norm
    return model.eval()


@torch.no_grad()
def quantized_twin(model: DiffusionLM, seed: int = 0, head_bits: int = 8, embed_bits: int | None = None) -> DiffusionLM:
    """The same model at W4A4 as `starquant` deploys it: Kronecker transforms, d/32 gates, TAC, rounding to nearest.

    Transforms are random rotations and corrections close to the identity: fitting them changes accuracy, not speed.
    """
    c, generator, blocks = model.config, torch.Generator().manual_seed(seed), nn.ModuleList()
    g = tac_block_size(c.n_heads * c.head_dim)
    B = c.n_heads * c.head_dim // g
    for block in model.blocks:
        new = {}
        for fused in FUSED:
            linear = getattr(block, fused)
            d = linear.weight.shape[1]
            P = initial_basis(d, "kronecker", generator).to(linear.weight.new_empty(0, dtype=torch.float32))
            new[fused] = QuantLinear.fold(linear.weight, [P], d // 32, d // 32, bias=linear.bias)
        M = torch.eye(g) + 0.01 * torch.randn(B, g, g, generator=generator)
        blocks.append(rebuilt(block, **new, tac=TAC(M, torch.zeros(B, g)).to(model.device)))
    twin = rebuilt(model, blocks=blocks)
    return quantize_outer(twin, head_bits, embed_bits) if head_bits < 16 else twin


@torch.no_grad()
def plus_twin(twin: DiffusionLM, seed: int = 0) -> DiffusionLM:
    """The integers of a `quantized_twin` as `starquant+` deploys them: centring, blocks of 64 and a rotation across
    them, clipping, feedback; no gates, no TAC. The packed weights are shared."""
    generator, blocks = torch.Generator().manual_seed(seed), nn.ModuleList()
    for block in twin.blocks:
        linears = {fused: _plus(getattr(block, fused), generator) for fused in FUSED}
        blocks.append(rebuilt(block, **linears, tac=nn.Identity()))
    return rebuilt(twin, blocks=blocks)


def _plus(linear: QuantLinear, generator) -> QuantLinear:
    (C, d), b = (len(linear.weight_scale), linear.in_features), tac_block_size(linear.in_features, 64)
    device = linear.weight_packed.device
    blocks = torch.linalg.qr(torch.randn(d // b, b, b, generator=generator))[0]
    P = [Blocks(blocks), Across(spread(d // b, generator))] if b < d else [Dense(blocks[0])]
    P = [factor.to(torch.zeros((), device=device, dtype=torch.bfloat16)) for factor in P]
    V = (0.1 * torch.randn(d // b, b, b, generator=generator)).triu(1)
    means, shifts = torch.randn(2, d, generator=generator), torch.randn(2, C, generator=generator)
    new = QuantLinear(weight=Weight(linear.codes(), linear.weight_scale), bias=linear.bias, P=P,
                      grid=Grid(clip=torch.full((2,), 0.9, device=device), feedback=V.to(device)),
                      centre=Centre(means.to(device), shifts.to(device)))
    new.weight_packed, new.packed = linear.weight_packed, linear.packed
    return new


def residents(model) -> int:
    """Bytes of a model's parameters and buffers. A storage that several share counts once, and a tensor that wraps
    others, as torchao's do, counts as what it wraps."""
    tensors, sizes = [*model.parameters(), *model.buffers()], {}
    while tensors:
        t = tensors.pop()
        if hasattr(t, "__tensor_flatten__"):
            tensors += [getattr(t, name) for name in t.__tensor_flatten__()[0]]
        else:
            sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
    return sum(sizes.values())


def unpacked(model) -> DiffusionLM:
    """The quantized model with its block weights resident as int8."""
    def unpack(linear):
        linear = copy.copy(linear)
        linear._buffers = dict(linear._buffers)
        return linear.unpack_weights()

    blocks = [rebuilt(block, **{fused: unpack(getattr(block, fused)) for fused in FUSED}) for block in model.blocks]
    return rebuilt(model, blocks=nn.ModuleList(blocks))


def eager(model) -> DiffusionLM:
    """The 16-bit model with PyTorch's own operations for norms, rope and SiLU instead of one kernel each."""
    twin = copy.copy(model)
    twin.hidden = checks.eager_glue()(model.hidden)
    return twin
