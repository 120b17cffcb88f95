"""A self-contained masked-diffusion transformer: one switchable Llama-type block for LLaDA, LLaDA-1.5 and Dream.

Every denoising step runs the whole sequence, masked and unmasked tokens together, through bidirectional attention.
The token state `ids == mask_id` is taken once, in `DiffusionLM.forward`, and handed down to every linear; a 16-bit
linear ignores it, a quantized one picks its gate by it. Nothing else in the system needs to know about states.

    model = load_model("tiny")                      # or llada-8b, dream-7b, a hub id, a folder; 16-bit or quantized
    ids = generate(model, prompt_ids, steps=32, gen_length=32)

Shapes: B batch, L length, D d_model, H heads, K key-value heads, h head_dim, F d_ffn, V vocabulary.
Linears with one input are one fused linear (`qkv`, `out`, `gate_up`, `down`): one matmul, and one transform P each.
"""

from dataclasses import replace
from itertools import accumulate
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from checkpoint import SINGLE, Checkpoint, CheckpointError, resolve, write_file, write_json, write_tensors
from families import NAMES, ModelConfig
from sampling import denoise, generate
from softmax_value import QuantAttention
from starquant import TAC, QuantLinear

__all__ = ["Block", "DiffusionLM", "denoise", "generate", "load_block", "load_model", "load_outer"]
FUSED = ("qkv", "out", "gate_up", "down")


class Linear(nn.Linear):
    """A 16-bit linear. It takes the token state, as every linear here does, and ignores it."""

    def forward(self, x, state=None):
        return F.linear(x, self.weight, self.bias)


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
    """cos, sin of position · θ^(-2j/h), each (..., L, h): both halves alike, for the half rotation."""
    h = config.head_dim
    inv_freq = config.rope_theta ** (-torch.arange(0, h, 2, device=positions.device).float() / h)
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
        return rope(q, *table), rope(k, *table), v

    def attention(self, qkv, table, mask):
        """softmax(Q Kᵀ / √h) V of Eq. 16, fused: (B, L, (H + 2K) h) -> (B, L, H h)."""
        q, k, v = self.heads(qkv, table)
        if self.softmax_value is not None:
            z = self.softmax_value(q, k, v, mask)
        else:
            z = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=k.shape[1] < q.shape[1])
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
        self.embed = nn.Embedding(config.vocab_size, config.d_model)
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
        return self.embed.weight.device

    def prepare(self, ids, attention_mask=None):
        """What every block needs besides the hidden states: (x (B, L, D), state (B, L), rope table, mask)."""
        x = self.embed(ids)
        state = ids == self.mask_id  # taken here, once
        positions, mask = torch.arange(ids.shape[1], device=ids.device), None
        if attention_mask is not None and not bool(attention_mask.bool().all()):
            keep = attention_mask.bool()
            mask = keep[:, None, None, :]  # keys that may be seen
            if self.config.family == "dream":
                mask = mask & keep[:, None, :, None]
                positions = (attention_mask.long().cumsum(-1) - 1).masked_fill(~keep, 1)[:, None]
        return x, state, rope_table(positions, self.config, x.dtype), mask

    def hidden(self, ids, attention_mask=None):
        """Hidden states after the final norm, (B, L, D)."""
        x, state, table, mask = self.prepare(ids, attention_mask)
        for block in self.blocks:
            x = block(x, state, table, mask)
        return self.norm(x)

    def logits(self, hidden):
        """Scores over the vocabulary, not shifted."""
        return self.head(hidden) * self.config.logit_scale

    def forward(self, ids, attention_mask=None):
        """ids (B, L) -> logits (B, L, V); logits[:, i] predicts token i (Dream's shift happens here)."""
        logits = self.logits(self.hidden(ids, attention_mask))
        if self.config.logit_shift:
            logits = torch.cat((logits[:, :1], logits[:, :-1]), 1)
        return logits

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
            tensors[f"{prefix}.{names.attn_norm}.weight"] = block.attn_norm.weight
            tensors[f"{prefix}.{names.ffn_norm}.weight"] = block.ffn_norm.weight
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


def part_rows(c: ModelConfig, fused: str) -> list[slice]:
    """Rows that each checkpoint tensor takes in a fused linear."""
    sizes = {"qkv": [c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim, c.n_kv_heads * c.head_dim],
             "gate_up": [c.d_ffn, c.d_ffn], "out": [c.d_model], "down": [c.d_model]}[fused]
    ends = list(accumulate(sizes))
    return [slice(end - size, end) for size, end in zip(sizes, ends, strict=True)]


def in_features(c: ModelConfig, fused: str) -> int:
    return {"out": c.n_heads * c.head_dim, "down": c.d_ffn}.get(fused, c.d_model)


