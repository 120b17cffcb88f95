"""Tables: what a cell is, that it is measured once, and how rows are pooled and compared."""

import json
import shutil
from dataclasses import replace
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file

import evaluate
from checkpoint.folder import write_json
from experiments import tables
from model import load_model
from runtime.layers import Grid, QuantLinear, Weight
from runtime.processes import Refused
from tiny import metrics


@pytest.fixture
def results(tmp_path, monkeypatch):
    """A place for results, and one without published ones."""
    monkeypatch.setattr(tables, "RESULTS", tmp_path / "published")
    return tmp_path


def cell(nelbo, kl=None, **tasks):
    return {"values": {"nelbo": nelbo, **({} if kl is None else {"kl": kl}), **tasks}}


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

    def test_every_counterpart_comes_before_its_row(self):
        for rows in tables.TABLES.values():
            labels = [row.label for row in rows]
            assert len(set(labels)) == len(labels)
            for i, row in enumerate(rows):
                assert row.against in (tables.ABOVE, None, *labels[:i])

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
        monkeypatch.setitem(tables.TABLES, "passes", [tables.Row("RTN", tables.RTN, None)])
        monkeypatch.setitem(tables.THRESHOLDS, "passes", (0.5, 1.1))
        run = tables.Run("tiny", 1.0, 2, False, "cpu", segments=8)
        record = tables.make("passes", run, 1, out=results)
        assert [r["passes at 1.1"] for r in record["rows"]] == [(24, 24, 24)] * 2
        assert record["rows"][1]["passes at 0.5"][0] < 24
        curves = json.loads((results / "passes.json").read_text())
        assert curves["threshold"] == [0.5]
        assert curves["methods"]["RTN"]["passes"] == [record["rows"][1]["passes at 0.5"][0]]
        cells = [json.loads(line) for line in (results / "cells.jsonl").read_text().splitlines()]
        assert [c["threshold"] for c in cells] == [0.5, 1.1] * 2
        assert all("nelbo" not in c for c in cells)
        text = (results / "table-passes-1x2.md").read_text()
        assert text.splitlines()[2].endswith("| 100.0 ± 0.0 |")
        with pytest.raises(Refused, match="no likelihoods"):
            tables.make("passes", replace(run, nelbo=True), 1, out=results)

    def test_calibration_text_is_what_the_row_says(self):
        run = tables.Run("tiny", 1.0, 2, True, "cpu", segments=8)
        ids, region = run.calibration_set({"text": "random", "segments": 5}, 1)
        assert ids.shape == region.shape == (5, 64)
        assert region.all()
        assert int(ids.max()) < run.model().mask_id
        english, _ = run.calibration_set({"text": "english"}, 1)
        own, region = run.calibration_set({}, 1)
        assert english.shape == own.shape == (8, 64)
        assert not region.all()  # prompts are not masked


class TestSettings:
    @pytest.mark.parametrize("number", tables.TABLES)
    def test_every_setting_is_valid_and_differs_from_the_others(self, number):
        settings = [row.setting for row in tables.TABLES[number]]
        configs = [str(tables.config_of(s, 10)) + str([s.get(k) for k in tables.EXTRA]) for s in settings]
        assert len(set(configs)) == len(configs) >= 2

    def test_gates_off_is_all_of_the_same_basis(self):
        codes = torch.ones(4, 8, dtype=torch.int8)
        layer = QuantLinear(weight=Weight(codes, torch.ones(4)), grid=Grid(), P=[torch.eye(8)], d_m=2, d_u=2)
        model = torch.nn.Sequential(layer)
        x, state = torch.ones(3, 8), torch.tensor([True, False, True])
        assert float(layer(x, state).amax()) == pytest.approx(6)
        tables.switch_gates_off(model)
        assert float(layer(x, state).amin()) == pytest.approx(8)


