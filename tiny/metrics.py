"""What the embedded model is judged by: NELBO, KL from the 16-bit model, task accuracy, cloze likelihood, passes.

Every function returns one value per example. Masks depend only on the seed (`runtime/measures.py`).
"""

import torch
import torch.nn.functional as F

from model import answer
from runtime import measures
from runtime.measures import Trajectory, fidelity, judged_copies, likelihoods, predictions, progress_bar
from runtime.processes import batches
from runtime.sampling import pad_left
from tiny import tasks


def losses(model, ids, region, samples: int = 4, seed: int = 0, reference=None) -> dict[str, torch.Tensor]:
    """`nelbo` and, given a reference model, `kl` of the segments ids (n, L) on masks of `seed` (`likelihoods`)."""
    copies = judged_copies(ids, region, model.mask_id, samples, seed)
    predicted = [predictions(m, m.blocks, copies.noisy) for m in (model, reference) if m is not None]
    return likelihoods(copies, *predicted)


def nelbo_set(tokenizer, n: int, seed: int, split: str = "eval"):
    """The held-out mixture NELBO is reported on: n sequences each of english, math and code answers."""
    sets = [tasks.english_segments(tokenizer, split, n, 64, seed)]
    return sets + [tasks.problem_tokens(tokenizer, task, split, n, seed) for task in ("math", "code")]


def encode_prompts(tokenizer, problems):
    """Prompts left-padded to one length: ids (n, P) and attention_mask (n, P)."""
    encoded = tokenizer.encode_batch([p.prompt for p in problems])
    return pad_left([e.ids for e in encoded], tokenizer.token_to_id("<|endoftext|>"))


def grade(model, problems, tokens):
    """Generated tokens (n, G) judged by each problem: 0/1 per problem, (n,)."""
    right = [p.correct(answer(model, row)) for p, row in zip(problems, tokens.tolist(), strict=True)]
    return torch.tensor(right, dtype=torch.float32)


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


def trajectory(model, problems, steps: int | None = tasks.GEN_LENGTH, gen_length: int = tasks.GEN_LENGTH,
               progress=lambda n: None, threshold: float | None = None) -> Trajectory:
    """Free-running answers to problems, and the order in which they came about; steps is None with a threshold."""
    parts = []
    for rows in batches(len(problems)):
        ids, mask = encode_prompts(model.tokenizer, problems[rows])
        parts.append(measures.trajectory(model, ids, steps, gen_length, threshold, mask, progress))
    return Trajectory(*map(torch.cat, zip(*parts, strict=True)))


GENERATION = ("math", "code")  # tasks of free-running generation
TASKS = (*GENERATION, "cloze")


def scores(model, problems: int, seed: int, quick: bool = False, label: str = "", reference=None,
           sequences: int | None = None) -> tuple[dict, dict]:
    """Every measure on the held-out split, one value per example, and the trajectories of the generation tasks.

    `problems` per task, and `sequences` (as many unless given) of each of NELBO's three domains. quick: the likelihoods
    alone, which are NELBO and, given a reference model, the KL from it.
    """
    values, paths = {}, {}
    with progress_bar((1 if quick else 4) * problems, label) as bar:
        sets = nelbo_set(model.tokenizer, sequences or problems, seed)
        parts = [losses(model, ids, region, 2, seed, reference=reference) for ids, region in sets]
        values |= {name: torch.cat([p[name] for p in parts]) for name in parts[0]}
        bar.update(problems)
        for task in () if quick else GENERATION:
            asked = tasks.problems(task, "eval", problems, seed)
            paths[task] = trajectory(model, asked, progress=bar.update)
            values[task] = grade(model, asked, paths[task].tokens)
        if not quick:
            passages = tasks.cloze_problems(model.tokenizer, "eval", problems, seed)
            values["cloze"] = cloze(model, passages, seed=seed, progress=bar.update)
    return values, paths


def parallel(model, problems: int, seed: int, threshold: float, label: str = "") -> dict[str, torch.Tensor]:
    """Decoding by a confidence threshold: per problem of `math` and `code` 0/1, and the passes its answer took."""
    values = {}
    with progress_bar(len(GENERATION) * problems, label) as bar:
        for task in GENERATION:
            asked = tasks.problems(task, "eval", problems, seed)
            path = trajectory(model, asked, None, progress=bar.update, threshold=threshold)
            values[task] = grade(model, asked, path.tokens)
            values[f"{task}_passes"] = path.passes
    return values


def agreement(paths: dict, reference: dict) -> dict[str, torch.Tensor]:
    """Trajectory fidelity over all prompts of two dicts {task: trajectory}, one value per prompt."""
    parts = [fidelity(paths[task], reference[task]) for task in paths]
    return {k: torch.cat([p[k] for p in parts]) for k in parts[0]}
