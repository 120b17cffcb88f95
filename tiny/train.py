"""Train a masked-diffusion language model like the embedded one: python -m tiny.train [--minutes 90] [--device cuda]

Objective
    It is LLaDA's: draw a masking ratio t ~ U(0, 1), replace tokens of the trained region by [MASK] with probability t,
    and minimize the cross-entropy of the masked tokens divided by t. English is trained as in LLaDA's pre-training: the
    region is the whole segment. Math and code are trained as in its supervised fine-tuning: the region is the answer,
    with the end-of-text tokens that fill it up.

Command
    --seed determines everything but the time. The learning rate falls linearly to zero over --steps, or sooner if
    --minutes run out. Progress goes to standard error, one line of JSON to standard output.
"""

import sys
import time
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from checkpoint.families import read_config
from checkpoint.folder import INDEX, read_json, resolve, write_json
from model import DiffusionLM, load_model
from runtime import processes, sampling
from runtime.layers import QuantLinear
from runtime.processes import Parser, Refused, pick_device
from tiny import tasks

VOCAB = 1024
SPECIALS = ("<|startoftext|>", "<|endoftext|>", "<|mdm_mask|>")
CONFIG = {
    "model_type": "llada", "architectures": ["LLaDAModelLM"], "d_model": 192, "n_layers": 5, "n_heads": 6,
    "n_kv_heads": 6, "mlp_hidden_size": 576, "vocab_size": VOCAB, "embedding_size": VOCAB,
    "max_sequence_length": 256, "rope": True, "rope_theta": 10000.0, "rope_full_precision": True, "alibi": False,
    "layer_norm_type": "rms", "layer_norm_with_affine": True, "bias_for_layer_norm": False, "rms_norm_eps": 1e-5,
    "attention_layer_norm": False, "input_emb_norm": False, "include_bias": False, "include_qkv_bias": False,
    "activation_type": "silu", "block_type": "llama", "block_group_size": 1, "multi_query_attention": None,
    "weight_tying": False, "scale_logits": False,
}
MIX = ("chain", "math", "chain", "english", "chain", "math", "chain", "code")  # domains of consecutive batches
T_MIN = 1e-3


