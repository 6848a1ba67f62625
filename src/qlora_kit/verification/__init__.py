"""The promise, kept: what was written is compared with the model in memory."""
