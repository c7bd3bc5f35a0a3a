"""One image with its prompt, as returned by every reader."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Sample:
    """One image, what the model is asked about it, and what people answered.

    Attributes:
        id: unique in the data set.
        image: the file.
        image_id: several samples may ask about one image.
        prompt: without the model's chat template.
        references: captions, or the answers of each annotator.
        metadata: anything else the data set knows, JSON values: `question`, `answer` and
            `answer_type` for VQAv2, `attributes` if the data set has a file of them.
    """

    id: str
    image: Path
    image_id: str
    prompt: str
    references: tuple[str, ...] = ()
    metadata: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Returns JSON values, with the metadata next to the other fields."""
        return {
            "id": self.id,
            "image": str(self.image),
            "image_id": self.image_id,
            "prompt": self.prompt,
            "references": list(self.references),
            **self.metadata,
        }
