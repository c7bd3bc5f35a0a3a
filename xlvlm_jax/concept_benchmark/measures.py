"""The measures of the benchmark: names, ranges, and which direction is better."""

from typing import NamedTuple


class Measure(NamedTuple):
    """One figure of a dictionary.

    Attributes:
        name: the key in `Scores.values`.
        title: the heading of its column.
        higher: whether higher is better; None for a property that is not ranked.
        null: what a dictionary that says nothing scores.
    """

    name: str
    title: str
    higher: bool | None
    null: str


MEASURES = (
    Measure("explained_variance", "explained", True, "0: the mean state"),
    Measure("l0", "L0", None, "none"),
    Measure("dead_share", "dead", False, "none"),
    Measure("loss_recovered", "loss", True, "0: the mean state"),
    Measure("probing_1", "probe 1", True, "0.5"),
    Measure("probing_5", "probe 5", True, "0.5"),
    Measure("perturbation", "targeted", True, "0"),
    Measure("absorption", "absorbed", False, "none"),
    Measure("splitting", "split", False, "none"),
    Measure("pointing", "points", True, "share of cells in the region, of a random cell"),
    Measure("map_auc", "map", True, "0.5"),
    Measure("map_which", "which", True, "0.5"),
    Measure("monosemanticity", "mono", True, "mean similarity of two pictures"),
    Measure("stability", "stable", True, "of random directions"),
    Measure("information", "tells", True, "of shuffled pictures"),
    Measure("disentanglement", "one each", True, "none"),
    Measure("completeness", "complete", True, "none"),
    Measure("naming", "named", True, "of shuffled words"),
    Measure("causal", "causal", True, "of shuffled words"),
)
RANKED = tuple(measure for measure in MEASURES if measure.higher is not None)
