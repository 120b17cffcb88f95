"""A self-contained masked-diffusion transformer: one switchable Llama-type block for LLaDA, Dream and kin.

Every denoising step runs the whole sequence, masked and unmasked tokens together, through bidirectional attention.
The token state `ids == mask_id` is taken once, in `DiffusionLM.forward`, and handed down to every linear; a 16-bit
linear ignores it, a quantized one picks its gate by it. Nothing else in the system needs to know about states.

    model = load_model("tiny")                      # or llada-8b, dream-7b, a hub id, a folder; 16-bit or quantized
    ids = generate(model, prompt_ids, steps=32, gen_length=32)

Shapes: B batch, L length, D d_model, H heads, K key-value heads, h head_dim, F d_ffn, V vocabulary.
Linears with one input are one fused linear (`qkv`, `out`, `gate_up`, `down`): one matmul, and one transform P each.
"""

from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from checkpoint.families import NAMES, ModelConfig, norm_names
from checkpoint.folder import SINGLE, Checkpoint, resolve, write_file, write_json, write_tensors
from checkpoint.loading import _fill, _load_quantized, _load_quantized_outer, check_tensors, part_rows
from checkpoint.tokenizer import load_tokenizer
from runtime.processes import Refused, pick_device
from runtime.sampling import denoise, generate

__all__ = ["Block", "DiffusionLM", "denoise", "generate", "load_block", "load_model", "load_outer"]


class Linear(nn.Linear):
    """A 16-bit linear. It takes the token state, as every linear here does, and ignores it."""

    def forward(self, x, state=None):
        return F.linear(x, self.weight, self.bias)


class Embedding(nn.Embedding):
    def reset_parameters(self):
        """Not on the meta device, where drawing numbers imports torch's compiler: a second at every start."""
        if not self.weight.is_meta:
            super().reset_parameters()


