"""When does a gate pay? python -m experiments.gates [--stress 4] [--out out/gates]

A gate G_s (Eq. 9) zeroes the d_s channels of z = x P that belong to the other state. Per linear and state, against the
same P without gates,

    it gains    the rounding noise of those channels, ‖(Q(z) − z) G_s^⊥ P_e Wᵀ‖²    about d_s/d of all noise: 1/32
    it loses    what those channels carried, the leakage of Eq. 28, ‖z G_s^⊥ P_e Wᵀ‖²

G_s^⊥ = I − G_s keeps the channels that the gate zeroes; P_e = P⁻¹. A gate pays where the leakage is below the noise
of the gated channels. It wins about the share d_s/d of the noise at most, unless it removes a token's outlier and so
its range. This program measures both sides, predicts by them, and compares with what quantizing with and without the
gate really costs. P is drawn, trained (App. B) or allocated in closed form on calibration text. All is measured on
held-out text, with exact weights.
"""

import json
import sys
from pathlib import Path

import torch

from calibrate import quantize_model
from calibration.segments import masked_copies
from calibration.streams import inputs_of
from experiments.cells import current_commit
from methods import QuantConfig
from methods.sgat import allocate_subspaces, initial_basis
from model import load_model
from runtime import processes
from starquant import apply_basis, fake_quantize, fold_weight, linear, subspace_gates
from tiny import tasks
from tiny.stress import stress

SEED = 20


def gate_balance(x, P, gate, weight, bits: int = 4) -> dict[str, float]:
    """Energies of the outputs (N, C) of one state's tokens x (N, d), as shares of the energy of x Wᵀ.

    noise: of rounding without a gate; gated_noise: its part in the gated channels; leakage: Eq. 28; with_gate: of all
    that a gated, rounded token loses.
    """
    folded, z = fold_weight(weight, P), apply_basis(x, P)  # (C, d), (N, d)
    error = fake_quantize(z, bits) - z
    whole = linear(x, weight).square().sum()

    def share(part):
        return float(linear(part, folded).square().sum() / whole)

    return {"noise": share(error), "gated_noise": share(error * (1 - gate)), "leakage": share(z * (1 - gate)),
            "with_gate": share(fake_quantize(z * gate, bits) - z)}


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
    """The balance of every gate, {kind of basis: [{"block", "linear", "state", ...}, ...]}."""
    tokens, region = tasks.calibration_set(model.tokenizer, 128, 64, SEED)
    noisy = masked_copies(tokens[:64], region[:64], model.mask_id, QuantConfig(seed=SEED))
    held_out, its_region = tasks.calibration_set(model.tokenizer, 64, 64, SEED + 1, "eval")
    unseen = masked_copies(held_out, its_region, model.mask_id, QuantConfig(seed=SEED + 1))
    seen, state = inputs_of(model, unseen), (unseen == model.mask_id).flatten().to(model.device)
    out = {}
    for kind, chosen in bases(model, tokens, region, noisy).items():
        rows = out[kind] = []
        for (i, name), P in chosen.items():
            weight, x = getattr(model.blocks[i], name).weight.float(), seen[i][name].flatten(0, 1).float()
            gates = subspace_gates(x.shape[1], x.shape[1] // 32, x.shape[1] // 32, x.device)
            for label, where, gate in zip(("masked", "unmasked"), (state, ~state), gates, strict=True):
                rows.append({"block": i, "linear": name, "state": label, **gate_balance(x[where], P, gate, weight)})
    return out


def summarize(measured: dict[str, list[dict]]) -> str:
    """A Markdown table: medians, and how often gates pay and were predicted to."""
    lines = ["| P | noise, without gates | of it in the gated channels | leakage | loss with gates / without | gates "
             "pay | predicted right |", "|---|---|---|---|---|---|---|"]
    for kind, rows in measured.items():
        by = {key: torch.tensor([row[key] for row in rows], dtype=torch.float64) for key in
              ("noise", "gated_noise", "leakage", "with_gate")}
        pays, predicted = by["with_gate"] < by["noise"], by["leakage"] < by["gated_noise"]
        medians = (f"{float(by[key].median()):.1e}" for key in ("noise", "gated_noise", "leakage"))
        ratio = by["with_gate"] / by["noise"]
        lines.append(f"| {kind} | {' | '.join(medians)} | {float(ratio.median()):.2f} ({float(ratio.min()):.2f} to "
                     f"{float(ratio.max()):.2f}) | {int(pays.sum())} of {len(rows)} | "
                     f"{int((pays == predicted).sum())} |")
    return "\n".join(lines)


def run(args) -> dict:
    args.out.mkdir(parents=True, exist_ok=True)  # before minutes of work
    model = load_model(args.model, args.device, torch.float32)
    measured = measure(model if args.stress == 1 else stress(model, args.stress))
    text = summarize(measured)
    stem = args.out / ("gates" if args.stress == 1 else f"gates-stress{args.stress:g}")
    note = (f"`python -m experiments.gates --model {args.model} --stress {args.stress:g}`: one seed, 4,096 held-out "
            f"tokens, medians over 20 linears and 2 states; torch {torch.__version__} on {args.device}, commit "
            f"{current_commit()}.")
    stem.with_suffix(".md").write_text(f"{text}\n\n{note}\n", encoding="utf-8")
    stem.with_suffix(".json").write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
    print(text)
    return {"out": str(stem.with_suffix(".md"))}


def main(argv=None) -> int:
    parser = processes.Parser("experiments.gates", description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="tiny", help="tiny, or a folder of a 16-bit model of the embedded tasks")
    parser.add_argument("--stress", type=float, default=1.0, metavar="C", help="outlier channels of scale C (1: off)")
    parser.add_argument("--device", default="cpu", help="auto, cpu, cuda")
    parser.add_argument("--out", type=Path, default=Path("out/gates"), help="folder of the table (out/gates)")
    return processes.run("experiments.gates", run, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
