"""Numbers at the edge: NaN and Inf are named, degenerate inputs are handled, threads change rounding only."""

import json
import math

import pytest
import torch
from arguments import fast, quick
from safetensors.torch import load_file

import calibrate
from calibrate import METHODS, QuantConfig, calibrate_blocks, quantize_block, quantize_model
from checkpoint.families import FUSED
from methods import rtn, sgat
from model import generate, load_model
from runtime.layers import QuantLinear
from runtime.processes import Refused

BF16_MAX = torch.finfo(torch.bfloat16).max


def command(model, out, *more):
    return calibrate.main(["--model", str(model), "--out", str(out), "--segments", "9", "--length", "24", *fast(*more)])


# ---- named -----------------------------------------------------------------------------------------------------------


class TestNamed:
    """A weight that is NaN is refused by preflight (test_bad_input.py); activations show only when they are made."""

    def overflowing(self, small_folder, folder, block, attribute):
        full = load_model(small_folder, "cpu")
        getattr(full.blocks[block], attribute).weight.data[0] = BF16_MAX
        full.save(folder, torch.bfloat16)
        for name in ("tokenizer.json", "training.json"):
            (folder / name).write_bytes((small_folder / name).read_bytes())

    @pytest.mark.parametrize("attribute", FUSED)
    @pytest.mark.parametrize("method", ["starquant", "rtn"])
    def test_an_activation_that_overflows(self, attribute, method, small_folder, tmp_path, capsys):
        self.overflowing(small_folder, tmp_path / "m", 1, attribute)
        assert command(tmp_path / "m", tmp_path / "q", "--method", method) == 2
        last = capsys.readouterr().err.splitlines()[-1]
        assert last.startswith(f"calibrate.py: block 1: the 16-bit output of {attribute} holds ")
        assert "NaN or Inf of " in last
        count, total = int(last.split("holds ")[1].split()[0]), int(last.split("of ")[-1].split()[0])
        assert 0 < count <= 9 * 24  # one row of the weight: one value a token
        assert total == 9 * 24 * getattr(load_model(small_folder, "cpu").blocks[0], attribute).out_features
        # the finished block is there, and the run may go on once the model is mended
        assert [p.name for p in sorted((tmp_path / "q").glob("*.safetensors"))] == ["model-00001-of-00003.safetensors"]
        assert not json.loads((tmp_path / "q" / "starquant.json").read_text())["complete"]

    # the norm makes a whole row NaN of one NaN, but 0 of a row and NaN of its one Inf
    @pytest.mark.parametrize(("bad", "count"), [(math.nan, 2 * 64), (math.inf, 2), (-math.inf, 2)])
    def test_an_input_of_a_linear(self, bad, count, small_folder):
        full = load_model(small_folder, "cpu")
        x, state, rope, _ = full.prepare(torch.randint(1000, (3, 8)))
        x[0, 0, 0] = x[2, 1, 3] = bad
        with pytest.raises(Refused, match=rf"^block 7: the input of qkv holds {count} NaN or Inf of 1536 "):
            quantize_block(full.blocks[0], x, x, state, rope, QuantConfig(method="rtn"), 7)


# ---- handled ---------------------------------------------------------------------------------------------------------


def inputs(case, S=8, L=6, d=64, C=96):
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(S, L, d, generator=g), torch.randn(C, d, generator=g) / 8
    match case:
        case "zero rows":
            x[:, :3], w[:5] = 0, 0
        case "constant rows":
            x[:, 0], w[3] = 0.5, 0.25
        case "a dead channel":
            x[..., 7] = 0
        case "no input":
            x.zero_()
        case "no weight":
            w.zero_()
        case "denormal input":
            x *= 1e-40
        case "denormal weight":
            w *= 1e-40
        case "one huge weight":
            w[0, 0], w[1, 1], x = BF16_MAX, -BF16_MAX, x * 1e-3
        case "one huge input":
            x[0, 0, 0], x[1, 1, 1], w = BF16_MAX, -BF16_MAX, w * 1e-3
    return x, w


