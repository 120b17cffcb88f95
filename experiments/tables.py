"""The paper's tables on the embedded model, cell by cell: python evaluate.py --table 2 [--stress 4] [--seeds 3]

A cell is one setting with one calibration seed, judged on held-out examples of that seed's own. `results/cells.jsonl`
keeps it under a key of what determines it, the code apart (the commit stands beside it): a long run resumes, tables
share their cells, and `torchrun --nproc-per-node N evaluate.py --table 2` divides them. The cells of this repository's
tables are there: `--fresh` measures them again. ± is half a 95 % bootstrap interval: of what is counted from 16 bit
(KL, penalty, mean of the tasks) over calibration seeds and, within each, its examples; of a task over all its problems.
Every row is compared with the row above it, or with the one that REFERENCE names, example by example, in KL divergence
from the 16-bit model, which has less noise than NELBO; three seeds are few, so * marks a difference whose interval is
clear of 0 and on whose sign all seeds agree. `--stress c` gives the model outlier channels first; `--nelbo` leaves the
tasks out; `--quick` is for a first look: likelihoods of few examples, one seed, one epoch on a sixth of the segments.

Seeds: settings were chosen on calibration seeds and examples 0-9; tables report seeds from 10 on.
"""

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import torch
from tqdm import tqdm

from calibrate import QuantConfig, quantize_model
from checkpoint.folder import resolve, sha256
from model import load_model
from runtime import processes
from runtime.layers import QuantLinear
from tiny import metrics, tasks
from tiny.stress import stress

TASKS = (*metrics.TASKS, "cloze")
RESULTS = Path(__file__).parent.parent / "results"
CELLS = RESULTS / "cells.jsonl"
FIRST_SEED = 10
RTN, NO_TAC, NO_GATES, UNTRAINED = {"method": "rtn"}, {"tac": "none"}, {"state_fraction": 0}, {"epochs": 0}
CLOSED, PLUS, QUAROT = {"allocation": "closed_form"}, {"method": "starquant+"}, {"method": "quarot"}
DENSE, KV = {"transform": "dense"}, {"kv_bits": 4}
METHODS = {"RTN": RTN, "GPTQ": {"method": "gptq"}, "AWQ": {"method": "awq"}, "DLLMQuant+": {"method": "dllmquant+"},
           "QuaRot": QUAROT, "DLLMQuant++": {"method": "dllmquant++"}, "FlatQuant": {"method": "flatquant"},
           "FreeAct": {"method": "freeact"}, "STaR-Quant": {}, "STaR-Quant, P dense": DENSE,
           "starquant+ (ours)": PLUS}
