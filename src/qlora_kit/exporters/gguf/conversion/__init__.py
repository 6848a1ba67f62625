"""From merged tensors to ``.gguf`` files."""