CASES = ["zero rows", "constant rows", "a dead channel", "no input", "no weight", "denormal input", "denormal weight"]


def fit(method, x, w, masked=0.5):
    state = torch.rand(x.shape[:2], generator=torch.Generator().manual_seed(1)) < masked
    given = rtn.Inputs(x, x @ w.mT, state, torch.full(state.shape, 0.5), torch.ones(x.shape[-1]))
    fitted, record = METHODS[method].fit(w, None, given, quick(method),
                                     torch.Generator().manual_seed(0), lambda loss: None)
    return fitted(x, state), record


@pytest.mark.parametrize("method", sorted(METHODS))
class TestEveryMethod:
    @pytest.mark.parametrize("case", CASES)
    def test_degenerate_rows(self, method, case):
        """Finite, and close to the exact product unless that is itself denormal: then zero is close."""
        x, w = inputs(case)
        y, _ = fit(method, x, w)
        want = x.double() @ w.double().mT
        assert torch.isfinite(y).all()
        assert float((y - want).norm()) <= 0.5 * float(want.norm()) + torch.finfo(torch.float32).tiny

    @pytest.mark.parametrize("masked", [2.0, -1.0], ids=["all masked", "none masked"])
    def test_one_state_only(self, method, masked):
        x, w = inputs("as it is")
        y, _ = fit(method, x, w, masked)
        assert float((y - x @ w.mT).norm()) < 0.5 * float((x @ w.mT).norm())

    @pytest.mark.parametrize("case", ["one huge weight", "one huge input"])
    def test_the_largest_bf16_number_is_finite_or_named(self, method, case, small_folder):
        full = load_model(small_folder, "cpu")
        noisy = torch.where(torch.rand(4, 8, generator=torch.Generator().manual_seed(0)) < 0.5, 1023, 5)
        x, state, rope, _ = full.prepare(noisy)
        x = x.clone()
        if case == "one huge weight":
            full.blocks[0].down.weight.data[3, 3] = BF16_MAX
        else:
            x[0, 0, 0] = BF16_MAX
        try:
            block, record, _ = quantize_block(full.blocks[0], x, x, state, rope, quick(method), 0,
                                           confidence=torch.full(state.shape, 0.5))
        except Refused as error:
            sentence = str(error)
        else:
            assert torch.isfinite(block(x, state, rope)).all()
            assert all(math.isfinite(r["error"]) for r in record["linears"].values())
            return
        assert sentence.startswith("block 0: ")
        assert "down" in sentence or case == "one huge input"

    @pytest.mark.parametrize(("rows", "length", "masked"), [(1, 1, True), (1, 1, False), (1, 7, True), (3, 5, False)])
    def test_one_token_one_sequence_one_state(self, method, rows, length, masked, small_folder):
        """Calibrated on it, and run on it."""
        full = load_model(small_folder, "cpu")
        full.blocks = full.blocks[:1]
        ids = torch.arange(rows * length).reshape(rows, length) % 900
        noisy = torch.full_like(ids, full.mask_id) if masked else ids
        config = quick(method)
        blocks = [b for _, b, _ in calibrate_blocks(full, lambda: full.blocks, noisy, config)]
        assert all(isinstance(getattr(b, name), QuantLinear) for b in blocks for name in FUSED)
        full.blocks = torch.nn.ModuleList(blocks)
        for batch in (noisy, ids, torch.full((1, 1), full.mask_id), torch.zeros(2, 1, dtype=torch.long)):
            assert torch.isfinite(full(batch)).all()


def test_generation_of_one_token_from_one_token(small_folder):
    full = load_model(small_folder, "cpu")
    quantized = quantize_model(full, torch.arange(64).reshape(4, 16), QuantConfig(epochs=0))
    out = generate(quantized, torch.tensor([[5]]), steps=1, gen_length=1)
    assert out.tolist() == [[5, int(quantized(torch.tensor([[5, full.mask_id]]))[0, 1].argmax())]]


# ---- divergence ------------------------------------------------------------------------------------------------------


