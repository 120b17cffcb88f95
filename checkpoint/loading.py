"""From a folder to modules and back.

Reading: `check_tensors` compares the headers of a folder with what its config asks for, before any tensor is read. Then
`fill_block` and `fill_outer` fill the modules of `model.py` one tensor at a time, so that a model can be streamed block
by block. Writing: `block_tensors` and `outer_tensors` give the tensors of modules by their names in a folder, and
`save_model` writes them. Both directions serve 16-bit and quantized models.
"""

from pathlib import Path

import torch
from torch import nn

from checkpoint import folder as disk
from checkpoint import storage
from checkpoint.families import FUSED, NAMES, ModelConfig, linear_shapes, norm_names, part_sizes
from checkpoint.folder import INDEX, SINGLE, Checkpoint
from runtime.attention import QuantAttention
from runtime.layers import TAC, QuantEmbedding, QuantLinear
from runtime.processes import Refused

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

# ---- what a folder must hold -----------------------------------------------------------------------------------------


def expected_tensors(c: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a 16-bit checkpoint of this config."""
    names = NAMES[c.family]
    out = {name: tensor.shape for name, tensor in storage.outer(c).items()}
    for i in range(c.n_layers):
        prefix = names.block.format(i)
        out |= {f"{prefix}.{name}": tensor.shape for name, tensor in storage.Block({}).tensors(c).items()}  # the norms
        for fused, parts in names.linears.items():
            for part, rows in zip(parts, part_sizes(c)[fused], strict=True):
                out[f"{prefix}.{part}.weight"] = (rows, linear_shapes(c)[fused][1])
                if fused == "qkv" and c.qkv_bias:
                    out[f"{prefix}.{part}.bias"] = (rows,)
    return out


def check_tensors(checkpoint: Checkpoint) -> None:
    """Check that a folder holds every tensor that its config asks for, in its shape and type, and no other.

    Raises Refused with one sentence that names the first wrong tensor. It reads headers, and tensors only to compare a
    head that was saved beside the embedding to which it is tied.
    """
    c, names = checkpoint.config, NAMES[checkpoint.config.family]
    expected = quantized_tensors(checkpoint) if checkpoint.quantization else {
        name: storage.Tensor(shape, "BF16") for name, shape in expected_tensors(c).items()}
    for name, (shape, dtype) in expected.items():
        if name not in checkpoint.shapes:
            raise Refused(f"{checkpoint.folder} lacks the tensor {name!r}.")
        if checkpoint.shapes[name] != tuple(shape):
            raise Refused(f"{checkpoint.folder}: tensor {name!r} has shape {list(checkpoint.shapes[name])}, but "
                          f"config.json asks for {list(shape)}.")
        found = checkpoint.dtypes[name]
        if found != dtype and not {found, dtype} <= set(DTYPES):
            wanted = "a float type of 16 to 64 bits" if dtype in DTYPES else dtype
            raise Refused(f"{checkpoint.folder}: tensor {name!r} has type {found}, not {wanted}.")
    extra = sorted(set(checkpoint.shapes) - set(expected))
    embed, head = f"{names.embed}.weight", f"{names.head}.weight"
    if c.tied and extra == [head]:  # the one matrix, saved twice
        if not torch.equal(checkpoint.get(head), checkpoint.get(embed)):
            raise Refused(f"{checkpoint.folder}: config.json says that embedding and head are tied, but {head!r} "
                          f"differs from {embed!r}.")
    elif extra:
        raise Refused(f"{checkpoint.folder} holds {len(extra)} tensors that config.json does not explain, "
                      f"first {extra[0]!r}.")


def quantized_tensors(checkpoint: Checkpoint) -> dict[str, storage.Tensor]:
    """What a quantized folder must hold, by name, from its config.json and the names in its headers."""
    q, c = checkpoint.quantization, checkpoint.config
    bits, head_bits = _integer(checkpoint, q, "weight_bits", 2, 8), _integer(checkpoint, q, "head_bits", 2, 16, 16)
    embed_bits = _integer(checkpoint, q, "embed_bits", 2, 16, head_bits)
    _integer(checkpoint, q, "activation_bits", 2, 8)
    for name, (_, d) in linear_shapes(c).items():
        gates = q["linears"].get(name) if isinstance(q["linears"], dict) else None
        _integer(checkpoint, gates, "d_u", 0, d - _integer(checkpoint, gates, "d_m", 0, d))
    prefixes = [f"{NAMES[c.family].block.format(i)}." for i in range(c.n_layers)]
    blocks = [storage.Block.read(storage.below(checkpoint.shapes, prefix), c, bits) for prefix in prefixes]
    return {name: tensor for shard in storage.shards(c, blocks, head_bits, embed_bits)
            for name, tensor in shard.items()}


def _integer(checkpoint: Checkpoint, values, key: str, low: int, high: int, default=None) -> int:
    """A number of quantization_config, or a refusal that names it."""
    value = values.get(key, default) if isinstance(values, dict) else None
    if type(value) is not int or not low <= value <= high:
        raise Refused(f"{checkpoint.folder / 'config.json'}: quantization_config: {key} is {value!r}; it must be an "
                      f"integer between {low} and {high}.")
    return value

# ---- reading ---------------------------------------------------------------------------------------------------------


def fill_block(block, checkpoint: Checkpoint, i: int, device, dtype, weights: str):
    """A `Block` on the meta device, filled with the tensors of block i; quantized linears replace its 16-bit ones."""
    c, q, names = checkpoint.config, checkpoint.quantization, NAMES[checkpoint.config.family]
    prefix = names.block.format(i)
    for ours, theirs in norm_names(c).items():
        _fill(getattr(block, ours), checkpoint, [f"{prefix}.{theirs}"], device, dtype)
    if not q:
        for fused, parts in names.linears.items():
            _fill(getattr(block, fused), checkpoint, [f"{prefix}.{part}" for part in parts], device, dtype)
        return block
    for fused, (_, d) in linear_shapes(c).items():
        gates = q["linears"][fused]
        linear = QuantLinear.from_tensors(_tensors(checkpoint, f"{prefix}.{fused}", device), d, gates["d_m"],
                                          gates["d_u"], q["activation_bits"], q["weight_bits"])
        setattr(block, fused, linear.unpack_weights() if weights == "int8" and linear.packed else linear)
    if tac := _tensors(checkpoint, f"{prefix}.tac", device):
        block.tac = TAC(**tac)
    if attention := _tensors(checkpoint, f"{prefix}.softmax_value", device):
        block.softmax_value = QuantAttention(**attention)
    return block


def fill_outer(model, checkpoint: Checkpoint, device, dtype, head: bool = True):
    """A `DiffusionLM` on the meta device, filled with embedding, final norm and, on request, head."""
    c, q, names = checkpoint.config, checkpoint.quantization or {}, NAMES[checkpoint.config.family]
    _fill(model.norm, checkpoint, [names.final_norm], device, dtype)
    if (bits := q.get("head_bits", 16)) < 16:
        embed = _tensors(checkpoint, names.embed, device)
        model.embed = QuantEmbedding(*map(embed.get, ("weight_packed", "weight_scale")), c.d_model,
                                     q.get("embed_bits", bits), dtype)
        model.head = QuantLinear.from_tensors(embed if c.tied else _tensors(checkpoint, names.head, device), c.d_model,
                                              0, 0, bits, bits)
        return model
    _fill(model.embed, checkpoint, [names.embed], device, dtype)
    if c.tied:
        model.head.weight = model.embed.weight
    elif head:
        _fill(model.head, checkpoint, [names.head], device, dtype)
    return model


def _fill(module, checkpoint: Checkpoint, names: list[str], device, dtype) -> None:
    """Weight and bias of a module: those of the checkpoint's, stacked along rows without a second copy of the whole."""
    for kind, parameter in list(module.named_parameters()):
        out, row = torch.empty(parameter.shape, device=device, dtype=dtype), 0
        for name in names:
            tensor = checkpoint.get(f"{name}.{kind}")
            out[row : row + len(tensor)] = tensor
            row += len(tensor)
        setattr(module, kind, nn.Parameter(out, requires_grad=False))


def _tensors(checkpoint: Checkpoint, module: str, device) -> dict[str, torch.Tensor]:
    """The tensors of a module by their names in it; {} where the folder has none of them."""
    suffixes = storage.below(checkpoint.shapes, f"{module}.")
    return {suffix: checkpoint.get(f"{module}.{suffix}").to(device) for suffix in suffixes}

# ---- writing ---------------------------------------------------------------------------------------------------------


def block_tensors(block, i: int) -> dict[str, torch.Tensor]:
    """Tensors of block i, 16-bit or quantized, by their names in a folder."""
    names, out = NAMES[block.config.family], {}
    prefix = names.block.format(i)
    for name, module in block.named_children():
        for kind, tensor in module.state_dict().items():
            if isinstance(module, nn.Linear):
                parts = zip(names.linears[name], tensor.split(part_sizes(block.config)[name]), strict=True)
                out |= {f"{prefix}.{part}.{kind}": rows for part, rows in parts}
            else:
                out[f"{prefix}.{names.norms.get(name, name)}.{kind}"] = tensor
    return out


def outer_tensors(model) -> dict[str, torch.Tensor]:
    """Tensors of embedding, final norm and head, 16-bit or quantized, by their names in a folder."""
    names, out = NAMES[model.config.family], {}
    for module, name in ((model.embed, names.embed), (model.norm, names.final_norm), (model.head, names.head)):
        if module is not model.head or not model.config.tied:
            out |= {f"{name}.{kind}": tensor for kind, tensor in module.state_dict().items()}
    return out


def is_quantized(model) -> bool:
    return any(isinstance(getattr(block, fused), QuantLinear) for block in model.blocks for fused in FUSED)


def stays_16_bit(name: str) -> bool:
    """Whether a tensor of a quantized folder was left in 16 bit: those of norms, perhaps of embedding and head."""
    return name.endswith(".weight")


def parts_of(model) -> list[dict[str, torch.Tensor]]:
    """The tensors of each block and, last, of the outer part."""
    return [*map(block_tensors, model.blocks, range(len(model.blocks))), outer_tensors(model)]


def stored_bytes(model) -> int:
    """Bytes of the tensors that `save_model` writes; what is left in 16 bit counts 2 bytes a number."""
    quantized = is_quantized(model)
    return sum(tensor.nbytes if quantized and not stays_16_bit(name) else 2 * tensor.numel()
               for part in parts_of(model) for name, tensor in part.items())


def save_model(model, folder: Path, dtype=None) -> None:
    """Write a folder that `load_model` reads: the weights, config.json, tokenizer.json.

    A 16-bit model becomes one file in its family's own layout, in `dtype` or as it is. A quantized one becomes a shard
    for each block and one for the outer part, as calibration writes it. What it keeps in 16 bit has `dtype`, or the
    type that it had in the folder the model was read from. Raises Refused where the folder holds weights of the other
    kind, or where a quantized model does not know its quantization_config.
    """
    quantized = is_quantized(model)
    if quantized and not model.config.raw.get("quantization_config"):
        raise Refused("this quantized model has no quantization_config, which calibrate.quantize_model gives a model.")
    other = SINGLE if quantized else INDEX
    if (folder / other).exists():
        raise Refused(f"{folder} holds {other} of another model; save to another folder.")
    folder.mkdir(parents=True, exist_ok=True)

    def typed(name, tensor):
        if quantized and not stays_16_bit(name):
            return tensor
        return tensor.to(dtype or (quantized and DTYPES.get(model.dtypes.get(name))) or tensor.dtype)

    parts = [{name: typed(name, tensor) for name, tensor in part.items()} for part in parts_of(model)]
    if quantized:
        for i, part in enumerate(parts):
            disk.write_tensors(folder / disk.shard_name(i, len(parts)), part)
        disk.write_index(folder, len(parts))
    else:
        disk.write_tensors(folder / SINGLE, {name: tensor for part in parts for name, tensor in part.items()})
    disk.write_config(folder, model.config.raw)
    if model.tokenizer is not None:
        disk.write_file(folder / "tokenizer.json", lambda path: model.tokenizer.save(str(path)))
