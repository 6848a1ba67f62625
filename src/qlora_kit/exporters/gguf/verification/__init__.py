"""Written ``.gguf`` files held against where they came from."""
