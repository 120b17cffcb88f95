"""The published shapes of LLaDA-8B and Dream-7B, and checkpoints of those shapes with random weights."""

import shutil
from math import prod
from pathlib import Path

import torch

from checkpoint.families import NAMES, read_config
from checkpoint.folder import resolve, shard_name, write_index, write_json, write_tensors
from checkpoint.loading import expected_tensors
from runtime.processes import Refused, writable

LLADA_8B = {
    "model_type": "llada", "d_model": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 32, "mlp_hidden_size": 12288,
    "vocab_size": 126464, "embedding_size": 126464, "mask_token_id": 126336, "eos_token_id": 126081, "rope": True,
    "rope_theta": 500000.0, "rope_full_precision": True, "layer_norm_type": "rms", "rms_norm_eps": 1e-5,
    "activation_type": "silu", "block_type": "llama", "weight_tying": False, "max_sequence_length": 4096}
DREAM_7B = {
    "model_type": "Dream", "hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28,
    "num_key_value_heads": 4, "intermediate_size": 18944, "vocab_size": 152064, "mask_token_id": 151666,
    "eos_token_id": 151643, "rope_theta": 1e6, "rms_norm_eps": 1e-6, "max_position_embeddings": 131072}
SHAPES = {"llada-8b": LLADA_8B, "llada-8b-instruct": LLADA_8B, "llada-1.5": LLADA_8B, "dream-7b": DREAM_7B,
          "dream-7b-instruct": DREAM_7B}
OUTLIERS = 16  # channels of every norm that get a large gain


def published(name: str, blocks: int | None = None) -> dict:
    """config.json of a published shape, with fewer `blocks` than it has if a number is given.

    Raises Refused for a name without a shape and for a number of blocks that the model does not have.
    """
    if name not in SHAPES:
        raise Refused(f"--model {name!r}: shapes are known of {', '.join(SHAPES)}.")
    key = "n_layers" if "n_layers" in SHAPES[name] else "num_hidden_layers"
    if blocks is not None and not 1 <= blocks <= SHAPES[name][key]:
        raise Refused(f"--blocks {blocks} is not between 1 and {SHAPES[name][key]}.")
    return SHAPES[name] | ({key: blocks} if blocks else {})


def write_checkpoint(model: str, folder: Path, blocks: int | None = None, gain: float = 30.0, seed: int = 0) -> int:
    """Write a bf16 checkpoint of published shape, one shard for each block; returns the bytes of its tensors.

    Weights are normal with standard deviation 0.02. Every norm has OUTLIERS channels with `gain` in place of 1, because
    models of this size have outlier channels. The tokenizer is the embedded model's. Raises Refused as `published`, and
    if the folder is not empty.
    """
    raw = published(model, blocks)
    if folder.exists() and any(folder.iterdir()):
        raise Refused(f"{folder} is not empty; choose another folder.")
    config, generator = read_config(raw), torch.Generator().manual_seed(seed)
    size, home = 2 * sum(map(prod, expected_tensors(config).values())), writable(folder, "--write")
    if size > (free := shutil.disk_usage(home).free):
        raise Refused(f"--write takes {size / 1e9:.4g} GB, but {home} has {free / 1e9:.4g} GB left; lower --blocks.")
    folder.mkdir(parents=True, exist_ok=True)
    prefixes = [*(NAMES[config.family].block.format(i) + "." for i in range(config.n_layers)), ""]
    left = expected_tensors(config)
    for i, prefix in enumerate(prefixes):
        tensors = {}
        for name in [name for name in left if name.startswith(prefix)]:
            shape = left.pop(name)
            values = tensors[name] = torch.empty(shape, dtype=torch.bfloat16)
            if len(shape) == 1 and not name.endswith("bias"):  # the gain of a norm
                values.fill_(1)[torch.randperm(shape[0], generator=generator)[:OUTLIERS]] = gain
            else:
                values.normal_(std=0.02, generator=generator)
        write_tensors(folder / shard_name(i, len(prefixes)), tensors)
    write_index(folder, len(prefixes), checksums=False)  # which would be computed again at every opening
    write_json(folder / "config.json", raw)
    shutil.copy(resolve("tiny") / "tokenizer.json", folder)
    return size
