"""One model judged, or two compared: python evaluate.py --model Q [--against F] [--data FILE]

With --data the text is cut into segments, on which NELBO and KL are estimated. Then a model continues the first tokens
of every segment by as many again: one token a pass, to compare trajectories, and in parallel at --threshold, to count
the passes. The models are loaded one after the other.
"""

import torch
from torch import nn

from calibration.segments import calibration_texts, held_out_segments
from checkpoint.folder import Checkpoint, resolve
from checkpoint.tokenizer import load_tokenizer
from model import load_model
from runtime import measures
from runtime.layers import rebuilt
from runtime.processes import Refused, threads_for
from runtime.sampling import check_length
from tiny import metrics, tasks

MEASURES = {"nelbo": "NELBO, nats/token", "kl": "KL from it, nats/token", "math": "math, accuracy",
            "code": "code, accuracy", "cloze": "cloze, accuracy", "tokens": "same final token",
            "positions": "committed at the same step", "divergence": "first difference, share of the steps",
            "passes": "in parallel: passes per answer", "math_parallel": "in parallel: math, accuracy",
            "code_parallel": "in parallel: code, accuracy"}


def report(values: dict[str, torch.Tensor], reference: dict[str, torch.Tensor] | None = None) -> tuple[str, dict]:
    """A Markdown table of means with 95 % intervals (and paired differences), and the same as numbers."""
    header, rows, numbers = ["measure", "value", "95 % interval"], [], {}
    for key, per_example in values.items():
        mean, low, high = numbers[key] = measures.bootstrap(per_example)
        rows.append([MEASURES[key], f"{mean:.4f}", f"{low:.4f} to {high:.4f}"] + ["", ""] * bool(reference))
        if key in (reference or {}):
            mean, low, high = numbers[f"{key}_difference"] = measures.bootstrap(per_example - reference[key])
            rows[-1][3:] = f"{mean:+.4f}", f"{low:+.4f} to {high:+.4f}"
    return measures.markdown_table(header + ["against it", "95 % interval"] * bool(reference), rows), numbers


def checkpoints(args) -> dict[str, Checkpoint]:
    """{name: folder} of the model to compare with, if any, and of the judged one. Refused if they do not compare."""
    found = {name: Checkpoint(resolve(name)) for name in (args.against, args.model) if name}
    tokenizers = {name: load_tokenizer(checkpoint.folder) for name, checkpoint in found.items()}
    for name, tokenizer in tokenizers.items():
        if tokenizer is None:
            raise Refused(f"{name} has no tokenizer.json, which text needs.")
    tokens = {tuple(sorted(tokenizer.get_vocab().items())) for tokenizer in tokenizers.values()}
    if len(tokens) > 1 or len({checkpoint.config.vocab_size for checkpoint in found.values()}) > 1:
        raise Refused(f"{args.model} and {args.against} have different vocabularies and cannot be compared.")
    return found


def judge(args) -> dict:
    """Every measure of the model, and of the one it is compared with, as a printed table and as numbers by name."""
    found = checkpoints(args)
    with threads_for(max(checkpoint.config.d_model for checkpoint in found.values())):
        measured, record = (on_text if args.data else on_tasks)(args, found)
    record |= {"threshold": args.threshold, "seed": args.seed, "torch": torch.__version__}
    for name in found:
        (values, paths), reference = measured[name], None
        if name == args.model and args.against:
            reference, other = measured[args.against]
            values = values | metrics.agreement(paths, other)
        text, record[name] = report(values, reference)
        print(f"\n**{name}**" + (f" against {args.against}" if reference else "") + f"\n\n{text}")
    return record


def on_text(args, found: dict[str, Checkpoint]):
    """({name: (values per segment, {"text": trajectory})}, what the record says about the text)."""
    length = args.length or (64 if all(tasks.knows_our_tasks(c.folder) for c in found.values()) else 256)
    answer, (_, last) = args.gen_length or min(32, length // 2), list(found.items())[-1]
    if 2 * answer > length:
        raise Refused(f"--gen-length {answer} needs a prompt of as many tokens, but a segment has {length}; lower it.")
    check_length(last.config, length)
    segments = held_out_segments(load_tokenizer(last.folder), calibration_texts(args.data), args.segments, length,
                                 args.seed)
    if len(segments) < 2:
        raise Refused(f"{args.data} is too short for two segments of {length} tokens; lower --length.")
    print(f"{len(segments)} segments of {length} tokens from {args.data}; {answer} tokens are written after the first "
          f"{answer} of each, in parallel at τ = {args.threshold:g}")
    copies = measures.judged_copies(segments, None, last.config.mask_id, seed=args.seed)
    measured, reference = {}, None
    for name in found:
        model = load_model(name, args.device, args.dtype, args.weights)
        with measures.progress_bar(len(model.blocks) + 2 * len(segments), name) as bar:
            outer = rebuilt(model, blocks=nn.ModuleList())  # what stays in memory when the next model comes
            predicted = measures.predictions(outer, model.blocks, copies.noisy, bar.update)
            values = measures.likelihoods(copies, predicted, reference)
            path = measures.trajectory(model, segments[:, :answer], answer, answer, progress=bar.update)
            fast = measures.trajectory(model, segments[:, :answer], None, answer, args.threshold, progress=bar.update)
        measured[name], reference = (values | {"passes": fast.passes}, {"text": path}), predicted
        del model
    return measured, {"data": args.data, "segments": len(segments), "length": length, "gen_length": answer}


def on_tasks(args, found: dict[str, Checkpoint]):
    """({name: (values per example, {task: trajectory})}, what the record says about the problems)."""
    for name, checkpoint in found.items():
        if not tasks.knows_our_tasks(checkpoint.folder):
            raise Refused(f"{name} was not trained on the embedded tasks; give a text to judge it on: --data FILE.")
    models = {name: load_model(name, args.device, args.dtype, args.weights) for name in found}
    measured, other = {}, models.get(args.against)
    for name, model in models.items():
        values, paths = metrics.scores(model, args.problems, args.seed, label=name,
                                       reference=None if model is other else other)
        fast = metrics.parallel(model, args.problems, args.seed, args.threshold, f"{name}, in parallel")
        values["passes"] = torch.cat([fast[f"{task}_passes"] for task in metrics.GENERATION])
        values |= {f"{task}_parallel": fast[task] for task in metrics.GENERATION}
        measured[name] = values, paths
    return measured, {"problems": args.problems}