@cache
def train_tokenizer(seed: int) -> Tokenizer:
    """Byte-level BPE over the training split; every digit is a token of its own, as in LLaDA's tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    texts = [p.prompt + p.answer for t in ("math", "code") for p in tasks.problems(t, "train", 5000, seed)]
    trainer = trainers.BpeTrainer(vocab_size=VOCAB - len(SPECIALS), show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator([*tasks.english_documents("train"), *texts], trainer)
    tokenizer.add_special_tokens(list(SPECIALS))  # the highest ids, as in LLaDA's vocabulary
    return tokenizer


def training_batch(tokenizer, step: int, tokens: int, mask_id: int, seed: int):
    """One batch of about `tokens` tokens of one domain: clean ids, masked ids, weights (n, L), size of the region."""
    domain, key = MIX[step % len(MIX)], seed * 1_000_003 + step
    if domain == "chain":
        ids, noisy, ahead = tasks.chain_tokens(tokenizer, tokens // 72, key, mask_id)
        return ids, noisy, ahead.float(), ahead.sum()
    if domain == "english":
        ids, region = tasks.english_segments(tokenizer, "train", tokens // 96, 96, key)
    elif domain == "sums":
        ids, region = tasks.sum_tokens(tokenizer, tokens // 48, 48, key)
    else:
        ids, region = tasks.problem_tokens(tokenizer, domain, "train", tokens // 56, key)
    g = torch.Generator().manual_seed(key)
    t = sampling.stratified_ratios(len(ids), g, T_MIN)
    return ids, sampling.mask_tokens(ids, region, t, mask_id, g), (1 / t)[:, None].expand(ids.shape), region.sum()


def diffusion_loss(model, clean, noisy, weight, region_size):
    """1/|region| · Σ over masked tokens of weight · CE; with weight 1/t the negative evidence bound per token, nats."""
    where = noisy == model.mask_id
    logits = model.logits(model.hidden(noisy)[where]).float()
    ce = F.cross_entropy(logits, clean[where], reduction="none")
    return (ce * weight[where]).sum() / region_size


def fresh_model(seed: int) -> DiffusionLM:
    """The embedded model before training: its tokenizer, and random weights."""
    torch.manual_seed(seed)
    tokenizer = train_tokenizer(seed)
    end, mask = (tokenizer.token_to_id(name) for name in ("<|endoftext|>", "<|mdm_mask|>"))
    raw = CONFIG | {"eos_token_id": end, "pad_token_id": end, "mask_token_id": mask}
    model = DiffusionLM(read_config(raw), tokenizer)
    for p in model.parameters():
        if p.ndim == 2:
            torch.nn.init.normal_(p, std=0.02 if p.shape[0] == VOCAB else p.shape[1] ** -0.5 * 0.7)
    for block in model.blocks:  # residual branches start small (Mitchell-like initialization, as LLaDA's)
        for linear in (block.out, block.down):
            linear.weight.data /= (2 * len(model.blocks)) ** 0.5
    return model


def trained_model(folder: str) -> DiffusionLM:
    """The model of a folder, to be trained on."""
    model = load_model(folder, "cpu", torch.float32)
    if model.tokenizer is None or any(model.tokenizer.token_to_id(name) is None for name in SPECIALS):
        raise Refused(f"--init {folder} has no tokenizer with {', '.join(SPECIALS)}; give a model of this command.")
    if any(isinstance(m, QuantLinear) for m in model.modules()):
        raise Refused(f"--init {folder} is quantized; give the 16-bit model.")
    return model.requires_grad_(True)


def run(args) -> dict:
    for name, least, most in (("steps", 1, 10**9), ("tokens", 96, 10**9), ("seed", 0, 2**31)):
        if not least <= getattr(args, name) <= most:
            raise Refused(f"--{name} {getattr(args, name)} is not between {least} and {most}.")
    if not (args.minutes > 0 and 0 < args.lr < 1):
        raise Refused("--minutes must be above 0, and --lr between 0 and 1.")
    if args.out.exists() and not args.out.is_dir():
        raise Refused(f"--out {args.out} is not a folder; choose another one.")
    ours = args.init and args.out.resolve() == resolve(args.init).resolve()
    if not (args.overwrite or ours) and args.out.is_dir() and any(args.out.iterdir()):
        raise Refused(f"--out {args.out} is not empty; choose another folder, or add --overwrite to replace the model.")
    if (args.out / INDEX).exists():
        raise Refused(f"--out {args.out} holds {INDEX} of another model, which would hide the trained one; choose "
                      f"another folder.")
    device = pick_device(args.device)
    model = (trained_model(args.init) if args.init else fresh_model(args.seed)).to(device)
    earlier = Path(args.init or "", "training.json")
    phases = read_json(earlier)["phases"] if args.init and earlier.is_file() else []
    args.out.mkdir(parents=True, exist_ok=True)
    decay = [p for p in model.parameters() if p.ndim == 2]
    rest = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW([{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}],
                                  lr=args.lr, betas=(0.9, 0.98))
    start, curve, mean = time.time(), [], {}
    for step in range(args.steps):
        done = max(step / args.steps, (time.time() - start) / 60 / args.minutes)
        if step and done >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1, (step + 1) / 200) * (1 - min(done, 1))
        batch = [x.to(device) for x in training_batch(model.tokenizer, step, args.tokens, model.mask_id, args.seed)]
        loss = diffusion_loss(model, *batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        domain, taken = MIX[step % len(MIX)], step + 1
        mean[domain] = 0.97 * mean.get(domain, loss.item()) + 0.03 * loss.item()
        if taken % 100 == 0:
            curve.append({"step": taken, "minutes": round((time.time() - start) / 60, 1),
                          **{k: round(v, 4) for k, v in mean.items()}})
            print(curve[-1], file=sys.stderr, flush=True)
        if taken % 1000 == 0:
            model.save(args.out, dtype=torch.bfloat16)
    model.save(args.out, dtype=torch.bfloat16)
    phases.append({"mix": MIX, "steps": taken, "seconds": round(time.time() - start), "torch": torch.__version__,
                   "args": {k: str(v) for k, v in vars(args).items() if k not in ("init", "out")}, "curve": curve})
    totals = {k: sum(p[k] for p in phases) for k in ("steps", "seconds")}
    write_json(args.out / "training.json", {**totals, "phases": phases})
    return {"out": str(args.out), "steps": taken, "seconds": phases[-1]["seconds"], **mean}


def main(argv=None) -> int:
    parser = Parser("python -m tiny.train", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("out/trained"), help="folder of the model (out/trained)")
    parser.add_argument("--overwrite", action="store_true", help="replace what is in --out")
    parser.add_argument("--init", help="continue from the weights and tokenizer of this folder")
    parser.add_argument("--steps", type=int, default=5200)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="end the schedule early after this time")
    parser.add_argument("--tokens", type=int, default=3072, help="tokens per batch")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda")
    return processes.run("python -m tiny.train", run, parser.parse_args(argv), "--tokens",
                         "Weights are saved every 1000 steps.")


if __name__ == "__main__":
    sys.exit(main())
