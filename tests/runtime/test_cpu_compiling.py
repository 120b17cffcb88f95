"""cpu_kernels.c is compiled once, for its machine and its user alone, or the readable path serves."""

import os
import stat
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from test_cpu import AT_ONCE, FLAGS, ROOT, compiled, linear
from test_kernels import randn

from runtime import cpu


class TestCompiling:
    @pytest.fixture(autouse=True)
    def fresh(self, monkeypatch, tmp_path):
        """A cache folder of its own; what a test finds there holds for that test."""
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        monkeypatch.setattr(cpu, "FLAGS", AT_ONCE)
        cpu.compiled.cache_clear()
        yield
        cpu.compiled.cache_clear()

    def test_without_a_compiler_the_readable_path_serves_and_it_is_said_once(self, monkeypatch):
        monkeypatch.setenv("CC", "/nonexistent")
        layer, x = linear(24, 10, block=8), randn(5, 24)
        with pytest.warns(UserWarning, match="there is no C compiler named /nonexistent.*the readable path"):
            y = cpu.linear(layer, x)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert torch.equal(cpu.linear(layer, x), y)
        assert torch.equal(cpu.readable(layer, x), y)

    def test_without_any_compiler_on_the_path(self, monkeypatch, tmp_path):
        monkeypatch.delenv("CC", raising=False)
        monkeypatch.setenv("PATH", str(tmp_path))
        with pytest.warns(UserWarning, match="there is no C compiler"):
            assert cpu.compiled() is None

    def test_a_compiler_that_fails(self, monkeypatch, tmp_path):
        fails = tmp_path / "fails"
        fails.write_text("#!/bin/sh\necho 'line 1: error: no such thing' >&2\nexit 1\n")
        fails.chmod(0o755)
        monkeypatch.setenv("CC", str(fails))
        with pytest.warns(UserWarning, match="line 1: error: no such thing"):
            assert cpu.compiled() is None
        assert list((tmp_path / "star-quant").iterdir()) == []

    @pytest.mark.parametrize("written", ["exit 0", "echo garbage > $last"])
    def test_a_compiler_that_makes_no_library(self, written, monkeypatch, tmp_path):
        fails = tmp_path / "fails"
        fails.write_text(f'#!/bin/sh\nfor word; do last=$before; before=$word; done\n{written}\n')
        fails.chmod(0o755)
        monkeypatch.setenv("CC", str(fails))
        with pytest.warns(UserWarning, match="does not serve"):
            assert cpu.compiled() is None
        assert list((tmp_path / "star-quant").iterdir()) == []  # nothing that the next process would take for a library

    @compiled
    def test_a_library_without_its_functions(self, monkeypatch):
        monkeypatch.setattr(cpu, "FLAGS", (*AT_ONCE, "-fvisibility=hidden"))
        with pytest.warns(UserWarning, match="undefined symbol"):
            assert cpu.compiled() is None

    @compiled
    @pytest.mark.parametrize(("name", "needs"), [("haswell", "avx2"), ("alderlake", "avx_vnni")])
    def test_another_processor(self, name, needs, monkeypatch):
        monkeypatch.setattr(cpu, "FLAGS", tuple(flag.replace("native", name) for flag in FLAGS))
        library = cpu.load()
        if needs not in cpu.processor().split():
            pytest.skip(f"compiled for {name}, but not run: needs {needs}")
        assert cpu.agrees(library)

    @compiled
    @pytest.mark.skipif("avx512_vnni" not in cpu.processor().split(), reason="needs AVX512-VNNI")
    def test_avx_vnni_by_an_instruction_of_avx512(self, monkeypatch, tmp_path):
        """The same product, under another name."""
        text, source = cpu.SOURCE.read_text(), tmp_path / "avx_vnni.c"
        for old, new in (("#ifdef __AVX512VNNI__", "#if 0"), ("#elif defined __AVXVNNI__", "#elif 1"),
                         ("_mm256_dpbusd_avx_epi32", "_mm256_dpbusd_epi32")):
            assert old in text
            text = text.replace(old, new)
        source.write_text(text)
        monkeypatch.setattr(cpu, "SOURCE", source)
        assert cpu.agrees(cpu.load())

    @compiled
    def test_a_processor_without_an_integer_dot_product(self, monkeypatch):
        monkeypatch.setattr(cpu, "FLAGS", tuple(flag.replace("native", "x86-64") for flag in cpu.FLAGS))
        with pytest.warns(UserWarning, match="no integer dot product for this processor"):
            assert cpu.compiled() is None

    @compiled
    @pytest.mark.parametrize(("line", "wrong"), [
        ("z = rounded(-low / s)", "z = (-low / s)"), ("high = larger(high, x[k])", "high = larger(low, x[k])"),
        ("V[(k + i) * B + k + j]", "V[(k + i) * B + k]"), ("v += (floats)load(l->shift", "v -= (floats)load(l->shift"),
        ("to->rest += code", "to->rest -= code"), ("masked & l->mean[K + k]", "masked & l->mean[k]"),
        ("? m : u", "? u : m"), ("f->T + p * f->next", "f->T"),
        ("old[k] = part[k * f->step]", "old[k] = part[k]"), ("all(half - 1)) - x;", "all(half)) - x;")])
    def test_a_library_that_differs_does_not_serve(self, line, wrong, monkeypatch, tmp_path):
        text, source = cpu.SOURCE.read_text(), tmp_path / "wrong.c"
        assert line in text
        source.write_text(text.replace(line, wrong, 1))
        monkeypatch.setattr(cpu, "SOURCE", source)
        with pytest.warns(UserWarning, match="its results differ"):
            assert cpu.compiled() is None

    @compiled
    def test_the_library_is_kept_for_its_user_alone(self, tmp_path, monkeypatch):
        cpu.load()
        folder = tmp_path / "star-quant"
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        (kept,) = folder.iterdir()
        monkeypatch.setattr(cpu, "build", lambda *args: pytest.fail("compiled twice"))
        cpu.load()
        assert list(folder.iterdir()) == [kept]

    @compiled
    def test_a_damaged_library_is_compiled_again(self, tmp_path):
        cpu.load()
        (kept,) = (tmp_path / "star-quant").iterdir()
        whole = kept.read_bytes()
        for damaged in (whole[:3000], b"", whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:]):
            kept.unlink()  # the loaded one stays as it is
            kept.write_bytes(damaged)
            assert not cpu.intact(kept)
        assert cpu.agrees(cpu.load())
        assert cpu.intact(kept)

    def test_other_sources_compilers_and_processors_have_other_names(self, tmp_path, monkeypatch):
        names = set()

        def compile_nothing(command, path):
            names.add(path.name)
            path.write_bytes(b"no library")

        monkeypatch.setattr(cpu, "build", compile_nothing)
        monkeypatch.setattr(cpu, "compiler", lambda: [sys.executable])
        for change in (None, ("SOURCE", Path(__file__)), ("FLAGS", ("-O1",)), ("processor", lambda: "another")):
            if change:
                monkeypatch.setattr(cpu, *change)
            for _ in range(2):
                with pytest.raises(OSError, match="cpu-"):
                    cpu.load()
        assert len(names) == 4

    def test_a_folder_that_others_may_write_to_is_not_used(self, tmp_path):
        with cpu.cache_folder() as folder:
            assert folder == tmp_path / "star-quant"
        folder.chmod(0o777)
        with cpu.cache_folder() as other:
            assert other != folder
            assert stat.S_IMODE(other.stat().st_mode) == 0o700
        assert not other.exists()

    def test_a_folder_that_cannot_be_made(self, tmp_path, monkeypatch):
        (tmp_path / "file").touch()
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
        with cpu.cache_folder() as folder:
            assert tmp_path not in folder.parents

    def test_a_relative_cache_home_does_not_count(self, monkeypatch, tmp_path):
        monkeypatch.setenv("XDG_CACHE_HOME", "here")
        monkeypatch.setenv("HOME", str(tmp_path))
        with cpu.cache_folder() as folder:
            assert folder == tmp_path / ".cache" / "star-quant"

    @compiled
    def test_two_processes_at_once(self, tmp_path):
        program = f"from runtime import cpu\ncpu.FLAGS = {AT_ONCE}\nassert cpu.compiled()"
        command = [sys.executable, "-W", "error", "-c", program]
        both = [subprocess.Popen(command, cwd=ROOT) for _ in range(2)]
        assert [process.wait(timeout=300) for process in both] == [0, 0]
        assert len(list((tmp_path / "star-quant").iterdir())) == 1


@compiled
def test_the_readable_path_passes_where_the_compiler_is_hidden(tmp_path):
    """Of these files all tests that do not skip."""
    files = [f"tests/{name}.py" for name in ("runtime/test_cpu", "runtime/test_layers", "methods/test_gptq")]
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files], cwd=ROOT, text=True,
                          capture_output=True, env=os.environ | {"CC": "/nonexistent", "XDG_CACHE_HOME": str(tmp_path)})
    assert done.returncode == 0, done.stdout
    assert "there is no C compiler named /nonexistent" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_cc_that_cannot_be_read_is_no_compiler(monkeypatch):
    monkeypatch.setenv("CC", 'gcc "x')
    with pytest.raises(OSError, match="cannot be read"):
        cpu.compiler()
