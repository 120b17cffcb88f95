"""The paper's figures from activations measured on the embedded model: python evaluate.py --figure 3 [--stress 8]

    1     masked against unmasked activations along the denoising steps (Fig. 1)
    3     error of the hidden state along the denoising steps, with and without TAC (Fig. 3)
    4     outliers of the attention output's input, block by block, at the first step (Fig. 4)
    5     beyond the paper: energy that gates take away, per linear, for each way to choose the subspaces
    6     beyond the paper: KL from 16 bit by bits and method, from the published tables in `results/`
    hero  README's first picture: KL from 16 bit by method, plain and with outlier channels, from the same tables
    passes     accuracy against passes of parallel decoding, one curve a method, from `results/passes.json`
    denoising  16 bit, RTN and STaR-Quant write the answer to README's question, an SVG that moves

A figure is written as PNG and SVG, with its numbers beside it as JSON, to the folder of --out (`out/figures`). A method
has the same colour and mark in every figure. All are made for the width of README's page.
"""

import sys
from pathlib import Path
from typing import NamedTuple

import matplotlib
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from matplotlib import ticker

from calibrate import quantize_model
from calibration.closing import QUESTION
from calibration.segments import masked_copies
from calibration.streams import inputs_of
from checkpoint.families import FUSED
from checkpoint.folder import read_json, write_json, write_text
from checkpoint.loading import is_quantized
from experiments import watch
from experiments.animation import Panel, picture
from experiments.cells import RESULTS
from experiments.rows import SETTINGS
from methods import QuantConfig
from methods.settings import Settings
from methods.sgat import allocate_subspaces, initial_basis
from model import load_model
from runtime.measures import trajectory
from runtime.processes import Bar, Refused
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


# how a method looks in every figure; a broken line and a hollow mark are a variant of the method of the same colour
LOOKS = {"16-bit": Look(BLACK, "*"), "RTN": Look(GREY, "x"), "GPTQ": Look(GREY, "v", "--"),
         "AWQ": Look(PURPLE, "<"), "DLLMQuant+": Look(PURPLE, ">", "--"),
         "QuaRot": Look(BLUE, "^"), "QuaRot*": Look(BLUE, "^", "--"), "DLLMQuant++": Look(SKY, "p"),
         "FlatQuant": Look(ORANGE, "P"), "FreeAct": Look(ORANGE, "h", "--"),
         "STaR-Quant": Look(RED, "s"), "STaR-Quant, P dense": Look(RED, "d", "--"),
         "STaR-Quant without TAC": Look(RED, "o", ":"), "starquant+ (ours)": Look(GREEN, "D")}
WIDTH = 8.4  # inches, which README shows on 838 pixels
STYLE = {"font.size": 9, "axes.titlesize": 9.5, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
         "grid.alpha": 0.25, "legend.frameon": False, "svg.hashsalt": "starquant", "lines.markersize": 5,
         "lines.linewidth": 1.2, "figure.constrained_layout.use": True}
PROMPT, WRITTEN, PASSAGES = 40, 24, 48  # tokens given, tokens written one a step, english passages
SEED = 20
ANSWER = "19"  # to README's question


def style(label: str) -> dict:
    """A method's look, and its label, as matplotlib takes them."""
    look = LOOKS[label]
    return {**look._asdict(), "markerfacecolor": look.color if look.linestyle == "-" else "none", "label": label}


def plain_numbers(axis, subs=(1, 2, 5), form: str = "{x:g}"):
    """Ticks of a logarithmic axis as numbers without powers."""
    axis.set_major_locator(ticker.LogLocator(subs=subs))
    axis.set_major_formatter(form)
    axis.set_minor_locator(ticker.NullLocator())


def denoising_states(model, prompts):
    """Token ids before every step of a greedy run that writes WRITTEN tokens behind prompts (n, PROMPT)."""
    steps = [step.ids for step in denoise(model, prompts, WRITTEN, WRITTEN)]
    return [F.pad(prompts, (0, WRITTEN), value=model.mask_id), *steps[:-1]]


def prompts_for(model):
    ids, _ = tasks.english_segments(model.tokenizer, "eval", PASSAGES, PROMPT, SEED)
    return ids.to(model.device)


