"""A model in several ``.gguf`` files, as ``llama-gguf-split`` cuts it, joined to one.

Every part states ``split.no`` and ``split.count``, the first one the metadata as well; parts are
called ``NAME-00001-of-00003.gguf`` (llama.cpp, ``llama_split_path`` of llama.cpp).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from qlora_kit.engines.gguf.file_tokenizer import read_value
from qlora_kit.errors import ModelNotFoundError, UnsupportedModelError

if TYPE_CHECKING:
    from gguf import GGUFReader

__all__ = ["find_parts", "join_parts"]

_PART: Final = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
# What the whole file has no use for; the others are metadata of the reader itself.
_SPLIT_KEYS: Final = ("split.no", "split.count", "split.tensors.count")


def find_parts(path: Path, reader: GGUFReader) -> list[Path]:
    """Every part of the model that a file belongs to, in order; the file alone if it is whole.

    Args:
        path: Any one of the parts.
        reader: That file, opened.

    Raises:
        ModelNotFoundError: When a part is missing; names it.
        UnsupportedModelError: When the file is a part and not called like one.
    """
    count = int(read_value(reader, "split.count", 1) or 1)
    if count == 1:
        return [path]
    match = _PART.fullmatch(path.name)
    if match is None or int(match["count"]) != count:
        raise UnsupportedModelError(
            f"{path} is one of {count} parts of a model and is not called like one of them, so "
            f"the others cannot be found. Call it NAME-00001-of-{count:05}.gguf, as it was."
        )
    parts = [
        path.with_name(f"{match['stem']}-{number:05}-of-{count:05}.gguf")
        for number in range(1, count + 1)
    ]
    missing = [part.name for part in parts if not part.is_file()]
    if missing:
        raise ModelNotFoundError(
            f"{path} is one of {count} parts of a model, and {', '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} not beside it. Download "
            f"{'it' if len(missing) == 1 else 'them'} into {path.parent}."
        )
    return parts


def join_parts(parts: Sequence[Path], readers: Sequence[GGUFReader], target: Path) -> None:
    """Write the parts of a model into one file, tensor by tensor.

    Args:
        parts: The files, in order.
        readers: The same, opened.
        target: The file to write.

    Raises:
        UnsupportedModelError: When the parts are not of one model.
    """
    from gguf import GGUFValueType, GGUFWriter

    first = readers[0]
    architecture = str(read_value(first, "general.architecture"))
    for number, (part, reader) in enumerate(zip(parts, readers, strict=True)):
        if int(read_value(reader, "split.no", -1)) != number:
            raise UnsupportedModelError(
                f"{part} says that it is part {read_value(reader, 'split.no')}, counted from 0, "
                f"and its name says {number}. Download the parts again."
            )
    names = [tensor.name for reader in readers for tensor in reader.tensors]
    stated = int(read_value(first, "split.tensors.count", len(names)))
    if stated != len(names) or len(set(names)) != len(names):
        raise UnsupportedModelError(
            f"The {len(parts)} parts of {parts[0]} hold {len(names)} tensors, {len(set(names))} of "
            f"them different, where {stated} are stated. They are not of one model; download them "
            "again."
        )
    writer = GGUFWriter(target, architecture)
    for field in first.fields.values():
        # The architecture is written by the writer; GGUF.* are the reader's own.
        if field.name in (*_SPLIT_KEYS, "general.architecture") or field.name.startswith("GGUF."):
            continue
        kind = field.types[0]
        inner = field.types[-1] if kind == GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), kind, sub_type=inner)
    for reader in readers:
        for tensor in reader.tensors:
            data = tensor.data
            writer.add_tensor_info(
                tensor.name, data.shape, data.dtype, data.nbytes, tensor.tensor_type
            )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for reader in readers:
        for tensor in reader.tensors:
            writer.write_tensor_data(tensor.data, tensor_endianess=reader.endianess)
    writer.close()
