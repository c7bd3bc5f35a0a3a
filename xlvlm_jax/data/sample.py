"""One image with its prompt, as every reader gives it."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Sample:
    """One image, what the model is asked about it, and what people said.

    Attributes:
        id: no other sample of the data set has it.
        image: the file.
        image_id: several samples may ask about one image.
        prompt: before the model's chat template is put around it.
        references: captions, or the answers of each annotator.
        metadata: what else the data set knows, JSON values: `question`, `answer` and `answer_type`
            for VQAv2, `attributes` where the data set has a file of them.
    """

    id: str
    image: Path
    image_id: str
    prompt: str
    references: tuple[str, ...] = ()
    metadata: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """As JSON values, metadata beside the rest."""
        return {
            "id": self.id,
            "image": str(self.image),
            "image_id": self.image_id,
            "prompt": self.prompt,
            "references": list(self.references),
            **self.metadata,
        }
