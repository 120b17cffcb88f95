"""Outlier channels without changing the function: python calibrate.py --stress 8

Small models lack the outlier channels of 8B ones. `stress` makes them. It takes the input channels of every linear in
which masked and unmasked tokens differ most, and multiplies them by c where they are made: in the gain of the norm, the
rows of v_proj, the rows of up_proj. The weight that reads a channel is divided by c. So the 16-bit model computes the
same function up to rounding (exactly, where c is a power of two), but a quantizer meets channels c times larger.
"""

import copy
import os
import shutil
from functools import partial
from pathlib import Path

import torch

from checkpoint.families import FUSED
from checkpoint.folder import Checkpoint, read_json, resolve, sha256, write_json
from model import DiffusionLM, load_model
from runtime import sampling
from runtime.layers import rebuilt
from runtime.processes import Refused, writable
from tiny import tasks


def disparate_channels(x, state):
    """The d / 32 channels of x (..., d) whose root mean square differs most between masked and unmasked tokens."""
    # as many as SGAT gives a state
    rms_m, rms_u = (x[s].square().mean(0).sqrt() for s in (state, ~state))
    return (rms_m - rms_u).abs().topk(max(x.shape[-1] // 32, 1)).indices


@torch.no_grad()
def stress(model: DiffusionLM, c: float, noisy=None) -> DiffusionLM:
    """A copy of a 16-bit model with outlier channels of scale c; its blocks are new, the rest is shared.

    noisy (S, L): token ids with [MASK] in place to measure the states on; 64 calibration segments by default.
    """
    if not 0 < c < float("inf"):
        raise Refused(f"stress {c:g} is not a positive number.")
    if noisy is None:
        tokens, region = tasks.calibration_set(model.tokenizer, 64, 64, 0)
        g = torch.Generator().manual_seed(0)
        noisy = sampling.mask_tokens(tokens, region, sampling.stratified_ratios(len(tokens), g), model.mask_id, g)
    out, chosen = rebuilt(model, blocks=copy.deepcopy(model.blocks)), []

    def choose(block, name, _, args):
        x, state = args
        chosen.append((block, name, disparate_channels(channels(model.config, name, x.float()), state)))

    hooks = [getattr(block, name).register_forward_pre_hook(partial(choose, block, name))
             for block in out.blocks for name in FUSED]
    out.hidden(noisy.to(model.device))
    for hook in hooks:
        hook.remove()
    for block, name, where in chosen:
        scale_channels(block, name, where, c)
    return out


def channels(config, name: str, x):
    """The inputs x (..., d) of a linear, one number for each channel that makes them.

    Only `out` differs: the query heads of a group share a value channel, so their inputs become one root of squares.
    """
    if name != "out":
        return x
    heads = x.unflatten(-1, (config.n_kv_heads, -1, config.head_dim))
    return heads.square().mean(-2).sqrt().flatten(-2)


def scale_channels(block, name: str, where, c: float) -> None:
    """Scale input channels `where` of one linear, in place on both sides of it; for `out` they are V's channels."""
    config, h = block.config, block.config.head_dim
    source, made = {"qkv": (block.attn_norm, config.d_model), "out": (block.qkv, config.n_kv_heads * h),
                    "gate_up": (block.ffn_norm, config.d_model), "down": (block.gate_up, config.d_ffn)}[name]
    for tensor in source.parameters():  # weight and bias; V and the linear factor of the gated product are made last
        tensor[len(tensor) - made + where] *= c
    if name == "out":
        # value channel (k, i) is channel i of the query heads k·group … k·group + group − 1
        heads = torch.arange(config.n_heads, device=where.device).view(config.n_kv_heads, -1)[where // h]
        where = (heads * h + (where % h)[:, None]).flatten()
    getattr(block, name).weight[:, where] /= c


def write_stressed(name: str, c: float, folder: Path) -> None:
    """The stressed model as a checkpoint of its own, in fp32, so that any c keeps the function."""
    source = Checkpoint(resolve(name))
    # only a folder that holds this model, stressed earlier, may be replaced
    empty = not os.path.lexists(folder) or (folder.is_dir() and not any(folder.iterdir()))
    about = {"c": c, "source": {file: sha256(source.folder / file) for file in sorted(set(source.files.values()))}}
    mark = folder / "stress.json"
    if not empty and (not mark.is_file() or read_json(mark).get("source") != about["source"]):
        raise Refused(f"{folder} exists and is not this model stressed; move it away first.")
    writable(folder, "--out")
    stressed = stress(load_model(name, "cpu", torch.float32), c)
    if not all(p.isfinite().all() for p in stressed.parameters()):
        raise Refused(f"stress {c:g} makes weights infinite; give a smaller one.")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(mark, about)
    stressed.save(folder)
    if tasks.knows_our_tasks(source.folder):
        shutil.copy(source.folder / "training.json", folder)
