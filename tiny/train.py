"""Train a masked-diffusion language model like the embedded one: python -m tiny.train --out FOLDER

Objective
    It is LLaDA's: draw a masking ratio t ~ U(0, 1), replace tokens of the trained region by [MASK] with probability t,
    and minimize the cross-entropy of the masked tokens divided by t. English is trained as in LLaDA's pre-training: the
    region is the whole segment. Math and code are trained as in its supervised fine-tuning: the region is the answer,
    with the end-of-text tokens that fill it up.

Phases
    A phase takes its batches from the domains of its mix, in turn. Its learning rate rises for 200 steps and falls
    linearly to zero over --steps, or sooner if --minutes run out. --seed determines everything but the time.

`docs/tiny.md` says how a run goes on after an interruption, and how the embedded model was trained.
"""

import json
import math
import signal
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open

from checkpoint.families import read_config
from checkpoint.folder import SINGLE, hold, read_json, resolve, write_json, write_tensors
from checkpoint.tokenizer import load_tokenizer
from model import DiffusionLM, load_model
from runtime import processes, sampling
from runtime.layers import QuantLinear
from runtime.processes import Parser, Refused, pick_device
from tiny import tasks

CONFIG = read_json(resolve("tiny") / "config.json")
DOMAINS = ("chain", "code", "english", "math", "sums")
SIZES = {"width": CONFIG["d_model"], "layers": CONFIG["n_layers"]}
HEAD = CONFIG["d_model"] // CONFIG["n_heads"]  # channels of a head
DEFAULTS = {"steps": 5200, "minutes": math.inf, "tokens": 3072, "lr": 2e-3, "seed": 0}
RECORD, PROGRESS = "training.json", "resume.safetensors"
WARM_UP = EVERY = 200  # steps in which the learning rate rises, and between two writings


def training_batch(tokenizer, domain: str, tokens: int, mask_id: int, key: int):
    """One batch of about `tokens` tokens of a domain: clean ids, masked ids, weights (n, L), size of the region."""
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
    t = sampling.stratified_ratios(len(ids), g, 1e-3)
    return ids, sampling.mask_tokens(ids, region, t, mask_id, g), (1 / t)[:, None].expand(ids.shape), region.sum()


def diffusion_loss(model, clean, noisy, weight, region_size):
    """1/|region| · Σ over masked tokens of weight · CE; with weight 1/t the negative evidence bound per token, nats."""
    where = noisy == model.mask_id
    logits = model.logits(model.hidden(noisy)[where]).float()
    ce = F.cross_entropy(logits, clean[where], reduction="none")
    return (ce * weight[where]).sum() / region_size


