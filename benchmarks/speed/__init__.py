"""Side by side: the bare forward pass, exactivations, and what people use otherwise."""
