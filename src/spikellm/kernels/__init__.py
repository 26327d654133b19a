"""Integer products: the reference in torch."""
