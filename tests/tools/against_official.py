"""Our models, samplers and likelihoods against the authors' own files, draw by draw, on tiny random models.

    python tests/tools/against_official.py llada FOLDER [--trials 100] [--seed 0]
    python tests/tools/against_official.py dream FOLDER [--trials 100] [--seed 0]

FOLDER holds the authors' files, of which no copy is kept here (they need `python -m pip install transformers==4.46.2`):

    llada   configuration_llada.py, modeling_llada.py    huggingface.co/GSAI-ML/LLaDA-8B-Base
            generate.py, get_log_likelihood.py           github.com/ML-GSAI/LLaDA
    dream   configuration_dream.py, modeling_dream.py,
            generation_utils.py                          huggingface.co/Dream-org/Dream-v0-Base-7B

Each trial draws a config, weights, prompts, masks and options, saves the official model by the official code, loads it
by ours, and compares logits and hidden states (1e-4 in fp32), a generation with its seed (every token; Dream: after
every step), and for LLaDA a likelihood with its seed (1e-5). What differs is printed with its trial; the last line is
JSON; exit code 1 if anything differs. Configs that we refuse are counted by reason. Not collected by pytest.
"""

import argparse
import importlib
import json
import random
import sys
import tempfile
import types
import warnings
from collections import Counter
from pathlib import Path
from traceback import extract_tb

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))

from official import get_log_likelihood

from model import load_model
from runtime import sampling
from runtime.processes import Refused

V, MASK, EOS, EOT = 64, 60, 61, 62
FILES = {"llada": ("configuration_llada", "modeling_llada", "generate", "get_log_likelihood"),
         "dream": ("configuration_dream", "modeling_dream", "generation_utils")}


def official_modules(family: str, folder: Path) -> types.SimpleNamespace:
    """The authors' files as modules of a package of their own, unchanged but for two token ids of `generate.py`."""
    package = types.ModuleType("official")
    package.__path__ = [str(folder)]
    sys.modules["official"] = package
    modules = {name: importlib.import_module(f"official.{name}") for name in FILES[family] if name != "generate"}
    if family == "llada":
        modules["generate"] = types.ModuleType("official.generate")
        text = (folder / "generate.py").read_text().replace("126081", str(EOS)).replace("126348", str(EOT))
        exec(compile(text, "generate.py", "exec"), modules["generate"].__dict__)
    return types.SimpleNamespace(**modules)


def draw_config(family: str, r: random.Random) -> dict:
    """A config of the official class, of the kinds that published models have."""
    heads, h = r.choice([1, 2, 3, 4, 6]), r.choice([2, 4, 8, 10, 16, 32])
    kv = r.choice([k for k in range(1, heads + 1) if heads % k == 0])
    common = {"vocab_size": V, "mask_token_id": MASK, "eos_token_id": EOS, "pad_token_id": EOS,
              "rms_norm_eps": r.choice([1e-6, 1e-5, 1e-2]), "rope_theta": r.choice([1e4, 5e5, 100.0, 1.5])}
    if family == "llada":
        return common | {"d_model": heads * h, "n_heads": heads, "n_kv_heads": r.choice([None, kv]),
                         "n_layers": r.choice([1, 2, 3]), "mlp_hidden_size": r.choice([35, 40, 96]),
                         "activation_type": "silu", "block_type": "llama", "layer_norm_type": "rms", "rope": True,
                         "rope_full_precision": r.random() < 0.6, "max_sequence_length": 512, "use_cache": False,
                         "include_bias": False, "include_qkv_bias": r.random() < 0.5, "bias_for_layer_norm": False,
                         "scale_logits": r.random() < 0.3, "embedding_size": r.choice([V, V + 8]),
                         "weight_tying": False, "multi_query_attention": None}
    return common | {"hidden_size": heads * h, "num_attention_heads": heads, "num_key_value_heads": kv,
                     "num_hidden_layers": r.choice([1, 2, 3]), "intermediate_size": r.choice([35, 40, 96]),
                     "hidden_act": "silu", "tie_word_embeddings": r.random() < 0.4, "bos_token_id": EOS,
                     "sliding_window": None, "use_mrope": False}


