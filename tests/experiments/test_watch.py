"""The live display: on a small terminal of our own, in a pipe, and what is refused before it begins."""

import io
import re
import shutil
import unicodedata
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models

import evaluate
from experiments import watch
from model import denoise, generate, load_model


class Terminal(io.StringIO):
    """Keeps what a terminal of so many columns and lines shows, and what has scrolled away above it."""

    def __init__(self, columns, lines):
        super().__init__()
        self.columns, self.lines, self.rows, self.at, self.column = columns, lines, [""], 0, 0

    def isatty(self):
        return True

    def down(self):
        self.at, self.column = self.at + 1, 0
        if self.at == len(self.rows):
            self.rows.append("")

    def write(self, text):
        for part in re.findall(r"\033\[[\d;]*[A-Za-z]|[^\033]", text):
            if part == "\n":
                self.down()
            elif part.endswith("m") and part[0] == "\033":
                continue
            elif part == "\033[J":
                assert self.column == 0
                self.rows = [*self.rows[: self.at], ""]
            elif part.endswith("A") and part[0] == "\033":
                self.at = max(self.at - int(part[2:-1]), len(self.rows) - self.lines, 0)  # not above the screen
            else:
                assert part.isprintable(), repr(part)
                wide = watch.width(part)
                if self.column + wide > self.columns:
                    self.down()
                self.rows[self.at] += part
                self.column += wide
        return super().write(text)


@pytest.fixture(scope="module")
def tiny():
    return load_model("tiny", "cpu")


@pytest.fixture(scope="module")
def small(small_folder):
    """Random weights: it writes control characters, halves of characters, anything."""
    model = load_model(small_folder, "cpu")
    model.config.raw["max_sequence_length"] = 1024  # 512 tokens behind a prompt
    return model


@pytest.fixture(scope="module")
def runs(small):
    """The passes of two answers of each length."""
    return {(name, length): list(denoise(small, prompt(small), 8, length, temperature=t))
            for name, t in (("tiny", 0.0), ("out/random-weights", 1.0)) for length in (24, 512)}


@pytest.fixture
def recorded(runs, small, monkeypatch):
    """Show the two answers again."""
    def show(out, length):
        names = iter(("tiny", "out/random-weights"))
        monkeypatch.setattr(watch, "denoise", lambda *_, **__: runs[next(names), length])
        return watch.show_denoising({"tiny": small, "out/random-weights": small}, prompt(small), out, steps=8,
                                    gen_length=length)
    return show


@pytest.fixture
def sized(monkeypatch):
    def of(columns, lines=24):
        monkeypatch.setenv("COLUMNS", str(columns))
        monkeypatch.setenv("LINES", str(lines))
        monkeypatch.setenv("TERM", "xterm")
        return Terminal(columns, lines)
    return of


def prompt(model, text="Ann has 4 books."):
    return watch.encode_prompt(model, text, chat=False)


def plain(tokenizer, ids, mask_id=1023):
    return "".join(c for c, _ in watch.cells(tokenizer, ids, mask_id, [""] * len(ids)))


