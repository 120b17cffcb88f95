"""The command end to end on a small random model: files, resume, refusals, and the same result as the function."""

import inspect
import json
import shutil
import weakref

import pytest
import torch
from arguments import fast, ids, quick

import calibrate
import methods
from calibrate import QuantConfig, masked_copies, quantize_model
from calibration import preflight, segments
from checkpoint import folder as folder_module
from checkpoint.families import FUSED, read_config
from checkpoint.folder import INDEX, Checkpoint, sha256
from methods import rtn
from model import DiffusionLM, load_model
from runtime.layers import TAC, QuantLinear
from runtime.processes import Refused
from starquant import state_gate
from tiny import tasks


def command(model, out, *more):
    return calibrate.main(["--model", str(model), "--out", str(out), "--segments", "9", "--length", "40", *fast(*more)])


@pytest.fixture(scope="module")
def quantized_folder(small_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "quantized"
    assert command(small_folder, out) == 0
    return out


class TestResult:
    def test_every_linear_of_every_block_is_quantized_and_tac_is_in_place(self, quantized_folder):
        model = load_model(quantized_folder, "cpu")
        for block in model.blocks:
            assert all(isinstance(getattr(block, name), QuantLinear) for name in FUSED)
            assert isinstance(block.tac, TAC)
            assert (block.qkv.d_m, block.qkv.d_u, block.down.d_m) == (2, 2, 3)

    def test_function_gives_the_same_model_as_the_command(self, small_folder, quantized_folder):
        full = load_model(small_folder, "cpu")
        tokens, region = tasks.calibration_set(full.tokenizer, 9, 40, 0)
        mine = quantize_model(full, tokens, QuantConfig(epochs=1), region)
        assert torch.equal(mine(ids()), load_model(quantized_folder, "cpu")(ids()))

    def test_the_same_for_starquant_plus(self, small_folder, tmp_path):
        assert command(small_folder, tmp_path / "q", "--method", "starquant+", "--set", "tac=ridge") == 0
        full = load_model(small_folder, "cpu")
        tokens, region = tasks.calibration_set(full.tokenizer, 9, 40, 0)
        mine = quantize_model(full, tokens, QuantConfig(method="starquant+", tac="ridge"), region)
        assert torch.equal(mine(ids()), load_model(tmp_path / "q", "cpu")(ids()))

    def test_the_16_bit_model_is_left_alone(self, small_folder):
        full = load_model(small_folder, "cpu")
        before = full(ids())
        quantized = quantize_model(full, ids(8, 24, 1).clamp(max=900), QuantConfig(epochs=0))
        assert torch.equal(full(ids()), before)
        assert not torch.equal(quantized(ids()), before)
        assert quantized.embed.weight.data_ptr() == full.embed.weight.data_ptr()  # nothing is copied before one moves
        quantized.to(torch.bfloat16)
        assert quantized(ids()).dtype == torch.bfloat16
        assert torch.equal(full(ids()), before)

    def test_progress_is_told_after_each_block(self, small_folder):
        calls = []
        quantize_model(load_model(small_folder, "cpu"), ids(8, 24).clamp(max=900), quick(),
                       progress=lambda *told: calls.append(told))
        assert [(block, blocks) for block, blocks, _ in calls] == [(1, 2), (2, 2)]
        assert all(0 < error < 1 for *_, error in calls)

    @pytest.mark.parametrize(("settings", "words"), [
        ({"method": "rtn"}, ("rtn, W4A4, embedding in 16 bits, head in 16", "P: none, no gates")),
        ({"method": "starquant+", "kv_bits": 4, "head_bits": 8, "embed_bits": 4}, (
            "W4A4, embedding in 4 bits, head in 8", "P: Blocks · Across", "K and V in 4 bits, softmax in 16")),
        ({"epochs": 0, "abits": 8}, ("starquant, W4A8", "QuantLinear(64 -> 192, W4A8, P: Kronecker, gates for 2 masked",
                                     "tac: TAC(4 blocks of 16 channels)"))])
    def test_it_prints_as_a_few_lines(self, settings, words, small_folder):
        full = load_model(small_folder, "cpu")
        sizes = "DiffusionLM of family llada: 2 blocks, width 64, 0.20 M parameters, "
        assert str(full) == sizes + "0.40 MB in 16 bit"
        shown = str(quantize_model(full, ids(8, 24).clamp(max=900), QuantConfig(**settings)))
        assert shown.startswith(sizes)
        assert all(word in shown for word in words), shown
        assert len(shown.splitlines()) <= 8

    def test_same_seed_gives_the_same_bytes_and_another_seed_does_not(self, small_folder, quantized_folder, tmp_path):
        assert command(small_folder, tmp_path / "same") == 0
        assert command(small_folder, tmp_path / "other", "--seed", "1") == 0
        shards = sorted(set(json.loads((quantized_folder / INDEX).read_text())["weight_map"].values()))
        assert len(shards) == 3
        same = [sha256(quantized_folder / s) == sha256(tmp_path / "same" / s) for s in shards]
        other = [sha256(quantized_folder / s) == sha256(tmp_path / "other" / s) for s in shards]
        assert all(same)
        assert other == [False, False, True]  # what stays in 16 bit does not depend on the seed

    def test_linears_take_at_most_053_bytes_a_weight_at_the_embedded_model_s_width(self):
        layer = QuantLinear.fold(torch.randn(576, 192))
        stored = sum(v.numel() * v.element_size() for v in layer.state_dict().values())
        assert stored <= 0.53 * 576 * 192

    def test_16_bit_parts_are_the_source_s_bit_by_bit(self, small_folder, quantized_folder):
        source, out = Checkpoint(small_folder), Checkpoint(quantized_folder)
        outer = ("model.transformer.wte", "model.transformer.ff", "model.transformer.ln_f")
        kept = [n for n in source.shapes if "norm" in n or n.startswith(outer)]
        assert len(kept) == 7
        assert all(torch.equal(source.get(n), out.get(n)) for n in kept)

    def test_blocks_of_two_types_are_not_mixed(self, small_folder, tmp_path, capsys):
        assert command(small_folder, tmp_path / "q", "--method", "rtn", "--dtype", "bf16") == 0
        assert command(small_folder, tmp_path / "q", "--method", "rtn", "--dtype", "bf16", "--resume") == 0
        assert command(small_folder, tmp_path / "q", "--method", "rtn", "--dtype", "fp32", "--resume") == 2
        assert "dtype was 'bfloat16' and is 'float32' now;" in capsys.readouterr().err

    def test_folder_describes_itself(self, quantized_folder):
        config = json.loads((quantized_folder / "config.json").read_text())["quantization_config"]
        assert (config["weight_bits"], config["activation_bits"], config["method"]) == (4, 4, "starquant")
        state = json.loads((quantized_folder / "starquant.json").read_text())
        assert state["complete"]
        assert [b["block"] for b in state["blocks"]] == [0, 1]
        assert all(0 < b["linears"][n]["error"] < 1 for b in state["blocks"] for n in FUSED)
        assert (quantized_folder / "README.md").exists()
        assert (quantized_folder / "tokenizer.json").exists()

    @pytest.mark.parametrize("name", sorted(calibrate.METHODS))
    def test_every_method_gives_a_folder_that_loads(self, name, small_folder, tmp_path):
        assert command(small_folder, tmp_path / "q", "--method", name) == 0
        model = load_model(tmp_path / "q", "cpu")
        assert torch.isfinite(model(ids())).all()
        assert all(isinstance(getattr(b, n), QuantLinear) for b in model.blocks for n in FUSED)

    def test_eight_bits_are_closer_than_four(self, small_folder):
        full = load_model(small_folder, "cpu")
        tokens = ids(8, 24, 1).clamp(max=900)
        error = {bits: (quantize_model(full, tokens, QuantConfig(method="rtn", wbits=bits, abits=bits))(ids())
                        - full(ids())).norm() for bits in (8, 4, 3)}
        assert error[8] < 0.2 * error[4]
        assert error[4] < error[3]

    def test_gates_follow_the_token_state_inside_the_model(self, quantized_folder):
        layer = load_model(quantized_folder, "cpu").blocks[0].qkv
        x, state = torch.randn(1, 2, 64), torch.tensor([[True, False]])
        kept = layer.phi(x, state) != 0
        assert torch.equal(kept, state_gate(state, 64, 2, 2).bool())


class TestSettings:
    """Settings belong to methods: what a run records, takes and shows is the method's own."""

    def test_the_command_and_the_function_default_to_the_paper_s_method(self):
        assert calibrate.config_from(calibrate.parse([])) == (config := QuantConfig()) == QuantConfig("starquant")
        paper = {"lr": 1e-3, "epochs": 15, "state_fraction": 32, "tac_block": 16, "damping": 3e-4, "tac_samples": 64,
                 "smoothing": 0.15, "shrinkage": 0.55}  # Section 5.1 and Appendices B and C
        assert {name: getattr(config, name) for name in paper} == paper
        assert inspect.signature(quantize_model).parameters["config"].default == QuantConfig()

    @pytest.mark.parametrize(("method", "foreign"), [
        ("starquant+", ("transform", "allocation", "epochs", "state_fraction", "smoothing", "weights")),
        ("rtn", ("transform", "epochs", "tac", "balance", "tac_samples")),
        ("starquant", ("balance", "exponent", "gain"))])
    def test_artefacts_name_only_what_the_method_uses(self, method, foreign, small_folder, tmp_path, capsys):
        assert command(small_folder, tmp_path / "q", "--method", method) == 0
        said = json.loads(capsys.readouterr().out.splitlines()[-1])
        written = json.loads((tmp_path / "q" / "starquant.json").read_text())["run"]["config"]
        assert not set(foreign) & (said.keys() | written.keys())
        assert written.keys() == methods.settings_of(method).keys()
        assert written.items() <= said.items()
        assert QuantConfig(**written) == calibrate.config_from(calibrate.parse(fast("--method", method)))

    def test_both_ends_of_a_range_are_taken_and_nothing_beyond(self):
        ends = {"wbits": (2, 8), "abits": (2, 8), "kv_bits": (2, 16), "softmax_bits": (2, 16), "seed": (0, 2**31),
                "smoothing": (0, 1), "shrinkage": (0, 1), "tac_samples": (1, 10**6)}
        for name, (low, high) in ends.items():
            assert [getattr(QuantConfig(**{name: end}), name) for end in (low, high)] == [low, high]
            for beyond in (low - 1, high + 1):
                with pytest.raises(Refused, match=f"{name} {beyond} is not between {low} and {high}"):
                    QuantConfig(**{name: beyond})

    def test_another_method_s_setting_is_refused_and_an_unknown_one_too(self):
        with pytest.raises(Refused, match=r"^transform is for starquant, not for rtn\.$"):
            QuantConfig("rtn", transform="dense")
        with pytest.raises(Refused, match=r"^colour is no setting of rtn"):
            QuantConfig("rtn", colour="red")

    def test_help_lists_settings_with_their_methods(self, capsys):
        with pytest.raises(SystemExit):
            calibrate.parse(["--help"])
        lines = capsys.readouterr().out.splitlines()
        heading = {name: "" for method in methods.METHODS for name in methods.settings_of(method)}
        above = ""
        for line in lines[lines.index("settings of --set NAME=VALUE, by the methods that have them:") + 1 :]:
            above = line.strip() if not line.startswith("    ") else above
            heading[line.split("=")[0].strip()] = above
        assert heading["transform"] == "starquant"
        assert heading["epochs"] == "starquant, flatquant, freeact"
        assert heading["kv_bits"] == "every method"

    def test_a_tied_model_has_no_bits_of_its_own_for_the_embedding(self, small_folder, tmp_path, capsys):
        raw = json.loads((small_folder / "config.json").read_text()) | {"weight_tying": True}
        model = DiffusionLM(read_config(raw))
        model.save(tmp_path / "m", torch.bfloat16)
        for name in ("tokenizer.json", "training.json"):
            shutil.copy(small_folder / name, tmp_path / "m")
        bits = ("--set", "head_bits=8", "--set", "embed_bits=4")
        assert command(tmp_path / "m", tmp_path / "q", "--method", "rtn", *bits) == 2
        assert "embed_bits is for models with a head of their own" in capsys.readouterr().err
        assert not (tmp_path / "q").exists()
        with pytest.raises(Refused, match="embed_bits is for models with a head of their own"):
            quantize_model(model, ids().clamp(max=900), QuantConfig("rtn", head_bits=8, embed_bits=4))

    def test_the_plan_of_a_stressed_run_is_what_is_written(self, small_folder, tmp_path, capsys):
        """The stressed model is written in fp32, so that what stays in 16 bit is twice as large as in the source."""
        arguments = (small_folder, tmp_path / "q", "--method", "rtn", "--stress", "4")
        assert command(*arguments, "--dry-run") == 0
        plan = json.loads(capsys.readouterr().out.splitlines()[-1])["plan"]
        assert command(*arguments) == 0
        size = json.loads((tmp_path / "q" / INDEX).read_text())["metadata"]["total_size"]
        assert size == sum(plan["blocks"]) + plan["outer"]
        written = sum(p.stat().st_size for p in tmp_path.rglob("*") if p.is_file())
        assert 0.9 * plan["disk"] < written + 4 * preflight.HEADER
        assert written <= plan["disk"]


class Stop:
    """Raise KeyboardInterrupt when the n-th linear is fitted."""

    def __init__(self, n):
        self.left = n

    def __call__(self, *args):
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return rtn.fit_rtn(*args)


class TestResume:
    @pytest.mark.parametrize(("stop", "left"), [
        (0, "No block was finished; begin again with the same command and --resume."),
        (5, "Finished blocks are in {}; continue with the same command and --resume."),
        (7, "Finished blocks are in {}; continue with the same command and --resume.")])
    def test_interrupted_run_continues_to_the_same_bytes(self, stop, left, small_folder, tmp_path, monkeypatch, capsys):
        assert command(small_folder, tmp_path / "whole", "--method", "rtn") == 0
        monkeypatch.setitem(calibrate.METHODS, "rtn", calibrate.METHODS["rtn"]._replace(fit=Stop(stop)))
        assert command(small_folder, tmp_path / "cut", "--method", "rtn") == 130
        said = left.format(tmp_path / "cut")
        assert capsys.readouterr().err.splitlines()[-1] == f"calibrate.py: interrupted. {said}"
        finished = len(list((tmp_path / "cut").glob("model-*")))
        assert finished == stop // 4
        monkeypatch.undo()
        assert command(small_folder, tmp_path / "cut", "--method", "rtn", "--resume") == 0
        assert "block 2/2: 100%" in capsys.readouterr().err
        for shard in (tmp_path / "whole").glob("model-*"):
            assert sha256(shard) == sha256(tmp_path / "cut" / shard.name)

    def test_what_an_interruption_leaves_before_and_after_the_blocks(self, small_folder, quantized_folder, tmp_path,
                                                                      monkeypatch, capsys):
        def interrupted(*_):
            raise KeyboardInterrupt

        def left(out, *more):
            assert command(small_folder, out, "--method", "rtn", *more) == 130
            return capsys.readouterr().err.splitlines()[-1].removeprefix("calibrate.py: interrupted. ")

        with monkeypatch.context() as patch:
            patch.setattr(preflight, "check", interrupted)
            assert left(tmp_path / "q") == f"This run wrote nothing to {tmp_path / 'q'}."
            assert left(quantized_folder, "--overwrite") == f"This run wrote nothing to {quantized_folder}."
        with monkeypatch.context() as patch:
            patch.setattr(calibrate.closing, "table_of_tasks", interrupted)
            assert left(tmp_path / "q", "--problems", "1") == f"The model in {tmp_path / 'q'} is complete."
        monkeypatch.setitem(calibrate.METHODS, "rtn", calibrate.METHODS["rtn"]._replace(fit=interrupted))
        assert left(tmp_path / "q", "--overwrite") == ("No block was finished; begin again with the same command and "
                                                       "--resume instead of --overwrite.")

    def test_no_half_written_file_stands_under_a_final_name(self, small_folder, tmp_path, monkeypatch, capsys):

        def full_disk(tensors, path, metadata):
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(folder_module, "save_file", full_disk)
        assert command(small_folder, tmp_path / "q", "--method", "rtn") == 2
        assert not list((tmp_path / "q").glob("*.safetensors"))
        assert not list((tmp_path / "q").glob(".*tmp"))
        said = f"No space left on device: {tmp_path / 'q' / 'model-00001-of-00003.safetensors'}. No block was finished"
        assert said in capsys.readouterr().err


class TestCalibrationText:
    def test_jsonl_with_winogrande_sentences(self, tmp_path):
        rows = [{"sentence": "The trophy beat the _ .", "option1": "case", "option2": "bag", "answer": "2"},
                {"text": "plain"}]
        (tmp_path / "w.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
        assert segments.read_texts(tmp_path / "w.jsonl") == ["The trophy beat the bag .", "plain"]

    def test_text_file_calibrates(self, small_folder, tmp_path):
        (tmp_path / "t.txt").write_text("It was the best of times, it was the worst of times. " * 30)
        assert command(small_folder, tmp_path / "q", "--method", "rtn", "--data", str(tmp_path / "t.txt")) == 0


def test_embedding_and_head_are_freed_before_a_block_is_fitted(small_folder, tmp_path, monkeypatch):
    """They take gigabytes of an 8B model."""
    load, fit, loaded, freed = calibrate.load_outer, calibrate.quantize_block, [], []

    def load_and_watch(*args, **options):
        outer = load(*args, **options)
        loaded.append(weakref.ref(outer))
        return outer

    def fit_and_see(*args, **options):
        freed.append(loaded[0]() is None)
        return fit(*args, **options)

    monkeypatch.setattr(calibrate, "load_outer", load_and_watch)
    monkeypatch.setattr(calibrate, "quantize_block", fit_and_see)
    assert command(small_folder, tmp_path / "q", "--method", "rtn") == 0
    assert freed == [True, True]


@pytest.mark.parametrize("setting", [{"method": "rtn"}, {}, {"transform": "none"}, {"method": "flatquant"},
                                     {"method": "starquant+"}])
def test_progress_comes_to_its_end(small_folder, setting):
    model, calls, config = load_model(small_folder, "cpu"), [], quick(**setting, epochs=2)
    noisy = masked_copies(ids(8, 24), None, model.mask_id, config)
    list(calibrate.calibrate_blocks(model, lambda: model.blocks, noisy, config, progress=calls.append))
    assert len(calls) == len(model.blocks) * calibrate.progress_steps(config)


class TestSpill:
    def test_gives_the_same_folder_byte_by_byte_and_leaves_nothing(self, small_folder, quantized_folder, tmp_path):
        room = tmp_path / "room"
        room.mkdir()
        assert command(small_folder, tmp_path / "q", "--spill", str(room)) == 0
        for shard in sorted(quantized_folder.glob("*.safetensors")):
            assert sha256(shard) == sha256(tmp_path / "q" / shard.name)
        assert list(room.iterdir()) == []

    def test_a_folder_that_is_none_or_too_small_is_named(self, small_folder, tmp_path, monkeypatch, capsys):
        assert command(small_folder, tmp_path / "q", "--spill", str(tmp_path / "none")) == 2
        assert f"--spill {tmp_path / 'none'} is no folder; make it first" in capsys.readouterr().err
        monkeypatch.setattr(preflight, "spilled_bytes", lambda *_: 10**17)
        assert command(small_folder, tmp_path / "q", "--spill", str(tmp_path)) == 2
        assert "lower --segments or --length or choose another folder" in capsys.readouterr().err
        assert not (tmp_path / "q").exists()


@pytest.mark.parametrize(("values", "sentence"), [
    ({"epoch": 1}, "epoch is no setting of starquant, which has method, wbits"),
    ({"balance": "dense"}, "balance is for starquant"), ({"wbits": 9}, "wbits 9 is not between 2 and 8")])
def test_a_setting_that_is_not_there_is_named(values, sentence):
    with pytest.raises(Refused, match=sentence):
        QuantConfig("starquant", **values)


@pytest.mark.parametrize(("tokens", "sentence"), [
    ([[1, 2]], "one row a segment"), (torch.ones(2, 3), "one row a segment"),
    (torch.ones(3).long(), "one row a segment"), (torch.ones(2, 3).bool(), "one row a segment"),
    (torch.ones(0, 3).long(), "at least one id"),
    (torch.full((2, 3), -1), "between 0 and"), (torch.full((2, 3), 10**6), "between 0 and")])
def test_what_are_no_segments_is_refused(tokens, sentence, small_folder):
    with pytest.raises(Refused, match=sentence):
        quantize_model(load_model(small_folder, "cpu"), tokens, QuantConfig("rtn"))


@pytest.mark.parametrize("region", [torch.ones(2, 2).bool(), torch.ones(2, 3), [[True] * 3] * 2])
def test_a_region_that_does_not_fit_is_refused(region, small_folder):
    with pytest.raises(Refused, match="region must be a bool tensor of the shape of tokens"):
        quantize_model(load_model(small_folder, "cpu"), torch.ones(2, 3).long(), QuantConfig("rtn"), region)


@pytest.mark.parametrize(("model", "config", "sentence"), [
    ("tiny", QuantConfig("rtn"), "model is of type str; give what load_model"),
    (torch.nn.Linear(2, 2), QuantConfig("rtn"), "model is of type Linear; give what load_model"),
    (None, None, "config is of type NoneType; give what QuantConfig"),
    (None, {"wbits": 4}, "config is of type dict; give what QuantConfig"),
    (None, "rtn", "config is of type str; give what QuantConfig")])
def test_a_model_or_config_of_another_type_is_refused(model, config, sentence, small_folder):
    with pytest.raises(Refused, match=sentence):
        quantize_model(model or load_model(small_folder, "cpu"), ids().clamp(max=900), config)


@pytest.mark.parametrize("values", [{"wbits": 4.5}, {"abits": "4"}, {"seed": 1.5}, {"kv_bits": None}])
def test_a_setting_of_another_type_is_refused(values):
    with pytest.raises(Refused, match="is no int"):
        QuantConfig("rtn", **values)


def test_another_residency_is_refused(small_folder):
    with pytest.raises(Refused, match="neither"):
        load_model(small_folder, "cpu", weights="int4")


def test_a_quantized_model_is_not_quantized_again(small_folder):
    tokens = torch.randint(1000, (4, 12), generator=torch.Generator().manual_seed(0))
    once = quantize_model(load_model(small_folder, "cpu"), tokens, QuantConfig("rtn"))
    with pytest.raises(Refused, match="quantized already"):
        quantize_model(once, tokens, QuantConfig("rtn"))


def test_an_unfinished_folder_says_how_to_go_on(tmp_path):
    (tmp_path / "starquant.json").write_text("{}")
    with pytest.raises(Refused, match="unfinished; run the same"):
        load_model(tmp_path)