def fresh_model(seed: int, width: int = SIZES["width"], layers: int = SIZES["layers"]) -> DiffusionLM:
    """The embedded model before training, or one of another size: its config, its tokenizer, and random weights."""
    torch.manual_seed(seed)
    sizes = {"d_model": width, "n_layers": layers, "n_heads": width // HEAD, "n_kv_heads": width // HEAD,
             "mlp_hidden_size": width * CONFIG["mlp_hidden_size"] // CONFIG["d_model"]}
    model = DiffusionLM(read_config(CONFIG | sizes), load_tokenizer(resolve("tiny")))
    for p in model.parameters():
        if p.ndim == 2:
            torch.nn.init.normal_(p, std=0.02 if len(p) == model.config.vocab_size else p.shape[1] ** -0.5 * 0.7)
    for block in model.blocks:  # residual branches start small (Mitchell-like initialization, as LLaDA's)
        for linear in (block.out, block.down):
            linear.weight.data /= (2 * len(model.blocks)) ** 0.5
    return model


def trained_model(folder: str) -> DiffusionLM:
    """The model of a folder, to be trained on."""
    model = load_model(folder, "cpu", torch.float32)
    if model.tokenizer is None or model.tokenizer.token_to_id("<|endoftext|>") is None:
        raise Refused(f"--init {folder} has no tokenizer with <|endoftext|>; give a model of this command.")
    if any(isinstance(m, QuantLinear) for m in model.modules()):
        raise Refused(f"--init {folder} is quantized; give the 16-bit model.")
    return model.requires_grad_(True)

# ---- what is trained -------------------------------------------------------------------------------------------------


def shipped_phases() -> list[dict]:
    """The phases that made the embedded model, from its record: mix, steps to take, and arguments.

    Some phases were cut short, and in some the learning rate fell with the minutes. Here it falls with the steps, as
    far as it fell there: the argument `steps` is the step at which it would be zero.
    """
    phases = []
    for p in read_json(resolve("tiny") / RECORD)["phases"]:
        known = {name: type(value)(p["args"][name]) for name, value in DEFAULTS.items()}
        over = max(p["steps"] / known["steps"], p["seconds"] / 60 / known["minutes"])  # share of the schedule
        known |= {"steps": max(p["steps"], round(p["steps"] / over)), "minutes": math.inf}
        phases.append({"mix": p["mix"], "steps": p["steps"], "args": known})
    return phases


def phases_of(args) -> list[dict]:
    """What a command trains; fills the defaults in. Raises Refused for arguments that cannot be."""
    given = [f"--{name}" for name in ("init", *SIZES, "mix", *DEFAULTS) if getattr(args, name) is not None]
    if args.init and (sizes := [name for name in given if name[2:] in SIZES]):
        raise Refused(f"{' and '.join(sizes)} cannot stand beside --init, whose model has its size.")
    if args.preset:
        if given:
            raise Refused(f"--preset {args.preset} cannot stand beside {', '.join(given)}; leave one of them out.")
        vars(args).update(SIZES)
        return shipped_phases()
    defaults = {"mix": ",".join(shipped_phases()[-1]["mix"]), **SIZES, **DEFAULTS}
    vars(args).update({name: value for name, value in defaults.items() if getattr(args, name) is None})
    for name, least, most in (("width", HEAD, 10**5), ("layers", 1, 10**4), ("steps", 1, 10**9), ("tokens", 96, 10**9),
                              ("seed", 0, 2**31)):
        if not least <= getattr(args, name) <= most:
            raise Refused(f"--{name} {getattr(args, name)} is not between {least} and {most}.")
    if args.width % HEAD:
        raise Refused(f"--width {args.width} is no multiple of {HEAD}, the channels of a head.")
    if not (args.minutes > 0 and 0 < args.lr < 1):
        raise Refused("--minutes must be above 0, and --lr between 0 and 1.")
    if wrong := [domain for domain in args.mix.split(",") if domain not in DOMAINS]:
        raise Refused(f"--mix: {wrong[0]!r} is none of {', '.join(DOMAINS)}.")
    return [{"mix": args.mix.split(","), "steps": args.steps, "args": {name: getattr(args, name) for name in DEFAULTS}}]

# ---- what survives ---------------------------------------------------------------------------------------------------


def survey(out: Path, resume: bool, overwrite: bool) -> None:
    """Refused if --out cannot be written to, or holds what must not be replaced or cannot go on."""
    processes.writable(out, "--out")
    names = {p.name for p in out.iterdir() if not p.name.startswith(".")} if out.exists() else set()
    if resume:
        if not names & {PROGRESS, RECORD}:
            raise Refused(f"--out {out} holds no training that could go on; leave --resume out.")
    elif names and not overwrite:
        how = "--resume to go on with its training, or " if PROGRESS in names else ""
        raise Refused(f"--out {out} is not empty; choose another folder, or add {how}--overwrite to replace the model.")
    elif foreign := names - {"config.json", SINGLE, "tokenizer.json", RECORD, PROGRESS}:
        raise Refused(f"--out {out} holds {min(foreign)}, which this command does not write; choose another folder.")


def left_by(args) -> str:
    """What an interrupted run leaves in --out, in a sentence."""
    if not (args.out / PROGRESS).exists():
        return f"Nothing was written to {args.out}."
    again = "--resume" + " instead of --overwrite" * args.overwrite
    return f"Go on from {args.out / PROGRESS} by the same command and {again}."


def read_progress(path: Path, command: dict) -> tuple[dict, dict]:
    """The progress and the tensors that `save` wrote; Refused if they are damaged or another command's."""
    try:
        with safe_open(path, "pt") as file:
            progress = json.loads(file.metadata()["progress"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (the handle is no dict)
        before = SIZES | progress["command"]  # which older runs did not name
        changed = [f"--{k} was {before[k]!r} and is {v!r}" for k, v in command.items() if before[k] != v]
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise Refused(f"{path} cannot be read ({error}); begin again with --overwrite.") from None
    if changed:
        raise Refused(f"cannot resume {path.parent}: {', '.join(changed)} now.")
    return progress, tensors


def totals(phases: list[dict]) -> dict:
    return {name: round(sum(p[name] for p in phases)) for name in ("steps", "seconds")}


def save(folder: Path, model, optimizer, progress: dict) -> None:
    """Write what the run needs to go on, and then the model: a full disk leaves what was there before."""
    tensors = {f"{kind}/{name}": tensor for name, p in model.named_parameters()
               for kind, tensor in {"weight": p, **optimizer.state[p]}.items()}
    write_tensors(folder / PROGRESS, tensors, {"progress": json.dumps(progress)})
    if progress["phases"][-1]["steps"]:
        model.save(folder, dtype=torch.bfloat16)
        write_json(folder / RECORD, {**totals(progress["phases"]), "phases": progress["phases"]})


def resumed_optimizer(model, tensors: dict) -> torch.optim.AdamW:
    """The optimizer of a phase; tensors: weights and optimizer of an interrupted run, which go to their places."""
    parameters = dict(model.named_parameters())
    optimizer = torch.optim.AdamW([{"params": [p for p in parameters.values() if (p.ndim == 2) == matrices],
                                    "weight_decay": 0.1 * matrices} for matrices in (True, False)], betas=(0.9, 0.98))
    for key, tensor in tensors.items():
        kind, _, name = key.partition("/")
        if kind == "weight":
            parameters[name].data.copy_(tensor)
        else:  # the count of steps, which has no dimension, stays on the CPU
            optimizer.state[parameters[name]][kind] = tensor.to(model.device) if tensor.ndim else tensor
    return optimizer

# ---- the training ----------------------------------------------------------------------------------------------------


def train_phase(model, phase: dict, record: dict, tensors: dict, write, interrupted: list, name: str) -> None:
    """Train from step record["steps"] on. write(optimizer): keep everything. interrupted: not empty after a Ctrl-C."""
    optimizer, args, losses = resumed_optimizer(model, tensors), phase["args"], record["loss"]
    start = time.time() - record["seconds"]
    shown = "{desc} {n_fmt}/{total_fmt} |{bar}| {remaining} left{postfix}"
    with processes.Bar(total=phase["steps"], initial=record["steps"], desc=name, bar_format=shown) as bar:
        for step in range(record["steps"], phase["steps"]):
            done = max(step / args["steps"], record["seconds"] / 60 / args["minutes"])
            if interrupted or (step and done >= 1):
                break
            if step % EVERY == 0:
                write(optimizer)
            for group in optimizer.param_groups:
                group["lr"] = args["lr"] * min(1, (step + 1) / WARM_UP) * (1 - done)
            domain, key = phase["mix"][step % len(phase["mix"])], args["seed"] * 1_000_003 + step
            batch = training_batch(model.tokenizer, domain, args["tokens"], model.mask_id, key)
            loss = diffusion_loss(model, *(x.to(model.device) for x in batch))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            if not (loss + norm).isfinite():
                raise Refused(f"step {step + 1} has no finite loss and gradient; lower --lr, or give another --init.")
            optimizer.step()
            losses[domain] = 0.97 * losses.get(domain, loss.item()) + 0.03 * loss.item()
            record["steps"], record["seconds"] = step + 1, round(time.time() - start, 1)
            if record["steps"] % 100 == 0:
                record["curve"].append({"step": record["steps"], "minutes": round(record["seconds"] / 60, 1),
                                        **{k: round(v, 4) for k, v in losses.items()}})
            if done:  # --minutes may end it sooner
                bar.total = min(phase["steps"], max(step + 1, round(step / done)))
            bar.set_postfix_str("loss " + " ".join(f"{k} {v:.3f}" for k, v in losses.items()), refresh=False)
            bar.update()
        write(optimizer)
    if interrupted:
        raise KeyboardInterrupt


def run(args) -> dict:
    phases, device, out = phases_of(args), pick_device(args.device), args.out
    command = {name: getattr(args, name) for name in ("init", "preset", "mix", *SIZES, *DEFAULTS)}
    survey(out, args.resume, args.overwrite)
    if args.resume and not (out / PROGRESS).exists():
        print(f"python -m tiny.train: {out} is complete; --init {out} and another --out train it on.", file=sys.stderr)
        return {"out": str(out), "complete": True}
    earlier = read_json(resolve(args.init) / RECORD, {}).get("phases", []) if args.init else []
    progress, tensors = {"command": command, "done": 0, "phases": earlier}, {}
    if args.resume:
        progress, tensors = read_progress(out / PROGRESS, command)
    model = (trained_model(args.init) if args.init else
             fresh_model(phases[0]["args"]["seed"], args.width, args.layers)).to(device)
    out.mkdir(parents=True, exist_ok=True)
    hold(out, model)
    interrupted = []  # the first Ctrl-C lets a step end, the second one stops at once
    before = signal.signal(signal.SIGINT, lambda *_: interrupted.append(signal.signal(signal.SIGINT, before)))
    try:
        for i, phase in enumerate(phases[progress["done"]:], progress["done"]):
            if not tensors:
                about = {k: str(v) for k, v in (phase["args"] | {"device": device}).items()}
                progress["phases"].append({"mix": phase["mix"], "steps": 0, "seconds": 0, "torch": torch.__version__,
                                           "args": about, "loss": {}, "curve": []})
            train_phase(model, phase, progress["phases"][-1], tensors, lambda o: save(out, model, o, progress),
                        interrupted, f"phase {i + 1}/{len(phases)}")
            for p in model.parameters():  # the next phase starts from the model as it was written
                p.data = p.data.bfloat16().float()
            progress["done"], tensors = i + 1, {}
    finally:
        signal.signal(signal.SIGINT, before)
    for path in (out / PROGRESS, *out.glob(".tmp??????")):  # the latter are the library's, of a run that was killed
        path.unlink()
    mine = progress["phases"][-len(phases):]
    return {"out": str(out), **totals(mine), **mine[-1]["loss"]}


def main(argv=None) -> int:
    parser = Parser("python -m tiny.train", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("out/trained"), help="folder of the model (out/trained)")
    again = parser.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="continue an interrupted run in --out")
    again.add_argument("--overwrite", action="store_true", help="replace the model in --out")
    parser.add_argument("--preset", choices=["shipped"], help="repeat the phases that made the embedded model")
    parser.add_argument("--init", type=lambda path: str(Path(path)), help="start from the model of this folder")
    parser.add_argument("--mix", help=f"domains of consecutive batches: {', '.join(DOMAINS)} (as in phase 8)")
    for name, meaning in (("width", "channels of a new model"), ("layers", "blocks of a new model")):
        parser.add_argument(f"--{name}", type=int, help=f"{meaning} ({SIZES[name]})")
    for name, meaning in (("steps", "length of the schedule"), ("minutes", "end the schedule after this time"),
                          ("tokens", "tokens per batch"), ("lr", "highest learning rate"), ("seed", "of all draws")):
        parser.add_argument(f"--{name}", type=type(DEFAULTS[name]), help=f"{meaning} ({DEFAULTS[name]})")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda")
    args = parser.parse_args(argv)
    return processes.run("python -m tiny.train", run, args, "--tokens", lambda: left_by(args))


if __name__ == "__main__":
    sys.exit(main())
