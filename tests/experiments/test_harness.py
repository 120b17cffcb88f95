"""The real lm-evaluation-harness, offline, on local versions of the benchmarks with the embedded model."""

import io
import json
import math
import os
import shutil
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

import evaluate
from checkpoint.tokenizer import chat_prompt
from model import DiffusionLM, generate, load_model
from runtime.likelihood import log_likelihoods, suffix_greedy_prediction
from runtime.processes import Refused
from tiny import metrics
from tiny import tasks as tiny_tasks

lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install lm-eval")
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.api.registry import get_model  # noqa: E402
from local_tasks import WORDS, documents, write_tasks  # noqa: E402

from experiments import harness  # noqa: E402

TYPES = "arc_challenge,winogrande,truthfulqa_mc2,mmlu,gsm8k,humaneval"


@pytest.fixture(scope="module")
def tiny():
    return load_model("tiny", "cpu")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("harness") / "tasks")


def command(tasks, names, *more):
    return evaluate.main(["--tasks", names, "--include", str(tasks), "--device", "cpu", "--mc-num", "4", *more])


def instances(kind, *arguments):
    return [Instance(kind, {}, a, i) for i, a in enumerate(arguments)]


def by_hand(model, pairs, cfg=0.0):
    """log p of (context, continuation) texts, without the harness."""
    encode = model.tokenizer.encode
    ids = [(encode(c).ids, encode(c + a).ids) for c, a in pairs]
    return log_likelihoods(model, [(torch.tensor(c), torch.tensor(w[len(c):])) for c, w in ids], 4, 4, 32, cfg, 1234)


