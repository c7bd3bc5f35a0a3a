"""Compiled programs: a cache directory shared between processes, and messages on slow compiles."""

import contextlib
import functools
import logging
import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
from jax import monitoring
from jax.experimental.compilation_cache import compilation_cache as jax_cache

VARIABLE = "XLVLM_COMPILATION_CACHE"
_OFF = ("", "0", "off", "none", "false")
# JAX caches programs that took over 1 s to compile; many of ours take slightly less.
_WORTH_KEEPING = 0.5
_PROGRAM_BYTES = 2**18
_MINIMUM = "jax_persistent_cache_min_compile_time_secs"
# JAX records this name as a scalar when a compilation begins, and as a duration when it ends.
_COMPILATION = "/jax/core/compile/backend_compile_duration"
_PATIENCE = 2.0  # seconds; shorter compilations are not reported

_logger = logging.getLogger("ports")
_decided = False


def compilation_cache(directory: str | Path | None) -> Path | None:
    """Sets the directory in which compiled programs are cached, or turns the cache off.

    Without a call, the first `ports.load` or `decompose` sets it to `xlvlm-jax/programs` in the
    user's cache directory ($XDG_CACHE_HOME, else ~/.cache), unless the environment variable
    XLVLM_COMPILATION_CACHE names another directory or is "off", or JAX's cache is already
    configured. This is JAX's own persistent cache: it also caches the caller's programs that take
    over half a second to compile, and several processes may share it. JAX executes what it reads
    from the directory, so only trusted users should be able to write to it.

    Args:
        directory: created if missing; None turns the cache off.

    Returns:
        The directory, or None if nothing is cached: the directory is not writable, its disk is
        full, or JAX's option jax_enable_compilation_cache is off.

    Examples:
        >>> import ports
        >>> ports.compilation_cache(None)  # programs are not kept
    """
    global _decided
    _decided = True
    usable = None
    if directory is not None and jax.config.values["jax_enable_compilation_cache"]:
        usable = _writable(Path(directory).expanduser().absolute())
    jax.config.update("jax_compilation_cache_dir", usable and str(usable))
    # JAX reads the setting only once unless it is reset.
    jax_cache.reset_cache()
    if usable is not None and getattr(jax.config, _MINIMUM) == 1 and not _told(_MINIMUM):
        jax.config.update(_MINIMUM, _WORTH_KEEPING)
    return usable


def keep_programs() -> None:
    """Sets up the default cache (see `compilation_cache`) and the log of slow compiles, once."""
    global _decided
    _log_compilations()
    # A cache that is already configured in JAX takes precedence.
    if not _decided and jax.config.values["jax_compilation_cache_dir"] is None:
        directory = _chosen_directory()
        off = directory is None or not jax.config.values["jax_enable_compilation_cache"]
        if not off and compilation_cache(directory) is None and VARIABLE in os.environ:
            _logger.warning(
                "%s is %s, which is not writable: compiled programs are not cached; set it to"
                " another directory, or to off",
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
    # XDG's rule: empty and relative paths are ignored.
    cache = Path(os.environ.get("XDG_CACHE_HOME", ""))
    try:
        cache = cache if cache.is_absolute() else Path.home() / ".cache"
    except RuntimeError:  # the user has no home directory
        return None
    return cache / "xlvlm-jax" / "programs"


def _writable(directory: Path) -> Path | None:
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Permissions do not tell of a read-only or full disk, a file of a program's size does.
        with tempfile.TemporaryFile(dir=directory) as file:
            file.write(bytes(_PROGRAM_BYTES))
    except OSError as error:
        _logger.info("compiled programs are not cached in %s: %s", directory, error)
        return None
    return directory


def program_bytes(lowered: jax.stages.Lowered) -> tuple[int, int]:
    """Compiles a program and returns its memory on one device.

    Args:
        lowered: a lowered `jax.jit` function.

    Returns:
        Bytes of the arguments, and bytes of everything else (temporaries and outputs).

    Raises:
        ValueError: the backend's compiler does not report memory.
    """
    memory = lowered.compile().memory_analysis()
    if memory is None:
        raise ValueError(
            f"the compiler for {jax.default_backend()} does not report a program's memory; estimate"
            " it with JAX_PLATFORMS=cpu"
        )
    return memory.argument_size_in_bytes, memory.temp_size_in_bytes + memory.output_size_in_bytes


class _Telling:
    """Listens to JAX's compilation events and reports the slow ones."""

    def __init__(self, began: Callable[[str], None], ended: Callable[[str, float], None]):
        self._began, self._ended = began, ended
        self._lock = threading.Lock()
        self._waiting: dict[int, threading.Timer] = {}  # compiling thread -> its timer
        self._told: set[int] = set()

    def begin(self, event: str, value: float, fun_name: str | int = "", **_: object) -> None:
        """Starts the timer of a compilation."""
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
        """Cancels the timer; reports the end if the beginning was reported."""
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
    """Reports compilations of two seconds or more while the context is open.

    Args:
        began: called with the program's name, from another thread.
        ended: called with the program's name and its compile time in seconds.
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
    """Logs slow compilations to the logger "ports" at INFO, for the rest of the process."""
    _listen(
        _Telling(
            lambda name: _logger.info("compiling %s; this may take a while", name),
            lambda name, seconds: _logger.info("compiled %s in %.1f s", name, seconds),
        )
    )
