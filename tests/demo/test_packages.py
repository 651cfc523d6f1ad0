"""Files inside packages: found without importing, checked, cached whole or not at all."""

import sys
from pathlib import Path

import pytest

from gradsketch.demo import packages
from gradsketch.demo.packages import cached, package_file, package_folder, sha256
from gradsketch.errors import InputError


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Install a package that cannot be imported, under a pinned name."""
    folder = tmp_path / "site" / "rxnmapper"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise ImportError('its dependencies are absent')")
    (folder / "weights.bin").write_bytes(b"weights")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setattr(packages, "_PINNED", {"rxnmapper": "rxnmapper==0.4.3", "never_there": "never-there==1.0"})
    return folder


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "gradsketch"


def test_a_package_is_found_without_being_imported(package):
    assert package_folder("rxnmapper") == package
    assert "rxnmapper" not in sys.modules


def test_a_file_is_checked_before_it_is_used(package):
    good = sha256(package / "weights.bin")
    assert package_file("rxnmapper", "weights.bin", good).read_bytes() == b"weights"
    (package / "weights.bin").write_bytes(b"Weights")
    with pytest.raises(InputError, match=r"another file.*--force-reinstall rxnmapper==0\.4\.3"):
        package_file("rxnmapper", "weights.bin", good)
    with pytest.raises(InputError, match="absent"):
        package_file("rxnmapper", "other.bin", good)


def test_an_absent_package_says_what_to_type(package):
    with pytest.raises(InputError, match=r"pip install --no-deps never-there==1\.0"):
        package_folder("never_there")


def test_a_folder_is_made_once(cache):
    made = []

    def make(folder: Path) -> None:
        made.append(folder)
        (folder / "file").write_text("whole")

    assert cached("thing", make) == cached("thing", make) == cache / "thing"
    assert len(made) == 1
    assert (cache / "thing" / "file").read_text() == "whole"


def test_an_interruption_leaves_nothing_behind(cache):
    def interrupted(folder: Path) -> None:
        (folder / "half").write_text("")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached("thing", interrupted)
    assert list(cache.iterdir()) == []


def test_of_two_that_make_it_at_once_the_first_wins(cache):
    def slow(folder: Path) -> None:
        (folder / "who").write_text("second")
        (cache / "thing").mkdir()
        (cache / "thing" / "who").write_text("first")

    assert (cached("thing", slow) / "who").read_text() == "first"
    assert [path.name for path in cache.iterdir()] == ["thing"]
