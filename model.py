"""A self-contained masked-diffusion transformer: one switchable Llama-type block for LLaDA, Dream and kin.

    model = load_model("tiny")                      # or llada-8b, dream-7b, a hub id, a folder; 16-bit or quantized
    text = write(model, "Ann has 4 boxes of 6 eggs.\n", gen_length=24)
    ids = generate(model, prompt_ids, steps=32, gen_length=32)

A denoising step
    It runs the whole sequence, masked and unmasked tokens together, through bidirectional attention. A forward pass
    compares the ids with the mask token in one place, `DiffusionLM.prepare`. The result, the token state, goes with the
    hidden states to every linear. A 16-bit linear ignores it, and a quantized one picks its gate by it.
Names
    B batch, L length, D d_model, H heads, H_kv key-value heads, h head_dim, F d_ffn, V vocabulary. A block has four
    linears, `qkv`, `out`, `gate_up` and `down`: linears with the same input are fused, so that they share one product
    and one transform P. `checkpoint/loading.py` fills these modules from a folder and writes them to one.
"""

from itertools import groupby
from math import prod
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from checkpoint.families import ModelConfig
from checkpoint.folder import Checkpoint, resolve
from checkpoint.loading import check_tensors, expected_tensors, fill_block, fill_outer, save_model, stored_bytes
from checkpoint.tokenizer import load_tokenizer, question
from runtime import checks, cuda, fusion
from runtime.processes import Refused, pick_device, pick_dtype
from runtime.sampling import END_OF_TURN, denoise, generate, pad_left

__all__ = ["Block", "DiffusionLM", "denoise", "generate", "load_block", "load_model", "load_outer", "stream", "write"]


class Linear(nn.Linear):
    """A 16-bit linear. It is called with the token state, as every linear here is, and ignores it."""

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
        if checks.glues(x, self.weight):
            return cuda.rms_norm(x, self.weight, self.eps)
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * y.to(x.dtype)


def cos_sin(positions, config: ModelConfig, dtype):
    """cos, sin of position / θ^(2j/h), each (..., L, h): both halves alike, for the half rotation."""
    h = config.head_dim
    # in the official code's order: θ^(−2j/h) is one unit in the last place off, which position 4000 makes 10⁻³
    inv_freq = 1.0 / config.rope_theta ** (torch.arange(0, h, 2, device=positions.device).float() / h)
    angle = positions[..., None].float() * inv_freq
    angle = torch.cat((angle, angle), -1)
    dtype = torch.float32 if config.rope_fp32 else dtype
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x, cos, sin):
    """Rotate the halves of each head: x (B, H, L, h); computed in the dtype of cos, returned in x's."""
    y = x.to(cos.dtype)
    first, second = y.chunk(2, -1)
    return (y * cos + torch.cat((-second, first), -1) * sin).to(x.dtype)


def swiglu(gate_up):
    """silu(gate) · up: (..., 2 F) -> (..., F)."""
    if checks.glues(gate_up):
        return cuda.silu_up(gate_up)
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


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

    def heads(self, qkv, rope):
        """(B, L, (H + 2 H_kv) h) -> q (B, H, L, h) and k, v (B, H_kv, L, h), q and k rotated to their positions."""
        c = self.config
        q, k, v = rearrange(qkv, "b l (n h) -> b n l h", h=c.head_dim).split((c.n_heads, c.n_kv_heads, c.n_kv_heads), 1)
        if not c.qk_norm and c.head_dim % 16 == 0 and checks.glues(qkv):
            return *cuda.rope(qkv, *rope, c.n_heads + c.n_kv_heads, c.head_dim).split((c.n_heads, c.n_kv_heads), 1), v
        if c.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        return rotate(q, *rope), rotate(k, *rope), v

    def attention(self, qkv, rope, mask):
        """softmax(Q Kᵀ / √h) V of Eq. 16, fused: (B, L, (H + 2 H_kv) h) -> (B, L, H h)."""
        q, k, v = self.heads(qkv, rope)
        if self.softmax_value is not None:
            z = self.softmax_value(q, k, v, mask)
        else:
            z = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=k.shape[1] < q.shape[1])
            if mask is not None and mask.shape[-2] > 1:
                # Dream's rows of padding see nothing: zero, as on the CPU, whatever another kernel makes of them
                z = z.masked_fill(~mask.diagonal(dim1=-2, dim2=-1)[..., None], 0)  # who is seen sees itself
        return rearrange(z, "b n l h -> b l (n h)")

    def forward(self, x, state, rope, mask=None):
        """x (B, L, D), state (B, L) bool, True = masked token -> (B, L, D)."""
        if fusion.serves(self, x):  # on a GPU, the same in fewer kernels
            return fusion.forward(self, x, state, rope, mask)
        z = self.tac(self.attention(self.qkv(self.attn_norm(x), state), rope, mask))
        x = x + self.out(z, state)
        return x + self.down(swiglu(self.gate_up(self.ffn_norm(x), state)), state)


