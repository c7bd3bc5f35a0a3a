"""The files at the root agree with each other and with what CI runs."""

import re
import tomllib
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["version"]
README = (ROOT / "README.md").read_text("utf-8")


def test_ci_runs_the_two_commands_of_the_readme():
    ran = (ROOT / ".ci" / "run").read_text("utf-8").splitlines()
    commands = [line for line in README.splitlines() if line.startswith("pip install -e ")]
    assert len(commands) == 2
    for command in commands:
        assert command in ran


def test_readme_is_short():
    assert len(README.split()) <= 700


def test_citation_and_changelog_know_the_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert citation["version"] == VERSION
    assert f"## {VERSION}" in (ROOT / "CHANGELOG.md").read_text("utf-8")


def test_links_to_files_lead_somewhere():
    for name in ("README.md", "CONTRIBUTING.md", "ARCHITECTURE.md", "CHANGELOG.md"):
        text = (ROOT / name).read_text("utf-8")
        for target in re.findall(r"\]\(([^)#:]+)\)", text):
            assert (ROOT / target).exists(), f"{name} links to {target}"


def test_drawing_of_the_architecture_names_every_room():
    text = (ROOT / "ARCHITECTURE.md").read_text("utf-8")
    for package in ("ports", "xlvlm_jax"):
        for room in (ROOT / package).iterdir():
            if (room / "__init__.py").exists():
                assert re.search(rf"\b{room.name}\b", text), f"{package}/{room.name}"
