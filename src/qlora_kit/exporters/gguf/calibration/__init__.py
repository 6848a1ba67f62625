"""What the live model computes on some rows: which inputs matter, and what a type costs."""
