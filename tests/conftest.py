"""Settings and fixtures of all tests: no downloads, exact products, shared compiled programs."""

import atexit
import os
import shutil
import tempfile

from jaxlib.version import __version_info__ as jaxlib_version

# Before transformers and tokenizers are imported, which read them once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# The tests describe one device; those that need several start a process of their own.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_DEFAULT_MATMUL_PRECISION"] = "highest"
# Most of the time goes into compiling programs that then run for milliseconds. Without LLVM's
# optimisations, each program in one piece instead of one for each core, and with the emitters that
# jaxlib had before 0.11, that takes less than 0.4 of the time; XLA's own passes stay. With
# XLA_FLAGS set, even to nothing, the tests compile as users do.
if "XLA_FLAGS" not in os.environ:
    emitters = " --xla_cpu_use_fusion_emitters=false" if jaxlib_version < (0, 11) else ""
    os.environ["XLA_FLAGS"] = (
        "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1" + emitters
    )
# A program is compiled once for all workers and the processes that tests start, and kept for this
# run alone: a test finds nothing that an earlier run left.
if "PYTEST_XDIST_WORKER" not in os.environ:
    programs = tempfile.mkdtemp(prefix="programs-")
    atexit.register(shutil.rmtree, programs, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = programs
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

import copy
import gc
import importlib.util
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import jax
import jaxtyping
import pytest

# In these rooms, shapes and types in signatures are checked at every call, and an error names the
# argument. An int counts as a float, as for type checkers. `ports` and the command line have no
# shapes in their signatures, and the type checker checks their types. Drawing scenes would take 2.6
# times as long.
DATA = Path(__file__).parents[1] / "xlvlm_jax" / "data"
CHECKED = (
    "xlvlm_jax.causal",
    "xlvlm_jax.concept_benchmark",
    "xlvlm_jax.concepts",
    *(f"xlvlm_jax.data.{file.stem}" for file in DATA.glob("[a-z]*.py")),
    "xlvlm_jax.demo",
    "xlvlm_jax.evaluation",
    "xlvlm_jax.features",
    "xlvlm_jax.finetune",
    "xlvlm_jax.lenses",
    "xlvlm_jax.metrics",
    "xlvlm_jax.playground",
    "xlvlm_jax.report",
    "xlvlm_jax.sae",
    "xlvlm_jax.shift",
    "xlvlm_jax.solvers",
    "xlvlm_jax.steering",
    "xlvlm_jax.storage",
)
jaxtyping.install_import_hook(
    CHECKED, "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"
)

# See `pytest_collection_finish`. A higher threshold: imports alone create many objects.
gc.set_threshold(50_000, 20, 20)

# The first example of a test may compile a program; the machine may be busy.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")


# The helpers of tests/ports make checkpoints with PyTorch.
_USES_TORCH = re.compile(
    r"^(import|from) (torch|peft)\b|^from \.\S* import .*(helpers|\btest_)|"
    r"^from \.\S*(_helpers|test_models|test_vlm) import",
    re.M,
)
_TORCH_IS_MISSING = importlib.util.find_spec("torch") is None


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Skips files and folders that compare with PyTorch if it is not installed."""
    conftest = collection_path / "conftest.py"
    file = conftest if conftest.exists() else collection_path
    if _TORCH_IS_MISSING and file.suffix == ".py" and _USES_TORCH.search(file.read_text()):
        return True
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Moves files with slow tests to the front, so that no worker waits for another at the end."""
    slow = {item.path for item in items if "slow" in item.keywords}
    items.sort(key=lambda item: item.path not in slow)


@pytest.hookimpl(trylast=True)
def pytest_collection_finish() -> None:
    """Keeps the collector from scanning, again and again, the modules that were imported.

    Tracing makes many objects that live on: by Python's defaults, a tenth of the time of the tests
    goes into looking for cycles among them.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def signatures(request: pytest.FixtureRequest) -> Iterator[None]:
    """Switches off the check of signatures in tests marked `wrong_types`."""
    jaxtyping.config.update("jaxtyping_disable", "wrong_types" in request.keywords)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="module", autouse=True)
def few_programs() -> Iterator[None]:
    """Drops compiled programs between two files before they hold too many memory mappings.

    Each holds memory mappings, and Linux allows a process 65,530; a worker that runs out of them
    ends with a segmentation fault.
    """
    yield
    mappings = Path("/proc/self/maps")
    if mappings.exists() and mappings.read_bytes().count(b"\n") > 20_000:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="session", autouse=True)
def traced_once() -> Iterator[None]:
    """Lets modules of equal sizes share the shapes of their parameters, known from tracing.

    Each command that a test runs here loads a model, and would trace the same module again.
    """
    from ports import checkpoint

    found: dict[Any, dict] = {}
    trace = checkpoint.abstract_params

    def once(module: Any, inputs: Any) -> dict:
        leaves, tree = jax.tree.flatten(inputs)
        key = module, tree, *((leaf.shape, leaf.dtype) for leaf in leaves)
        if key not in found:
            found[key] = trace(module, inputs)
        return copy.deepcopy(found[key])  # callers may change what they get

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "abstract_params", once)
        yield


@pytest.fixture(scope="session")
def shared() -> Path:
    """Returns the folder of real configurations and reference outputs next to a checkout."""
    path = Path(__file__).parents[2] / "shared"
    if not path.is_dir():
        pytest.skip("no ../shared beside this checkout")
    return path


@pytest.fixture(scope="session")
def vlm():
    """Returns the embedded LLaVA, unless a folder overrides it; tests do not change it."""
    import ports
    from xlvlm_jax.demo import embedded

    return ports.load(embedded.LLAVA)


@pytest.fixture(scope="session")
def clip():
    """Returns the embedded CLIP pair."""
    from ports.models import clip
    from xlvlm_jax.demo import embedded

    return clip.load_dual_encoder(embedded.CLIP)


@pytest.fixture
def encoded(monkeypatch) -> list[int]:
    """How many pictures each run of a model from now on gives to its vision tower."""
    from ports import passes

    numbers = []

    def counting(run: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **options: Any) -> Any:
            leaves = jax.tree_util.tree_leaves_with_path((args, options))
            named = ((jax.tree_util.keystr(path), leaf) for path, leaf in leaves)
            numbers.append(sum(len(leaf) for name, leaf in named if "'pixel_values'" in name))
            return run(*args, **options)

        return counted

    for name in ("generate", "states"):
        monkeypatch.setattr(passes, name, counting(getattr(passes, name)))
    return numbers


class ThreeWords:
    """A head and tokenizer whose three words are the first three columns of the states."""

    directory = fingerprint = None
    attention_heads = ()

    @property
    def __class__(self):  # as far as isinstance sees
        import ports

        return ports.VLM

    def unembed(self, x):
        return x[:, :3]

    def is_before_norm(self, site):
        return False

    def is_head(self, site):
        return False

    @property
    def tokenizer(self):
        return self

    def decode(self, ids):
        return ("dog", "beach", "the")[ids[0]]


@pytest.fixture
def three_words() -> ThreeWords:
    """Returns the parts of a model that grounding needs."""
    return ThreeWords()


@pytest.fixture
def xlvlm(monkeypatch, capsys) -> Callable[..., tuple[int, str, str]]:
    """xlvlm(*arguments) runs the command line and returns (status, output, errors)."""
    from xlvlm_jax import cli

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["xlvlm", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        captured = capsys.readouterr()
        return end.value.code, captured.out, captured.err

    return run
