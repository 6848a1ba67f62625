"""Writing a model folder: staged, streamed, accompanied and compared.

Exporters and the export stage build on this; nothing here knows which formats exist.
"""
