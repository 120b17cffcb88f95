"""What a denoising model is judged by: NELBO, KL from the 16-bit model, task accuracy, cloze likelihood, trajectories.

Every function returns one value per example, so that models are compared in pairs and intervals come from a bootstrap
over examples. The masks of a Monte-Carlo estimate depend only on the seed: two models see the same ones.
"""

import sys
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tqdm import tqdm

from checkpoint.loading import stored_bytes
from runtime import sampling
from runtime.processes import batches
from runtime.sampling import denoise
from tiny import tasks


@torch.no_grad()
def losses(model, ids, region, samples: int = 4, seed: int = 0, progress=lambda n: None, reference=None) -> dict:
    """`nelbo` and, given a reference model, `kl`: nats per token of `region`, one value per sequence, (n,).

    nelbo: E_t [ Σ over masked i of −log p(x_i | x_t) / t ] / |region| with `samples` stratified ratios t per sequence
    (LLaDA, Eq. 3); its mean over a data set bounds the negative log-likelihood per token from above.
    kl: the same expectation of KL(p_ref(· | x_t) ‖ p(· | x_t)). On text that the reference wrote, the expected rise of
    NELBO is this KL; it is never negative and does not depend on which token came, hence a far narrower interval.
    """
    g = torch.Generator().manual_seed(seed)
    totals = {name: torch.zeros(len(ids)) for name in ("nelbo", *(["kl"] if reference is not None else []))}
    for _ in range(samples):
        t = sampling.stratified_ratios(len(ids), g, 1e-3)
        noisy = sampling.mask_tokens(ids, region, t, model.mask_id, g)
        for rows in batches(len(ids)):
            where = noisy[rows] == model.mask_id
            got = log_probabilities(model, noisy[rows], where)
            per_token = {"nelbo": F.nll_loss(got, ids[rows][where].to(got.device), reduction="none")}
            if reference is not None:
                want = log_probabilities(reference, noisy[rows], where)
                per_token["kl"] = (want.exp() * (want - got)).sum(-1)
            for name, values in per_token.items():
                placed = torch.zeros(where.shape).masked_scatter(where, values.cpu())
                totals[name][rows] += placed.sum(-1) / t[rows] / region[rows].sum(-1)
            progress(len(t[rows]))
    return {name: total / samples for name, total in totals.items()}


def log_probabilities(model, ids, where):
    """log p(· | ids) at the positions `where`, (n, V) fp32, on the model's device."""
    return F.log_softmax(model(ids.to(model.device), where=where.to(model.device)).float(), -1)


def nelbo_set(tokenizer, n: int, seed: int, split: str = "eval"):
    """The held-out mixture NELBO is reported on: n sequences each of english, math and code answers."""
    sets = [tasks.english_segments(tokenizer, split, n, 64, seed)]
    return sets + [tasks.problem_tokens(tokenizer, task, split, n, seed) for task in ("math", "code")]


def encode_prompts(tokenizer, problems):
    """Prompts left-padded to one length: ids (n, P) and attention_mask (n, P)."""
    encoded = [e.ids for e in tokenizer.encode_batch([p.prompt for p in problems])]
    length = max(map(len, encoded))
    pad = tokenizer.token_to_id("<|endoftext|>")
    ids = torch.tensor([[pad] * (length - len(e)) + e for e in encoded])
    mask = torch.tensor([[0] * (length - len(e)) + [1] * len(e) for e in encoded])
    return ids, mask


def answers(tokenizer, ids) -> list[str]:
    """Generated ids (n, G) as text up to end-of-text."""
    eos = tokenizer.token_to_id("<|endoftext|>")
    rows = [r[: r.index(eos)] if eos in r else r for r in ids.tolist()]
    return tokenizer.decode_batch(rows)


def grade(tokenizer, problems, tokens):
    """Generated tokens (n, G) judged by each problem: 0/1 per problem, (n,)."""
    texts = answers(tokenizer, tokens)
    return torch.tensor([p.correct(text) for p, text in zip(problems, texts, strict=True)], dtype=torch.float32)