class TestTerminal:
    @pytest.mark.parametrize("columns", [60, 80, 120])
    @pytest.mark.parametrize("length", [24, 512])
    def test_every_pass_stands_in_the_place_of_the_one_before(self, recorded, columns, length, sized):
        out = sized(columns)
        answers = recorded(out, length)
        legend, *rows, last = out.rows
        assert legend.startswith("░ still masked")
        assert last == ""
        assert max(map(watch.width, rows)) < columns
        assert sum(" 8/8 " in row for row in rows) == 2  # nothing stale, neither on the screen nor above it
        assert sum("/8 " in row for row in rows) == 2
        second = next(i for i, row in enumerate(rows) if row.startswith("random-weights"))
        head = len("random-weights 8/8 ")
        for name, part in (("tiny", rows[:second]), ("out/random-weights", rows[second:])):
            want = "".join(watch.visible(answers["text"][name]))
            got = "".join(row[head:] for row in part)
            assert got.replace("▒", "") == want.replace("▒", "")
        assert len(rows) < 6 if length == 24 else len(rows) > 10

    def test_what_the_screen_has_no_room_for_is_left_out_until_the_end(self, recorded, sized):
        out, seen = sized(60, 10), []
        out.flush = lambda: seen.append(list(out.rows))
        recorded(out, 512)
        for rows in seen[:-1]:
            assert len(rows) == 1 + 2 * 4 + 1
        assert seen[0][4].startswith(" " * len("random-weights 1/8") + "…")  # more is below
        assert len(seen[-1]) > 20

    def test_rows_begin_at_the_first_masked_token(self):
        line = [(c, "") for c in "abcdef" + "░" + "ghijkl"]
        assert watch.screen_rows("x", line, 6) == ["x abcd", "  ef░g", "  hijk", "  l"]
        assert watch.screen_rows("x", line, 6, 2) == ["x…ef░g", " …hijk"]
        assert watch.screen_rows("x", line[:6] + line[7:], 6, 2) == ["x…efgh", "  ijkl"]

    def test_marks_are_what_was_committed_now_and_where_models_differ(self):
        now = SimpleNamespace(committed=torch.tensor([[True, False, False, False, False]]))
        marks = watch.marks_of([[5, 6, 9, 7], [5, 8, 4, 9]], [now, None], {9}, start=1)
        assert marks == [["", watch.OTHER, watch.DIM, ""], ["", watch.OTHER, "", watch.DIM]]
        now.committed[0, 1:3] = True
        assert watch.marks_of([[5, 6, 9, 7], [5, 8, 4, 9]], [now, None], {9}, start=1)[0][:2] == [
            watch.NEW, "1;" + watch.OTHER]

    def test_colours_can_be_switched_off(self, tiny, sized, monkeypatch):
        monkeypatch.setenv("NO_COLOR", "1")
        out = sized(80)
        watch.show_denoising({"a": tiny}, prompt(tiny), out, steps=2, gen_length=4)
        assert set(re.findall(r"\033\[\d*(.)", out.getvalue())) == {"A", "J"}

    def test_a_name_takes_a_third_of_the_columns_at_most(self):
        assert watch.short(["out/llada-q", "tiny"], 60) == ["llada-q", "   tiny"]
        assert watch.short(["a/q", "b/q"], 60) == ["a/q", "b/q"]
        assert watch.short(["模型/q", "b/q"], 60) == ["模型/q", "   b/q"]
        assert watch.short(["0123456789" * 3], 60) == ["…1" + "23456789" + "0123456789"]


class TestPipe:
    def test_every_pass_is_a_plain_line_of_each_model(self, small):
        out = io.StringIO()
        watch.show_denoising({"a": small, "b": small}, prompt(small), out, steps=4, gen_length=128)
        lines = out.getvalue().splitlines()
        assert [line[:5] for line in lines] == [f"{name} {i}/4" for i in range(1, 5) for name in "ab"]
        assert all(line.isprintable() for line in lines)
        assert [line.count("░") for line in lines[::2]] == [96, 64, 32, 0]

    def test_with_a_threshold_a_model_that_is_done_waits(self, tiny, small):
        out = io.StringIO()
        written = watch.show_denoising({"tiny": tiny, "random": small}, prompt(tiny), out, gen_length=8, steps=None,
                                       threshold=0.5)
        passes, lines = written["passes"], out.getvalue().splitlines()
        assert passes["tiny"] < passes["random"] == 8
        assert len(lines) == 2 * 8
        assert lines[-2] == lines[2 * passes["tiny"] - 2]
        alone = generate(tiny, prompt(tiny), None, 8, threshold=0.5)[0, -8:]
        assert written["text"]["tiny"] == tiny.tokenizer.decode(alone.tolist())

    def test_both_models_draw_the_same_noise(self, tiny):
        options = {"steps": 8, "gen_length": 8, "temperature": 2.0}
        texts = [watch.show_denoising({"a": tiny, "b": tiny}, prompt(tiny), io.StringIO(), seed, **options)["text"]
                 for seed in (0, 1)]
        assert texts[0]["a"] == texts[0]["b"] != texts[1]["a"] == texts[1]["b"]


