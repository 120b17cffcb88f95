"""How a command ends; and two processes give what one gives: calibration shares blocks, evaluation shares requests."""

import importlib.util
import io
import json
import multiprocessing
import os
import socket
import subprocess
import sys
from contextlib import redirect_stdout, suppress
from pathlib import Path

import pytest
import torch
from arguments import fast

import calibrate
from checkpoint.folder import INDEX, sha256
from runtime import processes

ROOT = Path(__file__).parents[2]
SMALL = ["--segments", "9", "--length", "40", *fast("--method", "starquant+", "--problems", "1")]
PROGRAM = """
import importlib, json, sys
for name, arguments in json.loads(sys.argv[1]):
    assert importlib.import_module(name).main(arguments) == 0
"""


def rank_0(commands, said, environment):
    """The commands in this process, a fork of the tests' one; `said` gets standard output."""
    os.environ.update(environment)
    with open(said, "w") as file, redirect_stdout(file):
        codes = [importlib.import_module(name).main(arguments) for name, arguments in commands]
    torch.distributed.destroy_process_group()
    assert codes == [0] * len(commands)


@pytest.fixture(scope="module")
def runs(small_folder, tmp_path_factory):
    """(folder for results, standard output of one process, of two): each runs calibrate.py and then evaluate.py.

    torchrun would start two new processes. Here the first is a fork, which has torch and the harness loaded, and only
    the second is new: its sets and dictionaries have another order of hashes.
    """
    folder = tmp_path_factory.mktemp("two")
    commands = {"calibrate": ["--model", str(small_folder), *SMALL, "--inputs", "fp", "--out"]}
    if importlib.util.find_spec("lm_eval"):
        from local_tasks import write_tasks

        write_tasks(folder / "tasks")
        commands["evaluate"] = ["--model", str(small_folder), "--tasks", "winogrande,gsm8k", "--include",
                                str(folder / "tasks"), "--device", "cpu", "--mc-num", "8", "--batch-size", "8",
                                "--gen-length", "24", "--limit", "2", "--cache"]
    one, two = ([(name, [*arguments, str(folder / f"{name} {n}")]) for name, arguments in commands.items()]
                for n in ("one", "two"))
    with redirect_stdout(io.StringIO()) as said:
        assert [importlib.import_module(name).main(arguments) for name, arguments in one] == [0] * len(one)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        places = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    environment = {**os.environ, **places, "RANK": "1", "LOCAL_RANK": "1", "PYTHONPATH": str(ROOT),
                   "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "PYTHONFAULTHANDLER": "1"}  # an abort says where
    new = subprocess.Popen([sys.executable, "-c", PROGRAM, json.dumps(two)], cwd=folder, env=environment, text=True,
                           stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    fork = multiprocessing.get_context("fork").Process(
        target=rank_0, args=(two, folder / "said", places | {"RANK": "0", "LOCAL_RANK": "0"}))
    try:
        fork.start()
        out, err = new.communicate(timeout=300)
        fork.join(timeout=60)
    finally:
        new.kill()
        fork.kill()
    assert (new.returncode, out) == (0, ""), err  # one process speaks
    assert fork.exitcode == 0
    return folder, said.getvalue(), (folder / "said").read_text()


def record(said, key) -> dict:
    """The line of JSON of the command whose result has this key."""
    (line,) = (line for line in said.splitlines() if line.startswith("{") and key in json.loads(line))
    return json.loads(line)


@pytest.mark.parametrize(("arguments", "said"), [
    (["--x", ""], "nothing is given for --x"), (["--x="], "nothing is given for --x"),
    (["--x", "a\udcff"], r"'a\udcff' is no text in UTF-8"), (["--n", "0"], "--n: must be at least 1 and below 1000000"),
    (["--n", "1000000"], "--n: must be at least 1 and below 1000000"),
    (["--n", "1.0"], "--n: invalid number value: '1.0'"),
    *((["--c", c], "--c: must be above 0 and finite") for c in ("0", "-1", "nan", "inf"))])
def test_arguments_are_refused_in_a_sentence(arguments, said, capsys):
    parser = processes.Parser("p.py")
    parser.add_argument("--x")
    parser.add_argument("--n", type=processes.at_least(1))
    parser.add_argument("--c", type=processes.positive)
    with pytest.raises(SystemExit, match="2"):
        parser.parse_args(arguments)
    assert capsys.readouterr().err == f"p.py: {'argument ' * (': ' in said)}{said}; --help lists what there is.\n"


@pytest.mark.parametrize("size", ["2", "many"])
def test_a_variable_alone_is_not_torchrun(size, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", size)
    assert processes.launched() == 1
    assert processes.start(torch.device("cpu")) == torch.device("cpu")


def test_the_home_folder_is_found_where_the_shell_does_not_look(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    parser = processes.Parser("p.py")
    parser.add_argument("--out", type=Path)
    assert parser.parse_args(["--out=~/x"]).out == Path("/home/me/x")
    assert parser.parse_args(["--out", "~nobody-here/x"]).out == Path("~nobody-here/x")


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

        assert processes.run("p.py", fail, None, smaller="--rows", kept=lambda: "Go on.") == code
        assert capsys.readouterr() == ("", said)

    def test_a_pipe_that_nobody_reads_ends_without_a_word_when_the_work_is_done(self, tmp_path):
        program = ("import pathlib, sys, warnings; from runtime import processes\n"
                   "def work(args):\n    print('a table')\n    warnings.warn('slow')\n"
                   "    pathlib.Path(sys.argv[1]).touch()\n"
                   "sys.exit(processes.run('p.py', work, None))")
        read, write = os.pipe()
        os.close(read)
        done = subprocess.run([sys.executable, "-c", program, tmp_path / "done"], stdout=write, stderr=subprocess.PIPE,
                              cwd=ROOT, env=os.environ | {"PYTHONUNBUFFERED": ""}, check=False)
        os.close(write)
        assert (done.returncode, done.stderr) == (141, b"p.py: slow\n")
        assert (tmp_path / "done").exists()

    @pytest.mark.parametrize("name", ["stdout", "stderr"])
    def test_what_was_closed_takes_nothing(self, name, monkeypatch):
        monkeypatch.setattr(sys, name, None)
        assert processes.run("p.py", lambda args: print(sys.stdout.isatty(), sys.stderr.isatty()), None) == 0

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


@pytest.mark.parametrize(("seconds", "shown"), [(0, ["  0%", " 50%", "100%", "100%"]), (30, ["100%"])])
def test_a_bar_in_a_log_is_a_line_now_and_then_and_one_at_the_end(seconds, shown, monkeypatch):
    log = io.StringIO()
    monkeypatch.setattr(processes.Bar, "SECONDS", seconds)
    with processes.Bar(total=2, desc="work", file=log, mininterval=0) as bar:
        for _ in range(2):
            bar.update()
    assert [line[:10] for line in log.getvalue().split("\n")] == [*(f"work: {part}" for part in shown), ""]
    assert "\r" not in log.getvalue()


class TestCalibrate:
    def test_two_processes_write_the_bytes_of_one(self, runs):
        folder, *said = runs
        one, two = folder / "calibrate one", folder / "calibrate two"
        assert record(said[0], "out")["table"] == record(said[1], "out")["table"]
        index = json.loads((one / INDEX).read_text())
        assert json.loads((two / INDEX).read_text()) == index
        for name in {*index["weight_map"].values(), "config.json", "README.md"}:
            assert sha256(one / name) == sha256(two / name), name
        one, two = (json.loads((out / "starquant.json").read_text()) for out in (one, two))
        assert two["complete"]
        assert [b.pop("seconds") and b for b in two["blocks"]] == [b.pop("seconds") and b for b in one["blocks"]]

    def test_blocks_that_wait_for_one_another_are_not_shared(self, small_folder, tmp_path, monkeypatch, capsys):
        monkeypatch.setattr(processes, "world", lambda: 2)
        assert calibrate.main(["--model", str(small_folder), *SMALL, "--out", str(tmp_path / "q")]) == 2
        assert "--inputs fp" in capsys.readouterr().err
        assert not (tmp_path / "q").exists()


class TestEvaluate:
    def test_two_processes_give_the_scores_of_one_and_share_them(self, runs):
        pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install lm-eval")
        folder, *said = runs
        one, two = (record(text, "processes") for text in said)
        assert (two["processes"], one["processes"]) == (2, 1)
        scores = [{t: {k: v for k, v in r.items() if "," in k} for t, r in x["tasks"].items()} for x in (one, two)]
        assert scores[0] == scores[1]
        assert all(scores[0][t] for t in ("winogrande", "gsm8k"))
        assert stored(folder / "evaluate one", 1) == stored(folder / "evaluate two", 2)


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


def test_one_thread_for_a_narrow_model(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        with suppress(KeyboardInterrupt), processes.threads_for(processes.NARROW):
            assert torch.get_num_threads() == 1
            raise KeyboardInterrupt
        assert torch.get_num_threads() == 2
        with processes.threads_for(processes.NARROW + 1):
            assert torch.get_num_threads() == 2
        monkeypatch.setenv("OMP_NUM_THREADS", "2")
        with processes.threads_for(processes.NARROW):
            assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