def randomize(model, g: torch.Generator) -> None:
    """Every tensor random and kept exactly by bf16: norms about 1, biases about 0."""
    for name, p in model.named_parameters():
        values = torch.randn(p.shape, generator=g) * (0.3 if p.ndim == 1 else p.shape[-1] ** -0.5)
        p.data.copy_((values + (p.ndim == 1 and "bias" not in name)).bfloat16())


def draw_mask(r: random.Random, B: int, L: int):
    """None, or tokens left out of some rows, (B, L) int64: mostly on the left, where generation expects them."""
    if L == 1 or r.random() < 0.5:
        return None
    mask = torch.ones(B, L, dtype=torch.long)
    for row in mask:
        n = r.randrange(L)
        if r.random() < 0.8:
            row[:n] = 0
        elif n:
            row[-n:] = 0
    return mask


@torch.no_grad()
def forward_error(family: str, theirs, ours, g, r) -> float:
    """Largest difference of logits and hidden states over the rows that the mask leaves in."""
    B, L = r.choice([(1, 1), (1, 9), (2, 7), (3, 21)])
    ids, mask = torch.randint(0, V, (B, L), generator=g), draw_mask(r, B, L)
    ids[torch.rand(ids.shape, generator=g) < 0.5] = MASK
    seen = []
    hooks = [b.register_forward_pre_hook(lambda _, args: seen.append(args[0])) for b in ours.blocks]
    logits = ours(ids, mask)
    for hook in hooks:
        hook.remove()
    seen.append(ours.hidden(ids, mask))
    if family == "llada":
        out = theirs(ids, attention_mask=mask, output_hidden_states=True)
        want, rows = out.logits, torch.ones(B, L, dtype=torch.bool)
        hidden_rows = rows
    else:  # as `_sample` calls it: a mask of pairs, positions that skip what is left out, logits moved by one
        pairs, positions, hidden_rows = "full", None, torch.ones(B, L, dtype=torch.bool)
        if mask is not None and bool((mask == 0).any()):
            positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)
            pairs, hidden_rows = torch.logical_and(mask[:, None, None], mask[:, None, :, None]), mask.bool()
        out = theirs(ids, pairs, positions, output_hidden_states=True)
        want = torch.cat((out.logits[:, :1], out.logits[:, :-1]), 1)
        rows = torch.cat((hidden_rows[:, :1], hidden_rows[:, :-1]), 1)
    differences = [(logits - want)[rows]] + [(a - b)[hidden_rows] for a, b in zip(seen, out.hidden_states, strict=True)]
    return max(float(d.abs().max()) if d.numel() else 0.0 for d in differences)


