"""Tables: how rows are pooled and compared, and that a table measures each of its cells once."""

import json
import shutil
from dataclasses import replace
from functools import partial

import pytest
import torch

import evaluate
from experiments import cells, tables
from experiments.cells import RESULTS, Run, digest, stored_cells
from experiments.rows import ABOVE, DECODING, NO_TAC, RTN, TABLES, THRESHOLDS, UNTRAINED, Row
from model import load_model
from runtime.processes import Refused
from tiny import metrics


@pytest.fixture
def results(tmp_path, monkeypatch):
    """A place for results, and one without published ones."""
    monkeypatch.setattr(cells, "RESULTS", tmp_path / "published")
    return tmp_path


def cell(nelbo, kl=None, **tasks):
    return {"nelbo": nelbo, **({} if kl is None else {"kl": kl}), **tasks}


class TestRows:
    def test_penalties_are_paired_and_pooled_over_seeds(self):
        rows = {"16-bit": [cell([1.0, 5.0]), cell([2.0, 6.0])],
                "RTN": [cell([2.0, 6.0], [1.0, 0.5]), cell([4.0, 8.0], [2.0, 0.5])],
                "better": [cell([1.5, 5.5], [0.5, 0.0]), cell([2.5, 6.5], [0.2, 0.1])]}
        base, rtn, better = tables.summarize(rows)
        assert base["nelbo"][0] == 3.5
        assert "penalty" not in base
        assert rtn["penalty"][0] == 1.5  # 1, 1, 2, 2
        assert rtn["kl"][0] == 1.0
        assert rtn["kl_by_seed"] == [0.75, 1.25]
        assert rtn["recovered"] == 0
        assert better["penalty"] == (0.5, 0.5, 0.5)
        assert better["recovered"] == pytest.approx(1 - 0.8 / 4)
        assert better["against"]["setting"] == "RTN"
        assert better["against"]["nelbo"][0] == -1.0
        assert better["against"]["kl"][0] == pytest.approx(-0.8)
        assert "against" not in rtn

    def test_mean_of_the_tasks_is_paired_with_16_bit(self):
        easy, hard = [1.0, 1.0, 0.0], [0.0, 0.0, 0.0]
        rows = {"16-bit": [cell([1.0], math=easy, code=easy, cloze=hard)],
                "RTN": [cell([1.0], [0.5], math=[1.0, 0.0, 0.0], code=easy, cloze=hard)],
                "same": [cell([1.0], [0.5], math=easy, code=easy, cloze=hard)]}
        base, rtn, same = tables.summarize(rows)
        assert "mean" not in base
        assert rtn["mean"][0] == pytest.approx(-1 / 9)
        assert same["mean"] == (0, 0, 0)  # equal example by example: no noise is left
        record = {"command": "c", "commit": "abc", "torch": "t", "device": "cpu", "seeds": 1, "problems": 3,
                  "sequences": 3, "thresholds": [], "rows": [base, rtn, same]}
        lines = tables.markdown(record).splitlines()
        assert "mean of the tasks, points from 16 bit" in lines[0]
        assert lines[2].endswith("|  |")
        assert "| -11.1 ± " in lines[3]
        assert lines[4].endswith("| +0.0 ± 0.0 |")

    def test_intervals_know_the_spread_between_seeds(self):
        """Two calibrations, each without noise of its own: no number of examples makes their mean certain."""
        rows = {"16-bit": [cell([1.0] * 50), cell([1.0] * 50)], "RTN": [cell([1.0] * 50, [2.0] * 50)] * 2,
                "a": [cell([1.0] * 50, [1.0] * 50), cell([1.0] * 50, [2.5] * 50)],
                "b": [cell([1.0] * 50, [0.9] * 50), cell([1.0] * 50, [0.4] * 50)]}
        base, _, a, b = tables.summarize(rows)
        assert a["kl"] == pytest.approx((1.75, 1.0, 2.5))
        assert base["nelbo"] == (1, 1, 1)
        assert not a["against"]["significant"]  # better on one seed, worse on the other
        assert b["against"]["significant"]
        assert b["against"]["kl"] == pytest.approx((-1.1, -2.1, -0.1))

    def test_significant_is_both_a_clear_interval_and_agreement(self):
        agree, differ = torch.tensor([[-1.0], [-2.0]]), torch.tensor([[-3.0], [0.5]])
        assert tables.significant((-1.5, -2.0, -1.0), agree)
        assert not tables.significant((-1.5, -2.0, 0.1), agree)
        assert not tables.significant((-1.2, -2.0, -1.0), differ)

    def test_recovered_is_against_rtn_of_the_same_bits(self):
        kl = {"16-bit": None, "RTN W4A4": 4.0, "other W4A4": 1.0, "RTN W3A3": 8.0, "other W3A3": 4.0}
        rows = tables.summarize({label: [cell([1.0], value and [value])] for label, value in kl.items()})
        assert [row.get("recovered") for row in rows] == [None, 0.0, 0.75, 0.0, 0.5]

    def test_a_row_may_have_another_counterpart_or_none(self):
        rows = {"16-bit": [cell([1.0, 1.0])], **{k: [cell([2.0, 2.0], [kl, kl])] for k, kl in zip("abcd", (4, 3, 2, 1),
                                                                                              strict=True)}}
        _, _, b, c, d = tables.summarize(rows, {"c": "a", "d": None})
        assert (b["against"]["setting"], b["against"]["kl"][0]) == ("a", -1.0)
        assert (c["against"]["setting"], c["against"]["kl"][0]) == ("a", -2.0)
        assert "against" not in d
        record = {"command": "c", "commit": "abc", "torch": "t", "device": "cpu", "seeds": 1, "problems": 2,
                  "sequences": 2, "thresholds": [], "rows": [b, c, d]}
        lines = tables.markdown(record).splitlines()
        assert "(-2000.0 to -2000.0) * a |" in lines[3]

    def test_markdown_has_a_cell_for_every_heading(self):
        ones = [1.0, 0.0]
        rows = tables.summarize({"16-bit": [cell([1.0, 2.0], math=ones)],
                                 "RTN": [cell([2.0, 2.0], [0.5, 1.0], math=[0.0, 0.0], tokens=[0.5, 0.5])]})
        record = {"command": "c", "commit": "abc", "torch": "t", "device": "cpu", "seeds": 1, "problems": 2,
                  "sequences": 2, "thresholds": [], "rows": rows}
        lines = tables.markdown(record).splitlines()
        assert {line.count("|") for line in lines[:4]} == {8}
        assert "| 750.0 ± 250.0 |  | 0.0 | 500.0 ± 500.0 |" in lines[3]
        assert lines[2].startswith("| 16-bit |  |  |  |  | 50.0 ± 50.0 |")


