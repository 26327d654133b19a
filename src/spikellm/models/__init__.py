"""What is known of the model library's families; its internals are used here and nowhere else."""
