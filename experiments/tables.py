"""The paper's tables on the embedded model, cell by cell: python evaluate.py --table 2 [--stress 4] [--seeds 3]

`rows.py` has the rows, `cells.py` measures, and `docs/results.md` says how to read the numbers. Settings were chosen on
calibration seeds and examples 0-9; tables report seeds from 10 on. Table 1 also decodes by a confidence threshold, and
table `passes` by several; those values are cells of their own.
"""

from pathlib import Path

import torch

from checkpoint.folder import write_json, write_text
from experiments.cells import Run, measured
from experiments.rows import ABOVE, DECODING, TABLES, THRESHOLDS
from methods import settings_of
from runtime import processes
from runtime.measures import bootstrap, interval, markdown_table
from runtime.processes import Refused
from tiny import metrics

OUT = Path("out/tables")
FIRST_SEED = 10
SEEDS, PROBLEMS, SEQUENCES = 3, 250, 100  # of the published tables: seeds, problems per task, sequences per domain


def make(number: str, run: Run, seeds: int = SEEDS, quick: bool = False, fresh: bool = False, out: Path = OUT) -> dict:
    """Measure what is missing of one table (fresh: all of it) and write it to the folder `out` as .json and .md."""
    run.check()
    # what is measured of a setting: likelihoods and tasks (None), and decoding by each threshold
    kinds = [] if number in DECODING else [None]
    if quick or not run.nelbo:
        kinds += THRESHOLDS.get(number, ())
    if not kinds:
        raise Refused(f"table {number} has no likelihoods; leave --nelbo out.")
    out.mkdir(parents=True, exist_ok=True)
    settings = {"16-bit": None}
    for row in TABLES[number]:
        trained = quick and "epochs" in settings_of(row.setting.get("method", "starquant"))
        settings[row.label] = row.setting | ({"epochs": min(1, row.setting.get("epochs", 1))} if trained else {})
    todo = [(setting, FIRST_SEED + i) for setting in settings.values() for i in range(seeds)]
    cells = measured(run, todo, kinds, out, fresh, f"table {number}")
    if processes.rank():
        return {}
    values = [{at(k, threshold): v for threshold, cell in zip(kinds, of_kinds, strict=True)
               for k, v in cell["values"].items() if threshold or not run.nelbo or k in ("nelbo", "kl")}
              for of_kinds in cells]
    rows = {label: values[i * seeds : (i + 1) * seeds] for i, label in enumerate(settings)}
    made = {by: ", ".join(sorted({c[by] for of_kinds in cells for c in of_kinds})) for by in ("commit", "torch")}
    command = [f"python evaluate.py --table {number} --model {run.name} --seeds {seeds} --problems {run.problems}",
               "" if run.sequences in (None, run.problems) else f"--sequences {run.sequences}",
               "" if run.c == 1 else f"--stress {run.c:g}", "--quick" if quick else "--nelbo" if run.nelbo else ""]
    counterparts = {row.label: row.against for row in TABLES[number] if row.against != ABOVE}
    record = {"command": " ".join(filter(None, command)), **made, "model": run.name, "device": run.kind, "seeds": seeds,
              "first_seed": FIRST_SEED, "problems": run.problems, "sequences": run.sequences or run.problems,
              "stress": run.c, "thresholds": [t for t in kinds if t], "rows": summarize(rows, counterparts)}
    name = file_name(number, run, seeds, quick)
    write_json(out / f"{name}.json", record, indent=1)
    write_text(out / f"{name}.md", markdown(record) + "\n")
    if number == "passes":
        stress = "" if run.c == 1 else f"-stress{run.c:g}"
        write_json(out / f"passes{stress}.json", curves(record), indent=1)
    print(markdown(record))
    return record


def curves(record: dict) -> dict:
    """Passes an answer and accuracy of every row by threshold, for a figure. τ = 1, a token a pass, is far off."""
    thresholds = [t for t in record["thresholds"] if t < 1]
    methods = {row["setting"]: {k: [row[at(k, t)][0] for t in thresholds] for k in ("passes", "accuracy")}
               for row in record["rows"]}
    return {"command": record["command"], "threshold": thresholds, "methods": methods}


def file_name(number: str, run: Run, seeds: int, quick: bool) -> str:
    """table-N, then model, stress, kind and size, each as far as it is not that of the published tables."""
    size = f"{seeds}x{run.problems}" + (f"x{run.sequences}" if run.sequences not in (None, run.problems) else "")
    published = f"{SEEDS}x{SEQUENCES}" if run.nelbo else f"{SEEDS}x{PROBLEMS}x{SEQUENCES}"
    parts = [f"table-{number}", "" if run.name == "tiny" else Path(run.name).name,
             "" if run.c == 1 else f"stress{run.c:g}", "quick" if quick else "nelbo" if run.nelbo else "",
             "" if size == published else size]
    return "-".join(filter(None, parts))


def at(measure: str, threshold: float | None) -> str:
    """The name of a measure in a row; with a threshold it was decoded by that."""
    return measure if threshold is None else f"{measure} at {threshold:g}"


