"""Whether a ``.gguf`` file holds the whole model, before a weight of it is read.

transformers initializes what it does not find at random and says so in a log; with a missing key
it goes on with another model's default. llama.cpp refuses both, and so does this module.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from qlora_kit.engines.gguf.file_tokenizer import read_value
from qlora_kit.errors import UnsupportedModelError

if TYPE_CHECKING:
    from gguf import GGUFReader

__all__ = ["check_keys", "check_tensors", "make_processor"]

#: What llama.cpp requires of every model of the architectures that are read here
#: (llama_model::load_hparams of llama-model.cpp).
_REQUIRED: Final = (
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "attention.head_count",
    "attention.layer_norm_rms_epsilon",
)


def check_keys(reader: GGUFReader, path: Path) -> None:
    """Refuse a file that does not state the shape of its model.

    Raises:
        UnsupportedModelError: Naming every key that is missing or no number.
    """
    architecture = read_value(reader, "general.architecture")
    keys = [f"{architecture}.{name}" for name in _REQUIRED]
    values = {key: read_value(reader, key) for key in keys}
    bad = [key for key, value in values.items() if not isinstance(value, int | float) or value <= 0]
    if bad:
        raise UnsupportedModelError(
            f"{path} does not say what its model looks like: {', '.join(bad)} "
            f"{'is' if len(bad) == 1 else 'are'} missing or not above 0. The file is damaged or "
            "was not written by llama.cpp's converter; get another one."
        )


def check_tensors(reader: GGUFReader, config: Any, path: Path) -> dict[str, str]:
    """Refuse a file whose tensors are not those of its architecture, each in its shape.

    Args:
        reader: The file.
        config: transformers' configuration of the model, read from the same file.
        path: Its name, for messages.

    Returns:
        What transformers calls each of them.

    Raises:
        UnsupportedModelError: When tensors are missing or left over, with the first of them.
    """
    names, shapes = _list_expected(config, make_processor(reader, config))
    expected = {theirs: shapes[ours] for theirs, ours in names.items()}
    found = {tensor.name: tuple(int(n) for n in tensor.shape) for tensor in reader.tensors}
    if "output.weight" not in found:  # a tied head is not stored
        expected.pop("output.weight", None)
    _refuse(path, "lacks", sorted(set(expected) - set(found)), len(expected))
    _refuse(path, "holds", sorted(set(found) - set(expected)), len(found))
    for name, shape in expected.items():
        # GGUF counts dimensions from the innermost, as ggml does.
        if tuple(reversed(found[name])) != shape:
            raise UnsupportedModelError(
                f"{path} has {name} of shape {list(reversed(found[name]))}, and a model of its "
                f"metadata has it of shape {list(shape)}. The file is damaged; get another one."
            )
    return names


def _refuse(path: Path, what: str, names: Sequence[str], total: int) -> None:
    if not names:
        return
    why = "they would be random" if what == "lacks" else "they would be left out of the model"
    raise UnsupportedModelError(
        f"{path} {what} {len(names)} of {total} tensors that "
        f"{'its architecture has' if what == 'lacks' else 'its architecture does not have'}, such "
        f"as {names[0]}; {why}. The file is incomplete or damaged; get another one."
    )


def _list_expected(
    config: Any, processor: Any
) -> tuple[dict[str, str], dict[str, tuple[int, ...]]]:
    """A model's tensors by their names in GGUF, and the shapes of each in torch's order."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import get_gguf_hf_weights_map

    with torch.device("meta"), _quiet():
        model = AutoModelForCausalLM.from_config(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    named = get_gguf_hf_weights_map(_WithoutModules(config, shapes), processor)
    return {theirs: ours for theirs, ours in named.items() if ours in shapes}, shapes


def make_processor(reader: GGUFReader, config: Any) -> Any:
    """What of transformers turns a file's tensors into its own."""
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor

    architecture = read_value(reader, "general.architecture")
    return TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=config.to_dict())


class _WithoutModules:
    """A model that names its tensors; transformers builds its map of names anew for each module."""

    def __init__(self, config: Any, names: Mapping[str, object]) -> None:
        self.config, self._names = config, names

    def state_dict(self) -> Mapping[str, object]:
        return self._names

    def named_children(self) -> Sequence[object]:
        return ()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    log = logging.getLogger("transformers")
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before
