"""How each model family differs between transformers and llama.cpp."""
