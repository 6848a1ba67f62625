"""The format: the trained matrices as a NumPy archive, until you write something else."""

from dataclasses import dataclass
from typing import Literal

import qlora_kit


@dataclass(frozen=True)
class MyFormatOptions:
    """Options of ``my-format``.

    Attributes:
        dtype: What the matrices are stored in.
    """

    dtype: Literal["float32", "float16"] = "float32"


class MyFormatExporter:
    """Writes ``adapter.npz``."""

    name = "my-format"
    summary = "The trained matrices as a NumPy archive."
    options_type = MyFormatOptions

    def check(self, request):
        """Refuse what cannot work, and say how many bytes it takes. Nothing is written yet."""
        if not isinstance(request.model, qlora_kit.AdaptedModel):
            raise qlora_kit.errors.UnsupportedModelError(
                "Format 'my-format' writes an adapter, and this model has none. Use attach_lora."
            )
        return qlora_kit.ExportEstimate(disk_bytes=4 * request.model.trainable_parameters + 100_000)

    def write(self, request, folder):
        """Write every file into ``folder``; what is returned goes into the manifest."""
        import numpy as np

        arrays = read_arrays(request)
        np.savez(folder / "adapter.npz", **arrays)
        return {"arrays": len(arrays)}

    def verify(self, request, folder):
        """Compare what ``write`` left in ``folder`` with the model in memory."""
        import numpy as np

        expected = read_arrays(request)
        with np.load(folder / "adapter.npz") as written:
            same = written.files == list(expected) and all(
                np.array_equal(written[name], expected[name]) for name in expected
            )
        check = qlora_kit.Check("arrays", same, f"{len(expected)} compared, bit for bit")
        return qlora_kit.Verification("standard", (check,))


def read_arrays(request):
    """The trained matrices by name."""
    return {
        name: parameter.detach().float().cpu().numpy().astype(request.options.dtype)
        for name, parameter in request.model.model.named_parameters()
        if parameter.requires_grad
    }
