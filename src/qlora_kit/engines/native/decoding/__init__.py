"""Writing answers with a model in memory: prompts, a cache, and one token after another.

``decoders.py`` finds or makes a model's decoder, ``decoder.py`` computes, ``session.py`` keeps the
answers' slots. A step of one answer and one of several have kernels of their own on CUDA
(``row_*.py``, ``batch_*.py``); on a CPU one answer has ``cpu_step.cpp``.
"""
