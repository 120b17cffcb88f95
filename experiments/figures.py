"""The paper's figures from activations measured on the embedded model: python evaluate.py --figure 3 [--stress 8]

    1     masked against unmasked activations along the denoising steps (Fig. 1)
    3     error of the hidden state along the denoising steps, with and without TAC (Fig. 3)
    4     outliers of the attention output's input, block by block, at the first step (Fig. 4)
    5     beyond the paper: energy that gates take away, per linear, for each way to choose the subspaces
    6     beyond the paper: KL from 16 bit against bits for every method, from the published tables in `results/`
    hero  README's first picture: KL from 16 bit by method, plain and with outlier channels, from the same tables

A figure is written as PNG and SVG, with its numbers beside it as JSON, to the folder of --out (`out/figures`).
"""

import json
import sys
from pathlib import Path
from typing import NamedTuple

import matplotlib
import matplotlib.pyplot as plt
import torch
from matplotlib import ticker

from calibrate import quantize_model
from calibration.segments import masked_copies
from calibration.streams import run_block
from checkpoint.families import FUSED
from experiments.tables import RESULTS, SETTINGS
from methods import QuantConfig
from methods.sgat import allocate_subspaces, initial_basis
from model import load_model
from runtime.layers import QuantLinear
from runtime.processes import Refused
from runtime.sampling import denoise
from starquant import state_gate, transform
from tiny import tasks
from tiny.stress import stress

matplotlib.use("Agg")
# Okabe and Ito's palette, told apart by colour-blind readers
BLUE, ORANGE, GREEN, RED, PURPLE, SKY, GREY, BLACK = (
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#999999", "#000000")
DIM = "#707070"


class Look(NamedTuple):
    color: str
    marker: str
    linestyle: str = "-"


# how a method looks in every figure; a broken line is a variant of the method that has the colour to itself
LOOKS = {"RTN": Look(GREY, "x"), "GPTQ": Look(GREY, "v", "--"),
         "AWQ": Look(PURPLE, "<"), "DLLMQuant+": Look(PURPLE, ">", "--"),
         "QuaRot": Look(BLUE, "^"), "QuaRot*": Look(BLUE, "^", "--"), "DLLMQuant++": Look(SKY, "p"),
         "FlatQuant": Look(ORANGE, "P"), "FreeAct": Look(ORANGE, "h", "--"),
         "STaR-Quant": Look(RED, "s"), "STaR-Quant, P dense": Look(RED, "d", "--"),
         "STaR-Quant without TAC": Look(RED, "o", ":"), "starquant+ (ours)": Look(GREEN, "D")}
STYLE = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25,
         "legend.frameon": False, "svg.hashsalt": "starquant", "figure.constrained_layout.use": True}
PROMPT, WRITTEN, PASSAGES = 40, 24, 48  # tokens given, tokens written one a step, english passages
SEED = 20


def denoising_states(model, prompts):
    """Token ids before every step of a greedy run that writes WRITTEN tokens behind prompts (n, PROMPT)."""
    start = torch.full((len(prompts), WRITTEN), model.mask_id, device=prompts.device)
    steps = [step.ids for step in denoise(model, prompts, WRITTEN, WRITTEN)]
    return [torch.cat((prompts, start), 1), *steps[:-1]]


@torch.no_grad()
def inputs_of(model, ids, names=FUSED):
    """Inputs of the linears `names` of every block for token ids (n, L): a list of {name: (n, L, d)}."""
    x, state, rope, _ = model.prepare(ids)
    out = []
    for block in model.blocks:
        x, seen = run_block(block, x, state, rope, watch=names)
        out.append(seen)
    return out


def prompts_for(model):
    ids, _ = tasks.english_segments(model.tokenizer, "eval", PASSAGES, PROMPT, SEED)
    return ids.to(model.device)


