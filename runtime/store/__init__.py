"""Feature maps of many images on disk: written by an extraction, read by name."""

from ditf.runtime.store.feature_store import FeatureStore

__all__ = ["FeatureStore"]
