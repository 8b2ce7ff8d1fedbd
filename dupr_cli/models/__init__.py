"""Networks: the backbone protocol and its families, batch norm, naming, weights to compare."""