class DiffusionLM(nn.Module):
    """The mask predictor p(x0 | xt)."""

    def __init__(self, config: ModelConfig, tokenizer=None):
        super().__init__()
        self.config, self.tokenizer = config, tokenizer
        self.dtypes: dict[str, str] = {}  # of the tensors in the folder that the model was read from
        self.embed = Embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.head = Linear(config.d_model, config.vocab_size, bias=False)
        if config.tied:
            self.head.weight = self.embed.weight

    def __repr__(self):
        """What `print` shows: sizes and, of a quantized model, how it was quantized and what its first block holds."""
        c, q = self.config, self.config.raw.get("quantization_config")
        lines = [f"DiffusionLM of family {c.family}: {c.n_layers} blocks, width {c.d_model}, "
                 f"{sum(map(prod, expected_tensors(c).values())) / 1e6:.2f} M parameters, "
                 f"{stored_bytes(self) / 1e6:.2f} MB{'' if q else ' in 16 bit'}"]
        if q:
            head = q.get("head_bits", 16)
            lines += [f"{q['method']}, W{q['weight_bits']}A{q['activation_bits']}, embedding in "
                      f"{q.get('embed_bits', head)} bits, head in {head}; in each block:"]
            lines += [f"  {name}: {part}" for block in self.blocks[:1] for name, part in block.named_children()
                      if not isinstance(part, RMSNorm | nn.Identity)]
        return "\n".join(lines)

    @property
    def mask_id(self) -> int:
        return self.config.mask_id

    @property
    def device(self):
        return self.norm.weight.device

    def context(self, ids, attention_mask=None):
        """What stays from step to step: RoPE's cos and sin, and the attention mask (None: every key may be seen)."""
        positions, mask = torch.arange(ids.shape[1], device=ids.device), None
        if attention_mask is not None and not bool(attention_mask.bool().all()):
            keep = attention_mask.bool()
            mask = keep[:, None, None, :]  # keys that may be seen
            if self.config.positions_skip_padding:
                mask = mask & keep[:, None, :, None]
                positions = (attention_mask.long().cumsum(-1) - 1).masked_fill(~keep, 1)[:, None]
        return cos_sin(positions, self.config, self.norm.weight.dtype), mask

    def prepare(self, ids, attention_mask=None, context=None):
        """What the blocks take: embedded ids x (B, L, D), token states (B, L), RoPE's cos and sin, attention mask."""
        state = ids == self.mask_id  # True = masked
        return self.embed(ids), state, *(context or self.context(ids, attention_mask))

    def hidden(self, ids, attention_mask=None, context=None):
        """Hidden states after the final norm, (B, L, D); `context` in place of the mask that it was made from."""
        x, state, rope, mask = self.prepare(ids, attention_mask, context)
        for block in self.blocks:
            x = block(x, state, rope, mask)
        return self.norm(x)

    def predicting(self, hidden):
        """Hidden states (B, L, D), each where the token stands that it predicts: Dream's predict the token after."""
        return torch.cat((hidden[:, :1], hidden[:, :-1]), 1) if self.config.logit_shift else hidden

    def logits(self, hidden):
        """Scores over the vocabulary, not shifted."""
        scores = self.head(hidden)
        # one pass less over the largest tensor of a step
        return scores if self.config.logit_scale == 1 else scores * self.config.logit_scale

    def forward(self, ids, attention_mask=None, where=None):
        """ids (B, L) -> logits (B, L, V); logits[:, i] predicts token i.

        attention_mask (B, L): 0 marks padding. where (B, L) bool: only the logits of its N True positions, (N, V).
        """
        hidden = self.predicting(self.hidden(ids, attention_mask))
        return self.logits(hidden if where is None else hidden[where])

    def save(self, folder, dtype=None) -> None:
        """Write a folder that `load_model` reads, 16-bit or quantized (`checkpoint.loading.save_model`)."""
        save_model(self, Path(folder), dtype and pick_dtype(dtype, self.device))

# ---- reading a model -------------------------------------------------------------------------------------------------


