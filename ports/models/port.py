"""The contract of a port: what a model family must define, in one file.

The file contains the family's configuration, its Linen module and the functions below, and ends in

    PORT = Port(config=Config, module=Llava, ...)

which is registered in `ports.loading` under the model_type of config.json. Nothing else needs to
know the family: the names and layout of its parameters follow from the module (`ports.names`,
`ports.checkpoint.params`), their sharding from the module's `axes`.

The module class implements `ports.nn.vision_language.VisionLanguageModel`: the paths of decoder and
head, `axes`, `text_decoder`, `unembed`, `embed_inputs`, and a `setup` with the checkpoint's names.
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from ports import checkpoint
from ports.inputs import vocabulary
from ports.inputs.patch_layout import Layouts
from ports.names import Rename, module_name
from ports.nn.decoder import DecoderConfig
from ports.nn.vision_language import VisionLanguageModel

LayOut = Callable[[Any, Mapping[str, np.ndarray], Callable[[], Any]], Layouts]


@runtime_checkable
class Sizes(Protocol):
    """A family's configuration: a frozen, hashable dataclass with everything the module needs."""

    @property
    def text(self) -> DecoderConfig:
        """Configuration of the decoder."""
        ...

    @property
    def image_tokens(self) -> tuple[int, ...]:
        """Ids of the tokens that stand for an image."""
        ...


@runtime_checkable
class SizesClass(Protocol):
    """The class of a configuration, whose class method reads it."""

    def from_hf(self, config: Any) -> Sizes:
        """Reads a transformers configuration.

        Raises:
            ValueError: a value is not implemented.
        """
        ...


def read_processor(directory: Path) -> Any:
    """Loads the processor of a family that transformers supports.

    Raises:
        ValueError: the processor does not load.
    """
    from transformers import AutoProcessor

    # The PIL backend needs neither torch nor torchvision and gives the same numbers everywhere.
    # Remote code is never run, and the user is not asked to.
    with checkpoint.loading(directory, "processor"):
        return AutoProcessor.from_pretrained(directory, trust_remote_code=False, backend="pil")


def read_tokenizer(directory: Path) -> Any:
    """Loads the tokenizer of a family that transformers supports.

    Raises:
        ValueError: the tokenizer does not load.
    """
    from transformers import AutoTokenizer

    with checkpoint.loading(directory, "tokenizer"):
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=False)


def read_parts(directory: Path) -> tuple[Any, Any, str | None]:
    """Loads the parts of a processor: image processor, tokenizer and chat template.

    Raises:
        ValueError: a part does not load.
    """
    from transformers import AutoImageProcessor, AutoTokenizer

    own = {"trust_remote_code": False}
    with checkpoint.loading(directory, "processor"):
        return (
            AutoImageProcessor.from_pretrained(directory, backend="pil", **own),
            AutoTokenizer.from_pretrained(directory, **own),
            read_template(directory),
        )


def read_template(directory: Path) -> str | None:
    """Returns the chat template if it has its own file, as in older checkpoints.

    Raises:
        ValueError: the file is damaged.
    """
    return read_settings(directory, "chat_template.json").get("chat_template")


def read_settings(directory: Path, name: str) -> dict[str, Any]:
    """Returns the values of a JSON file of a checkpoint, or none if it does not have the file.

    Raises:
        ValueError: the file is damaged.
    """
    file = directory / name
    return checkpoint.read_json(file) if file.exists() else {}


def read_video_settings(directory: Path) -> dict[str, Any]:
    """Returns the values of a checkpoint's video processor, from the first file that has them.

    Raises:
        ValueError: a file is damaged.
    """
    nested = read_settings(directory, "processor_config.json").get("video_processor")
    return (
        nested
        or read_settings(directory, "video_preprocessor_config.json")
        or read_settings(directory, "preprocessor_config.json")
    )


def leave_processor(processor: Any, config: Any, directory: Path) -> None:
    """Leaves a processor unchanged: the default for `Port.complete_processor`."""