def generation(family: str, official, theirs, ours, seed: int, g, r) -> tuple[bool, dict]:
    """Whether both write the same tokens, and the options."""
    B, P = r.choice([(1, 5), (1, 1), (2, 6), (3, 9)])
    prompt, mask = torch.randint(0, 59, (B, P), generator=g), draw_mask(r, B, P)
    temperature, length = r.choice([0.0, 0.0, 0.2, 1.0]), r.choice([4, 8, 12, 16])
    if family == "llada":
        block = r.choice([b for b in (1, 2, 4, 8, 16) if length % b == 0])
        options = {"steps": length // block * r.choice([1, 2, block, block + 2]), "gen_length": length,
                   "block_length": block, "temperature": temperature, "cfg_scale": r.choice([0.0, 0.0, 0.5, 2.0]),
                   "logits_eos_inf": r.random() < 0.2, "confidence_eos_eot_inf": r.random() < 0.25}
        remasking = r.choice(["low_confidence", "low_confidence", "random"])
        # the official code fails on guidance without a mask
        given = torch.ones_like(prompt) if mask is None and options["cfg_scale"] else mask
        torch.manual_seed(seed)
        want = official.generate.generate(theirs, prompt, given, mask_id=MASK, remasking=remasking, **options)
        torch.manual_seed(seed)
        got = sampling.generate(ours, prompt, attention_mask=mask, algorithm=remasking, eot_id=EOT, **options)
        return torch.equal(got, want), options | {"remasking": remasking}
    options = {"steps": r.choice([1, 3, length // 2, length, length + 3]), "temperature": temperature,
               "top_p": r.choice([None, None, 0.95, 0.5]), "top_k": r.choice([None, None, 1, 10]),
               "alg_temp": r.choice([None, 0.0, 0.5]), "eps": r.choice([1e-3, 1e-3, 0.0, 0.2])}
    algorithm = r.choice(["origin", "maskgit_plus", "topk_margin", "entropy"])
    config = official.generation_utils.DreamGenerationConfig(
        **options, alg=algorithm, max_new_tokens=length, mask_token_id=MASK, pad_token_id=EOS, output_history=True,
        return_dict_in_generate=True)
    torch.manual_seed(seed)
    want = theirs.diffusion_generate(prompt, attention_mask=mask, generation_config=config).history
    torch.manual_seed(seed)
    got = list(sampling.denoise(ours, prompt, gen_length=length, attention_mask=mask, algorithm=algorithm, **options))
    same = len(got) == len(want) and all(torch.equal(a.ids, b) for a, b in zip(got, want, strict=True))
    return same, options | {"algorithm": algorithm}


def likelihood_error(official, theirs, ours, seed: int, g, r) -> float:
    """Relative difference of one Monte-Carlo likelihood, both with the same draws."""
    prompt, answer = (torch.randint(0, 59, (r.choice([1, 2, 5, 9]),), generator=g) for _ in range(2))
    batch, cfg = r.choice([1, 2, 4]), r.choice([0.0, 0.5, 2.0])
    number = batch * r.choice([1, 2, 8])
    torch.manual_seed(seed)
    want = official.get_log_likelihood.get_log_likelihood(theirs, prompt, answer, number, batch, cfg, MASK)
    torch.manual_seed(seed)
    return abs(get_log_likelihood(ours, prompt, answer, number, batch, cfg) - want) / max(1e-6, abs(want))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("family", choices=FILES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    missing = [f"{name}.py" for name in FILES[args.family] if not (args.folder / f"{name}.py").is_file()]
    if missing:
        print(f"{args.folder} lacks {', '.join(missing)}; see the head of this file.", file=sys.stderr)
        return 2
    warnings.filterwarnings("ignore")
    try:
        official = official_modules(args.family, args.folder)
    except ImportError as error:
        print(f"the authors' code does not load ({error}): python -m pip install transformers==4.46.2", file=sys.stderr)
        return 2
    config_class, model_class = ((official.configuration_llada.LLaDAConfig, official.modeling_llada.LLaDAModelLM)
                                 if args.family == "llada" else
                                 (official.configuration_dream.DreamConfig, official.modeling_dream.DreamModel))
    counts, worst = Counter(), {"forward": 0.0, "likelihood": 0.0}
    for seed in range(args.seed, args.seed + args.trials):
        r, g = random.Random(seed), torch.Generator().manual_seed(seed)
        config = draw_config(args.family, r)
        with tempfile.TemporaryDirectory() as folder:
            model = model_class(config_class(**config))
            randomize(model, g)
            model.tie_weights()
            model.save_pretrained(folder)
            theirs = model_class.from_pretrained(folder, torch_dtype=torch.float32).eval()
            try:
                ours = load_model(folder, "cpu")
            except Refused as error:
                counts[f"refused: {str(error).replace(folder, 'FOLDER')[:120]}"] += 1
                continue
        error = forward_error(args.family, theirs, ours, g, r)
        worst["forward"] = max(worst["forward"], error)
        counts["forward passes"] += 1
        if not error <= 1e-4:
            counts["forward passes that differ"] += 1
            print(f"trial {seed}: logits or hidden states differ by {error:.2g}: {config}")
        try:
            same, options = generation(args.family, official, theirs, ours, seed, g, r)
            counts["generations"] += 1
            if not same:
                counts["generations that differ"] += 1
                print(f"trial {seed}: other tokens: {options}")
        except RuntimeError as error:
            if not any(Path(frame.filename).parent == args.folder for frame in extract_tb(error.__traceback__)):
                raise
            counts["generations where the authors' code stops"] += 1
        if args.family == "llada":
            error = likelihood_error(official, theirs, ours, seed, g, r)
            worst["likelihood"] = max(worst["likelihood"], error)
            counts["likelihoods"] += 1
            if not error <= 1e-5:
                counts["likelihoods that differ"] += 1
                print(f"trial {seed}: likelihoods differ by {error:.2g} of themselves")
    print(json.dumps({"family": args.family, "trials": args.trials, "seed": args.seed, **counts, "worst": worst}))
    return int(any("differ" in kind for kind in counts))


if __name__ == "__main__":
    sys.exit(main())
