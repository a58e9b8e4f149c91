"""Preparation: fingerprint -> plan -> preprocessed cases (preprocess, cache) -> patches (patches, augment)."""
