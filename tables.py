"""The paper's tables on the embedded model, cell by cell: python evaluate.py --table 2 [--seeds 3] [--problems 200]

A cell is one setting with one calibration seed, judged on the held-out split; it is kept in `results/cells` under a
key of everything that determines it, so that a long run resumes. A table gives each setting's mean over seeds and
examples with a 95 % bootstrap interval, and the paired difference of its NELBO to 16 bit. `--quick` is one seed and
NELBO only.
"""

import dataclasses
import hashlib
import json
import subprocess
import sys
from pathlib import Path

import torch
from tqdm import tqdm

import data
import metrics
from calibrate import QuantConfig, quantize_model
from checkpoint import resolve, sha256
from model import load_model

RESULTS = Path(__file__).parent / "results"
RTN, NO_TAC, NO_GATES = {"method": "rtn"}, {"tac": "none"}, {"state_fraction": 0}
TABLES = {
    "1": {"RTN": RTN, "AWQ": {"method": "awq"}, "DLLMQuant+": {"method": "dllmquant+"}, "QuaRot": {"method": "quarot"},
          "DLLMQuant++": {"method": "dllmquant++"}, "FlatQuant": {"method": "flatquant"},
          "FreeAct": {"method": "freeact"}, "STaR-Quant": {}, "starquant+ (ours)": {"method": "starquant+"}},
    "2": {"RTN (neither)": RTN, "SGAT only": NO_TAC, "SGAT + TAC (STaR-Quant)": {},
          "no gates, no TAC": NO_GATES | NO_TAC,
          "no gates + TAC": NO_GATES, "random start, untrained, no TAC": NO_TAC | {"epochs": 0},
          "no gates, untrained, no TAC": NO_GATES | NO_TAC | {"epochs": 0},
          "closed-form start, untrained, no TAC": NO_TAC | {"epochs": 0, "allocation": "closed_form"},
          "closed-form start, no TAC": NO_TAC | {"allocation": "closed_form"},
          "closed-form start + TAC": {"allocation": "closed_form"},
          "closed-form start + paired TAC": {"allocation": "closed_form", "tac": "ridge"},
          "SGAT + paired TAC": {"tac": "ridge"},
          "dense P (App. B to the letter) + TAC": {"transform": "dense"}},
    "3": {f"TAC block {g}": {"tac_block": g} for g in (4, 8, 16, 32, 64)},
    "5": {"RTN W8A8": RTN | {"wbits": 8, "abits": 8}, "STaR-Quant W8A8": {"wbits": 8, "abits": 8}},
}


def measure(model, problems: int, seed: int, quick: bool) -> dict[str, list[float]]:
    """Per-example values on the held-out split."""
    sets = metrics.nelbo_set(model.tokenizer, problems, seed)
    out = {"nelbo": torch.cat([metrics.nelbo(model, ids, region, 2, seed) for ids, region in sets])}
    if not quick:
        out |= {t: metrics.solve(model, data.problems(t, "eval", problems, seed)) for t in ("math", "code")}
        out["cloze"] = metrics.cloze(model, data.cloze_problems(model.tokenizer, "eval", problems, seed), seed=seed)
    return {k: [round(x, 6) for x in v.tolist()] for k, v in out.items()}


def cell(name: str, model, config: QuantConfig | None, problems: int, quick: bool) -> dict[str, list[float]]:
    """One setting and seed, from `results/cells` or measured now. config None is the 16-bit model."""
    what = {"model": sha256(resolve(name) / "model.safetensors"), "problems": problems, "quick": quick,
            "config": dataclasses.asdict(config) if config else None}
    file = RESULTS / "cells" / f"{hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]}.json"
    if file.exists():
        return json.loads(file.read_text())["values"]
    judged = model
    if config:
        tokens, region = data.calibration_set(model.tokenizer, 128, 64, config.seed)
        judged = quantize_model(model, tokens, config, region)
    values = measure(judged, problems, 1, quick)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({**what, "values": values}))
    return values


def make(number: str, name: str, seeds: int, problems: int, quick: bool, device: str) -> dict:
    """Measure one table and write `results/table-N.json` and `.md`."""
    model = load_model(name, device)
    base = cell(name, model, None, problems, quick)
    rows = [{"setting": "16-bit", **{k: metrics.bootstrap(v) for k, v in base.items()}}]
    todo = [(label, QuantConfig(**{**setting, "seed": s})) for label, setting in TABLES[number].items()
            for s in range(seeds)]
    got = {}
    for label, config in tqdm(todo, desc=f"table {number}", unit="cell", file=sys.stderr):
        got.setdefault(label, []).append(cell(name, model, config, problems, quick))
    for label, cells in got.items():
        mean = {k: torch.tensor([c[k] for c in cells]).mean(0) for k in base}
        row = {"setting": label, **{k: metrics.bootstrap(v) for k, v in mean.items()}}
        row["penalty"] = metrics.bootstrap(mean["nelbo"] - torch.tensor(base["nelbo"]))
        row["penalty_by_seed"] = [float((torch.tensor(c["nelbo"]) - torch.tensor(base["nelbo"])).mean()) for c in cells]
        rows.append(row)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False,
                            cwd=RESULTS.parent).stdout.strip()
    command = (f"python evaluate.py --table {number} --model {name} --seeds {seeds} --problems {problems}"
               + (" --quick" if quick else ""))
    record = {"command": command, "commit": commit, "torch": torch.__version__, "device": str(model.device),
              "seeds": seeds, "problems": problems, "rows": rows}
    text = markdown(record, list(base))
    stem = RESULTS / f"table-{number}{'-quick' if quick else ''}"
    RESULTS.mkdir(exist_ok=True)
    stem.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    stem.with_suffix(".md").write_text(text + "\n")
    print(text)
    return record


def markdown(record: dict, measures: list[str]) -> str:
    tasks = [m for m in measures if m != "nelbo"]
    lines = ["| setting | NELBO penalty, 10⁻³ nats/token | " + "".join(f"{t} % | " for t in tasks),
             "|---|---|" + "---|" * len(tasks)]
    for row in record["rows"]:
        penalty = ""
        if "penalty" in row:
            mean, low, high = (1e3 * v for v in row["penalty"])
            penalty = f"{mean:.1f} ± {(high - low) / 2:.1f}"
        accuracy = "".join(f"{100 * m:.1f} ± {50 * (high - low):.1f} | " for m, low, high in (row[t] for t in tasks))
        lines.append(f"| {row['setting']} | {penalty} | {accuracy}".rstrip())
    return "\n".join([*lines, "", f"`{record['command']}`, {record['seeds']} calibration seed(s), {record['problems']} "
                      f"problems per task, ± half a 95 % bootstrap interval over examples, torch {record['torch']} on "
                      f"{record['device']}, commit {record['commit']}."])
