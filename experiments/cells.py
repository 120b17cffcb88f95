"""The cells of a table: one setting with one calibration seed each, measured once and kept.

A cell is judged on held-out examples of its seed's own. `cells.jsonl` keeps it under a key of all that determines it,
except the code, whose commit stands beside it. So a long run resumes, tables share their cells, and `torchrun
--nproc-per-node N evaluate.py --table 2` divides them. The cells of the published tables are in `results/cells.jsonl`.
They are read, unless --fresh asks to measure everything again, and written only by `--out results`.
"""

import dataclasses
import hashlib
import json
import shutil
import subprocess
from functools import cache, lru_cache
from pathlib import Path

import torch

from calibrate import quantize_model
from checkpoint.folder import SINGLE, Checkpoint, json_lines, resolve, sha256
from checkpoint.tokenizer import load_tokenizer
from experiments.rows import config_of
from model import load_model
from runtime import processes
from runtime.layers import QuantLinear
from runtime.processes import Refused
from tiny import metrics, tasks
from tiny.stress import stress

RESULTS = Path(__file__).parent.parent / "results"  # published tables, figures and cells


@dataclasses.dataclass(frozen=True)
class Run:
    """What all cells of a table share."""

    name: str  # model
    c: float  # scale of the outlier channels, 1: none
    problems: int  # per task and seed
    nelbo: bool  # likelihoods (NELBO and KL) only
    device: str
    segments: int = 128  # of calibration
    sequences: int | None = None  # of each domain, for the likelihoods; as many as problems unless given

    def check(self) -> None:
        """Refused unless the model is one that tables can calibrate and judge."""
        checkpoint = Checkpoint(resolve(self.name))
        if checkpoint.quantization:
            raise Refused(f"--table calibrates a 16-bit model, and {self.name} is quantized already.")
        if load_tokenizer(checkpoint.folder) is None:
            raise Refused(f"{self.name} has no tokenizer.json, which the embedded tasks need.")

    @cache  # noqa: B019 (one run a process)
    def model(self):
        model = load_model(self.name, self.device)
        return model if self.c == 1 else stress(model, self.c)

    @cache  # noqa: B019
    def reference(self, seed: int):
        """16 bit on one seed's examples: (values, trajectories)."""
        return metrics.scores(self.model(), self.problems, seed, self.nelbo, f"16-bit, examples {seed}",
                              sequences=self.sequences)

    def key(self, setting: dict | None, seed: int, threshold: float | None = None) -> dict:
        """All that determines a cell except the code; with a threshold, of the cell that decodes by it."""
        if setting is not None:  # what differs from the method's defaults
            method = {"method": setting.get("method", "starquant")}
            defaults = dataclasses.asdict(config_of(method, seed)) | {"method": "starquant"}
            setting = {k: v for k, v in setting.items() if defaults.get(k) != v}
        key = {"weights": weights_digest(resolve(self.name)), "stress": self.c, "problems": self.problems, "seed": seed,
               "setting": setting, "segments": self.segments, "device": self.kind}
        key |= {"threshold": threshold} if threshold else {
            "nelbo": self.nelbo, "sequences": self.sequences or self.problems}
        usual = {"segments": 128, "device": "cpu", "sequences": self.problems}.items()  # left out
        return {name: value for name, value in key.items() if (name, value) not in usual}

    @property
    def kind(self) -> str:
        """"cpu" (fp32) or "cuda" (bf16): their numbers are not each other's."""
        return self.device.partition(":")[0]

    def measure(self, setting: dict | None, seed: int, threshold: float | None = None) -> dict[str, list[float]]:
        """Values per example of one setting (None: 16 bit) calibrated with and judged on a seed."""
        model = self.calibrated(json.dumps(setting), seed)
        label = "16-bit" if setting is None else setting.get("method", "starquant")
        if threshold is not None:
            values = metrics.parallel(model, self.problems, seed, threshold, label)
        elif setting is None:
            values, _ = self.reference(seed)
        else:
            values, paths = metrics.scores(model, self.problems, seed, self.nelbo, label, self.model(), self.sequences)
            values = values if self.nelbo else values | metrics.agreement(paths, self.reference(seed)[1])
        return {k: [round(x, 5) for x in v.tolist()] for k, v in values.items()}

    @lru_cache(maxsize=1)  # noqa: B019 (a cell of each kind needs the same model)
    def calibrated(self, setting: str, seed: int):
        """The model of a setting in JSON (null: 16 bit)."""
        if (setting := json.loads(setting)) is None:
            return self.model()
        tokens, region = self.calibration_set(setting, seed)
        judged = quantize_model(self.model(), tokens, config_of(setting, seed), region)
        if setting.get("gates") == "off":
            switch_gates_off(judged)
        return judged

    def calibration_set(self, setting: dict, seed: int):
        """Segments of 64 tokens, and where they may be masked."""
        tokenizer, n = self.model().tokenizer, setting.get("segments", self.segments)
        if setting.get("text") == "english":
            return tasks.english_segments(tokenizer, "calib", n, 64, seed)
        if setting.get("text") == "random":
            ids = torch.randint(self.model().mask_id, (n, 64), generator=torch.Generator().manual_seed(seed))
            return ids, torch.ones_like(ids, dtype=torch.bool)
        return tasks.calibration_set(tokenizer, n, 64, seed)


def switch_gates_off(model) -> None:
    """Every token uses all of P from now on: what the gates themselves are worth, on the same learned rotation."""
    for module in model.modules():
        if isinstance(module, QuantLinear):
            module.d_m = module.d_u = 0


@cache
def weights_digest(folder: Path) -> str:
    files = [folder / SINGLE] if (folder / SINGLE).exists() else sorted(folder.glob("*.safetensors"))
    sums = list(map(sha256, files))
    return (sums[0] if len(sums) == 1 else hashlib.sha256(" ".join(sums).encode()).hexdigest())[:16]


def digest(key: dict) -> str:
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]


def stored_cells(*files: Path) -> dict[str, dict]:
    """Finished cells by digest, the later of two."""
    return {cell["digest"]: cell for cell in json_lines(*files) if "digest" in cell}


def measured(run: Run, todo: list[tuple], kinds: list, out: Path, fresh: bool = False, desc: str = "") -> list[list]:
    """The cells of each (setting, seed) in `todo`, one for each threshold in `kinds` (None: likelihoods and tasks).

    What neither `results` nor the folder `out` holds is measured and stored there; with `fresh` that is everything.
    """
    cells = {} if fresh else stored_cells(RESULTS / "cells.jsonl", out / "cells.jsonl")

    def finished(key):
        return cells.get(digest(key)) or cells.get(digest(key | {"nelbo": False}))

    mine = todo[processes.rank() :: processes.world()]  # under torchrun every process measures its share
    commit = current_commit()
    for setting, seed in processes.Bar(mine, desc=desc, unit="cell", disable=False):
        for threshold in kinds:
            key = run.key(setting, seed, threshold)
            if finished(key) is None:
                cell = {"digest": digest(key), "commit": commit, "torch": torch.__version__, **key,
                        "values": run.measure(setting, seed, threshold)}
                with open(out / "cells.jsonl", "ab", buffering=0) as file:  # one write, so that processes may append
                    file.write((json.dumps(cell) + "\n").encode())
                cells[cell["digest"]] = cell
    for others in processes.gather(cells):
        cells |= others
    return [[finished(run.key(setting, seed, threshold)) for threshold in kinds] for setting, seed in todo]


def current_commit() -> str:
    if shutil.which("git") is None:
        return ""
    return subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False,
                          cwd=RESULTS.parent).stdout.strip()
