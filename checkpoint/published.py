"""The published shapes of LLaDA-8B and Dream-7B, and checkpoints of those shapes with random weights."""

import json
import shutil
import sys
from pathlib import Path

import torch

from checkpoint.families import NAMES, read_config
from checkpoint.folder import INDEX, resolve, write_json, write_tensors
from checkpoint.loading import expected_tensors
from runtime.processes import Parser, Refused

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
OUTLIERS = 16  # channels of every norm whose gain is planted at `gain` times the others'


def published(name: str, blocks: int | None = None) -> dict:
    """config.json of a published shape, with fewer blocks than it has where that is asked for."""
    if name not in SHAPES:
        raise Refused(f"--model {name!r}: shapes are known of {', '.join(SHAPES)}.")
    key = "n_layers" if "n_layers" in SHAPES[name] else "num_hidden_layers"
    if blocks is not None and not 1 <= blocks <= SHAPES[name][key]:
        raise Refused(f"--blocks {blocks} is not between 1 and {SHAPES[name][key]}.")
    return SHAPES[name] | ({key: blocks} if blocks else {})


def write_checkpoint(name: str, folder: Path, blocks: int | None = None, gain: float = 30.0, seed: int = 0) -> int:
    """A bf16 checkpoint of published shape in its family's own layout, one shard a block; returns its bytes.

    Weights are normal with standard deviation 0.02; OUTLIERS channels of each norm are `gain` times as loud as the
    others, as crest factors of 8B models are. Text is encoded by the embedded model's tokenizer.
    """
    raw = published(name, blocks)
    if folder.exists() and any(folder.iterdir()):
        raise Refused(f"{folder} is not empty; choose another --out.")
    folder.mkdir(parents=True, exist_ok=True)
    config, generator = read_config(raw), torch.Generator().manual_seed(seed)
    prefixes = [NAMES[config.family].block.format(i) + "." for i in range(config.n_layers)]
    shards: dict[str, dict] = {p: {} for p in (*prefixes, "")}
    for tensor, shape in expected_tensors(config).items():
        shards[next(p for p in shards if tensor.startswith(p))][tensor] = shape
    weight_map, size = {}, 0
    for i, shapes in enumerate(shards.values()):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        tensors = {}
        for tensor, shape in shapes.items():
            values = torch.empty(shape, dtype=torch.bfloat16)
            if len(shape) == 1 and not tensor.endswith("bias"):  # the gain of a norm
                values.fill_(1)[torch.randperm(shape[0], generator=generator)[:OUTLIERS]] = gain
            else:
                values.normal_(std=0.02, generator=generator)
            tensors[tensor] = values
            size += 2 * values.numel()
        write_tensors(folder / file, tensors)
        weight_map |= dict.fromkeys(tensors, file)
    write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map})
    write_json(folder / "config.json", raw)
    shutil.copy(resolve("tiny") / "tokenizer.json", folder)
    return size


def main(argv=None) -> int:
    parser = Parser("twins.py", description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="llada-8b", help=f"one of {', '.join(SHAPES)}")
    parser.add_argument("--blocks", type=int, help="fewer blocks than the published model (all)")
    parser.add_argument("--gain", type=float, default=30.0, help="size of the outlier channels (30)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint")
    args = parser.parse_args(argv)
    try:
        size = write_checkpoint(args.model, args.out, args.blocks, args.gain, args.seed)
    except Refused as error:
        print(f"twins.py: {error}", file=sys.stderr)
        return 2
    print(json.dumps({"model": args.model, "blocks": args.blocks, "bytes": size, "out": str(args.out)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
