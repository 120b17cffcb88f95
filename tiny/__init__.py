"""The embedded model: its weights, texts, tasks and training."""
