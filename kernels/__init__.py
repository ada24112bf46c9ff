"""The device op of LinVT: gather the selected tokens and pool them at every scale."""