class TestRealHarness:
    @pytest.fixture(scope="class")
    def record(self, tasks):
        """One run of the command on all task types, its JSON and every likelihood it asked for."""
        asked = {}
        with pytest.MonkeyPatch.context() as patch:
            original = harness.HarnessLM._likelihoods
            patch.setattr(harness.HarnessLM, "_likelihoods", lambda lm, batch: [
                asked.setdefault(tuple(a), v) for a, v in zip(batch, original(lm, batch), strict=True)])
            patch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)  # asks pip and the compiler, for long
            rouge = types.SimpleNamespace(rouge_scorer=None, scoring=None)  # of other tasks; it would import scipy
            patch.setitem(sys.modules, "rouge_score", rouge)
            out = io.StringIO()
            patch.setattr("sys.stdout", out)
            assert command(tasks, TYPES, "--gen-length", "24", "--confirm-run-unsafe-code") == 0
        return json.loads(out.getvalue().splitlines()[-1])["tasks"], out.getvalue(), asked

    def test_multiple_choice_is_the_likeliest_answer(self, record, tiny):
        results, _, _ = record
        hits, normed = [], []
        for doc in documents()["arc_challenge"]:
            choices = doc["choices"]["text"]
            scores = by_hand(tiny, [(f"Question: {doc['question']}\nAnswer:", f" {c}") for c in choices], cfg=0.5)
            target = "ABCD".index(doc["answerKey"])
            hits.append(scores.index(max(scores)) == target)
            scores = [s / len(c) for s, c in zip(scores, choices, strict=True)]
            normed.append(scores.index(max(scores)) == target)
        assert results["arc_challenge"]["acc,none"] == pytest.approx(sum(hits) / 4)
        assert results["arc_challenge"]["acc_norm,none"] == pytest.approx(sum(normed) / 4)

    def test_winogrande_s_choices_are_contexts(self, record, tiny):
        results, _, asked = record
        hits = []
        for doc in documents()["winogrande"]:
            start, end = doc["sentence"].split("_")
            scores = []
            for option in (doc["option1"], doc["option2"]):
                (context,) = [c for c, a in asked if c.endswith(start + option) and a == end]
                assert context.count("\n\n") == 5  # shots
                scores += by_hand(tiny, [(context, end)])
                assert scores[-1] == pytest.approx(asked[context, end][0], rel=1e-5)
            hits.append(scores.index(max(scores)) + 1 == int(doc["answer"]))
        assert results["winogrande"]["acc,none"] == pytest.approx(sum(hits) / 6)

    def test_mc2_is_the_share_of_probability_on_true_answers(self, record):
        results, _, asked = record
        shares = []
        for doc in documents()["truthfulqa_mc2"]:
            p = [math.exp(v[0]) for choice in doc["mc2_targets"]["choices"] for (c, a), v in asked.items()
                 if c.endswith(doc["question"] + "\nA:") and a == f" {choice}"]
            assert len(p) == 3
            shares.append((p[0] + p[2]) / sum(p))
        assert results["truthfulqa_mc2"]["acc,none"] == pytest.approx(sum(shares) / 2)

    def test_mmlu_is_a_group_of_one_token_answers(self, record, tiny):
        results, _, asked = record
        hits = []
        for doc in documents()["mmlu_sea"] + documents()["mmlu_war"]:
            options = "\n".join(f"{a}. {c}" for a, c in zip("ABCD", doc["choices"], strict=True))
            found = [(c, a) for c, a in asked if c.endswith(f"\n\n{doc['question']}\n{options}\nAnswer:")]
            scores = {a.strip(): asked[c, a][0] for c, a in found}
            assert sorted(scores) == list("ABCD")
            context = torch.tensor([[*tiny.tokenizer.encode(found[0][0]).ids, tiny.mask_id]])
            log_p = tiny(context)[0, -1].log_softmax(-1)  # the exact likelihood: one forward pass
            for letter, score in scores.items():
                (token,) = tiny.tokenizer.encode(" " + letter).ids
                assert log_p[token].item() == pytest.approx(score, rel=1e-4)
            hits.append(max(scores, key=scores.get) == "ABCD"[doc["answer"]])
        assert results["mmlu"]["acc,none"] == pytest.approx(sum(hits) / 14)

    def test_generation_tasks_score_as_the_model_s_own_judge(self, record, tiny):
        results, table, _ = record
        for name, task, measure in (("gsm8k", "math", "exact_match,strict-match"),
                                    ("humaneval", "code", "pass@1,create_test")):
            problems = tiny_tasks.problems(task, "eval", 6, 3)
            tokens = metrics.trajectory(tiny, problems).tokens
            accuracy = float(metrics.grade(tiny, problems, tokens).mean())
            assert accuracy > 0.5
            assert results[name][measure] == pytest.approx(accuracy)
            assert f"| {name} | " in table

    def test_humaneval_is_refused_until_it_is_allowed(self, tasks, capsys):
        assert command(tasks, "humaneval") == 2
        assert "--confirm-run-unsafe-code" in capsys.readouterr().err

    def test_unknown_task(self, tasks, capsys, monkeypatch):
        monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda **_: types.SimpleNamespace(all_tasks=["piqa"]))
        assert command(tasks, "piqua") == 2
        assert "no task 'piqua'" in capsys.readouterr().err

    def test_names_may_have_spaces_between_them(self, tasks, capsys):
        assert command(tasks, " humaneval , piqua,") == 2
        assert capsys.readouterr().err.startswith("evaluate.py: humaneval executes code")

    def test_a_folder_of_tasks_that_is_not_there(self, tmp_path, capsys):
        assert command(tmp_path / "none", "piqa") == 2
        assert capsys.readouterr().err == f"evaluate.py: --include {tmp_path / 'none'} is no folder.\n"

    def test_a_hub_out_of_reach_is_asked_once(self, tmp_path, capfd):
        (tmp_path / "far.yaml").write_text("task: far\ndataset_path: nobody/nothing\noutput_type: multiple_choice\n")
        assert command(tmp_path, "far") == 2
        (line,) = capfd.readouterr().err.splitlines()  # the hub's library wrote ten more
        assert "cannot load task 'far'" in line

    def test_missing_data_is_named_before_the_model_is_loaded(self, tasks, tmp_path, capsys, monkeypatch):
        monkeypatch.setattr(harness, "load_model", None)
        text = (tasks / "winogrande.yaml").read_text().replace("task: winogrande", "task: lost")
        (tmp_path / "lost.yaml").write_text(text.replace("winogrande.jsonl", "nowhere.jsonl"))
        assert command(tmp_path, "lost") == 2
        message = capsys.readouterr().err.splitlines()[-1]
        assert "cannot load task 'lost'" in message
        assert "nowhere.jsonl" in message

    def test_our_command_and_the_library_of_the_same_name(self):
        with harness.hugging_face_evaluate():
            import evaluate as library

            assert hasattr(library, "load")
        import evaluate as command

        assert command is evaluate

    def test_installed_beside_the_libraries_none_of_them_is_hidden(self, monkeypatch):
        monkeypatch.setattr(torch, "__file__", str(Path(harness.__file__).parents[1] / "torch" / "__init__.py"))
        before = list(sys.path)
        with harness.hugging_face_evaluate():
            assert sys.path == before


