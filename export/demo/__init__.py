"""The demo model: a tiny LinVT-InternVL2 that answers questions about moving digits, trained from scratch.

Nothing of the exporter imports this package; its product is a checkpoint folder in the published layout.
"""