ASYMMETRIC = {"weights": "asymmetric"}
EVEN = {"starquant+, both sides even (a = ½)": PLUS | {"exponent": 0.5}}
RAW_GAIN = {"starquant+, gain as GPTQ leaves it": PLUS | {"gain": "none"}}
NEAREST = {"starquant+, activations rounded to nearest": PLUS | {"rounding": "nearest"}}
TABLES = {
    "1": METHODS,
    "2": {"neither (RTN)": RTN, "TAC only": {"transform": "none"}, "SGAT only": NO_TAC,
          "SGAT only, its gates switched off": NO_TAC | {"gates": "off"},
          "SGAT + TAC (STaR-Quant)": {},
          "the same, P dense": DENSE,
          "P dense, its gates switched off": DENSE | {"gates": "off"},
          "P dense, no gates": DENSE | NO_GATES,
          "SGAT + TAC, no gates": NO_GATES,
          "no gates, no TAC": NO_GATES | NO_TAC,
          "no gates, no TAC, random P, untrained": NO_GATES | NO_TAC | UNTRAINED,
          "gates, no TAC, random P, untrained": NO_TAC | UNTRAINED,
          "gates, no TAC, closed-form P, untrained": NO_TAC | UNTRAINED | CLOSED,
          "gates, no TAC, closed-form P, trained": NO_TAC | CLOSED,
          "gates, TAC, closed-form P, trained": CLOSED,
          "the same with paired TAC": CLOSED | {"tac": "ridge"},
          "neither, asymmetric weights": RTN | ASYMMETRIC,
          "SGAT + TAC, asymmetric weights": ASYMMETRIC,
          "QuaRot": QUAROT,
          "QuaRot, K and V in 4 bits": QUAROT | KV,
          "DLLMQuant++, K and V in 4 bits": {"method": "dllmquant++"} | KV,
          "starquant+, Kronecker balance": PLUS | {"balance": "kronecker"},
          "starquant+": PLUS,
          **NEAREST,
          **RAW_GAIN,
          "starquant+, states weigh alike": PLUS | {"mask_weight": 1.0},
          "starquant+, one mean for both states": PLUS | {"centre": "joint"},
          "starquant+, no centring": PLUS | {"centre": "none"},
          "starquant+ with paired TAC": PLUS | {"tac": "ridge"},
          "starquant+, blocks of 16": PLUS | {"balance_block": 16},
          "starquant+, blocks of 192": PLUS | {"balance_block": 192},
          "starquant+, dense balance": PLUS | {"balance": "dense"}},
    "3": {"no TAC": NO_TAC, **{f"TAC block {g}": {"tac_block": g} for g in (4, 8, 16, 32, 64)}},
    "5": {name: METHODS[name] | {"wbits": 8, "abits": 8}
          for name in ("RTN", "AWQ", "QuaRot", "DLLMQuant++", "STaR-Quant", "starquant+ (ours)")},
    "low-bit": {f"{name} W{w}A{a}": (METHODS | NEAREST | EVEN | RAW_GAIN)[name] | {"wbits": w, "abits": a}
                for w, a in ((4, 8), (8, 4), (4, 3), (3, 4), (3, 3), (2, 4))
                for name in ("RTN", "QuaRot", "FlatQuant", "STaR-Quant", "starquant+ (ours)", *NEAREST, *EVEN,
                             *RAW_GAIN)
                if (8 not in (w, a) or name in ("RTN", "starquant+ (ours)"))  # which side costs: two methods tell
                and ((w, a) != (3, 3) or name in METHODS)},
}
# rows whose counterpart is another than the row above; None: they have none
REFERENCE = {
    "1": {"AWQ": "RTN", "STaR-Quant": "DLLMQuant++", "STaR-Quant, P dense": "DLLMQuant++",
          "starquant+ (ours)": "QuaRot"},
    "2": {"SGAT only": "neither (RTN)", "SGAT + TAC (STaR-Quant)": "SGAT only",
          "P dense, no gates": "the same, P dense", "SGAT + TAC, no gates": "SGAT + TAC (STaR-Quant)",
          "gates, no TAC, closed-form P, trained": "SGAT only", "neither, asymmetric weights": "neither (RTN)",
          "SGAT + TAC, asymmetric weights": "SGAT + TAC (STaR-Quant)", "QuaRot": "SGAT + TAC (STaR-Quant)",
          "starquant+, Kronecker balance": "QuaRot",
          **dict.fromkeys(RAW_GAIN, "starquant+"), "starquant+, states weigh alike": "starquant+",
          "starquant+, one mean for both states": "starquant+", "starquant+, no centring": "starquant+",
          **{f"starquant+{row}": "starquant+" for row in (" with paired TAC", ", blocks of 16", ", blocks of 192",
                                                          ", dense balance")}},
    "3": {row: "no TAC" for row in TABLES["3"] if row.startswith("TAC")},
    "low-bit": {row: None for row in TABLES["low-bit"] if row.startswith("RTN")}
    | {f"{row} {bits}": f"starquant+ (ours) {bits}" for row in EVEN | RAW_GAIN
       for bits in ("W4A3", "W3A4", "W2A4")},
}


@dataclasses.dataclass(frozen=True)
class Run:
    """What all cells of a table share."""

    name: str  # model
    c: float  # stress
    problems: int  # per task and seed
    nelbo: bool  # likelihoods (NELBO and KL) only
    device: str
    segments: int = 128  # of calibration
    sequences: int | None = None  # of each domain, for the likelihoods; as many as problems unless given

    @cache  # noqa: B019 (one run a process)
    def model(self):
        model = load_model(self.name, self.device)
        return model if self.c == 1 else stress(model, self.c)

    @cache  # noqa: B019
    def reference(self, seed: int):
        """16 bit on one seed's examples: (values, trajectories)."""
        return metrics.scores(self.model(), self.problems, seed, self.nelbo, f"16-bit, examples {seed}",
                              sequences=self.sequences)

    def key(self, setting: dict | None, seed: int) -> dict:
        """`setting` counts as far as it differs from QuantConfig's defaults."""
        defaults = dataclasses.asdict(QuantConfig())
        return {"weights": sha256(resolve(self.name) / "model.safetensors")[:16], "stress": self.c,
                "problems": self.problems, "nelbo": self.nelbo, "seed": seed,
                "setting": None if setting is None else {k: v for k, v in setting.items() if defaults.get(k) != v},
                **({} if self.segments == 128 else {"segments": self.segments}),
                **({} if self.sequences in (None, self.problems) else {"sequences": self.sequences}),
                **({} if self.kind == "cpu" else {"device": self.kind})}

    @property
    def kind(self) -> str:
        """"cpu" (fp32) or "cuda" (bf16): their numbers are not each other's."""
        return self.device.partition(":")[0]

    def measure(self, setting: dict | None, seed: int) -> dict[str, list[float]]:
        """Values per example of one setting (None: 16 bit) calibrated with and judged on a seed."""
        values, paths = self.reference(seed)
        if setting is not None:
            model, config = self.model(), config_of(setting, seed)
            tokens, region = tasks.calibration_set(model.tokenizer, self.segments, 64, seed)
            judged = quantize_model(model, tokens, config, region)
            if setting.get("gates") == "off":
                switch_gates_off(judged)
            values, other = metrics.scores(judged, self.problems, seed, self.nelbo, config.method, model,
                                           self.sequences)
            values = values if self.nelbo else values | metrics.agreement(other, paths)
        return {k: [round(x, 5) for x in v.tolist()] for k, v in values.items()}