@torch.no_grad()
def cloze(model, problems, samples: int = 4, seed: int = 0, progress=lambda n: None):
    """Choice among four continuations by Monte-Carlo likelihood: 0/1 per problem, (n,).

    The score is the mutual information log p(option | context) − log p(option), because the first term alone mostly
    ranks how rare an option's words are. All options and both terms share their masks.
    """
    g = torch.Generator().manual_seed(seed)
    correct = []
    for rows in batches(len(problems), 8):
        context = torch.stack([p.context for p in problems[rows]])  # (n, C)
        options = torch.stack([p.options for p in problems[rows]])  # (n, 4, N)
        n, _, N = options.shape
        # k = 1..N in equal strata over the samples, a random subset of k positions each
        k = ((torch.arange(samples) + torch.rand(n, samples, generator=g)) / samples * N).ceil().clamp(1, N)
        rank = torch.rand(n, samples, N, generator=g).argsort(-1).argsort(-1)
        hide = rank < k[..., None]  # (n, samples, N)
        nothing = torch.full_like(context, model.mask_id)
        score = monte_carlo(model, context, options, hide) - monte_carlo(model, nothing, options, hide)  # (n, 4)
        correct += (score.argmax(-1) == torch.tensor([p.answer for p in problems[rows]])).tolist()
        progress(n)
    return torch.tensor(correct, dtype=torch.float32)


def monte_carlo(model, context, options, hide):
    """log p(option | context) in nats by LLaDA's estimator, where k of N tokens are masked and weigh N/k.

    context (n, C), options (n, 4, N), hide (n, S, N) bool, the S masks of each problem -> (n, 4), means over the masks.
    """
    n, S, N = hide.shape
    hide = hide[:, None].expand(n, 4, S, N)
    clean = options[:, :, None].expand(n, 4, S, N)
    context = context[:, None, None].expand(n, 4, S, -1)
    ids = torch.cat((context, clean.masked_fill(hide, model.mask_id)), -1).flatten(0, 2)  # (4 n S, C + N)
    where = torch.cat((torch.zeros_like(context, dtype=torch.bool), hide), -1).flatten(0, 2)
    logits = torch.cat([model(ids[r].to(model.device), where=where[r].to(model.device)).float().cpu()
                        for r in batches(len(ids))])
    ce = torch.zeros(hide.shape).masked_scatter(hide, F.cross_entropy(logits, clean[hide], reduction="none"))
    return -(ce.sum(-1) * N / hide.sum(-1)).mean(-1)


class Trajectory(NamedTuple):
    """Greedy denoising of n prompts: the final tokens (n, G) and the step at which each was committed (n, G)."""

    tokens: torch.Tensor
    when: torch.Tensor


def trajectory(model, problems, steps: int | None = tasks.GEN_LENGTH, gen_length: int = tasks.GEN_LENGTH,
               progress=lambda n: None, threshold: float | None = None) -> Trajectory:
    """Free-running answers to problems, and the order in which they came about; steps is None with a threshold."""
    parts = []
    for rows in batches(len(problems)):
        ids, mask = (t.to(model.device) for t in encode_prompts(model.tokenizer, problems[rows]))
        when = torch.zeros(len(ids), gen_length, dtype=torch.long)
        for step in denoise(model, ids, steps, gen_length, attention_mask=mask, threshold=threshold):
            committed = step.committed[:, -gen_length:].cpu()
            when[committed] = step.index
            progress(int(committed.sum()) / gen_length)
        parts.append(Trajectory(step.ids[:, -gen_length:].cpu(), when))
    return Trajectory(*map(torch.cat, zip(*parts, strict=True)))


def fidelity(first: Trajectory, second: Trajectory) -> dict[str, torch.Tensor]:
    """Two trajectories of the same prompts, a token a step: per example, how far they agree.

    tokens: share of positions with the same final token; positions: share of positions committed at the same step;
    divergence: first step at which a committed position or token differs, as a share of the steps (1 = never).
    """
    same_token, same_step = first.tokens == second.tokens, first.when == second.when
    steps = int(torch.maximum(first.when, second.when).max()) + 1
    earliest = torch.minimum(first.when, second.when).masked_fill(same_token & same_step, steps).amin(-1)
    return {"tokens": same_token.float().mean(-1), "positions": same_step.float().mean(-1),
            "divergence": earliest.float() / steps}
GENERATION = ("math", "code")  # tasks of free-running generation
TASKS = (*GENERATION, "cloze")


