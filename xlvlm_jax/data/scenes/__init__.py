"""Scenes: drawn pictures with captions and questions, a bundled data set with a ground truth.

`sample_scene` chooses the content of a picture, `draw` draws it, `captions`, `questions` and
`check` generate what a person might say about it, and `write` stores everything in the layouts of
COCO (Karpathy's splits) and VQAv2, which `load` reads as questions of POPE. Everything is
determined by a seed.
"""

from .ask import Question, check, questions, vocabulary
from .dataset import image_id, require_drawn, write
from .draw import boxes, draw, draw_pair, draw_with_masks, training_image
from .language import captions, named
from .presence import COMPANIONS, NEGATIVES, companion, mentioned_kinds
from .reader import load
from .scene import ANIMALS, COLOURS, KINDS, MOODS, PLACES, Scene, attributes, sample_scene

__all__ = [
    "ANIMALS",
    "COLOURS",
    "COMPANIONS",
    "KINDS",
    "MOODS",
    "NEGATIVES",
    "PLACES",
    "Question",
    "Scene",
    "attributes",
    "boxes",
    "captions",
    "check",
    "companion",
    "draw",
    "draw_pair",
    "draw_with_masks",
    "image_id",
    "load",
    "mentioned_kinds",
    "named",
    "questions",
    "require_drawn",
    "sample_scene",
    "training_image",
    "vocabulary",
    "write",
]
