"""An environment for training agents."""
