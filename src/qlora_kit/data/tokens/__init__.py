"""From segments of text to token ids and labels."""
