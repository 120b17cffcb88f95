"""How each model is evaluated on the paper's nine benchmarks, and what the paper (Tables 1 and 5) and others report.

There is one row per model and task: the harness' task, shots, Monte-Carlo samples, guidance, generation lengths.

Sources
    [L] ML-GSAI/LLaDA, `EVAL.md` and `eval_llada_lm_eval.sh` (lm-evaluation-harness; its batch size is mc_batch here)
    [O] the same repository's OpenCompass settings (steps = gen_length, chat template), run through the harness' task
    [D] DreamLM/Dream, `eval/eval_dream_mc.sh`, `eval_dream_gen.sh` and `eval_instruct/eval.sh`
    [-] not published for this model. The setting is LLaDA-8B-Base's, so compare it with your own 16-bit run only.

The paper says only that it follows LLaDA's setup. Several of its 16-bit numbers are those published by [L], [O], [D].
"""

from dataclasses import dataclass, field, replace
from pathlib import Path

from checkpoint.families import ALIASES
from checkpoint.folder import read_json
from runtime.measures import markdown_table

BENCHMARKS = ("truthfulqa_mc2", "arc_challenge", "hellaswag", "winogrande", "piqa", "mmlu", "ceval-valid", "humaneval",
              "gsm8k")


@dataclass(frozen=True)
class Setting:
    """One task of one model."""

    task: str  # the harness' name
    shots: int | None = None  # None: as the task says
    mc_num: int = 128  # masks per likelihood
    mc_batch: int = 8  # masks in a stratified batch
    cfg: float = 0.0  # classifier-free guidance
    generation: dict = field(default_factory=dict)  # options of `sampling.generate`
    chat: bool = False  # apply the chat template
    source: str = "L"
    runs_code: bool = False  # judging it executes what the model wrote


def _length(n: int, block: int | None = None, **more) -> dict:
    """One token per step."""
    return {"gen_length": n, "steps": n, "block_length": block or n, **more}


def _dream(n: int, temperature: float, top_p: float) -> dict:
    return {"gen_length": n, "steps": n, "temperature": temperature, "top_p": top_p, "algorithm": "entropy"}


_LLADA_BASE = {s.task: s for s in (
    Setting("truthfulqa_mc2", 0, cfg=2.0), Setting("arc_challenge", 0, cfg=0.5), Setting("hellaswag", 0, cfg=0.5),
    Setting("winogrande", 5), Setting("piqa", 0, cfg=0.5),
    # one-token answers: one mask is exact
    Setting("mmlu", 5, mc_num=1, mc_batch=1), Setting("ceval-valid", 5, mc_num=1, mc_batch=1),
    Setting("humaneval", 0, generation=_length(1024), runs_code=True), Setting("gsm8k", 5, generation=_length(1024)))}
_BORROWED = {t: replace(s, source="-") for t, s in _LLADA_BASE.items()}
_CODE = Setting("humaneval_instruct", 0, source="O", chat=True, runs_code=True)
_MATH = Setting("gsm8k", 4, source="O", chat=True)
_DREAM_BASE = {t: replace(_LLADA_BASE[t], mc_num=128, mc_batch=32, cfg=0.0,  # with as many shots
                          source="-" if t in ("truthfulqa_mc2", "ceval-valid") else "D") for t in BENCHMARKS[:7]}
PROTOCOLS = {
    "llada-8b": _LLADA_BASE,
    "llada-8b-instruct": _BORROWED | {
        "humaneval": replace(_CODE, generation=_length(512, logits_eos_inf=True)),
        "gsm8k": replace(_MATH, generation=_length(256, 8))},
    "llada-1.5": _BORROWED | {
        "humaneval": replace(_CODE, generation=_length(512, 32, confidence_eos_eot_inf=True)),
        "gsm8k": replace(_MATH, generation=_length(256, 16, confidence_eos_eot_inf=True))},
    "dream-7b": _DREAM_BASE | {
        "humaneval": Setting("humaneval", 0, generation=_dream(512, 0.2, 0.95), source="D", runs_code=True),
        "gsm8k": Setting("gsm8k_cot", 8, generation=_dream(256, 0.0, 0.95), source="D")},
    "dream-7b-instruct": {t: replace(s, source="-") for t, s in _DREAM_BASE.items()} | {
        "humaneval": replace(_CODE, generation=_dream(768, 0.1, 0.9), source="D"),
        "gsm8k": Setting("gsm8k_cot", 0, generation=_dream(256, 0.1, 0.9), chat=True, source="D")},
}
# what the harness calls the results, the paper's measure ("accuracy") first
METRICS = {"acc,none": "acc", "acc_norm,none": "acc_norm", "pass@1,create_test": "pass@1",
           "exact_match,strict-match": "exact match", "exact_match,flexible-extract": "exact match, flexible"}
