"""The command: what belongs to which use, and what it prints and writes."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

import evaluate
from experiments import judge
from model import load_model

TINY = str(Path(__file__).parents[1] / "tiny" / "weights")  # the embedded model by its folder


class TestCommand:
    def test_prompt_on_the_command_line(self, capsys, tmp_path):
        out = tmp_path / "new" / "x.json"
        assert evaluate.main(["--prompt", "Ann has 4 books.", "--gen-length", "4", "--device", "cpu", "--out",
                              str(out)]) == 0
        *steps, last = capsys.readouterr().out.splitlines()
        assert len(steps) == 4
        record = json.loads(last)
        assert record["prompt"] == "Ann has 4 books."
        assert json.loads(out.read_text()) == record

    @pytest.mark.parametrize(("given", "different"), [
        ([], {}), (["--threshold", "0.8"], {"steps": None, "threshold": 0.8}),
        (["--gen-length", "9"], {"gen_length": 9, "steps": 9}), (["--steps", "5"], {"steps": 5}),
        (["--block-length", "8", "--temperature", "0.5", "--seed", "3"],
         {"block_length": 8, "temperature": 0.5, "seed": 3}), (["--chat"], {"chat": True})])
    def test_a_prompt_is_shown_with_its_arguments(self, given, different, monkeypatch, capsys):
        shown = []
        monkeypatch.setattr(evaluate.watch, "show_denoising", lambda *a, **k: shown.append((*a, k)) or {})
        monkeypatch.setattr(evaluate.watch, "encode_prompt", lambda model, text, chat: (text, {"chat": chat}))
        monkeypatch.setattr(evaluate.watch, "is_chat_model", lambda model, name: False)
        monkeypatch.setattr(evaluate, "load_model", lambda *a: SimpleNamespace(
            asked=a, config=SimpleNamespace(d_model=192)))
        assert evaluate.main(["--prompt", "Ann", "--against", TINY, *given]) == 0
        [(models, (text, chat), arguments)] = shown
        assert [(name, m.asked) for name, m in models.items()] == [
            (name, (name, "auto", None, "packed")) for name in ("tiny", TINY)]  # the judged model first
        assert (text, chat | arguments) == ("Ann", {
            "seed": 0, "steps": 24, "threshold": None, "gen_length": 24, "block_length": None, "temperature": 0.0,
            "chat": False} | different)
        assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {
            "prompt": "Ann", "chat": different.get("chat", False)}

    @pytest.mark.parametrize(("name", "arguments"), [
        ("4", ["tiny", 1.0, "auto"]), ("hero", []), ("5", ["tiny", 4.0, "cpu"])])
    def test_a_figure_is_asked_for_with_its_arguments(self, name, arguments, monkeypatch, tmp_path):
        figures = pytest.importorskip("experiments.figures", exc_type=ImportError)
        asked = []
        monkeypatch.setattr(figures, "make", lambda *a: asked.append(a) or {})
        more = ["--stress", "4", "--device", "cpu"] if name == "5" else []
        assert evaluate.main(["--figure", name, "--out", str(tmp_path), *more]) == 0
        assert asked == [(name, tmp_path, *arguments)]

    @pytest.mark.parametrize(("use", "function", "flag"), [
        ([], "judge", "--problems"), (["--data", "x"], "judge", "--length"), (["--table", "1"], "table", "--problems"),
        (["--prompt", "x"], "prompt", "--gen-length"), (["--tasks", "piqa"], "benchmarks", "--batch-size")])
    def test_lost_memory_names_the_flag_that_helps(self, use, function, flag, monkeypatch, capsys, tmp_path):
        def starved(*_):
            raise MemoryError

        monkeypatch.setattr(evaluate, function, starved)
        monkeypatch.chdir(tmp_path)
        assert evaluate.main(use) == 2
        assert capsys.readouterr().err == f"evaluate.py: out of memory (the system gives no details); lower {flag}.\n"

    def test_a_result_that_cannot_be_written_is_printed(self, monkeypatch, capsys, tmp_path):
        def full(*_):
            raise OSError(28, "No space left on device", "x.json")

        monkeypatch.setattr(evaluate, "judge", lambda _: {"kl": 1.5})
        monkeypatch.setattr(evaluate, "write_json", full)
        assert evaluate.main(["--out", str(tmp_path / "x.json")]) == 2
        out, err = capsys.readouterr()
        assert json.loads(out) == {"kl": 1.5}
        assert err == "evaluate.py: No space left on device: x.json.\n"

    def test_a_table_is_asked_for_with_its_arguments(self, monkeypatch, capsys):
        asked = []
        monkeypatch.setattr(evaluate.tables, "make", lambda *a: asked.append(a) or {"rows": []})
        for more in (["--problems", "9", "--seeds", "4"], ["--quick"], ["--quick", "--seeds", "2", "--problems", "3"],
                     ["--fresh", "--out", "here"], ["--nelbo"]):
            assert evaluate.main(["--table", "2", *more, "--device", "cpu"]) == 0
        sizes = [(run.problems, run.sequences, run.segments, run.nelbo, seeds) for _, run, seeds, *_ in asked]
        assert sizes == [(9, 9, 128, False, 4), (16, 16, 20, True, 1), (3, 3, 20, True, 2), (250, 100, 128, False, 3),
                         (100, 100, 128, True, 3)]
        assert [a[3:] for a in asked[:4]] == [(False, False, Path("out/tables")), (True, False, Path("out/tables")),
                                              (True, False, Path("out/tables")), (False, True, Path("here"))]

    @pytest.mark.parametrize(("arguments", "flag", "use"), [
        (["--table", "1", "--dtype", "fp32"], "--dtype", "--table"),
        (["--table", "1", "--weights", "int8"], "--weights", "--table"),
        (["--table", "1", "--against", "tiny"], "--against", "--table"),
        (["--table", "1", "--gen-length", "4"], "--gen-length", "--table"),
        (["--table", "1", "--seed", "4"], "--seed", "--table"),
        (["--tasks", "piqa", "--against", "tiny"], "--against", "--tasks"),
        (["--tasks", "piqa", "--problems", "3"], "--problems", "--tasks"),
        (["--prompt", "x", "--problems", "3"], "--problems", "--prompt"),
        (["--figure", "4", "--seeds", "3"], "--seeds", "--figure 4"),
        (["--figure", "6", "--model", "tiny"], "--model", "--figure 6"),
        (["--stress", "4"], "--stress", "judging a model"), (["--limit", "4"], "--limit", "judging a model")])
    def test_a_flag_that_has_no_part_is_refused_by_name(self, arguments, flag, use, capsys):
        with pytest.raises(SystemExit) as stop:
            evaluate.main(arguments)
        assert stop.value.code == 2
        assert capsys.readouterr().err == f"evaluate.py: {flag} has no part in {use}; --help lists what there is.\n"

    def test_uses_exclude_each_other(self, capsys):
        with pytest.raises(SystemExit):
            evaluate.main(["--table", "1", "--prompt", "x"])
        assert "not allowed with argument" in capsys.readouterr().err

    def test_a_fault_of_the_program_is_no_refusal(self, monkeypatch):
        """A ValueError from within torch, say, is not dressed up as the user's."""
        def fault(*_, **__):
            raise ValueError("internal")

        monkeypatch.setattr(judge.metrics, "scores", fault)
        with pytest.raises(ValueError, match=r"^internal$"):
            evaluate.main(["--device", "cpu", "--problems", "1"])

    @pytest.mark.parametrize("given", [[], ["--weights", "int8"]])
    def test_weights_are_resident_as_asked(self, given, monkeypatch):
        asked = []
        monkeypatch.setattr(evaluate, "load_model", lambda *a: asked.append(a) or load_model(*a))
        assert evaluate.main(["--prompt", "Ann", "--gen-length", "2", "--device", "cpu", *given]) == 0
        assert [a[3] for a in asked] == [given[-1] if given else "packed"]

    def test_an_interruption_ends_in_130(self, monkeypatch, capsys):
        def interrupt(*args):
            raise KeyboardInterrupt

        monkeypatch.setattr(judge, "load_model", interrupt)
        assert evaluate.main(["--device", "cpu"]) == 130
        assert capsys.readouterr().err == "evaluate.py: interrupted.\n"

    @pytest.mark.parametrize("use", [[], ["--data", "x.txt"], ["--prompt", "x"], ["--figure", "hero"]])
    def test_what_several_processes_would_do_alike_is_refused(self, use, monkeypatch, capsys):
        for name, value in {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
            monkeypatch.setenv(name, value)
        assert evaluate.main(use) == 2
        assert "start everything else without it" in capsys.readouterr().err

    def test_help_has_the_examples(self, capsys):
        with pytest.raises(SystemExit):
            evaluate.main(["--help"])
        out = capsys.readouterr().out
        assert "python evaluate.py --model Q --against F --data FILE" in out
        assert "llada-8b-instruct" in out

    def test_report_and_json(self, capsys):
        assert evaluate.main(["--problems", "2", "--against", "tiny", "--device", "cpu"]) == 0
        record = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert record["tiny"]["tokens"] == [1.0, 1.0, 1.0]
        assert record["tiny"]["nelbo_difference"] == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("use", [["--table", "1", "--quick"], ["--figure", "hero"]])
def test_a_file_is_no_folder_for_tables_and_figures(use, tmp_path, capsys):
    (tmp_path / "mine").write_text("x")
    assert evaluate.main([*use, "--out", str(tmp_path / "mine")]) == 2
    assert "(Not a directory)" in capsys.readouterr().err
    assert (tmp_path / "mine").read_text() == "x"


@pytest.mark.parametrize(("arguments", "flag"), [(["--table", "2"], "--out"), (["--tasks", "piqa"], "--cache")])
def test_an_interrupted_run_says_where_its_results_are(arguments, flag, tmp_path, capsys, monkeypatch):
    def interrupted(*_):
        (tmp_path / "r").mkdir()
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate, "table" if flag == "--out" else "benchmarks", interrupted)
    assert evaluate.main([*arguments, flag, str(tmp_path / "r")]) == 130
    said = f"interrupted. What was finished is in {tmp_path / 'r'}; the same command continues.\n"
    assert capsys.readouterr().err == f"evaluate.py: {said}"