def figure_1(model):
    """Histograms of one input at four steps, and the size of both states' activations at every step."""
    states = denoising_states(model, prompts_for(model))
    block, name = len(model.blocks) // 2, "qkv"
    rms, axes_at = {"masked": [], "unmasked": []}, [0, WRITTEN // 3, 2 * WRITTEN // 3, WRITTEN - 1]
    figure, axes = plt.subplots(1, 5, figsize=(11, 2.4), width_ratios=[1, 1, 1, 1, 1.35])
    panels = dict(zip(axes_at, axes, strict=False))
    for step, ids in enumerate(states):
        x, masked = inputs_of(model, ids, (name,))[block][name], ids == model.mask_id
        for label, where, colour in (("masked", masked, ORANGE), ("unmasked", ~masked, BLUE)):
            values = x[where]
            rms[label].append(float(values.square().mean().sqrt()))
            if step in panels:
                panels[step].hist(values.flatten().cpu().numpy(), bins=80, density=True, histtype="step", color=colour,
                                  linewidth=1.2, label=label)
    limit = max(abs(v) for p in panels.values() for v in p.get_xlim())
    for step, panel in panels.items():
        panel.set(title=f"step {step + 1} of {WRITTEN}", yscale="log", xlim=(-limit, limit), ylim=(1e-4, 3),
                  xlabel="activation")
    axes[0].set_ylabel("density")
    for (label, values), colour, marker in zip(rms.items(), (ORANGE, BLUE), "os", strict=True):
        axes[4].plot(range(1, WRITTEN + 1), values, color=colour, marker=marker, markersize=3, label=label)
    axes[4].set(title="root mean square", xlabel="denoising step")
    axes[4].legend(fontsize=7)
    return figure, {"block": block, "linear": name, "rms": rms}


VARIANTS = {"RTN": {"method": "rtn", "kv_bits": 4, "softmax_bits": 4},
            "QuaRot": {"method": "quarot", "kv_bits": 4, "softmax_bits": 4}, "QuaRot*": {"method": "quarot"},
            "STaR-Quant without TAC": {"tac": "none"}, "STaR-Quant": {}, "starquant+ (ours)": {"method": "starquant+"}}


@torch.no_grad()
def figure_3(model):
    """Relative MSE of the final hidden state: on the 16-bit model's states, and on each model's own."""
    tokens, region = tasks.calibration_set(model.tokenizer, 128, 64, SEED)
    prompts = prompts_for(model)
    reference = denoising_states(model, prompts)
    exact = [model.hidden(ids) for ids in reference]

    def error(hidden, step):
        return float((hidden - exact[step]).square().sum() / exact[step].square().sum())

    numbers = {}
    for label, setting in VARIANTS.items():
        quantized = quantize_model(model, tokens, QuantConfig(**setting, seed=SEED), region)
        own = denoising_states(quantized, prompts)
        numbers[label] = {"same": [error(quantized.hidden(ids), t) for t, ids in enumerate(reference)],
                          "own": [error(quantized.hidden(ids), t) for t, ids in enumerate(own)]}
    return draw_3(numbers), numbers


def draw_3(numbers):
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2))
    for axis, kind, title in zip(axes, ("same", "own"), ("on the 16-bit model's states", "on its own states"),
                                 strict=True):
        for label, values in numbers.items():
            axis.plot(range(1, WRITTEN + 1), values[kind], **LOOKS[label]._asdict(), markersize=3, linewidth=1.2,
                      label=label)
        axis.set(title=title, xlabel="denoising step", yscale="log")
    axes[0].set_ylabel("relative MSE of the hidden state")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def figure_4(model):
    """Quantiles of |input of the attention output projection| in every block at the first step."""
    ids = denoising_states(model, prompts_for(model))[0]
    shares = {"median": 0.5, "99 %": 0.99, "99.9 %": 0.999}
    values = [seen["out"].abs().flatten() for seen in inputs_of(model, ids, ("out",))]
    numbers = {k: [float(torch.quantile(v, q)) for v in values] for k, q in shares.items()}
    numbers["maximum"] = [float(v.max()) for v in values]
    figure, axis = plt.subplots(figsize=(4.6, 2.8))
    blocks = range(1, len(values) + 1)
    for (label, heights), colour, marker in zip(numbers.items(), (GREY, SKY, BLUE, RED), "osv^", strict=True):
        axis.plot(blocks, heights, color=colour, marker=marker, label=label)
    axis.set(xlabel="block", ylabel="|input of the output projection|", yscale="log", xticks=list(blocks))
    axis.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_locator(ticker.NullLocator())
    figure.legend(loc="outside lower center", fontsize=8, ncols=4)
    return figure, numbers


