"""The experiments of *Decoupled Weight Decay Regularization* on small real data: `python -m examples.paper`."""
