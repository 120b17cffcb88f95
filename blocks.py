"""Calibration, block by block: a 16-bit model and text in, quantized blocks out (`calibrate.py` is the command).

One block at a time (Sections 3.2-3.3, Appendices B and C):

    embed masked copies of the calibration segments
    for each block:   read it                                                      disk -> one block in memory
                      collect its inputs: 16-bit stream X_fp, quantized-prefix stream X_q
                      for each input group (qkv, out, gate_up, down):
                          fit SGAT on (X_q, Y = X_fp Wᵀ), fold P into the weight, quantize
                          after qkv: estimate TAC from softmax·V of both streams
                      write it, move both streams through it, free it

so a model never has to fit in memory.
"""

import copy
import os
import tempfile
import time
from math import prod
from pathlib import Path

import torch
from torch import nn

import baselines
import data
import metrics
from checkpoint import CheckpointError
from hadamard import exists, rotation
from layers import TAC, QuantLinear
from methods import METHODS, SETTINGS_OF, QuantConfig
from model import FUSED, DiffusionLM, quantize_outer
from softmax_value import QuantAttention, ia_aq, softmax_scores
from starquant import fold_weight, linear, tac_fit, tac_ridge
from states import rollout

# ---- one block -------------------------------------------------------------------------------------------------------


def activations(shape, like, spill: Path | None):
    """Room for activations of like's dtype: on its device, or in a file of the folder `spill`.

    The file has no name once it is mapped, so that it goes with its tensor, however the program ends; it is allocated
    whole, so that a full disk is an OSError here and not a crash later.
    """
    if spill is None:
        return torch.empty(shape, dtype=like.dtype, device=like.device)
    with tempfile.NamedTemporaryFile(dir=spill) as file:
        size = prod(shape) * like.element_size()
        if hasattr(os, "posix_fallocate") and size:
            os.posix_fallocate(file.fileno(), 0, size)
        return torch.from_file(file.name, shared=True, size=prod(shape), dtype=like.dtype).view(shape)


@torch.no_grad()
def run_block(block, x, state, table, rows: int = 64, watch: tuple[str, ...] = (), spill: Path | None = None):
    """Output of a block and the inputs of its submodules named in `watch`, in chunks of `rows` segments."""
    seen = {}

    def keep(name, part):
        if name not in seen:
            seen[name] = activations((len(x), *part.shape[1:]), part, spill)
        seen[name][now] = part

    hooks = [getattr(block, name).register_forward_pre_hook(lambda _, args, name=name: keep(name, args[0]))
             for name in watch]
    try:
        for now in metrics.batches(len(x), rows):
            keep("output", block(x[now].to(state.device), state[now], table))
    finally:
        for hook in hooks:
            hook.remove()
    return seen.pop("output"), seen


class Unquantized(nn.Module):
    """A fitted linear with its quantizers off and its transform on (App. C's full-precision pass)."""

    def __init__(self, fitted: QuantLinear, weight, bias):
        super().__init__()
        self.fitted, self.bias = fitted, bias
        self.folded = fold_weight(weight.float(), fitted.P)

    def forward(self, x, state):
        y = linear(self.fitted.transformed(x, state), self.folded)
        return self.fitted.shifted(y if self.bias is None else y + self.bias, state).to(x.dtype)


def with_linears(block, **linears):
    """The block with some submodules replaced; everything else is shared, nothing is copied."""
    out = copy.copy(block)
    out._modules = {**block._modules, **linears}
    return out


def estimate_tac(block, quantized, x_fp, x_q, state, table, config: QuantConfig) -> TAC:
    """TAC of one block from at most `tac_samples` segments: Z^FP through the transform alone, Ẑ quantized."""
    n = min(config.tac_samples, len(x_fp))
    exact = with_linears(block, qkv=Unquantized(quantized.qkv, block.qkv.weight, block.qkv.bias))
    _, z_fp = run_block(exact, x_fp[:n], state[:n], table, watch=("tac",))
    _, z_q = run_block(quantized, x_q[:n], state[:n], table, watch=("tac",))
    z_fp, z_q = z_fp["tac"].flatten(0, 1), z_q["tac"].flatten(0, 1)
    if config.tac == "ridge":
        return TAC(*tac_ridge(z_fp, z_q, config.tac_block, config.damping))
    return TAC(*tac_fit(z_fp, z_q, config.tac_block, config.damping, config.smoothing, config.shrinkage))


