"""How encoded examples are laid out in batches."""