def figure_1(model):
    """Histograms of one input at four steps, and the size of both states' activations at every step."""
    block, name, rms = len(model.blocks) // 2, "qkv", {"masked": [], "unmasked": []}
    figure, axes = plt.subplots(1, 5, figsize=(WIDTH, 2.6), width_ratios=[1, 1, 1, 1, 1.5])
    panels = dict(zip([0, WRITTEN // 3, 2 * WRITTEN // 3, WRITTEN - 1], axes, strict=False))
    for step, ids in enumerate(denoising_states(model, prompts_for(model))):
        *_, x, masked = list(inputs_of(model, ids, (name,)))[block]
        for label, where, colour in (("masked", masked, ORANGE), ("unmasked", ~masked, BLUE)):
            rms[label].append(float(x[where].square().mean().sqrt()))
            if step in panels:
                panels[step].hist(x[where].flatten().cpu().numpy(), bins=80, density=True, histtype="step",
                                  color=colour, linewidth=1.2, label=label)
    limit = max(abs(v) for p in panels.values() for v in p.get_xlim())
    for step, panel in panels.items():
        panel.set(title=f"step {step + 1} of {WRITTEN}", yscale="log", xlim=(-limit, limit), ylim=(1e-4, 20),
                  xlabel="activation")
        panel.tick_params(labelleft=step == 0)
    axes[0].set_ylabel("density")
    axes[0].legend(loc="upper left", fontsize=8, borderaxespad=0, handlelength=1)
    for (label, values), colour, marker in zip(rms.items(), (ORANGE, BLUE), "os", strict=True):
        axes[4].plot(range(1, WRITTEN + 1), values, color=colour, marker=marker, markersize=3, label=label)
    axes[4].set(title="root mean square", xlabel="denoising step", ylim=(0, 1.15 * max(map(max, rms.values()))))
    figure.suptitle(f"Input of q, k and v in block {block + 1} of {len(model.blocks)}", fontsize=10)
    return figure, {"block": block, "linear": name, "rms": rms}


VARIANTS = {"RTN": {"method": "rtn", "kv_bits": 4, "softmax_bits": 4},
            "QuaRot": {"method": "quarot", "kv_bits": 4, "softmax_bits": 4}, "QuaRot*": {"method": "quarot"},
            "STaR-Quant without TAC": {"tac": "none"}, "STaR-Quant": {}, "starquant+ (ours)": {"method": "starquant+"}}


def calibrated(model, label: str, config: Settings):
    """The embedded model quantized on its own text, behind a bar of its blocks."""
    tokens, region = tasks.calibration_set(model.tokenizer, 128, 64, config.seed)
    with Bar(total=len(model.blocks), desc=label, leave=False) as bar:
        return quantize_model(model, tokens, config, region, lambda *_: bar.update())


@torch.no_grad()
def figure_3(model):
    """Relative MSE of the final hidden state: on the 16-bit model's states, and on each model's own."""
    prompts = prompts_for(model)
    reference = denoising_states(model, prompts)
    exact, numbers = [model.hidden(ids) for ids in reference], {}
    for label, setting in VARIANTS.items():
        quantized = calibrated(model, label, QuantConfig(**setting, seed=SEED))
        numbers[label] = {kind: [float((quantized.hidden(ids) - want).square().sum() / want.square().sum())
                                 for ids, want in zip(states, exact, strict=True)]
                          for kind, states in (("same", reference), ("own", denoising_states(quantized, prompts)))}
    return draw_3(numbers), numbers


def draw_3(numbers):
    figure, axes = plt.subplots(1, 2, figsize=(WIDTH, 3.6), sharey=True)
    for axis, kind, title in zip(axes, ("same", "own"), ("on the 16-bit model's states", "on its own states"),
                                 strict=True):
        for label, values in numbers.items():
            size = 7 if label == "STaR-Quant without TAC" else 3.5  # a ring, since STaR-Quant's marks cover it
            axis.plot(range(1, WRITTEN + 1), values[kind], **style(label), markersize=size)
        axis.set(title=title, xlabel="denoising step", yscale="log")
    axes[0].set_ylabel("relative MSE of the hidden state")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, title=(
        "RTN and QuaRot have K, V and the softmax output in 4 bits, too; QuaRot* and the others in 16 bits"))
    return figure


def figure_4(model):
    """Quantiles of |input of the attention output projection| in every block at the first step."""
    ids = denoising_states(model, prompts_for(model))[0]
    values = [x.abs().flatten() for *_, x, _ in inputs_of(model, ids, ("out",))]
    numbers = {k: [float(torch.quantile(v, q)) for v in values]
               for k, q in {"median": 0.5, "99 %": 0.99, "99.9 %": 0.999, "maximum": 1}.items()}
    figure, axis = plt.subplots(figsize=(4.6, 2.8))
    blocks = range(1, len(values) + 1)
    for (label, heights), colour, marker in zip(numbers.items(), (GREY, SKY, BLUE, RED), "osv^", strict=True):
        axis.plot(blocks, heights, color=colour, marker=marker, label=label)
    axis.set(xlabel="block", ylabel="|input of the output projection|", yscale="log", xticks=list(blocks))
    plain_numbers(axis.yaxis)
    figure.legend(loc="outside lower center", fontsize=8, ncols=4)
    return figure, numbers


@torch.no_grad()
def figure_5(model):
    """Share of energy that gating removes from each linear's input, per way to choose the subspaces."""
    config = QuantConfig(seed=SEED, tac="none")
    tokens, region = tasks.calibration_set(model.tokenizer, 128, 64, SEED)
    ids = masked_copies(tokens, region, model.mask_id, config)
    kinds = {"learned from random (paper)": config,
             "learned from closed form": QuantConfig(seed=SEED, tac="none", allocation="closed_form")}
    fitted = {kind: calibrated(model, kind, setting) for kind, setting in kinds.items()}
    generator = torch.Generator().manual_seed(SEED)
    numbers = {k: [] for k in ("random", "learned from random (paper)", "closed form", "learned from closed form")}
    for place, _, x, state in inputs_of(model, ids):
        d, d_s = x.shape[1], x.shape[1] // config.state_fraction
        bases = {"random": initial_basis(d, "kronecker", generator),
                 "closed form": allocate_subspaces(x, state, d_s, d_s, "kronecker", generator),
                 **{k: getattr(m.blocks[place["block"]], place["linear"]).P[0] for k, m in fitted.items()}}
        lost = 1 - state_gate(state, d, d_s, d_s)
        for k, P in bases.items():
            numbers[k].append(float(transform(x, P.to(x), lost).square().sum() / x.square().sum()))
    return draw_5(numbers), numbers


def draw_5(numbers):
    figure, axes = plt.subplots(1, len(FUSED), figsize=(WIDTH, 2.9), sharey=True)
    looks = ("+", ":", BLACK, BLACK), ("s", "-", RED, RED), ("o", "--", BLACK, "none"), ("D", "-", BLACK, BLACK)
    for i, (axis, name) in enumerate(zip(axes, FUSED, strict=True)):
        for (label, shares), (marker, line, colour, inside) in zip(numbers.items(), looks, strict=True):
            percent = [100 * share for share in shares[i :: len(FUSED)]]
            axis.plot(range(1, len(percent) + 1), percent, color=colour, marker=marker, linestyle=line, label=label,
                      markerfacecolor=inside)
        axis.axhline(100 / 32, color=GREY, linewidth=0.8, zorder=0, label="1/32")
        axis.set(title=f"input of {name}", xlabel="block", yscale="log", xticks=range(1, len(percent) + 1))
    axes[0].set_ylabel("energy gated away")
    plain_numbers(axes[0].yaxis, (1, 2, 3, 5), "{x:g} %")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    return figure


def published_rows(number: str, stress: str = "") -> list[dict]:
    """Rows of a published table, of the one with tasks if there is one, else of the one of likelihoods."""
    files = (RESULTS / f"table-{number}{stress}{kind}.json" for kind in ("", "-nelbo"))
    return next((read_json(file)["rows"] for file in files if file.exists()), [])


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
    figure, axis = plt.subplots(figsize=(WIDTH, 4.2))
    for method in sorted(points, key=list(LOOKS).index):
        axis.plot([], [], **style(method) | {"linestyle": "none"})
    for place, width in enumerate(bits):
        here = sorted((m for m in points if width in points[m]), key=lambda m: -points[m][width][0])
        for i, method in enumerate(here):  # side by side, so that none hides another
            mean, low, high = points[method][width]
            axis.errorbar(place + (i + 0.5) / len(here) * 0.84 - 0.42, mean, [[mean - low], [high - mean]],
                          **style(method) | {"linestyle": "none", "label": None}, elinewidth=1)
        axis.axvspan(place - 0.5, place + 0.5, color=GREY, alpha=0.12 * (place % 2), linewidth=0)
    axis.set(xticks=range(len(bits)), xticklabels=bits, xlim=(-0.5, len(bits) - 0.5), yscale="log",
             ylabel="KL from 16 bit, nats/token")
    axis.grid(axis="x", visible=False)
    figure.legend(loc="outside lower center", ncols=4)
    return figure, points


def figure_passes():
    """Accuracy against passes per answer, one point a threshold τ and one curve a method, as `passes.json` has them."""
    numbers = read_json(RESULTS / "passes.json")
    figure, axis = plt.subplots(figsize=(WIDTH, 4))
    for label, curve in numbers["methods"].items():
        axis.plot(curve["passes"], [100 * share for share in curve["accuracy"]], **style(label))
    first = next(iter(numbers["methods"].values()))
    for threshold, *place in zip(numbers["threshold"], first["passes"], first["accuracy"], strict=True):
        axis.annotate(f"τ = {threshold:g}", (place[0], 100 * place[1]), (4, 6), textcoords="offset points", color=DIM,
                      fontsize=8)
    axis.set(xlabel="passes per answer (further left is faster)", ylabel="accuracy, %")
    figure.legend(loc="outside lower center", ncols=4)
    return figure, numbers


@torch.no_grad()
def figure_denoising(model):
    """Three models answer README's question, one token a pass, quantized as `calibrate.py` does it at seed 0."""
    writers = {"16 bit": model, **{f"{label}, W4A4": calibrated(model, label, QuantConfig(method=method))
                                   for label, method in (("RTN", "rtn"), ("STaR-Quant", "starquant"))}}
    ids = watch.encode_prompt(model, QUESTION, chat=False).to(model.device)
    panels, reference = [], None
    for label, writer in writers.items():
        (answer,), (when,) = (t.tolist() for t in trajectory(writer, ids, WRITTEN, WRITTEN))
        reference = reference or answer
        shown = ["".join(watch.visible(model.tokenizer.decode([token]))) or "·" for token in answer]
        right = model.tokenizer.decode(answer).rpartition("#### ")[2].strip() == ANSWER
        panels.append(Panel(label, shown, when, [a != b for a, b in zip(answer, reference, strict=True)],
                            "right" if right else f"wrong, it is {ANSWER}", right))
    return picture(QUESTION, panels, WRITTEN), [panel._asdict() for panel in panels]


def figure_hero():
    """README's first picture: what W4A4 costs by method, plain and with outlier channels, by the published Table 1."""
    plain, stressed = ({row["setting"]: [1000 * v for v in row["kl"]] for row in published_rows("1", kind)
                        if "kl" in row} for kind in ("", "-stress4"))
    if not plain.keys() == stressed.keys() != set():
        raise Refused(f"{RESULTS} holds no table-1 and table-1-stress4 of the same rows; run evaluate.py --table 1.")
    names = sorted(plain, key=lambda name: -plain[name][0])
    colours = [LOOKS[name].color if name.startswith(("starquant+", "STaR-Quant")) else DIM for name in names]
    figure, axis = plt.subplots(figsize=(8, 3.9))
    dot = {"markersize": 7, "markeredgewidth": 1.4}
    for place, (name, colour) in enumerate(zip(names, colours, strict=True)):
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
    for label, colour in zip(axis.get_yticklabels(), colours, strict=True):
        if colour != DIM:
            label.set(color=colour, fontweight="bold")
    plain_numbers(axis.xaxis)
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


FIGURES = {"1": figure_1, "3": figure_3, "4": figure_4, "5": figure_5, "6": figure_6, "hero": figure_hero,
           "passes": figure_passes, "denoising": figure_denoising}


def make(number: str, out: Path, model: str | None = None, c: float = 1.0, device: str = "auto") -> dict:
    """Draw one figure into the folder `out`; those from activations need a 16-bit model, and c its outlier channels."""
    given = []
    if model is not None:
        loaded = load_model(model, device, torch.float32)  # what is shown is the error of quantization alone
        if loaded.tokenizer is None:
            raise Refused(f"{model} has no tokenizer.json, which text needs.")
        if is_quantized(loaded):
            raise Refused(f"{model} is quantized already; a figure takes the 16-bit model.")
        given = [loaded if c == 1 else stress(loaded, c)]
    out.mkdir(parents=True, exist_ok=True)
    name = "" if model in (None, "tiny") else f"-{Path(model).name}"
    stem = (f"figure-{number}" if number.isdigit() else number) + name + (f"-stress{c:g}" if c != 1 else "")
    with plt.rc_context(STYLE):
        figure, numbers = FIGURES[number](*given)
        if isinstance(figure, str):  # it moves
            write_text(out / f"{stem}.svg", figure)
        else:
            figure.savefig(out / f"{stem}.png", dpi=160)
            figure.savefig(out / f"{stem}.svg", metadata={"Date": None})
            plt.close(figure)
    write_json(out / f"{stem}.json", numbers, indent=1)
    print(f"{out / stem}.svg", file=sys.stderr)
    return {"out": str(out), "figure": stem}
