"""lm-evaluation-harness (lm-eval, https://github.com/EleutherAI/lm-evaluation-harness) with any model of this project.

    python evaluate.py --model llada-8b --tasks arc_challenge,gsm8k        the paper's tasks under the authors' settings
    python -m experiments.harness --model starquant --model_args model=tiny --tasks …   the harness' own command

Likelihoods are Monte-Carlo estimates with classifier-free guidance, batched across requests and masks. Texts are
generated in batches of similar length. Requests are cut into batches before they are shared among processes, and every
random number belongs to a request or a batch. So neither the number of processes nor an interruption changes a result.
"""

import hashlib
import itertools
import json
import os
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch

from checkpoint.folder import Checkpoint, json_lines, offline, resolve
from checkpoint.tokenizer import chat_prompt
from experiments import protocol
from model import DiffusionLM, load_model
from runtime import processes
from runtime.likelihood import log_likelihoods, request_generator, suffix_greedy_prediction
from runtime.processes import Parser, Refused, pick_device
from runtime.sampling import END_OF_TURN, generate, pad_left

try:
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
except ImportError:
    if __name__ == "__main__":
        Parser().exit(2, "python -m experiments.harness: lm-evaluation-harness is missing; pip install lm-eval.\n")
    raise

MAX_LENGTH = {"llada": 4096, "dream": 2048}  # tokens, as the authors evaluate; longer prompts lose their beginning
DREAM_BOS = "<|beginoftext|>"  # Dream's evaluation puts it before every context (add_bos_token=true)


def fingerprint(name: str) -> str:
    """What tells the weights of two folders apart without reading them: names, sizes and times of the files."""
    files = [*sorted(resolve(name).glob("*.safetensors")), resolve(name) / "config.json"]
    facts = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


