"""Texts to vectors by the frozen layers; users and items to vectors by a trained model."""