# Tables 1 (W4A4) and 5 (W8A8), in the order of BENCHMARKS, in percent
REPORTED = {
    "LLaDA-8B": {
        "FP": (47.49, 44.03, 54.06, 74.90, 74.65, 65.85, 69.54, 32.92, 67.48),
        "RTN W4A4": (40.45, 41.83, 45.40, 64.72, 67.95, 49.26, 57.95, 14.02, 16.56),
        "AWQ W4A4": (40.87, 42.92, 46.14, 66.88, 69.43, 51.22, 58.43, 20.10, 36.88),
        "DLLMQuant+ W4A4": (41.53, 43.44, 46.51, 67.87, 70.12, 51.72, 59.38, 22.13, 40.66),
        "QuaRot W4A4": (42.53, 44.20, 49.76, 69.85, 70.75, 55.96, 56.32, 25.33, 44.57),
        "DLLMQuant++ W4A4": (43.53, 44.18, 51.00, 71.85, 73.94, 57.77, 61.22, 28.92, 56.25),
        "STaR-Quant W4A4": (49.12, 44.23, 52.75, 72.92, 73.85, 62.95, 64.56, 35.98, 57.29),
        "STaR-Quant W8A8": (48.56, 44.25, 54.40, 68.72, 74.23, 64.36, 67.87, 36.09, 65.74)},
    "LLaDA-1.5": {
        "FP": (47.20, 88.50, 74.70, 74.80, 74.86, 66.00, 70.05, 49.40, 83.30),
        "RTN W4A4": (39.51, 81.77, 56.82, 65.27, 66.91, 48.88, 58.96, 23.44, 36.56),
        "AWQ W4A4": (40.96, 82.22, 66.84, 67.93, 69.32, 51.12, 60.03, 30.07, 57.95),
        "DLLMQuant+ W4A4": (42.14, 83.38, 70.09, 68.69, 70.22, 51.63, 61.28, 32.44, 59.55),
        "QuaRot W4A4": (43.21, 84.23, 65.34, 69.55, 70.17, 56.23, 57.66, 37.33, 65.86),
        "DLLMQuant++ W4A4": (43.87, 84.18, 69.20, 71.74, 73.58, 57.27, 60.04, 44.58, 74.30),
        "STaR-Quant W4A4": (48.77, 85.12, 72.43, 72.09, 73.36, 63.29, 64.34, 46.53, 76.45),
        "STaR-Quant W8A8": (49.72, 86.50, 74.31, 73.98, 74.24, 65.79, 68.96, 47.55, 79.37)},
    "Dream-7B": {
        "FP": (49.76, 59.80, 73.30, 74.50, 75.66, 69.50, 64.89, 57.90, 77.20),
        "RTN W4A4": (41.25, 54.34, 58.32, 64.52, 66.26, 51.51, 49.89, 28.90, 30.82),
        "AWQ W4A4": (43.66, 57.82, 65.57, 67.13, 68.96, 55.50, 53.27, 33.14, 48.98),
        "DLLMQuant+ W4A4": (44.14, 58.38, 66.93, 68.66, 69.53, 57.63, 54.21, 35.12, 51.14),
        "QuaRot W4A4": (47.58, 58.18, 67.13, 70.05, 70.36, 69.50, 53.19, 34.48, 59.20),
        "DLLMQuant++ W4A4": (47.86, 59.43, 70.14, 71.54, 72.09, 69.50, 55.89, 44.50, 66.17),
        "STaR-Quant W4A4": (48.72, 59.76, 71.32, 72.98, 74.34, 69.37, 58.79, 47.43, 69.57),
        "STaR-Quant W8A8": (49.02, 60.28, 72.89, 73.50, 74.23, 70.11, 62.89, 51.76, 73.44)},
}
REPORTED_MODEL = {"llada-8b": "LLaDA-8B", "llada-1.5": "LLaDA-1.5", "dream-7b": "Dream-7B"}
# QDLM (arXiv 2508.14896), read in the source: the same benchmarks under its own settings; None: not reported
QDLM = {
    "LLaDA-8B": {
        "FP": (None, 46.4, None, 69.9, 74.6, 65.7, None, 32.9, 69.7),
        "SmoothQuant W4A4": (None, 29.2, None, 49.4, 58.8, 27.1, None, 0.0, 0.3),
        "QuaRot W4A4": (None, 43.7, None, 63.4, 68.1, 61.8, None, 23.8, 62.9),
        "DuQuant W4A4": (None, 42.8, None, 69.3, 64.9, 64.0, None, 25.6, 64.4)},
}
# means at W4A4 of publications that we know at second hand only; their tasks and settings differ from the paper's
SECOND_HAND = {
    "LLaDA-8B": ("FAIR-Calib (arXiv 2606.06547) 61.09 of 62.12 on ten tasks",),
    "LLaDA-1.5": ("SoloQ (arXiv 2610.07121) 68.48 of 69.86 on the paper's nine tasks",
                  "FAIR-Calib (arXiv 2606.06547) 72.75 of 73.53 on ten tasks"),
    "Dream-7B": ("SoloQ (arXiv 2610.07121) 62.53 on the paper's nine tasks",
                 "FAIR-Calib (arXiv 2606.06547) 64.64 of 70.01 on ten tasks"),
}


