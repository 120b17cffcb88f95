"""How a command ends; and two processes give what one gives: calibration shares blocks, evaluation shares requests."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from arguments import fast

import calibrate
import evaluate
from checkpoint.folder import INDEX, sha256
from runtime import processes

ROOT = Path(__file__).parents[2]
FAST = ["--segments", "9", "--length", "40", *fast("--problems", "1")]


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def torchrun(*arguments, cwd):
    """Two processes of a command of this project; rounding depends on the number of threads, so it is one."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1",
                   "PYTHONFAULTHANDLER": "1"}  # an abort says where
    return subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
                           str(ROOT / arguments[0]), *map(str, arguments[1:])], cwd=cwd, env=environment,
                          capture_output=True, text=True, timeout=300)


class TestRun:
    """One sentence and an exit code for what a user can mend; a traceback for everything else."""

    @pytest.mark.parametrize(("error", "code", "said"), [
        (processes.Refused("--x 0 is below 1."), 2, "p.py: --x 0 is below 1.\n"),
        (OSError(28, "No space left on device", "out/a.bin"), 2, "p.py: No space left on device: out/a.bin. Go on.\n"),
        (OSError("odd"), 2, "p.py: odd. Go on.\n"),
        (MemoryError(), 2, "p.py: out of memory (the system gives no details); lower --rows.\n"),
        (torch.OutOfMemoryError("CUDA out of memory.\nTried"), 2,
         "p.py: out of memory (CUDA out of memory); lower --rows.\n"),
        (KeyboardInterrupt(), 130, "p.py: interrupted. Go on.\n")])
    def test_one_sentence_and_an_exit_code(self, error, code, said, capsys):
        def fail(args):
            raise error

        assert processes.run("p.py", fail, None, smaller="--rows", kept="Go on.") == code
        assert capsys.readouterr() == ("", said)

    def test_memory_that_the_cpu_does_not_have(self, capsys):
        assert processes.run("p.py", lambda args: torch.empty(2**60, dtype=torch.uint8), None) == 2
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        assert err.startswith("p.py: out of memory (")
        assert err.endswith("); lower --batch-size.\n")

    @pytest.mark.parametrize("error", [ValueError("Overflow when unpacking long long"), RuntimeError("a shape"),
                                       KeyError("x")])
    def test_a_fault_of_the_program_stays_a_traceback(self, error):
        def fail(args):
            raise error

        with pytest.raises(type(error), match=str(error.args[0])):
            processes.run("p.py", fail, None)

    def test_the_result_is_the_last_line(self, capsys):
        assert processes.run("p.py", lambda args: {"x": args}, 3) == 0
        assert capsys.readouterr() == ('{"x": 3}\n', "")

    def test_one_process_speaks(self, monkeypatch, capsys):
        monkeypatch.setattr(processes, "rank", lambda: 1)
        assert processes.run("p.py", lambda args: {}, None) == 0
        assert capsys.readouterr() == ("", "")


class TestCalibrate:
    def test_two_processes_write_the_bytes_of_one(self, small_folder, tmp_path, one_thread, capsys):
        arguments = ["--model", str(small_folder), *FAST, "--inputs", "fp"]
        assert calibrate.main([*arguments, "--out", str(tmp_path / "one")]) == 0
        one = json.loads(capsys.readouterr().out.splitlines()[-1])
        run = torchrun("calibrate.py", *arguments, "--out", tmp_path / "two", cwd=tmp_path)
        assert run.returncode == 0, run.stderr
        two = json.loads(run.stdout.splitlines()[-1])
        assert run.stdout.count('{"out"') == 1  # one process speaks
        assert two["table"] == one["table"]
        index = json.loads((tmp_path / "one" / INDEX).read_text())
        assert json.loads((tmp_path / "two" / INDEX).read_text()) == index
        for name in {*index["weight_map"].values(), "config.json", "README.md"}:
            assert sha256(tmp_path / "one" / name) == sha256(tmp_path / "two" / name), name
        one, two = (json.loads((tmp_path / n / "starquant.json").read_text()) for n in ("one", "two"))
        assert two["complete"]
        assert [b.pop("seconds") and b for b in two["blocks"]] == [b.pop("seconds") and b for b in one["blocks"]]

    def test_blocks_that_wait_for_one_another_are_not_shared(self, small_folder, tmp_path, monkeypatch, capsys):
        monkeypatch.setattr(processes, "world", lambda: 2)
        assert calibrate.main(["--model", str(small_folder), *FAST, "--out", str(tmp_path / "q")]) == 2
        assert "--inputs fp" in capsys.readouterr().err
        assert not (tmp_path / "q").exists()


class TestEvaluate:
    def test_two_processes_give_the_scores_of_one_and_share_them(self, tmp_path, one_thread, monkeypatch, capsys):
        pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install lm-eval")
        monkeypatch.syspath_prepend(ROOT / "tests" / "experiments")  # where it lies if this file runs alone
        from test_harness import write_tasks

        write_tasks(tmp_path / "tasks")
        arguments = ["--tasks", "winogrande,gsm8k", "--include", str(tmp_path / "tasks"), "--device", "cpu", "--mc-num",
                     "8", "--batch-size", "8", "--gen-length", "24", "--limit", "4"]
        assert evaluate.main([*arguments, "--cache", str(tmp_path / "one")]) == 0
        one = json.loads(capsys.readouterr().out.splitlines()[-1])
        run = torchrun("evaluate.py", *arguments, "--cache", tmp_path / "two", cwd=tmp_path)
        assert run.returncode == 0, run.stderr
        two = json.loads(run.stdout.splitlines()[-1])
        assert (two["processes"], one["processes"]) == (2, 1)
        scores = [{t: {k: v for k, v in r.items() if "," in k} for t, r in x["tasks"].items()} for x in (one, two)]
        assert scores[0] == scores[1]
        assert all(scores[0][t] for t in ("winogrande", "gsm8k"))
        assert stored(tmp_path / "one", 1) == stored(tmp_path / "two", 2)


def stored(folder, processes: int) -> dict:
    """All answers of a cache folder, to the last bit, from one file per process."""
    files = sorted(folder.glob("answers-*.jsonl"))
    assert len(files) == processes
    lines = [line for f in files for line in f.read_text().split("\n") if line]
    return {key: value for line in lines for key, value in json.loads(line).items()}


class TestAlone:
    def test_one_process_needs_no_group(self):
        assert (processes.rank(), processes.world(), processes.gather(5)) == (0, 1, [5])
        assert processes.first(lambda: 7) == 7
        with pytest.raises(KeyError):
            processes.first(lambda: {}["x"])
