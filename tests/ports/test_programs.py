"""Where compiled programs are cached, and who is notified of compilations."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from ports import programs

DIRECTORY, SECONDS = "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs"


@pytest.fixture
def undecided(monkeypatch, tmp_path):
    """Resets the settings to those of a new process, with its own cache directory."""
    before = {name: getattr(jax.config, name) for name in (DIRECTORY, SECONDS)}
    monkeypatch.setattr(programs, "_decided", False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(programs.VARIABLE, raising=False)
    monkeypatch.delenv(SECONDS.upper(), raising=False)
    jax.config.update(DIRECTORY, None)
    jax.config.update(SECONDS, 1.0)
    yield tmp_path
    jax.config.update("jax_enable_compilation_cache", True)
    for name, value in before.items():
        jax.config.update(name, value)
    programs.jax_cache.reset_cache()


def kept():
    programs.keep_programs()
    return getattr(jax.config, DIRECTORY)


def test_the_users_cache_directory(undecided):
    expected = undecided / "xlvlm-jax" / "programs"
    assert kept() == str(expected)
    assert expected.stat().st_mode & 0o777 == 0o700
    assert jax.config.jax_persistent_cache_min_compile_time_secs == 0.5


@pytest.mark.parametrize("empty", ["", "relative/path"])
def test_a_path_that_xdg_ignores(undecided, monkeypatch, empty):
    monkeypatch.setenv("XDG_CACHE_HOME", empty)
    monkeypatch.setenv("HOME", str(undecided))
    assert kept() == str(undecided / ".cache" / "xlvlm-jax" / "programs")


@pytest.mark.parametrize("off", ["", "0", "off", "OFF"])
def test_the_variable_turns_it_off(undecided, monkeypatch, off):
    monkeypatch.setenv(programs.VARIABLE, off)
    assert kept() is None
    assert list(undecided.iterdir()) == []


def test_the_variable_moves_it(undecided, monkeypatch):
    monkeypatch.setenv(programs.VARIABLE, str(undecided / "here"))
    assert kept() == str(undecided / "here")


def test_jaxs_own_settings_stay(undecided):
    jax.config.update(DIRECTORY, str(undecided / "mine"))
    jax.config.update(SECONDS, 3.0)
    assert kept() == str(undecided / "mine")
    assert jax.config.jax_persistent_cache_min_compile_time_secs == 3.0
    assert not (undecided / "xlvlm-jax").exists()


def test_jax_without_a_cache_stays_without(undecided):
    jax.config.update("jax_enable_compilation_cache", False)
    assert kept() is None
    assert programs.compilation_cache(undecided) is None


def test_the_call_decides_whatever_comes_later(undecided):
    assert programs.compilation_cache(undecided / "a") == undecided / "a"
    assert kept() == str(undecided / "a")
    assert programs.compilation_cache(None) is None
    assert kept() is None


def test_a_directory_that_cannot_be_created_is_not_an_error(undecided, caplog):
    (undecided / "file").write_text("")
    with caplog.at_level("INFO", logger="ports"):
        assert programs.compilation_cache(undecided / "file" / "programs") is None
    assert "compiled programs are not cached in" in caplog.text
    assert jax.config.jax_compilation_cache_dir is None


def test_a_requested_directory_that_cannot_be_created_is_reported(undecided, monkeypatch, caplog):
    (undecided / "file").write_text("")
    monkeypatch.setenv(programs.VARIABLE, str(undecided / "file" / "programs"))
    with caplog.at_level("WARNING", logger="ports"):
        assert kept() is None
    assert "XLVLM_COMPILATION_CACHE is" in caplog.text and "is not writable" in caplog.text


# Something is compiled first: the cache is chosen later than JAX's first program.
SCRIPT = """
import sys
import jax, jax.numpy as jnp
jnp.ones(3) + 1
import xlvlm_jax
assert jax.config.jax_compilation_cache_dir is None
import numpy as np
from jax import monitoring
hits = []
monitoring.register_event_listener(lambda name, **_: hits.append(name.endswith("/cache_hits")))
Z = np.random.default_rng(0).normal(size=(40, 30)).astype("float32")
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
concepts = xlvlm_jax.decompose(Z, 3, "simple", key=jax.random.key(0))
print(sum(hits) > 0, concepts.objective)
"""
SILENT = "import warnings; warnings.simplefilter('ignore')"
# As on a full disk, the rest of a file that is longer is not written.
FULL = """
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, ({0}, {0}))
"""


def start(script, **variables) -> subprocess.Popen:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLVLM_"))}
    environment |= {"JAX_PLATFORMS": "cpu", **variables}
    command = [sys.executable, "-W", "error::UserWarning:jax", "-c", script]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True)


def run(script, **variables) -> tuple[list[str], str]:
    process = start(script, **variables)
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    return output.split(), errors


def test_a_second_process_takes_its_programs_from_the_cache(tmp_path):
    first, _ = run(SCRIPT, XDG_CACHE_HOME=str(tmp_path))
    second, errors = run(SCRIPT, XDG_CACHE_HOME=str(tmp_path))
    assert (first[0], second[0]) == ("False", "True")
    assert first[1] == second[1]
    assert errors == ""
    # A damaged program, such as a killed process leaves, is compiled again.
    for file in (tmp_path / "xlvlm-jax" / "programs").iterdir():
        file.write_bytes(file.read_bytes()[:100])
    damaged, _ = run(SILENT + SCRIPT, XDG_CACHE_HOME=str(tmp_path))
    assert damaged == first


def test_several_processes_share_the_cache(tmp_path):
    together = [start(SILENT + SCRIPT, XDG_CACHE_HOME=str(tmp_path)) for _ in range(3)]
    objectives = {process.communicate()[0].split()[1] for process in together}
    assert [process.returncode for process in together] == [0, 0, 0]
    later, errors = run(SCRIPT, XDG_CACHE_HOME=str(tmp_path))
    assert later[0] == "True" and {later[1]} == objectives
    assert errors == ""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="uses Linux's /proc and limits")
def test_a_full_or_read_only_disk_is_not_an_error(tmp_path):
    fine, _ = run(SCRIPT, XDG_CACHE_HOME=str(tmp_path / "fine"))
    # Nobody can write into this directory, not even root, whom permissions do not stop.
    read_only, errors = run(SCRIPT, XLVLM_COMPILATION_CACHE="/proc/self/fdinfo")
    assert read_only == fine
    assert "is not writable" in errors
    full, errors = run(FULL.format(2**10) + SCRIPT, XDG_CACHE_HOME=str(tmp_path / "full"))
    assert full == fine
    assert errors == ""
    assert list((tmp_path / "full" / "xlvlm-jax" / "programs").iterdir()) == []


def test_importing_starts_no_backend_and_sets_nothing():
    script = (
        "import jax, ports, xlvlm_jax; from jax._src import xla_bridge; "
        "print(xla_bridge.backends_are_initialized(), jax.config.jax_compilation_cache_dir)"
    )
    assert run(script)[0] == ["False", "None"]


def test_a_long_compilation_is_reported_and_a_short_one_is_not(monkeypatch):
    told, x = [], jnp.ones(8)

    @jax.jit
    def long_program(x):
        for i in range(60):
            x = jnp.sort(jnp.sin(x) * i)
        return x

    with programs.telling_compilations(
        told.append, lambda name, seconds: told.append((name, seconds > 0))
    ):
        monkeypatch.setattr(programs, "_PATIENCE", 0.02)
        long_program(x).block_until_ready()
        monkeypatch.setattr(programs, "_PATIENCE", 30)
        jax.jit(lambda x: x + 17)(x).block_until_ready()
    assert told == ["long_program", ("long_program", True)]


def test_bytes_of_a_program_on_a_device():
    rows = jax.ShapeDtypeStruct((64, 32), jnp.float32)
    lowered = jax.jit(lambda x: x @ x.T).lower(rows)
    arguments, others = programs.program_bytes(lowered)
    assert arguments == 64 * 32 * 4
    assert others >= 64 * 64 * 4


def test_a_compiler_that_does_not_report_bytes():
    class Untold:
        def compile(self):
            return self

        def memory_analysis(self):
            return None

    with pytest.raises(ValueError, match="compiler for cpu does not report a program's memory"):
        programs.program_bytes(Untold())
