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


def test_links_between_pages_lead_somewhere_in_a_checkout():
    docs = ROOT / "docs"
    made = {docs / "commands.md"}  # by docs/hooks.py
    for page in docs.rglob("*.md"):
        for target in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", page.read_text("utf-8")):
            path = (page.parent / target).resolve()
            assert path.exists() or path in made, f"{page} links to {target}"


def test_files_that_pages_for_contributors_name_exist():
    for name in ("CONTRIBUTING.md", "ARCHITECTURE.md", "benchmarks/README.md"):
        text = (ROOT / name).read_text("utf-8")
        paths = re.findall(r"`((?:\.ci|benchmarks|docs|ports|tests|xlvlm_jax)/[\w/.-]+)`", text)
        # Results are written there, and not kept.
        missing = [path for path in paths if not (ROOT / path).exists()]
        assert missing in ([], ["benchmarks/results/"]), name
    for row in re.findall(r"^\| (`.*?) \|", text, re.M):
        for benchmark in re.findall(r"`([\w.]+)`", row):
            path = ROOT / "benchmarks" / benchmark.removesuffix(".sh").replace(".", "/")
            assert any(path.with_suffix(end).exists() for end in ("", ".py", ".sh")), benchmark


def test_drawing_of_the_architecture_names_only_what_exists():
    text = (ROOT / "ARCHITECTURE.md").read_text("utf-8")
    head, *lines = text.partition("```text\n")[2].partition("```")[0].splitlines()
    found = 0
    middle = head.index("ports/")
    for package, start, end in (("xlvlm_jax", 0, middle), ("ports", middle, None)):
        for line in lines:
            if room := re.match(r" {2,3}(\w+)/? ", line[start:end]):
                path = ROOT / package / room[1]
                assert path.is_dir() or path.with_suffix(".py").exists(), f"{package}/{room[1]}"
                found += 1
    assert found > 20


def test_drawing_of_the_architecture_names_every_room():
    text = (ROOT / "ARCHITECTURE.md").read_text("utf-8")
    for package in ("ports", "xlvlm_jax"):
        for room in (ROOT / package).iterdir():
            if (room / "__init__.py").exists():
                assert re.search(rf"\b{room.name}\b", text), f"{package}/{room.name}"