class TestCells:
    def test_a_cell_is_measured_once_and_a_cut_line_again(self, results, monkeypatch):
        monkeypatch.setitem(tables.TABLES, "3", [tables.Row("RTN", tables.RTN),
                                                 tables.Row("start", tables.UNTRAINED | tables.NO_TAC)])
        run = tables.Run("tiny", 1.0, 2, True, "cpu", segments=8)
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

        monkeypatch.setattr(tables.Run, "measure", lambda *_: pytest.fail("measured again"))
        assert make()["rows"] == first["rows"]
        monkeypatch.setattr(tables.Run, "measure", lambda *_: {"nelbo": [1.0, 2.0], "kl": [0.25, 0.75]})
        again = make(fresh=True)
        assert again["rows"][1]["kl"][0] == 0.5
        assert make()["rows"] == again["rows"]  # of two lines of one key the later counts
        (results / "cells.jsonl").write_text("\n".join(lines[:2]) + "\n" + lines[2][:50])
        assert len(tables.stored_cells(results / "nowhere", results / "cells.jsonl")) == 2

    def test_published_tables_come_from_published_cells(self):
        """Every cell of every published table is stored under the key that its command asks for."""
        cells = tables.stored_cells(tables.RESULTS / "cells.jsonl")
        files = list(tables.RESULTS.glob("table-*.json"))
        assert len(files) == 12
        for file in files:
            record = json.loads(file.read_text())
            nelbo = "-nelbo" in file.name
            run = tables.Run("tiny", record["stress"], record["problems"], nelbo, "cpu",
                             sequences=record.get("sequences", record["problems"]))
            (number,) = [n for n in tables.TABLES if tables.file_name(n, run, record["seeds"], False) == file.stem]
            assert [r["setting"] for r in record["rows"]] == ["16-bit", *(row.label for row in tables.TABLES[number])]
            kinds = [None] * (number not in tables.DECODING) + record.get("thresholds", [])
            for setting in (None, *(row.setting for row in tables.TABLES[number])):
                for key in (run.key(setting, 10 + i, kind) for i in range(record["seeds"]) for kind in kinds):
                    assert {tables.digest(key), tables.digest(key | {"nelbo": False})} & cells.keys(), (file, key)

    def test_a_published_table_is_made_again_without_a_measurement_and_is_not_touched(self, monkeypatch, tmp_path):
        before = {f: (f.stat().st_mtime_ns, f.stat().st_size) for f in tables.RESULTS.iterdir()}
        monkeypatch.setattr(tables.Run, "measure", lambda *_: pytest.fail("measured again"))
        monkeypatch.chdir(tmp_path)
        published = json.loads((tables.RESULTS / "table-5-nelbo.json").read_text())
        assert evaluate.main([*published["command"].split()[2:], "--device", "cpu"]) == 0
        again = json.loads((tmp_path / "out" / "tables" / "table-5-nelbo.json").read_text())
        assert {k: again[k] for k in published} == published
        assert [f.name for f in sorted((tmp_path / "out" / "tables").iterdir())] == ["table-5-nelbo.json",
                                                                                     "table-5-nelbo.md"]
        assert before == {f: (f.stat().st_mtime_ns, f.stat().st_size) for f in tables.RESULTS.iterdir()}

    def test_file_names_tell_model_and_size(self):
        name = tables.file_name
        run = tables.Run("tiny", 1.0, tables.PROBLEMS, False, "cpu", sequences=tables.SEQUENCES)
        assert name("1", run, tables.SEEDS, False) == "table-1"
        assert name("1", replace(run, name="some/folder", c=4.0), 3, False) == "table-1-folder-stress4"
        assert name("1", replace(run, problems=100, nelbo=True), 3, False) == "table-1-nelbo"
        assert name("1", replace(run, problems=16, sequences=16, nelbo=True), 1, True) == "table-1-quick-1x16"
        assert name("1", run, 2, False) == "table-1-2x250x100"

    @pytest.mark.parametrize("spoil", ["tokenizer.json", "sharded"])
    def test_models_that_a_table_refuses_or_takes(self, spoil, small_folder, tmp_path):
        folder = shutil.copytree(small_folder, tmp_path / "model")
        run = tables.Run(str(folder), 1.0, 2, True, "cpu")
        if spoil == "tokenizer.json":
            (folder / "tokenizer.json").unlink()
            with pytest.raises(Refused, match=r"has no tokenizer\.json"):
                tables.make("3", run, 1, out=tmp_path / "out")
            assert not (tmp_path / "out").exists()
            return
        tensors, key = load_file(folder / "model.safetensors"), run.key({}, 1)
        tables.weights_digest.cache_clear()
        for i, name in enumerate(tensors):
            save_file({name: tensors[name]}, folder / f"model-{i:05d}-of-{len(tensors) - 1:05d}.safetensors")
        write_json(folder / "model.safetensors.index.json", {"weight_map": {
            name: f"model-{i:05d}-of-{len(tensors) - 1:05d}.safetensors" for i, name in enumerate(tensors)}})
        (folder / "model.safetensors").unlink()
        run.check()
        assert run.key({}, 1)["weights"] != key["weights"]

    def test_sequences_and_problems_are_counted_apart(self):
        run = tables.Run("tiny", 1.0, 1, False, "cpu", segments=8, sequences=2)
        values = run.measure(tables.RTN, tables.FIRST_SEED)
        assert [len(values[k]) for k in ("nelbo", "kl", "math", "code", "cloze")] == [6, 6, 1, 1, 1]
        # the same sequences as with two problems
        more = metrics.scores(run.model(), 2, tables.FIRST_SEED, quick=True)[0]["nelbo"]
        torch.testing.assert_close(run.reference(tables.FIRST_SEED)[0]["nelbo"], more, rtol=1e-4, atol=1e-5)
        assert run.key({}, 1) != tables.Run("tiny", 1.0, 1, False, "cpu", segments=8).key({}, 1)

    def test_what_determines_a_cell_is_in_its_key(self):
        run = tables.Run("tiny", 1.0, 2, True, "cpu")
        keys = {tables.digest(run.key(s, seed)) for s in ({}, tables.NO_TAC, {"gates": "off"}, None) for seed in (1, 2)}
        others = (tables.Run("tiny", 8.0, 2, True, "cpu"), tables.Run("tiny", 1.0, 3, True, "cpu"),
                  tables.Run("tiny", 1.0, 2, False, "cpu"), tables.Run("tiny", 1.0, 2, True, "cpu", segments=32),
                  tables.Run("tiny", 1.0, 2, True, "cpu", sequences=3), tables.Run("tiny", 1.0, 2, True, "cuda:1"))
        assert len(keys | {tables.digest(r.key({}, 1)) for r in others}) == 14
        assert others[-1].key({}, 1) == tables.Run("tiny", 1.0, 2, True, "cuda").key({}, 1)
        assert run.key({"tac_block": 16}, 1) == run.key({}, 1)  # a default, written out