def summarize(rows: dict[str, list[dict]], reference: dict | None = None) -> list[dict]:
    """Each setting, 16 bit first, over its seeds and their examples: means with intervals, and paired differences."""
    out, measured, base, above, rtn = [], {}, None, None, None
    for label, cells in rows.items():
        values = {k: torch.tensor([c[k] for c in cells], dtype=torch.float64) for k in cells[0]}  # (seeds, examples)
        base = base or values
        # an accuracy varies with its problems, and more seeds bring more; what is counted from 16 bit varies with the
        # calibration seed, too
        row = {"setting": label, **{k: bootstrap(v if k == "kl" else v.flatten()) for k, v in values.items()},
               **in_parallel(values, base)}
        out.append(row)
        if label == "16-bit":
            continue
        if "kl" in values:
            row["penalty"] = bootstrap(values["nelbo"] - base["nelbo"])
            row["kl_by_seed"] = values["kl"].mean(-1).tolist()
            rtn = values["kl"].mean() if "RTN" in label else rtn  # of the same bits: it comes first of them
            if rtn is not None:
                row["recovered"] = float(1 - values["kl"].mean() / rtn)  # share of RTN's divergence that is gone
        other = (reference or {}).get(label, above)
        if other in measured:
            differences = {k: values[k] - measured[other][k] for k in ("kl", "nelbo", *metrics.TASKS) if k in values}
            row["against"] = {"setting": other, **{k: bootstrap(d) for k, d in differences.items()},
                              **{k: v for k, v in in_parallel(values, measured[other]).items() if "per pass" in k}}
            if "kl" in values:
                row["against"]["significant"] = significant(row["against"]["kl"], differences["kl"])
        measured[label], above = values, label
        if set(metrics.TASKS) <= values.keys():
            # every task has as many problems: the mean over problems is the mean of the tasks
            row["mean"] = bootstrap(torch.cat([values[k] - base[k] for k in metrics.TASKS], -1))
    return out


def in_parallel(values: dict, base: dict) -> dict:
    """Accuracy, passes an answer and right answers per pass of `math` and `code` together, for each threshold. Right
    answers are a share of those of `base` (16 bit or another row). Values are (S, n), results (mean, low, high)."""
    found = {}
    for threshold in (k.removeprefix("math_passes at ") for k in values if k.startswith("math_passes at ")):
        right, passes, right_16, passes_16 = (
            torch.cat([of[f"{task}{what} at {threshold}"] for task in metrics.GENERATION], -1)
            for of in (values, base) for what in ("", "_passes"))
        found[f"accuracy at {threshold}"] = bootstrap(right.flatten())
        found[f"passes at {threshold}"] = bootstrap(passes.flatten())
        found[f"per pass at {threshold}"] = bootstrap(
            right, passes, right_16, passes_16, of=lambda r, p, r_16, p_16: r / p / (r_16 / p_16))
    return found


def significant(interval, differences) -> bool:
    """Whether the interval (mean, low, high) of differences (S, n) is clear of 0 and all seeds have its sign."""
    by_seed = differences.mean(-1)
    return interval[1] * interval[2] > 0 and bool((by_seed > 0).all() or (by_seed < 0).all())


def columns(record: dict) -> list:
    """What a table shows of a row: [(heading, text of (row, setting of the row above)), ...]."""
    last, out, one = record["rows"][-1], [], len(record["thresholds"]) == 1

    def add(heading, measure, scale=100, digits=1, sign=""):
        if measure in last:
            out.append((heading, lambda row, _: interval(row[measure], scale, digits, sign) if measure in row else ""))

    def compare(heading, measure, scale, zero=0):
        out.append((heading, lambda row, above: against(row, above, measure, scale, zero)))

    add("KL from 16 bit, 10⁻³ nats/token", "kl", 1000)
    if "kl" in last:
        compare("against the row above (or the one named)", "kl", 1000)
        out.append(("recovered %", lambda row, _: f"{100 * row['recovered']:.1f}" if "recovered" in row else ""))
    add("NELBO penalty", "penalty", 1000)
    for task in metrics.TASKS:
        add(f"{task} %", task)
    add("mean of the tasks, points from 16 bit", "mean", 100, 1, "+")
    add("same tokens %", "tokens")
    for t in record["thresholds"]:
        for task in metrics.GENERATION if one else ():
            add(f"{task} %, τ = {t:g}", at(task, t))
            add(f"{task} passes, τ = {t:g}", at(f"{task}_passes", t), 1, 2)
        if not one:
            add(f"accuracy %, τ = {t:g}", at("accuracy", t))
            add(f"passes, τ = {t:g}", at("passes", t), 1, 2)
        add(f"right answers per pass, % of 16 bit, τ = {t:g}", at("per pass", t))
        if one and "kl" not in last:
            compare("against the row above (or the one named) in %", at("per pass", t), 100, 1)
    return out


def against(row: dict, above: str, measure: str, scale: float, zero: float) -> str:
    """How a measure differs from that of another row, which is named unless it is the row `above`."""
    other = row.get("against", {})
    if measure not in other:
        return ""
    difference = "{:+.1f} ({:+.1f} to {:+.1f})".format(*(scale * (value - zero) for value in other[measure]))
    star = " *" if other.get("significant") else ""
    return difference + star + ("" if other["setting"] == above else f" {other['setting']}")


def markdown(record: dict) -> str:
    shown, rows = columns(record), record["rows"]
    table = markdown_table(["setting", *(heading for heading, _ in shown)], [
        [row["setting"], *(text(row, above["setting"]) for _, text in shown)]
        for above, row in zip([{"setting": ""}, *rows], rows, strict=False)])
    note = (f"`{record['command']}`: {record['seeds']} calibration seeds, {record['problems']} problems per task and "
            f"{record['sequences']} sequences of each kind for each; ± half a 95 % bootstrap interval over seeds and "
            f"their examples (of a task: over its problems), differences with theirs, * where it is clear of 0 and all "
            f"seeds agree; torch {record['torch']} on {record['device']}, commit {record['commit']}.")
    return f"{table}\n\n{note}"
