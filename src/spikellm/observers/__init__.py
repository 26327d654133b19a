"""What is seen of activations while a model is converted."""
