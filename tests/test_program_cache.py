"""Compiled programs kept on disk: used, bounded, turned off, and never in the way."""

import contextlib
import os
import resource
import tempfile
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache
from toys import stack

import ssd_jax
from ssd_jax import memory, program_cache
from ssd_jax.batch import _make_room, _programs

SETTINGS = (
    "jax_compilation_cache_dir",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_compilation_cache_max_size",
    "jax_enable_compilation_cache",
)


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("SSD_JAX_CACHE", str(tmp_path))
    return tmp_path / "compiled"


@pytest.fixture
def setting():
    """Changes JAX's settings for one test. JAX reads them once, at its first look-up."""
    saved = {name: getattr(jax.config, name) for name in SETTINGS}
    compilation_cache.reset_cache()
    yield jax.config.update
    for name, value in saved.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@contextlib.contextmanager
def unprivileged():
    """Root writes everywhere; for a while this process is somebody else."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


def compile_program(factor: float = 2.0) -> bool:
    """Compile a program of its own for each ``factor``; whether it was kept."""
    lowered = jax.jit(lambda x: x * factor).lower(jnp.ones(3))
    with program_cache.keeping() as origin:
        assert lowered.compile()(jnp.ones(3))[0] == factor
    return origin.kept


def entries(folder: Path) -> list[Path]:
    return sorted(folder.glob("*-cache"))


def test_generate_reads_back_what_an_earlier_process_compiled(folder):
    tiny, run = stack(), dict(max_new_tokens=4, mode="baseline")

    def as_in_a_new_process():
        # What was traced before decides which functions of a program are shared, and so its key.
        _programs.clear()
        jax.clear_caches()

    as_in_a_new_process()
    first = ssd_jax.generate(tiny, [1, 2], **run)
    again = ssd_jax.generate(tiny, [1, 2], **run)
    as_in_a_new_process()
    third = ssd_jax.generate(tiny, [1, 2], **run)
    assert [r.stats.from_cache for r in (first, again, third)] == [False, False, True]
    assert again.stats.compile_seconds == 0 < third.stats.compile_seconds
    assert first.tokens == third.tokens
    assert [path.name.split("-")[0] for path in entries(folder)] == ["jit_decode"]


def test_jax_is_left_as_it_was(folder):
    before = [getattr(jax.config, name) for name in SETTINGS]
    compile_program()
    kept = entries(folder)
    jax.jit(lambda x: x + 41.0)(jnp.ones(3))
    assert [getattr(jax.config, name) for name in SETTINGS] == before
    assert entries(folder) == kept


def test_a_cache_of_the_users_own_is_used_instead(folder, tmp_path, setting):
    setting("jax_compilation_cache_dir", str(tmp_path / "own"))
    setting("jax_persistent_cache_min_compile_time_secs", 0.0)
    assert [compile_program(), compile_program()] == [False, True]
    assert len(entries(tmp_path / "own")) == 1
    assert not folder.exists()
    setting("jax_persistent_cache_min_compile_time_secs", 1e6)
    assert not compile_program(3.0)
    assert len(entries(tmp_path / "own")) == 1


def test_the_switch_of_jax_turns_it_off(folder, setting):
    setting("jax_enable_compilation_cache", False)
    assert not compile_program()
    assert not compile_program()
    assert not folder.exists()


def test_a_folder_that_cannot_be_made_does_no_harm(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("SSD_JAX_CACHE", str(tmp_path / "file"))
    assert not compile_program()
    assert not compile_program()


def test_a_read_only_folder_is_read(monkeypatch):
    with tempfile.TemporaryDirectory(dir="/tmp") as cache:  # whose parents all may pass
        Path(cache).chmod(0o755)
        monkeypatch.setenv("SSD_JAX_CACHE", cache)
        compile_program()
        (Path(cache) / "compiled").chmod(0o555)
        with unprivileged():
            assert compile_program()
            assert not compile_program(3.0)


def test_a_full_disk_leaves_nothing_half_written(folder):
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, unlimited[1]))
    try:
        assert not compile_program()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert not entries(folder)
    assert [compile_program(), compile_program()] == [False, True]


def test_a_damaged_entry_is_replaced(folder):
    compile_program()
    (entry,) = entries(folder)
    entry.write_bytes(entry.read_bytes()[:100])
    assert [compile_program() for _ in range(3)] == [False, False, True]


def test_the_oldest_programs_make_room(folder, monkeypatch):
    for factor in (2.0, 3.0):
        compile_program(factor)
    for age, path in enumerate(sorted(entries(folder), key=lambda path: path.stat().st_mtime)):
        os.utime(path, (1000 + age, 1000 + age))
    (folder / "notes.txt").write_text("not ours")
    size = max(path.stat().st_size for path in entries(folder))
    monkeypatch.setattr(program_cache, "MAX_BYTES", 2 * size + 100)
    assert not compile_program(4.0)
    assert len(entries(folder)) == 2
    assert [compile_program(factor) for factor in (4.0, 3.0, 2.0)] == [True, True, False]
    assert (folder / "notes.txt").exists()


def test_other_warnings_come_through(folder):
    with pytest.warns(UserWarning, match="of the user's"), program_cache.keeping():
        warnings.warn("of the user's", stacklevel=1)


def test_programs_make_room_for_others_before_the_process_runs_out_of_mappings(folder, monkeypatch):
    tiny, run = stack(), dict(mode="baseline")
    _programs.clear()
    monkeypatch.setattr(memory, "mappings", lambda: float(len(_programs)))
    long = ssd_jax.generate(tiny, [1, 2], max_new_tokens=100, **run)
    short = ssd_jax.generate(tiny, [1, 2], max_new_tokens=4, **run)
    assert len(_programs) == 1 and short.stats.compile_seconds > 0
    assert ssd_jax.generate(tiny, [1, 2], max_new_tokens=4, **run).stats.compile_seconds == 0
    again = ssd_jax.generate(tiny, [1, 2], max_new_tokens=100, **run)
    assert len(_programs) == 1 and again.stats.compile_seconds > 0
    assert again.tokens == long.tokens


def test_the_program_used_last_is_kept_and_a_dropped_one_gives_its_mappings_back(monkeypatch):
    tiny, used = stack(), memory.mappings
    if not used():
        pytest.skip("no limit on mappings here")
    _programs.clear()
    for tokens in (4, 100, 4):
        ssd_jax.generate(tiny, [1, 2], max_new_tokens=tokens, mode="baseline")
    _, latest = _programs
    monkeypatch.setattr(memory, "mappings", lambda: float(len(_programs) - 1))
    before = used()
    _make_room()
    assert list(_programs) == [latest]
    assert used() < before


def test_programs_stay_where_the_mappings_are_not_theirs(monkeypatch):
    tiny = stack()
    _programs.clear()
    for tokens in (4, 100):
        ssd_jax.generate(tiny, [1, 2], max_new_tokens=tokens, mode="baseline")
    monkeypatch.setattr(memory, "mappings", lambda: 0.9)
    _make_room()
    assert len(_programs) == 1
