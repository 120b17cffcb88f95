"""When does a gate pay? python -m experiments.gates [--model FOLDER] [--stress 4] [--out out/gates]

A gate G_s (Eq. 9) zeroes the d_s channels of z = x P that belong to the other state. Per linear and state, against the
same P without gates,

    it gains    the rounding noise of those channels, ‖(Q(z) − z) G_s^⊥ P_e Wᵀ‖²    about d_s/d of all noise: 1/32
    it loses    what those channels carried, the leakage of Eq. 28, ‖z G_s^⊥ P_e Wᵀ‖²

G_s^⊥ = I − G_s keeps the channels that the gate zeroes; P_e = P⁻¹. Zero is a value of every token's grid (Eq. 4), so
rounding a channel leaves at most what it carries: |Q(z) − z| ≤ |z|. On the same grid a gate therefore gains nothing,
channel by channel. It can pay only where what it takes away cancels errors of other channels in the output, or where it
removes a token's outlier and so makes the grid finer.

Of a 16-bit model of the embedded tasks this program prints three tables.
    The balance of every gate, for P drawn, trained (App. B) or allocated in closed form, with exact weights.
    The same for drawn P where tokens live in fewer directions. The construction: in the channels that their gate
    zeroes, their energy is cut to a share ρ. The function of the model changes with it.
    KL from 16 bit of trained models (Kronecker P, no TAC) with all gates, with those that pay, and with none.
Of a quantized model with gates it prints the balance of each of its own, so that it can be measured on any checkpoint.
All is measured on held-out text. Which gates pay is decided on calibration text of another seed.
"""

import json
import sys
from functools import partial
from pathlib import Path

import torch
from torch import nn

from calibrate import quantize_model
from calibration.segments import calibration_texts, masked_copies, text_segments
from calibration.streams import inputs_of, run_block
from checkpoint.families import FUSED
from checkpoint.folder import Checkpoint, resolve
from experiments.cells import Run, current_commit
from experiments.rows import NO_TAC
from methods import QuantConfig
from methods.sgat import allocate_subspaces, initial_basis
from model import load_model
from runtime import processes
from runtime.cpu import fake_quantize_rows
from runtime.layers import rebuilt
from runtime.measures import bootstrap, interval, markdown_table
from runtime.processes import Refused
from starquant import apply_basis, fold_weight, linear, subspace_gates
from tiny import metrics, tasks

SEED, KL_SEEDS, SEQUENCES = 20, range(10, 13), 100
STATES = "masked", "unmasked"
LEFT = 0.1, 0.03, 0.01, 0.003, 0.001, 0  # ρ
BALANCE = ("noise, without gates", "of it in the gated channels", "leakage")


def gate_balance(z, folded, gate, bits: int = 4, clip=None) -> dict[str, float]:
    """Energies of the outputs (N, C) of one state's transformed tokens z (N, d), as shares of the energy of z W̃ᵀ.

    folded: W̃ (C, d). noise: of rounding without a gate; gated_noise: its part in the gated channels; leakage: Eq. 28;
    with_gate: of all that a gated, rounded token loses; same_grid: the same, on the grid that it has without a gate.
    """
    rounded = partial(fake_quantize_rows, bits=bits, clip=clip)
    error, whole = rounded(z) - z, linear(z, folded).square().sum()

    def share(part):
        return float(linear(part, folded).square().sum() / whole)

    return {"noise": share(error), "gated_noise": share(error * (1 - gate)), "leakage": share(z * (1 - gate)),
            "same_grid": share(error * gate - z * (1 - gate)), "with_gate": share(rounded(z * gate) - z)}


def balances(z, state, folded, gates, left: float = 1.0, **options) -> list[dict]:
    """`gate_balance` for both states of tokens z (N, d); left: the share ρ of energy in the gated channels."""
    return [{"state": label, **gate_balance(z[where] * (gate + left**0.5 * (1 - gate)), folded, gate, **options)}
            for label, where, gate in zip(STATES, (state, ~state), gates, strict=True)]


def bases(model, tokens, region, noisy):
    """{kind: basis of a linear by (block, name)}: drawn, trained and allocated, as a Kronecker product and dense."""
    seen, state = inputs_of(model, noisy), (noisy == model.mask_id).flatten().to(model.device)
    out, generator = {}, torch.Generator().manual_seed(SEED)
    for transform in ("kronecker", "dense"):
        config = QuantConfig(seed=SEED, tac="none", transform=transform)
        trained = quantize_model(model, tokens, config, region)
        kinds = {kind: {} for kind in ("random", "trained", "closed form")}
        for i, names in enumerate(seen):
            for name, x in names.items():
                x = x.flatten(0, 1).float()  # (N, d)
                d_s = x.shape[1] // config.state_fraction
                kinds["random"][i, name] = initial_basis(x.shape[1], transform, generator).to(x)
                kinds["trained"][i, name] = getattr(trained.blocks[i], name).P[0]
                kinds["closed form"][i, name] = allocate_subspaces(x, state, d_s, d_s, transform, generator).to(x)
        out |= {f"{kind}, {transform}": chosen for kind, chosen in kinds.items()}
    return out