class TestCharacters:
    def test_tokens_of_one_character_are_read_together(self, tiny):
        ids, mask = tiny.tokenizer.encode("Grüße, 模€ 👍").ids, tiny.mask_id
        assert len(ids) > len("Grüße, 模€ 👍")
        assert plain(tiny.tokenizer, ids) == "Grüße, 模€ 👍"
        euro = tiny.tokenizer.encode("€").ids
        assert len(euro) == 3
        assert plain(tiny.tokenizer, [*euro[:2], mask]) == "▒░"
        assert plain(tiny.tokenizer, [euro[0], mask, euro[2]]) == "▒░▒"
        assert plain(tiny.tokenizer, [*euro, mask, *euro]) == "€░€"

    def test_a_space_behind_a_masked_token_stays(self):
        vocabulary = {t: i for i, t in enumerate(["▁a", "▁dog", "<0xC3>", "<0x9C>", "[MASK]"])}
        tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="▁a"))
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                               decoders.Strip(" ", 1, 0)])
        assert tokenizer.decode([1, 1]) == "dog dog"
        assert plain(tokenizer, [1, 4, 1, 2, 3, 2, 4], 4) == " dog░ dogÜ▒░"

    def test_nothing_moves_the_cursor(self):
        text = "\x1b[2J\r\b\tü模\u202e\n\x9b\x00"
        assert " ".join(watch.visible(text)) == r"\x1b [ 2 J \r \x08 \t ü 模 \u202e ⏎ \x9b \x00"
        assert watch.width("aü模e\u0301👍") == 1 + 1 + 2 + 1 + 2
        assert unicodedata.category("\u0301") == "Mn"


class TestChat:
    @pytest.fixture
    def instruct(self, small):
        tokenizer = Tokenizer.from_str(small.tokenizer.to_str())
        tokenizer.add_special_tokens(["<|startoftext|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"])
        return SimpleNamespace(tokenizer=tokenizer, config=small.config)

    def test_a_question_is_asked_in_the_template(self, instruct):
        ids = watch.encode_prompt(instruct, "How many?", chat=True)[0].tolist()
        text = instruct.tokenizer.decode(ids, skip_special_tokens=False)
        assert text.replace(" ", "") == ("<|startoftext|><|start_header_id|>user<|end_header_id|>\n\nHowmany?<|eot_id|>"
                                         "<|start_header_id|>assistant<|end_header_id|>\n\n")
        assert ids.count(instruct.tokenizer.token_to_id("<|eot_id|>")) == 1

    def test_the_name_of_the_source_tells(self, instruct, small, tmp_path):
        (tmp_path / "mine-instruct").mkdir()
        (tmp_path / "q").mkdir()
        (tmp_path / "q" / "starquant.json").write_text('{"run": {"model": "llada-1.5"}}')
        assert watch.is_chat_model(instruct, str(tmp_path / "mine-instruct"))
        assert watch.is_chat_model(instruct, str(tmp_path / "q"))
        assert not watch.is_chat_model(instruct, str(tmp_path))
        assert not watch.is_chat_model(small, str(tmp_path / "mine-instruct"))  # no such tokens


class TestCommand:
    def test_prompt_on_the_command_line(self, capsys):
        assert evaluate.main(["--prompt", "Ann has 4 books.", "--gen-length", "4", "--block-length", "2",
                              "--temperature", ".5", "--seed", "3", "--device", "cpu"]) == 0
        *lines, _ = capsys.readouterr().out.splitlines()
        assert [line.count("░") for line in lines] == [3, 2, 1, 0]
        assert lines[1].endswith("░░")

    @pytest.mark.parametrize(("arguments", "says"), [
        (["--prompt", " \n"], "--prompt holds no text"),
        (["--prompt", "Ann", "--chat"], "ask without chat"),
        (["--prompt", "Ann", "--threshold", ".9", "--steps", "4"], "leave --steps out"),
        (["--prompt", "Ann", "--block-length", "5"], "not a multiple of block_length 5")])
    def test_refused_in_one_sentence(self, arguments, says, capsys):
        assert evaluate.main([*arguments, "--device", "cpu"]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert says in err
        assert err.count("\n") == 1

    @pytest.mark.parametrize("use", [["--prompt", "Ann"], []])
    def test_two_vocabularies_are_refused_before_weights_are_read(self, use, small_folder, tmp_path, monkeypatch,
                                                                  capsys):
        other = tmp_path / "other"
        shutil.copytree(small_folder, other)
        tokenizer = Tokenizer.from_file(str(other / "tokenizer.json"))
        tokenizer.add_tokens(["Donaudampfschiff"])
        tokenizer.save(str(other / "tokenizer.json"))
        monkeypatch.setattr(evaluate, "load_model", None)
        assert evaluate.main([*use, "--model", "tiny", "--against", str(other)]) == 2
        assert capsys.readouterr().err == (f"evaluate.py: tiny and {other} have different vocabularies and cannot be "
                                           f"compared.\n")
