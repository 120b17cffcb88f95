"""How a model folder is read and written."""
