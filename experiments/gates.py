"""When does a gate pay? python -m experiments.gates [--model FOLDER] [--stress 4] [--out out/gates]

The balance of a gate
    A gate G_s (Eq. 9) zeroes the d_s channels of z = x P that belong to the other state. Per linear and state, against
    the same P without gates,

    it gains    the rounding noise of those channels, ‖(Q(z) − z) G_s^⊥ P_e Wᵀ‖²    about d_s/d of all noise: 1/32
    it loses    what those channels carried, the leakage of Eq. 28, ‖z G_s^⊥ P_e Wᵀ‖²

    G_s^⊥ = I − G_s keeps the channels that the gate zeroes; P_e = P⁻¹. Zero is a value of every token's grid (Eq. 4),
    so |Q(z) − z| ≤ |z|: on the same grid a gate gains nothing, channel by channel. It can pay only where what it takes
    away cancels errors of other channels in the output, or where it removes a token's outlier and so makes the grid
    finer.

Three tables for a 16-bit model of the embedded tasks
    The first has the balance of every gate, for P drawn, trained (App. B) or allocated in closed form, with exact
    weights. The second has the same for drawn P where tokens live in fewer directions: in the channels that their gate
    zeroes, their energy is cut to a share ρ. The function of the model changes with it. The third has the KL from
    16 bit of trained models (Kronecker P, no TAC) with all gates, with those that pay, and with none.

One table for a quantized model with gates
    It has the balance of each of its own. All is measured on held-out text. Which gates pay is decided on calibration
    text of another seed.
"""

import json
import sys
from pathlib import Path

import torch
from torch import nn

from calibrate import quantize_model
from calibration.segments import calibration_texts, masked_copies, text_segments
from calibration.streams import inputs_of
from checkpoint.families import FUSED
from checkpoint.folder import Checkpoint, resolve, write_json, write_text
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
LEFT = 1, 0.1, 0.03, 0.01, 0.003, 0.001, 0  # ρ
BALANCE = {"noise": "noise, without gates", "gated_noise": "of it in the gated channels", "leakage": "leakage"}


def gate_balance(z, folded, gate, bits: int = 4, clip=None) -> dict[str, float]:
    """Energies of the outputs (N, C) of one state's transformed tokens z (N, d), as shares of the energy of z W̃ᵀ.

    folded: W̃ (C, d). noise: of rounding without a gate; gated_noise: its part in the gated channels; leakage: Eq. 28;
    with_gate: of all that a gated, rounded token loses; same_grid: the same, on the grid that it has without a gate.
    """
    error, lost = fake_quantize_rows(z, bits, clip) - z, z * (1 - gate)
    parts = {"noise": error, "gated_noise": error * (1 - gate), "leakage": lost, "same_grid": error * gate - lost,
             "with_gate": fake_quantize_rows(z * gate, bits, clip) - z}
    whole = linear(z, folded).square().sum()
    return {name: float(linear(part, folded).square().sum() / whole) for name, part in parts.items()}


def balances(z, state, folded, gates, left: float = 1, bits: int = 4, clip=None, **about) -> list[dict]:
    """`gate_balance` for both states of tokens z (N, d); left: the share ρ of energy in the gated channels."""
    return [{**about, "state": label,
             **gate_balance(z[where] * (gate + left**0.5 * (1 - gate)), folded, gate, bits, clip)}
            for label, where, gate in zip(STATES, (state, ~state), gates, strict=True)]


def text(model, seed: int, split: str):
    """64 segments of 64 tokens with [MASK] in place, from a split of the embedded model's own text."""
    return masked_copies(*tasks.calibration_set(model.tokenizer, 64, 64, seed, split), model.mask_id,
                         QuantConfig(seed=seed))