@torch.no_grad()
def fit_attention(quantized, x_q, state, table, config: QuantConfig, generator) -> QuantAttention:
    """Quantizers of K, V and the softmax output; V's scale by IA-AQ for DLLMQuant, per token otherwise."""
    bits, h = (config.kv_bits, config.softmax_bits), quantized.config.head_dim
    rotated = config.method in baselines.ROTATED and exists(h)
    attention = QuantAttention(bits, rotation(h, generator).dense().float().to(state.device) if rotated else None)
    if config.method not in baselines.DLLMQUANT or config.kv_bits == 16:
        return attention
    n = min(config.tac_samples, len(x_q))
    qkv = torch.cat([quantized.qkv(quantized.attn_norm(x_q[r].to(state.device)), state[r])
                     for r in metrics.batches(n, 64)])
    q, k, v = attention.rotated(*quantized.heads(qkv, table))
    return QuantAttention(bits, attention.rotation, *ia_aq(softmax_scores(q, k), v, config.kv_bits))


def quantize_block(block, x_fp, x_q, state, table, config: QuantConfig, index: int, progress=lambda loss: None,
                   confidence=None, spill: Path | None = None):
    """Block `index` quantized, and a record of what was fitted. x_fp, x_q (S, L, D) are its inputs in both streams.

    progress is called with the loss after every epoch of a training, and with its relative error after every linear.
    spill: folder for the inputs of the linears, which stay in memory without it.
    """
    start = time.time()
    targets = run_block(block, x_fp, state, table, watch=FUSED, spill=spill)[1]
    quantized, record = block, {"block": index, "linears": {}}
    gains = {"qkv": block.attn_norm.weight.detach(), "gate_up": block.ffn_norm.weight.detach()}
    for group, name in enumerate(FUSED):
        original = getattr(block, name)
        x = run_block(quantized, x_q, state, table, watch=(name,), spill=spill)[1][name].to(state.device).float()
        weight = original.weight.detach().float()
        check_finite(x, f"block {index}: the input of {name}")
        y = linear(targets.pop(name).to(state.device).float(), weight)
        y = y if original.bias is None else y + original.bias.float()
        check_finite(y, f"block {index}: the 16-bit output of {name}")
        generator = torch.Generator().manual_seed((config.seed * 1009 + index) * 16 + group)
        inputs = baselines.Inputs(x, y, state, confidence, gains.get(name))
        try:
            fitted, losses = METHODS[config.method](weight, original.bias, inputs, config, generator, progress)
        except torch.linalg.LinAlgError:
            raise CheckpointError(f"block {index}: {config.method} has no finite solution for {name}: inputs reach "
                                  f"{float(x.abs().max()):.3g}, weights {float(weight.abs().max()):.3g}.") from None
        quantized = with_linears(quantized, **{name: fitted})
        y_hat = fitted(x[:16], state[:16])
        check_finite(y_hat, f"block {index}: the quantized output of {name}")
        error = (y_hat - y[:16]).double().square().sum() / y[:16].double().square().sum().clamp_min(1e-300)
        record["linears"][name] = {"error": float(error), **losses}
        progress(float(error))
        if name == "qkv" and min(config.kv_bits, config.softmax_bits) < 16:
            attention = fit_attention(quantized, x_q, state, table, config, generator)
            quantized = with_linears(quantized, softmax_value=attention)
        if name == "qkv" and config.compensated:
            quantized = with_linears(quantized, tac=estimate_tac(block, quantized, x_fp, x_q, state, table, config))
    record["seconds"] = round(time.time() - start, 2)
    return quantized, record


def progress_steps(config: QuantConfig) -> int:
    """How often `quantize_block` calls progress for one block; less often where a training diverges."""
    trained = config.method in SETTINGS_OF["epochs"] and (config.method, config.transform) != ("starquant", "none")
    return len(FUSED) * (1 + config.epochs * trained)


