"""The control plane: shows runs from their folders and their Redis, and passes requests of people to them."""
