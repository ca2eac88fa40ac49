"""Datalists, loading, patches, phantom sites."""
