"""transformers + peft + bitsandbytes, and this project's own fast path."""
