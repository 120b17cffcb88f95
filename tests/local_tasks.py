"""Versions of the benchmarks for the harness, under their own names, on a few local documents."""

import importlib.util
import json
import random
from pathlib import Path

from tiny import interpreter, tasks

LIBRARY = Path(importlib.util.find_spec("lm_eval").origin).parent / "tasks"
WORDS = ("whale", "ship", "captain", "sea", "people", "Congress", "war", "peace", "work", "nation", "sail", "night")


def sentence(rng, n=6):
    return " ".join(rng.choice(WORDS) for _ in range(n))


def documents() -> dict[str, list[dict]]:
    rng = random.Random(0)
    arc = [{"id": str(i), "question": sentence(rng), "answerKey": "ABCD"[i % 4],
            "choices": {"text": [sentence(rng, 1 + j) for j in range(4)], "label": list("ABCD")}} for i in range(4)]
    wino = [{"sentence": f"The {sentence(rng, 2)} and the sail, _ was {sentence(rng, 2)}.", "option1": "the sea",
             "option2": "the people", "answer": str(1 + i % 2)} for i in range(6)]
    truth = [{"question": sentence(rng), "mc1_targets": {"choices": ["a"], "labels": [1]},
              "mc2_targets": {"choices": [sentence(rng, 2) for _ in range(3)], "labels": [1, 0, 1]}} for _ in range(2)]
    math_ = [{"question": p.prompt, "answer": p.answer} for p in tasks.problems("math", "eval", 6, 3)]
    code = []
    for i, p in enumerate(tasks.problems("code", "eval", 6, 3)):
        values = [(args, value) for args in p.inputs if (value := p._value(p.answer, args)) is not interpreter.Failed]
        tests = [f"    assert candidate(*{args!r}) == {value!r}\n" for args, value in values]
        code.append({"task_id": str(i), "prompt": p.prompt, "entry_point": "f",
                     "test": "def check(candidate):\n" + "".join(tests)})
    subjects = {f"mmlu_{s}": [{"question": sentence(rng), "choices": [sentence(rng, 1) for _ in range(4)],
                               "answer": rng.randrange(4)} for _ in range(n)] for s, n in (("sea", 6), ("war", 8))}
    return {"arc_challenge": arc, "winogrande": wino, "truthfulqa_mc2": truth, "gsm8k": math_, "humaneval": code,
            **subjects}


SUBPROCESS = '''
import subprocess, sys

def build(resps, docs):
    return [[doc["prompt"] + r for r in resp] for resp, doc in zip(resps, docs)]

def pass_at_1(references, predictions):
    run = subprocess.run([sys.executable, "-I", "-c", predictions[0][0] + "\\n" + references[0]], timeout=20,
                         capture_output=True)
    return {"pass@1": float(run.returncode == 0)}
'''
MMLU = f"include: {LIBRARY}/mmlu/default/_default_template_yaml"
YAML = {
    "mmlu_sea": MMLU, "mmlu_war": MMLU,
    "arc_challenge": f"include: {LIBRARY}/arc/arc_challenge.yaml",
    "winogrande": f"include: {LIBRARY}/winogrande/default.yaml",
    "truthfulqa_mc2": f"include: {LIBRARY}/truthfulqa/truthfulqa_mc2.yaml",
    "gsm8k": f"include: {LIBRARY}/gsm8k/gsm8k.yaml\nnum_fewshot: 0\ndoc_to_text: \"{{{{question}}}}\"",
    "humaneval": """
test_split: test
output_type: generate_until
unsafe_code: true
num_fewshot: 0
doc_to_text: "{{prompt}}"
doc_to_target: "{{test}}\\ncheck({{entry_point}})"
generation_kwargs: {until: ["\\nclass", "\\ndef"], max_gen_toks: 1024, do_sample: false}
metric_list: [{metric: !function utils.pass_at_1, aggregation: mean, higher_is_better: true}]
filter_list: [{name: create_test, filter: [{function: custom, filter_fn: !function utils.build}]}]""",
}


def write_tasks(folder: Path) -> Path:
    """A folder with the tasks under their own names, on local documents."""
    folder.mkdir()
    (folder / "utils.py").write_text(SUBPROCESS)
    for name, rows in documents().items():
        file = folder / f"{name}.jsonl"
        file.write_text("\n".join(map(json.dumps, rows)) + "\n")
        splits = "{" + ", ".join(f"{s}: {file}" for s in ("train", "validation", "test", "dev")) + "}"
        (folder / f"{name}.yaml").write_text(f"{YAML[name]}\ntask: {name}\ntag: null\ndataset_path: json\n"
                                             f"dataset_name: null\ndataset_kwargs: {{data_files: {splits}}}\n")
    (folder / "mmlu.yaml").write_text("group: mmlu\ntask: [mmlu_sea, mmlu_war]\n"
                                      "aggregate_metric_list: [{metric: acc, weight_by_size: true}]\n")
    return folder
