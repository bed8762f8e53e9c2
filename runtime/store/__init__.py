"""Feature maps of many images on disk, which an extraction writes and which are read by image name."""

from ditf.runtime.store.feature_store import FeatureStore

__all__ = ["FeatureStore"]
