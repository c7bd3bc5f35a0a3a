"""Compiled programs: kept in a directory between processes, and a word while one is being made."""

import contextlib
import functools
import logging
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
from jax import monitoring
from jax.experimental.compilation_cache import compilation_cache as jax_cache

VARIABLE = "XLVLM_COMPILATION_CACHE"
_OFF = ("", "0", "off", "none", "false")
# JAX keeps what took a second: of our programs those just below it add up.
_WORTH_KEEPING = 0.5
_MINIMUM = "jax_persistent_cache_min_compile_time_secs"
# JAX records this name as a scalar when a compilation begins, and as a duration when it ends.
_COMPILATION = "/jax/core/compile/backend_compile_duration"
_PATIENCE = 2.0  # seconds of compilation that nobody need be told of

_logger = logging.getLogger("ports")
_decided = False


def compilation_cache(directory: str | Path | None) -> Path | None:
    """Keeps compiled programs in a directory, or in none, whatever was set before.

    Without a call they are kept in `xlvlm-jax/programs` of the user's cache directory
    ($XDG_CACHE_HOME, else ~/.cache) from the first `ports.load` or `decompose` on, unless the
    environment variable XLVLM_COMPILATION_CACHE names another directory or says "off", or JAX was
    told about its cache. This is JAX's own persistent cache: it also keeps the caller's programs
    that take half a second to compile, several processes may share it, and it runs what it reads,
    so that nobody else may write into it.

    Args:
        directory: made if it is missing. None: programs are not kept.

    Returns:
        The directory, or None if programs are not kept: it can't be written, or JAX's option
        jax_enable_compilation_cache is off.
    """
    global _decided
    _decided = True
    usable = None
    if directory is not None and jax.config.values["jax_enable_compilation_cache"]:
        usable = _writable(Path(directory).expanduser().absolute())
    jax.config.update("jax_compilation_cache_dir", usable and str(usable))
    # JAX looks at the directory once.
    jax_cache.reset_cache()
    if usable is not None and getattr(jax.config, _MINIMUM) == 1 and not _told(_MINIMUM):
        jax.config.update(_MINIMUM, _WORTH_KEEPING)
    return usable


def keep_programs() -> None:
    """Keeps compiled programs where `compilation_cache` says, and logs long compilations; once."""
    global _decided
    _log_compilations()
    # What JAX was told goes before, in its configuration or the environment.
    if not _decided and jax.config.values["jax_compilation_cache_dir"] is None:
        directory = _chosen_directory()
        off = directory is None or not jax.config.values["jax_enable_compilation_cache"]
        if not off and compilation_cache(directory) is None and VARIABLE in os.environ:
            _logger.warning(
                "%s is %s, which can't be written: compiled programs are not kept; name another"
                " directory, or off",
                VARIABLE,
                directory,
            )
    _decided = True


def _told(option: str) -> bool:
    return option.upper() in os.environ


def _chosen_directory() -> Path | None:
    chosen = os.environ.get(VARIABLE)
    if chosen is not None:
        return None if chosen.strip().lower() in _OFF else Path(chosen)
    # XDG's rule: a path that is empty or relative does not count.
    cache = Path(os.environ.get("XDG_CACHE_HOME", ""))
    try:
        cache = cache if cache.is_absolute() else Path.home() / ".cache"
    except RuntimeError:  # a user without a home
        return None
    return cache / "xlvlm-jax" / "programs"


def _writable(directory: Path) -> Path | None:
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        if os.access(directory, os.W_OK | os.X_OK):
            return directory
        reason = "it can't be written"
    except OSError as error:
        reason = str(error)
    _logger.info("compiled programs are not kept in %s: %s", directory, reason)
    return None


def device_bytes(lowered: jax.stages.Lowered) -> tuple[int, int]:
    """Compiles a program: its bytes on a device, of the arguments and of all else.

    Raises ValueError where the backend's compiler does not tell.
    """
    memory = lowered.compile().memory_analysis()
    if memory is None:
        raise ValueError(
            f"the compiler for {jax.default_backend()} does not tell a program's memory; look at "
            "what it will need with JAX_PLATFORMS=cpu"
        )
    return memory.argument_size_in_bytes, memory.temp_size_in_bytes + memory.output_size_in_bytes


class _Telling:
    """Hears of compilations and tells of those that last."""

    def __init__(self, began: Callable[[str], None], ended: Callable[[str, float], None]):
        self._began, self._ended = began, ended
        self._lock = threading.Lock()
        self._waiting: dict[int, threading.Timer] = {}  # of the threads that compile
        self._told: set[int] = set()

    def begin(self, event: str, value: float, fun_name: str | int = "", **_: object) -> None:
        """Starts to wait."""
        if event == _COMPILATION:
            thread = threading.get_ident()
            timer = threading.Timer(_PATIENCE, self._tell, (thread, _plain(fun_name)))
            timer.daemon = True
            self._waiting[thread] = timer
            timer.start()

    def _tell(self, thread: int, name: str) -> None:
        with self._lock:
            if thread in self._waiting:
                self._told.add(thread)
                self._began(name)

    def end(self, event: str, duration_secs: float, fun_name: str | int = "", **_: object) -> None:
        """Stops to wait, or tells the end."""
        if event != _COMPILATION:
            return
        thread = threading.get_ident()
        with self._lock:
            timer = self._waiting.pop(thread, None)
            told = thread in self._told
            self._told.discard(thread)
        if timer is not None:
            timer.cancel()
        if told:
            self._ended(_plain(fun_name), duration_secs)


def _plain(name: str | int) -> str:
    return str(name).removeprefix("jit(").removesuffix(")")


def _listen(telling: _Telling) -> None:
    monitoring.register_scalar_listener(telling.begin)
    monitoring.register_event_duration_secs_listener(telling.end)


@contextlib.contextmanager
def telling_compilations(
    began: Callable[[str], None], ended: Callable[[str, float], None]
) -> Iterator[None]:
    """While the context is open, compilations that last two seconds are told.

    Args:
        began: called with the program's name, from another thread.
        ended: called with the name and the seconds it took.
    """
    telling = _Telling(began, ended)
    _listen(telling)
    try:
        yield
    finally:
        monitoring.unregister_scalar_listener(telling.begin)
        monitoring.unregister_event_duration_listener(telling.end)


@functools.cache
def _log_compilations() -> None:
    """Long compilations are logged as "ports", at the level INFO, for the rest of the process."""
    _listen(
        _Telling(
            lambda name: _logger.info("compiling %s; this may take a while", name),
            lambda name, seconds: _logger.info("compiled %s in %.1f s", name, seconds),
        )
    )