def load_block(checkpoint: Checkpoint, i: int, device="cpu", dtype=torch.float32, weights="packed") -> Block:
    """Block i, 16-bit or quantized, read tensor by tensor: the unit in which calibration streams a model."""
    with torch.device("meta"):
        block = Block(checkpoint.config)
    return fill_block(block, checkpoint, i, device, dtype, weights)


def load_outer(checkpoint: Checkpoint, device="cpu", dtype=torch.float32, head: bool = True) -> DiffusionLM:
    """The model without its blocks: embedding, final norm, head (on request), tokenizer."""
    with torch.device("meta"):
        model = DiffusionLM(checkpoint.config, load_tokenizer(checkpoint.folder))
    model.blocks = nn.ModuleList()  # they come one at a time
    tokens, rows = model.tokenizer.get_vocab_size() if model.tokenizer else 0, checkpoint.config.vocab_size
    if tokens > rows:
        raise Refused(f"{checkpoint.folder}: the tokenizer has {tokens} tokens, the embedding only {rows}.")
    model.dtypes = checkpoint.dtypes
    return fill_outer(model, checkpoint, device, dtype, head).eval()


def load_model(name_or_path: str, device="auto", dtype=None, weights="packed") -> DiffusionLM:
    """A model by alias, hub id or folder, 16-bit or quantized; bf16 on a GPU and fp32 on a CPU unless dtype says so.

    dtype: of what is not quantized, "bf16", "fp32" or a torch.dtype.
    weights: "packed" keeps 4-bit weights two a byte, "int8" one a byte (nothing to unpack; often a little faster).
    Raises Refused with one sentence about what is wrong with the folder.
    """
    if weights not in ("packed", "int8"):
        raise Refused(f'weights {weights!r} is neither "packed" nor "int8".')
    checkpoint, device = Checkpoint(resolve(str(name_or_path))), pick_device(str(device))
    dtype = pick_dtype(dtype, device)
    check_tensors(checkpoint)
    model = load_outer(checkpoint, device, dtype)
    for i in range(checkpoint.config.n_layers):
        model.blocks.append(load_block(checkpoint, i, device, dtype, weights))
    return model.eval()

# ---- from text to text ---------------------------------------------------------------------------------------------


def write(model: DiffusionLM, texts, gen_length: int = 128, steps: int | None = None, chat: bool = False, **options):
    """What a model writes after a text: a str for a str, and a list of str for a list, which is one batch.

    chat: the texts are questions to an instruct model and are put in its chat template. steps: gen_length, unless
    they, a `threshold` or a `factor` are given. options: the other ones of `generate`. An answer ends where the model
    ends it.
    Raises Refused for anything but texts, for a model without a tokenizer, and where `generate` does.
    """
    *_, answers = stream(model, texts, gen_length, steps, chat, **options)
    return answers


def stream(model: DiffusionLM, texts, gen_length: int = 128, steps: int | None = None, chat: bool = False, **options):
    """Yield after every pass what `write` has written so far; ░ is a token that is still masked."""
    if not isinstance(model, DiffusionLM):
        raise Refused(f"model is of type {type(model).__name__}; give what load_model(...) returns.")
    tokenizer, given = model.tokenizer, [texts] if isinstance(texts, str) else texts
    if not isinstance(given, list | tuple) or not given or not all(isinstance(text, str) and text for text in given):
        raise Refused("texts must be a text or a list of texts, each with at least one character.")
    if tokenizer is None:
        raise Refused("the model's folder has no tokenizer.json, which text needs; generate takes token ids.")
    if chat:
        given = [question(tokenizer, model.config.family, text) for text in given]
    encoded = tokenizer.encode_batch(list(given), add_special_tokens=not chat)
    ids, attention_mask = (t.to(model.device) for t in pad_left([e.ids for e in encoded], model.config.eos_id or 0))
    if steps is None and options.get("threshold") is None and options.get("factor") is None:
        steps = gen_length
    for step in denoise(model, ids, steps, gen_length, attention_mask=attention_mask, **options):
        answers = [answer(model, row) for row in step.ids[:, ids.shape[1] :].tolist()]
        yield answers[0] if isinstance(texts, str) else answers


def answer(model: DiffusionLM, ids: list[int]) -> str:
    """Generated ids as text, up to the first end of text or of turn."""
    ends = {model.config.eos_id, model.tokenizer.token_to_id(END_OF_TURN[model.config.family])}
    ids = ids[: next((i for i, token in enumerate(ids) if token in ends), len(ids))]
    return "".join("░" * len(part) if masked else model.tokenizer.decode(part) for masked, part in (
        (masked, list(group)) for masked, group in groupby(ids, lambda token: token == model.mask_id)))
