"""The control plane: watches runs from their folders and their Redis, and passes on what people ask of them."""