class TestRequests:
    pairs = tuple(("The whale " + "sea " * i, "ship and captain") for i in range(10))

    def lm(self, tiny, **options):
        return harness.HarnessLM(tiny, **{"mc_num": 8, "batch_size": 4, "gen_length": 8} | options)

    def test_an_interrupted_run_continues_and_changes_nothing(self, tiny, tmp_path, monkeypatch):
        requests, calls = instances("loglikelihood", *self.pairs), []
        want = self.lm(tiny).loglikelihood(requests)
        original = harness.HarnessLM._likelihoods

        def dies_in_the_second_batch(lm, batch):
            calls.append(len(batch))
            if len(calls) == 2:
                raise KeyboardInterrupt
            return original(lm, batch)

        monkeypatch.setattr(harness.HarnessLM, "_likelihoods", dies_in_the_second_batch)
        with pytest.raises(KeyboardInterrupt):
            self.lm(tiny, cache=tmp_path).loglikelihood(requests)
        with open(tmp_path / "answers-0.jsonl", "a") as file:
            file.write('\n{"half a li')
        assert self.lm(tiny, cache=tmp_path).loglikelihood(requests) == want
        assert self.lm(tiny, cache=tmp_path).loglikelihood(requests) == want
        assert calls == [4, 4, 4, 2]  # one stored, one lost, the lost one and the last; the third run needs none

    @pytest.mark.parametrize("change", [{"mc_num": 16}, {"cfg": 0.5}, {"seed": 2}, {"identity": "other weights"}])
    def test_answers_under_other_settings_are_not_reused(self, tiny, tmp_path, change):
        requests = instances("loglikelihood", *self.pairs[:2])
        self.lm(tiny, cache=tmp_path).loglikelihood(requests)
        other = self.lm(tiny, cache=tmp_path, **change)
        other.loglikelihood(requests)
        assert other.answered == 2

    def test_weights_that_changed_have_another_fingerprint(self, small_folder, tmp_path):
        copy = shutil.copytree(small_folder, tmp_path / "copy")
        before = harness.fingerprint(str(copy))
        assert harness.fingerprint(str(copy)) == before
        os.utime(copy / "model.safetensors", (1, 1))
        assert harness.fingerprint(str(copy)) != before

    def test_spaces_belong_to_the_continuation_and_long_contexts_lose_their_beginning(self, tiny):
        lm = self.lm(tiny)
        context, answer = lm.pair("The ship ", "sank")
        assert tiny.tokenizer.decode(answer.tolist()).startswith(" ")
        assert torch.equal(torch.cat((context, answer)), torch.tensor(tiny.tokenizer.encode("The ship sank").ids))
        short = self.lm(tiny, max_length=6).pair("The ship and the captain sank ", "with the whale")
        assert sum(map(len, short)) == 6
        assert len(short[1]) == min(6, len(lm.pair("The ship and the captain sank ", "with the whale")[1]))

    def test_greedy_only_on_request(self, tiny):
        problem = tiny_tasks.problems("code", "eval", 1, 3)[0]
        context, answer = problem.prompt + " return", problem.answer.removeprefix(" return")
        ids = tiny.tokenizer.encode(context).ids, tiny.tokenizer.encode(context + answer).ids
        assert suffix_greedy_prediction(tiny, torch.tensor(ids[0]), torch.tensor(ids[1][len(ids[0]):]))
        requests = instances("loglikelihood", (context, answer), (context, " None"))
        assert [g for _, g in self.lm(tiny).loglikelihood(requests)] == [False, False]
        assert [g for _, g in self.lm(tiny, check_greedy=True).loglikelihood(requests)] == [True, False]

    def test_rolling_predicts_every_token_once(self, tiny):
        lm, text = self.lm(tiny, max_length=8), "The whale and the ship and the captain at sea."
        ids = torch.tensor(tiny.tokenizer.encode(text).ids)
        pieces = [(ids[max(0, i - 4) : i], ids[i : i + 4]) for i in range(0, len(ids), 4)]
        assert len(pieces) >= 3
        assert torch.equal(torch.cat([a for _, a in pieces]), ids)
        want = sum(log_likelihoods(tiny, pieces, 8, 8, 4, seed=1234))
        assert lm.loglikelihood_rolling(instances("loglikelihood_rolling", (text,))) == [pytest.approx(want)]

    def test_texts_end_before_a_stop_string_and_do_not_depend_on_their_batch(self, tiny):
        prompts = [p.prompt for p in tiny_tasks.problems("math", "eval", 3, 3)]
        together = self.lm(tiny, gen_length=24, batch_size=48).generate_until(
            instances("generate_until", *((p, {"until": ["####"]}) for p in prompts)))
        alone = [self.lm(tiny, gen_length=24).generate_until(instances("generate_until", (p, {"until": "####"})))[0]
                 for p in prompts]
        assert together == alone
        assert all("=" in text and "####" not in text for text in together)

    @pytest.mark.parametrize("length", [64, 100])
    def test_more_new_tokens_than_the_context_are_refused(self, tiny, length, monkeypatch):
        """And of a prompt that does not fit, the end is kept, down to its last token."""
        asked = []
        monkeypatch.setattr(harness, "generate", lambda m, ids, **_: asked.append(ids) or torch.cat((ids, ids), 1))
        lm = harness.HarnessLM(tiny, max_length=64)
        request = instances("generate_until", ("The whale and the ship", {"until": [], "max_gen_toks": length}))
        with pytest.raises(Refused, match=f"asks for {length} new tokens, which leaves no room for a prompt"):
            lm.generate_until(request)
        assert not asked
        lm.generate_until(instances("generate_until", ("The whale and the ship", {"until": [], "max_gen_toks": 63})))
        assert asked[0].tolist() == [tiny.tokenizer.encode("The whale and the ship").ids[-1:]]

    def test_a_threshold_needs_no_number_of_steps(self, tiny):
        requests = instances("generate_until", (tiny_tasks.problems("math", "eval", 1, 3)[0].prompt, {"until": []}))
        texts = [self.lm(tiny, gen_length=24, threshold=t).generate_until(requests) for t in (0.9, None)]
        assert "=" in texts[0][0]

    def test_a_task_s_own_length_counts_when_no_other_is_given(self, tiny):
        lm = harness.HarnessLM(tiny)
        texts = lm.generate_until(instances("generate_until", ("The", {"until": [], "max_gen_toks": 2}),
                                            ("The sea", {"until": [], "max_gen_toks": 6})))
        for text, context, n in zip(texts, ("The", "The sea"), (2, 6), strict=True):
            ids = generate(tiny, torch.tensor([tiny.tokenizer.encode(context).ids]), n, n)
            assert tiny.tokenizer.decode(ids[0, -n:].tolist()) == text

    def test_samples_are_reproducible(self, tiny):
        requests = instances("generate_until", *((f"The {w}", {"until": []}) for w in WORDS[:3]))
        first = self.lm(tiny, temperature=1.0).generate_until(requests)
        assert first == self.lm(tiny, temperature=1.0).generate_until(requests)
        assert first != self.lm(tiny, temperature=1.0, seed=5).generate_until(requests)

    def test_chat(self, tiny):
        lm, question = self.lm(tiny, chat=True), {"role": "user", "content": "Who?"}
        assert lm.apply_chat_template([question]) == chat_prompt("llada", [question])
        opened = lm.apply_chat_template([question, {"role": "assistant", "content": "It is"}], False)
        assert opened == chat_prompt("llada", [question]) + "It is"

    def test_dream_s_answers_end_with_eos_behind_a_bos(self, tiny):
        config = replace(tiny.config, family="dream", logit_shift=True)
        tokenizer = Tokenizer.from_str(tiny.tokenizer.to_str())
        tokenizer.add_special_tokens([harness.DREAM_BOS])
        lm = self.lm(DiffusionLM(replace(config, vocab_size=1025), tokenizer).eval())
        context, answer = lm.pair("The ship", " sank")
        assert (int(context[0]), int(answer[-1])) == (1024, config.eos_id)
        assert tiny.tokenizer.decode(answer[:-1].tolist()) == " sank"
        want = log_likelihoods(lm.model, [(context, answer)], 8, 8, 4, seed=1234)
        assert lm.loglikelihood(instances("loglikelihood", ("The ship", " sank"))) == [(want[0], False)]
        (rolled,) = lm.loglikelihood_rolling(instances("loglikelihood_rolling", ("The ship sank",)))
        ids = torch.tensor([*lm.encode("The ship sank"), config.eos_id])
        assert rolled == pytest.approx(log_likelihoods(lm.model, [(ids[:1], ids[1:])], 8, 8, 4, seed=1234)[0])

    def test_a_model_without_tokenizer_is_refused(self, tiny):
        with pytest.raises(Refused, match=r"no tokenizer\.json"):
            harness.HarnessLM(DiffusionLM(tiny.config))

    def test_the_harness_own_command_finds_the_model_by_name(self, tiny):
        made = get_model("starquant").create_from_arg_string("model=tiny,mc_num=8,dtype=bfloat16", {"device": "cpu"})
        assert (made.likelihood["mc_num"], made.model.norm.weight.dtype) == (8, torch.bfloat16)
        assert made.tokenizer_name == self.lm(tiny).tokenizer_name

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
    def test_the_harness_default_device_is_auto_where_no_gpu_is(self):
        made = get_model("starquant").create_from_arg_string("model=tiny", {"device": "cuda:0"})
        assert made.model.device == torch.device("cpu")
        auto = "cuda" if torch.cuda.is_available() else "cpu"
        assert get_model("starquant")("tiny", device=None).model.device.type == auto  # as the harness leaves it out
        with pytest.raises(Refused, match="device 'cuda:1' is not available"):
            get_model("starquant").create_from_arg_string("model=tiny", {"device": "cuda:1"})
