"""The contract of a port: what a family of models brings, in one file, to be loaded and run.

A family's file has its configuration, its Linen module and the functions below, and ends in

    PORT = Port(config=Config, module=Llava, ...)

which `ports.loading` names in its registry, beside the model_type of config.json. Nothing else is
told of a family: the names and the layout of its parameters follow from the module (`ports.names`,
`ports.checkpoint.params`), where they lie on a mesh from the module's `axes`.

What the module class has to say is in `ports.nn.vision_language.VisionLanguageModel`: the paths of
decoder and head, `axes`, `text_decoder`, `unembed`, `embed_inputs`, and `setup` with the
checkpoint's names.
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np

from ports import checkpoint
from ports.names import Rename, module_name
from ports.nn.decoder import DecoderConfig
from ports.nn.vision_language import VisionLanguageModel


class Sizes(Protocol):
    """A family's configuration: a frozen dataclass, hashable, of what the module needs."""

    @property
    def text(self) -> DecoderConfig:
        """The decoder's."""
        ...

    @property
    def image_tokens(self) -> tuple[int, ...]:
        """Ids of the tokens that stand for an image."""
        ...

    @classmethod
    def from_hf(cls, config: Any) -> Self:
        """Reads the configuration of transformers. ValueError for a value without a port."""
        ...


def read_processor(directory: Path) -> Any:
    """The processor of a family that transformers knows. ValueError if none loads."""
    from transformers import AutoProcessor

    # The backend that needs neither torch nor torchvision, and gives everyone the same numbers;
    # remote code is neither run nor asked for.
    with checkpoint.loading(directory, "processor"):
        return AutoProcessor.from_pretrained(directory, trust_remote_code=False, backend="pil")


def read_tokenizer(directory: Path) -> Any:
    """The tokenizer of a family that transformers knows. ValueError if none loads."""
    from transformers import AutoTokenizer

    with checkpoint.loading(directory, "tokenizer"):
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=False)


def leave_processor(processor: Any, config: Any, directory: Path) -> None:
    """What is done to a processor that is complete: nothing."""


@dataclasses.dataclass(frozen=True)
class Port:
    """What a family of models brings.

    Attributes:
        config: the class of its configuration.
        module: the class of its Linen module, called with a configuration and a dtype.
        inputs: the arrays of a processor that it understands; others are left aside.
        example_inputs: (config, batch) -> shapes and dtypes of a batch with one image a row.
        prepare_inputs: (config, arrays) -> the processor's arrays as the module takes them.
            Raises ValueError where they do not fit each other.
        canonical_name: a tensor's name in any known checkpoint -> its name in the port, which is
            that on the hub; None for a mere buffer.
        transformers_name: the port's name of a tensor -> its name in today's transformers, which
            the files of adapters use.
        read_config: config.json's values -> a configuration, where transformers has none.
        read_processor: a directory -> the processor.
        complete_processor: (processor, config, directory): what its files do not say is set.
        read_tokenizer: a directory -> the tokenizer.
        image_text: how an image stands in a prompt whose template knows no images; "{}" is the
            image token.
        per_position: further arrays with one row a sample and one column a position -> what fills
            them where they are padded.
        options: arguments of `ports.load` that are fields of its configuration -> their values, the
            default first.
    """

    config: type[Sizes]
    module: type[VisionLanguageModel]
    inputs: tuple[str, ...]
    example_inputs: Callable[..., dict[str, Any]]
    prepare_inputs: Callable[[Any, Mapping[str, np.ndarray]], dict[str, np.ndarray]]
    canonical_name: Rename
    transformers_name: Callable[[str], str] = str
    read_config: Callable[[dict[str, Any]], Any] | None = None
    read_processor: Callable[[Path], Any] = read_processor
    complete_processor: Callable[[Any, Any, Path], None] = leave_processor
    read_tokenizer: Callable[[Path], Any] = read_tokenizer
    image_text: str = "{}"
    per_position: Mapping[str, int] = dataclasses.field(default_factory=dict)
    options: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)

    def hub_name(self, module: str) -> str:
        """The port's name of a module, of its name in any known checkpoint or in transformers."""
        return module_name(self.canonical_name, module)