@torch.no_grad()
def measure(model) -> dict[str, list[dict]]:
    """The balance of every gate, {kind of P: [{"block", "linear", "state", ...}, ...]}, for drawn P at every ρ."""
    tokens, region = tasks.calibration_set(model.tokenizer, 128, 64, SEED)
    noisy = masked_copies(tokens[:64], region[:64], model.mask_id, QuantConfig(seed=SEED))
    held_out, out, generator = text(model, SEED + 1, "eval"), {}, torch.Generator().manual_seed(SEED)
    for transform in ("kronecker", "dense"):
        trained = quantize_model(model, tokens, QuantConfig(seed=SEED, tac="none", transform=transform), region)
        for (place, layer, x, x_state), (*_, unseen, state) in zip(
                inputs_of(model, noisy), inputs_of(model, held_out), strict=True):
            weight, d, d_s = layer.weight.float(), x.shape[1], x.shape[1] // 32
            bases = {"random": initial_basis(d, transform, generator),
                     "trained": getattr(trained.blocks[place["block"]], place["linear"]).P[0],
                     "closed form": allocate_subspaces(x, x_state, d_s, d_s, transform, generator)}
            for kind, P in bases.items():
                z, folded = apply_basis(unseen, P.to(x)), fold_weight(weight, P.to(x))
                for left in LEFT if kind == "random" else (1,):
                    rows = out.setdefault(f"{kind}, {transform}" + (f", ρ = {left:g}" if left < 1 else ""), [])
                    rows += balances(z, state, folded, subspace_gates(d, d_s, d_s, x.device), left, **place)
    return out


def pays(row: dict) -> bool:
    return row["with_gate"] < row["noise"]


@torch.no_grad()
def own_gates(model, noisy) -> list[dict]:
    """The balance of every gate of a quantized model for token ids noisy (n, L)."""
    rows = []
    for place, layer, x, state in inputs_of(model, noisy):
        if layer.d_m or layer.d_u:
            z = apply_basis(x, layer.P)
            rows += balances(z, state, layer.weight(), layer.gates(z), 1, layer.abits, layer.clip, **place)
    return rows


class Keeping(nn.Module):
    """A gated linear with the gates of masked and of unmasked tokens where they are kept, and all of P elsewhere. It is
    no `QuantLinear`, which a block on a GPU need not call."""

    def __init__(self, layer, *kept: bool):
        super().__init__()
        self.layer, self.weight = layer, layer.weight()
        self.gates = [gate if keep else torch.ones_like(gate)
                      for keep, gate in zip(kept, layer.gates(self.weight), strict=True)]

    def forward(self, x, state):
        # Ŷ = Q(X P G_s) W̃ᵀ
        z = apply_basis(x.float(), self.layer.P) * torch.where(state[..., None], *self.gates)
        y = linear(fake_quantize_rows(z, self.layer.abits, self.layer.clip), self.weight)
        return self.layer.finish(y, state).to(x.dtype)


def keeping(model, kept):
    """The quantized model with those gates alone: kept holds (block, linear, state)."""
    return rebuilt(model, blocks=nn.ModuleList(
        rebuilt(block, **{name: Keeping(getattr(block, name), *((i, name, s) in kept for s in STATES))
                          for name in FUSED}) for i, block in enumerate(model.blocks)))


def end_to_end(job: Run) -> str:
    """A table: KL from 16 bit with all gates of SGAT's trained P, with those that pay on text of seed 0, with none."""
    kl, counts = [], []
    for seed in KL_SEEDS:
        model = job.calibrated(json.dumps(NO_TAC), seed)
        gates = own_gates(model, text(model, 0, "calib"))
        paying = list(filter(pays, gates))
        counts.append(str(len(paying)))
        chosen = [keeping(model, {(r["block"], r["linear"], r["state"]) for r in rows}) for rows in (gates, paying, [])]
        kl.append([metrics.scores(m, SEQUENCES, seed, True, reference=job.model())[0]["kl"] for m in chosen])
    every, paying, none = (torch.stack(values) for values in zip(*kl, strict=True))  # (seeds, examples)
    row = {"gates that pay, by seed": f"{', '.join(counts)} of {len(gates)}",
           **{f"KL, {which}": interval(bootstrap(values), 1000, 1)
              for which, values in {"all gates": every, "those that pay": paying, "none": none}.items()},
           **{f"those that pay - {which}": interval(bootstrap(paying - values), 1000, 1, "+")
              for which, values in {"all": every, "none": none}.items()}}
    return markdown_table(row, [row.values()])