@torch.no_grad()
def measure(model) -> dict[str, list[dict]]:
    """The balance of every gate, {kind of basis: [{"block", "linear", "state", ...}, ...]}, and with less energy."""
    tokens, region = tasks.calibration_set(model.tokenizer, 128, 64, SEED)
    noisy = masked_copies(tokens[:64], region[:64], model.mask_id, QuantConfig(seed=SEED))
    unseen = text(model, SEED + 1, "eval")
    seen, state = inputs_of(model, unseen), (unseen == model.mask_id).flatten().to(model.device)
    out = {}
    for kind, chosen in bases(model, tokens, region, noisy).items():
        for left in (1, *LEFT) if "random" in kind else (1,):
            rows = out[kind if left == 1 else f"{kind}, ρ = {left:g}"] = []
            for (i, name), P in chosen.items():
                weight, x = getattr(model.blocks[i], name).weight.float(), seen[i][name].flatten(0, 1).float()
                gates = subspace_gates(x.shape[1], x.shape[1] // 32, x.shape[1] // 32, x.device)
                rows += [{"block": i, "linear": name, **row} for row in balances(
                    apply_basis(x, P), state, fold_weight(weight, P), gates, left)]
    return out


def text(model, seed: int, split: str):
    """64 segments of 64 tokens with [MASK] in place, from a split of the embedded model's own text."""
    return masked_copies(*tasks.calibration_set(model.tokenizer, 64, 64, seed, split), model.mask_id,
                         QuantConfig(seed=seed))


@torch.no_grad()
def own_gates(model, noisy) -> list[dict]:
    """The balance of every gate of a quantized model for token ids noisy (n, L), block by block."""
    x, state, rope, _ = model.prepare(noisy.to(model.device))
    rows = []
    for i, block in enumerate(model.blocks):
        x, seen = run_block(block, x, state, rope, watch=FUSED)
        for name, inputs in seen.items():
            layer = getattr(block, name)
            if layer.d_m or layer.d_u:
                z = apply_basis(inputs.flatten(0, 1).float(), layer.P)
                rows += [{"block": i, "linear": name, **row} for row in balances(
                    z, state.flatten(), layer.weight(), layer.gates(z), bits=layer.abits, clip=layer.clip)]
    return rows


class KeptGates(nn.Module):
    """A gated linear in which the gates of some token states are kept, and those of the others switched off."""

    def __init__(self, layer, kept):
        super().__init__()
        self.layer, self.weight = layer, layer.weight()
        self.gates = [gate if label in kept else torch.ones_like(gate)
                      for label, gate in zip(STATES, layer.gates(self.weight), strict=True)]

    def forward(self, x, state):
        # Ŷ = Q(X P G_s) W̃ᵀ
        z = apply_basis(x.float(), self.layer.P) * torch.where(state[..., None], *self.gates)
        y = linear(fake_quantize_rows(z, self.layer.abits, self.layer.clip), self.weight)
        return self.layer.finish(y, state).to(x.dtype)


def keeping(model, kept):
    """The quantized model with those gates alone: kept holds (block, linear, state)."""
    blocks = [rebuilt(block, **{name: KeptGates(getattr(block, name), {s for s in STATES if (i, name, s) in kept})
                                for name in FUSED}) for i, block in enumerate(model.blocks)]
    return rebuilt(model, blocks=nn.ModuleList(blocks))


def end_to_end(job: Run) -> str:
    """A table: KL from 16 bit with all gates of SGAT's trained P, with those that pay on text of seed 0, with none."""
    found, counts = {"all": [], "paying": [], "none": []}, []
    for seed in KL_SEEDS:
        model = job.calibrated(json.dumps(NO_TAC), seed)
        gates = own_gates(model, text(model, 0, "calib"))
        kept = {"all": gates, "paying": [row for row in gates if row["with_gate"] < row["noise"]], "none": []}
        counts.append(str(len(kept["paying"])))
        for which, rows in kept.items():
            chosen = keeping(model, {(row["block"], row["linear"], row["state"]) for row in rows})
            found[which].append(metrics.scores(chosen, SEQUENCES, seed, True, which, job.model())[0]["kl"])
    kl = {which: torch.stack(values) for which, values in found.items()}  # (seeds, examples)
    differences = [interval(bootstrap(kl["paying"] - kl[other]), 1000, 1, "+") for other in ("all", "none")]
    return markdown_table(["gates that pay, by seed", "KL, all gates", "KL, those that pay", "KL, none",
                           "those that pay - all", "those that pay - none"],
                          [[f"{', '.join(counts)} of {len(gates)}",
                            *(interval(bootstrap(value), 1000, 1) for value in kl.values()), *differences]])


def summarize(measured: dict[str, list[dict]]) -> str:
    """A Markdown table: medians, and how often gates pay, would pay on the same grid, and were predicted to."""
    lines = []
    for kind, rows in measured.items():
        by = {key: torch.tensor([row[key] for row in rows], dtype=torch.float64) for key in
              ("noise", "gated_noise", "leakage", "same_grid", "with_gate")}
        pays, predicted = by["with_gate"] < by["noise"], by["leakage"] < by["gated_noise"]
        ratio = by["with_gate"] / by["noise"]
        lines.append([kind, *(f"{float(by[key].median()):.1e}" for key in ("noise", "gated_noise", "leakage")),
                      f"{float(ratio.median()):.3f} ({float(ratio.min()):.4f} to {float(ratio.max()):.2f})",
                      f"{int(pays.sum())} of {len(rows)}", int((by["same_grid"] < by["noise"]).sum()),
                      int((pays == predicted).sum())])
    return markdown_table(["P", *BALANCE, "loss with gates / without", "gates pay", "on the same grid",
                           "predicted right"], lines)


def listed(rows: list[dict]) -> str:
    """A Markdown table with a line for each gate."""
    return markdown_table(["block", "linear", "state", *BALANCE, "loss with gate / without", "pays"], [
        [row["block"], row["linear"], row["state"], *(f"{row[key]:.1e}" for key in ("noise", "gated_noise", "leakage")),
         f"{row['with_gate'] / row['noise']:.4f}", "yes" if row["with_gate"] < row["noise"] else "no"] for row in rows])


def of_quantized(args, ours: bool):
    """The table and the rows of a quantized model's own gates."""
    model = load_model(args.model, args.device)
    if ours:
        noisy = text(model, SEED + 1, "eval")
    else:
        ids, region = text_segments(model.tokenizer, calibration_texts(args.data), args.data or "winogrande", 64, 256,
                                    SEED + 1)
        noisy = masked_copies(ids, region, model.mask_id, QuantConfig(seed=SEED + 1))
    rows = own_gates(model, noisy)
    if not rows:
        raise Refused(f"{args.model} has no gates; give a folder that --method starquant or freeact wrote.")
    return listed(rows), rows


def of_16_bit(args, ours: bool):
    """The three tables of a 16-bit model, and the rows of the first."""
    if not ours:
        raise Refused(f"{args.model} is a 16-bit model that does not know the embedded tasks; give the folder that "
                      f"calibrate.py --method starquant makes of it.")
    job = Run(args.model, args.stress, SEQUENCES, True, args.device)
    measured = measure(job.model())
    fewer = {kind: rows for kind, rows in measured.items() if "random" in kind}
    rows = {kind: of_kind for kind, of_kind in measured.items() if "ρ" not in kind}
    return "\n\n".join((summarize(rows), summarize(fewer), end_to_end(job))), rows


def run(args) -> dict:
    checkpoint = Checkpoint(resolve(args.model))
    if checkpoint.quantization and args.stress != 1:
        raise Refused("--stress is for 16-bit models; give it to calibrate.py.")
    args.out.mkdir(parents=True, exist_ok=True)  # before minutes of work
    table, rows = (of_quantized if checkpoint.quantization else of_16_bit)(args, tasks.knows_our_tasks(
        checkpoint.folder))
    name, stressed = f"-{checkpoint.folder.name}" if checkpoint.quantization else "", args.stress != 1
    stem = args.out / f"gates{name}{f'-stress{args.stress:g}' * stressed}"
    note = (f"`python -m experiments.gates --model {args.model}{f' --data {args.data}' if args.data else ''}"
            f"{f' --stress {args.stress:g}' * stressed}`: torch {torch.__version__}, {args.device}, commit "
            f"{current_commit()}.")
    stem.with_suffix(".md").write_text(f"{table}\n\n{note}\n", encoding="utf-8")
    stem.with_suffix(".json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    print(table)
    return {"out": str(stem.with_suffix(".md"))}


def main(argv=None) -> int:
    parser = processes.Parser("experiments.gates", description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="tiny", help="tiny, a 16-bit folder of the embedded tasks, or any quantized "
                        "folder with gates")
    parser.add_argument("--data", help="held-out text of a quantized model that does not know the embedded tasks: a "
                        ".txt, .jsonl or .parquet file (winogrande)")
    parser.add_argument("--stress", type=float, default=1.0, metavar="C", help="outlier channels of scale C (1: off)")
    parser.add_argument("--device", default="cpu", help="auto, cpu, cuda")
    parser.add_argument("--out", type=Path, default=Path("out/gates"), help="folder of the table (out/gates)")
    return processes.run("experiments.gates", run, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