def config_of(setting: dict, seed: int) -> QuantConfig:
    return QuantConfig(**{k: v for k, v in setting.items() if k != "gates"}, seed=seed)


def switch_gates_off(model) -> None:
    """Every token uses all of P from now on: what the gates themselves are worth, on the same learned rotation."""
    for module in model.modules():
        if isinstance(module, QuantLinear):
            module.d_m = module.d_u = 0


def digest(key: dict) -> str:
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]


def stored_cells() -> dict[str, dict]:
    """Finished cells by digest; a line that an interruption cut short is left out."""
    cells = {}
    for line in CELLS.read_text().splitlines() if CELLS.exists() else ():
        try:
            cell = json.loads(line)
            cells[cell["digest"]] = cell
        except ValueError:
            continue
    return cells


def store(cell: dict) -> None:
    CELLS.parent.mkdir(exist_ok=True)
    handle = os.open(CELLS, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:  # one write, so that processes may append side by side
        os.write(handle, (json.dumps(cell) + "\n").encode())
    finally:
        os.close(handle)


def make(number: str, run: Run, seeds: int, quick: bool = False, fresh: bool = False) -> dict:
    """Measure what is missing of one table (fresh: all of it) and write `results/table-N.json` and `.md`."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False,
                            cwd=RESULTS.parent).stdout.strip()
    table = {"16-bit": None, **{label: setting | ({"epochs": min(1, setting.get("epochs", 1))} if quick else {})
                                for label, setting in TABLES[number].items()}}
    todo = [(label, setting, FIRST_SEED + i) for label, setting in table.items() for i in range(seeds)]
    cells, rows = {} if fresh else stored_cells(), {}

    def finished(key):
        return cells.get(digest(key)) or cells.get(digest(key | {"nelbo": False}))

    mine = todo[processes.rank() :: processes.world()]  # under torchrun every process measures its share
    for _, setting, seed in tqdm(mine, desc=f"table {number}", unit="cell", file=sys.stderr):
        key = run.key(setting, seed)
        if finished(key) is None:
            cells[digest(key)] = {"digest": digest(key), "commit": commit, "torch": torch.__version__, **key,
                                  "values": run.measure(setting, seed)}
            store(cells[digest(key)])
    for others in processes.gather(cells):
        cells |= others
    for label, setting, seed in todo:
        cell = finished(run.key(setting, seed))
        if run.nelbo:
            cell = cell | {"values": {k: cell["values"][k] for k in ("nelbo", "kl") if k in cell["values"]}}
        rows.setdefault(label, []).append(cell)
    if processes.rank():
        return {}
    kind = "quick" if quick else "nelbo" if run.nelbo else ""
    command = f"python evaluate.py --table {number} --model {run.name} --seeds {seeds} --problems {run.problems}"
    command += f" --sequences {run.sequences}" if run.sequences else ""
    command += (f" --stress {run.c:g}" if run.c != 1 else "") + (f" --{kind}" if kind else "")
    used = [c for r in rows.values() for c in r]
    record = {"command": command, "commit": ", ".join(sorted({c["commit"] for c in used})),
              "torch": ", ".join(sorted({c["torch"] for c in used})), "device": run.kind, "seeds": seeds,
              "first_seed": FIRST_SEED, "problems": run.problems, "sequences": run.sequences or run.problems,
              "stress": run.c,
              "rows": summarize(rows, REFERENCE.get(number))}
    stem = f"table-{number}" + (f"-stress{run.c:g}" if run.c != 1 else "") + (f"-{kind}" if kind else "")
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{stem}.json").write_text(json.dumps(record, indent=1) + "\n")
    (RESULTS / f"{stem}.md").write_text(markdown(record) + "\n")
    print(markdown(record))
    return record


def summarize(rows: dict[str, list[dict]], reference: dict | None = None) -> list[dict]:
    """Each setting over its seeds and their examples: means with intervals, and paired differences."""
    base = {k: by_seed(rows["16-bit"], k) for k in rows["16-bit"][0]["values"]}
    out, measured, above, rtn = [], {}, None, None
    for label, cells in rows.items():
        values = {k: by_seed(cells, k) for k in cells[0]["values"]}
        # levels are uncertain by their problems, of which seeds bring more; what is counted from 16 bit by seeds, too
        row = {"setting": label, **{k: metrics.bootstrap(v if k == "kl" else v.flatten()) for k, v in values.items()}}
        if label != "16-bit":
            penalty = values["nelbo"] - base["nelbo"]
            row["penalty"] = metrics.bootstrap(penalty)
            row["kl_by_seed"] = values["kl"].mean(-1).tolist()
            rtn = values["kl"] if "RTN" in label else rtn  # of the same bits: it comes first of them
            if rtn is not None:
                # share of RTN's divergence that is gone
                row["recovered"] = float(1 - values["kl"].mean() / rtn.mean())
            other = (reference or {}).get(label, above)
            if other in measured:
                differences = {k: values[k] - measured[other][k] for k in ("kl", "nelbo", *TASKS) if k in values}
                row["against"] = {"setting": other, **{k: metrics.bootstrap(d) for k, d in differences.items()}}
                row["against"]["significant"] = significant(row["against"]["kl"], differences["kl"])
            measured[label], above = values, label
            if set(TASKS) <= values.keys():
                # every task has as many problems: the mean over problems is the mean of the tasks
                row["mean"] = metrics.bootstrap(torch.cat([values[k] - base[k] for k in TASKS], -1))
        out.append(row)
    return out


def significant(interval, differences) -> bool:
    """Whether the interval (mean, low, high) of differences (S, n) is clear of 0 and all seeds have its sign."""
    by_seed = differences.mean(-1)
    return interval[1] * interval[2] > 0 and bool((by_seed > 0).all() or (by_seed < 0).all())


def by_seed(cells: list[dict], measure: str):
    """(seeds, examples)"""
    return torch.tensor([c["values"][measure] for c in cells], dtype=torch.float64)


def interval(triple, scale: float = 100, sign: str = "") -> str:
    mean, low, high = triple
    return f"{scale * mean:{sign}.1f} ± {scale * (high - low) / 2:.1f}"


def markdown(record: dict) -> str:
    measures = [m for m in (*TASKS, "mean", "tokens") if m in record["rows"][-1]]
    names = {"mean": "mean of the tasks, points from 16 bit", "tokens": "same tokens %"}
    heads = ["setting", "KL from 16 bit, 10⁻³ nats/token", "against the row above (or the one named)", "recovered %",
             "NELBO penalty", *(names.get(m, f"{m} %") for m in measures)]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for above, row in zip([None, *record["rows"]], record["rows"], strict=False):
        shown = [row["setting"], *(interval(row[k], 1000) if k in row else "" for k in ("kl", "penalty"))]
        shown[2:2] = ["", f"{100 * row['recovered']:.1f}" if "recovered" in row else ""]
        if "against" in row:
            mean, low, high = (1000 * v for v in row["against"]["kl"])
            other = row["against"]["setting"]
            named = "" if above and other == above["setting"] else f" {other}"
            shown[2] = f"{mean:+.1f} ({low:+.1f} to {high:+.1f})" + " *" * row["against"]["significant"] + named
        shown += [interval(row[m], sign="+" * (m == "mean")) if m in row else "" for m in measures]
        lines.append(f"| {' | '.join(shown)} |")
    note = (f"`{record['command']}`: {record['seeds']} calibration seeds, {record['problems']} problems per task and "
            f"{record['sequences']} sequences of each kind for each; ± half a 95 % bootstrap interval over seeds and "
            f"their examples (of a task: over its problems), differences with theirs, * where it is clear of 0 and all "
            f"seeds agree; torch {record['torch']} on {record['device']}, commit {record['commit']}.")
    return "\n".join([*lines, "", note])
