"""The models that the benchmark compares: 16-bit, its quantized twin in both residencies, and other people's ways.

Twins share every tensor that they do not replace, so that comparing does not need twice the memory.
"""

import copy

import torch
from torch import nn

from families import ConfigError, read_config
from model import FUSED, DiffusionLM, Linear, RMSNorm, quantize_outer
from sgat import initial_basis
from starquant import TAC, QuantLinear, tac_block_size

# shapes of the published configurations, for --random-weights
_LLADA = {"rope": True, "layer_norm_type": "rms", "activation_type": "silu", "block_type": "llama",
          "rope_full_precision": True, "model_type": "llada", "d_model": 4096, "n_layers": 32, "n_heads": 32,
          "n_kv_heads": 32,
          "mlp_hidden_size": 12288, "vocab_size": 126464, "embedding_size": 126464, "mask_token_id": 126336,
          "eos_token_id": 126081, "rope_theta": 500000.0, "rms_norm_eps": 1e-5, "weight_tying": False}
_DREAM = {"model_type": "Dream", "hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28,
          "num_key_value_heads": 4, "intermediate_size": 18944, "vocab_size": 152064, "mask_token_id": 151666,
          "eos_token_id": 151643, "rope_theta": 1e6, "rms_norm_eps": 1e-6}
SHAPES = {"llada-8b": _LLADA, "llada-8b-instruct": _LLADA, "llada-1.5": _LLADA, "dream-7b": _DREAM,
          "dream-7b-instruct": _DREAM}


def random_model(name: str, device, dtype, seed: int) -> DiffusionLM:
    """A 16-bit model of published shape with normal weights of standard deviation 0.02."""
    if name not in SHAPES:
        raise ConfigError(f"--random-weights knows the shapes of {', '.join(SHAPES)}, not of {name!r}.")
    with torch.device("meta"):
        model = DiffusionLM(read_config(SHAPES[name])).to(dtype)
    model.to_empty(device=device).requires_grad_(False)
    generator = torch.Generator(device).manual_seed(seed)
    for module in model.modules():
        if isinstance(module, Linear | nn.Embedding):
            module.weight.normal_(std=0.02, generator=generator)
        if isinstance(module, RMSNorm):
            module.weight.fill_(1)
        if getattr(module, "bias", None) is not None:
            module.bias.zero_()
    return model.eval()


@torch.no_grad()
def quantized_twin(model: DiffusionLM, seed: int = 0, head_bits: int = 8, embed_bits: int | None = None) -> DiffusionLM:
    """The same model at W4A4 as `starquant` deploys it: Kronecker transforms, d/32 gates, TAC, rounding to nearest.

    Transforms are random rotations and corrections close to the identity: fitting them changes accuracy, not speed.
    """
    c, generator = model.config, torch.Generator().manual_seed(seed)
    twin = copy.copy(model)
    twin._modules = dict(model._modules)  # what is not replaced is shared
    twin.blocks = nn.ModuleList()
    g = tac_block_size(c.n_heads * c.head_dim)
    for block in model.blocks:
        new = copy.copy(block)
        new._modules = dict(block._modules)
        for fused in FUSED:
            linear = getattr(block, fused)
            d = linear.weight.shape[1]
            P = initial_basis(d, "kronecker", generator)
            P = type(P)(*(p.to(linear.weight.device, torch.float32) for p in P))
            setattr(new, fused, QuantLinear.fold(linear.weight, [P], d // 32, d // 32, bias=linear.bias))
        blocks = c.n_heads * c.head_dim // g
        M = torch.eye(g) + 0.01 * torch.randn(blocks, g, g, generator=generator)
        new.tac = TAC(M, torch.zeros(blocks, g)).to(model.device)
        twin.blocks.append(new)
    return quantize_outer(twin, head_bits, embed_bits) if head_bits < 16 else twin


def residents(model) -> int:
    """Bytes of a model's parameters and buffers, each storage once."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def unpacked(model) -> DiffusionLM:
    """The quantized model with its block weights resident as int8."""
    twin = copy.copy(model)
    twin._modules = dict(model._modules)
    twin.blocks = nn.ModuleList()
    for block in model.blocks:
        new = copy.copy(block)
        new._modules = {k: _unpacked(m) for k, m in block._modules.items()}
        twin.blocks.append(new)
    return twin


def _unpacked(module):
    if not isinstance(module, QuantLinear):
        return module
    module = copy.copy(module)
    module._buffers = dict(module._buffers)
    return module.unpack_weights()


def peers(model, log=print) -> dict:
    """torch.compile of the 16-bit model and torchao's int8 dynamic quantization, as far as they install and run.

    `log` is told what is left out, and why.
    """
    def compiled(twin):
        twin.hidden = torch.compile(twin.hidden)
        return twin

    def torchao():
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

        twin = copy.deepcopy(model)
        quantize_(twin.blocks, Int8DynamicActivationInt8WeightConfig())
        return compiled(twin)

    out = {}
    probe = torch.zeros(1, 32, dtype=torch.long, device=model.device)
    for name, build in {"16-bit compiled": lambda: compiled(copy.copy(model)), "torchao int8": torchao}.items():
        try:
            twin = build()
            with torch.no_grad():
                twin.hidden(probe)
            out[name] = twin
        except Exception as error:  # a peer may fail in any way; it is left out, and said
            log(f"{name} is left out: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
    return out