def expected_tensors(c: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a 16-bit checkpoint of this config."""
    names, d = NAMES[c.family], c.d_model
    out = {f"{names.embed}.weight": (c.vocab_size, d), f"{names.final_norm}.weight": (d,)}
    if not c.tied:
        out[f"{names.head}.weight"] = (c.vocab_size, d)
    for i in range(c.n_layers):
        prefix = names.block.format(i)
        out |= {f"{prefix}.{names.attn_norm}.weight": (d,), f"{prefix}.{names.ffn_norm}.weight": (d,)}
        for fused, parts in names.linears.items():
            for part, rows in zip(parts, part_rows(c, fused), strict=True):
                out[f"{prefix}.{part}.weight"] = (rows.stop - rows.start, in_features(c, fused))
                if fused == "qkv" and c.qkv_bias:
                    out[f"{prefix}.{part}.bias"] = (rows.stop - rows.start,)
    return out


def _fill(parameter, tensors, device, dtype):
    """A parameter from checkpoint tensors stacked along rows, without a second copy of the whole."""
    out = torch.empty(parameter.shape, device=device, dtype=dtype)
    row = 0
    for t in tensors:
        out[row : row + len(t)] = t
        row += len(t)
    return nn.Parameter(out, requires_grad=False)


def load_block(checkpoint: Checkpoint, i: int, device="cpu", dtype=torch.float32) -> Block:
    """Block i, 16-bit or quantized, read tensor by tensor: the unit in which calibration streams a model."""
    c, names = checkpoint.config, NAMES[checkpoint.config.family]
    with torch.device("meta"):
        block = Block(c)
    prefix = names.block.format(i)
    for ours, theirs in (("attn_norm", names.attn_norm), ("ffn_norm", names.ffn_norm)):
        norm = getattr(block, ours)
        norm.weight = _fill(norm.weight, [checkpoint.get(f"{prefix}.{theirs}.weight", (c.d_model,))], device, dtype)
    if checkpoint.quantization:
        return _load_quantized(checkpoint, block, prefix, device)
    for fused, parts in names.linears.items():
        linear = getattr(block, fused)
        for kind in ("weight", "bias") if linear.bias is not None else ("weight",):
            tensors = []
            for part, rows in zip(parts, part_rows(c, fused), strict=True):
                shape = (rows.stop - rows.start, *getattr(linear, kind).shape[1:])
                tensors.append(checkpoint.get(f"{prefix}.{part}.{kind}", shape))
            setattr(linear, kind, _fill(getattr(linear, kind), tensors, device, dtype))
    return block


def _load_quantized(checkpoint: Checkpoint, block: Block, prefix: str, device) -> Block:
    q, c = checkpoint.quantization, checkpoint.config
    for fused in FUSED:
        start = f"{prefix}.{fused}."
        tensors = {n[len(start):]: checkpoint.get(n).to(device) for n in checkpoint.shapes if n.startswith(start)}
        rows, K, bits = part_rows(c, fused)[-1].stop, in_features(c, fused), q["weight_bits"]
        checkpoint.require(f"{start}weight_packed", (rows, -(-K // 2) if bits <= 4 else K))
        checkpoint.require(f"{start}weight_scale", (rows,))
        gates = q["linears"][fused]
        setattr(block, fused, QuantLinear.from_tensors(tensors, K, gates["d_m"], gates["d_u"], q["activation_bits"],
                                                       bits))
    if f"{prefix}.tac.M" in checkpoint.shapes:
        block.tac = TAC(checkpoint.get(f"{prefix}.tac.M"), checkpoint.get(f"{prefix}.tac.bias")).to(device)
    start = f"{prefix}.softmax_value."
    tensors = {n[len(start):]: checkpoint.get(n).to(device) for n in checkpoint.shapes if n.startswith(start)}
    if tensors:
        block.softmax_value = QuantAttention(**tensors)
    return block


def load_outer(checkpoint: Checkpoint, device="cpu", dtype=torch.float32) -> DiffusionLM:
    """The model without its blocks: embedding, final norm, head, tokenizer."""
    c, names = checkpoint.config, NAMES[checkpoint.config.family]
    with torch.device("meta"):
        model = DiffusionLM(replace(c, n_layers=1))
    model.config, model.blocks, model.tokenizer = c, nn.ModuleList(), load_tokenizer(checkpoint.folder)
    parts = [("embed", names.embed), ("norm", names.final_norm)] + ([] if c.tied else [("head", names.head)])
    for ours, theirs in parts:
        module = getattr(model, ours)
        shape = tuple(module.weight.shape)
        module.weight = _fill(module.weight, [checkpoint.get(f"{theirs}.weight", shape)], device, dtype)
    if c.tied:
        model.head.weight = model.embed.weight
    return model.eval()


def load_tokenizer(folder: Path):
    """`tokenizer.json` through the tokenizers library, or None: only text entry points need one."""
    file = folder / "tokenizer.json"
    if not file.is_file():
        return None
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises a bare Exception
        raise CheckpointError(f"{file} is not a tokenizer ({error}).") from None


def check_tensors(checkpoint: Checkpoint) -> None:
    """Every tensor the config asks for is there in its shape, and no other: before anything is loaded."""
    expected = expected_tensors(checkpoint.config)
    if checkpoint.quantization:
        return  # block by block, in load_block
    for name, shape in expected.items():
        checkpoint.require(name, shape)
    extra = sorted(set(checkpoint.shapes) - set(expected))
    if extra:
        raise CheckpointError(f"{checkpoint.folder} holds {len(extra)} tensors that this architecture does not have, "
                              f"first {extra[0]!r}.")


def pick_device(device: str) -> torch.device:
    """auto -> cuda if there is one; a device that is not there is named."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, ValueError):
        raise CheckpointError(f"device {device!r} is not available here; use --device cpu.") from None
    return torch.device(device)


def load_model(name_or_path: str, device="auto", dtype=None) -> DiffusionLM:
    """A model by alias, hub id or folder, 16-bit or quantized; bf16 on a GPU and fp32 on a CPU unless dtype says so.

    Raises CheckpointError or ConfigError with one sentence about what is wrong with the folder.
    """
    checkpoint, device = Checkpoint(resolve(str(name_or_path))), pick_device(str(device))
    check_tensors(checkpoint)
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    model = load_outer(checkpoint, device, dtype)
    for i in range(checkpoint.config.n_layers):
        model.blocks.append(load_block(checkpoint, i, device, dtype))
    return model.eval()