class TestParallel:
    def values(self, right, passes):
        return {f"{task}{what} at 0.9": torch.tensor([v], dtype=torch.float64)
                for task in metrics.GENERATION for what, v in (("", right), ("_passes", passes))}

    def test_right_answers_per_pass_are_a_share_of_16_bit(self):
        base, slow = self.values([1.0, 1.0], [2.0, 2.0]), self.values([1.0, 0.0], [4.0, 4.0])
        found = tables.in_parallel(slow, base)
        assert found["accuracy at 0.9"][0] == 0.5
        assert found["passes at 0.9"] == (4, 4, 4)
        assert found["per pass at 0.9"][0] == 0.25  # half of the answers in twice the passes
        assert tables.in_parallel(base, base)["per pass at 0.9"] == (1, 1, 1)

    def test_passes_are_cells_of_their_own_and_a_curve(self, results, monkeypatch):
        monkeypatch.setitem(TABLES, "passes", [Row("RTN", RTN, None)])
        monkeypatch.setitem(THRESHOLDS, "passes", (0.5, 1.1))
        run = Run("tiny", 1.0, 2, False, "cpu", segments=8)
        record = tables.make("passes", run, 1, out=results)
        assert [r["passes at 1.1"] for r in record["rows"]] == [(24, 24, 24)] * 2
        assert record["rows"][1]["passes at 0.5"][0] < 24
        curves = json.loads((results / "passes.json").read_text())
        assert curves["threshold"] == [0.5]
        assert curves["methods"]["RTN"]["passes"] == [record["rows"][1]["passes at 0.5"][0]]
        stored = [json.loads(line) for line in (results / "cells.jsonl").read_text().splitlines()]
        assert [c["threshold"] for c in stored] == [0.5, 1.1] * 2
        assert all("nelbo" not in c for c in stored)
        text = (results / "table-passes-1x2.md").read_text()
        assert text.splitlines()[2].endswith("| 100.0 ± 0.0 |")
        with pytest.raises(Refused, match="no likelihoods"):
            tables.make("passes", replace(run, nelbo=True), 1, out=results)


