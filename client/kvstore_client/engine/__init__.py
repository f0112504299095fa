"""What the engines' adapters share: settings, names of weights and blocks, stores behind a step.

Imports no engine and no torch.
"""
