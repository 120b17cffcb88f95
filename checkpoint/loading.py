"""From a folder to modules and back: which tensors a config asks for, and how they fill a block and the outer part."""

from itertools import accumulate

import torch
from torch import nn

from checkpoint.families import FUSED, NAMES, ModelConfig, linear_shapes, norm_names
from checkpoint.folder import Checkpoint
from runtime.attention import QuantAttention
from runtime.layers import TAC, QuantEmbedding, QuantLinear
from runtime.processes import Refused


def check_quantized(checkpoint: Checkpoint) -> None:
    """Every tensor of a quantized folder has the shape and type its config asks for, and there is no other.

    From the headers alone: nothing is allocated. Raises Refused with one sentence.
    """
    q, c, names = checkpoint.quantization, checkpoint.config, NAMES[checkpoint.config.family]
    here, shapes, seen = f"{checkpoint.folder / 'config.json'}: quantization_config", checkpoint.shapes, set()

    def integer(values, key, low, high, default=None):
        value = values.get(key, default) if isinstance(values, dict) else None
        if type(value) is not int or not low <= value <= high:
            raise Refused(f"{here}: {key} is {value!r}; it must be an integer between {low} and {high}.")
        return value

    def need(name, shape, *dtypes):
        checkpoint.require(name, shape)
        seen.add(name)
        if checkpoint.dtypes[name] not in (dtypes or ("F32", "BF16", "F16")):
            raise Refused(f"{checkpoint.folder}: tensor {name!r} has the wrong type {checkpoint.dtypes[name]}.")

    def optional(name, shape, *dtypes):
        if name in shapes:
            need(name, shape, *dtypes)

    def codes(start, rows, columns, bits):
        packed = ((rows, -(-columns // 2)), "U8") if bits <= 4 else ((rows, columns), "I8")
        need(f"{start}weight_packed", *packed)
        need(f"{start}weight_scale", (rows,))

    def factor(name, d):
        """A diagonal (d,), blocks (n, b, b), n b = d, or a matrix (n, n), for n < d across n blocks."""
        shape = shapes[name]
        n = blocks(shape, d) or (1 if len(shape) == 3 else d)
        need(name, {1: (d,), 3: (n, d // n, d // n)}.get(len(shape), (n, n)))

    def blocks(shape, d):
        """The first size of a shape where it divides d, else 0."""
        return shape[0] if shape and shape[0] and d % shape[0] == 0 else 0

    bits, head_bits = integer(q, "weight_bits", 2, 8), integer(q, "head_bits", 2, 16, 16)
    integer(q, "activation_bits", 2, 8)
    outer = [(names.embed, integer(q, "embed_bits", 2, 16, head_bits)), *([] if c.tied else [(names.head, head_bits)])]
    for name, width in outer:
        if head_bits == 16:
            need(f"{name}.weight", (c.vocab_size, c.d_model))
        else:
            codes(f"{name}.", c.vocab_size, c.d_model, width)
    need(f"{names.final_norm}.weight", (c.d_model,))
    z = c.n_heads * c.head_dim
    for prefix in map(names.block.format, range(c.n_layers)):
        for ours, theirs in norm_names(c).items():
            need(f"{prefix}.{theirs}.weight", (c.head_dim if ours in ("q_norm", "k_norm") else c.d_model,))
        for fused, (rows, d) in linear_shapes(c).items():
            gates, start = q["linears"].get(fused) if isinstance(q["linears"], dict) else None, f"{prefix}.{fused}."
            integer(gates, "d_u", 0, d - integer(gates, "d_m", 0, d))
            codes(start, rows, d, bits)
            optional(f"{start}weight_zero", (rows,), "I32")
            optional(f"{start}bias", (rows,))
            optional(f"{start}clip", (2,))
            if f"{start}feedback" in shapes:
                n = blocks(shapes[f"{start}feedback"], d) or 1
                need(f"{start}feedback", (n, d // n, d // n), "BF16")
            if f"{start}mean" in shapes or f"{start}shift" in shapes:
                need(f"{start}mean", (2, d))
                need(f"{start}shift", (2, rows))
            for i in range(len(shapes)):
                name = f"{start}transform_{i}"
                if f"{name}P1" in shapes:
                    n = next(iter(shapes[f"{name}P1"]), 1) or 1
                    need(f"{name}P1", (n, n))
                    need(f"{name}P2", (d // n, d // n) if d % n == 0 else (d, d))
                elif name in shapes:
                    factor(name, d)
                else:
                    break
        if f"{prefix}.tac.M" in shapes:
            g = (*shapes[f"{prefix}.tac.M"], 0)[-2] or 1
            need(f"{prefix}.tac.M", (z // g, g, g))
            need(f"{prefix}.tac.bias", (z // g, g))
        start, h = f"{prefix}.softmax_value.", c.head_dim
        optional(f"{start}bits", (2,), "I32")
        optional(f"{start}rotation", (h, h))
        optional(f"{start}value_scale", (c.n_kv_heads, 1, h))
        optional(f"{start}value_zero", (c.n_kv_heads, 1, h))
    extra = sorted(set(shapes) - seen)
    if extra:
        raise Refused(f"{checkpoint.folder} holds {len(extra)} tensors that config.json does not explain, "
                              f"first {extra[0]!r}.")


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
        for ours, theirs in norm_names(c).items():
            out[f"{prefix}.{theirs}.weight"] = (c.head_dim,) if ours in ("q_norm", "k_norm") else (d,)
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


def _load_quantized(checkpoint: Checkpoint, block, prefix: str, device, weights: str):
    q, c = checkpoint.quantization, checkpoint.config
    for fused in FUSED:
        start = f"{prefix}.{fused}."
        tensors = {n[len(start):]: checkpoint.get(n).to(device) for n in checkpoint.shapes if n.startswith(start)}
        rows, K, bits = part_rows(c, fused)[-1].stop, in_features(c, fused), q["weight_bits"]
        checkpoint.require(f"{start}weight_packed", (rows, -(-K // 2) if bits <= 4 else K))
        checkpoint.require(f"{start}weight_scale", (rows,))
        gates = q["linears"][fused]
        linear = QuantLinear.from_tensors(tensors, K, gates["d_m"], gates["d_u"], q["activation_bits"], bits)
        setattr(block, fused, linear.unpack_weights() if weights == "int8" and bits <= 4 else linear)
    if f"{prefix}.tac.M" in checkpoint.shapes:
        block.tac = TAC(checkpoint.get(f"{prefix}.tac.M"), checkpoint.get(f"{prefix}.tac.bias")).to(device)
    start = f"{prefix}.softmax_value."
    tensors = {n[len(start):]: checkpoint.get(n).to(device) for n in checkpoint.shapes if n.startswith(start)}
    if tensors:
        block.softmax_value = QuantAttention(**tensors)
    return block


def outer_tensors(model) -> dict[str, torch.Tensor]:
    """Checkpoint tensors of embedding, final norm and head, 16-bit or quantized: what `load_outer` reads."""
    names, out = NAMES[model.config.family], {}
    for module, name in ((model.embed, names.embed), (model.norm, names.final_norm), (model.head, names.head)):
        if module is not model.head or not model.config.tied:
            out |= {f"{name}.{k}": v for k, v in module.state_dict().items()}
    return out


def _load_quantized_outer(checkpoint: Checkpoint, model, device, dtype) -> None:
    q, c, names = checkpoint.quantization, checkpoint.config, NAMES[checkpoint.config.family]
    bits, tensors = {"embed": q.get("embed_bits", q["head_bits"]), "head": q["head_bits"]}, {}
    for ours, theirs in (("embed", names.embed), ("head", names.head)):
        if ours == "head" and c.tied:
            tensors[ours] = tensors["embed"]
            continue
        width = -(-c.d_model // 2) if bits[ours] <= 4 else c.d_model
        checkpoint.require(f"{theirs}.weight_packed", (c.vocab_size, width))
        tensors[ours] = {"weight_packed": checkpoint.get(f"{theirs}.weight_packed").to(device),
                         "weight_scale": checkpoint.get(f"{theirs}.weight_scale", (c.vocab_size,)).to(device)}
    model.embed = QuantEmbedding(*tensors["embed"].values(), c.d_model, bits["embed"], dtype)
    model.head = QuantLinear.from_tensors(tensors["head"], c.d_model, 0, 0, bits["head"], bits["head"])


def check_tensors(checkpoint: Checkpoint) -> None:
    """Every tensor the config asks for is there in its shape and type, and no other: before any is loaded."""
    c, expected = checkpoint.config, expected_tensors(checkpoint.config)
    if checkpoint.quantization:
        return check_quantized(checkpoint)
    for name, shape in expected.items():
        checkpoint.require(name, shape)
        if checkpoint.dtypes[name] not in ("BF16", "F16", "F32", "F64"):
            raise Refused(f"{checkpoint.folder}: tensor {name!r} has type {checkpoint.dtypes[name]}, not a "
                                  f"float type of 16 to 64 bits.")
    extra = sorted(set(checkpoint.shapes) - set(expected))
    embed, head = (f"{n}.weight" for n in (NAMES[c.family].embed, NAMES[c.family].head))
    if c.tied and extra == [head] and torch.equal(checkpoint.get(head), checkpoint.get(embed)):
        return  # a tied head that was saved twice
    if extra:
        raise Refused(f"{checkpoint.folder} holds {len(extra)} tensors that this architecture does not have, "
                              f"first {extra[0]!r}.")