@torch.no_grad()
def figure_5(model):
    """Share of energy that gating removes from each linear's input, per way to choose the subspaces."""
    config = QuantConfig(seed=SEED, tac="none")
    tokens, region = tasks.calibration_set(model.tokenizer, 128, 64, SEED)
    ids = masked_copies(tokens, region, model.mask_id, config).to(model.device)
    fitted = {"learned from random (paper)": quantize_model(model, tokens, config, region),
              "learned from closed form": quantize_model(
                  model, tokens, QuantConfig(seed=SEED, tac="none", allocation="closed_form"), region)}
    state, generator = (ids == model.mask_id).flatten(), torch.Generator().manual_seed(SEED)
    numbers = {k: [] for k in ("random", "learned from random (paper)", "closed form", "learned from closed form")}
    for i, seen in enumerate(inputs_of(model, ids)):
        for name in FUSED:
            x = seen[name].flatten(0, 1).float()
            d = x.shape[1]
            d_s = d // config.state_fraction
            bases = {"random": initial_basis(d, "kronecker", generator),
                     "closed form": allocate_subspaces(x, state, d_s, d_s, "kronecker", generator),
                     **{k: getattr(m.blocks[i], name).P[0] for k, m in fitted.items()}}
            lost = 1 - state_gate(state, d, d_s, d_s)
            for k, P in bases.items():
                numbers[k].append(float(transform(x, P.to(x), lost).square().sum() / x.square().sum()))
    return draw_5(numbers), numbers


