"""What runs when a model runs."""
