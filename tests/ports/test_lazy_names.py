"""Names that are imported when they are first used."""

import importlib
import subprocess
import sys
import types

import pytest

import ports
import ports.checkpoint
import xlvlm_jax
import xlvlm_jax.concepts

PACKAGES = (ports, ports.checkpoint, xlvlm_jax, xlvlm_jax.concepts)


@pytest.fixture
def package(tmp_path, monkeypatch) -> types.ModuleType:
    """Creates a package `lazily` with two modules; its stub exports three names."""
    folder = tmp_path / "lazily"
    folder.mkdir()
    (folder / "__init__.py").write_text(
        '"""Two modules."""\nfrom ports import lazy_names\n\nlazy_names.attach(__name__)\n'
    )
    (folder / "__init__.pyi").write_text(
        "from lazily import second\n"
        "from lazily.first import double, half as halved\n\n"
        '__all__ = ["double", "second"]\n'
    )
    (folder / "first.py").write_text("def double(x): return 2 * x\ndef half(x): return x / 2\n")
    (folder / "second.py").write_text("VALUE = 7\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("lazily")
    for name in [name for name in sys.modules if name.split(".")[0] == "lazily"]:
        del sys.modules[name]


def test_a_name_is_imported_when_it_is_used(package):
    assert "lazily.first" not in sys.modules
    assert package.double(21) == 42
    assert "lazily.first" in sys.modules and "lazily.second" not in sys.modules
    # From now on the name is an ordinary one.
    assert vars(package)["double"] is sys.modules["lazily.first"].double


def test_another_name_and_a_submodule(package):
    assert package.halved(6) == 3
    assert package.second.VALUE == 7
    assert package.first.half(6) == 3


def test_all_names_are_listed_before_they_are_used(package):
    assert package.__all__ == ["double", "second"]
    assert {"double", "halved", "second"} <= set(dir(package))
    assert "lazily.first" not in sys.modules
    everything: dict = {}
    exec("from lazily import *", everything)
    assert everything["double"](1) == 2 and "halved" not in everything


def test_an_unknown_name(package):
    with pytest.raises(AttributeError, match="module 'lazily' has no attribute 'treble'"):
        package.treble  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'treble' from 'lazily'"):
        exec("from lazily import treble")
    assert not hasattr(package, "_private")


def test_an_error_within_a_module_is_its_own(package, tmp_path):
    (tmp_path / "lazily" / "third.py").write_text("import no_such_module_anywhere\n")
    importlib.invalidate_caches()
    with pytest.raises(ModuleNotFoundError, match="no_such_module_anywhere"):
        package.third  # noqa: B018


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)
def test_every_exported_name_is_there(package):
    assert package.__all__ == sorted(set(package.__all__), key=package.__all__.index)
    assert set(package.__all__) <= set(dir(package))
    for name in package.__all__:
        assert getattr(package, name) is not None


def test_many_threads_at_once():
    """They import the packages and other modules at the same time."""
    script = (
        "from concurrent.futures import ThreadPoolExecutor\n"
        "names = ['xlvlm_jax.decompose', 'ports.load', 'xlvlm_jax.project', 'ports.add'] * 4\n"
        "def get(name):\n"
        "    package, _, name = name.partition('.')\n"
        "    return getattr(__import__(package), name).__name__\n"
        "with ThreadPoolExecutor(16) as pool:\n"
        "    print(sorted(set(pool.map(get, names))))"
    )
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert process.stdout == "['add', 'decompose', 'load', 'project']\n", process.stderr
