"""Text, tokens, windows."""
