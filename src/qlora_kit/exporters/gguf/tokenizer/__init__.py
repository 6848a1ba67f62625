"""A Hugging Face tokenizer as llama.cpp's, and the proof that both split alike."""