def scores(model, problems: int, seed: int, quick: bool = False, label: str = "", reference=None,
           sequences: int | None = None) -> tuple[dict, dict]:
    """Every measure on the held-out split, one value per example, and the trajectories of the generation tasks.

    `problems` per task, and `sequences` (as many unless given) of each of NELBO's three domains. quick: the likelihoods
    alone, which are NELBO and, given a reference model, the KL from it.
    """
    values, paths = {}, {}
    with tqdm(total=(1 if quick else 4) * problems, desc=label, unit="problem", file=sys.stderr, leave=False,
              bar_format="{l_bar}{bar}| {n:.0f}/{total} [{elapsed}<{remaining}]") as bar:
        sets = nelbo_set(model.tokenizer, sequences or problems, seed)
        parts = [losses(model, ids, region, 2, seed, reference=reference) for ids, region in sets]
        values |= {name: torch.cat([p[name] for p in parts]) for name in parts[0]}
        bar.update(problems)
        for task in () if quick else GENERATION:
            asked = tasks.problems(task, "eval", problems, seed)
            paths[task] = trajectory(model, asked, progress=bar.update)
            values[task] = grade(model.tokenizer, asked, paths[task].tokens)
        if not quick:
            passages = tasks.cloze_problems(model.tokenizer, "eval", problems, seed)
            values["cloze"] = cloze(model, passages, seed=seed, progress=bar.update)
    return values, paths


def parallel(model, problems: int, seed: int, threshold: float, label: str = "") -> dict[str, torch.Tensor]:
    """Decoding by a confidence threshold: per problem of `math` and `code` 0/1, and the passes its answer took."""
    values = {}
    with tqdm(total=len(GENERATION) * problems, desc=label, unit="problem", file=sys.stderr, leave=False,
              bar_format="{l_bar}{bar}| {n:.0f}/{total} [{elapsed}<{remaining}]") as bar:
        for task in GENERATION:
            asked = tasks.problems(task, "eval", problems, seed)
            path = trajectory(model, asked, None, progress=bar.update, threshold=threshold)
            values[task] = grade(model.tokenizer, asked, path.tokens)
            values[f"{task}_passes"] = path.when.amax(-1) + 1  # no row of a batch waits for another
    return values


def agreement(paths: dict, reference: dict) -> dict[str, torch.Tensor]:
    """Trajectory fidelity over both generation tasks, one value per prompt."""
    parts = [fidelity(paths[task], reference[task]) for task in GENERATION]
    return {k: torch.cat([p[k] for p in parts]) for k in parts[0]}


def bootstrap(values, seed: int = 0, draws: int = 2000, level: float = 0.95) -> tuple[float, float, float]:
    """Mean and percentile interval of the mean: (mean, low, high). values (n,) over examples, or (S, n) over S
    calibration seeds and, within each that is drawn, its examples; a paired difference alike."""
    g = torch.Generator().manual_seed(seed)
    values = torch.as_tensor(values, dtype=torch.float64)
    if values.ndim == 1:
        values = values[None]
    S, n = values.shape
    seeds = torch.randint(S, (draws, S, 1), generator=g) if S > 1 else torch.zeros(draws, 1, 1, dtype=torch.long)
    means = values[seeds, torch.randint(n, (draws, S, n), generator=g)].mean((-1, -2))
    low, high = torch.quantile(means, torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64))
    return float(values.mean()), float(low), float(high)

# ---- one table ------------------------------------------------------------------------------------------------------


def judge(models: dict, problems: int, seed: int) -> list[dict]:
    """NELBO, KL from the first model, accuracies and size of each on the held-out split, with 95 % intervals."""
    rows, first = [], next(iter(models.values()))
    for name, model in models.items():
        values, _ = scores(model, problems, seed, label=f"evaluate {name}", reference=None if model is first else first)
        rows.append({"model": name, **{k: bootstrap(v) for k, v in values.items()}, "bytes": stored_bytes(model)})
    return rows


def table(rows: list[dict]) -> str:
    lines = ["| model | KL from 16 bit, nats/token | NELBO, nats/token | math % | code % | cloze % | MB |",
             "|---|---|---|---|---|---|---|"]
    for r in rows:
        accuracy = [f"{100 * m:.1f} ± {50 * (high - low):.1f}" for m, low, high in (r["math"], r["code"], r["cloze"])]
        kl, nelbo = (f"{r[k][0]:.4f} ± {(r[k][2] - r[k][1]) / 2:.4f}" if k in r else "" for k in ("kl", "nelbo"))
        lines.append(f"| {r['model']} | {kl} | {nelbo} | {' | '.join(accuracy)} | {r['bytes'] / 1e6:.2f} |")
    return "\n".join(lines)
