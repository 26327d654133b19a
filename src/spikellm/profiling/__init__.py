"""What a model consists of and costs."""
