"""Reading a ``.gguf`` file as a base model, for every engine."""
