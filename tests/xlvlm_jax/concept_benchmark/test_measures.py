"""The measures and the page that explains them."""

from pathlib import Path

from xlvlm_jax.concept_benchmark.measures import MEASURES, RANKED

PAGE = Path(__file__).parents[3] / "docs" / "bench-concepts.md"


def test_the_page_explains_every_column():
    rows = [line.split("|")[1] for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    explained = {name.strip() for row in rows for name in row.split(",")}
    assert {measure.title for measure in MEASURES} <= explained


def test_names_are_distinct_and_properties_are_not_ranked():
    for field in ("name", "title"):
        assert len({getattr(measure, field) for measure in MEASURES}) == len(MEASURES)
    assert {measure.name for measure in set(MEASURES) - set(RANKED)} == {"l0"}
