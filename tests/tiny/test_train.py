"""Training: the loss is the bound it claims to be, and the command makes a folder that loads and can be continued."""

import json
import math
import resource
import shutil
import signal

import pytest
import torch
from arguments import fast

import calibrate
from checkpoint.folder import sha256
from model import load_model
from tiny import tasks, train

ENGLISH = tasks.english_documents("train")[:2]


def test_loss_is_the_weighted_cross_entropy_of_the_masked_tokens(small_folder):
    model = load_model(small_folder, "cpu")
    clean = torch.randint(1000, (3, 10), generator=torch.Generator().manual_seed(0))
    noisy, t = clean.clone(), torch.tensor([0.2, 0.5, 0.9])
    noisy[:, 4:7] = model.mask_id
    with torch.no_grad():
        logp = model(noisy).double().log_softmax(-1)
        want = sum(-logp[i, j, clean[i, j]] / t[i] for i in range(3) for j in (4, 5, 6)) / 30
        got = train.diffusion_loss(model, clean, noisy, (1 / t)[:, None].expand(3, 10), torch.tensor(30))
    assert math.isclose(got, want, rel_tol=1e-5)


@pytest.fixture(autouse=True, scope="module")
def little_english():
    """Two chapters: the tokens of all of them take longer than the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks, "english_documents", lambda split: ENGLISH)
        tasks._english_tokens.cache_clear()
        yield
    tasks._english_tokens.cache_clear()


def test_batches_are_determined_by_domain_and_key():
    tokenizer = load_model("tiny", "cpu").tokenizer
    for domain in train.DOMAINS:
        one, two = (train.training_batch(tokenizer, domain, 256, 1023, 5) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
        clean, noisy, weight, _ = one
        assert ((noisy == clean) | (noisy == 1023)).all()
        if domain == "chain":  # everything behind a cut is masked, the next four tokens are trained
            masked = noisy == 1023
            assert torch.equal(masked, masked.cummax(1).values)
            assert torch.equal(weight > 0, masked & (masked.cumsum(1) <= 4))
        else:
            assert (weight >= 1).all()


FAST = ["--tokens", "96", "--device", "cpu"]


def weights(folder):
    return sha256(folder / "model.safetensors")


def test_command_trains_a_fresh_model(tmp_path, capsys):
    assert train.main([*FAST, "--steps", "2", "--mix", "code,sums", "--out", str(tmp_path / "a")]) == 0
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["config.json", "model.safetensors", "tokenizer.json",
                                                                  "training.json"]
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result.keys() == {"out", "steps", "seconds", "code", "sums"}
    fresh, trained = train.fresh_model(0), load_model(tmp_path / "a", "cpu")
    assert trained.tokenizer.to_str() == fresh.tokenizer.to_str()
    assert not torch.equal(trained.head.weight, fresh.head.weight.bfloat16().float())


def test_a_model_of_another_size_has_the_same_proportions(tmp_path):
    command = [*FAST, "--steps", "1", "--mix", "sums", "--width", "64", "--layers", "2", "--out", str(tmp_path / "a")]
    assert train.main(command) == 0
    c = load_model(tmp_path / "a", "cpu").config
    assert (c.d_model, c.n_layers, c.n_heads, c.head_dim, c.d_ffn) == (64, 2, 2, 32, 3 * 64)
    with torch.device("meta"):  # the larger model that tests/tools/gpu_second.sh trains
        large = train.fresh_model(0, 512, 8)
    assert 25e6 < sum(p.numel() for p in large.parameters()) < 30e6


def test_two_runs_do_not_share_a_folder(small_folder, tmp_path, capsys, monkeypatch):
    command = [*FAST, "--init", str(small_folder), "--steps", "1", "--out", str(tmp_path / "out")]
    whole = train.training_batch

    def batch(*args):
        monkeypatch.undo()
        assert train.main([*command, "--resume"]) == 2
        return whole(*args)

    monkeypatch.setattr(train, "training_batch", batch)
    assert train.main(command) == 0
    assert f"another run is writing to {tmp_path / 'out'}" in capsys.readouterr().err


def test_the_history_of_init_is_kept(tmp_path):
    assert train.main([*FAST, "--steps", "1", "--out", str(tmp_path / "a"), "--init", "tiny"]) == 0
    record = json.loads((tmp_path / "a" / "training.json").read_text())
    assert (record["steps"], len(record["phases"])) == (14426, 9)
    assert str(tmp_path) not in json.dumps(record)


def test_what_was_interrupted_before_its_first_step_left_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train, "trained_model", lambda folder: signal.raise_signal(signal.SIGINT))
    assert train.main([*FAST, "--init", "tiny", "--out", str(tmp_path / "out")]) == 130
    assert capsys.readouterr().err.endswith(f"interrupted. Nothing was written to {tmp_path / 'out'}.\n")


@pytest.fixture
def interrupt(monkeypatch):
    """interrupt(n): Ctrl-C while the n-th batch from now is made. Gives the list of the domains of all batches."""
    domains, whole = [], train.training_batch

    def at(n):
        def batch(tokenizer, domain, *args):
            domains.append(domain)
            if len(domains) == n:
                signal.raise_signal(signal.SIGINT)
            return whole(tokenizer, domain, *args)

        domains.clear()
        monkeypatch.setattr(train, "training_batch", batch)
        return domains
    return at


def test_an_interrupted_run_goes_on_to_the_same_bytes(small_folder, tmp_path, capsys, interrupt):
    command = [*FAST, "--init", str(small_folder), "--steps", "7", "--mix", "math,sums,english", "--seed", "3"]
    assert train.main([*command, "--out", str(tmp_path / "whole")]) == 0
    out = ["--out", str(tmp_path / "parts")]
    interrupt(4)
    assert train.main([*command, *out]) == 130
    said = f"Go on from {tmp_path / 'parts' / train.PROGRESS} by the same command and --resume."
    assert said in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert json.loads((tmp_path / "parts" / "training.json").read_text())["phases"][-1]["steps"] == 4  # it was ended
    load_model(tmp_path / "parts", "cpu")
    interrupt(2)
    assert train.main([*command, *out, "--resume"]) == 130
    state = (tmp_path / "parts" / train.PROGRESS).read_bytes()
    for changed, words in ((["--lr", "0.1"], "--lr was 0.002 and is 0.1"), (["--mix", "sums"], "--mix was"),
                           (["--minutes", "9"], "--minutes was inf and is 9.0")):
        assert train.main([*command, *out, "--resume", *changed]) == 2
        assert words in capsys.readouterr().err
    assert train.main([*command, *out]) == 2
    assert "add --resume to go on with its training, or --overwrite" in capsys.readouterr().err
    assert (tmp_path / "parts" / train.PROGRESS).read_bytes() == state
    interrupt(0)
    assert train.main([*command, *out, "--resume"]) == 0
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")
    assert not (tmp_path / "parts" / train.PROGRESS).exists()
    last = [json.loads((tmp_path / name / "training.json").read_text())["phases"][-1] for name in ("whole", "parts")]
    assert last[0]["loss"] == last[1]["loss"]
    assert train.main([*command, *out, "--resume"]) == 0
    assert "is complete" in capsys.readouterr().err


class TestPreset:
    def test_the_phases_are_those_of_the_record(self):
        record = json.loads((train.resolve("tiny") / "training.json").read_text())["phases"]
        phases = train.shipped_phases()
        assert [(p["mix"], p["steps"]) for p in phases] == [(p["mix"], p["steps"]) for p in record]
        assert [p["args"]["seed"] for p in phases] == [0, 1, 2, 3, 4, 6, 7, 8]
        for phase, p in zip(phases, record, strict=True):
            left = 1 - phase["steps"] / phase["args"]["steps"]  # of the learning rate, at the end of the phase
            used = p["seconds"] / 60 / float(p["args"]["minutes"])
            assert left == pytest.approx(1 - max(used, p["steps"] / float(p["args"]["steps"])), abs=1e-3)

    def test_the_phases_run_in_order_and_survive_interruption(self, small_folder, tmp_path, monkeypatch, interrupt):
        """As single commands do, each from the model of the one before."""
        mixes = (["sums", "english"], ["math"], ["code", "chain"])
        phases = [{"mix": mix, "steps": 3, "args": {**train.DEFAULTS, "steps": 3, "tokens": 96, "seed": i}}
                  for i, mix in enumerate(mixes)]
        monkeypatch.setattr(train, "shipped_phases", lambda: phases)
        monkeypatch.setattr(train, "fresh_model", lambda *_: train.trained_model(str(small_folder)))
        init = str(small_folder)
        for i, mix in enumerate(mixes):
            assert train.main([*FAST, "--init", init, "--mix", ",".join(mix), "--steps", "3", "--seed", str(i),
                               "--out", str(tmp_path / str(i))]) == 0
            init = str(tmp_path / str(i))
        command, seen = ["--preset", "shipped", "--device", "cpu", "--out", str(tmp_path / "preset")], []
        for again, n in (([], 2), (["--resume"], 1), (["--resume"], 3), (["--resume"], 0)):  # the third ends a phase
            domains = interrupt(n)
            assert train.main([*command, *again]) == (130 if n else 0)
            seen += domains
        assert seen == ["sums", "english", "sums", "math", "math", "math", "code", "chain", "code"]
        assert weights(tmp_path / "preset") == weights(tmp_path / "2")
        record = json.loads((tmp_path / "preset" / "training.json").read_text())
        assert [(p["mix"], p["steps"]) for p in record["phases"]] == [(mix, 3) for mix in mixes]
        assert not (tmp_path / "preset" / train.PROGRESS).exists()

    def test_other_arguments_are_refused(self, tmp_path, capsys):
        out = ["--out", str(tmp_path / "out")]
        assert train.main(["--preset", "shipped", "--steps", "9", "--init", "tiny", *out]) == 2
        assert "--preset shipped cannot stand beside --init, --steps" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


def test_a_full_disk_costs_nothing_that_was_saved(small_folder, tmp_path, capsys, monkeypatch):
    """The limit on the size of files stands for the disk: the 16-bit model fits, the file to go on from does not."""
    command = [*FAST, "--init", str(small_folder), "--steps", "4", "--out", str(tmp_path / "out")]
    monkeypatch.setattr(train, "EVERY", 2)
    whole, limit, steps = train.training_batch, resource.getrlimit(resource.RLIMIT_FSIZE), iter(range(9))

    def batch(*args):
        if next(steps) == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limit[1]))
        return whole(*args)

    monkeypatch.setattr(train, "training_batch", batch)
    try:
        assert train.main(command) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    state = tmp_path / "out" / train.PROGRESS
    assert capsys.readouterr().err.endswith(f"{state} cannot be written (Error while serializing: I/O error: File too "
                                            f"large (os error 27)). Go on from {state} by the same command and "
                                            f"--resume.\n")
    assert json.loads((tmp_path / "out" / "training.json").read_text())["phases"][-1]["steps"] == 2
    load_model(tmp_path / "out", "cpu")
    assert train.main([*command, "--resume"]) == 0
    monkeypatch.undo()
    assert train.main([*command[:-1], str(tmp_path / "whole")]) == 0
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {p.name for p in (tmp_path / "whole").iterdir()}


@pytest.mark.parametrize(("arguments", "words"), [
    (["--init", "/nowhere"], "neither a folder"),
    (["--width", "100"], "--width 100 is no multiple of 32, the channels of a head"),
    (["--layers", "0"], "--layers 0 is not between 1 and"),
    (["--init", "tiny", "--layers", "2"], "--layers cannot stand beside --init, whose model has its size"),
    (["--steps", "0"], "--steps 0 is not between 1 and"),
    (["--tokens", "10"], "--tokens 10 is not between 96 and"),
    (["--device", "nope"], "device 'nope' is not available"),
    (["--minutes", "0"], "--minutes must be above 0"),
    (["--lr", "nan"], "--lr between 0 and 1"),
    (["--mix", "math,maths"], "--mix: 'maths' is none of chain, code, english"),
    (["--mix", "math,,code"], "--mix: '' is none of"),
    (["--seed", "-1"], "--seed -1 is not between 0 and"),
    (["--out", "file"], "nothing can be written to file (Not a directory)"),
    (["--out", "file/in"], "--out file/in: nothing can be written to "),
    (["--resume"], "holds no training that could go on; leave --resume out"),
    (["--resume", "--out", "."], "holds no training that could go on; leave --resume out")])
def test_bad_input_is_one_sentence_and_exit_2(arguments, words, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    assert train.main(arguments) == 2
    message = capsys.readouterr().err
    assert words in message
    assert len(message.splitlines()) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_init_without_tokenizer_or_quantized_is_refused(small_folder, tmp_path, capsys):
    shutil.copytree(small_folder, tmp_path / "bare")
    (tmp_path / "bare" / "tokenizer.json").unlink()
    assert train.main(["--init", str(tmp_path / "bare"), "--out", str(tmp_path / "out"), "--device", "cpu"]) == 2
    assert "has no tokenizer with" in capsys.readouterr().err
    assert calibrate.main(["--model", str(small_folder), "--out", str(tmp_path / "q"), "--segments", "4",
                           *fast("--method", "rtn")]) == 0
    assert train.main(["--init", str(tmp_path / "q"), "--out", str(tmp_path / "out"), "--device", "cpu"]) == 2
    assert "is quantized; give the 16-bit model" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_weights_without_a_finite_loss_are_refused(small_folder, tmp_path, capsys):
    model = load_model(small_folder, "cpu")
    model.head.weight.data *= 1e30
    model.save(tmp_path / "loud")
    assert train.main([*FAST, "--init", str(tmp_path / "loud"), "--out", str(tmp_path / "out")]) == 2
    assert "step 1 has no finite loss and gradient; lower --lr" in capsys.readouterr().err


def test_a_model_without_its_history_is_trained_on(small_folder, tmp_path):
    shutil.copytree(small_folder, tmp_path / "old")
    (tmp_path / "old" / "training.json").unlink()
    assert train.main([*FAST, "--init", str(tmp_path / "old"), "--steps", "1", "--out", str(tmp_path / "new")]) == 0
    assert json.loads((tmp_path / "new" / "training.json").read_text())["steps"] == 1


class TestNothingIsOverwritten:
    @pytest.fixture
    def trained(self, small_folder, tmp_path):
        shutil.copytree(small_folder, tmp_path / "trained")
        return tmp_path / "trained"

    def test_without_being_told_to(self, trained, capsys):
        """Not even a model that is trained on."""
        before = weights(trained)
        for more in ([], ["--init", str(trained)], ["--preset", "shipped"]):
            assert train.main(["--out", str(trained), *more]) == 2
            assert "is not empty; choose another folder, or add --overwrite" in capsys.readouterr().err
        assert weights(trained) == before

    def test_what_is_of_another_program(self, trained, capsys):
        (trained / "model.safetensors.index.json").write_text("{}")
        assert train.main(["--out", str(trained), "--overwrite"]) == 2
        assert "holds model.safetensors.index.json, which this command does not write" in capsys.readouterr().err

    def test_but_with_overwrite(self, trained):
        before = weights(trained)
        assert train.main([*FAST, "--steps", "1", "--init", str(trained), "--out", str(trained), "--overwrite"]) == 0
        assert weights(trained) != before

    def test_a_damaged_file_to_go_on_from(self, trained, capsys):
        for content in (b"", b"\x08\0\0\0\0\0\0\0{}      ", bytes(99)):
            (trained / train.PROGRESS).write_bytes(content)
            assert train.main(["--out", str(trained), "--resume"]) == 2
            assert "cannot be read" in capsys.readouterr().err