def leave_tensors(config: Any, stored: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the stored tensors as they are: the default for `Port.rearrange`."""
    return dict(stored)


@dataclasses.dataclass(frozen=True)
class Port:
    """Everything that defines a model family.

    Attributes:
        config: class of its configuration.
        module: class of its Linen module, called with a configuration and a dtype.
        inputs: names of the processor's arrays that the module uses; others are ignored.
        example_inputs: (config, batch) -> shapes and dtypes of a batch with one image per row.
        prepare_inputs: (config, arrays) -> the arrays in the form that the module takes. Raises
            ValueError if they do not fit together.
        canonical_name: name of a tensor in any known checkpoint -> its name in the port, which is
            the one on the Hub; None for buffers, which are skipped.
        transformers_name: name of a tensor in the port -> its name in today's transformers, as
            used in adapter files.
        read_config: values of config.json -> a configuration, if transformers has no class for it.
        read_processor: directory -> processor.
        complete_processor: (processor, config, directory); sets what the processor's files lack.
        read_tokenizer: directory -> tokenizer.
        image_text: text for an image in a prompt whose chat template does not support images; "{}"
            is the image token.
        rearrange: (config, name in the file -> stored tensor) -> the same with tensors that are
            stored in other pieces than the module's (see `ports.checkpoint.fused`).
        per_position: further arrays with one row per sample and one column per position -> their
            fill value for padding.
        pieces: the module's arrays with one entry per image, crop, tile or frame, to which entries
            of zeros may be added: no tokens stand for them. From nine on, they are added up to one
            of a few numbers, for which few programs are compiled, and on a mesh up to a multiple of
            the devices that share a batch (see `ports.inputs.padding.count_pieces`).
        patch_layout: (config, arrays, read_processor) -> where the states of image tokens come
            from, for each row, with boxes as fractions of what the model saw (see
            `ports.inputs.patch_layout`); read_processor() is None if the checkpoint has none.
        crops_pictures: whether the processor crops pictures, or pads them to a square, before the
            model sees them as a whole. The tiles of other families are cut from whole pictures,
            whatever their processor says of cropping.
        takes_videos: whether `read_processor` returns a `ports.inputs.processor.VideoProcessor`.
        options: arguments of `ports.load` that set a field of the configuration -> their allowed
            values, the default first.
    """

    config: SizesClass
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
    rearrange: Callable[[Any, Mapping[str, Any]], dict[str, Any]] = leave_tensors
    per_position: Mapping[str, int] = dataclasses.field(default_factory=dict)
    pieces: tuple[str, ...] = ()
    patch_layout: LayOut | None = None
    options: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    crops_pictures: bool = False
    takes_videos: bool = False

    def hub_name(self, module: str) -> str:
        """Returns the port's name of a module named as in a known checkpoint or transformers."""
        return module_name(self.canonical_name, module)

    def load_processor(self, directory: Path, config: Any) -> Any:
        """Loads a checkpoint's processor, with what its files lack.

        Args:
            directory: the checkpoint.
            config: the family's configuration.

        Returns:
            The processor.

        Raises:
            ValueError: files are missing, or do not belong together or to the model.
        """
        _require_tokenizer(directory, "processor")
        processor = self.read_processor(directory)
        self.complete_processor(processor, config, directory)
        if getattr(processor, "chat_template", None) is None:
            # It may be only in tokenizer_config.json.
            processor.chat_template = processor.tokenizer.chat_template
        vocabulary.check_image_token(processor, config.image_tokens, directory)
        return processor

    def load_tokenizer(self, directory: Path) -> Any:
        """Loads a checkpoint's tokenizer; raises ValueError if its files are missing or damaged."""
        _require_tokenizer(directory, "tokenizer")
        return self.read_tokenizer(directory)


def _require_tokenizer(directory: Path, what: str) -> None:
    with checkpoint.loading(directory, what):
        checkpoint.require_tokenizer(directory)