def source_name(name: str, folder: Path) -> str:
    """The name of the 16-bit model: of a quantized folder what its `starquant.json` says."""
    run = read_json(folder / "starquant.json", {}).get("run")
    source = run.get("model") if isinstance(run, dict) else None
    return source if isinstance(source, str) else name


def protocol_of(name: str, family: str) -> str:
    """The protocol of a model by its alias, hub id or folder name; an unknown name gets its family's base model's."""
    known = {spelled: alias for alias, hub in ALIASES.items() for spelled in (alias, hub, hub.split("/")[1])}
    return known.get(name) or known.get(Path(name).name) or ("dream-7b" if family == "dream" else "llada-8b")


def setting(protocol: str, task: str, mc_num=None, gen_length=None, steps=None) -> Setting:
    """The protocol's setting; any other task of the harness runs as it is defined there. What is given replaces it."""
    s = PROTOCOLS[protocol].get(task) or Setting(task, source="the task's own")
    if mc_num:
        s = replace(s, mc_num=min(mc_num, s.mc_num), mc_batch=min(mc_num, s.mc_batch))
    if gen_length:
        s = replace(s, generation=s.generation | {name: min(gen_length, s.generation.get(name, gen_length))
                                                  for name in ("gen_length", "steps", "block_length")})
    return replace(s, generation=s.generation | {"steps": steps}) if steps else s


def table(protocol: str, results: dict[str, dict]) -> str:
    """Our numbers beside published ones, in percent. results: task -> what the harness measured, {"acc,none": ...}."""
    model = REPORTED_MODEL.get(protocol)
    beside = {f"{source}: {name}": row for source, rows in (("paper", REPORTED), ("QDLM", QDLM))
              for name, row in rows.get(model, {}).items()}
    rows = []
    for task, values in results.items():
        for i, (key, name) in enumerate((k, n) for k, n in METRICS.items() if k in values):
            error = values.get(key.replace(",", "_stderr,"))
            here = f"{100 * values[key]:.2f}" + (f" ± {100 * error:.2f}" if isinstance(error, float) else "")
            known = [row[BENCHMARKS.index(task)] if task in BENCHMARKS and i == 0 else None for row in beside.values()]
            rows.append([task, name, here, *map(_percent, known)])
    if set(BENCHMARKS) <= set(results):
        mean = sum(next(results[t][k] for k in METRICS if k in results[t]) for t in BENCHMARKS) / len(BENCHMARKS)
        known = [None if None in row else sum(row) / len(row) for row in beside.values()]
        rows.append(["average", "", f"{100 * mean:.2f}", *map(_percent, known)])
    text = markdown_table(["task", "measure", "here", *beside], rows)
    if not model:
        return text
    own = "QDLM's (arXiv 2508.14896) are under its own settings. " * (model in QDLM)
    return (f"{text}\n\nThe paper's columns are for {model} (its Tables 1 and 5). {own}Means at W4A4 known at second "
            f"hand: {'; '.join(SECOND_HAND[model])}.")


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