class RMSNorm(nn.Module):
    """x · rsqrt(mean(x²) + eps) in fp32, cast to the input's dtype, and only then times the gain (as LLaDA, Dream)."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x):
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * y.to(x.dtype)


def rope_table(positions, config: ModelConfig, dtype):
    """cos, sin of position / θ^(2j/h), each (..., L, h): both halves alike, for the half rotation."""
    h = config.head_dim
    # in the official code's order: θ^(−2j/h) is one unit in the last place off, which position 4000 makes 10⁻³
    inv_freq = 1.0 / config.rope_theta ** (torch.arange(0, h, 2, device=positions.device).float() / h)
    angle = positions[..., None].float() * inv_freq
    angle = torch.cat((angle, angle), -1)
    dtype = torch.float32 if config.rope_fp32 else dtype
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rope(x, cos, sin):
    """Rotate the halves of each head: x (B, H, L, h); computed in the table's dtype, returned in x's."""
    y = x.to(cos.dtype)
    first, second = y.chunk(2, -1)
    return (y * cos + torch.cat((-second, first), -1) * sin).to(x.dtype)


class Block(nn.Module):
    """Pre-norm attention and gated feed-forward. `tac` corrects the attention representation; identity in 16 bit."""

    def __init__(self, c: ModelConfig):
        super().__init__()
        self.config = c
        self.attn_norm = RMSNorm(c.d_model, c.norm_eps)
        self.qkv = Linear(c.d_model, (c.n_heads + 2 * c.n_kv_heads) * c.head_dim, bias=c.qkv_bias)
        if c.qk_norm:
            self.q_norm, self.k_norm = RMSNorm(c.head_dim, c.norm_eps), RMSNorm(c.head_dim, c.norm_eps)
        self.tac = nn.Identity()
        self.register_module("softmax_value", None)  # a QuantAttention if K, V or the softmax output are quantized
        self.out = Linear(c.n_heads * c.head_dim, c.d_model, bias=False)
        self.ffn_norm = RMSNorm(c.d_model, c.norm_eps)
        self.gate_up = Linear(c.d_model, 2 * c.d_ffn, bias=False)
        self.down = Linear(c.d_ffn, c.d_model, bias=False)

    def heads(self, qkv, table):
        """(B, L, (H + 2K) h) -> q (B, H, L, h) and k, v (B, K, L, h), q and k rotated to their positions."""
        c = self.config
        q, k, v = rearrange(qkv, "b l (n h) -> b n l h", h=c.head_dim).split((c.n_heads, c.n_kv_heads, c.n_kv_heads), 1)
        if c.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        return rope(q, *table), rope(k, *table), v

    def attention(self, qkv, table, mask):
        """softmax(Q Kᵀ / √h) V of Eq. 16, fused: (B, L, (H + 2K) h) -> (B, L, H h)."""
        q, k, v = self.heads(qkv, table)
        if self.softmax_value is not None:
            z = self.softmax_value(q, k, v, mask)
        else:
            z = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=k.shape[1] < q.shape[1])
            if mask is not None and mask.shape[-2] > 1:
                # Dream's rows of padding see nothing: zero, as on the CPU, whatever another kernel makes of them
                z = z.masked_fill(~mask.diagonal(dim1=-2, dim2=-1)[..., None], 0)  # who is seen sees itself
        return rearrange(z, "b n l h -> b l (n h)")

    def forward(self, x, state, table, mask=None):
        """x (B, L, D), state (B, L) bool, True = masked token -> (B, L, D)."""
        z = self.tac(self.attention(self.qkv(self.attn_norm(x), state), table, mask))
        x = x + self.out(z, state)
        gate, up = self.gate_up(self.ffn_norm(x), state).chunk(2, -1)
        return x + self.down(F.silu(gate) * up, state)


class DiffusionLM(nn.Module):
    """The mask predictor p(x0 | xt)."""

    def __init__(self, config: ModelConfig, tokenizer=None):
        super().__init__()
        self.config, self.tokenizer = config, tokenizer
        self.embed = Embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.head = Linear(config.d_model, config.vocab_size, bias=False)
        if config.tied:
            self.head.weight = self.embed.weight

    @property
    def mask_id(self) -> int:
        return self.config.mask_id

    @property
    def device(self):
        return self.norm.weight.device

    def context(self, ids, attention_mask=None):
        """Rope table and attention mask (None where every key may be seen): what stays from step to step."""
        positions, mask = torch.arange(ids.shape[1], device=ids.device), None
        if attention_mask is not None and not bool(attention_mask.bool().all()):
            keep = attention_mask.bool()
            mask = keep[:, None, None, :]  # keys that may be seen
            if self.config.positions_skip_padding:
                mask = mask & keep[:, None, :, None]
                positions = (attention_mask.long().cumsum(-1) - 1).masked_fill(~keep, 1)[:, None]
        return rope_table(positions, self.config, self.norm.weight.dtype), mask

    def prepare(self, ids, attention_mask=None, context=None):
        """What every block needs besides the hidden states: (x (B, L, D), state (B, L), rope table, mask)."""
        state = ids == self.mask_id  # taken here, once
        return self.embed(ids), state, *(context or self.context(ids, attention_mask))

    def hidden(self, ids, attention_mask=None, context=None):
        """Hidden states after the final norm, (B, L, D); `context` in place of the mask that it was made from."""
        x, state, table, mask = self.prepare(ids, attention_mask, context)
        for block in self.blocks:
            x = block(x, state, table, mask)
        return self.norm(x)

    def logits(self, hidden):
        """Scores over the vocabulary, not shifted."""
        scores = self.head(hidden)
        # one pass less over the largest tensor of a step
        return scores if self.config.logit_scale == 1 else scores * self.config.logit_scale

    def forward(self, ids, attention_mask=None, where=None):
        """ids (B, L) -> logits (B, L, V); logits[:, i] predicts token i (Dream's shift happens here).

        attention_mask (B, L): 0 marks padding. where (B, L) bool: only the logits of its N True positions, (N, V).
        """
        hidden = self.hidden(ids, attention_mask)
        if self.config.logit_shift:
            hidden = torch.cat((hidden[:, :1], hidden[:, :-1]), 1)
        return self.logits(hidden if where is None else hidden[where])

    # ---- checkpoints -----------------------------------------------------------------------------------------------

    def save(self, folder, dtype=None) -> None:
        """Write a 16-bit model in its family's own layout: config.json, model.safetensors, tokenizer.json."""
        folder, names = Path(folder), NAMES[self.config.family]
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {f"{names.embed}.weight": self.embed.weight, f"{names.final_norm}.weight": self.norm.weight}
        if not self.config.tied:
            tensors[f"{names.head}.weight"] = self.head.weight
        for i, block in enumerate(self.blocks):
            prefix = names.block.format(i)
            for ours, theirs in norm_names(self.config).items():
                tensors[f"{prefix}.{theirs}.weight"] = getattr(block, ours).weight
            for fused, parts in names.linears.items():
                linear = getattr(block, fused)
                for part, rows in zip(parts, part_rows(self.config, fused), strict=True):
                    tensors[f"{prefix}.{part}.weight"] = linear.weight[rows]
                    if linear.bias is not None:
                        tensors[f"{prefix}.{part}.bias"] = linear.bias[rows]
        write_tensors(folder / SINGLE, {k: v.to(dtype or v.dtype) for k, v in tensors.items()})
        write_json(folder / "config.json", self.config.raw)
        if self.tokenizer is not None:
            write_file(folder / "tokenizer.json", lambda p: self.tokenizer.save(str(p)))


def load_block(checkpoint: Checkpoint, i: int, device="cpu", dtype=torch.float32, weights="packed") -> Block:
    """Block i, 16-bit or quantized, read tensor by tensor: the unit in which calibration streams a model."""
    c, names = checkpoint.config, NAMES[checkpoint.config.family]
    with torch.device("meta"):
        block = Block(c)
    prefix = names.block.format(i)
    for ours, theirs in norm_names(c).items():
        norm = getattr(block, ours)
        tensor = checkpoint.get(f"{prefix}.{theirs}.weight", tuple(norm.weight.shape))
        norm.weight = _fill(norm.weight, [tensor], device, dtype)
    if checkpoint.quantization:
        return _load_quantized(checkpoint, block, prefix, device, weights)
    for fused, parts in names.linears.items():
        linear = getattr(block, fused)
        for kind in ("weight", "bias") if linear.bias is not None else ("weight",):
            tensors = []
            for part, rows in zip(parts, part_rows(c, fused), strict=True):
                shape = (rows.stop - rows.start, *getattr(linear, kind).shape[1:])
                tensors.append(checkpoint.get(f"{prefix}.{part}.{kind}", shape))
            setattr(linear, kind, _fill(getattr(linear, kind), tensors, device, dtype))
    return block


def load_outer(checkpoint: Checkpoint, device="cpu", dtype=torch.float32, head: bool = True) -> DiffusionLM:
    """The model without its blocks: embedding, final norm, head (on request), tokenizer."""
    c, names = checkpoint.config, NAMES[checkpoint.config.family]
    with torch.device("meta"):
        model = DiffusionLM(replace(c, n_layers=1))
    model.config, model.blocks, model.tokenizer = c, nn.ModuleList(), load_tokenizer(checkpoint.folder)
    if model.tokenizer is not None and model.tokenizer.get_vocab_size() > c.vocab_size:
        raise Refused(f"{checkpoint.folder}: the tokenizer has {model.tokenizer.get_vocab_size()} tokens, the "
                              f"embedding only {c.vocab_size}.")
    parts = [("embed", names.embed), ("norm", names.final_norm)] + [("head", names.head)] * (head and not c.tied)
    if checkpoint.quantization and checkpoint.quantization.get("head_bits", 16) < 16:
        parts = [("norm", names.final_norm)]
        _load_quantized_outer(checkpoint, model, device, dtype)
    for ours, theirs in parts:
        module = getattr(model, ours)
        shape = tuple(module.weight.shape)
        module.weight = _fill(module.weight, [checkpoint.get(f"{theirs}.weight", shape)], device, dtype)
    if c.tied and len(parts) > 1:
        model.head.weight = model.embed.weight
    return model.eval()


def load_model(name_or_path: str, device="auto", dtype=None, weights="packed") -> DiffusionLM:
    """A model by alias, hub id or folder, 16-bit or quantized; bf16 on a GPU and fp32 on a CPU unless dtype says so.

    weights: "packed" keeps 4-bit weights two a byte, "int8" one a byte (nothing to unpack; often a little faster).
    Raises Refused with one sentence about what is wrong with the folder.
    """
    checkpoint, device = Checkpoint(resolve(str(name_or_path))), pick_device(str(device))
    check_tensors(checkpoint)
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    model = load_outer(checkpoint, device, dtype)
    for i in range(checkpoint.config.n_layers):
        model.blocks.append(load_block(checkpoint, i, device, dtype, weights))
    return model.eval()
