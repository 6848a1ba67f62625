"""How a model is loaded, adapted, trained and run."""
