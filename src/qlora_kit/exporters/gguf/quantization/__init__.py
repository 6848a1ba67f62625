"""Which type each tensor is stored in, and its bytes."""