class TestDivergence:
    def test_the_best_iterate_is_kept_and_a_line_says_so(self, small_folder, tmp_path, capsys):
        assert command(small_folder, tmp_path / "start", "--set", "epochs=0") == 0
        assert "best iterate" not in capsys.readouterr().err
        assert command(small_folder, tmp_path / "q", "--set", "lr=10", "--set", "epochs=3") == 0
        lines = [line for line in capsys.readouterr().err.splitlines() if "best iterate" in line]
        blocks = json.loads((tmp_path / "q" / "starquant.json").read_text())["blocks"]
        ended_worse = [(b["block"], n, r) for b in blocks for n, r in b["linears"].items() if r["last"] > r["start"]]
        assert ended_worse
        assert len(lines) == len(ended_worse)
        for line, (block, name, r) in zip(lines, ended_worse, strict=True):
            assert r["diverged"]
            assert r["best"] <= r["start"]
            assert line == (f"calibrate.py: block {block}, {name}: the held-out loss began at {r['start']:.4g} and "
                            f"ended at {r['last']:.4g}; the best iterate, {r['best']:.4g}, is kept.")

    def test_a_loss_that_is_nan_is_said_and_leaves_valid_json(self, small_folder, tmp_path, capsys, monkeypatch):
        trained, original = [False], sgat.sgat_loss

        def burst(*args, **options):
            """Finite at the start, NaN when it is judged again after training."""
            loss = original(*args, **options)
            trained[0] = loss.requires_grad or trained[0]
            return loss if loss.requires_grad or not trained[0] else loss * math.nan

        def fresh(*args):
            trained[0] = False
            return sgat.fit_starquant(*args)

        monkeypatch.setattr(sgat, "sgat_loss", burst)
        monkeypatch.setitem(METHODS, "starquant", METHODS["starquant"]._replace(fit=fresh))
        assert command(small_folder, tmp_path / "q") == 0
        assert capsys.readouterr().err.count(" and became infinite or NaN; the best iterate, ") == 8
        text = (tmp_path / "q" / "starquant.json").read_text()
        assert "NaN" not in text
        for block in json.loads(text)["blocks"]:
            for r in block["linears"].values():
                assert (r["diverged"], r["last"], r["best"]) == (True, None, r["start"])


# ---- threads ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


class TestThreads:
    def test_a_quantized_model_gives_the_same_logits_to_rounding(self, small_folder, threads):
        full = load_model(small_folder, "cpu")
        quantized = quantize_model(full, torch.arange(192).reshape(4, 48), QuantConfig(epochs=1))
        ids = torch.where(torch.rand(3, 40, generator=torch.Generator().manual_seed(0)) < 0.5, 1023, 7)
        for model in (full, quantized):
            seen = []
            for n in (1, 2, 4):
                threads(n)
                with torch.no_grad():
                    seen.append(model(ids))
            for other in seen[1:]:
                assert float((other - seen[0]).abs().max()) <= 1e-5 * float(seen[0].abs().max())

    def test_rounding_to_nearest_writes_the_same_tensors(self, small_folder, tmp_path, threads):
        for n in (1, 3):
            threads(n)
            assert command(small_folder, tmp_path / str(n), "--method", "rtn") == 0
        for shard in (tmp_path / "1").glob("*.safetensors"):
            one, three = load_file(shard), load_file(tmp_path / "3" / shard.name)
            assert all(torch.equal(one[k], three[k]) for k in one.keys() | three.keys())

    @pytest.mark.parametrize("method", ["starquant", "starquant+", "quarot", "flatquant"])
    def test_a_calibration_ends_at_the_same_error(self, method, small_folder, tmp_path, threads):
        """Sums in another order move weights across a rounding boundary; the reconstruction error stays."""
        errors = []
        for n in (1, 3):
            threads(n)
            assert command(small_folder, tmp_path / str(n), "--method", method) == 0
            blocks = json.loads((tmp_path / str(n) / "starquant.json").read_text())["blocks"]
            errors.append([r["error"] for b in blocks for r in b["linears"].values()])
        assert errors[1] == pytest.approx(errors[0], rel=0.02)
