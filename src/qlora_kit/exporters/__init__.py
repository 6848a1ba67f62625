"""The built-in exporters, one plugin each, registered through the public hook."""