def draw_5(numbers):
    figure, axis = plt.subplots(figsize=(8, 2.8))
    places = range(len(numbers["random"]))
    for (label, shares), colour, marker in zip(numbers.items(), (GREY, RED, SKY, BLACK), "xosD", strict=True):
        axis.plot(places, shares, color=colour, marker=marker, markersize=4, linewidth=1, label=label)
    axis.axhline(1 / 32, color=BLACK, linewidth=0.8, linestyle=":")
    axis.text(places[-1] + 0.2, 1 / 32, "1/32", va="center", fontsize=8)
    axis.set(ylabel="energy gated away", yscale="log", xticks=list(places),
             xticklabels=FUSED * (len(places) // len(FUSED)))
    axis.tick_params(axis="x", rotation=90, labelsize=7)
    figure.legend(loc="outside lower center", ncols=4, fontsize=8)
    return figure


def published_rows(number: str, stress: str = "") -> list[dict]:
    """Rows of a published table, of the one with tasks if there is one, else of the one of likelihoods."""
    files = (RESULTS / f"table-{number}{stress}{kind}.json" for kind in ("", "-nelbo"))
    file = next((f for f in files if f.exists()), None)
    return json.loads(file.read_text(encoding="utf-8"))["rows"] if file else []


def figure_6():
    """KL divergence from 16 bit against weight and activation bits, with intervals, from the published tables."""
    bits = ["W8A8", "W4A8", "W8A4", "W4A4", "W4A3", "W3A4", "W3A3", "W2A4"]
    points: dict[str, dict[str, list]] = {}
    for number, only in (("5", "W8A8"), ("1", "W4A4"), ("low-bit", None)):
        for row in published_rows(number):
            method, _, width = row["setting"].rpartition(" ") if only is None else (row["setting"], "", only)
            if "kl" in row and method in SETTINGS:
                points.setdefault(method, {})[width] = row["kl"]
    if not points:
        raise Refused(f"{RESULTS} holds no table-1, table-5 or table-low-bit; run evaluate.py --table first.")
    figure, axis = plt.subplots(figsize=(6, 3.2))
    for method, values in points.items():
        # NaN where nothing was measured: a line joins neighbours only
        mean, low, high = zip(*(values.get(b, [float("nan")] * 3) for b in bits), strict=True)
        axis.plot(mean, **LOOKS[method]._asdict(), markersize=4, linewidth=1.1, label=method)
        axis.fill_between(range(len(bits)), low, high, color=LOOKS[method].color, alpha=0.15, linewidth=0)
    axis.set(xticks=range(len(bits)), xticklabels=bits, ylabel="KL from 16 bit, nats/token", yscale="log")
    axis.legend(fontsize=7, ncols=2)
    return figure, points

def figure_hero():
    """README's first picture: what W4A4 costs by method, plain and with outlier channels, by the published Table 1."""
    plain, stressed = ({row["setting"]: [1000 * v for v in row["kl"]] for row in published_rows("1", kind)
                        if "kl" in row} for kind in ("", "-stress4"))
    if not plain.keys() == stressed.keys() != set():
        raise Refused(f"{RESULTS} holds no table-1 and table-1-stress4 of the same rows; run evaluate.py --table 1.")
    names = sorted(plain, key=lambda name: -plain[name][0])
    figure, axis = plt.subplots(figsize=(8, 3.9))
    dot = {"markersize": 7, "markeredgewidth": 1.4}
    for place, name in enumerate(names):
        colour = LOOKS[name].color if name.startswith(("starquant+", "STaR-Quant")) else DIM
        points = [(*stressed[name], "white"), (*plain[name], colour)]  # mean, low, high, inside of the dot
        axis.plot([mean for mean, *_ in points], [place] * 2, color=colour, linewidth=3, alpha=0.3, zorder=1)
        for mean, low, high, inside in points:
            axis.plot([low, high], [place] * 2, color=colour, linewidth=1.2, zorder=2)
            axis.plot(mean, place, "o", color=colour, markerfacecolor=inside, zorder=3, **dot)
        left, right = min(points), max(points)
        axis.text(min(p[1] for p in points) / 1.06, place, f"{left[0]:.1f}", color=colour, ha="right", va="center")
        axis.text(max(p[2] for p in points) * 1.06, place, f"{right[0]:.1f}", color=colour, va="center")
    axis.set(xscale="log", xlim=(1.4, 700), yticks=range(len(names)), yticklabels=names,
             xlabel="KL divergence from the 16-bit model, 10⁻³ nats per token (log scale; further left is better)")
    for label in axis.get_yticklabels():
        if label.get_text().startswith(("starquant+", "STaR-Quant")):
            label.set(color=LOOKS[label.get_text()].color, fontweight="bold")
    axis.xaxis.set_major_locator(ticker.FixedLocator([2, 5, 10, 20, 50, 100, 200, 500]))
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_locator(ticker.NullLocator())
    axis.tick_params(length=0)
    axis.spines["left"].set_visible(False)
    axis.grid(axis="y", visible=False)
    for inside, label in ((DIM, "the model as it is"), ("white", "with outlier channels, same 16-bit function")):
        axis.plot([], [], "o", color=DIM, markerfacecolor=inside, label=label, **dot)
    axis.legend(loc="upper right", fontsize=9)
    figure.suptitle("What 4-bit weights and activations cost, by method", x=0.01, ha="left", fontsize=12,
                    fontweight="bold")
    axis.set_title("embedded model, 2.8 M parameters; three calibration seeds; lines are 95 % intervals", fontsize=8.5,
                   color=DIM, loc="right")
    return figure, {"plain": plain, "stressed": stressed}




FIGURES = {"1": figure_1, "3": figure_3, "4": figure_4, "5": figure_5, "6": figure_6, "hero": figure_hero}


def make(number: str, out: Path, model: str | None = None, c: float = 1.0, device: str = "auto") -> dict:
    """Draw one figure into the folder `out`; those from activations need a 16-bit model, and c its outlier channels."""
    given = []
    if model is not None:
        loaded = load_model(model, device, torch.float32)  # what is shown is the error of quantization alone
        if loaded.tokenizer is None:
            raise Refused(f"{model} has no tokenizer.json, which text needs.")
        if any(isinstance(m, QuantLinear) for m in loaded.modules()):
            raise Refused(f"{model} is quantized already; a figure takes the 16-bit model.")
        given = [loaded if c == 1 else stress(loaded, c)]
    out.mkdir(parents=True, exist_ok=True)
    with plt.rc_context(STYLE):
        figure, numbers = FIGURES[number](*given)
    name = "" if model in (None, "tiny") else f"-{Path(model).name}"
    stem = ("hero" if number == "hero" else f"figure-{number}") + name + (f"-stress{c:g}" if c != 1 else "")
    figure.savefig(out / f"{stem}.png", dpi=160)
    figure.savefig(out / f"{stem}.svg", metadata={"Date": None})
    plt.close(figure)
    (out / f"{stem}.json").write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
    print(f"{out / stem}.png", file=sys.stderr)
    return {"out": str(out), "figure": stem}