@register_model("starquant")
class HarnessLM(LM):
    """A masked-diffusion model as the harness sees it.

    model: what `load_model` takes, or a loaded model, whose weights `identity` then tells apart in the cache.
    mc_num, mc_batch, cfg, seed: see `likelihood.log_likelihoods`. batch_size: sequences that go through the model at
    once; an eighth of it when generating. sampling: options of `generate`, of which gen_length is the task's
    max_gen_toks unless given, and steps is gen_length unless they, a threshold or a factor are given.
    check_greedy: also say whether greedy denoising gives the answer, at a pass per token; no task of the paper asks.
    chat: the prompts hold a chat template. cache: a folder for finished answers. weights: "packed" or "int8", as they
    lie in memory. device: None is auto, and so is the harness' own default, cuda:0, without a GPU.
    """

    def __init__(self, model="tiny", mc_num=128, mc_batch=8, cfg=0.0, seed=1234, batch_size=32, check_greedy=False,
                 chat=False, max_length=None, cache=None, identity="", device="auto", dtype=None, weights="packed",
                 max_batch_size=None, **sampling):
        super().__init__()
        if isinstance(model, str):
            auto = device is None or (device == "cuda:0" and not torch.cuda.is_available())
            device = processes.start(pick_device("auto" if auto else device))
            identity, model = fingerprint(model), load_model(model, device, dtype and getattr(torch, dtype), weights)
        self.model: DiffusionLM = model
        self.tokenizer = model.tokenizer
        if self.tokenizer is None:
            raise Refused("the harness gives texts, but the model's folder has no tokenizer.json.")
        self._device, self.family = model.device, model.config.family
        self.end = [model.config.eos_id] if self.family == "dream" else []  # Dream's answers end with EOS
        self.likelihood = {"mc_num": int(mc_num), "mc_batch": int(mc_batch), "cfg_scale": float(cfg), "seed": int(seed)}
        self.sampling = dict.fromkeys(("gen_length", "steps", "block_length")) | sampling
        self.batch_size, self.check_greedy, self.chat = int(batch_size), check_greedy, chat
        self.max_length = max_length or MAX_LENGTH.get(self.family, 4096)
        self.settings = [identity, str(model.norm.weight.dtype), self.likelihood, self.sampling, check_greedy, chat,
                         self.max_length]
        self.cache = Path(cache) if cache else None
        self.answered, self.seconds = 0, 0.0  # requests of this process, and what they took

    # ---- tokens --------------------------------------------------------------------------------------------------

    def encode(self, text: str) -> list[int]:
        if self.family == "dream" and not self.chat and self.tokenizer.token_to_id(DREAM_BOS) is not None:
            text = DREAM_BOS + text
        return self.tokenizer.encode(text, add_special_tokens=not self.chat).ids

    def pair(self, context: str, continuation: str):
        """Token ids of both: spaces between them belong to the continuation, which Dream ends with EOS."""
        whole = self.encode(context + continuation)
        start = min(len(self.encode(context.rstrip())), len(whole) - 1)
        whole = torch.tensor(whole + self.end, dtype=torch.long)
        cut = max(0, len(whole) - self.max_length)
        start = max(cut, start)
        return whole[cut:start], whole[start:]

    def apply_chat_template(self, chat_history, add_generation_prompt=True) -> str:
        """The conversation as text; without a generation prompt its last message stays open, to be continued."""
        if add_generation_prompt:
            return chat_prompt(self.family, chat_history)
        return chat_prompt(self.family, chat_history[:-1]) + chat_history[-1]["content"]

    @property
    def tokenizer_name(self) -> str:
        return f"{self.family}-{hashlib.sha256(self.tokenizer.to_str().encode()).hexdigest()[:16]}"

    # ---- requests ------------------------------------------------------------------------------------------------

    def loglikelihood(self, requests):
        return [tuple(a) for a in self._answer("loglikelihood", requests, self.batch_size, self._likelihoods)]

    def loglikelihood_rolling(self, requests):
        return self._answer("loglikelihood_rolling", requests, self.batch_size, self._rolling)

    def generate_until(self, requests):
        longest = max((self.length_of(r.args[1]) for r in requests), default=0)
        if longest >= self.max_length:
            raise Refused(f"the task asks for {longest} new tokens, which leaves no room for a prompt in the context "
                          f"of {self.max_length}; give a smaller --gen-length (gen_length of --model_args).")
        return self._answer("generate_until", requests, max(1, self.batch_size // 8), self._generate,
                            lambda args: self.length_of(args[1]))

    def _likelihoods(self, batch):
        pairs = [self.pair(*args) for args in batch]
        values = log_likelihoods(self.model, pairs, batch_size=self.batch_size, **self.likelihood)
        cfg = self.likelihood["cfg_scale"]
        return [[v, self.check_greedy and suffix_greedy_prediction(self.model, *p, cfg_scale=cfg)]
                for v, p in zip(values, pairs, strict=True)]

    def _rolling(self, batch):
        """Σ of pieces of half the maximal length, each given the half before it: every token is predicted once."""
        half, first = self.max_length // 2, int(self.family == "dream")  # Dream never predicts the first token
        encoded = enumerate(self.encode(text) for (text,) in batch)
        pieces = [(i, ids[max(0, at - half) : at], ids[at : at + half] + self.end)
                  for i, ids in encoded for at in range(first, len(ids), half)]
        pairs = [[torch.tensor(part, dtype=torch.long) for part in parts] for _, *parts in pieces]
        values = log_likelihoods(self.model, pairs, batch_size=self.batch_size, **self.likelihood)
        return [sum(v for v, (of, *_) in zip(values, pieces, strict=True) if of == i) for i in range(len(batch))]

    def length_of(self, options: dict) -> int:
        return int(self.sampling["gen_length"] or options.get("max_gen_toks") or 256)

    def _generate(self, batch):
        options, length = dict(self.sampling), self.length_of(batch[0][1])
        steps = None if options.get("threshold") or options.get("factor") else length
        options |= {"gen_length": length, "steps": options["steps"] or steps}
        room = self.max_length - length  # at least 1, as generate_until has checked
        prompts = [self.encode(context)[-room:] for context, _ in batch]
        ids, mask = pad_left(prompts, self.model.config.eos_id or 0)
        if options.get("temperature"):  # the draws of a batch are determined by its prompts
            seed = request_generator(ids.flatten(), mask.flatten(), self.likelihood["seed"]).initial_seed()
            options["generator"] = torch.Generator(self.device).manual_seed(seed)
        out = generate(self.model, ids.to(self.device), attention_mask=mask.to(self.device), **options)
        answers = out[:, ids.shape[1] :].tolist()
        return [self._text(row, args[1].get("until") or []) for row, args in zip(answers, batch, strict=True)]

    def _text(self, ids, until) -> str:
        """Generated tokens as text up to a stop string; only LLaDA's evaluation does not stop at end of text."""
        text = self.tokenizer.decode(ids, skip_special_tokens=False)
        ends = [until] if isinstance(until, str) else list(until)
        if self.family != "llada":
            eos = self.model.config.eos_id
            ends += [None if eos is None else self.tokenizer.id_to_token(eos), END_OF_TURN[self.family]]
        for end in filter(None, ends):
            text = text.split(end)[0]
        ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    # ---- batches, processes, resume ------------------------------------------------------------------------------

    def _answer(self, kind, requests, size, compute, group=lambda args: 0):
        """compute(batch of arguments) for the batches of this process that no earlier run finished; all answers."""
        args = [list(r.args) for r in requests]
        keys = [hashlib.sha256(json.dumps([self.settings, kind, a]).encode()).hexdigest()[:32] for a in args]
        order = sorted(range(len(args)), key=lambda i: (group(args[i]), -sum(len(str(a)) for a in args[i])))
        batches = [rows[i : i + size] for _, g in itertools.groupby(order, lambda i: group(args[i]))
                   for rows in [list(g)] for i in range(0, len(rows), size)]
        known = processes.first(self._stored)
        mine = batches[processes.rank()::processes.world()]
        todo = [b for b in mine if any(keys[i] not in known for i in b)]
        new, start = {}, time.time()
        total = sum(map(len, mine))
        with processes.Bar(total=total, initial=total - sum(map(len, todo)), desc=kind, unit="request") as bar:
            for batch in todo:
                answers = dict(zip([keys[i] for i in batch], compute([args[i] for i in batch]), strict=True))
                self._store(answers)
                new |= answers
                self.answered += len(batch)
                bar.update(len(batch))
        self.seconds += time.time() - start
        for part in processes.gather(new):
            known |= part
        return [known[k] for k in keys]

    def _stored(self) -> dict:
        files = sorted(self.cache.glob("answers-*.jsonl")) if self.cache else []
        return {key: answer for part in json_lines(*files) for key, answer in part.items()}

    def _store(self, answers: dict) -> None:
        if self.cache:
            self.cache.mkdir(parents=True, exist_ok=True)
            with open(self.cache / f"answers-{processes.rank()}.jsonl", "a", encoding="utf-8") as file:
                file.write("\n" + json.dumps(answers))  # a line of its own, even behind one cut short

# ---- running tasks ---------------------------------------------------------------------------------------------------


@contextmanager
def hugging_face_evaluate():
    """Inside, `import evaluate` gives a task Hugging Face's library and not our command of that name."""
    ours, here = sys.modules.pop("evaluate", None), Path(__file__).parents[1].resolve()
    installed = here == Path(torch.__file__).resolve().parents[1]  # among the libraries, whose package comes before
    hidden = [p for p in sys.path if Path(p or ".").resolve() == here and not installed]
    sys.path[:] = [p for p in sys.path if p not in hidden]
    try:
        yield
    finally:
        sys.path[:0] = hidden
        sys.modules.pop("evaluate", None)
        if ours is not None:
            sys.modules["evaluate"] = ours


def find_tasks(names, include, unsafe):
    """The harness' TaskManager, once it has every task and its data; tasks of the folder `include` come first."""
    import datasets
    import huggingface_hub
    from lm_eval.tasks import TaskManager

    if include and not include.is_dir():
        raise Refused(f"--include {include} is no folder.")
    if offline():  # else the hub's library asks for a minute; what was downloaded before serves
        huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    if unsafe:
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"  # asked for by the library that judges HumanEval
    manager = TaskManager(include_path=include and str(include), include_defaults=False)
    if not set(names) <= set(manager.all_tasks):  # indexing the harness' own tasks takes seconds
        manager = TaskManager(include_path=include and str(include))
    for name in names:
        if name not in manager.all_tasks:
            raise Refused(f"lm-eval has no task {name!r}; `lm-eval ls tasks` lists those it has.")
        try:
            with hugging_face_evaluate():
                manager.load([name])
        except Exception as error:  # no network, no such file, a broken task: many types, before any work
            raise Refused(f"lm-eval cannot load task {name!r} and its data ({type(error).__name__}: "
                          f"{' '.join(str(error).split())[:200]}).") from None
    return manager


def benchmarks(args) -> dict:
    """The harness' tasks under the model's protocol, beside the paper's numbers; requests are shared under torchrun."""
    from lm_eval import simple_evaluate

    folder, unsafe = resolve(args.model), args.confirm_run_unsafe_code
    name, family = protocol.source_name(args.model, folder), Checkpoint(folder).config.family
    name = args.protocol or protocol.protocol_of(name, family)
    settings = {task: protocol.setting(name, task, args.mc_num, args.gen_length, args.steps) for task in args.tasks}
    for task, s in settings.items():
        if s.runs_code and not unsafe:
            raise Refused(f"{task} executes code that the model wrote; where that can do no harm (a container "
                          f"without network), allow it with --confirm-run-unsafe-code.")
    manager = find_tasks([s.task for s in settings.values()], args.include, unsafe)
    device = processes.start(pick_device(args.device))
    model, identity, results = load_model(args.model, device, args.dtype, args.weights), fingerprint(args.model), {}
    for task, s in settings.items():
        lm = HarnessLM(model, s.mc_num, s.mc_batch, s.cfg, batch_size=args.batch_size, chat=s.chat,
                       cache=args.cache, identity=identity, **s.generation)
        with hugging_face_evaluate():
            out = simple_evaluate(lm, tasks=[s.task], num_fewshot=s.shots, limit=args.limit, task_manager=manager,
                                  apply_chat_template=s.chat, confirm_run_unsafe_code=unsafe, bootstrap_iters=1000,
                                  log_samples=False)
        measured = out["results"][s.task] if out else {}  # {"acc,none": 0.5, ...}; torchrun: on the first process alone
        results[task] = measured | {"requests": lm.answered, "seconds": round(lm.seconds, 1), "setting": asdict(s)}
        print(f"{task}: {lm.answered} requests in {lm.seconds:.1f} s ({lm.answered / max(lm.seconds, 1e-9):.2f}/s)",
              file=sys.stderr)
    if processes.rank() == 0:
        print(protocol.table(name, results))
    return {"model": args.model, "protocol": name, "limit": args.limit, "processes": processes.world(),
            "tasks": results}


def run(_=None) -> dict:
    """The harness' own command on sys.argv."""
    from lm_eval import __version__
    from lm_eval.__main__ import cli_evaluate

    with hugging_face_evaluate():
        cli_evaluate()
    return {"lm_eval": __version__}


if __name__ == "__main__":
    sys.exit(processes.run("python -m experiments.harness", run, None, smaller="--batch_size"))