def check_finite(x, what: str) -> None:
    bad = int((~torch.isfinite(x)).sum())
    if bad:
        raise CheckpointError(f"{what} holds {bad} NaN or Inf of {x.numel()} values.")


# ---- the whole model -------------------------------------------------------------------------------------------------


@torch.no_grad()
def prediction_confidence(outer: DiffusionLM, blocks, noisy, spill: Path | None = None):
    """Largest probability of the 16-bit model's prediction at each position, (S, L): one pass, block by block."""
    x, state, table, _ = outer.prepare(noisy)
    for block in blocks:
        x, _ = run_block(block, x, state, table, spill=spill)
    best = torch.cat([torch.softmax(outer.logits(outer.norm(x[r].to(state.device))).float(), -1).amax(-1)
                      for r in metrics.batches(len(x), 8)])
    return torch.cat((best[:, :1], best[:, :-1]), 1) if outer.config.logit_shift else best


def calibrate_blocks(outer: DiffusionLM, blocks, noisy, config: QuantConfig, finished=lambda i: None, progress=None,
                     share=(0, 1), spill: Path | None = None):
    """Yield (index, quantized block, record) for each block; `finished(i)` gives a block of an earlier run, or None.

    noisy (S, L) are the calibration segments with [MASK] in place; blocks() iterates over the 16-bit blocks in order.
    With inputs "fp" a block depends on the 16-bit stream alone; share (rank, world) yields every world-th block.
    spill: a folder; both streams and the inputs of the linears are kept in files there instead of in memory.
    """
    confidence = prediction_confidence(outer, blocks(), noisy, spill) if config.method in baselines.DLLMQUANT else None
    x, state, table, _ = outer.prepare(noisy)
    x_q = x_fp = activations(x.shape, x, spill).copy_(x.detach())
    del x
    del outer  # an 8B model's embedding and head take as much as ten blocks
    for i, block in enumerate(blocks()):
        if i % share[1] == share[0]:
            old = finished(i)
            if old is None:
                quantized, record = quantize_block(block, x_fp, x_q, state, table, config, i,
                                                   progress or (lambda _: None), confidence, spill)
            else:
                quantized, record = old
            yield i, quantized, record
        x_fp, _ = run_block(block, x_fp, state, table, spill=spill)
        x_q = x_fp if config.inputs == "fp" else run_block(quantized, x_q, state, table, spill=spill)[0]


def masking_ratios(n: int, config: QuantConfig, generator):
    """t of each segment, stratified over (0, 1] so that the whole trajectory is there; or TMAS."""
    return (baselines.tmas_ratios if config.method in baselines.DLLMQUANT else data.stratified_ratios)(n, generator)


def masked_copies(tokens, region, mask_id: int, config: QuantConfig):
    """Calibration segments with a share t of `region` masked: the forward process."""
    g = torch.Generator().manual_seed(config.seed)
    region = torch.ones_like(tokens, dtype=torch.bool) if region is None else region
    return data.mask_tokens(tokens, region, masking_ratios(len(tokens), config, g), mask_id, g)


def token_states(model, tokens, region, mask_id: int, config: QuantConfig):
    """Masked copies, or states of the model's own trajectory, for which model() gives the 16-bit model."""
    if config.states == "masked":
        return masked_copies(tokens, region, mask_id, config)
    return rollout(model(), tokens, masking_ratios(len(tokens), config, torch.Generator().manual_seed(config.seed)))


def quantize_model(model: DiffusionLM, tokens, config: QuantConfig, region=None) -> DiffusionLM:
    """The quantized counterpart of a 16-bit model in memory: the same result as the command.

    tokens (S, L) clean calibration segments; region (S, L) bool says where [MASK] may stand, everywhere by default.
    """
    noisy = token_states(lambda: model, tokens, region, model.mask_id, config).to(model.device)
    quantized = copy.copy(model)
    quantized._modules = dict(model._modules)
    if config.head_bits < 16:
        quantize_outer(quantized, config.head_bits, config.embed_bits or None)
    quantized.blocks = nn.ModuleList(b for _, b, _ in calibrate_blocks(model, lambda: model.blocks, noisy, config))
    return quantized.eval()