class TestMake:
    def test_a_cell_is_measured_once_and_a_cut_line_again(self, results, monkeypatch):
        monkeypatch.setitem(TABLES, "3", [Row("RTN", RTN), Row("start", UNTRAINED | NO_TAC)])
        run = Run("tiny", 1.0, 2, True, "cpu", segments=8)
        make = partial(tables.make, "3", run, 1, out=results)
        first = make()
        assert [r["setting"] for r in first["rows"]] == ["16-bit", "RTN", "start"]
        assert first["rows"][1]["kl"][0] > 0
        assert (results / "table-3-nelbo-1x2.md").read_text().startswith("| setting |")
        lines = (results / "cells.jsonl").read_text().splitlines()
        assert len(lines) == 3
        # the same values as measured directly
        want = metrics.scores(load_model("tiny", "cpu"), 2, tables.FIRST_SEED, quick=True)[0]["nelbo"]
        assert json.loads(lines[0])["values"]["nelbo"] == [round(v, 5) for v in want.tolist()]

        monkeypatch.setattr(Run, "measure", lambda *_: pytest.fail("measured again"))
        assert make()["rows"] == first["rows"]
        monkeypatch.setattr(Run, "measure", lambda *_: {"nelbo": [1.0, 2.0], "kl": [0.25, 0.75]})
        again = make(fresh=True)
        assert again["rows"][1]["kl"][0] == 0.5
        assert make()["rows"] == again["rows"]  # of two lines of one key the later counts
        spoilt = "\n".join([*lines[:2], "[]", "3", "{}", lines[2][:50]])
        (results / "cells.jsonl").write_bytes(spoilt.encode() + b"\xff")
        assert len(stored_cells(results / "nowhere", results / "cells.jsonl")) == 2

    def test_published_tables_come_from_published_cells(self):
        """Every cell of every published table is stored under the key that its command asks for."""
        stored = stored_cells(RESULTS / "cells.jsonl")
        files = list(RESULTS.glob("table-*.json"))
        assert len(files) == 13
        for file in files:
            record = json.loads(file.read_text())
            nelbo = "-nelbo" in file.name
            run = Run("tiny", record["stress"], record["problems"], nelbo, "cpu", sequences=record["sequences"])
            (number,) = [n for n in TABLES if tables.file_name(n, run, record["seeds"], False) == file.stem]
            assert [r["setting"] for r in record["rows"]] == ["16-bit", *(row.label for row in TABLES[number])]
            for above, row, made in zip([None, *TABLES[number]], TABLES[number], record["rows"][1:], strict=False):
                compared = row.against if row.against != ABOVE else above and above.label
                assert (made.get("against") or {}).get("setting") == compared
            kinds = [None] * (number not in DECODING) + record["thresholds"]
            for setting in (None, *(row.setting for row in TABLES[number])):
                for key in (run.key(setting, 10 + i, kind) for i in range(record["seeds"]) for kind in kinds):
                    assert {digest(key), digest(key | {"nelbo": False})} & stored.keys(), (file, key)

    def test_a_published_table_is_made_again_without_a_measurement_and_is_not_touched(self, monkeypatch, tmp_path):
        before = {f: (f.stat().st_mtime_ns, f.stat().st_size) for f in RESULTS.iterdir()}
        monkeypatch.setattr(Run, "measure", lambda *_: pytest.fail("measured again"))
        monkeypatch.chdir(tmp_path)
        published = json.loads((RESULTS / "table-5-nelbo.json").read_text())
        assert evaluate.main([*published["command"].split()[2:], "--device", "cpu"]) == 0
        made = sorted((tmp_path / "out" / "tables").iterdir())
        assert [f.name for f in made] == ["table-5-nelbo.json", "table-5-nelbo.md"]
        assert all(f.read_bytes() == (RESULTS / f.name).read_bytes() for f in made)
        assert before == {f: (f.stat().st_mtime_ns, f.stat().st_size) for f in RESULTS.iterdir()}

    def test_file_names_tell_model_and_size(self):
        name = tables.file_name
        run = Run("tiny", 1.0, tables.PROBLEMS, False, "cpu", sequences=tables.SEQUENCES)
        assert name("1", run, tables.SEEDS, False) == "table-1"
        assert name("1", replace(run, name="some/folder", c=4.0), 3, False) == "table-1-folder-stress4"
        assert name("1", replace(run, problems=100, nelbo=True), 3, False) == "table-1-nelbo"
        assert name("1", replace(run, problems=16, sequences=16, nelbo=True), 1, True) == "table-1-quick-1x16"
        assert name("1", run, 2, False) == "table-1-2x250x100"

    def test_a_model_without_a_tokenizer_is_refused_before_anything_is_written(self, small_folder, tmp_path):
        folder = shutil.copytree(small_folder, tmp_path / "model")
        (folder / "tokenizer.json").unlink()
        with pytest.raises(Refused, match=r"has no tokenizer\.json"):
            tables.make("3", Run(str(folder), 1.0, 2, True, "cpu"), 1, out=tmp_path / "out")
        assert not (tmp_path / "out").exists()