def summarize(measured: dict[str, list[dict]]) -> str:
    """A Markdown table: medians, and how often gates pay, would pay on the same grid, and were predicted to."""
    lines = []
    for kind, rows in measured.items():
        *energies, ratio = torch.tensor([[*(row[key] for key in BALANCE), row["with_gate"] / row["noise"]]
                                         for row in rows], dtype=torch.float64).T
        lines.append([kind, *(f"{energy.median():.1e}" for energy in energies),
                      f"{ratio.median():.3f} ({ratio.min():.4f} to {ratio.max():.2f})",
                      f"{sum(map(pays, rows))} of {len(rows)}", sum(row["same_grid"] < row["noise"] for row in rows),
                      sum(pays(row) == (row["leakage"] < row["gated_noise"]) for row in rows)])
    return markdown_table(["P", *BALANCE.values(), "loss with gates / without", "gates pay", "on the same grid",
                           "predicted right"], lines)


def listed(rows: list[dict]) -> str:
    """A Markdown table with a line for each gate."""
    return markdown_table(["block", "linear", "state", *BALANCE.values(), "loss with gate / without", "pays"], [
        [row["block"], row["linear"], row["state"], *(f"{row[key]:.1e}" for key in BALANCE),
         f"{row['with_gate'] / row['noise']:.4f}", "yes" if pays(row) else "no"] for row in rows])


def run(args) -> dict:
    checkpoint, stress = Checkpoint(resolve(args.model)), f"-stress{args.stress:g}" * (args.stress != 1)
    quantized, ours = bool(checkpoint.quantization), tasks.knows_our_tasks(checkpoint.folder)
    if quantized and stress:
        raise Refused("--stress is for 16-bit models; give it to calibrate.py.")
    if not quantized and not ours:
        raise Refused(f"{args.model} is a 16-bit model that does not know the embedded tasks; give the folder that "
                      f"calibrate.py --method starquant makes of it.")
    args.out.mkdir(parents=True, exist_ok=True)  # before minutes of work
    if quantized:
        model, source, seed = load_model(args.model, args.device), args.data or "winogrande", SEED + 1
        if ours:
            noisy = text(model, seed, "eval")
        else:
            segments = text_segments(model.tokenizer, calibration_texts(source), source, 64, 256, seed)
            noisy = masked_copies(*segments, model.mask_id, QuantConfig(seed=seed))
        rows = own_gates(model, noisy)
        if not rows:
            raise Refused(f"{args.model} has no gates; give a folder that --method starquant or freeact wrote.")
        tables = listed(rows)
    else:
        job = Run(args.model, args.stress, SEQUENCES, True, args.device)
        measured = measure(job.model())
        rows = {kind: found for kind, found in measured.items() if "ρ" not in kind}
        drawn = {kind: found for kind, found in measured.items() if "random" in kind}
        tables = "\n\n".join((summarize(rows), summarize(drawn), end_to_end(job)))
    file = args.out / f"gates{f'-{checkpoint.folder.name}' * quantized}{stress}.md"
    command = (f"python -m experiments.gates --model {args.model}" + f" --data {args.data}" * bool(args.data)
               + stress.replace("-stress", " --stress "))
    write_text(file, f"{tables}\n\n`{command}`: torch {torch.__version__}, {args.device}, commit {current_commit()}.\n")
    write_json(file.with_suffix(".json"), rows, indent=1)
    print(tables)
    return {"out": str(file)}


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
