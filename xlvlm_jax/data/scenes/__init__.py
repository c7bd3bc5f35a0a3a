"""Scenes: drawn pictures with captions and questions, a bundled data set with a ground truth.

`sample_scene` chooses the content of a picture, `draw` draws it, `captions`, `questions` and
`check` generate what a person might say about it, and `write` stores everything in the layouts of
COCO (Karpathy's splits) and VQAv2. Everything is determined by a seed.
"""

from .ask import Question, check, questions, vocabulary
from .dataset import image_id, write
from .draw import boxes, draw, draw_with_masks, training_image
from .language import captions, named
from .scene import ANIMALS, COLOURS, KINDS, MOODS, PLACES, Scene, attributes, sample_scene

__all__ = [
    "ANIMALS",
    "COLOURS",
    "KINDS",
    "MOODS",
    "PLACES",
    "Question",
    "Scene",
    "attributes",
    "boxes",
    "captions",
    "check",
    "draw",
    "draw_with_masks",
    "image_id",
    "named",
    "questions",
    "sample_scene",
    "training_image",
    "vocabulary",
    "write",
]
